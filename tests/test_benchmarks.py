"""Benchmark loaders: real schemas, missing parts reported, bad rows named."""

import json

import pytest

from sarmlib.data import files
from sarmlib.data.benchmarks import REWARDBENCH2_ROWS, benchmark_prompts, load_rewardbench2, load_rm_bench
from sarmlib.errors import ConfigError, DataError, OfflineError
from tests.helpers import shared_path

RB2 = {"id": 1, "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "num_correct": 1, "num_incorrect": 3,
       "total_completions": 4, "subset": "Math", "models": ["m"]}
RMB = {"id": 1, "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}


def write(path, rows):
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_rewardbench2_rows_are_completed_and_kept_whole(tmp_path):
    import pandas as pd
    bare = {k: RB2[k] for k in ("id", "prompt", "chosen", "rejected", "subset")}
    expected = {**bare, "id": "1", "num_correct": 1, "num_incorrect": 3, "total_completions": 4}
    pd.DataFrame([bare]).to_parquet(tmp_path / "a.parquet")
    for path in (write(tmp_path / "a.jsonl", [bare]), write(tmp_path / "a.json", [bare]), tmp_path / "a.parquet"):
        assert list(load_rewardbench2(path)) == [expected]
    source = [dict(RB2)]
    (row,) = load_rewardbench2(source)
    assert row["models"] == ["m"] and source == [RB2]


def test_missing_subsets_short_subsets_and_unpaired_ties_are_reported():
    ties = {**RB2, "id": "tied:4", "subset": "Ties", "chosen": ["a", "b"], "rejected": ["c"], "num_correct": 2,
            "num_incorrect": 1, "total_completions": 3}
    notes = " | ".join(load_rewardbench2([RB2, ties, {**RB2, "subset": "Poetry"}]).report.notes)
    assert "missing: Factuality, Precise IF, Safety, Focus" in notes
    assert f"Math: 1 rows, the published benchmark has {REWARDBENCH2_ROWS['Math']}" in notes
    assert "unknown to the benchmark: Poetry" in notes and "partner (ref/tied): 4" in notes
    assert sum(REWARDBENCH2_ROWS.values()) == 1865


@pytest.mark.parametrize(("change", "field"), [
    ({"prompt": ""}, "prompt"), ({"prompt": None}, "prompt"), ({"chosen": "a"}, "chosen"), ({"chosen": []}, "chosen"),
    ({"rejected": ["b", 3]}, "rejected"), ({"num_correct": 2}, "num_correct"), ({"num_incorrect": 1}, "num_incorrect"),
    ({"total_completions": 5}, "total_completions"), ({"subset": 4}, "subset"), ({"id": None}, "id"),
    ({"subset": "Ties", "id": "17"}, "id")])
def test_bad_rewardbench2_rows_name_file_row_and_field(tmp_path, change, field):
    path = write(tmp_path / "rb2.jsonl", [RB2, {**RB2, **change}])
    with pytest.raises(DataError, match=rf"rb2\.jsonl, row 2: field '{field}'"):
        load_rewardbench2(path)
    rows = load_rewardbench2(path, on_bad="skip")
    assert len(rows) == 1 and rows.report.dropped == {"bad row": 1}


def test_rm_bench_domain_comes_from_row_file_name_or_argument(tmp_path):
    write(tmp_path / "chat_filtered.json", [RMB])
    write(tmp_path / "safety-refuse_filtered.json", [RMB, {**RMB, "id": 2}])
    rows = load_rm_bench(tmp_path)
    assert [r["domain"] for r in rows] == ["chat", "safety-refuse", "safety-refuse"]
    assert rows.report.read == rows.report.kept == 3 and "domain missing: math, code" in rows.report.notes
    assert load_rm_bench(tmp_path / "chat_filtered.json")[0]["domain"] == "chat"
    other = write(tmp_path / "mine.jsonl", [RMB])
    with pytest.raises(DataError, match="'domain'"):
        load_rm_bench(other)
    assert load_rm_bench(other, domain="code")[0]["domain"] == "code"
    write(tmp_path / "total_dataset.json", [{**RMB, "domain": "math"}])
    total = load_rm_bench(tmp_path)
    assert [r["domain"] for r in total] == ["math"] and any("total_dataset" in n for n in total.report.notes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no RM-Bench file"):
        load_rm_bench(tmp_path / "empty")


@pytest.mark.parametrize(("change", "field"), [
    ({"chosen": ["a", "b"]}, "chosen"), ({"rejected": "text"}, "rejected"), ({"prompt": 1}, "prompt"),
    ({"id": None}, "id"), ({"domain": 3}, "domain")])
def test_bad_rm_bench_rows_are_named(tmp_path, change, field):
    path = write(tmp_path / "chat_filtered.json", [RMB, {**RMB, **change}])
    with pytest.raises(DataError, match=rf"chat_filtered\.json, row 2: field '{field}'"):
        load_rm_bench(path)


def test_prompts_are_distinct_and_in_order():
    assert benchmark_prompts([{"prompt": "b"}, {"prompt": "a"}], None, [{"prompt": "b"}]) == ["b", "a"]


def test_hub_defaults_are_pinned(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked = []

    def probe(repo, revision):
        asked.append((repo, revision))
        return ConnectionError()
    monkeypatch.setattr(files, "_probe", probe)
    with pytest.raises(OfflineError, match="reward-bench-2"):
        load_rewardbench2()
    assert asked == [("allenai/reward-bench-2", "7ff08853b0d5686e79b13fda8677024f566a104a")]
    with pytest.raises(ConfigError, match="RM-Bench"):
        load_rm_bench()


def test_real_files():
    rows = load_rewardbench2(shared_path("data/real/rewardbench2_safety/best_of_4.jsonl"))
    assert len(rows) == 450 and len(rows.report.notes) == 1 and "missing" in rows.report.notes[0]
    samples = load_rm_bench(shared_path("data/real/rm_bench"))
    counts = {d: sum(r["domain"] == d for r in samples) for d in {r["domain"] for r in samples}}
    assert counts == {"chat": 129, "code": 228, "safety-refuse": 284, "safety-response": 157}
    assert samples.report.notes == ["domain missing: math"]
