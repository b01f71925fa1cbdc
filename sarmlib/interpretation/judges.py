"""Held-out judging of labels: does a label tell active from inactive responses to prompts not yet explained?

AUROC is the chance that an active response outscores an inactive one (ties count half).  A label is reliable only
when it also beats judges that know no words: response length, domain, base reward.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from sarmlib.evaluation.statistics import auroc, aurocs
from sarmlib.interpretation.contexts import Contexts
from sarmlib.interpretation.explainers import Label, Vocabulary, shuffle_by_prompt

MIN_POSITIVES = 30  # with fewer of a class held out, an interval is wider than the question: no score
SAMPLE = 100  # most held-out responses of each class
COLUMNS = ["feature", "label", "n_pos", "n_neg", "auroc", "auroc_lo", "auroc_hi", "null_95", "p_value",
           "q_value", "auroc_other_label", "auroc_length", "auroc_reward", "auroc_domain", "best_trivial",
           "lift", "lift_lo", "reliable", "verdict"]


class KeywordJudge:
    """Sum of the label's term weights found in the response (a judge may say NaN where it cannot tell)."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary

    def score(self, label: Label, units: pd.DataFrame) -> np.ndarray:
        found = map(self.vocabulary.terms, units["text"], units["length"])
        scores = [sum(w for term, w in label.weights.items() if term in terms) for terms in found]
        return np.array(scores, float)


def held_out_sample(contexts: Contexts, feature: int, negatives: str = "random",
                    seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the test split and their boolean activity, at most 100 active and 100 inactive.

    negatives: "random"; "matched" (inactive responses to prompts that also have an active one: no topic); or
    "neighbour" (inactive ones in which one of the feature's five nearest fires, `Contexts.neighbours`).
    """
    rows = contexts.rows("test")
    active = contexts.activation(feature)[rows] != 0
    pool = ~active
    if negatives == "matched":
        pool &= np.isin(contexts.prompt[rows], contexts.prompt[rows][active])
    elif negatives == "neighbour":
        near = contexts.neighbours(feature, 5)["feature"].to_numpy()
        pool &= (contexts.z[rows][:, near] != 0).sum(axis=1) > 0
    rng = np.random.default_rng([seed, feature])
    positives, others = (rng.permutation(rows[mask])[:SAMPLE] for mask in (active, pool))
    chosen = np.sort(np.concatenate([positives, others]))
    return chosen, np.isin(chosen, positives)


def _auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """AUROC over what the judge could judge; NaN when that is under 9 in 10, or a class has under 30."""
    known = np.isfinite(score)
    pos, neg = score[known & positive], score[known & ~positive]
    if known.sum() < 0.9 * len(score) or min(len(pos), len(neg)) < MIN_POSITIVES:
        return float("nan")
    return auroc(pos, neg)


def auroc_bootstrap(score: np.ndarray, positive: np.ndarray, prompt: np.ndarray, n_boot: int,
                    rng: np.random.Generator) -> np.ndarray:
    """AUROC of ``n_boot`` resamples of whole prompts [n_boot]; NaN where a resample lost a class."""
    _, group = np.unique(prompt, return_inverse=True)
    n = group.max() + 1
    times = rng.multinomial(n, np.full(n, 1 / n), size=n_boot)[:, group]
    return aurocs(score, times * positive, times * ~positive)


def trivial_scores(train: pd.DataFrame, active: np.ndarray, units: pd.DataFrame) -> dict[str, np.ndarray]:
    """Scores of judges that read no words: length and reward with the direction found on ``train`` (index rows
    and their boolean activity), and the share of the domain that is active there."""
    scores = {}
    for name in ("length", "reward"):
        value = train[name].to_numpy(float)
        falling = 0 < active.sum() < len(active) and auroc(value[active], value[~active]) < 0.5
        scores[name] = units[name].to_numpy(float) * (-1 if falling else 1)
    share = pd.Series(active, dtype=float).groupby(train["domain"].to_numpy()).mean()
    scores["domain"] = units["domain"].map(share).fillna(active.mean()).to_numpy(float)
    return scores


def judge_labels(contexts: Contexts, labels: Sequence[Label], judge, *, also: Sequence[str] = (),
                 q: float = 0.1, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Score every label on the test split by ``judge.score(label, index rows)``; one row per label.

    auroc_lo, auroc_hi: 95 %, bootstrap over prompts; null_95, p_value: activity shuffled by prompt; q_value:
    Benjamini-Hochberg over scored labels; lift: over the best judge without words (paired bootstrap); also:
    kinds of harder negatives, each with a column auroc_<kind>.
    A label is reliable when it did not abstain, q_value <= q, auroc_lo > max(0.5, null_95) and lift_lo > 0.
    Scores are NaN, with the reason as verdict, when it abstained or a class has under 30 responses.
    """
    records = [_judge_one(contexts, label, labels, judge, also, n_boot, seed) for label in labels]
    table = pd.DataFrame(records, columns=[*COLUMNS[:7], *(f"auroc_{kind}" for kind in also), *COLUMNS[7:]])
    scored = table["p_value"].notna()
    if scored.any():
        table.loc[scored, "q_value"] = false_discovery_control(table.loc[scored, "p_value"])
    signal = scored & (table["q_value"] <= q) & (table["auroc_lo"] > table["null_95"].clip(lower=0.5))
    table["reliable"] = signal & (table["lift_lo"] > 0)
    table.loc[scored, "verdict"] = "not reliable: no better than shuffled activity"
    table.loc[signal, "verdict"] = "not reliable: no better than " + table["best_trivial"].astype(str)
    table.loc[table["reliable"], "verdict"] = "reliable"
    return table


def _judge_one(contexts, label: Label, labels, judge, also, n_boot: int, seed: int) -> dict:
    rows, positive = held_out_sample(contexts, label.feature, seed=seed)
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    record = {"feature": label.feature, "label": label.text, "n_pos": n_pos, "n_neg": n_neg, "verdict": ""}
    if label.abstained:
        return record | {"verdict": f"abstained: {label.reason}"}
    if min(n_pos, n_neg) < MIN_POSITIVES:
        which = f"{n_pos} positives" if n_pos <= n_neg else f"{n_neg} negatives"
        return record | {"verdict": f"not scored: {which} held out, {MIN_POSITIVES} needed"}
    score = judge.score(label, contexts.index.iloc[rows])
    known = np.isfinite(score)
    if known.mean() < 0.9:
        return record | {"verdict": f"not scored: the judge failed on {(~known).sum()} of {len(score)} responses"}
    rows, positive, score = rows[known], positive[known], score[known]
    rng = np.random.default_rng([seed, label.feature, 2])
    shuffled = shuffle_by_prompt(positive, contexts.prompt[rows], n_boot, rng)
    null, value = aurocs(score, shuffled, ~shuffled), auroc(score[positive], score[~positive])
    record |= {"auroc": value, "null_95": float(np.quantile(null, 0.95)),
               "p_value": float((1 + (null >= value).sum()) / (1 + n_boot))}
    others = [one for one in labels if one.feature != label.feature and not one.abstained]
    if others:
        other = others[int(rng.integers(len(others)))]
        record["auroc_other_label"] = _auroc(judge.score(other, contexts.index.iloc[rows]), positive)
    for kind in also:
        hard, fires = held_out_sample(contexts, label.feature, kind, seed)
        record[f"auroc_{kind}"] = _auroc(judge.score(label, contexts.index.iloc[hard]), fires)
    return record | _against_trivial(contexts, label.feature, rows, score, positive, value, n_boot, seed)


def _against_trivial(contexts, feature: int, rows, score, positive, value, n_boot: int, seed: int) -> dict:
    """Interval of the label's AUROC, and of its lift over the best judge that reads no words."""
    train = contexts.rows("explain")
    active = contexts.activation(feature)[train] != 0
    trivial = trivial_scores(contexts.index.iloc[train], active, contexts.index.iloc[rows])
    found = {name: auroc(values[positive], values[~positive]) for name, values in trivial.items()}
    best = max(found, key=lambda name: found[name])
    # one seed per feature: both judges see the same resamples, so the lift is paired
    spread, floor = (auroc_bootstrap(values, positive, contexts.prompt[rows], n_boot,
                                     np.random.default_rng([seed, feature, 1]))
                     for values in (score, trivial[best]))
    low, high = np.nanpercentile(spread, [2.5, 97.5])
    return {"auroc_lo": low, "auroc_hi": high, **{f"auroc_{name}": one for name, one in found.items()},
            "best_trivial": best, "lift": value - found[best],
            "lift_lo": np.nanpercentile(spread - floor, 2.5)}
