"""Properties of both scorers on random rows: permutation, shift, scale, ties."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sarmlib.evaluation import rewardbench2, rm_bench

GRID = st.integers(-12, 12).map(lambda i: i / 4)  # exact in binary, so that shift and scale keep equal scores equal
SHIFT = st.sampled_from([-64.0, -0.5, 0.25, 3.0, 128.0])
SCALE = st.sampled_from([0.125, 0.5, 2.0, 64.0])
quick = settings(max_examples=60, deadline=None)


@st.composite
def best_of(draw, subset: str = "Math"):
    return {"subset": subset, "scores": draw(st.lists(GRID, min_size=2, max_size=6)), "num_correct": 1}


@st.composite
def couples(draw):
    out = []
    for number in range(draw(st.integers(1, 4))):
        for kind, correct in (("ref", 1), ("tied", draw(st.integers(2, 4)))):
            wrong = draw(st.integers(1, 3))
            out.append({"subset": "Ties", "id": f"{kind}:{number}", "num_correct": correct,
                        "scores": draw(st.lists(GRID, min_size=correct + wrong, max_size=correct + wrong))})
    return out


@st.composite
def rows(draw):
    found = draw(st.lists(best_of(), min_size=1, max_size=6)) + draw(st.lists(best_of("Focus"), max_size=4))
    return [{"id": str(i), **row} for i, row in enumerate(found)] + draw(couples())


@st.composite
def samples(draw):
    three = st.lists(GRID, min_size=3, max_size=3)
    names = ["chat", "math", "code", "safety-refuse",
             *draw(st.lists(st.sampled_from(["chat", "safety-response", "code"]), max_size=5))]
    return [{"id": i, "domain": name, "score_chosen": draw(three), "score_rejected": draw(three)}
            for i, name in enumerate(names)]


def rb2(found) -> dict:
    return rewardbench2.score(found)["subsets"]


def mapped(found, function, keys=("scores", "score_chosen", "score_rejected")):
    return [{name: [function(v) for v in value] if name in keys else value for name, value in row.items()}
            for row in found]


def close(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-9, nan_ok=True) for k in a)


@quick
@given(rows(), st.randoms(use_true_random=False))
def test_rewardbench2_ignores_the_order_of_rows_and_of_the_rejected(found, rng):
    other = copy.deepcopy(found)
    for row in other:
        n = row["num_correct"] if row["subset"] == "Ties" else 1
        correct, wrong = row["scores"][:n], row["scores"][n:]
        rng.shuffle(correct)
        rng.shuffle(wrong)
        row["scores"] = correct + wrong
    rng.shuffle(other)
    assert close(rb2(found), rb2(other))


@quick
@given(rows(), SHIFT, SCALE)
def test_rewardbench2_ignores_shift_and_positive_scale(found, shift, scale):
    """Ties too: gaps and spreads scale together.  Best of N ignores any rising function."""
    scores, cubed = rb2(found), rb2(mapped(found, lambda v: v**3 + v))
    assert close(scores, rb2(mapped(found, lambda v: scale * v + shift)))
    assert all(cubed[name] == pytest.approx(scores[name]) for name in scores if name != "Ties")
    assert all(0 <= value <= 1 for name, value in scores.items() if name != "Ties")
    assert -0.01 <= scores["Ties"] <= 1.01


@quick
@given(samples(), st.randoms(use_true_random=False), SHIFT, SCALE)
def test_rm_bench_ignores_order_shift_scale_and_rising_functions(found, rng, shift, scale):
    whole = rm_bench.score(found)
    shuffled = list(found)
    rng.shuffle(shuffled)
    for other in (shuffled, mapped(found, lambda v: scale * v + shift), mapped(found, lambda v: v**3 + v)):
        assert close(whole, rm_bench.score(other))


@quick
@given(samples())
def test_rm_bench_sides_and_ties(found):
    """Exchanging the sides turns wins into losses; what is missing to one are the exactly equal pairs."""
    def exchanged(row):
        return {**row, "score_chosen": row["score_rejected"], "score_rejected": row["score_chosen"]}
    equal = {}
    for name in rm_bench.DOMAINS:
        part = [row for row in found if row["domain"].startswith(name)]
        equal[name] = sum(c == r for row in part for c in row["score_chosen"] for r in row["score_rejected"])
        equal[name] /= 9 * len(part)
    one, two = rm_bench.score(found), rm_bench.score([exchanged(row) for row in found])
    for name in rm_bench.DOMAINS:
        assert one[name] + two[name] + equal[name] == pytest.approx(1.0, abs=1e-9)
