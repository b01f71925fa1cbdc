"""Statistics: against closed forms, other implementations, and coverage under known truth."""

import numpy as np
import pytest
from scipy import stats

from sarmlib.errors import DataError
from sarmlib.evaluation import statistics as S


def test_bootstrap_agrees_with_the_normal_interval_of_a_mean():
    x = (np.random.default_rng(0).random(800) < 0.7).astype(float)
    half = 1.96 * x.std() / np.sqrt(len(x))
    for method in ("BCa", "percentile"):
        ci = S.bootstrap_ci(x, n=4000, method=method)
        assert ci.estimate == pytest.approx(x.mean()) and ci.n == 800 and ci.method == method
        assert ci.low == pytest.approx(x.mean() - half, abs=0.005)
        assert ci.high == pytest.approx(x.mean() + half, abs=0.005)


def test_bootstrap_is_reproducible_and_changes_with_the_seed():
    x = np.random.default_rng(0).normal(size=60)
    assert S.bootstrap_ci(x, n=500, rng=1) == S.bootstrap_ci(x, n=500, rng=1) != S.bootstrap_ci(x, n=500, rng=2)


def test_clusters_widen_the_interval_as_their_number_says():
    prompts = np.random.default_rng(0).normal(size=50)
    x, clusters = np.repeat(prompts, 9), np.repeat(np.arange(50), 9)
    alone, together = S.bootstrap_ci(x, n=2000), S.bootstrap_ci(x, n=2000, clusters=clusters)
    assert together.n == 50
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(3, rel=0.12)
    order = np.random.default_rng(1).permutation(len(x))  # members of a cluster need not be neighbours
    other = S.bootstrap_ci(x[order], n=2000, clusters=clusters[order])
    assert other.high - other.low == pytest.approx(together.high - together.low, rel=0.1)


def test_strata_give_the_mean_of_subset_means():
    x = np.r_[np.tile([0.0, 1.0], 50), np.ones(20)]
    ci = S.bootstrap_ci(x, n=2000, strata=["a"] * 100 + ["b"] * 20)
    assert ci.estimate == 0.75
    assert (ci.high - ci.low) / 2 == pytest.approx(1.96 * 0.5 / np.sqrt(100) / 2, rel=0.1)


def test_other_statistics_and_constant_values():
    x = np.random.default_rng(0).normal(size=101)
    ci = S.bootstrap_ci(x, stat=np.median, n=500, clusters=np.arange(101))
    assert ci.low < ci.estimate == np.median(x) < ci.high
    same = S.bootstrap_ci(np.ones(8), n=100)
    assert (same.low, same.high, same.method) == (1, 1, "percentile")


def test_bootstrap_coverage_is_nominal():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        ci = S.bootstrap_ci(rng.exponential(size=60), n=400, rng=rng)
        hits += ci.low <= 1 <= ci.high
    assert 0.90 <= hits / 200 <= 0.985


def test_seeds_interval_is_the_t_interval():
    x = [0.91, 0.93, 0.90]
    ci = S.seeds_ci(x)
    expected = stats.t.interval(0.95, 2, np.mean(x), stats.sem(x))
    assert (ci.low, ci.high) == pytest.approx(expected)


@pytest.mark.parametrize(("n_seeds", "seed_sd", "prompt_sd"), [(3, 0.0, 0.3), (5, 0.1, 0.1), (3, 0.05, 0.2)])
def test_seeds_and_prompts_cover_new_seeds_and_new_prompts(n_seeds, seed_sd, prompt_sd):
    rng = np.random.default_rng(4)
    crossed = 0
    for _ in range(400):
        m = (rng.normal(0, seed_sd, (n_seeds, 1)) + rng.normal(0, prompt_sd, (1, 100))
             + rng.normal(0, 0.3, (n_seeds, 100)))
        ci = S.seeds_and_prompts_ci(m)
        crossed += ci.low <= 0 <= ci.high
    assert 0.90 <= crossed / 400 <= 0.985


def test_seeds_and_prompts_reduce_to_one_source():
    rng = np.random.default_rng(5)
    prompts = rng.normal(size=40)
    same_seeds = S.seeds_and_prompts_ci(np.tile(prompts, (4, 1)))
    assert (same_seeds.low, same_seeds.high) == pytest.approx(stats.t.interval(0.95, 39, prompts.mean(),
                                                                             stats.sem(prompts)))
    seeds = rng.normal(size=4)
    same_prompts = S.seeds_and_prompts_ci(np.tile(seeds[:, None], (1, 40)))
    assert (same_prompts.low, same_prompts.high) == pytest.approx(S.seeds_ci(seeds)[1:3])
    strata = np.repeat([0, 1], [30, 10])
    weighted = S.seeds_and_prompts_ci(rng.normal(size=(3, 40)) + strata, strata=strata)
    assert weighted.estimate == pytest.approx(0.5, abs=0.5)


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(6)
    shared, gain = rng.normal(0, 5, 200), 0.3
    a, b = shared + gain + rng.normal(0, 0.2, 200), shared + rng.normal(0, 0.2, 200)
    ci = S.paired_difference(a, b, n=1000)
    assert ci.low < gain < ci.high and ci.high - ci.low < 0.2
    both = S.paired_difference(np.stack([a, a + 0.01]), np.stack([b, b]))
    assert both.method == "t over seeds and prompts" and both.low < gain < both.high
    with pytest.raises(DataError, match="shape"):
        S.paired_difference(a, b[:-1])


def test_mcnemar_exact():
    assert S.mcnemar_exact(0, 0) == 1.0
    assert S.mcnemar_exact(8, 2) == pytest.approx(2 * sum(stats.binom.pmf(k, 10, 0.5) for k in range(3)))
    assert S.mcnemar_exact(8, 2) == S.mcnemar_exact(2, 8)
    with pytest.raises(DataError):
        S.mcnemar_exact(-1, 3)


def test_compare():
    a, b = np.r_[np.ones(60), np.zeros(40)], np.r_[np.ones(40), np.zeros(60)]
    result = S.compare(a, b, n=1000)
    assert (result["wins"], result["losses"], result["ties"]) == (20, 0, 80)
    assert result["p_mcnemar"] == pytest.approx(2 * 0.5**20) and result["verdict"] == "holds"
    assert S.compare(b, a, n=1000)["verdict"] == "does not hold here"
    assert S.compare(a * 0.5, b, n=1000)["p_mcnemar"] is None  # fractional credit
    assert S.compare(np.stack([a, a]), np.stack([b, b]))["p_mcnemar"] is None


def test_ranking_reliability():
    rng = np.random.default_rng(7)
    base = rng.random(400)
    clear = S.ranking_reliability({"low": base, "high": base + 0.2}, n=200)
    assert clear["order"] == ["high", "low"] and clear["p_first"] == {"low": 0, "high": 1}
    assert clear["p_order"] == {("high", "low"): 1} and clear["kendall_tau"] == 1
    equal = S.ranking_reliability({"a": base, "b": base[::-1].copy()}, n=400)
    assert 0.2 < equal["p_order"][tuple(equal["order"])] < 0.8
    twins = S.ranking_reliability({"a": base, "b": base}, n=50)
    assert twins["p_first"] == {"a": 0.5, "b": 0.5} and twins["p_order"][("a", "b")] == 0.5


def test_multiplicity_corrections():
    p = [0.01, 0.04, 0.03, 0.005]
    assert S.holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert S.benjamini_hochberg(p) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert S.holm([0.9, 0.8]) == pytest.approx([1, 1])
    for bad in ([0.1, 1.2], [0.1, float("nan")], []):
        with pytest.raises(DataError):
            S.holm(bad)


def test_auroc_counts_ties_half():
    assert S.auroc([1, 2], [0, 0]) == 1 and S.auroc([0], [1, 2]) == 0 and S.auroc([1, 1], [1]) == 0.5
    rng = np.random.default_rng(8)
    pos, neg = rng.integers(0, 5, 30), rng.integers(0, 4, 40)
    pairs = np.sign(pos[:, None] - neg[None, :])
    assert S.auroc(pos, neg) == pytest.approx((pairs + 1).mean() / 2)
    assert S.auroc(pos, neg) + S.auroc(neg, pos) == pytest.approx(1)
    with pytest.raises(DataError):
        S.auroc([], [1])


@pytest.mark.parametrize(("ci", "threshold", "direction", "expected"), [
    ((0.1, 0.3), 0, ">", "holds"), ((-0.3, -0.1), 0, ">", "does not hold here"), ((-0.1, 0.1), 0, ">", "undecided"),
    ((-0.3, -0.1), 0, "<", "holds"), ((0.1, 0.3), 0, "<", "does not hold here"), ((0, 0), 0, ">", "does not hold here"),
    ((0.0, 0.2), 0, ">", "undecided"), ((0.6, 0.7), 0.5, "greater", "holds"),
    (S.Interval(0.2, 0.1, 0.3, 0.95, "BCa", 9), 0, ">", "holds")])
def test_verdict(ci, threshold, direction, expected):
    assert S.verdict(ci, threshold, direction) == expected


@pytest.mark.parametrize("call", [
    lambda: S.bootstrap_ci([1, float("nan")]), lambda: S.bootstrap_ci([1.0]), lambda: S.bootstrap_ci([]),
    lambda: S.bootstrap_ci([1, 2], clusters=[0]), lambda: S.bootstrap_ci([1, 2], clusters=[0, 0]),
    lambda: S.bootstrap_ci([1, 2], method="magic"),
    lambda: S.bootstrap_ci([1, 2, 3, 4], np.median, strata=[0, 0, 1, 1]),
    lambda: S.seeds_ci([1.0]), lambda: S.seeds_and_prompts_ci(np.ones((1, 5))),
    lambda: S.verdict((float("nan"), 1)), lambda: S.verdict((1, 0)), lambda: S.verdict((0, 1), 0, "up")])
def test_unusable_input_is_refused(call):
    with pytest.raises(DataError):
        call()
