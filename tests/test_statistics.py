"""Statistics: against closed forms, other implementations, and coverage under known truth."""

import numpy as np
import pytest
import torch
from scipy import stats

from sarmlib.errors import DataError
from sarmlib.evaluation import rewardbench2
from sarmlib.evaluation import statistics as S
from sarmlib.evaluation.scorer import summary


def test_bootstrap_agrees_with_the_normal_interval_of_a_mean():
    x = (np.random.default_rng(0).random(800) < 0.7).astype(float)
    half, ci = 1.96 * x.std() / np.sqrt(len(x)), S.bootstrap_ci(x, n=4000)
    assert ci.estimate == pytest.approx(x.mean()) and ci.n == 800 and ci.method == "BCa"
    assert (ci.low, ci.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.005)
    assert S.bootstrap_ci(x, n=4000) == ci


@pytest.mark.parametrize("ci, mean", [
    (lambda: S.seeds_ci([0.9, 0.9]), 0.9), (lambda: S.seeds_ci([0.3, 0.1 + 0.2, 0.3]), 0.3),
    (lambda: S.bootstrap_ci(np.full(8, 0.5), n=100), 0.5),
    (lambda: S.bootstrap_ci([0.5, 0.5, 2, 2], strata=[0, 0, 1, 1]), 1.25),
    (lambda: S.seeds_and_prompts_ci(np.full((3, 40), 0.1)), 0.1),
    (lambda: S.seeds_and_prompts_ci([[1, 0], [0, 1]]), 0.5),
    (lambda: S.seeds_and_prompts_ci(np.zeros((3, 40)) - 1), -1)])
def test_values_without_spread_decide_nothing(ci, mean):
    ci = ci()
    assert ci.estimate == pytest.approx(mean) and (ci.low, ci.high) == (-np.inf, np.inf)
    assert S.verdict(ci, mean - 1) == S.verdict(ci, mean, "<") == S.UNDECIDED


def test_a_benchmark_of_equal_scores_gets_no_interval():
    rows = [{"subset": name, "id": str(i)} for name in rewardbench2.SUBSETS[:-1] for i in range(4)]
    rows += [{"subset": "Ties", "id": f"{kind}:{i}", "num_correct": 2} for kind in ("ref", "tied") for i in range(4)]
    found = summary("rewardbench2", rows, [[1.0] * 4] * len(rows))
    assert found["score"] is not None and found["interval"] is None


def test_of_shares_alone_are_zeros_and_ones_exact():
    for sure, n in ((S.bootstrap_ci(np.ones(150)), 150), (S.seeds_and_prompts_ci(np.ones((3, 150))), 150),
                    (few := S.bootstrap_ci(np.ones(5)), 5)):
        assert sure.method == "exact" and sure.high == 1 and sure.low == pytest.approx(0.025 ** (1 / n))
    assert S.verdict(few, 0.5) == S.UNDECIDED
    gaps = np.r_[1.0, np.zeros(49)]
    assert S.verdict(S.seeds_and_prompts_ci(np.zeros((2, 9)), shares=False), direction="<") == S.UNDECIDED
    assert S.verdict(S.bootstrap_ci(gaps, n=500, shares=False)) == S.UNDECIDED  # one prompt is no evidence
    assert S.verdict(S.bootstrap_ci(0 * gaps, shares=False), direction="<") == S.UNDECIDED


@pytest.mark.parametrize("p, n", [(0.95, 50), (0.98, 50), (0.9, 20), (0.7, 50)])
def test_few_zeros_and_ones_get_an_exact_interval_that_covers(p, n):
    covered = 0.0
    for wins in range(n + 1):
        ci = S.bootstrap_ci(np.r_[np.ones(wins), np.zeros(n - wins)])
        covered += stats.binom.pmf(wins, n, p) * (ci.low - 1e-9 <= p <= ci.high + 1e-9)
    assert covered >= 0.95


def test_strata_give_the_mean_of_subset_means():
    x, strata = np.r_[np.tile([0.0, 2.0], 50), np.full(20, 2.0)], ["a"] * 100 + ["b"] * 20
    ci = S.bootstrap_ci(x, n=2000, strata=strata)
    assert ci.estimate == 1.5 == pytest.approx(S.seeds_and_prompts_ci(np.tile(x, (2, 1)), strata=strata).estimate)
    assert (ci.high - ci.low) / 2 == pytest.approx(1.96 / np.sqrt(100) / 2, rel=0.1)
    exact = S.bootstrap_ci(x / 2, strata=strata)
    assert exact.estimate == 0.75 and exact.method == "exact" and 0.6 < exact.low < 0.7 and 0.79 < exact.high < 0.81


def crossed(n_seeds, seed_sd, prompt_sd):
    return lambda rng: S.seeds_and_prompts_ci(
        rng.normal(0, seed_sd, (n_seeds, 1)) + rng.normal(0, prompt_sd, (1, 100)) + rng.normal(0, 0.3, (n_seeds, 100)))


@pytest.mark.parametrize("draw", [
    lambda rng: S.bootstrap_ci(rng.exponential(size=60) - 1, n=400),
    crossed(3, 0.0, 0.3), crossed(5, 0.1, 0.1), crossed(3, 0.05, 0.2)])
def test_intervals_cover_new_seeds_and_new_prompts(draw):
    rng = np.random.default_rng(4)
    covered = [ci.low <= 0 <= ci.high for ci in (draw(rng) for _ in range(400))]
    assert 0.90 <= np.mean(covered) <= 0.985


def test_seeds_and_prompts_reduce_to_one_source():
    rng = np.random.default_rng(5)
    prompts = rng.normal(size=40)
    same_seeds = S.seeds_and_prompts_ci(np.tile(prompts, (4, 1)))
    assert (same_seeds.low, same_seeds.high) == pytest.approx(stats.t.interval(0.95, 39, prompts.mean(),
                                                                             stats.sem(prompts)))
    seeds = rng.normal(size=4)
    same_prompts = S.seeds_and_prompts_ci(np.tile(seeds[:, None], (1, 40)))
    assert (same_prompts.low, same_prompts.high) == pytest.approx(S.seeds_ci(seeds)[1:3])
    assert S.seeds_ci(seeds)[1:3] == pytest.approx(stats.t.interval(0.95, 3, seeds.mean(), stats.sem(seeds)))


def test_holms_p_values_and_decoders_held_near_their_start():
    from benchmarks.table2 import hold, holm
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    first, columns = (torch.nn.functional.normalize(torch.randn(2, 50, 16), dim=-1))
    for least in (1.0, 0.8):
        held = columns.clone() * 3
        hold(held, first, least)
        assert held.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
        assert (held * first).sum(1).min() >= least - 1e-5


def test_auroc_counts_ties_half():
    rng = np.random.default_rng(8)
    pos, neg = rng.integers(0, 5, 30), rng.integers(0, 4, 40)
    pairs = np.sign(pos[:, None] - neg[None, :])
    assert S.auroc(pos, neg) == pytest.approx((pairs + 1).mean() / 2)


@pytest.mark.parametrize(("ci", "threshold", "direction", "expected"), [
    ((0.1, 0.3), 0, ">", "holds"), ((-0.3, -0.1), 0, ">", "does not hold here"), ((-0.1, 0.1), 0, ">", "undecided"),
    ((-0.3, -0.1), 0, "<", "holds"), ((0.1, 0.3), 0, "<", "does not hold here"), ((0, 0), 0, ">", "does not hold here"),
    ((0.0, 0.2), 0, ">", "undecided"), ((0.6, 0.7), 0.5, ">", "holds"),
    (S.Interval(0.2, 0.1, 0.3, 0.95, "BCa", 9), 0, ">", "holds")])
def test_verdict(ci, threshold, direction, expected):
    assert S.verdict(ci, threshold, direction) == expected


@pytest.mark.parametrize("call", [
    lambda: S.bootstrap_ci([1, float("nan")]), lambda: S.bootstrap_ci([1.0]), lambda: S.bootstrap_ci([]),
    lambda: S.bootstrap_ci([1, 2], strata=[0, 1]), lambda: S.auroc([], [1]),
    lambda: S.seeds_ci([1.0]), lambda: S.seeds_and_prompts_ci(np.ones((1, 5))),
    lambda: S.verdict((float("nan"), 1)), lambda: S.verdict((1, 0))])
def test_unusable_input_is_refused(call):
    with pytest.raises(DataError):
        call()
