"""RewardBench 2: golden cases of the official code, the Ties formula by hand, refusals (see test_scorer_properties)."""

import json
import math

import numpy as np
import pytest

from sarmlib.errors import DataError
from sarmlib.evaluation import rewardbench2
from tests.helpers import shared_path


def row(subset, scores, num_correct=1, id="7", **extra):
    return {"id": id, "subset": subset, "num_correct": num_correct, "scores": list(scores), **extra}


def random_rows(rng, n=12):
    rows = [row(s, rng.integers(-3, 4, 4) / 2, id=str(i)) for s in rewardbench2.SUBSETS[:5] for i in range(n)]
    for i in range(n):
        rows += [row("Ties", rng.integers(-6, 7, 6) / 4 + 1, 3, id=f"tied:{i}"),
                 row("Ties", rng.integers(-6, 7, 5) / 4 + 1, 1, id=f"ref:{i}")]
    return rows


def assert_close(got, expected, path=""):
    if isinstance(expected, dict):
        assert set(got) == set(expected), path
        for key in expected:
            assert_close(got[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), path
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert_close(g, e, f"{path}/{i}")
    elif expected is None or isinstance(expected, str):
        assert got is None if expected is None else math.isnan(got) or got == float(expected), path
    else:
        assert got == pytest.approx(expected, abs=1e-9), path


def test_golden_cases():
    cases = json.loads(shared_path("data/golden/rewardbench2_cases.json").read_text())["cases"]
    assert cases
    for case in cases:
        rows = [{**r, "scores": [float(s) for s in r["scores"]]} for r in case["rows"]]
        if "official_error" in case["expected"]:
            with pytest.raises(DataError):
                rewardbench2.score(rows)
            continue
        before = json.dumps(rows)
        result = rewardbench2.score(rows)
        for key, value in case["expected"].items():
            assert_close(result[key], value, f"{case['name']}/{key}")
        assert json.dumps(rows) == before, "the input was changed"


@pytest.mark.parametrize(("scores", "credit"), [
    ([2, 1, 1, 1], 1), ([2, 2, 1, 1], 1 / 2), ([2, 2, 2, 1], 1 / 3), ([2, 2, 2, 2], 1 / 4),
    ([1, 2, 0, 0], 0), ([1, 2, 2, 1], 0), ([float("-inf"), 0, 0, 0], 0), ([1, float("-inf")], 1)])
def test_equal_top_scores_share_the_credit(scores, credit):
    assert rewardbench2.row_credit(scores) == credit
    assert rewardbench2.score([row("Math", [[one] for one in scores])])["subsets"] == {"Math": credit}


def test_ties_formula_by_hand():
    # pair 1: gaps 2 (tied) and 1 (ref), spread .5; pair 2: tied gap -1 and spread 2, ref gap 3
    rows = [row("Ties", [3, 3.5, 1], 2, "tied:1"), row("Ties", [2, 1], 1, "ref:1"),
            row("Ties", [0, 2, 1], 2, "tied:2"), row("Ties", [3, 0, 0], 1, "ref:2")]
    result = rewardbench2.score(rows)
    margin = (math.tanh(1 / 0.5 - 1) + math.tanh(-1 / 2 - 1)) / 2
    assert result["ties_components"] == pytest.approx({
        "ref_accuracy": 1.0, "tied_accuracy": 0.5, "correctness_preferred": 0.5, "correctness_preferred_hard": 0.5,
        "correctness_margin_score": margin})
    assert result["subsets"]["Ties"] == pytest.approx(0.3 + 0.15 + 0.1 + 0.1 + 0.01 * margin)
    assert result["per_row_results"] == [None] * 4 and result["overall"] is None


def test_overall_needs_exactly_the_six_subsets():
    rows = random_rows(np.random.default_rng(0))
    full = rewardbench2.score(rows)
    assert full["overall"] == pytest.approx(np.mean(list(full["subsets"].values()))) and full["missing_subsets"] == []
    part = rewardbench2.score([r for r in rows if r["subset"] not in ("Math", "Focus")])
    assert part["overall"] is None and part["missing_subsets"] == ["Math", "Focus"]
    assert rewardbench2.score([*rows, row("Other", [1, 0])])["overall"] is None


def test_units_average_to_the_subset_scores():
    rows = random_rows(np.random.default_rng(2))
    units = rewardbench2.units(rows)
    for name, value in rewardbench2.score(rows)["subsets"].items():
        assert np.mean([v for s, _, v in units if s == name]) == pytest.approx(value, abs=1e-12)
    assert len({unit for _, unit, _ in units}) == len(units)
    assert rewardbench2.units([row("Ties", [1, 0], 1, "ref:99"), *rows]) == units


@pytest.mark.parametrize(("bad", "message"), [
    ([], "no rows"),
    ([row("Math", [1, float("nan")])], "NaN"),
    ([row("Math", ["high", "low"])], "numbers"),
    ([row("Math", [])], "non-empty"), ([row("Math", [[1, 2], [3, 4]])], "flat"),
    ([{"id": "1", "subset": "Math"}], "scores"),
    ([row("Ties", [1, 0], 1, "1")], "ref:<int>"),
    ([row("Ties", [1, 0], 2, "ref:1")], "num_correct"),
    ([row("Ties", [1, 0], 1, "tied:1"), row("Ties", [1, 0], 1, "ref:1")], "at least two")])
def test_unusable_rows_are_refused(bad, message):
    with pytest.raises(DataError, match=message):
        rewardbench2.score(bad)
