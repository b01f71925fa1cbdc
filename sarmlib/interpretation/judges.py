"""Held-out judging of labels: does a label tell active from inactive responses to prompts nobody has explained?

A judge scores every response in [-inf, inf]; AUROC is the chance that an active response outscores an inactive one
(ties count half).  The same held-out sample serves every judge, and a label is called reliable only when it also
beats judges that know no words: response length, domain, and the base reward.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from sarmlib.errors import ConfigError, DataError
from sarmlib.evaluation.statistics import auroc, benjamini_hochberg
from sarmlib.interpretation.contexts import Contexts, assert_disjoint
from sarmlib.interpretation.explainers import Label, Vocabulary, shuffle_by_prompt

MIN_POSITIVES = 30
"""Below this many held-out positives (or negatives) an AUROC interval is wider than the question; no score is given."""

NEGATIVES = ("random", "matched", "neighbour")


class Judge(Protocol):
    """Scores the responses of index ``units`` against one label; NaN marks a unit that could not be judged."""

    def score(self, label: Label, units: pd.DataFrame) -> np.ndarray: ...


class KeywordJudge:
    """Sum of the label's term weights found in the response."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary

    def score(self, label: Label, units: pd.DataFrame) -> np.ndarray:
        found = (self.vocabulary.terms(str(t), n) for t, n in zip(units["text"], units["length"], strict=True))
        return np.array([sum(w for term, w in label.weights.items() if term in terms) for terms in found], float)


class TfidfJudge:
    """Cosine of label and response over rare words: reads any label, also one written by a model or a person.

    Binary terms of the explainer's vocabulary, weighted by idf = -log(share of the explain split that has the term);
    a keyword label counts its "less often" terms negative.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.idf = dict(zip(vocabulary.names, -np.log(vocabulary.background), strict=True))

    def score(self, label: Label, units: pd.DataFrame) -> np.ndarray:
        signs = {term: float(np.sign(weight)) for term, weight in label.weights.items()}
        signs = signs or dict.fromkeys(self.vocabulary.terms(label.text, -1), 1.0)
        wanted = {term: sign * self.idf[term] for term, sign in signs.items()
                  if term in self.idf and (label.weights or not term.startswith("["))}
        norm = np.sqrt(sum(value**2 for value in wanted.values())) or 1.0
        scores = []
        for text, length in zip(units["text"], units["length"], strict=True):
            terms = self.vocabulary.terms(str(text), length)
            size = np.sqrt(sum(self.idf[term] ** 2 for term in terms)) or 1.0
            scores.append(sum(wanted[term] * self.idf[term] for term in wanted.keys() & terms) / (norm * size))
        return np.array(scores, float)


def trivial_scores(train: pd.DataFrame, active: np.ndarray, units: pd.DataFrame) -> dict[str, np.ndarray]:
    """Scores of judges that read no words, fitted on ``train`` (index rows and their boolean activity).

    length, reward: the value itself, with the direction found on ``train``; domain: the share active on ``train``.
    """
    scores = {}
    for name in ("length", "reward"):
        value = train[name].to_numpy(float)
        rising = _auroc(value, active) >= 0.5 if 0 < active.sum() < len(active) else True
        scores[name] = units[name].to_numpy(float) * (1 if rising else -1)
    share = pd.Series(active, dtype=float).groupby(train["domain"].to_numpy()).mean()
    scores["domain"] = units["domain"].map(share).fillna(active.mean()).to_numpy(float)
    return scores


def _auroc(score: np.ndarray, positive: np.ndarray) -> float:
    return auroc(score[positive], score[~positive])


def _auroc_known(score, positive: np.ndarray) -> float:
    """AUROC over what the judge could judge; NaN when that is less than 9 in 10, or a class has under 30."""
    score = np.asarray(score, float)
    known = np.isfinite(score)
    if known.mean() < 0.9 or min(positive[known].sum(), (~positive[known]).sum()) < MIN_POSITIVES:
        return float("nan")
    return _auroc(score[known], positive[known])


def held_out_auroc(contexts: Contexts, label: Label, judge: Judge, *, negatives="random", n_per_class=100,
                   seed=0) -> float:
    """The AUROC of `judge_labels` alone, without its bootstrap and null; NaN where that table has no score."""
    if label.abstained:
        return float("nan")
    n = n_per_class
    rows, positive = held_out_sample(contexts, label.feature, negatives=negatives, n_pos=n, n_neg=n, seed=seed)
    if min(positive.sum(), (~positive).sum()) < MIN_POSITIVES:
        return float("nan")
    return _auroc_known(judge.score(label, contexts.index.iloc[rows]), positive)


def auroc_bootstrap(score, positive, prompt, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """AUROC of ``n_boot`` resamples of whole prompts [n_boot]; NaN where a resample lost a class."""
    _, group = np.unique(prompt, return_inverse=True)
    times = rng.multinomial(group.max() + 1, np.full(group.max() + 1, 1 / (group.max() + 1)), size=n_boot)
    order = np.argsort(score, kind="stable")
    weight = times[:, group[order]].astype(float)
    pos, neg = weight * positive[order], weight * ~positive[order]
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])
    pos, neg = np.add.reduceat(pos, starts, axis=1), np.add.reduceat(neg, starts, axis=1)
    wins = (pos * (np.cumsum(neg, axis=1) - neg / 2)).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return wins / (pos.sum(axis=1) * neg.sum(axis=1))


def average_precision(score: np.ndarray, positive: np.ndarray, prevalence: float) -> float:
    """Area under precision over recall, were ``prevalence`` the share of positives: sum_k (R_k - R_{k-1}) P_k over
    the distinct scores, largest first.  A judge that knows nothing gets ``prevalence``."""
    order = np.argsort(-score, kind="stable")
    last = np.r_[np.diff(score[order]) != 0, True]
    recall = (np.cumsum(positive[order]) / positive.sum())[last]
    fall_out = (np.cumsum(~positive[order]) / (~positive).sum())[last]
    hits = prevalence * recall
    precision = hits / (hits + (1 - prevalence) * fall_out)
    return float(np.sum(np.diff(recall, prepend=0) * precision))


def correlation(score: np.ndarray, z: np.ndarray, positive: np.ndarray, prevalence: float) -> float:
    """Pearson correlation of score and z, each class weighted to its natural share; NaN for a constant score."""
    weight = np.where(positive, prevalence / positive.sum(), (1 - prevalence) / (~positive).sum())
    a, b = (values - (weight * values).sum() for values in (score, z))
    spread = np.sqrt((weight * a**2).sum() * (weight * b**2).sum())
    return float((weight * a * b).sum() / spread) if spread > 0 else float("nan")


def held_out_sample(contexts: Contexts, feature: int, *, split="test", negatives="random", n_pos=100, n_neg=100,
                    seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``split`` and their boolean activity, at most ``n_pos`` active and ``n_neg`` inactive.

    negatives: "random"; "matched" (inactive responses to prompts that also have an active one: removes topic); or
    "neighbour" (inactive ones in which one of the feature's five nearest fires, `Contexts.neighbours`).
    """
    if negatives not in NEGATIVES:
        raise ConfigError(f"negatives={negatives!r}; choose one of {', '.join(NEGATIVES)}")
    rows = contexts.rows(split)
    active = contexts.activation(feature)[rows] != 0
    pool = ~active
    if negatives == "matched":
        pool &= np.isin(contexts.prompt[rows], contexts.prompt[rows][active])
    if negatives == "neighbour":
        near = contexts.neighbours(feature, 5).feature
        pool &= np.any([contexts.activation(other)[rows] != 0 for other in near], axis=0) if len(near) else False
    rng = np.random.default_rng([seed, feature])
    pos, neg = (rng.permutation(rows[mask])[:n] for mask, n in ((active, n_pos), (pool, n_neg)))
    chosen = np.sort(np.concatenate([pos, neg]))
    return chosen, np.isin(chosen, pos)


def _balanced(threshold: float, score: np.ndarray, positive: np.ndarray) -> float:
    return ((score >= threshold)[positive].mean() + (score < threshold)[~positive].mean()) / 2


def best_threshold(score: np.ndarray, positive: np.ndarray) -> float:
    """The threshold (score >= t) with the best balanced accuracy; NaN with one class only. NaN scores are left out."""
    known = np.isfinite(score)
    score, positive = score[known], positive[known]
    if not 0 < positive.sum() < len(positive):
        return float("nan")
    return float(max(np.unique(score), key=lambda t: _balanced(t, score, positive)))


def balanced_accuracy(tune_score, tune_positive, score, positive) -> float:
    """Mean of recall on both classes at the threshold that is best on the tune sample."""
    threshold = best_threshold(tune_score, tune_positive)
    return float(_balanced(threshold, score, positive)) if np.isfinite(threshold) else float("nan")


def judge_labels(contexts: Contexts, labels: list[Label], judge: Judge, *, n_boot=1000, level=0.95, q=0.1,
                 negatives="random", also=(), n_per_class=100, seed=0) -> pd.DataFrame:
    """Score every label on the test split; one row per label, nothing dropped.

    Columns: feature, label, n_pos, n_neg, auroc, auroc_lo, auroc_hi (prompt-cluster bootstrap), balanced_accuracy,
    prevalence (share active on the test split), auprc and correlation_z at that prevalence, auroc_<negatives> for
    each further kind of negatives in ``also`` (NaN under 30 of them), null_95 (95th percentile with activity shuffled
    by prompt), p_value and q_value (Benjamini-Hochberg over scored labels), auroc_other_label (this sample scored by
    another feature's label), auroc_length, auroc_reward, auroc_domain, best_trivial, lift, lift_lo (paired
    bootstrap), reliable, verdict.
    A label is reliable when it did not abstain, q_value <= q, auroc_lo > max(0.5, null_95) and lift_lo > 0.
    Scores are NaN, with the reason as verdict, when the explainer abstained or a class has under 30 responses.
    """
    assert_disjoint(contexts.index, contexts.split)
    if not labels:
        raise DataError("no labels to judge")
    tail = 100 * (1 - level) / 2
    train_rows, test_rows = contexts.rows("explain"), contexts.rows("test")
    speaking = [label for label in labels if not label.abstained]
    records = []
    for label in labels:
        record = {"feature": label.feature, "label": label.text, "verdict": "", "reliable": False}
        records.append(record)
        rows, positive = held_out_sample(contexts, label.feature, negatives=negatives, n_pos=n_per_class,
                                         n_neg=n_per_class, seed=seed)
        n_pos, n_neg = int(positive.sum()), int((~positive).sum())
        record |= {"n_pos": n_pos, "n_neg": n_neg}
        if label.abstained:
            record["verdict"] = f"abstained: {label.reason}"
            continue
        if min(n_pos, n_neg) < MIN_POSITIVES:
            which = f"{n_pos} positives" if n_pos <= n_neg else f"{n_neg} negatives"
            record["verdict"] = f"not scored: {which} held out, {MIN_POSITIVES} needed"
            continue
        units, prompt = contexts.index.iloc[rows], contexts.prompt[rows]
        score = np.asarray(judge.score(label, units), float)
        judged = np.isfinite(score)
        if judged.mean() < 0.9:
            record["verdict"] = f"not scored: the judge failed on {int((~judged).sum())} of {len(score)} responses"
            continue
        units, prompt, positive, score = units[judged], prompt[judged], positive[judged], score[judged]

        def boot(values, positive=positive, prompt=prompt, feature=label.feature):
            # One generator per feature: all judges of a feature see the same resamples, so lifts are paired.
            return auroc_bootstrap(values, positive, prompt, n_boot, np.random.default_rng([seed, feature, 1]))

        value, spread = _auroc(score, positive), boot(score)
        train_active = contexts.activation(label.feature)[train_rows] != 0
        trivial = trivial_scores(contexts.index.iloc[train_rows], train_active, units)
        trivial_auroc = {name: _auroc(values, positive) for name, values in trivial.items()}
        best = max(trivial_auroc, key=trivial_auroc.get)
        rng = np.random.default_rng([seed, label.feature, 2])
        shuffled = shuffle_by_prompt(positive, prompt, n_boot, rng)
        n1 = positive.sum()
        null = ((shuffled @ rankdata(score)) - n1 * (n1 + 1) / 2) / (n1 * (~positive).sum())
        z = contexts.activation(label.feature)
        share = float((z[test_rows] != 0).mean())
        tune, tune_positive = held_out_sample(contexts, label.feature, split="tune", negatives=negatives, seed=seed)
        tune_score = judge.score(label, contexts.index.iloc[tune])
        others = [other for other in speaking if other.feature != label.feature]
        other = others[int(rng.integers(len(others)))] if others else None
        record |= {
            "auroc": value, "auroc_lo": np.nanpercentile(spread, tail),
            "auroc_hi": np.nanpercentile(spread, 100 - tail),
            "balanced_accuracy": balanced_accuracy(tune_score, tune_positive, score, positive),
            "prevalence": share, "auprc": average_precision(score, positive, share),
            "correlation_z": correlation(score, z[rows][judged], positive, share),
            "null_95": float(np.quantile(null, 0.95)), "p_value": float((1 + (null >= value).sum()) / (1 + n_boot)),
            "auroc_other_label": _auroc_known(judge.score(other, units), positive) if other else np.nan,
            **{f"auroc_{kind}": held_out_auroc(contexts, label, judge, negatives=kind, n_per_class=n_per_class,
                                               seed=seed) for kind in also},
            **{f"auroc_{name}": v for name, v in trivial_auroc.items()}, "best_trivial": best,
            "lift": value - trivial_auroc[best], "lift_lo": np.nanpercentile(spread - boot(trivial[best]), tail)}
    columns = ["feature", "label", "n_pos", "n_neg", "auroc", "auroc_lo", "auroc_hi", "balanced_accuracy", "prevalence",
               "auprc", "correlation_z", *(f"auroc_{kind}" for kind in also), "null_95", "p_value", "q_value",
               "auroc_other_label", "auroc_length", "auroc_reward", "auroc_domain", "best_trivial",
               "lift", "lift_lo", "reliable", "verdict"]
    table = pd.DataFrame(records).reindex(columns=columns)
    scored = table["p_value"].notna()
    if scored.any():
        table.loc[scored, "q_value"] = benjamini_hochberg(table.loc[scored, "p_value"])
    signal = scored & (table["q_value"] <= q) & (table["auroc_lo"] > table["null_95"].clip(lower=0.5))
    table["reliable"] = signal & (table["lift_lo"] > 0)
    table.loc[scored & ~signal, "verdict"] = "not reliable: no better than shuffled activity"
    beaten = signal & ~table["reliable"]
    table.loc[beaten, "verdict"] = "not reliable: no better than " + table.loc[beaten, "best_trivial"].astype(str)
    table.loc[table["reliable"], "verdict"] = "reliable"
    return table
