"""Why a reward is what it is: its exact decomposition over active features (paper eq. 9).

    r = sum_i z_i w_i        the contribution of feature i is z_i w_i; inactive features contribute exactly 0
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from sarmlib.chat import encode_conversations
from sarmlib.errors import DataError, ModelError
from sarmlib.evaluation.scorer import score

TOLERANCE = 1e-5  # gap between a reward and its contributions' sum, relative to 1 + sum of their sizes


@dataclass(frozen=True)
class Explanation:
    """One reward, taken apart: the contributions in ``table`` and ``rest`` sum to ``reward``."""

    reward: float  # r, as the model returned it (for a pair: r_chosen - r_rejected)
    table: pd.DataFrame  # feature, label (if given), z (a pair: z_chosen, z_rejected), w, contribution
    rest: float  # sum of the contributions that `top` left out of the table
    token: str  # the rewarded token, whose state the features describe
    n_active: int  # active features, also those left out of the table
    prompt: str  # the last turn before the answer, if any
    answers: tuple[str, ...]  # the answer (for a pair: chosen, rejected)

    def __str__(self) -> str:
        name, table = "margin" if "z_chosen" in self.table else "reward", self.table
        paying = table["contribution"] != 0
        zero, more = (~paying).sum(), self.n_active - len(table)
        counted = ((zero, f"{zero} of them adding 0"), (more, f"{more} more features: {self.rest:+.2f}"))
        notes = [words for n, words in counted if n]
        total = f"{name} {self.reward:+.2f} at token {self.token!r} = sum of {self.n_active} features"
        lines = [f"{total} ({'; '.join(notes)})" if notes else total]
        if paying.any():
            lines.append(_worded(table[paying]).to_string(index=False, float_format="{:+.2f}".format))
        return "\n".join(lines)


def _worded(table: pd.DataFrame) -> pd.DataFrame:
    """The labels in front, at a width that a terminal holds; no such column when no feature has one."""
    if "label" not in table or not table["label"].any():
        return table.drop(columns="label", errors="ignore")
    words = [label.removeprefix("more often: ") or "(no label)" for label in table["label"]]
    words = [f"{label[:47]}…" if len(label) > 48 else label for label in words]
    return table.assign(label=words).set_index(["label", "feature"]).reset_index()


def explain(model, tokenizer, conversation: Sequence[dict], top: int | None = None, *, max_length: int = 2048,
            labels: Mapping[int, str] | None = None) -> Explanation:
    """Every active feature of a conversation's reward with z_i, w_i and z_i w_i (eq. 9), largest first.

    `top` keeps the largest contributions; the others are summed in ``rest``.  `labels`: feature -> words.
    Raises `ModelError` for a model without features, and when the contributions do not sum to the reward.
    """
    (reward, table, token), = _features(model, tokenizer, [conversation], max_length)
    table["contribution"] = table["z"] * table["w"]
    return _explanation(reward, table, token, top, labels, conversation[:-1], conversation[-1]["content"])


def explain_pair(model, tokenizer, prompt: str | Sequence[dict], chosen: str, rejected: str,
                 top: int | None = None, *, max_length: int = 2048,
                 labels: Mapping[int, str] | None = None) -> Explanation:
    """Why one answer is rewarded more than the other: w_i (z_i^chosen - z_i^rejected), else as `explain`."""
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    sides = [[*prompt, {"role": "assistant", "content": answer}] for answer in (chosen, rejected)]
    (reward, table, token), (other_reward, other, _) = _features(model, tokenizer, sides, max_length)
    table = table.merge(other, on=["feature", "w"], how="outer", suffixes=("_chosen", "_rejected"))
    table = table[["feature", "z_chosen", "z_rejected", "w"]].fillna(0.0)
    table["contribution"] = table["w"] * (table["z_chosen"] - table["z_rejected"])
    return _explanation(reward - other_reward, table, token, top, labels, prompt, chosen, rejected)


def _features(model, tokenizer, conversations, max_length: int) -> list[tuple[float, pd.DataFrame, str]]:
    """(reward, active features with z and w, rewarded token) of each conversation."""
    if not hasattr(model, "sae"):
        raise ModelError(f"{type(model).__name__} has no sparse features to explain a reward by; use a SARM")
    scores = score(model, tokenizer, conversations, max_length=max_length, features=True)
    ids, found = encode_conversations(tokenizer, conversations), []
    weights = model.score.weight[0].detach().double().cpu().numpy()
    for row, reward in enumerate(scores.rewards):
        code = scores.features[[row]].tocoo()
        table = pd.DataFrame({"feature": code.col, "z": code.data.astype(float), "w": weights[code.col]})
        found.append((float(reward), table, tokenizer.decode(ids[row][-1:])))
    return found


def _explanation(reward: float, table: pd.DataFrame, token: str, top, labels,
                 turns: Sequence[dict], *answers: str) -> Explanation:
    if top is not None and top < 1:
        raise DataError(f"top must be at least 1, got {top}")
    total, size = table["contribution"].sum(), table["contribution"].abs().sum()
    if not abs(total - reward) <= TOLERANCE * (1 + size):
        raise ModelError(f"contributions sum to {total} but the reward is {reward}; the head is not the "
                         "linear map of eq. 9, or the precision is too low: load the model in float32")
    table = table.sort_values("contribution", key=abs, ascending=False, kind="stable", ignore_index=True)
    if labels is not None:
        table.insert(1, "label", [labels.get(int(feature), "") for feature in table["feature"]])
    kept = table if top is None else table.head(top)
    rest = float(table["contribution"].iloc[len(kept):].sum())
    prompt = turns[-1]["content"] if turns else ""
    return Explanation(reward, kept, rest, token, len(table), prompt, answers)
