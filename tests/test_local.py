"""What a folder holds: by content, with reasons, and with a cure when something lacks."""

import json

import pytest

from sarmlib.data.local import discover
from sarmlib.errors import DataError
from tests.helpers import shared_path

PAIR = {"prompt": "Name a prime.", "chosen": "Seven.", "rejected": "Eight."}
RB2 = {"id": "1", "prompt": "How are you?", "chosen": ["a"], "rejected": ["b"], "num_correct": 1, "num_incorrect": 1,
       "total_completions": 2, "subset": "Safety"}
RMB = {"id": 1, "prompt": "Why?", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def folder(tmp_path):
    model = tmp_path / "some_model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "novel.txt").write_text("word " * 300)
    (tmp_path / "books" / "README").write_text("about the books")
    lines(tmp_path / "web.jsonl", {"text": "a page"})
    lines(tmp_path / "votes" / "x.jsonl", PAIR)
    lines(tmp_path / "bench" / "any_name.jsonl", RB2)
    (tmp_path / "bench2").mkdir()
    (tmp_path / "bench2" / "chat_filtered.json").write_text(json.dumps([RMB]))
    lines(tmp_path / "leak.jsonl", {**PAIR, "prompt": "How are you?"})
    lines(tmp_path / "qa.jsonl", {"question": "q", "answer": "a"})
    (tmp_path / "note.txt").write_text("short")
    (tmp_path / "x.bin").write_bytes(b"\0")
    return tmp_path


def test_everything_is_found_by_content(folder):
    found = discover(folder)
    assert found.backbone == folder / "some_model"
    assert found.corpora == [folder / "books", folder / "web.jsonl"]
    assert found.pairs == [folder / "votes" / "x.jsonl"]
    assert found.rewardbench2 == folder / "bench" / "any_name.jsonl" and found.rm_bench == folder / "bench2"
    reasons = {path.name: reason for path, reason in found.ignored}
    assert set(reasons) == {"README", "leak.jsonl", "qa.jsonl", "note.txt", "x.bin"}
    assert "benchmark" in reasons["leak.jsonl"] and "question, answer" in reasons["qa.jsonl"]
    assert "200 words" in reasons["note.txt"] and found.missing() == []


def test_loading_from_the_findings_keeps_benchmarks_out_of_training(folder):
    lines(folder / "votes" / "x.jsonl", PAIR, {**PAIR, "prompt": "why"})
    found = discover(folder)
    pairs = found.load_pairs()
    assert [p["prompt"][0]["content"] for p in pairs] == ["Name a prime."]
    assert pairs.report.dropped == {"prompt in a benchmark": 1}
    assert {name: len(rows) for name, rows in found.load_benchmarks().items()} == {"rewardbench2": 1, "rm_bench": 1}
    assert sorted(found.documents()) == sorted(["a page", ("word " * 300).strip()])


def test_what_lacks_is_named_with_its_cure(folder, tmp_path_factory):
    (folder / "some_model" / "model.safetensors").unlink()
    (folder / "votes" / "x.jsonl").unlink()
    with pytest.raises(DataError) as error:
        discover(folder)
    for words in ("lacks backbone, pairs", "tokenizer files", "chosen and rejected", "without *.safetensors"):
        assert words in str(error.value)
    assert "corpora" not in str(error.value).split("Left aside")[0]
    partly = discover(folder, require=("corpora",))
    assert partly.backbone is None and partly.missing() == ["backbone", "pairs"]
    with pytest.raises(DataError, match="does not exist"):
        discover(folder / "nowhere")
    with pytest.raises(DataError, match="lacks backbone, corpora, pairs, benchmark"):
        discover(tmp_path_factory.mktemp("empty"))


def test_second_models_and_benchmarks_are_listed(folder):
    other = folder / "z_model"
    other.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (other / name).write_text("{}")
    lines(folder / "z_bench.jsonl", RB2)
    ignored = {path.name: reason for path, reason in discover(folder).ignored}
    assert "some_model" in ignored["z_model"] and "any_name" in ignored["z_bench.jsonl"]


def test_unreadable_files_are_listed_not_fatal(folder):
    (folder / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    (folder / "broken.jsonl").write_text("{")
    (folder / "empty.jsonl").write_text("")
    ignored = {path.name: reason for path, reason in discover(folder).ignored}
    assert all("unreadable or empty" in ignored[n] for n in ("cut.jsonl.gz", "broken.jsonl", "empty.jsonl"))


def test_real_folder():
    root = shared_path("data/real")
    found = discover(root)
    assert found.backbone == root / "models" / "stories260K_hf"
    assert [p.name for p in found.corpora] == ["corpus_gutenberg_nltk", "corpus_openwebtext_1000", "corpus_wikitext2"]
    assert [p.parent.name for p in found.pairs] == ["hh_rlhf"] * 4 + ["rmb"] * 2
    assert found.rewardbench2.name == "best_of_4.jsonl" and found.rm_bench == root / "rm_bench"
    ignored = {str(p.relative_to(root)) for p, _ in found.ignored}
    assert {"rewardbench2_safety/train_safety.jsonl", "rmb/BoN_set.Helpfulness.jsonl.gz"} <= ignored
