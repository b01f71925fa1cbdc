"""Which feature means which planted concept, where the concepts of every response are known.

For each concept the best feature is chosen on one half of the prompts and scored on the other, so that a large
dictionary gains nothing from having many features to choose from.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import rankdata

from sarmlib.errors import DataError
from sarmlib.evaluation.statistics import auroc
from sarmlib.interpretation.contexts import prompt_split
from sarmlib.interpretation.explainers import shuffle_by_prompt
from sarmlib.interpretation.judges import auroc_bootstrap


def _aurocs(values: np.ndarray, concept: np.ndarray) -> np.ndarray:
    """AUROC of every column of ``values`` [n, F] for every column of ``concept`` [n, C] bool -> [C, F]."""
    ranks, n1 = rankdata(values, axis=0), concept.sum(axis=0)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (concept.T.astype(float) @ ranks - n1 * (n1 + 1) / 2) / (n1 * (len(concept) - n1))


def _best_f1(values: np.ndarray, positive: np.ndarray) -> float:
    """Threshold (values >= t) with the best F1 = 2 tp / (predicted + positive)."""
    order = np.argsort(-values, kind="stable")
    tp = np.cumsum(positive[order])
    last = np.r_[np.diff(values[order]) != 0, True]  # a cut can only fall between different values
    f1 = np.where(last, 2 * tp / (np.arange(1, len(tp) + 1) + positive.sum()), -1)
    return float(values[order][np.argmax(f1)])


def match_concepts(z, concepts: pd.DataFrame, prompt_ids, *, signed=False, min_positive=20, n_boot=500, seed=0,
                   block=512) -> pd.DataFrame:
    """Best feature per concept: chosen on the select half of the prompts, scored on the score half.

    z: [n, M] sparse features or a dense array (a neuron basis); concepts: boolean frame [n, C]; prompt_ids [n].
    signed=True lets a feature mean the concept by being low (fair to neurons, which have no sign convention).
    Columns: concept, feature, direction, auroc_select, auroc, auroc_lo, auroc_hi, f1, precision, recall, threshold,
    n_select, n_score, reason.  Concepts with under ``min_positive`` positive or negative responses on a side get a
    reason and no score.  Raises DataError when shapes differ or the concepts are not boolean.
    """
    n = len(concepts)
    if z.shape[0] != n or len(prompt_ids) != n:
        raise DataError(f"z has {z.shape[0]} rows, concepts {n}, prompt_ids {len(prompt_ids)}; they must be equal")
    odd = [name for name in concepts if concepts[name].dtype != bool]
    if odd:
        raise DataError(f"concept columns must be boolean; {odd[0]!r} is {concepts[odd[0]].dtype}")
    split = prompt_split(pd.DataFrame({"prompt_id": np.asarray(prompt_ids)}), {"select": 0.5, "score": 0.5}, seed)
    select, score = np.flatnonzero(split == "select"), np.flatnonzero(split == "score")
    truth, group = concepts.to_numpy(), pd.factorize(np.asarray(prompt_ids))[0]
    table = sparse.csc_array(z) if sparse.issparse(z) else np.asarray(z)
    live = np.flatnonzero(np.diff(table.indptr)) if sparse.issparse(table) else np.arange(table.shape[1])
    if not len(live):
        raise DataError("every feature is dead on these responses")

    def column(features, rows):
        part = table[:, features]
        return (part.toarray() if sparse.issparse(part) else part)[rows]

    parts = [_aurocs(column(live[i:i + block], select), truth[select]) for i in range(0, len(live), block)]
    strength = np.nan_to_num(np.concatenate(parts, axis=1), nan=0.5)
    records = []
    for c, name in enumerate(concepts):
        counts = {side: int(min(truth[rows, c].sum(), (~truth[rows, c]).sum()))
                  for side, rows in (("select", select), ("score", score))}
        record = {"concept": name, "n_select": int(truth[select, c].sum()), "n_score": int(truth[score, c].sum()),
                  "reason": ""}
        records.append(record)
        if min(counts.values()) < min_positive:
            record["reason"] = f"{min(counts.values())} responses of one class on a side, {min_positive} needed"
            continue
        row = np.abs(strength[c] - 0.5) if signed else strength[c]
        best = int(np.argmax(row))
        direction = 1 if strength[c, best] >= 0.5 or not signed else -1
        chosen, held = (direction * column([live[best]], rows).ravel() for rows in (select, score))
        threshold, positive = _best_f1(chosen, truth[select, c]), truth[score, c]
        said = held >= threshold
        hit = int((said & positive).sum())
        spread = auroc_bootstrap(held, positive, group[score], n_boot, np.random.default_rng([seed, c]))
        record |= {"feature": int(live[best]), "direction": direction, "threshold": direction * threshold,
                   "auroc_select": float(direction * (strength[c, best] - 0.5) + 0.5),
                   "auroc": auroc(held[positive], held[~positive]),
                   "auroc_lo": np.nanpercentile(spread, 2.5), "auroc_hi": np.nanpercentile(spread, 97.5),
                   "f1": 2 * hit / (said.sum() + positive.sum()), "precision": hit / max(said.sum(), 1),
                   "recall": hit / positive.sum()}
    columns = ["concept", "feature", "direction", "auroc_select", "auroc", "auroc_lo", "auroc_hi", "f1", "precision",
               "recall", "threshold", "n_select", "n_score", "reason"]
    return pd.DataFrame(records).reindex(columns=columns).astype({"feature": "Int64", "direction": "Int64"})


def compare_representations(representations: dict, concepts: pd.DataFrame, prompt_ids, *, signed=("neurons",),
                            bar=0.9, **settings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``match_concepts`` for several matrices (SAE, neurons, random SAE ...) on the same split.

    Returns (long table with a ``representation`` column, summary per representation: n_concepts, n_found = concepts
    with held-out AUROC >= ``bar``, mean_auroc, mean_f1).
    """
    long = pd.concat([match_concepts(z, concepts, prompt_ids, signed=name in signed, **settings)
                      .assign(representation=name) for name, z in representations.items()], ignore_index=True)
    scored = long[long["reason"] == ""]
    summary = scored.groupby("representation", sort=False).agg(
        n_concepts=("auroc", "size"), n_found=("auroc", lambda a: int((a >= bar).sum())),
        mean_auroc=("auroc", "mean"), mean_f1=("f1", "mean"))
    return long, summary.reset_index()


def shuffled_concepts(z, concepts: pd.DataFrame, prompt_ids, *, times=20, seed=0, **settings) -> np.ndarray:
    """The null of `match_concepts`: mean held-out AUROC over concepts, [times], with the concepts of all responses
    shuffled by prompt (`shuffle_by_prompt`): the best feature is still chosen, but there is nothing to find."""
    order = shuffle_by_prompt(np.arange(len(concepts)), pd.factorize(np.asarray(prompt_ids))[0], times,
                              np.random.default_rng(seed))
    return np.array([match_concepts(z, concepts.iloc[rows].reset_index(drop=True), prompt_ids, n_boot=1, seed=seed,
                                    **settings)["auroc"].mean() for rows in order])
