"""The command line: what it prints, what it refuses, and with which status."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sarmlib import cli
from sarmlib.cli import main
from sarmlib.data.pairs import load_conversations
from sarmlib.evaluation.scorer import score
from sarmlib.sae.topk import TopKSAE
from sarmlib.sarm.model import SarmForSequenceClassification
from sarmlib.store import Store
from tests.fake_llm import FakeLLM
from tests.tiny import conversation, tiny_pairs, tiny_sarm, tiny_tokenizer
from tools.fuzz import sound

ASK = ["--model", "x", "--prompt", "w1"]
TRAIN = ["train", "--backbone", "x", "--data", "y", "--output", "z"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """sarm/, backbone/ and sae/, all random, and pairs.jsonl."""
    base = tmp_path_factory.mktemp("world")
    sound(base)
    pairs = [*tiny_pairs(64), {"prompt": "w1", "chosen": "w2", "rejected": "w2"}]
    (base / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return base


@pytest.fixture
def folder(world):
    return str(world / "sarm")


@pytest.fixture
def rows(tmp_path):
    rows = [{"prompt": "w1 w2", "response": "w3 w4 w5", "id": "one"},
            {"prompt": "w1", "responses": ["w2", "w3 w3", ""]}, {"messages": conversation("w7", "w8 w9")},
            {"prompt": "w1 w2", "chosen": "w5 w6", "rejected": "w7"}]
    (path := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def said(capsys):
    """Run a command: what it printed, or with another status also its error."""
    def call(*arguments, status=0):
        capsys.readouterr()
        found = main([str(one) for one in arguments])
        out, err = capsys.readouterr()
        assert found == status, err
        return out if status == 0 else out + err
    return call


def sets(*settings):
    return [word for one in settings for word in ("--set", one)]


def test_every_command_has_a_group_and_an_example(said):
    assert all(one.epilog.startswith(f"Example: sarmlib {one.name}") and one.rich_help_panel
               for one in cli.app.registered_commands)
    assert "sarmlib" in said("--version") and "Example: sarmlib explain --model toy" in said("explain", "--help")


@pytest.mark.parametrize("status, arguments, words", [
    (2, ["nonsense"], "No such command 'nonsense'"), (2, ["score", *ASK], "--input FILE, or --prompt"),
    (2, ["explain", *ASK, "--response", "w2", "--input", "y"], "--input FILE, or --prompt"),
    (2, ["steer", "--model", "x", "--output", "y"], "or --undo alone"),
    (2, ["steer", "--model", "x", "--output", "y", "--feature", "a=8"], "give ID=NUMBER"),
    (2, ["run", "sae", "--variant", "scalar_half"], "has no pretrained SAE"),
    (2, [*TRAIN, "--set", "reward.lr"], "NAME=VALUE"), (1, [*TRAIN, "--set", "reward.lrr=1"], "mean 'lr'?"),
    (1, ["reproduce", "--profile", "nosuch"], "unknown profile 'nosuch'"),
    (1, ["reproduce", "--profile", "local"], "DATA=folder"),
    (1, ["reproduce", "--dry-run", "--hardware", "abacus"], "abacus"),
    (1, ["explain", *ASK, "--chosen", "w2"], "rejected"),
    (1, ["score", *ASK, "--response", "w2"], "no such folder"),
    (1, ["score", "--model", "toy:x", "--prompt", "w1", "--response", "w2"], "seeds.0 = 'x'"),
    (1, ["browse", "--output", "out", "--runs", "none"], "has not been made under"),
    (1, ["figures", "--runs", "none"], "draws the figures"), (1, ["verify", "--runs", "none"], "make it with")])
def test_wrong_use_is_one_sentence_and_leaves_nothing(said, status, arguments, words, monkeypatch, tmp_path):
    monkeypatch.delenv("SARMLIB_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    err = said(*arguments, status=status)
    assert words in err and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt, 130, "interrupted"),
    (PermissionError(13, "Permission denied", "runs/toy"), 1, "runs/toy: Permission denied")])
def test_interruption_and_files_that_cannot_be_read(said, monkeypatch, error, status, words):
    def fail(*args):
        raise error
    monkeypatch.setattr("sarmlib.cli.default_root", fail)
    assert words in said("verify", status=status)


def test_outputs_are_refused_before_the_work(said, folder, tmp_path):
    (file := tmp_path / "file").write_text("x")
    single = ["--model", folder, "--prompt", "w1", "--response", "w2"]
    for command in (["score", *single, "--output", file / "x.jsonl"], ["score", *single, "--output", "/dev/full"],
                    ["evaluate", "--model", folder, "--output", file]):
        assert "cannot be written" in said(*command, status=1)
    assert "exist" in said("steer", "--model", folder, "--feature", "1=2", "--output", tmp_path, status=2)
    assert file.read_text() == "x"


def test_score_gives_what_the_library_gives_for_all_rows(said, folder, rows, tmp_path):
    out = tmp_path / "out.jsonl"
    assert "7 lines" in said("score", "--model", folder, "--input", rows, "--output", out)
    assert said("score", "--model", folder, "--input", rows) == out.read_text()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 2, 2, 3, 4, 4]
    talks = [talk for item in load_conversations(rows) for talk in item.conversations.values()]
    expected = score(tiny_sarm(), tiny_tokenizer(), talks)
    assert np.allclose([line["reward"] for line in lines], expected.rewards, atol=1e-6)
    assert [line["tokens"] for line in lines] == expected.lengths.tolist() and lines[0]["id"] == "one"


def test_explanations_add_up_and_carry_labels(said, folder, rows, tmp_path):
    out, labels = tmp_path / "why.jsonl", tmp_path / "labels.json"
    labels.write_text(json.dumps({str(i): f"word\x1b[31m {i}" for i in range(64)}))
    said("explain", "--model", folder, "--input", rows, "--output", out, "--labels", labels)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert " ".join(line["of"] for line in lines) == "response response_1 response_2 response_3 response margin"
    for line in lines:
        total = sum(feature["contribution"] for feature in line["features"])
        assert total == pytest.approx(line["reward"], abs=1e-5) and line["rest"] == 0
    printed = said("explain", "--model", folder, "--input", rows, "--labels", labels)
    assert printed.count("row ") == 6 and "\x1b" not in printed and "word?[31m" in printed
    printed = said("explain", "--model", folder, "--prompt", "w1 w2", "--chosen", "w5 w6", "--rejected", "w7",
                   "--top", "2")
    assert "more features" in printed and f"row 1: margin {lines[-1]['reward']:+.2f} at token" in printed
    labels.write_text('["x"]')
    wrong = said("explain", "--model", folder, "--input", rows, "--labels", labels, status=1)
    assert "needed: JSON {feature: words}" in wrong


def test_an_edit_is_recorded_and_undone_exactly(said, folder, tmp_path):
    once, more, back = (tmp_path / name for name in ("once", "more", "back"))
    printed = said("steer", "--model", folder, "--feature", "3=8", "--feature", "5=0", "--output", once)
    assert "recorded edits: 2" in printed and "nothing changes" not in printed
    printed = said("steer", "--model", once, "--feature", "5=8", "--output", more)
    assert "feature 5: weight -0 to -0 (it was 0: nothing changes)" in printed
    before, edited = (SarmForSequenceClassification.from_pretrained(one) for one in (folder, once))
    assert [(e["feature"], e["factor"]) for e in edited.config.sarm_edits] == [(3, 8), (5, 0)]
    assert torch.equal(edited.score.weight[0, 3], before.score.weight[0, 3] * 8) and edited.score.weight[0, 5] == 0
    said("steer", "--model", more, "--undo", "--output", back)
    assert torch.equal(SarmForSequenceClassification.from_pretrained(back).score.weight, before.score.weight)
    said("steer", "--model", once, "--feature", "35=1e30", "--output", tmp_path / "huge")
    for model, factor in ((once, "1e300"), (once, "1e39"), (once, "-1e300"), (tmp_path / "huge", "1e30")):
        assert "infinite" in said("steer", "--model", model, "--feature", f"35={factor}", "--output", tmp_path / "no",
                                  status=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "huge", "more", "once"]


def test_evaluate_scores_the_toy_world_and_goes_on(said, folder, tmp_path):
    command = ["evaluate", "--model", folder, "--data", "toy", "--limit", "2", "--output", tmp_path / "out"]
    printed = said(*command)
    assert "Factuality" in printed and (tmp_path / "out" / "results.json").is_file()
    assert said(*command) == printed


def test_a_chat_model_judges_within_its_budget_and_goes_on(said, tmp_path):
    def answer(messages):
        return "[[B]]" if "[[A]]" in messages[0]["content"] else "4"

    with FakeLLM(("429",), answer) as server:
        command = ["evaluate", "--judge", server.url, "--model", "fake", "--data", "toy", "--limit", "2",
                   "--output", tmp_path / "out"]
        assert re.search(r"\d is above --budget 5: it may stop.*budget of 5 tokens is reached",
                         said(*command, "--budget", "5", status=1), re.S)
        command += ["--price", "0", "1"]
        assert "is above --budget 0.0001: it may stop" in said(*command, "--budget", "0.0001", status=1)
        assert not (tmp_path / "out" / "results.json").exists()
        said(*command)
        assert max(server.answered.values()) == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["model"] == "fake"


def test_from_pairs_to_a_saved_sarm(said, world, tmp_path):
    command = ["train", "--backbone", world / "backbone", "--data", world / "pairs.jsonl", "--sae", world / "sae",
               "--output", tmp_path / "out",
               *sets("device=cpu", "backbone.layer=2", "reward.batch_size=8", "reward.epochs=2", "reward.lr=3e-3",
                     "preferences.eval_fraction=0.3")]
    for wrong in ("reward.scheduler=nonsense", "reward.micro_batch_size=3"):  # which block no corrected run
        said(*command, *sets(wrong), status=1)
    printed = said(*command)
    assert "{'" not in printed and "%|" not in printed
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["train"] + found["eval"] == 64 and found["eval"] > 4
    assert "left out 1: chosen equals rejected" in printed and f"on {found['eval']} held-out pairs" in printed
    model = SarmForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.sae_hash() == TopKSAE.load(world / "sae").content_hash() and model.score.weight.any()
    assert model.config.layer == 2
    said("score", "--model", tmp_path / "out" / "model", "--prompt", "w1", "--response", "w2")
    assert "holds work with other settings" in said(*command, "--set", "preferences.max_length=100", status=1)


def test_an_sae_from_text_that_is_not_written_over(said, world, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text((json.dumps({"text": "w1 w2 w3. w4 w5 w6! w7 w8. w9 w10 w11? " * 12}) + "\n") * 100)
    command = ["pretrain-sae", "--model", world / "backbone", "--corpus", text, "--output", tmp_path / "out",
               *sets("device=cpu", "sae.vectors=300", "sae.batch_size=32", "sae.expansion=2", "corpus.window=64",
                     "backbone.layer=2", "sae.positions=every", "sae.steps=20")]
    for setting, words in (("sae.steps=null", "300 states are too few: 9 steps"),
                           ("sae.expansion=32", "for 1024 features"), ("sae.lr=3", "explains nothing: FVU")):
        refused = tmp_path / setting
        assert words in said(*command, *sets(setting), "--output", refused, status=1)
        assert not (refused / "sae_config.json").exists()
    (tmp_path / "small.txt").write_text("One sentence. Two.\n")
    assert "100 or more are needed" in said(*command, "--corpus", tmp_path / "small.txt", status=1)
    assert [p.name for p in (tmp_path / "out").rglob("*.*") if p.is_file() and p.suffix != ".lock"] == ["settings.json"]
    printed = said(*command)  # in the folder of the refused run
    assert "fvu" in printed and re.search(r"of 300 states from \d+ documents", printed)
    assert said(*command) == printed
    (other := tmp_path / "other").mkdir()
    (other / "sae.safetensors").write_text("x")
    assert "something else" in said(*command, "--output", other, status=1)
    text.write_text(text.read_text() + '{"text": "One more."}\n')
    assert "holds work with other settings" in said(*command, status=1)
    assert TopKSAE.load(tmp_path / "out").n_features == 64


def test_verify_prints_a_header_and_no_none_and_names_damage(said, tmp_path):
    artifact = Store(tmp_path / "toy").get_or_make("stage", {}, {}, _one_file)
    printed = said("verify", "--runs", tmp_path)
    assert "verdict" in printed.splitlines()[0] and "None" not in printed and "nan" not in printed.lower()
    assert "13 not measured" in printed and "stored artifacts: whole\nnext: " in printed
    assert f"-m sarmlib reproduce --profile toy --runs {tmp_path}" in printed.splitlines()[-1]
    (artifact.path / "x").write_text("y")
    printed = said("verify", "--runs", tmp_path)
    assert f"remove {artifact.path}" in printed and "stored artifacts: damaged" in printed


def _one_file(folder):
    (folder / "x").write_text("x")


def test_toy_names_a_seed_and_is_made_with_its_words_in_one_line(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setenv("SARMLIB_RUNS", str(tmp_path))
    monkeypatch.setattr("sarmlib.pipeline.Run.ensure",
                        lambda run, goal: asked.append((run.profile.seeds, run.progress, goal)))
    assert cli._toy("toy:1", "labels") and cli._toy("owner/name", "labels") is None
    assert asked == [((1,), False, "labels")]
    assert capsys.readouterr().err.count("\n") == 1


def test_reproduce_says_its_cost_once_and_ends_with_a_command_for_its_own_model(said, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_execute", lambda *names, **settings: None)
    command = ["reproduce", "--runs", tmp_path / "runs"]
    (root := tmp_path / "runs" / "toy").mkdir(parents=True)
    printed = said(*command)
    assert printed.count("profile toy: under 10 minutes") == 1 and "explain a reward" not in printed
    model = SimpleNamespace(file=lambda name: root / name)
    monkeypatch.setattr("sarmlib.pipeline.Run.reward", lambda run, variant, seed: model)
    monkeypatch.setattr(cli, "_words", lambda run, seed: {3: "a cook"})
    monkeypatch.chdir(tmp_path)
    last = said(*command).splitlines()[-1]
    assert f"{sys.executable} -m sarmlib explain --model runs/toy/model --labels runs/toy/labels.json --prompt" in last
    assert json.loads((root / "labels.json").read_text()) == {"3": "a cook"}


def test_what_is_tracked_is_written_on_request_and_notebooks_start_from_nothing(said, tmp_path, monkeypatch):
    (drawn := tmp_path / "runs" / "toy" / "figures").mkdir(parents=True)
    (drawn / "x.png").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert "1 figures in runs/toy/figures" in said("figures", "--runs", "runs") and not (tmp_path / "figures").exists()
    said("figures", "--runs", "runs", "--tracked")
    assert (tmp_path / "figures" / "toy" / "x.png").is_file()
    monkeypatch.setattr(cli, "_execute", lambda *names, runs, refresh: print(refresh, list(runs.glob("*"))))
    (tmp_path / "runs" / ".committed" / "toy").mkdir(parents=True)
    assert said("notebooks") == "True []\n" and drawn.is_dir()


def test_dry_run_and_doctor(said, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_run", None)  # a plan does not import what it would start
    printed = said("reproduce", "--profile", "paper-4b", "--dry-run", "--devices", "2", "--runs", tmp_path)
    assert "nothing was started" in printed and not list(tmp_path.iterdir())
    printed = said("doctor")
    assert "cores" in printed and re.search(r"^toy +fits", printed, re.M)
    assert re.search("^local .*DATA=folder", printed, re.M)
