"""Steering: choose a feature, scale its head weight, and measure exactly what moves (the paper's Figure 3).

    s_i = (c_i - j_i) / (c_i + j_i + mean(c + j))        c, j: activity of feature i on chosen, rejected responses
    r'  = r + sum_i (factor_i - 1) w_i z_i               exact, because the head is linear and z is unchanged

so one pass over the data serves every factor, feature, control and bootstrap.  Intervals resample whole prompts.
"""

from __future__ import annotations

import copy
import math
import numbers

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import rankdata, wasserstein_distance

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.evaluation.statistics import auroc, holm, mcnemar_exact

METHODS = ("paper_sum", "frequency", "pair_mean", "t", "auroc")


def feature_scores(z_chosen, z_rejected, method="paper_sum", *, shrinkage="live", min_active=10) -> pd.DataFrame:
    """How much more each feature fires on chosen than on rejected responses (row i of both is one pair).

    method: paper_sum (c, j = summed activations, as in the released code), frequency (c, j = responses in which the
    feature fires, as in the paper's words), pair_mean (mean over pairs of (z+ - z-)/(z+ + z-), 0/0 = 0), t (paired t),
    auroc (P(z+ > z-) + half ties, over all chosen x rejected).  shrinkage, for the first two: "live" (mean of c + j
    over live features), "all" (over all M, as released; with 99 % dead features 100 times weaker), or a number.
    Returns live features, best first: feature, s, c, j, n_active, eligible, rank (over features with n_active >=
    min_active; those below are listed last, without rank).  Ties in s go to the more active feature.
    """
    pos, neg = sparse.csr_array(z_chosen).astype(float), sparse.csr_array(z_rejected).astype(float)
    if method not in METHODS:
        raise ConfigError(f"method={method!r}; choose one of {METHODS}")
    if pos.shape != neg.shape:
        raise DataError(f"z_chosen is {pos.shape} and z_rejected {neg.shape}; give one row per pair in each")
    m, n = pos.shape[1], pos.shape[0]
    fired = [np.bincount(part.indices[part.data != 0], minlength=m) for part in (pos, neg)]
    live = np.flatnonzero(fired[0] + fired[1])
    if not len(live):
        raise DataError("no feature fires on any of these responses")
    c, j = fired if method == "frequency" else (pos.sum(axis=0), neg.sum(axis=0))
    c, j, n_active = c[live].astype(float), j[live].astype(float), (fired[0] + fired[1])[live]
    if method in ("paper_sum", "frequency"):
        means = {"live": (c + j).mean(), "all": (c + j).sum() / m}
        if isinstance(shrinkage, str) and shrinkage not in means:
            raise ConfigError(f"shrinkage={shrinkage!r}; choose 'live', 'all' or a number")
        s = (c - j) / (c + j + means.get(shrinkage, shrinkage))
    else:
        a, b = pos[:, live].toarray(), neg[:, live].toarray()
        with np.errstate(invalid="ignore", divide="ignore"):
            if method == "pair_mean":
                s = np.nan_to_num((a - b) / (a + b)).mean(axis=0)
            elif method == "t":
                s = (a - b).mean(axis=0) / ((a - b).std(axis=0, ddof=1) / math.sqrt(n))
            else:
                s = (rankdata(np.concatenate([a, b]), axis=0)[:n].sum(axis=0) - n * (n + 1) / 2) / n**2
    table = pd.DataFrame({"feature": live, "s": s, "c": c, "j": j, "n_active": n_active,
                          "eligible": n_active >= min_active})
    table = table.sort_values(["eligible", "s", "n_active"], ascending=False, kind="stable").reset_index(drop=True)
    return table.assign(rank=pd.Series(np.arange(1, len(table) + 1)).where(table["eligible"]).astype("Int64"))


def rank_stability(z_chosen, z_rejected, method="paper_sum", *, groups=None, n_boot=200, top=10, seed=0, **settings):
    """Would other prompts have chosen the same feature?  Bootstrap of ``feature_scores`` over prompts ``groups``.

    Returns dict: feature (the choice), top1_frequency, top_jaccard (mean overlap of the top ``top`` sets),
    winners (frame: feature, frequency over resamples).
    """
    pos, neg = sparse.csr_array(z_chosen), sparse.csr_array(z_rejected)
    groups = np.arange(pos.shape[0]) if groups is None else pd.factorize(np.asarray(groups))[0]
    members = [np.flatnonzero(groups == g) for g in range(groups.max() + 1)]
    live = np.flatnonzero(np.bincount(np.r_[pos.indices, neg.indices], minlength=pos.shape[1]))
    if settings.get("shrinkage") != "all":
        pos, neg = pos[:, live], neg[:, live]
    else:
        live = np.arange(pos.shape[1])

    def best(rows):
        return live[feature_scores(pos[rows], neg[rows], method, **settings)["feature"].to_numpy()[:top]]

    rng, chosen = np.random.default_rng(seed), best(np.arange(pos.shape[0]))
    draws = [best(np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))]))
             for _ in range(n_boot)]
    winners = pd.Series([draw[0] for draw in draws]).value_counts(normalize=True)
    overlap = [len(set(chosen) & set(d)) / len(set(chosen) | set(d)) for d in draws]
    return {"feature": int(chosen[0]), "top1_frequency": float(winners.get(chosen[0], 0.0)),
            "top_jaccard": float(np.mean(overlap)),
            "winners": winners.rename_axis("feature").reset_index(name="frequency")}


def _head(model):
    weight = getattr(getattr(model, "score", None), "weight", None)
    if weight is None or weight.dim() != 2 or weight.shape[0] != 1:
        raise ModelError(f"{type(model).__name__} has no linear reward head score.weight [1, M]")
    return weight


def steer(model, factors: dict[int, float], add: dict[int, float] | None = None):
    """Deep copy of ``model`` whose head column i is multiplied by ``factors[i]`` (0 ablates, 1 changes nothing).

    ``add[i]`` is added to weight i after that (also for a feature whose weight is zero); either way only responses in
    which the feature is active change.  The edit is appended to ``config.sarm_edits``
    (feature, factor, before, after), so it travels with
    ``save_pretrained`` and ``unsteer`` can undo it exactly.  Raises ModelError without a head, ConfigError for a
    feature out of range or a factor that is not finite.
    """
    weight, add = _head(model), dict(add or {})
    for feature, factor in [*factors.items(), *add.items()]:
        whole = isinstance(feature, (int, np.integer)) and not isinstance(feature, bool)
        if not (whole and 0 <= feature < weight.shape[1]):
            raise ConfigError(f"feature {feature!r} is not an integer in 0..{weight.shape[1] - 1}")
        if not (isinstance(factor, numbers.Real) and math.isfinite(factor)):
            raise ConfigError(f"factor or value {factor!r} of feature {feature} is not a finite number")
    edited = copy.deepcopy(model)
    head, edits = _head(edited).data, []
    for feature in {**factors, **add}:
        before = head[0, feature].item()
        factor, value = float(factors.get(feature, 1.0)), float(add.get(feature, 0.0))
        head[0, feature] = head[0, feature] * factor + value
        edits.append({"feature": int(feature), "factor": factor, "before": before, "after": head[0, feature].item()}
                     | ({"added": value} if feature in add else {}))
    edited.config.sarm_edits = [*(getattr(model.config, "sarm_edits", None) or []), *edits]
    return edited


def unsteer(model):
    """Deep copy of a steered model with every edit in ``config.sarm_edits`` undone bit by bit, last one first."""
    restored = copy.deepcopy(model)
    head = _head(restored).data
    for edit in reversed(getattr(model.config, "sarm_edits", None) or []):
        if head[0, edit["feature"]].item() != edit["after"]:
            raise ModelError(f"head weight {edit['feature']} is no longer what the recorded edit left; not undone")
        head[0, edit["feature"]] = edit["before"]
    restored.config.sarm_edits = []
    return restored


def table_from_scores(reward, reward_steered, active, is_target, *, group=None, category=None) -> pd.DataFrame:
    """Table (reward, reward_steered, active, is_target, group, category), one row per response, of anybody's scores.

    group: prompt of each response, resampled together (default: every row its own); category: name of its part of
    the data (default "T" or "C").  Raises DataError for unequal lengths, non-finite rewards, or an inactive response
    whose reward moved (then the edit was not a scaling of that feature).
    """
    size = len(reward) if hasattr(reward, "__len__") else 0
    columns = {"reward": reward, "reward_steered": reward_steered, "active": active, "is_target": is_target,
               "group": np.arange(size) if group is None else group,
               "category": [""] * size if category is None else category}
    try:
        columns = {name: np.asarray(values) for name, values in columns.items()}
    except ValueError as error:
        raise DataError(f"a column holds values of unequal shape: {error}") from None
    if deep := [name for name, values in columns.items() if values.ndim != 1]:
        raise DataError(f"column {deep[0]!r} has {columns[deep[0]].ndim} dimensions; one value per response is needed")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"columns of unequal length: {lengths}")
    kinds = {"reward": float, "reward_steered": float, "active": bool, "is_target": bool}
    try:
        table = pd.DataFrame(columns).astype(kinds)
    except (TypeError, ValueError) as error:
        raise DataError(f"rewards must be numbers, active and is_target true or false: {error}") from None
    if category is None:
        table["category"] = np.where(table.is_target, "T", "C")
    if not np.isfinite(table[["reward", "reward_steered"]]).all(axis=None):
        raise DataError("rewards hold NaN or infinity; rescore those responses")
    moved = ~table["active"] & (table["reward"] != table["reward_steered"])
    if moved.any():
        raise DataError(f"{int(moved.sum())} responses moved although the feature is inactive (first: row "
                        f"{moved.idxmax()}); a scaled weight cannot do that")
    return table


def _resampled_means(values, group, n_boot, rng, masks) -> list[np.ndarray]:
    """Mean of ``values`` under each mask in ``n_boot`` shared resamples of whole groups; NaN where a mask is empty."""
    group = pd.factorize(np.asarray(group))[0]
    times = rng.multinomial(group.max() + 1, np.full(group.max() + 1, 1 / (group.max() + 1)), size=n_boot)
    with np.errstate(invalid="ignore"):
        return [(times @ np.bincount(group[m], values[m], minlength=times.shape[1]))
                / (times @ np.bincount(group[m], minlength=times.shape[1])) for m in masks]


def _interval(draws, level=0.95):
    draws = draws[np.isfinite(draws)]
    return tuple(np.percentile(draws, [50 - 50 * level, 50 + 50 * level]).tolist()) if len(draws) else (np.nan, np.nan)


def summarise_shift(table: pd.DataFrame, *, n_boot=2000, seed=0) -> pd.DataFrame:
    """Rows T, C and every category: n, n_active, share_active, share_unchanged, mean_before, mean_after, shift with
    shift_lo, shift_hi (95 %, prompts resampled), shift_given_active, median_before, median_after, d_pooled (shift over
    the pooled sd of rewards before and after), wasserstein, auroc_reward_active (does the base
    reward alone predict activation?).
    """
    target, category = table["is_target"].to_numpy(), table["category"].astype(str).to_numpy()
    sets = {"T": target, "C": ~target} | {name: category == name for name in pd.unique(category)
                                          if name not in ("T", "C")}
    sets = {name: mask for name, mask in sets.items() if mask.any()}
    before, after, active = (table[name].to_numpy() for name in ("reward", "reward_steered", "active"))
    draws = _resampled_means(after - before, table["group"], n_boot, np.random.default_rng(seed), sets.values())
    records = []
    for (name, m), draw in zip(sets.items(), draws, strict=True):
        r0, r1, on, (lo, hi) = before[m], after[m], active[m], _interval(draw)
        n1, spread = on.sum(), np.sqrt((r0.var() + r1.var()) / 2)
        records.append({
            "set": name, "n": int(m.sum()), "n_active": int(n1), "share_active": on.mean(),
            "share_unchanged": (r0 == r1).mean(), "mean_before": r0.mean(), "mean_after": r1.mean(),
            "shift": (r1 - r0).mean(), "shift_lo": lo, "shift_hi": hi,
            "shift_given_active": (r1 - r0)[on].mean() if n1 else np.nan, "median_before": np.median(r0),
            "median_after": np.median(r1), "d_pooled": (r1 - r0).mean() / spread if spread else np.nan,
            "wasserstein": wasserstein_distance(r0, r1),
            "auroc_reward_active": auroc(r0[on], r0[~on]) if 0 < n1 < len(on) else np.nan})
    return pd.DataFrame(records)


def _reward_cells(reward, target, other, bins=10, min_reward=None) -> tuple[list, np.ndarray]:
    """Pairs of masks (T, other) of equal base reward, and the share of T in each; cells without both are left out."""
    if min_reward is None:
        cell = np.digitize(reward, np.unique(np.quantile(reward[target], np.linspace(0, 1, bins + 1)[1:-1])))
    else:
        cell = np.where(reward >= min_reward, 0, -1)
    cells = [(target & (cell == v), other & (cell == v)) for v in np.unique(cell[cell >= 0])]
    cells = [(t, o) for t, o in cells if t.any() and o.any()]
    size = np.array([t.sum() for t, _ in cells], float)
    return cells, size / max(size.sum(), 1)


def matched_difference(table: pd.DataFrame, *, against=None, min_reward=None, bins=10, n_boot=2000, seed=0) -> dict:
    """Is T moved more than C at equal base reward?  Difference-in-differences: shift(T) - shift(C), reward-matched.

    min_reward: keep responses with base reward >= it; otherwise ``bins`` quantile bins of T's base reward, where C is
    weighted like T and a bin without a response of both sets is left out.  against: mask of the responses compared
    with T (default: all of C).  Returns dict: target_shift, other_shift, difference, lo, hi (95 %, prompts resampled,
    bins fixed), n_target, n_other, raw_difference (unmatched), how.
    """
    target = table["is_target"].to_numpy()
    other = ~target if against is None else np.asarray(against, bool) & ~target
    reward, shift = table["reward"].to_numpy(), (table["reward_steered"] - table["reward"]).to_numpy()
    if not target.any() or not other.any():
        raise DataError(f"T has {target.sum()} responses and the comparison {other.sum()}; both need some")
    how = f"{bins} quantile bins of the base reward of T" if min_reward is None else f"base reward >= {min_reward:g}"
    cells, share = _reward_cells(reward, target, other, bins, min_reward)
    if not cells:
        raise DataError(f"no base reward is shared by T and the comparison ({how}); nothing to match")
    masks = [m for pair in cells for m in pair]
    draws = np.array(_resampled_means(shift, table["group"], n_boot, np.random.default_rng(seed), masks))
    gap = draws[::2] - draws[1::2]
    weight = np.where(np.isfinite(gap), share[:, None], 0)  # a resample can empty a cell
    with np.errstate(invalid="ignore"):  # a resample without any common cell is NaN and left out
        lo, hi = _interval((np.nan_to_num(gap) * weight).sum(axis=0) / weight.sum(axis=0))
    t, o = (share @ [shift[pair[side]].mean() for pair in cells] for side in (0, 1))
    return {"target_shift": float(t), "other_shift": float(o), "difference": float(t - o), "lo": lo, "hi": hi,
            "n_target": int(np.sum(masks[::2])), "n_other": int(np.sum(masks[1::2])),
            "raw_difference": float(shift[target].mean() - shift[other].mean()), "how": how}


def rows_from_index(index: pd.DataFrame) -> pd.DataFrame:
    """Row structure of a benchmark (subset, chosen, rejected = arrays of unit numbers) from prompt_id and label."""
    records = []
    for _, part in index.reset_index(drop=True).groupby("prompt_id", sort=False):
        sides = [part.index[part["label"] == side].to_numpy() for side in ("chosen", "rejected")]
        if all(len(side) for side in sides):
            records.append({"subset": part["domain"].iloc[0], "chosen": sides[0], "rejected": sides[1]})
    if not records:
        raise DataError("no prompt has both a chosen and a rejected response")
    return pd.DataFrame(records)


def row_credits(rewards: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
    """Within-prompt credit [rows] or [rows, F] of rewards [n] or [n, F]: 1 when every chosen response outscores every
    rejected one, 1/(1+t) when the worst chosen one ties with t rejected ones at the top, else 0.
    """
    def gathered(side):
        flat, sizes = np.concatenate(rows[side].to_list()), rows[side].map(len).to_numpy()
        return rewards[flat], np.r_[0, np.cumsum(sizes)[:-1]], sizes

    values, starts, _ = gathered("chosen")
    worst = np.minimum.reduceat(values, starts, axis=0)
    values, starts, sizes = gathered("rejected")
    beaten = np.repeat(worst, sizes, axis=0)
    above = np.add.reduceat((values > beaten).astype(float), starts, axis=0)
    equal = np.add.reduceat((values == beaten).astype(float), starts, axis=0)
    return np.where(above > 0, 0.0, 1 / (1 + equal))


class SteeringAnalysis:
    """Exact steering of cached scores: ``z`` csr [n, M], ``rewards`` [n], head ``w`` [M], prompt ``groups`` [n].

    tolerance: allowed spread of ``rewards - z @ w`` (a constant bias is fine) relative to the largest reward; None
    skips the check, for rewards scored in a coarser precision.  Raises DataError when shapes or the sum do not fit.
    """

    def __init__(self, z, rewards, w, groups, *, tolerance: float | None = 1e-3):
        self.z = sparse.csr_array(z).astype(float)
        self.rewards, self.w = np.asarray(rewards, float).ravel(), np.asarray(w, float).ravel()
        self.groups = pd.factorize(np.asarray(groups))[0]
        if self.z.shape != (len(self.rewards), len(self.w)) or len(self.groups) != len(self.rewards):
            raise DataError(f"z {self.z.shape}, rewards {self.rewards.shape}, w {self.w.shape}, groups "
                            f"{self.groups.shape} do not fit; z must be [n, M]")
        self.residual = float(np.ptp(self.rewards - self.z @ self.w))
        if tolerance is not None and not self.residual <= tolerance * max(1, np.abs(self.rewards).max()):
            raise DataError(f"rewards differ from z @ w by up to {self.residual:.3g} beyond a constant: w or z belongs "
                            "to another model, or rewards are low-precision (then pass tolerance=None)")
        self._columns = self.z.tocsc()
        self.live = np.flatnonzero(np.diff(self._columns.indptr))

    def activation(self, feature: int) -> np.ndarray:
        """z_i of every unit [n]."""
        if not 0 <= feature < len(self.w):
            raise ConfigError(f"feature {feature} is outside 0..{len(self.w) - 1}")
        return self._columns[:, [feature]].toarray().ravel()

    def contribution(self, feature: int) -> np.ndarray:
        """w_i z_i of every unit, in reward points [n]."""
        z = self.activation(feature)  # checks the range, where w[-1] would silently be another feature
        return self.w[feature] * z

    def steered(self, factors: dict[int, float]) -> np.ndarray:
        """r' = r + sum_i (factor_i - 1) w_i z_i, [n]."""
        return self.rewards + sum((factor - 1) * self.contribution(i) for i, factor in factors.items())

    def table(self, feature: int, factor: float, target, *, category=None) -> pd.DataFrame:
        """``table_from_scores`` of one edit; active means z_i != 0."""
        return table_from_scores(self.rewards, self.steered({feature: factor}), self.activation(feature) != 0, target,
                                 group=self.groups, category=category)

    def flips(self, factors: dict[int, float], rows: pd.DataFrame, *, n_boot=2000, seed=0) -> pd.DataFrame:
        """Within-prompt accuracy per subset and "all": n, accuracy_before, accuracy_after, change with lo, hi (95 %,
        rows resampled), gained and lost (rows whose credit rose, fell), mcnemar_p (exact, two-sided) and p_holm
        (over the subsets)."""
        before, after = row_credits(self.rewards, rows), row_credits(self.steered(factors), rows)
        rng, records = np.random.default_rng(seed), []
        for name in [*pd.unique(rows["subset"]), "all"]:
            m = np.ones(len(rows), bool) if name == "all" else (rows["subset"] == name).to_numpy()
            change = (after - before)[m]
            gained, lost = int((change > 0).sum()), int((change < 0).sum())
            draws = change[rng.integers(len(change), size=(n_boot, len(change)))].mean(axis=1)
            lo, hi = _interval(draws)
            records.append({"subset": name, "n": int(m.sum()), "accuracy_before": before[m].mean(),
                            "accuracy_after": after[m].mean(), "change": change.mean(), "lo": lo, "hi": hi,
                            "gained": gained, "lost": lost,
                            "mcnemar_p": mcnemar_exact(gained, lost)})
        table = pd.DataFrame(records)
        table["p_holm"] = [*holm(table["mcnemar_p"].iloc[:-1]), np.nan]
        return table

    def dose_response(self, feature: int, doses, target, rows: pd.DataFrame | None = None, *, n_boot=2000, seed=0):
        """Long table over factors: dose, quantity ("shift T", "shift C", "accuracy <subset>"), value, lo, hi."""
        target, records = np.asarray(target, bool), []
        unit = self.contribution(feature)  # the shift is (dose - 1) times this
        sets = {"shift T": target, "shift C": ~target}
        draws = _resampled_means(unit, self.groups, n_boot, np.random.default_rng(seed), sets.values())
        for dose in doses:
            for (name, m), draw in zip(sets.items(), draws, strict=True):
                lo, hi = _interval((dose - 1) * draw)
                records.append((dose, name, (dose - 1) * unit[m].mean(), lo, hi))
            if rows is not None:
                credit, rng = row_credits(self.steered({feature: dose}), rows), np.random.default_rng(seed)
                for subset in pd.unique(rows["subset"]):
                    part = credit[(rows["subset"] == subset).to_numpy()]
                    lo, hi = _interval(part[rng.integers(len(part), size=(n_boot, len(part)))].mean(axis=1))
                    records.append((dose, f"accuracy {subset}", part.mean(), lo, hi))
        return pd.DataFrame(records, columns=["dose", "quantity", "value", "lo", "hi"])

    def controls(self, feature: int, factor: float, target, rows: pd.DataFrame | None = None, *, target_subsets=(),
                 n_matched=20, n_random=200, bins=10, seed=0) -> tuple[pd.DataFrame, dict]:
        """Is the chosen feature special?  The same edit size given to every live feature and to random directions.

        Edit size = root mean square of the reward change over all units, as the chosen edit has it; every feature is
        amplified (its own sign of w), random directions are Gaussian mixtures of all live features.  Returns a frame
        (kind "feature"/"random", feature, factor, rate, t_shift, c_shift, did = t - c, matched_did in quantile bins of
        T's base reward, chosen, matched = among the ``n_matched`` features nearest in activation rate, mean |w z| and
        correlation with the base reward; with ``rows`` also target_gain and worst_off_target, accuracy changes on
        ``target_subsets`` and the worst of the other subsets), and a dict: rank and p of the chosen among live and
        matched features and random directions, by did and matched_did; p = (1 + at least as large) / (1 + others).
        """
        target = np.asarray(target, bool)
        budget = np.sqrt(np.mean(((factor - 1) * self.contribution(feature)) ** 2))
        if not budget > 0:
            raise DataError(f"feature {feature} with factor {factor} changes no reward; nothing to compare with")
        usable = self.live[self.w[self.live] != 0]
        unit = self._columns[:, usable].toarray() * self.w[usable]
        scale = (1 if factor >= 1 else -1) * budget / np.sqrt((unit**2).mean(axis=0))
        mix = unit @ np.random.default_rng(seed).normal(size=(len(usable), n_random))
        change = np.concatenate([scale * unit, mix * budget / np.sqrt((mix**2).mean(axis=0))], axis=1)
        cells, share = _reward_cells(self.rewards, target, ~target, bins)
        gaps = np.array([change[t].mean(axis=0) - change[o].mean(axis=0) for t, o in cells])
        traits = self._traits(unit)
        at, blank = int(np.flatnonzero(usable == feature)[0]), np.full(n_random, np.nan)
        distance = ((traits - traits[at]) ** 2).sum(axis=1)
        near = [i for i in np.argsort(distance, kind="stable") if i != at][:n_matched]
        t, c = change[target].mean(axis=0), change[~target].mean(axis=0)
        table = pd.DataFrame({
            "kind": ["feature"] * len(usable) + ["random"] * n_random,
            "feature": pd.array([*usable, *[None] * n_random], "Int64"), "factor": np.r_[1 + scale, blank],
            "rate": np.r_[(unit != 0).mean(axis=0), blank], "t_shift": t, "c_shift": c, "did": t - c,
            "matched_did": share @ gaps if cells else np.nan,
            "chosen": np.arange(change.shape[1]) == at, "matched": np.isin(np.arange(change.shape[1]), near)})
        if rows is not None:
            moved = row_credits(self.rewards[:, None] + change, rows) - row_credits(self.rewards, rows)[:, None]
            change_of = {s: moved[(rows["subset"] == s).to_numpy()].mean(axis=0) for s in rows["subset"].unique()}
            on, off = ([v for s, v in change_of.items() if (s in target_subsets) == side] for side in (True, False))
            table["target_gain"] = np.mean(on, axis=0) if on else np.nan
            table["worst_off_target"] = np.min(off, axis=0) if off else np.nan
        pools = {"live": (table["kind"] == "feature") & ~table["chosen"], "matched": table["matched"],
                 "random": table["kind"] == "random"}
        summary = {}
        for measure in ("did", "matched_did"):
            for name, pool in pools.items():
                n, above = int(pool.sum()), int((table.loc[pool, measure] >= table.loc[at, measure]).sum())
                summary |= {f"{measure}_rank_{name}": above + 1, f"{measure}_n_{name}": n,
                            f"{measure}_p_{name}": (1 + above) / (1 + n)}
        return table, summary

    def _traits(self, unit: np.ndarray) -> np.ndarray:
        """Standardised activation rate, log mean |w z| and correlation with the base reward of features [F, 3]."""
        centred, reward = unit - unit.mean(axis=0), self.rewards - self.rewards.mean()
        with np.errstate(invalid="ignore", divide="ignore"):
            corr = np.nan_to_num(reward @ centred / np.sqrt((reward**2).sum() * (centred**2).sum(axis=0)))
            traits = np.column_stack([(unit != 0).mean(axis=0), np.log(np.abs(unit).mean(axis=0)), corr])
            return np.nan_to_num((traits - traits.mean(axis=0)) / traits.std(axis=0))
