"""How sure we are: intervals over prompts and seeds, paired comparisons, tests, multiplicity, verdicts.

The unit of resampling is the prompt (or any cluster of rows that stand or fall together); seeds are the outer level.
Bootstrap: Efron & Tibshirani 1993, BCa unless stated, from scipy; crossed seeds x prompts: Owen 2007 (variance
components), tests: scipy.stats.  Every random draw comes from ``rng`` (an int seed or a Generator), default 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import stats

from sarmlib.errors import DataError

HOLDS, NOT_HERE, UNDECIDED = "holds", "does not hold here", "undecided"


class Interval(NamedTuple):
    """A confidence interval: estimate, low, high, its level, how it was made, and the number of independent units."""

    estimate: float
    low: float
    high: float
    level: float
    method: str
    n: int


def bootstrap_ci(values, stat: Callable = np.mean, clusters: Sequence | None = None, n: int = 10_000,
                 level: float = 0.95, rng=0, *, strata: Sequence | None = None, method: str = "BCa") -> Interval:
    """Bootstrap interval of ``stat(values)``, resampling whole clusters (default: each value is its own).

    ``values`` [N] floats; ``clusters`` [N] labels (all responses to a prompt share one); ``strata`` [N] labels: the
    statistic is then the unweighted mean over strata of the stratum means (RewardBench 2 and RM-Bench totals), and
    resampling keeps to a stratum.  ``stat`` other than np.mean maps a 1-D array to a float (slower).  ``method``
    "BCa" or "percentile"; BCa falls back to percentile where it is undefined (all values equal), which `method` of
    the result says.  Raises DataError on NaN, on fewer than two clusters in a stratum, and on mismatched lengths.
    """
    x = _finite(values, "values")
    clusters = np.arange(len(x)) if clusters is None else _labels(clusters, len(x), "clusters")
    strata = np.zeros(len(x), int) if strata is None else _labels(strata, len(x), "strata")
    if method not in ("BCa", "percentile"):
        raise DataError(f"method is {method!r}; use 'BCa' or 'percentile'")
    groups = []  # per stratum: the list of row indices of each cluster
    for s in range(strata.max() + 1):
        rows = np.flatnonzero(strata == s)
        order = rows[np.argsort(clusters[rows], kind="stable")]
        members = np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1)
        if len(members) < 2:
            raise DataError(f"a bootstrap needs at least two prompts (clusters) per stratum, got {len(members)}")
        groups.append(members)
    if stat is np.mean:
        sums = [np.array([x[m].sum() for m in members]) for members in groups]
        sizes = [np.array([float(len(m)) for m in members]) for members in groups]

        def statistic(*index, axis=-1):
            return np.mean([s[i].sum(axis) / c[i].sum(axis) for s, c, i in zip(sums, sizes, index, strict=True)], 0)
    elif len(groups) > 1:
        raise DataError("strata are for the mean; pass stat=np.mean or no strata")
    else:
        def statistic(index):
            return stat(x[np.concatenate([groups[0][i] for i in index.astype(int)])])

    data = tuple(np.arange(len(members)) for members in groups)
    longest = max(map(len, data))
    with warnings.catch_warnings():  # scipy warns where BCa is undefined; the fallback below handles it
        warnings.simplefilter("ignore")
        result = stats.bootstrap(data, statistic, n_resamples=n, confidence_level=level, method=method, rng=_rng(rng),
                                 vectorized=stat is np.mean, batch=max(1, 4_000_000 // longest))
    low, high = result.confidence_interval
    if not (np.isfinite(low) and np.isfinite(high)):
        tail = (1 - level) / 2
        low, high = np.quantile(result.bootstrap_distribution, [tail, 1 - tail])
        method = "percentile"
    if not np.isfinite(low + high):
        raise DataError("the statistic is NaN on some resamples; use one that is defined on every subset of prompts")
    return Interval(float(statistic(*data)), float(low), float(high), level, method, sum(map(len, groups)))


def seeds_ci(values, level: float = 0.95) -> Interval:
    """Student t interval of the mean over training seeds: mean +- t_{S-1} sd / sqrt(S).  Needs two seeds."""
    x = _finite(values, "values per seed")
    if len(x) < 2:
        raise DataError(f"an interval over seeds needs at least two seeds, got {len(x)}")
    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), level, "t over seeds", len(x))


def seeds_and_prompts_ci(matrix, level: float = 0.95, *, strata: Sequence | None = None) -> Interval:
    """Interval of the mean of ``matrix`` [seeds, prompts] for new seeds *and* new prompts (crossed random effects).

    Both are sampled: V = V_seeds + V_prompts - V_residual, the last because both margins contain it; t quantile with
    Satterthwaite's degrees of freedom.  It widens as it should with few seeds, where a bootstrap over three seeds
    does not.  ``strata`` [prompts] as in `bootstrap_ci`; for one value per prompt, average clusters beforehand.
    """
    m = _finite(matrix, "matrix", ndim=2)
    n_seeds, n_prompts = m.shape
    strata = np.zeros(n_prompts, int) if strata is None else _labels(strata, n_prompts, "strata")
    counts = np.bincount(strata)
    if n_seeds < 2 or counts.min() < 2:
        raise DataError(f"needs at least 2 seeds and 2 prompts per stratum, got {n_seeds} and {counts.min()}")
    weight = 1.0 / (len(counts) * counts[strata])  # estimate = sum over prompts of weight * mean over seeds
    per_seed = m @ weight
    v_seed = per_seed.var(ddof=1) / n_seeds
    v_prompt = v_residual = 0.0
    for s, count in enumerate(counts):
        block = m[:, strata == s]
        effect = block.mean(0)
        residual = block - effect - block.mean(1, keepdims=True) + block.mean()
        v_prompt += effect.var(ddof=1) / count / len(counts) ** 2
        v_residual += (residual**2).sum() / ((n_seeds - 1) * (count - 1)) / (n_seeds * count) / len(counts) ** 2
    v = max(v_seed + v_prompt - v_residual, v_seed, v_prompt)
    parts = v_seed**2 / (n_seeds - 1) + v_prompt**2 / (n_prompts - len(counts))
    half = stats.t.ppf((1 + level) / 2, v**2 / parts) * np.sqrt(v) if v > 0 else 0.0
    mean = float(per_seed.mean())
    return Interval(mean, float(mean - half), float(mean + half), level, "t over seeds and prompts", n_seeds)


def paired_difference(a, b, clusters: Sequence | None = None, **kwargs) -> Interval:
    """Interval of mean(a - b) over the same prompts in the same order.

    1-D: `bootstrap_ci` of the differences (with ``clusters``, ``strata``, ...); 2-D [seeds, prompts] with equal
    seeds in equal rows: `seeds_and_prompts_ci`.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise DataError(f"paired values must have one shape, got {a.shape} and {b.shape}: same prompts, same order")
    return bootstrap_ci(a - b, clusters=clusters, **kwargs) if a.ndim == 1 else seeds_and_prompts_ci(a - b, **kwargs)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar p value from the discordant counts (b: only A right, c: only B right); 1 if none."""
    if min(b, c) < 0 or b != int(b) or c != int(c):
        raise DataError(f"discordant counts must be non-negative integers, got {b!r} and {c!r}")
    return float(stats.binomtest(int(b), int(b + c), 0.5).pvalue) if b + c else 1.0


def compare(a, b, clusters: Sequence | None = None, **kwargs) -> dict:
    """Model A against B on the same prompts: paired difference, wins, losses, ties, exact McNemar p, verdict "A > B".

    ``a``, ``b``: credits per prompt [N], or [seeds, N] (wins and the test then refer to means over seeds; McNemar,
    which needs independent 0/1 outcomes, is left out as None, as it is with clusters or fractional credits).
    """
    interval = paired_difference(a, b, **kwargs) if np.ndim(a) == 2 else paired_difference(a, b, clusters, **kwargs)
    a, b = (np.asarray(v, dtype=np.float64) for v in (a, b))
    binary = a.ndim == 1 and clusters is None and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()
    a, b = (v.mean(0) if v.ndim == 2 else v for v in (a, b))
    wins, losses = int((a > b).sum()), int((a < b).sum())
    return {"difference": interval, "wins": wins, "losses": losses, "ties": len(a) - wins - losses,
            "p_mcnemar": mcnemar_exact(wins, losses) if binary else None, "verdict": verdict(interval, 0.0, ">")}


def ranking_reliability(values: Mapping[str, Sequence[float]], n: int = 2_000, rng=0, *,
                        strata: Sequence | None = None) -> dict:
    """How stable an order of systems is under resampling of prompts (each system scored on the same prompts).

    Returns ``order`` (best first), ``p_first`` {name: share of resamples in which it is best; equal tops share},
    ``p_order`` {(a, b): share in which a beats b, for a above b in the order; equal counts ½} and ``kendall_tau``,
    the mean Kendall tau-b between the full order and the resampled ones.
    """
    names = list(values)
    m = _finite([values[name] for name in names], "values per system", ndim=2)
    strata = np.zeros(m.shape[1], int) if strata is None else _labels(strata, m.shape[1], "strata")
    rng, counts = _rng(rng), np.bincount(strata)
    draws = np.zeros((n, len(names)))
    for s, count in enumerate(counts):
        block = m[:, strata == s].T / (count * len(counts))
        for i in range(n):
            draws[i] += block[rng.integers(0, count, count)].sum(0)
    draws = draws.round(12)  # sums in different orders must still compare equal
    full = (m @ (1.0 / (len(counts) * counts[strata]))).round(12)
    order = [names[i] for i in np.argsort(-full, kind="stable")]
    best = draws == draws.max(1, keepdims=True)
    column = {name: draws[:, i] for i, name in enumerate(names)}
    taus = [stats.kendalltau(full, row).statistic for row in draws] if len(names) > 1 else [np.nan]
    return {"order": order,
            "p_first": {name: float((best[:, i] / best.sum(1)).mean()) for i, name in enumerate(names)},
            "p_order": {(x, y): float((column[x] > column[y]).mean() + 0.5 * (column[x] == column[y]).mean())
                        for x, y in combinations(order, 2)},
            "kendall_tau": float(np.nanmean(taus)) if np.isfinite(taus).any() else float("nan")}


def holm(p) -> np.ndarray:
    """Holm's step-down adjusted p values (family-wise error), in the order given."""
    p = _p_values(p)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))), 1.0)
    return adjusted


def benjamini_hochberg(p) -> np.ndarray:
    """Benjamini-Hochberg adjusted p values (false discovery rate), in the order given."""
    return stats.false_discovery_control(_p_values(p), method="bh")


def auroc(pos, neg) -> float:
    """P(pos > neg) + ½ P(pos = neg) over all pairs: the Mann-Whitney U statistic over n_pos n_neg."""
    pos, neg = _finite(pos, "positive scores", infinite=True), _finite(neg, "negative scores", infinite=True)
    ranks = stats.rankdata(np.concatenate([pos, neg]))  # average ranks, so that ties count half
    return float((ranks[: len(pos)].sum() - len(pos) * (len(pos) + 1) / 2) / (len(pos) * len(neg)))


def verdict(ci, threshold: float = 0.0, direction: str = ">") -> str:
    """"holds" if the whole interval lies on the claimed side of the threshold, "does not hold here" if none of it does,
    else "undecided".

    ``ci``: an `Interval` or (low, high); ``direction`` ">" (alias "greater") or "<" ("less").  The claim is strict:
    an interval that only touches the threshold from the other side does not hold.
    """
    low, high = (ci.low, ci.high) if isinstance(ci, Interval) else ci
    if np.isnan([low, high, threshold]).any() or low > high:
        raise DataError(f"cannot judge the interval ({low}, {high}) against {threshold}: NaN or reversed ends")
    if direction not in (">", "<", "greater", "less"):
        raise DataError(f"direction is {direction!r}; use '>' or '<'")
    if direction in ("<", "less"):
        low, high, threshold = -high, -low, -threshold
    return HOLDS if low > threshold else NOT_HERE if high <= threshold else UNDECIDED


def _rng(rng) -> np.random.Generator:
    return rng if isinstance(rng, np.random.Generator) else np.random.default_rng(rng)


def _finite(values, what: str, ndim: int = 1, infinite: bool = False) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != ndim or not x.size:
        raise DataError(f"{what} must be a non-empty {ndim}-D array, got shape {x.shape}")
    if np.isnan(x).any() or not (infinite or np.isfinite(x).all()):
        raise DataError(f"{what} contain NaN or infinity; remove the failed items and say how many there were")
    return x


def _labels(labels: Sequence, n: int, what: str) -> np.ndarray:
    if len(labels) != n:
        raise DataError(f"{what}: {len(labels)} labels for {n} values")
    codes: dict = {}
    return np.array([codes.setdefault(label, len(codes)) for label in labels], dtype=int)


def _p_values(p) -> np.ndarray:
    p = _finite(p, "p values")
    if (p < 0).any() or (p > 1).any():
        raise DataError(f"p values must lie in [0, 1], got {p.min()} .. {p.max()}")
    return p
