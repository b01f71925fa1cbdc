"""What an edit of one feature has to beat: other edits of the same size, chance, and what it costs elsewhere.

The size of an edit is the root mean square of the reward change over all responses.  Everything is exact on cached
scores (see `SteeringAnalysis`); ``target`` marks T, ``rows`` are the benchmark's prompts (`rows_from_index`).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import expit

from sarmlib.chat import collate, encode_conversations, fit_length, pad_id, truncate_left
from sarmlib.errors import DataError
from sarmlib.evaluation.scoring import token_batches
from sarmlib.evaluation.statistics import benjamini_hochberg
from sarmlib.extractor import position_rule
from sarmlib.sarm.steering import SteeringAnalysis, _reward_cells, row_credits


def selection_directions(z_chosen, z_rejected, l2: float = 1.0) -> dict[str, np.ndarray]:
    """Directions [M] in feature space that tell chosen from rejected responses (csr [n, M] each).

    ``difference in means`` of z, and ``logistic probe``: L2-regularised, on features scaled to unit root mean square.
    """
    pos, neg = sparse.csr_array(z_chosen).astype(float), sparse.csr_array(z_rejected).astype(float)
    z = sparse.csr_array(sparse.vstack([pos, neg]))
    size = np.sqrt(np.asarray(z.multiply(z).mean(axis=0))).ravel()
    live = np.flatnonzero(size)
    x, y = z[:, live].toarray() / size[live], np.r_[np.ones(pos.shape[0]), -np.ones(neg.shape[0])]

    def loss(v):
        margin = y * (x @ v[:-1] + v[-1])
        slope = -y * expit(-margin)
        return np.logaddexp(0, -margin).sum() + l2 / 2 * v[:-1] @ v[:-1], np.r_[x.T @ slope + l2 * v[:-1], slope.sum()]

    found = minimize(loss, np.zeros(len(live) + 1), jac=True, method="L-BFGS-B").x[:-1]
    probe = np.zeros(z.shape[1])
    probe[live] = found / size[live]
    return {"difference in means": pos.mean(axis=0) - neg.mean(axis=0), "logistic probe": probe}


def control_edits(analysis: SteeringAnalysis, feature: int, factor: float, directions: dict[str, np.ndarray],
                  lengths=None) -> dict[str, np.ndarray]:
    """``name -> reward change [n]`` (sizes still differ): the edit itself, directions in feature space, a stretch of
    the upper half of the rewards, which knows no feature, and length."""
    changes = {f"feature {feature}": (factor - 1) * analysis.contribution(feature)}
    changes |= {name: analysis.z @ v for name, v in directions.items()}
    changes["reward stretch"] = np.maximum(analysis.rewards - np.median(analysis.rewards), 0)
    if lengths is not None:
        changes["length"] = np.asarray(lengths, float) - np.mean(lengths)
    return changes


def compare_edits(analysis: SteeringAnalysis, changes: dict[str, np.ndarray], target, rows: pd.DataFrame | None = None,
                  *, target_subsets=(), bins: int = 10) -> pd.DataFrame:
    """Every change scaled to the size of the first: edit, t_shift, c_shift, did = t - c, matched_did (at equal base
    reward, as `matched_difference`), and with ``rows`` target_gain and worst_off_target (accuracy changes)."""
    target, names = np.asarray(target, bool), list(changes)
    change = np.column_stack([changes[name] for name in names])
    size = np.sqrt((change**2).mean(axis=0))
    if not (size > 0).all():
        raise DataError(f"edit {names[int(np.argmin(size))]!r} changes no reward; nothing to compare with")
    change = change * (size[0] / size)
    cells, share = _reward_cells(analysis.rewards, target, ~target, bins)
    t, c = change[target].mean(axis=0), change[~target].mean(axis=0)
    table = pd.DataFrame({"edit": names, "t_shift": t, "c_shift": c, "did": t - c, "matched_did": share @ np.array(
        [change[a].mean(axis=0) - change[b].mean(axis=0) for a, b in cells]) if cells else np.nan})
    return table if rows is None else table.join(_accuracy_changes(analysis, change, rows, target_subsets))


def _accuracy_changes(analysis, change: np.ndarray, rows: pd.DataFrame, target_subsets) -> pd.DataFrame:
    moved = row_credits(analysis.rewards[:, None] + change, rows) - row_credits(analysis.rewards, rows)[:, None]
    by_subset = {name: moved[(rows.subset == name).to_numpy()].mean(axis=0) for name in rows.subset.unique()}
    on, off = ([v for name, v in by_subset.items() if (name in target_subsets) == side] for side in (True, False))
    return pd.DataFrame({"target_gain": np.mean(on, axis=0) if on else np.nan,
                         "worst_off_target": np.min(off, axis=0) if off else np.nan}, index=range(change.shape[1]))


def pareto(analysis: SteeringAnalysis, ranked, size: float, rows: pd.DataFrame, target_subsets, *,
           counts=(1, 2, 4, 8, 16, 32), sizes=(0.25, 0.5, 1, 2, 4)) -> pd.DataFrame:
    """Steering the first ``n`` of the ``ranked`` features together, at multiples of ``size`` (root mean square).

    Columns: features, size, factor (the common factor on their weights), target_gain and worst_off_target (accuracy
    changes), target_margin (mean change of chosen minus rejected on ``target_subsets``, in sd of rewards: it still
    tells edits apart when accuracy is at 100 %), front (no other edit has as large a margin and loses less, or the
    reverse).  Raises DataError without a row of ``target_subsets`` or of another subset.
    """
    inside = rows[rows.subset.isin(target_subsets)]
    if len(inside) in (0, len(rows)):
        raise DataError(f"{len(inside)} of {len(rows)} prompts are in {tuple(target_subsets)}; a front needs prompts "
                        "inside and outside")
    lines, changes = [], []
    for count in [n for n in counts if n <= len(ranked)]:
        unit = sum(analysis.contribution(int(feature)) for feature in ranked[:count])
        rms = np.sqrt(np.mean(unit**2))
        for multiple in sizes if rms > 0 else ():
            lines.append({"features": count, "size": multiple * size, "factor": 1 + multiple * size / rms})
            changes.append(unit * (multiple * size / rms))
    if not lines:
        raise DataError("none of the ranked features changes a reward")
    change = np.column_stack(changes)
    table = pd.DataFrame(lines).join(_accuracy_changes(analysis, change, rows, target_subsets))
    table["target_margin"] = np.mean([change[row.chosen].mean(axis=0) - change[row.rejected].mean(axis=0)
                                      for row in inside.itertuples()], axis=0) / analysis.rewards.std()
    gain, loss = table.target_margin.to_numpy(), table.worst_off_target.to_numpy()
    beaten = (gain[None] >= gain[:, None]) & (loss[None] >= loss[:, None])
    beaten &= (gain[None] > gain[:, None]) | (loss[None] > loss[:, None])
    return table.assign(front=~beaten.any(axis=1))


def max_t(analysis: SteeringAnalysis, target, eligible, *, n_perm: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Which features move T more than C at equal edit size, when T's prompts could have been any prompts?

    T is permuted by prompt: as many prompts as T has are drawn, and their ``eligible`` responses (bool [n]: those
    that would be in T) are T.  One-sided.  Columns, by falling z: feature, did (in units of the edit's size), z
    (standardised over permutations), p, p_max (Westfall-Young: the largest z of any feature) and q (BH over features).
    """
    target, eligible = np.asarray(target, bool), np.asarray(eligible, bool)
    if (target & ~eligible).any():
        raise DataError("T holds responses that are not eligible for it")
    usable = analysis.live[analysis.w[analysis.live] != 0]
    unit = analysis._columns[:, usable].toarray() * analysis.w[usable]
    unit = unit / np.sqrt((unit**2).mean(axis=0))
    flags = np.bincount(analysis.groups[target], minlength=analysis.groups.max() + 1) > 0
    rng = np.random.default_rng(seed)
    sets = np.array([target, *(eligible & rng.permutation(flags)[analysis.groups] for _ in range(n_perm))], float)
    inside, n = sets @ unit, sets.sum(axis=1, keepdims=True)
    did = inside / n - (unit.sum(axis=0) - inside) / (len(target) - n)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.nan_to_num((did - did[1:].mean(axis=0)) / did[1:].std(axis=0))
    p = (1 + (z[1:] >= z[0]).sum(axis=0)) / (1 + n_perm)
    p_max = (1 + (z[1:].max(axis=1)[:, None] >= z[0]).sum(axis=0)) / (1 + n_perm)
    table = pd.DataFrame({"feature": usable, "did": did[0], "z": z[0], "p": p, "p_max": p_max,
                          "q": benjamini_hochberg(p)})
    return table.sort_values("z", ascending=False, ignore_index=True)


def best_of_n(analysis: SteeringAnalysis, factors: dict[int, float], rows: pd.DataFrame) -> pd.DataFrame:
    """Which candidate of each prompt is picked before and after steering, per subset: n, changed, share_changed,
    good_before, good_after (share of picks that are chosen responses).  Ties prompts, with many right answers, too."""
    steered, lines = analysis.steered(factors), []
    for row in rows.itertuples():
        units = np.r_[row.chosen, row.rejected].astype(int)
        picks = [units[np.argmax(rewards[units])] for rewards in (analysis.rewards, steered)]
        lines.append((row.subset, picks[0] != picks[1], *(pick in row.chosen for pick in picks)))
    table = pd.DataFrame(lines, columns=["subset", "changed", "good_before", "good_after"])
    found = table.groupby("subset", sort=False).agg(
        n=("changed", "size"), changed=("changed", "sum"), share_changed=("changed", "mean"),
        good_before=("good_before", "mean"), good_after=("good_after", "mean"))
    return found.reset_index()


@torch.inference_mode()
def sentence_end_features(model, tokenizer, conversations, *, max_length: int = 2048,
                          batch_tokens: int = 4096) -> sparse.csr_array:
    """Features summed over all sentence ends of each conversation, csr [n, M]: the input of SAFER's score.

    ``feature_scores`` of it is SAFER's s.  The prompt's sentence ends are among them; they add the same to both
    answers of a pair.
    """
    rule, device = position_rule(tokenizer), next(model.parameters()).device
    ids = truncate_left(tokenizer, encode_conversations(tokenizer, conversations), fit_length(model, max_length))
    blocks, order = [], []
    for members in token_batches([len(one) for one in ids], batch_tokens):
        batch = {name: one.to(device) for name, one in collate([ids[i] for i in members], pad_id(tokenizer)).items()}
        mask = rule(batch["input_ids"], batch["attention_mask"])
        code = model.encode(model.model(**batch).last_hidden_state[mask]).to_csr()
        owner = mask.nonzero()[:, 0].cpu().numpy()
        blocks.append(sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))),
                                       shape=(len(members), len(owner))) @ code)
        order.extend(members)
    return sparse.csr_array(sparse.vstack(blocks, format="csr")[np.argsort(order)])


@torch.inference_mode()
def reward_states(model, tokenizer, conversations, *, max_length: int = 2048, batch_tokens: int = 2048) -> np.ndarray:
    """x_last float32 [n, d]: the hidden state at the reward position, before normalisation (what eq. 7 encodes)."""
    device = next(model.parameters()).device
    ids = truncate_left(tokenizer, encode_conversations(tokenizer, conversations), fit_length(model, max_length))
    states = np.zeros((len(ids), model.config.hidden_size), np.float32)
    for members in token_batches([len(one) for one in ids], batch_tokens):
        batch = {name: one.to(device) for name, one in collate([ids[i] for i in members], pad_id(tokenizer)).items()}
        states[members] = model(**batch).hidden.float().cpu().numpy()
    return states
