"""RM-Bench: golden cases of the official code, strictness, pooling, refusals (see test_scorer_properties)."""

import json

import numpy as np
import pytest

from sarmlib.errors import DataError
from sarmlib.evaluation import rm_bench
from tests.helpers import shared_path
from tests.test_rewardbench2 import assert_close


def sample(domain, chosen, rejected, id=0):
    return {"id": id, "score_chosen": list(chosen), "score_rejected": list(rejected)} | (
        {"domain": domain} if domain else {})


def random_samples(rng, n=10):
    names = ("chat", "math", "code", "safety-refuse", "safety-response")
    return [sample(d, rng.integers(-2, 4, 3) / 2, rng.integers(-3, 3, 3) / 2, i) for d in names for i in range(n)]


def test_golden_cases():
    cases = json.loads(shared_path("data/golden/rm_bench_cases.json").read_text())["cases"]
    assert cases
    for case in cases:
        samples = [{k: [float(v) for v in s[k]] if k.startswith("score") else s[k] for k in s} for s in case["samples"]]
        if "official_error" in case["expected"]:
            with pytest.raises(DataError):
                rm_bench.score(samples)
            continue
        before, result = json.dumps(samples), rm_bench.score(samples)
        assert_close(result, case["expected"]["official_output"], case["name"])
        cells = {name: m.tolist() for name, m in rm_bench.matrices(samples).items()}
        assert_close(cells, case["expected"]["matrix"], case["name"])
        assert_close(rm_bench.score_present(samples)["per_domain"], case["expected"]["per_domain"], case["name"])
        assert json.dumps(samples) == before, "the input was changed"


def test_matrix_orientation_and_strictness():
    # chosen: concise 1, plain 2, markdown 2; rejected: 0, 1, 2
    m = rm_bench.matrices([sample("chat", [1, 2, 2], [0, 1, 2])])["chat"]
    assert m.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    only = rm_bench.score([sample(None, [1, 2, 2], [0, 1, 2])])
    assert only == pytest.approx({"hard_acc": 0.0, "normal_acc": 2 / 3, "easy_acc": 1.0})


def test_missing_domain_is_reported_never_averaged_away():
    samples = [s for s in random_samples(np.random.default_rng(0)) if s["domain"] != "math"]
    with pytest.raises(DataError, match="math"):
        rm_bench.score(samples)
    part = rm_bench.score_present(samples)
    assert part["missing"] == ["math"] and part["math"] is None
    assert part["total_avg_acc"] is part["hard_acc"] is part["normal_acc"] is part["easy_acc"] is None
    assert part["safety"] == pytest.approx(np.mean(list(part["per_domain"]["safety"].values())))
    assert part["n_rows"] == {"chat": 10, "code": 10, "safety": 20}


def test_total_is_the_mean_of_domains_and_of_levels_and_units_average_to_it():
    samples = random_samples(np.random.default_rng(4))
    units, result = rm_bench.units(samples), rm_bench.score(samples)
    for name in rm_bench.DOMAINS:
        assert np.mean([v for d, _, v in units if d == name]) == pytest.approx(result[name])
    assert result["total_avg_acc"] == pytest.approx(np.mean([result[d] for d in rm_bench.DOMAINS]))
    assert result["total_avg_acc"] == pytest.approx(np.mean([result[k] for k in rm_bench.LEVELS]))


@pytest.mark.parametrize(("bad", "message"), [
    ([], "no samples"),
    ([sample("chat", [1, 2], [0, 0, 0])], "three numbers"),
    ([sample("chat", [1, 2, float("nan")], [0, 0, 0])], "three numbers"),
    ([sample("chat", ["a", "b", "c"], [0, 0, 0])], "three numbers"),
    ([{"id": 1, "domain": "chat", "score_chosen": [1, 2, 3]}], "score_rejected"),
    ([sample("chat", [1] * 3, [0] * 3), sample(None, [1] * 3, [0] * 3)], "to every sample or to none"),
    ([sample("poetry", [1] * 3, [0] * 3)], "no domain .poetry")])
def test_unusable_samples_are_refused(bad, message):
    with pytest.raises(DataError, match=message):
        rm_bench.score_present(bad)
