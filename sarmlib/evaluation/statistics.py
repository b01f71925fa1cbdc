"""How sure we are: intervals over prompts and seeds, multiplicity, AUROC, verdicts.

The unit of resampling is the prompt; seeds are the outer level.  Bootstrap: Efron & Tibshirani 1993;
crossed seeds x prompts: Owen 2007 (variance components).  Equal values get the whole line, which decides nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from sarmlib.errors import DataError

FEW = 100  # zeros and ones; of fewer the bootstrap's interval is too short (of 50, at .98 it covers 63 %)
HOLDS, NOT_HERE, UNDECIDED = "holds", "does not hold here", "undecided"


class Interval(NamedTuple):
    """A confidence interval; ``method``: how it was made, ``n``: the number of independent units."""

    estimate: float
    low: float
    high: float
    level: float
    method: str
    n: int


def bootstrap_ci(values, *, strata: Sequence | None = None, n: int = 10_000, shares: bool = True) -> Interval:
    """95 % bootstrap interval (BCa, ``n`` resamples, fixed seed) of the mean of one value per prompt.

    ``strata`` [N] labels: then of the unweighted mean of the stratum means (the benchmarks' totals).  The whole line
    where each stratum's values are equal.  Of zeros and ones that are ``shares`` (of differences, others may be -1),
    when a stratum has fewer than ``FEW`` or each has equal ones: exact (Clopper and Pearson 1934), combined over strata
    by Zou and Donner 2008.  Raises DataError on NaN and on a stratum of one value.
    """
    x = _finite(values, "values")
    index, counts = _strata(strata, len(x))
    data = [x[index == s] for s in range(len(counts))]
    same = all(_same(np.ptp(part), x) for part in data)
    if shares and (same or counts.min() < FEW) and np.isin(x, (0, 1)).all():
        return _exact(data)
    if same:
        return Interval(float(np.mean([part.mean() for part in data])), -np.inf, np.inf, 0.95, "no spread", len(x))

    def statistic(*parts, axis=-1):
        return np.mean([part.mean(axis) for part in parts], 0)

    low, high = stats.bootstrap(data, statistic, n_resamples=n, vectorized=True, rng=np.random.default_rng(0),
                                batch=max(1, 4_000_000 // counts.max())).confidence_interval
    return Interval(float(statistic(*data)), float(low), float(high), 0.95, "BCa", len(x))


def _exact(data: list[np.ndarray]) -> Interval:
    """Mean of proportions: each one's exact limits, the distances added as squares."""
    means = np.array([part.mean() for part in data])
    limits = [stats.binomtest(int(part.sum()), len(part)).proportion_ci(0.95, "exact") for part in data]
    below, above = (np.linalg.norm(distance) / len(data)
                    for distance in (means - [one.low for one in limits], [one.high for one in limits] - means))
    mean = float(means.mean())
    return Interval(mean, mean - float(below), mean + float(above), 0.95, "exact", sum(map(len, data)))


def seeds_ci(values) -> Interval:
    """95 % Student t interval of the mean over S > 1 training seeds: mean +- t_{S-1} sd / sqrt(S); the whole line if
    all are equal."""
    x = _finite(values, "values per seed", least=2)
    half, mean = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)), x.mean()
    half = np.inf if _same(half, x) else half
    return Interval(float(mean), float(mean - half), float(mean + half), 0.95, "t over seeds", len(x))


def seeds_and_prompts_ci(matrix, *, strata: Sequence | None = None, shares: bool = True) -> Interval:
    """95 % interval of the mean of ``matrix`` [seeds, prompts] for new seeds *and* new prompts (crossed).

    V = V_seeds + V_prompts - V_residual, the last because both margins contain it; t quantile
    with Satterthwaite's degrees of freedom.  ``strata`` [prompts] and ``shares`` as in `bootstrap_ci`, whose interval
    over prompts it is where V = 0.
    """
    m = _finite(matrix, "matrix of seeds and prompts", ndim=2, least=2)
    n_seeds, n_prompts = m.shape
    index, counts = _strata(strata, n_prompts)
    weight = 1.0 / (len(counts) * counts[index])  # estimate = sum over prompts of weight * mean over seeds
    per_seed = m @ weight
    v_seed = per_seed.var(ddof=1) / n_seeds
    v_prompt = v_residual = 0.0
    for s, count in enumerate(counts):
        block = m[:, index == s]
        effect = block.mean(0)
        residual = block - effect - block.mean(1, keepdims=True) + block.mean()
        v_prompt += effect.var(ddof=1) / count / len(counts) ** 2
        variance = (residual**2).sum() / ((n_seeds - 1) * (count - 1))
        v_residual += variance / (n_seeds * count) / len(counts) ** 2
    v = max(v_seed + v_prompt - v_residual, v_seed, v_prompt)
    if _same(np.sqrt(v), m):
        return bootstrap_ci(m.mean(0), strata=strata, shares=shares)
    parts = v_seed**2 / (n_seeds - 1) + v_prompt**2 / (n_prompts - len(counts))
    half = stats.t.ppf(0.975, v**2 / parts) * np.sqrt(v)
    mean = float(per_seed.mean())
    return Interval(mean, float(mean - half), float(mean + half), 0.95, "t over seeds and prompts", n_seeds)


def _same(spread: float, values: np.ndarray) -> bool:
    return spread <= 1e-12 * np.abs(values).max()  # but for rounding


def auroc(pos, neg) -> float:
    """P(pos > neg) + ½ P(pos = neg) over all pairs: the Mann-Whitney U statistic over n_pos n_neg."""
    pos, neg = _finite(pos, "positive scores", infinite=True), _finite(neg, "negative scores", infinite=True)
    ranks = stats.rankdata(np.concatenate([pos, neg]))  # average ranks, so that ties count half
    return float((ranks[: len(pos)].sum() - len(pos) * (len(pos) + 1) / 2) / (len(pos) * len(neg)))


def aurocs(score: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """AUROC [R] of one ``score`` [n] under R pairs of weights (resamples, shuffles, concepts): how often a unit
    counts as positive and as negative, each [R, n]; NaN where a class is empty."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])  # tied units stand together
    pos, neg = (np.add.reduceat(w[:, order], starts, axis=1, dtype=float) for w in (positive, negative))
    wins = (pos * (np.cumsum(neg, axis=1) - neg / 2)).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return wins / (pos.sum(axis=1) * neg.sum(axis=1))


def verdict(ci, threshold: float = 0.0, direction: str = ">") -> str:
    """Whether all of ``ci``, an `Interval` or (low, high), lies on the claimed side of the threshold ("holds"), none
    of it ("does not hold here"; touching it is on no side), or a part ("undecided")."""
    low, high = (ci.low, ci.high) if isinstance(ci, Interval) else ci
    if np.isnan([low, high, threshold]).any() or low > high:
        raise DataError(f"cannot judge the interval ({low}, {high}) against {threshold}: NaN or reversed")
    if direction == "<":
        low, high, threshold = -high, -low, -threshold
    return HOLDS if low > threshold else NOT_HERE if high <= threshold else UNDECIDED


def _strata(labels: Sequence | None, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(number of each value's stratum [n], values per stratum); DataError when one has a single value."""
    index = pd.factorize(np.zeros(n) if labels is None else np.asarray(labels))[0]
    counts = np.bincount(index)
    if counts.min() < 2:
        raise DataError(f"an interval needs at least two prompts per stratum, got {counts.min()}")
    return index, counts


def _finite(values, what: str, ndim: int = 1, least: int = 1, infinite: bool = False) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != ndim or min(x.shape) < least:
        raise DataError(f"{what} must be a {ndim}-D array of at least {least}, got shape {x.shape}")
    if np.isnan(x).any() or not (infinite or np.isfinite(x).all()):
        raise DataError(f"{what} contain NaN or infinity; remove the failed items and say how many")
    return x
