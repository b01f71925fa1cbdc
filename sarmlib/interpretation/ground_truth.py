"""Which feature means which planted concept, where the concepts of every response are known.

The best feature is chosen on one half of the prompts and scored on the other, so that a large dictionary gains
nothing from having many features to choose from.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from sarmlib.evaluation.statistics import auroc, aurocs
from sarmlib.interpretation.contexts import prompt_split
from sarmlib.interpretation.explainers import shuffle_by_prompt
from sarmlib.interpretation.judges import auroc_bootstrap

MIN_POSITIVES = 20  # fewest responses of each class, on each half, that a concept needs
COLUMNS = ["concept", "feature", "auroc", "auroc_lo", "auroc_hi", "f1", "reason"]


def match_concepts(z, concepts: pd.DataFrame, prompt_ids: Sequence, *, signed: bool = False,
                   n_boot: int = 500, seed: int = 0) -> pd.DataFrame:
    """Best feature per concept: chosen on the select half of the prompts, scored on the score half.

    z: [n, M] sparse features or a dense array (neurons); concepts: boolean frame [n, C]; prompt_ids [n].
    signed: a feature may mean the concept by being low (fair to neurons, which have no sign).
    Concepts with under 20 positive or negative responses on a half get a reason and no score.
    """
    z, truth = sparse.csc_array(z), concepts.to_numpy()
    live, prompt = np.flatnonzero(np.diff(z.indptr)), pd.factorize(np.asarray(prompt_ids))[0]
    halves = {"select": 0.5, "score": 0.5}
    split = prompt_split(pd.DataFrame({"prompt_id": np.asarray(prompt_ids)}), halves, seed)
    select, score = (np.flatnonzero(split == name) for name in halves)

    def column(feature, rows):
        return z[:, [feature]].toarray().ravel()[rows]

    said = truth[select].T
    strength = np.nan_to_num([aurocs(column(f, select), said, ~said) for f in live], nan=0.5).T
    records = []
    for c, name in enumerate(concepts):
        chosen_from, positive = truth[select, c], truth[score, c]
        fewest = min(one.sum() for half in (chosen_from, positive) for one in (half, ~half))
        if fewest < MIN_POSITIVES:
            reason = f"{fewest} responses of one class on a half, {MIN_POSITIVES} needed"
            records.append({"concept": name, "reason": reason})
            continue
        best = int(np.argmax(np.abs(strength[c] - 0.5) if signed else strength[c]))
        direction = -1 if signed and strength[c, best] < 0.5 else 1
        chosen, held = (direction * column(live[best], rows) for rows in (select, score))
        spread = auroc_bootstrap(held, positive, prompt[score], n_boot, np.random.default_rng([seed, c]))
        low, high = np.nanpercentile(spread, [2.5, 97.5])
        fires = held >= _best_threshold(chosen, chosen_from)
        f1 = 2 * int((fires & positive).sum()) / (fires.sum() + positive.sum())
        records.append({"concept": name, "feature": int(live[best]), "f1": f1, "reason": "", "auroc_lo": low,
                        "auroc_hi": high, "auroc": auroc(held[positive], held[~positive])})
    return pd.DataFrame(records).reindex(columns=COLUMNS).astype({"feature": "Int64"})


def _best_threshold(values: np.ndarray, positive: np.ndarray) -> float:
    """Threshold (values >= t) with the best F1 = 2 tp / (predicted + positive)."""
    order = np.argsort(-values, kind="stable")
    tp = np.cumsum(positive[order])
    last = np.r_[np.diff(values[order]) != 0, True]  # a cut can only fall between different values
    f1 = np.where(last, 2 * tp / (np.arange(1, len(tp) + 1) + positive.sum()), -1)
    return float(values[order][np.argmax(f1)])


def shuffled_concepts(z, concepts: pd.DataFrame, prompt_ids: Sequence, *, times: int = 20,
                      seed: int = 0) -> np.ndarray:
    """Mean held-out AUROC over concepts, ``times`` times with the concepts shuffled by prompt: the null."""
    order = shuffle_by_prompt(np.arange(len(concepts)), pd.factorize(np.asarray(prompt_ids))[0], times,
                              np.random.default_rng(seed))
    shuffled = (concepts.iloc[rows].reset_index(drop=True) for rows in order)
    found = (match_concepts(z, one, prompt_ids, n_boot=1, seed=seed)["auroc"] for one in shuffled)
    return np.array([one.mean() for one in found])
