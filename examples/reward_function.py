"""A SARM as a reward function of TRL's GRPO and RLOO trainers, which says which features paid the reward.

    pip install trl

    trainer = GRPOTrainer(model=policy, reward_funcs=SarmRewardFunction(sarm, tokenizer), ...)

Of each call it keeps the features with the largest mean contribution w_i mean(z_i) over the completions (paper, eq. 9),
so that a policy that learns to please one feature shows while it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from sarmlib.chat import encode_conversations, end_of_turn_id, fit_length, pad_id, truncate_left
from sarmlib.errors import DataError, ModelError
from sarmlib.evaluation.scorer import score_ids


def encode_queries(tokenizer, queries: Sequence) -> list[list[int]]:
    """Token ids of texts in the chat template (one BOS and the end of turn are put right) and of conversations.

    Raises DataError naming the item that is neither a text nor a conversation ending with the assistant.
    """
    sequences = []
    for number, query in enumerate(queries):
        if isinstance(query, str) and query.strip():
            sequences.append(_encode_text(tokenizer, query))
        elif isinstance(query, list):
            try:
                sequences += encode_conversations(tokenizer, [query])
            except DataError as error:
                raise DataError(f"query {number}: {error}") from None
        else:
            raise DataError(f"query {number} is {repr(query)[:60]}; a text or a list of messages is needed")
    return sequences


def _encode_text(tokenizer, text: str) -> list[int]:
    ids, bos = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    end = end_of_turn_id(tokenizer)
    return ids if end is None or ids[-1] == end else [*ids, end]


class SarmRewardFunction:
    """Callable ``(prompts, completions, **kwargs) -> list[float]`` as TRL documents it, one reward a completion.

    ``tokenizer`` is the reward model's own.  ``log_features``: features named per call; 0 names none, and then any
    reward model will do.  ``labels``: feature -> words, put behind the feature's number.  Texts longer than
    ``max_length`` tokens lose their beginning.

    Prompts and completions are both conversations (lists of messages) or both texts, which are joined as TRL joins
    them.  Raises DataError for a pair that is neither, ModelError for a reward that is not finite.

    ``history`` keeps the last 1000 calls: ``{"reward": mean, "features": {i: mean contribution}, "rest": others}``.
    The same goes to ``log_metric`` and, completion by completion, to ``log_extra`` where TRL passes them.
    """

    __name__ = "sarm"  # TRL names its metrics by it

    def __init__(self, model, tokenizer, *, log_features: int = 8, labels: Mapping[int, str] | None = None,
                 max_length: int = 2048):
        if log_features and not hasattr(model, "encode"):
            raise ModelError(f"{type(model).__name__} has no sparse features to name; pass log_features=0")
        self.model, self.tokenizer, self.log_features, self.labels = model, tokenizer, log_features, labels or {}
        self.max_length = max_length
        self.history: deque[dict] = deque(maxlen=1000)

    def __call__(self, prompts: Sequence, completions: Sequence, log_extra=None, log_metric=None, **kwargs
                 ) -> list[float]:
        if len(prompts) != len(completions):
            raise DataError(f"{len(prompts)} prompts but {len(completions)} completions; one prompt a completion")
        queries = [_joined(number, *pair) for number, pair in enumerate(zip(prompts, completions, strict=True))]
        if not queries:
            return []
        ids = truncate_left(self.tokenizer, encode_queries(self.tokenizer, queries),
                            fit_length(self.model, self.max_length))
        rewards, z, _ = score_ids(self.model, ids, pad_id=pad_id(self.tokenizer), features=self.log_features > 0)
        if z is not None:
            self._log(rewards, z, log_extra, log_metric)
        return [float(reward) for reward in rewards]

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
