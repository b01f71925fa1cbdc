"""Steering: choose a feature, scale its head weight, and measure exactly what moves (the paper's Figure 3).

    s_i = (c_i - j_i) / (c_i + j_i + mean(c + j))     c, j: activity on chosen, rejected responses
    r'  = r + sum_i (factor_i - 1) w_i z_i            exact: the head is linear and z is unchanged

so one pass over the data serves every factor, feature and control.  Intervals: 95 %, whole prompts resampled.
"""

import copy
import math

import numpy as np
import pandas as pd
from scipy import sparse

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.evaluation.rewardbench2 import row_credit

MIN_ACTIVE = 10  # a feature that fires in fewer responses is not eligible
BINS = 10  # of the base reward, where T and C are compared at equal reward
N_BOOT = 2000
N_RANDOM = 200


def feature_scores(z_chosen, z_rejected, method="sum") -> pd.DataFrame:
    """s_i of every live feature, best first, rare ones last; row i of both [n, M] is one pair.

    method: c and j are summed activations, and the mean is over live features ("sum") or over all M ("code", as in the
    released code); or they are counts of responses in which the feature fires ("frequency", the paper's words).
    """
    pos, neg = (sparse.csr_array(z).astype(float) for z in (z_chosen, z_rejected))
    if pos.shape != neg.shape or method not in ("sum", "code", "frequency"):
        raise DataError(f"one row per pair, not {pos.shape} and {neg.shape}, and method sum, code or frequency")
    fired = [(z != 0).sum(axis=0) for z in (pos, neg)]
    live = np.flatnonzero(n_active := fired[0] + fired[1])
    if not len(live):
        raise DataError("no feature fires on any of these responses")
    c, j = (one[live] for one in (fired if method == "frequency" else (pos.sum(axis=0), neg.sum(axis=0))))
    mean = (c + j).sum() / (pos.shape[1] if method == "code" else len(live))
    table = pd.DataFrame({"feature": live, "s": (c - j) / (c + j + mean), "c": c, "j": j,
                          "n_active": n_active[live], "eligible": n_active[live] >= MIN_ACTIVE})
    return table.sort_values(["eligible", "s", "n_active"], ascending=False, kind="stable", ignore_index=True)


def steer(model, factors: dict[int, float]):
    """Deep copy of ``model`` whose head weight w_i is multiplied by ``factors[i]`` (0 ablates, 1 keeps).

    The edit is appended to ``config.sarm_edits`` and saved with the model; :func:`unsteer` undoes it exactly.
    Raises ModelError without a linear head, ConfigError for a feature or factor that cannot be.
    """
    edited = copy.deepcopy(model)
    head, edits = _head(edited), list(_edits(model))
    for feature, factor in factors.items():
        if feature not in range(len(head)):
            raise ConfigError(f"feature {feature!r} is not an integer in 0..{len(head) - 1}")
        if not math.isfinite(factor):
            raise ConfigError(f"factor {factor!r} of feature {feature} is not a finite number")
        edit = {"feature": int(feature), "factor": float(factor), "before": head[feature].item()}
        head[feature] *= float(factor)
        edits.append({**edit, "after": head[feature].item()})
        if not math.isfinite(edits[-1]["after"]):
            raise ConfigError(f"factor {factor} makes the weight of feature {feature} infinite; it is {edit['before']}")
    edited.config.sarm_edits = edits
    return edited


def _edits(model) -> list[dict]:
    """The edits that a config records; ModelError when somebody else wrote something there."""
    edits, features = getattr(model.config, "sarm_edits", None) or [], range(len(_head(model)))
    try:
        good = all(type(edit["feature"]) is int and edit["feature"] in features
                   and math.isfinite(edit["before"] + edit["after"]) for edit in edits)
    except (TypeError, LookupError):
        good = False
    if not good:
        raise ModelError(f"sarm_edits in config.json is no list of edits: {edits!r:.60}")
    return edits


def unsteer(model):
    """Deep copy of a steered model with every edit in ``config.sarm_edits`` undone, bit by bit."""
    restored = copy.deepcopy(model)
    head = _head(restored)
    for edit in reversed(_edits(model)):
        if head[edit["feature"]].item() != edit["after"]:
            raise ModelError(f"head weight {edit['feature']} is no longer what the edit left; not undone")
        head[edit["feature"]] = edit["before"]
    restored.config.sarm_edits = []
    return restored


def _head(model):
    """The head's weights [M], to be changed in place."""
    weight = getattr(getattr(model, "score", None), "weight", None)
    if weight is None or len(weight) != 1:
        raise ModelError(f"{type(model).__name__} has no linear reward head score.weight [1, M]")
    return weight.data[0]


def table_from_scores(reward, reward_steered, active, is_target, group=None, category=None) -> pd.DataFrame:
    """One row per response; ``group`` is its prompt (default: its own), ``category`` its part of the data.

    Raises DataError for rewards or flags that are none, and for an inactive response that moved.
    """
    try:
        table = pd.DataFrame({
            "reward": np.asarray(reward, float), "reward_steered": np.asarray(reward_steered, float),
            "active": np.asarray(active), "is_target": np.asarray(is_target),
            "group": np.arange(np.size(reward)) if group is None else np.asarray(group)})
    except ValueError as error:
        raise DataError(f"every column needs one value per response, rewards are numbers: {error}") from None
    for name in ("active", "is_target"):
        if not table[name].isin([True, False]).all():
            raise DataError(f"{name} must be true or false, not for example {table[name].iloc[0]!r}")
    if not np.isfinite(table[["reward", "reward_steered"]]).all(axis=None):
        raise DataError("rewards hold NaN or infinity; rescore those responses")
    table = table.astype({"active": bool, "is_target": bool})
    moved = ~table["active"] & (table["reward"] != table["reward_steered"])
    if moved.any():
        raise DataError(f"{moved.sum()} responses moved although the feature is inactive: {moved.idxmax()}")
    default = np.where(table["is_target"], "T", "C")
    return table.assign(category=default if category is None else np.asarray(category))


def summarise_shift(table: pd.DataFrame) -> pd.DataFrame:
    """Rows T, C and every category of :func:`table_from_scores`, described before and after."""
    target, category = table["is_target"].to_numpy(), table["category"].astype(str).to_numpy()
    sets = {"T": target, "C": ~target} | {name: category == name for name in pd.unique(category)}
    shift, means, records = table["reward_steered"] - table["reward"], _resampler(table["group"]), []
    for name, mask in sets.items():
        if mask.any():
            part, moved = table[mask], shift[mask]
            lo, hi = _interval(means(shift.to_numpy(), mask))
            records.append({
                "set": name, "n": len(part), "n_active": part.active.sum(),
                "share_active": part.active.mean(), "share_unchanged": (moved == 0).mean(),
                "mean_before": part.reward.mean(), "mean_after": part.reward_steered.mean(),
                "shift": moved.mean(), "shift_lo": lo, "shift_hi": hi})
    return pd.DataFrame(records)


def matched_difference(table: pd.DataFrame, min_reward: float | None = None, n_boot: int = N_BOOT) -> dict:
    """Is T moved more than C at equal base reward?  shift(T) - shift(C) with its interval lo, hi.

    Compared within quantile bins of T's base reward (C weighted like T, bins without both left out), or among
    all responses whose base reward is at least ``min_reward``.
    """
    target, reward = table["is_target"].to_numpy(), table["reward"].to_numpy()
    shift = (table["reward_steered"] - table["reward"]).to_numpy()
    cells, share = _reward_cells(reward, target, min_reward)
    if not cells:
        raise DataError(f"T ({target.sum()} of {len(target)} responses) and C share no base reward")
    means = _resampler(table["group"], n_boot)
    gap = np.array([means(shift, t) - means(shift, c) for t, c in cells])
    weight = np.where(np.isfinite(gap), share[:, None], 0)  # a resample can empty a cell
    with np.errstate(invalid="ignore"):  # a resample without any common cell is NaN and left out
        lo, hi = _interval(np.nansum(gap * weight, axis=0) / weight.sum(axis=0))
    t, c = (float(share @ [shift[cell[side]].mean() for cell in cells]) for side in (0, 1))
    return {"target_shift": t, "other_shift": c, "difference": t - c, "lo": lo, "hi": hi,
            "n_target": sum(int(t.sum()) for t, _ in cells), "n_other": sum(int(c.sum()) for _, c in cells)}


def _reward_cells(reward, target, min_reward=None) -> tuple[list, np.ndarray]:
    """Pairs of masks (T, C) of equal base reward, and each cell's share of T."""
    cell = np.where(reward >= (-np.inf if min_reward is None else min_reward), 0, -1)
    if min_reward is None and target.any():
        cell = np.digitize(reward, np.unique(np.quantile(reward[target], np.linspace(0, 1, BINS + 1)[1:-1])))
    cells = [(target & (cell == v), ~target & (cell == v)) for v in np.unique(cell[cell >= 0])]
    cells = [(t, c) for t, c in cells if t.any() and c.any()]
    size = np.array([t.sum() for t, _ in cells], float)
    return cells, size / max(size.sum(), 1)


def _resampler(group, n_boot: int = N_BOOT):
    """Function (values, mask) -> mean in ``n_boot`` resamples of whole groups, the same at each call."""
    group = pd.factorize(np.asarray(group))[0]
    size = group.max() + 1
    times = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=n_boot)

    def means(values, mask) -> np.ndarray:
        sums, counts = (np.bincount(group[mask], weights, size) for weights in (values[mask], None))
        with np.errstate(invalid="ignore"):
            return (times @ sums) / (times @ counts)
    return means


def _interval(draws: np.ndarray) -> tuple[float, float]:
    return tuple(np.nanpercentile(draws, [2.5, 97.5]).tolist())


def rows_from_index(index: pd.DataFrame) -> pd.DataFrame:
    """Prompts as rows (subset, chosen, rejected: response numbers) from prompt_id, domain and label."""
    groups = index.reset_index(drop=True).groupby("prompt_id", sort=False)
    rows = pd.DataFrame({"subset": groups["domain"].first()})
    for side in ("chosen", "rejected"):
        rows[side] = [part.index[part["label"] == side].to_numpy() for _, part in groups]
    rows = rows[(rows["chosen"].map(len) > 0) & (rows["rejected"].map(len) > 0)].reset_index(drop=True)
    if not len(rows):
        raise DataError("no prompt has both a chosen and a rejected response")
    return rows


def row_credits(rewards: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
    """Best-of-n credit of each prompt [rows], by its worst chosen response (ties as in RewardBench 2)."""
    return np.array([row_credit([rewards[chosen].min(), *rewards[rejected]])
                     for chosen, rejected in zip(rows["chosen"], rows["rejected"], strict=True)])


def best_of_n(rewards: np.ndarray, steered: np.ndarray, rows: pd.DataFrame) -> pd.DataFrame:
    """Per subset: prompts whose best candidate changes, and the share of good picks before and after."""
    lines = []
    for row in rows.itertuples():
        units = np.r_[row.chosen, row.rejected]
        before, after = (units[np.argmax(values[units])] for values in (rewards, steered))
        lines.append((row.subset, 1, before != after, before in row.chosen, after in row.chosen))
    table = pd.DataFrame(lines, columns=["subset", "n", "changed", "good_before", "good_after"])
    how = {"n": "sum", "changed": "sum", "good_before": "mean", "good_after": "mean"}
    return table.groupby("subset", sort=False, as_index=False).agg(how)


class SteeringAnalysis:
    """Exact steering of cached scores: ``z`` [n, M], ``rewards`` [n], head ``w`` [M], prompt ``groups`` [n].

    Raises DataError when shapes do not fit, or when ``rewards - z @ w`` is not constant.
    """

    def __init__(self, z, rewards, w, groups):
        self.z, self.groups = sparse.csc_array(z).astype(float), np.asarray(groups)
        self.rewards, self.w = np.asarray(rewards, float).ravel(), np.asarray(w, float).ravel()
        if self.z.shape != (len(self.rewards), len(self.w)) or len(self.groups) != len(self.rewards):
            raise DataError(f"z {self.z.shape}, rewards {self.rewards.shape}, w {self.w.shape}, groups "
                            f"{self.groups.shape} do not fit; z must be [n, M]")
        spread = float(np.ptp(self.rewards - self.z @ self.w))
        if not spread <= 1e-3 * max(1, np.abs(self.rewards).max()):
            raise DataError(f"rewards differ from z @ w by up to {spread:.3g} beyond a constant: they are of "
                            "another model, or were scored in low precision")

    def activation(self, feature: int) -> np.ndarray:
        """z_i of every response [n]."""
        if not 0 <= feature < len(self.w):
            raise ConfigError(f"feature {feature} is outside 0..{len(self.w) - 1}")
        return self.z[:, [feature]].toarray().ravel()

    def contribution(self, feature: int) -> np.ndarray:
        """w_i z_i of every response, in reward points [n]."""
        return self.activation(feature) * self.w[feature]

    def steered(self, factors: dict[int, float]) -> np.ndarray:
        """r' = r + sum_i (factor_i - 1) w_i z_i, [n]."""
        return self.rewards + sum((factor - 1) * self.contribution(i) for i, factor in factors.items())

    def table(self, feature: int, factor: float, target, category=None) -> pd.DataFrame:
        """:func:`table_from_scores` of one edit; active means z_i != 0."""
        return table_from_scores(self.rewards, self.steered({feature: factor}), self.activation(feature) != 0,
                                 target, self.groups, category)

    def flips(self, factors: dict[int, float], rows: pd.DataFrame) -> pd.DataFrame:
        """Prompts won before and after, and those gained and lost, per subset and over "all" prompts."""
        before, after = row_credits(self.rewards, rows), row_credits(self.steered(factors), rows)
        table = pd.DataFrame({"subset": rows["subset"], "n": 1, "accuracy_before": before,
                              "accuracy_after": after, "gained": after > before, "lost": after < before})
        groups = pd.concat([table, table.assign(subset="all")]).groupby("subset", sort=False, as_index=False)
        return groups.agg({"n": "sum", "gained": "sum", "lost": "sum", "accuracy_before": "mean",
                           "accuracy_after": "mean"})

    def dose_response(self, feature: int, doses, target, rows: pd.DataFrame) -> pd.DataFrame:
        """Long table over factors; quantity: "shift T", "shift C", "accuracy <subset>"."""
        target, unit = np.asarray(target, bool), self.contribution(feature)
        sets = {"shift T": target, "shift C": ~target}
        parts = {f"accuracy {name}": (rows["subset"] == name).to_numpy() for name in rows["subset"].unique()}
        of_responses, of_prompts = _resampler(self.groups), _resampler(rows.index)
        records = []
        for dose in doses:
            shift, credit = (dose - 1) * unit, row_credits(self.steered({feature: dose}), rows)
            for values, masks, means in ((shift, sets, of_responses), (credit, parts, of_prompts)):
                records += [(dose, name, values[mask].mean(), *_interval(means(values, mask)))
                            for name, mask in masks.items()]
        return pd.DataFrame(records, columns=["dose", "quantity", "value", "lo", "hi"])

    def controls(self, feature: int, factor: float, target) -> tuple[pd.DataFrame, dict[str, float]]:
        """Is the chosen feature special?  Live features and random mixtures of them get an edit of its size.

        The size is the root mean square of the reward change; matched_did is t_shift - c_shift at equal base
        reward; p is the share of edits at least as large, the chosen one included.
        """
        target = np.asarray(target, bool)
        size = np.sqrt((((factor - 1) * self.contribution(feature)) ** 2).mean())
        if not size > 0:
            raise DataError(f"feature {feature} with factor {factor} changes no reward")
        usable = np.flatnonzero((np.diff(self.z.indptr) > 0) & (self.w != 0))
        unit = self.z[:, usable].toarray() * self.w[usable]
        mix = unit @ np.random.default_rng(0).normal(size=(len(usable), N_RANDOM))
        change = np.concatenate([unit if factor >= 1 else -unit, mix], axis=1)
        change *= size / np.sqrt((change**2).mean(axis=0))
        t, c = change[target].mean(axis=0), change[~target].mean(axis=0)
        cells, share = _reward_cells(self.rewards, target)
        gaps = [change[own].mean(axis=0) - change[other].mean(axis=0) for own, other in cells]
        live = np.arange(change.shape[1]) < len(usable)
        chosen = np.r_[usable == feature, np.zeros(N_RANDOM, bool)]
        table = pd.DataFrame({
            "kind": np.where(live, "feature", "random"), "chosen": chosen, "t_shift": t, "c_shift": c,
            "did": t - c, "matched_did": share @ np.array(gaps) if gaps else np.nan})
        p_values = {}
        for measure, own in table.loc[chosen, ["did", "matched_did"]].iloc[0].items():
            for name, pool in (("live", live), ("random", ~live | chosen)):
                p_values[f"{measure}_p_{name}"] = float((table[measure][pool] >= own).mean())
        return table, p_values
