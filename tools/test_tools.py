"""The maintainers' tools: pretraining the toy backbone in miniature, its probes, and the README's tables."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from sarmlib.errors import ConfigError, DataError
from tools import backbone as pt
from tools import readme_tables as tables

TINY = pt.PretrainConfig(d_model=16, n_layers=2, n_heads=2, d_ff=32, layer=1, rows=8, lesson_steps=4, widen=(1, 3),
                         corpus_steps=4, warmup=2)


@pytest.fixture(scope="module")
def tokenizer():
    return pt.build_tokenizer(4000)


def test_batches_depend_on_seed_and_step_alone_and_remarks_weigh_more(tokenizer):
    remarked = 0
    for step in range(TINY.steps):
        parts, again = (list(pt.batches(tokenizer, TINY, step)) for _ in range(2))
        assert sum(len(ids) for ids, _ in parts) == 8
        for (ids, weight), (same, weight_same) in zip(parts, again, strict=True):
            assert torch.equal(ids, same) and torch.equal(weight, weight_same) and (ids != tokenizer.unk_token_id).all()
            for row, found in zip(ids.tolist(), weight.tolist(), strict=True):
                ends, wanted = 0, []
                for token in row:
                    wanted.append(0.0 if token == tokenizer.pad_token_id else TINY.remark_weight if ends >= 2 else 1.0)
                    ends += token == tokenizer.eos_token_id
                assert found == wanted
                remarked += TINY.remark_weight in found
    assert remarked > 5


def test_the_loss_is_the_weighted_mean_however_a_step_is_parted(tokenizer):
    losses = []
    for n in (1, 4):
        model = pt.build_model(TINY, tokenizer)
        losses.append(pt.training_step(model, torch.optim.SGD(model.parameters(), 0.0), list(
            pt.batches(tokenizer, TINY, 1, parts=n))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_lessons_say_right_and_wrong_of_the_pairs_half_alone():
    rng = random.Random(0)
    for share in (0.15, 1.0):
        for _ in range(200):
            good, bad, *unjudged = pt.lesson(rng, share)
            assert good.endswith(" Right.") and bad.endswith(" Wrong.") and len(unjudged) == 2
            assert good.split("<assistant>")[0] == bad.split("<assistant>")[0]
            assert all(text.endswith("<eot>") for text in unjudged)


def train(tokenizer, folder, config=TINY):
    return pt.pretrain(tokenizer, config, folder, progress=False, log_every=3, save_every=2)


@pytest.mark.parametrize("stop_at", [3, 7])
def test_an_interrupted_run_goes_on_to_the_same_weights_and_log(tokenizer, tmp_path, monkeypatch, stop_at):
    whole, told = train(tokenizer, tmp_path / "whole")
    real, calls = pt.training_step, itertools.count()

    def loss(*args, **keywords):
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(pt, "training_step", loss)
        with pytest.raises(KeyboardInterrupt):
            train(tokenizer, tmp_path)
    with pytest.raises(ConfigError, match="other settings.*move it"):
        train(tokenizer, tmp_path, replace(TINY, seed=1))
    model, log = train(tokenizer, tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.state_dict().items())
    assert [entry | {"seconds": 0} for entry in log] == [entry | {"seconds": 0} for entry in told]
    assert [entry["step"] for entry in log] == [3, 6, 8]


def test_the_published_folder_has_its_card_and_probes(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM
    model, log = train(tokenizer, tmp_path / "work")
    folder = pt.publish(model, tokenizer, log, TINY, tmp_path / "out", n=24)
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 16
    card, probes = (folder / "README.md").read_text(), (folder / "probe_report.csv").read_text()
    assert "make backbone" in card and "| factual truth |" in card and "| harmful |" in card
    assert probes.count("\n") == 1 + 2 * 2 * len(pt.ATTRIBUTES)


def test_the_claims_table_quotes_the_paper_and_keeps_its_value_apart():
    import pandas as pd
    rows = [{"id": "C1", "kind": "evidence", "sentence": "a | b\nc", "where": "Method", "quantity": "error",
             "value": 0.04561, "low": 0.04, "high": 0.05, "paper": None, "verdict": "holds"},
            {"id": "C2", "kind": "construction", "sentence": "d", "where": "Setup", "quantity": "n",
             "value": float("nan"), "low": float("nan"), "high": float("nan"), "paper": 0.9, "verdict": "not measured"}]
    text = tables.claims_markdown(pd.DataFrame(rows))
    assert text.index("Evidence: ") < text.index("| C1 |") < text.index("equations.") < text.index("| C2 |")
    first, second = (line for line in text.splitlines() if line.startswith("| C"))
    assert first == "| C1 | “a \\| b c” (Method) | error | 0.0456 [0.04, 0.05] | – | holds |"
    assert second == "| C2 | “d” (Setup) | n | – | 0.9 | not measured |"


def test_a_report_stays_below_runs_unless_tracked_files_are_asked_for(tmp_path, monkeypatch):
    for name, text in {"ROOT": tmp_path, "report": lambda run: "all", "variants_markdown": lambda run: "some"}.items():
        monkeypatch.setattr(tables, name, text)
    (readme := tmp_path / "README.md").write_text("a\n<!-- toy:begin -->\nold\n<!-- toy:end -->\nb\n")
    assert tables.main(["--runs", str(tmp_path / "runs")]) == 0
    assert (tmp_path / "runs" / "toy" / "report.md").read_text() == "all" and not (tmp_path / "results").exists()
    assert tables.main(["--runs", str(tmp_path / "runs"), "--tracked"]) == 0
    assert (tmp_path / "results" / "toy.md").read_text() == "all"
    assert readme.read_text() == "a\n<!-- toy:begin -->\nsome\n<!-- toy:end -->\nb\n"
    with pytest.raises(DataError, match="needs one line <!-- other:begin -->"):
        tables.replace_between(readme, "other", "x")
