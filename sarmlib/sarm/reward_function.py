"""A SARM as a reward function of TRL's GRPO and RLOO trainers, which says which features paid the reward.

    trainer = GRPOTrainer(model=policy, reward_funcs=SarmRewardFunction(sarm, tokenizer), ...)

Of each call: the features with the largest mean contribution w_i mean(z_i) over the completions (paper eq. 9), so that
a policy that learns to please one feature shows while it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from ..chat import fit_length, pad_id, truncate_left
from ..errors import ConfigError, DataError, ModelError
from ..evaluation.prefix import score_with_shared_prefix
from .serving import encode_queries


class SarmRewardFunction:
    """Callable ``(prompts, completions, **kwargs) -> list[float]`` as TRL documents it, one reward a completion.

    Args:
        model: a SARM (with ``log_features=0`` also another reward model); it stays on its device.
        tokenizer: the reward model's own; its chat template renders conversations.
        log_features: features named per call; 0 names none.
        labels: feature -> words, put behind the feature's number.
        max_length: tokens; longer texts lose tokens on the left.
        batch_tokens: as in `evaluation.scoring.score_token_ids`.

    Prompts and completions are both conversations (lists of messages) or both texts.  A conversation is prompt +
    completion under the chat template; texts are joined as TRL joins them, given one BOS and a closed turn.
    Completions of one prompt share its computation.  Raises `DataError` for a pair that is neither and `ModelError`
    for a reward that is not finite.

    ``history`` keeps the last 1000 calls: ``{"reward": mean, "features": {i: mean contribution}, "rest": the others}``.
    The same goes to ``log_metric`` and, completion by completion, to ``log_extra`` where TRL passes them.
    """

    def __init__(self, model, tokenizer, *, log_features: int = 8, labels: Mapping[int, str] | None = None,
                 max_length: int = 2048, batch_tokens: int | None = None):
        if log_features < 0:
            raise ConfigError(f"log_features={log_features}: give the number of features to name, or 0 for none")
        if log_features and not hasattr(model, "encode"):
            raise ModelError(f"{type(model).__name__} has no sparse features to name; pass log_features=0")
        self.model, self.tokenizer, self.log_features, self.labels = model, tokenizer, log_features, labels or {}
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self.history: deque[dict] = deque(maxlen=1000)
        self.__name__ = "sarm"  # TRL names its metrics by it

    def __call__(self, prompts: Sequence, completions: Sequence, log_extra=None, log_metric=None, **kwargs
                 ) -> list[float]:
        if len(prompts) != len(completions):
            raise DataError(f"{len(prompts)} prompts but {len(completions)} completions; one prompt a completion")
        queries = [_joined(number, *pair) for number, pair in enumerate(zip(prompts, completions, strict=True))]
        sequences = truncate_left(self.tokenizer, encode_queries(self.tokenizer, queries),
                                  fit_length(self.model, self.max_length))
        rewards, z = score_with_shared_prefix(self.model, sequences, pad_id=pad_id(self.tokenizer),
                                              batch_tokens=self.batch_tokens, features=self.log_features > 0)
        if z is not None and len(rewards):
            self._log(rewards, z, log_extra, log_metric)
        return rewards.tolist()

    def _log(self, rewards: np.ndarray, z, log_extra, log_metric) -> None:
        paid = z.multiply(self.model.score.weight[0].detach().float().cpu().numpy()).tocsr()
        mean = np.asarray(paid.mean(axis=0)).ravel()
        top = [int(i) for i in np.argsort(-np.abs(mean), kind="stable")[:self.log_features] if mean[i]]
        features, rest = {i: float(mean[i]) for i in top}, float(rewards.mean() - mean[top].sum())
        self.history.append({"reward": float(rewards.mean()), "features": features, "rest": rest})
        if log_metric is not None:
            for i, value in features.items():
                log_metric(f"sarm/{self._name(i)}", value)
            log_metric("sarm/other features", rest)
        if log_extra is not None:
            log_extra("sarm_features", [self._words(paid[[row]]) for row in range(len(rewards))])

    def _words(self, row) -> str:
        order = np.argsort(-np.abs(row.data), kind="stable")[:3]
        return ", ".join(f"{self._name(int(row.indices[i]))} {row.data[i]:+.3g}" for i in order)

    def _name(self, feature: int) -> str:
        return f"feature {feature}" + (f" ({self.labels[feature]})" if feature in self.labels else "")


def _joined(number: int, prompt, completion):
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*prompt, *completion]
    raise DataError(f"pair {number}: the prompt is a {type(prompt).__name__} and the completion a "
                    f"{type(completion).__name__}; give two texts, or two lists of messages")
