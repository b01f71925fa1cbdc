"""Preference pairs, rows to be scored and benchmarks: formats, cleaning with counts, decontamination, splitting."""

import json
from unittest.mock import Mock

import pytest

from sarmlib.data.benchmarks import load_rewardbench2, load_rm_bench
from sarmlib.data.pairs import drop_contaminated, drop_identical, load_conversations, load_pairs, split_by_prompt
from sarmlib.data.text import iter_texts
from sarmlib.errors import ConfigError, DataError
from tests.helpers import shared_path
from tests.tiny import conversation, tiny_tokenizer

USER = {"role": "user", "content": "Name a prime."}
CHAT = {"chosen": [USER, {"role": "assistant", "content": "Seven."}],
        "rejected": [USER, {"role": "assistant", "content": "Eight."}], "source": "magpie"}
FORMATS = {
    "chat": CHAT,
    "chat, prompt apart": {"prompt": [USER], "chosen": CHAT["chosen"][1:], "rejected": CHAT["rejected"][1:]},
    "chat, prompt repeated": {"prompt": "Name a prime.", **CHAT},
    "texts": {"prompt": "Name a prime.", "chosen": "Seven.", "rejected": "Eight."},
    "texts, messages": {"prompt": [USER], "chosen": "Seven.", "rejected": "Eight."},
    "hh": {"chosen": "\n\nHuman: Name a prime.\n\nAssistant: Seven.",
           "rejected": "\n\nHuman: Name a prime.\n\nAssistant: Eight."},
    "rmb": {"conversation_input": [{**USER, "language": "English"}], "pair_uid": "3",
            "chosen": {"llm_name": "A", "answer": "Seven."}, "reject": {"llm_name": "B", "answer": "Eight."}},
    "table": {**CHAT, "conversation_input": None, "prompt": None},
}
RB2 = {"id": 1, "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math", "models": ["m"]}
RMB = {"id": 1, "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "code"}


def pair(prompt, i=0, chosen="yes", rejected="no"):
    return {"id": str(i), "prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pair(name):
    (got,) = load_pairs([FORMATS[name]])
    assert got == {"id": "rows:1", "prompt": [USER], "chosen": "Seven.", "rejected": "Eight."}
    (item,) = load_conversations([FORMATS[name]])
    assert item.is_pair and item.conversations["chosen"] == CHAT["chosen"]
    assert load_pairs([got]) == [got]


def test_hh_dialogues_have_turns():
    head = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: One\n\nHuman: Two\n\nAssistant: "
    (got,) = load_pairs([{"chosen": head + " Good.\n\nStill good.", "rejected": head + "Bad."}])
    assert got["prompt"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
                             {"role": "user", "content": "One\n\nTwo"}]
    assert got["chosen"] == "Good.\n\nStill good."


def test_unwanted_pairs_are_dropped_counted_and_told():
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
    assert {"kept 1 of 6 rows", "left out 2: empty answer or question"} < set(pairs.report.lines())
    kept = drop_contaminated(pairs, ["name a prime"]).report  # the report goes on
    assert (kept.read, kept.kept, kept.dropped) == (6, 0, pairs.report.dropped | {"prompt in a benchmark": 1})
    with pytest.raises(DataError, match="no usable row.*left out 1: chosen equals"):
        load_pairs(rows[1:2])


def test_pairs_of_a_folder_have_ids_of_their_own(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(2 * (json.dumps(CHAT) + "\n"))
    pairs = load_pairs(tmp_path)
    assert [p["id"] for p in pairs] == [f"{tmp_path.name}/{name}.jsonl:{n}" for name in "ab" for n in (1, 2)]
    assert pairs.report.read == pairs.report.kept == 4


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


def test_answers_that_are_the_same_tokens_are_dropped():
    tokenizer, end = tiny_tokenizer(), " w9" * 10
    pairs = [pair("w1", 0, "w2", "w3"), pair("w1", 1, "w2", "w2  "), pair("w1", 2, "w5" + end, "w6" + end)]
    assert [p["id"] for p in drop_identical(pairs, tokenizer, 64)] == ["0", "2"]
    kept = drop_identical(pairs, tokenizer, 8)  # what differs is cut off on the left
    assert [p["id"] for p in kept] == ["0"] and kept.report.dropped == {"chosen equals rejected within 8 tokens": 2}


def test_split_keeps_prompts_whole_and_ignores_order():
    pairs = [pair(f"Question {i % 300}?", i) for i in range(900)]
    train, held = split_by_prompt(pairs, 0.2, seed=1)
    assert not {p["prompt"][0]["content"] for p in train} & {p["prompt"][0]["content"] for p in held}
    assert len(train) + len(held) == 900 and 0.12 < len(held) / 900 < 0.28
    assert [p["id"] for p in held][:4] == ["2", "7", "10", "20"]  # as ever
    assert split_by_prompt(pairs[::-1], 0.2, seed=1)[1] == held[::-1] != split_by_prompt(pairs, 0.2, seed=2)[1]
    twins = split_by_prompt([*pairs, pair("question 2", -1)], 0.2, seed=1)[1]
    assert twins[-1]["id"] == "-1"  # case and punctuation do not part twins
    with pytest.raises(DataError, match="side empty"):
        split_by_prompt(pairs[:1])
    with pytest.raises(ConfigError):
        split_by_prompt(pairs, 1.5)


def test_rows_to_score_are_named_conversations():
    rows = [{"prompt": "q", "response": "", "id": 7}, {"prompt": [USER], "responses": ["a", ""]},
            {"messages": conversation("q", "")}]
    one, two, three = load_conversations(rows)
    assert (one.row, one.id, one.conversations) == (1, "7", {"response": conversation("q", "")})
    assert two.id is None and two.conversations["response_2"] == [USER, {"role": "assistant", "content": ""}]
    assert three.conversations == one.conversations and not three.is_pair


@pytest.mark.parametrize(("name", "kept", "read"), [
    ("hh_rlhf/helpful-online.test.jsonl.gz", 1130, 1137), ("rmb/Pairwise_set.Helpfulness.jsonl.gz", 8444, 8456)])
def test_real_files(name, kept, read):
    pairs = load_pairs(shared_path(f"data/real/{name}"))
    assert (len(pairs), pairs.report.read) == (kept, read)
    assert sum(pairs.report.dropped.values()) == read - kept and len({p["id"] for p in pairs}) == kept


@pytest.mark.parametrize(("load", "good", "bad", "words"), [
    (load_pairs, FORMATS["texts"], {"prompt": [], "chosen": "a", "rejected": "b"}, "not a preference pair.*prompt"),
    (load_pairs, FORMATS["texts"], {"prompt": CHAT["chosen"], "chosen": "a", "rejected": "b"}, "user turn"),
    (load_pairs, FORMATS["texts"], {"chosen": [{"role": "robot", "content": "x"}], "rejected": [USER]},
     "'chosen', turn 0 .*robot"),
    (load_pairs, FORMATS["texts"], {"conversation_input": [USER], "chosen": {"answer": "a"}, "reject": {}},
     "'rejected', turn 0 .*None"),
    (load_pairs, FORMATS["texts"], "just text", "str"),
    (load_conversations, FORMATS["texts"], {"prompt": "q", "responses": []}, "the fields prompt, responses; needed"),
    (load_conversations, FORMATS["texts"], {"prompt": "q", "response": 3}, "no text field 'content'"),
    (load_conversations, FORMATS["texts"], {"prompt": 3, "response": "a"}, "'prompt', turn 0"),
    (load_conversations, FORMATS["texts"], {"messages": [USER]}, "last message has role 'user'"),
    *((load_rewardbench2, RB2, {**RB2, field: value}, f"field '{field}'") for field, value in (
        ("prompt", ""), ("chosen", "a"), ("chosen", []), ("rejected", ["b", 3]), ("num_correct", 2), ("subset", 4),
        ("id", None))),
    (load_rewardbench2, RB2, {**RB2, "subset": "Ties", "id": "17"}, "field 'id'"),
    *((load_rm_bench, RMB, {**RMB, field: value}, f"field '{field}'") for field, value in (
        ("chosen", ["a", "b"]), ("domain", 3), ("domain", None)))])
def test_bad_rows_name_file_row_and_field(tmp_path, load, good, bad, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 2: .*{words}"):
        load(path)


def test_rm_bench_domain_comes_from_row_or_file_name(tmp_path):
    bare = {**RMB, "domain": None}
    for name, rows in {"chat_filtered": [bare], "safety-refuse_filtered": [bare, {**bare, "id": 2}]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    assert [r["domain"] for r in load_rm_bench(tmp_path)] == ["chat", "safety-refuse", "safety-refuse"]
    (tmp_path / "total_dataset.json").write_text(json.dumps([{**RMB, "domain": "math"}]))
    assert [r["domain"] for r in load_rm_bench(tmp_path)] == ["math"]


@pytest.mark.parametrize(("load", "row", "kept", "repo", "commit", "split"), [
    (lambda: iter_texts("hub:a/b", revision="a" * 40), {"text": "page"}, "page", "a/b", "a" * 40, "train"),
    (load_rewardbench2, RB2, {**RB2, "id": "1", "num_correct": 1}, "allenai/reward-bench-2",
     "7ff08853b0d5686e79b13fda8677024f566a104a", "test")])
def test_hub_data_are_read_at_their_commit_and_corpora_streamed(monkeypatch, load, row, kept, repo, commit, split):
    read, access = Mock(return_value=[row]), Mock()
    monkeypatch.setattr("sarmlib.data.rows.check_access", access)
    monkeypatch.setattr("datasets.load_dataset", read)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert list(load()) == [kept]
    access.assert_called_once_with(repo, commit, repo_type="dataset")
    read.assert_called_once_with(repo, revision=commit, split=split, streaming="text" in row)


def test_real_benchmark_files():
    assert len(load_rewardbench2(shared_path("data/real/rewardbench2_safety/best_of_4.jsonl"))) == 450
    domains = [row["domain"] for row in load_rm_bench(shared_path("data/real/rm_bench"))]
    assert {d: domains.count(d) for d in set(domains)} == {"chat": 129, "code": 228, "safety-refuse": 284,
                                                           "safety-response": 157}
