"""Benchmark loaders: real schemas, bad rows named."""

import json

import pandas as pd
import pytest

from sarmlib.data.benchmarks import load_rewardbench2, load_rm_bench
from sarmlib.errors import ConfigError, DataError, OfflineError
from tests.helpers import shared_path

RB2 = {"id": 1, "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math", "models": ["m"]}
RMB = {"id": 1, "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "code"}


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def test_rewardbench2_rows_are_completed_and_kept_whole(tmp_path):
    expected = {**RB2, "id": "1", "num_correct": 1}
    pd.DataFrame([RB2]).to_parquet(tmp_path / "a.parquet")
    for source in (write(tmp_path / "a.json", [RB2]), tmp_path / "a.parquet", [RB2], [expected]):
        assert list(load_rewardbench2(source)) == [expected]


@pytest.mark.parametrize(("load", "good", "change", "field"), [
    *((load_rewardbench2, RB2, change, field) for change, field in (
        ({"prompt": ""}, "prompt"), ({"prompt": None}, "prompt"), ({"chosen": "a"}, "chosen"),
        ({"chosen": []}, "chosen"), ({"rejected": ["b", 3]}, "rejected"), ({"num_correct": 2}, "num_correct"),
        ({"subset": 4}, "subset"), ({"id": None}, "id"),
        ({"subset": "Ties", "id": "17"}, "id"))),
    *((load_rm_bench, RMB, change, field) for change, field in (
        ({"chosen": ["a", "b"]}, "chosen"), ({"rejected": "text"}, "rejected"), ({"prompt": 1}, "prompt"),
        ({"id": True}, "id"), ({"domain": 3}, "domain"), ({"domain": None}, "domain")))])
def test_bad_rows_name_file_row_and_field(tmp_path, load, good, change, field):
    path = write(tmp_path / "rows.json", [good, {**good, **change}])
    with pytest.raises(DataError, match=rf"rows\.json, row 2: field '{field}'"):
        load(path)


def test_rm_bench_domain_comes_from_row_or_file_name(tmp_path):
    bare = {**RMB, "domain": None}
    write(tmp_path / "chat_filtered.json", [bare])
    write(tmp_path / "safety-refuse_filtered.json", [bare, {**bare, "id": 2}])
    assert [r["domain"] for r in load_rm_bench(tmp_path)] == ["chat", "safety-refuse", "safety-refuse"]
    write(tmp_path / "total_dataset.json", [{**RMB, "domain": "math"}])
    assert [r["domain"] for r in load_rm_bench(tmp_path)] == ["math"]


def test_hub_commits_are_pinned(monkeypatch):
    asked = []

    def check_access(repo, revision, repo_type):
        asked.append((repo, revision, repo_type))
        raise OfflineError(repo)

    monkeypatch.setattr("sarmlib.data.rows.check_access", check_access)
    with pytest.raises(OfflineError, match="reward-bench-2"):
        load_rewardbench2()
    assert asked == [("allenai/reward-bench-2", "7ff08853b0d5686e79b13fda8677024f566a104a", "dataset")]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="RM-Bench"):
        load_rm_bench("hub:THU-KEG/RM-Bench")


def test_real_files():
    assert len(load_rewardbench2(shared_path("data/real/rewardbench2_safety/best_of_4.jsonl"))) == 450
    domains = [row["domain"] for row in load_rm_bench(shared_path("data/real/rm_bench"))]
    assert {d: domains.count(d) for d in set(domains)} == {"chat": 129, "code": 228, "safety-refuse": 284,
                                                           "safety-response": 157}
