"""Why a reward is what it is: its exact decomposition over active features (paper eq. 9).

    r = sum_i z_i w_i        the contribution of feature i is z_i w_i; inactive features contribute exactly 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd
import torch

from ..chat import collate, encode_conversations, fit_length, pad_id
from ..errors import DataError, ModelError

TOLERANCE = 1e-5
"""Largest allowed gap between a reward and the sum of its contributions, relative to 1 + sum of their sizes."""


@dataclass(frozen=True)
class Explanation:
    """One reward, taken apart.  ``table`` is sorted by the size of the contribution; the rows sum to ``reward``."""

    reward: float
    """r, as the model returned it."""
    table: pd.DataFrame
    """Columns feature, z, w, contribution = z w (and label, when labels were given), one row per active feature."""
    rest: float
    """Sum of the contributions that `top` left out of the table (0 when nothing was left out)."""
    token: str
    """The rewarded token (its state is what the features describe)."""
    n_active: int
    """Active features, also those left out of the table."""

    def _repr_html_(self) -> str:
        note = f" ({self.n_active - len(self.table)} more features: {self.rest:+.4f})" if self.rest else ""
        table = self.table.to_html(index=False, float_format=lambda value: f"{value:+.4f}")
        token = escape(repr(self.token))  # "<eot>" is text here, not a tag
        return f"<p>reward {self.reward:+.4f} at token <code>{token}</code>{note}</p>{table}"


def explain(model, tokenizer, conversation: Sequence[dict], top: int | None = None, *, max_length: int = 2048,
            labels: Mapping[int, str] | None = None) -> Explanation:
    """Every active feature of one conversation's reward with z_i, w_i and its contribution z_i w_i (eq. 9).

    `top` keeps the largest contributions; the sum of the others is in ``rest``.  `labels` maps features to words.
    Raises `ModelError` for a model without features, and when the contributions do not sum to the reward.
    """
    return _explain(model, tokenizer, [conversation], top, max_length, labels)[0]


def explain_pair(model, tokenizer, prompt: str | Sequence[dict], chosen: str, rejected: str, top: int | None = None, *,
                 max_length: int = 2048, labels: Mapping[int, str] | None = None) -> Explanation:
    """Why one answer is rewarded more than the other: differences w_i (z_i^chosen - z_i^rejected), largest first.

    The table has columns feature, z_chosen, z_rejected, w, contribution; ``reward`` is the margin r_chosen - r_rejected
    and the contributions (with ``rest``) sum to it.
    """
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    sides = [[*prompt, {"role": "assistant", "content": answer}] for answer in (chosen, rejected)]
    one, other = _explain(model, tokenizer, sides, None, max_length, None)
    table = one.table[["feature", "z", "w"]].merge(other.table[["feature", "z", "w"]], on="feature", how="outer",
                                                   suffixes=("_chosen", "_rejected"))
    table["w"] = table.pop("w_chosen").fillna(table.pop("w_rejected"))
    table = table.fillna({"z_chosen": 0.0, "z_rejected": 0.0})
    table["contribution"] = table["w"] * (table["z_chosen"] - table["z_rejected"])
    return _explanation(one.reward - other.reward, table, one.token, top, labels)


def _explain(model, tokenizer, conversations, top, max_length, labels) -> list[Explanation]:
    sequences = encode_conversations(tokenizer, conversations, fit_length(model, max_length))
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.inference_mode():
            batch = collate(sequences, pad_id(tokenizer))
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    finally:
        model.train(was_training)
    if getattr(output, "code", None) is None:
        raise ModelError(f"{type(model).__name__} has no sparse features to attribute a reward to; explain a SARM")
    weights = model.score.weight[0].detach().double().cpu().numpy()
    found = []
    for row, ids in enumerate(sequences):
        features = output.code.indices[row].cpu().numpy()
        z = output.code.values[row].double().cpu().numpy()
        active = np.flatnonzero(z)
        table = pd.DataFrame({"feature": features[active], "z": z[active], "w": weights[features[active]]})
        table["contribution"] = table["z"] * table["w"]
        reward = float(output.logits[row, 0])
        found.append(_explanation(reward, table, tokenizer.decode([ids[-1]]), top, labels))
    return found


def _explanation(reward: float, table: pd.DataFrame, token: str, top, labels) -> Explanation:
    """Check that contributions sum to the reward, sort them, and cut to the largest `top`."""
    if top is not None and top < 1:
        raise DataError(f"top must be at least 1, got {top}")
    if not np.isfinite(reward):
        raise ModelError(f"the reward is {reward}, so there is nothing to explain; the model's weights or precision "
                         "are broken, try dtype float32 or bfloat16 instead of float16")
    total, size = table["contribution"].sum(), table["contribution"].abs().sum()
    if not abs(total - reward) <= TOLERANCE * (1 + size):
        raise ModelError(f"contributions sum to {total} but the reward is {reward}; the head is not the linear map of "
                         "eq. 9, or the model runs in low precision: load it in float32 to explain it")
    order = table["contribution"].abs().sort_values(ascending=False, kind="stable").index
    table = table.loc[order].reset_index(drop=True)
    if labels is not None:
        table["label"] = [labels.get(int(feature), "") for feature in table["feature"]]
    kept = table if top is None else table.head(top)
    rest = float(table["contribution"].iloc[len(kept):].sum())
    return Explanation(reward, kept, rest, token, len(table))
