"""The commands score and explain, on files and on single prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sarmlib.__main__ import main
from sarmlib.data.conversations import check_item, load_items
from sarmlib.errors import DataError
from sarmlib.evaluation.scoring import score_conversations
from sarmlib.figures_pairs import waterfall
from sarmlib.sarm.attribution import explain
from tests.tiny import conversation, tiny_sarm, tiny_tokenizer

ROWS = [{"prompt": "w1 w2", "response": "w3 w4 w5", "id": "one"},
        {"prompt": "w1", "responses": ["w2", "w3 w3", ""]},
        {"messages": conversation("w7", "w8 w9")},
        {"prompt": "w1 w2", "chosen": "w5 w6", "rejected": "w7"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("sarm")
    tiny_sarm().save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)
    return target


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_score_gives_what_the_library_gives(folder, rows, tmp_path, capsys):
    assert main(["score", "--model", str(folder), "--input", str(rows), "--output", str(tmp_path / "out.jsonl")]) == 0
    lines = read(tmp_path / "out.jsonl")
    assert [line["row"] for line in lines] == [1, 2, 3, 4] and lines[0]["id"] == "one"
    talks = [talk for item in load_items(rows) for talk in item.conversations.values()]
    expected = score_conversations(tiny_sarm(), tiny_tokenizer(), talks)
    assert np.allclose([r for line in lines for r in line["rewards"].values()], expected.rewards, atol=1e-6)
    assert [n for line in lines for n in line["tokens"].values()] == expected.lengths.tolist()
    assert lines[3]["margin"] == lines[3]["rewards"]["chosen"] - lines[3]["rewards"]["rejected"]
    assert set(lines[1]["rewards"]) == {"response_1", "response_2", "response_3"} and "margin" not in lines[1]
    assert not list(tmp_path.glob("*.partial")) and "4 rows" in capsys.readouterr().out


def test_score_goes_on_where_it_was_cut(folder, rows, tmp_path, monkeypatch):
    from sarmlib.commands import score
    monkeypatch.setattr(score, "CHUNK", 1)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert main(["score", "--model", str(folder), "--input", str(rows), "--output", str(whole)]) == 0
    scored, lines = [], score.lines

    def stops(scorer, items, arguments):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(items[0].row)
        return lines(scorer, items, arguments)

    monkeypatch.setattr(score, "lines", stops)
    command = ["score", "--model", str(folder), "--input", str(rows), "--output", str(cut)]
    assert main(command) == 130 and not cut.exists()
    partial, = tmp_path.glob("cut.jsonl.*.partial")
    with open(partial, "ab") as file:
        file.write(b'{"row": 3, "torn')
    monkeypatch.setattr(score, "lines", lambda *a: scored.append(a[1][0].row) or lines(*a))
    assert main(command) == 0
    assert scored == [1, 2, 3, 4] and cut.read_bytes() == whole.read_bytes()


def test_a_single_prompt_is_printed(folder, capsys):
    assert main(["score", "--model", str(folder), "--prompt", "w1", "--response", "w2", "--response", "w3 w4"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert list(line["rewards"]) == ["response_1", "response_2"]


def test_explanations_add_up(folder, rows, tmp_path, capsys):
    out = tmp_path / "why.jsonl"
    (tmp_path / "labels.json").write_text('{"0": "zero", "1": "<b>one"}')
    assert main(["explain", "--model", str(folder), "--input", str(rows), "--output", str(out), "--labels",
                 str(tmp_path / "labels.json")]) == 0
    lines = read(out)
    assert " ".join(line["of"] for line in lines) == "response response_1 response_2 response_3 response margin"
    for line in lines:
        total = sum(feature["contribution"] for feature in line["features"]) + line["rest"]
        assert total == pytest.approx(line["reward"], abs=1e-5)
        assert len(line["features"]) == line["n_active"] and all("label" in f for f in line["features"])
    capsys.readouterr()
    assert main(["explain", "--model", str(folder), "--prompt", "w1 w2", "--response", "w5 w6", "--versus", "w7",
                 "--top", "2", "--figure", str(tmp_path / "why.png")]) == 0
    printed = capsys.readouterr().out
    assert "margin" in printed and "more features" in printed
    assert f"{lines[-1]['reward']:+.4f}" in printed
    assert (tmp_path / "why.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments, message", [
    ([], "--input FILE, or --prompt"), (["--prompt", "w1"], "--input FILE, or --prompt"),
    (["--input", "absent.jsonl"], "no such file"),
    (["--prompt", "w1", "--response", "w2", "--max-length", "1"], "at least 2")])
@pytest.mark.parametrize("command", ["score", "explain"])
def test_bad_arguments(folder, command, arguments, message, capsys):
    assert main([command, "--model", str(folder), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("row, message", [
    ({}, "none; needed"), ({"prompt": "w1"}, "has the fields prompt"),
    ({"prompt": "w1", "response": 3}, "its responses are"),
    ({"prompt": 3, "response": "w"}, "its prompt is"), ({"messages": conversation("w1", "w2")[:1]}, "last message"),
    ({"prompt": "w1", "responses": []}, "its responses are")])
def test_bad_rows_are_named(row, message):
    with pytest.raises(DataError, match=message):
        check_item(row)


def test_skip_bad_counts(folder, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "w1", "response": "w2"}\nnot json\n')
    command = ["score", "--model", str(folder), "--input", str(path), "--output", str(tmp_path / "o.jsonl")]
    assert main(command) == 1 and "row 2" in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()
    assert main([*command, "--skip-bad"]) == 0 and "'bad row': 1" in capsys.readouterr().out
    assert [line["row"] for line in read(tmp_path / "o.jsonl")] == [1]


def test_waterfall_ends_at_the_reward():
    found = explain(tiny_sarm(), tiny_tokenizer(), conversation("w5 w6", "w7 w8 w9"), labels={0: "zero"})
    axes = waterfall(found, most=2).axes[0]
    assert axes.get_yticklabels()[-1].get_text() == "reward" and len(axes.get_yticks()) == 4
    last = [text.get_text() for text in axes.texts][-1]
    assert last == f"= {found.reward:+.4g}"


def test_the_authors_layout_scores_and_explains(tmp_path, capsys):
    from sarmlib.sarm.released import save_official
    model = tiny_sarm(relu=False, encoder_bias=True)
    save_official(model, tmp_path / "official")
    tiny_tokenizer().save_pretrained(tmp_path / "official")
    assert main(["score", "--model", str(tmp_path / "official"), "--prompt", "w1", "--response", "w2"]) == 0
    reward = json.loads(capsys.readouterr().out)["rewards"]["response"]
    expected = score_conversations(model, tiny_tokenizer(), [conversation("w1", "w2")]).rewards[0]
    assert reward == pytest.approx(expected, abs=1e-5)
    assert main(["explain", "--model", str(tmp_path / "official"), "--prompt", "w1", "--response", "w2"]) == 0
    assert f"{reward:+.4f}" in capsys.readouterr().out
