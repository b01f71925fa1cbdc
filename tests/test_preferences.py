"""Preference pairs: every format, cleaning with counts, decontamination, splitting, the hub's failures."""

import gzip
import json
import time

import pytest

from sarmlib.data import files
from sarmlib.data.files import hub_rows
from sarmlib.data.preferences import drop_contaminated, load_pairs, normalise, pair_format, split_by_prompt, user_turns
from sarmlib.errors import ConfigError, DataError, OfflineError
from tests.helpers import shared_path

USER = {"role": "user", "content": "Name a prime."}
CHAT = {"chosen": [USER, {"role": "assistant", "content": "Seven."}],
        "rejected": [USER, {"role": "assistant", "content": "Eight."}], "source": "magpie"}
FORMATS = {
    "chat": CHAT,
    "chat, prompt apart": {"prompt": [USER], "chosen": CHAT["chosen"][1:], "rejected": CHAT["rejected"][1:]},
    "chat, prompt repeated": {"prompt": "Name a prime.", **CHAT},
    "chat, other names": {side: [{"from": "human", "value": "Name a prime."}, {"from": "gpt", "value": answer}]
                          for side, answer in (("chosen", "Seven."), ("rejected", "Eight."))},
    "texts": {"prompt": "Name a prime.", "chosen": "Seven.", "rejected": "Eight."},
    "hh": {"chosen": "\n\nHuman: Name a prime.\n\nAssistant: Seven.",
           "rejected": "\n\nHuman: Name a prime.\n\nAssistant: Eight."},
    "hh, prompt apart": {"prompt": "\n\nHuman: Name a prime.\n\nAssistant:", "chosen": "Seven.", "rejected": "Eight."},
    "rmb": {"conversation_input": [{**USER, "language": "English"}], "pair_uid": "3",
            "chosen": {"llm_name": "A", "answer": "Seven."}, "reject": {"llm_name": "B", "answer": "Eight."}},
    "own": {"id": "toy:1", "prompt": [USER], "chosen": "Seven.", "rejected": "Eight.", "meta": {"kind": "math"}},
}


def pair(prompt, i=0, chosen="yes", rejected="no"):
    return {"id": str(i), "prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected,
            "meta": {}}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pair(name):
    (got,) = load_pairs([FORMATS[name]])
    assert (got["prompt"], got["chosen"], got["rejected"]) == ([USER], "Seven.", "Eight.")
    assert set(got) == {"id", "prompt", "chosen", "rejected", "meta"} and isinstance(got["id"], str)
    assert pair_format(FORMATS[name])


def test_meta_keeps_short_fields_and_own_pairs_survive_a_round_trip():
    (chat,), (rmb,), (own,) = (load_pairs([FORMATS[n]]) for n in ("chat", "rmb", "own"))
    assert chat["meta"]["source"] == "magpie" and chat["meta"]["row"] == 1
    assert rmb["meta"]["chosen_model"] == "A" and rmb["meta"]["pair_uid"] == "3"
    assert own == {**FORMATS["own"]} and load_pairs([own])[0] == own


def test_hh_dialogues_have_turns():
    head = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: One\n\nHuman: Two\n\nAssistant: "
    (got,) = load_pairs([{"chosen": head + " Good.\n\nStill good.", "rejected": head + "Bad."}])
    assert got["prompt"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
                             {"role": "user", "content": "One\n\nTwo"}]
    assert got["chosen"] == "Good.\n\nStill good."


def test_unwanted_pairs_are_dropped_and_counted():
    hh = "\n\nHuman: {}\n\nAssistant: {}"
    rows = [FORMATS["texts"], {"prompt": "q", "chosen": "same", "rejected": "same "},
            {"prompt": "q", "chosen": "a", "rejected": ""}, {"prompt": " ", "chosen": "a", "rejected": "b"},
            {"chosen": hh.format("a", "b"), "rejected": hh.format("c", "d")},
            {"chosen": hh.format("a", "b"), "rejected": hh.format("a", "b") + "\n\nHuman: more"}]
    pairs = load_pairs(rows)
    assert len(pairs) == 1 and (pairs.report.read, pairs.report.kept) == (6, 1)
    assert pairs.report.dropped == {
        "chosen equals rejected": 1, "empty answer or question": 2, "dialogues differ before the last answer": 1,
        "dialogue does not end with an answer": 1}


@pytest.mark.parametrize(("bad", "words"), [
    ({"prompt": "q", "chosen": "a"}, ["not a preference pair", "prompt, chosen"]),
    ({"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]}, ["not a preference pair"]),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, ["'prompt'", "3"]),
    ({"chosen": [{"role": "robot", "content": "x"}], "rejected": [USER]}, ["'chosen'", "turn 0", "robot"]),
    ({"conversation_input": [USER], "chosen": {"answer": "a"}, "reject": {}}, ["'answer'", "missing"]),
    ({"prompt": [USER, {"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"}, ["user turn"]),
    ("just text", ["str"])])
def test_bad_rows_name_file_row_and_field(tmp_path, bad, words):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(FORMATS["texts"]) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(DataError) as error:
        load_pairs(path)
    for word in ["pairs.jsonl, row 2", "on_bad='skip'", *words]:
        assert word in str(error.value)
    pairs = load_pairs(path, on_bad="skip")
    assert len(pairs) == 1 and pairs.report.dropped == {"bad row": 1} and "row 2" in pairs.report.examples[0]


def test_files_of_every_kind(tmp_path):
    rows = [FORMATS["texts"], {"prompt": "Ünï\u2028code?", "chosen": "a", "rejected": "b"}]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.json").write_text(lines, encoding="utf-8")
    import pandas as pd
    pd.DataFrame(rows).to_parquet(tmp_path / "e.parquet")
    results = [load_pairs(p) for p in sorted(tmp_path.iterdir())]
    assert len(results) == 5
    assert all([user_turns(p) for p in r] == [["Name a prime."], ["Ünï\u2028code?"]] for r in results)
    together = load_pairs(sorted(tmp_path.iterdir()), limit=1)
    assert len(together) == together.report.kept == 5 and len({p["id"] for p in together}) == 5
    assert together.report.read == 10


def test_damaged_and_absent_files(tmp_path):
    whole = gzip.compress(json.dumps(FORMATS["texts"]).encode() * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.jsonl").write_text(json.dumps(FORMATS["texts"]) + '\n{"prompt": "q", "cho')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "one.json").write_text('{\n"a": 1\n}')
    (tmp_path / "x.csv").write_text("a,b")
    for name, word in {"cut.jsonl.gz": "damaged", "broken.jsonl": "row 2: is not JSON", "bad.parquet": "cannot be read",
                       "empty.jsonl": "no usable row", "one.json": "list of rows", "x.csv": "unknown kind",
                       "absent.jsonl": "no such file"}.items():
        with pytest.raises(DataError, match=word):
            load_pairs(tmp_path / name)
    with pytest.raises(ConfigError):
        load_pairs([CHAT], on_bad="ignore")


def test_contaminated_prompts_are_dropped_exactly_and_nearly():
    long = "Please write a short poem about the quiet river that runs behind my grandmother's old wooden house in May"
    benchmark = ["What is  the CAPITAL of France?", long]
    pairs = [pair("what is the capital of france", 0), pair("What is the capital of Spain?", 1),
             pair("Hello. " + long.replace("May", "June") + " Make it rhyme, and keep it under ten lines.", 2),
             pair("Please write a short poem about the sea", 3),
             {**pair("", 4), "prompt": [{"role": "user", "content": long}, {"role": "assistant", "content": "x"},
                                        {"role": "user", "content": "And now?"}]}]
    kept = drop_contaminated(pairs, benchmark)
    assert [p["id"] for p in kept] == ["1", "3"]
    assert kept.report.dropped == {"prompt in a benchmark": 2, "prompt nearly in a benchmark": 1}
    assert (kept.report.read, kept.report.kept) == (5, 2)
    assert [p["id"] for p in drop_contaminated(pairs, [])] == ["0", "1", "2", "3", "4"]
    assert "2" in [p["id"] for p in drop_contaminated(pairs, benchmark, threshold=1.0)]
    with pytest.raises(ConfigError):
        drop_contaminated(pairs, benchmark, threshold=0)


def test_report_runs_from_file_to_training_set():
    pairs = load_pairs([FORMATS["texts"], {"prompt": "q", "chosen": "a", "rejected": "a"}])
    kept = drop_contaminated(pairs, ["name a prime"])
    assert not kept and kept.report.read == 2 and kept.report.kept == 0
    assert kept.report.dropped == {"chosen equals rejected": 1, "prompt in a benchmark": 1}


def test_decontamination_is_fast():
    words = [f"w{i}" for i in range(5000)]
    benchmark = [" ".join(words[i: i + 60]) for i in range(3000)]
    pairs = [pair(" ".join(words[-i - 300: -i - 1][::-1]), i) for i in range(2000)]
    start = time.perf_counter()
    assert len(drop_contaminated(pairs, benchmark)) == 2000
    assert time.perf_counter() - start < 10


def test_split_keeps_prompts_whole_and_ignores_order():
    pairs = [pair(f"Question {i % 300}?", i) for i in range(900)]
    train, held = split_by_prompt(pairs, 0.2, seed=1)
    assert not {normalise(user_turns(p)[0]) for p in train} & {normalise(user_turns(p)[0]) for p in held}
    assert len(train) + len(held) == 900 and 0.12 < len(held) / 900 < 0.28
    again = split_by_prompt(pairs[::-1], 0.2, seed=1)[1]
    assert {p["id"] for p in again} == {p["id"] for p in held}
    assert {p["id"] for p in split_by_prompt(pairs, 0.2, seed=2)[1]} != {p["id"] for p in held}
    variants = split_by_prompt([*pairs, pair("question 0", -1)], 0.2, seed=1)
    side = [any(p["id"] == "-1" for p in s) for s in variants]
    assert side == [any(p["id"] == "0" for p in s) for s in variants]  # case and punctuation do not part twins
    with pytest.raises(DataError, match="side empty"):
        split_by_prompt(pairs[:1])
    with pytest.raises(ConfigError):
        split_by_prompt(pairs, 1.5)


def test_hub_needs_a_pinned_commit_and_fails_fast_offline(monkeypatch):
    for revision in (None, "main", "7ff0885"):
        with pytest.raises(ConfigError, match="40-digit"):
            load_pairs("hub:owner/name", revision=revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(files, "_probe", lambda repo, revision: ConnectionError("no route"))
    with pytest.raises(OfflineError, match="'owner/name'.*local file"):
        load_pairs("hub:owner/name", revision="a" * 40)
    monkeypatch.setattr(files, "_probe", lambda repo, revision: time.sleep(5))
    start = time.perf_counter()
    with pytest.raises(OfflineError, match="no answer|TimeoutError"):
        hub_rows("owner/name", "a" * 40, timeout=0.2)
    assert time.perf_counter() - start < 2


def test_hub_refusal_is_not_called_offline(monkeypatch):
    class Refused(OSError):
        response = type("Response", (), {"status_code": 404})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(files, "_probe", lambda repo, revision: Refused())
    with pytest.raises(DataError, match="status 404"):
        hub_rows("owner/name", "a" * 40)


def test_hub_rows_pass_revision_and_split(monkeypatch):
    import sys
    import types
    asked = {}

    def load_dataset(repo, **kwargs):
        asked.update(repo=repo, **kwargs)
        return [FORMATS["chat"]]
    monkeypatch.setattr(files, "_probe", lambda repo, revision: None)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (got,) = load_pairs("hub:Skywork/Name", revision="b" * 40, split="train")
    assert got["id"] == "Skywork/Name:1"
    assert asked == {"repo": "Skywork/Name", "revision": "b" * 40, "split": "train"}


@pytest.mark.parametrize(("name", "kept", "read"), [
    ("hh_rlhf/harmless-base.test.jsonl.gz", 2308, 2312), ("hh_rlhf/helpful-base.test.jsonl.gz", 2348, 2354),
    ("hh_rlhf/helpful-online.test.jsonl.gz", 1130, 1137), ("rmb/Pairwise_set.Helpfulness.jsonl.gz", 8444, 8456)])
def test_real_files(name, kept, read):
    pairs = load_pairs(shared_path(f"data/real/{name}"))
    assert (len(pairs), pairs.report.read) == (kept, read)
    assert sum(pairs.report.dropped.values()) == read - kept
    assert len({p["id"] for p in pairs}) == kept
    assert all(p["prompt"][-1]["role"] == "user" and p["chosen"] != p["rejected"] for p in pairs)
