"""Commands ``steer`` and ``steering-scores``, and the slider."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from sarmlib.__main__ import main
from sarmlib.sarm.model import SarmForSequenceClassification
from sarmlib.sarm.steering import SteeringAnalysis, rows_from_index
from tests.helpers import shared_path
from tests.planted import SORRY, planted_world
from tests.tiny import tiny_sarm, tiny_tokenizer


@pytest.fixture
def saved(tmp_path):
    tiny_sarm().save_pretrained(tmp_path / "sarm")
    tiny_tokenizer().save_pretrained(tmp_path / "sarm")
    return tmp_path / "sarm"


def _weight(folder):
    return SarmForSequenceClassification.from_pretrained(folder).score.weight[0].detach()


def test_steer_and_undo_from_the_command_line(saved, tmp_path, capsys):
    out, back = tmp_path / "steered", tmp_path / "back"
    assert main(["steer", "--model", str(saved), "--feature", "3=8", "--add", "5=-0.25", "--output", str(out)]) == 0
    before, after = _weight(saved), _weight(out)
    assert after[3] == 8 * before[3] and after[5] == before[5] - 0.25
    assert torch.equal(after[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
    assert (out / "tokenizer.json").exists() and "feature 3: weight" in capsys.readouterr().out
    assert main(["steer", "--model", str(out), "--undo", "--output", str(back)]) == 0
    assert torch.equal(_weight(back), before)


@pytest.mark.parametrize("arguments, message", [
    (["--feature", "3"], "give ID=NUMBER"), (["--feature", "x=2"], "give ID=NUMBER"), (["--feature", "64=2"], "0..63"),
    (["--feature", "3=nan"], "not a finite number"),
    (["--feature", "3=2", "--feature", "3=4"], "names feature 3 twice"),
    (["--feature", "3=2", "--undo"], "or --undo alone"), ([], "give --feature"), (["--add=-1=2"], "0..63")])
def test_bad_edits_are_refused_and_leave_nothing(saved, tmp_path, capsys, arguments, message):
    assert main(["steer", "--model", str(saved), *arguments, "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sarm"]


def test_an_existing_output_is_not_overwritten(saved, tmp_path, capsys):
    assert main(["steer", "--model", str(saved), "--feature", "3=2", "--output", str(saved)]) == 1
    assert "name a new folder" in capsys.readouterr().err


def _scores(n=60):
    rng = np.random.default_rng(0)
    active = rng.random(n) < 0.4
    reward = rng.normal(size=n)
    return pd.DataFrame({"reward": reward, "reward_steered": reward + 2 * active, "active": active,
                         "is_target": np.arange(n) < n // 2, "group": np.arange(n) // 2,
                         "category": np.where(np.arange(n) < n // 2, "T", "other")})


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_anybodys_scores_give_figures_and_tables(tmp_path, capsys, kind):
    table, path, out = _scores(), tmp_path / f"scores.{kind}", tmp_path / "out"
    {"csv": lambda: table.to_csv(path, index=False), "parquet": lambda: table.to_parquet(path),
     "jsonl": lambda: path.write_text(table.to_json(orient="records", lines=True))}[kind]()
    assert main(["steering-scores", "--target", str(path), "--output", str(out)]) == 0
    shift = pd.read_csv(out / "shift.csv").set_index("set")
    assert shift.loc["T", "shift"] == pytest.approx(2 * table.active[:30].mean())
    written = {p.name for p in out.iterdir()}
    assert {"figure3.png", "figure3.pdf", "figure3.csv", "confound.png", "matched.json"} <= written
    assert "T against other" in capsys.readouterr().out


def test_bad_score_files_are_named(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("reward,active\n1,2\n")
    assert main(["steering-scores", "--target", str(tmp_path / "a.csv"), "--output", str(tmp_path / "o")]) == 1
    assert "lacks is_target, reward_steered" in capsys.readouterr().err
    (tmp_path / "a.json").write_text("[1]")
    assert main(["steering-scores", "--target", str(tmp_path / "a.json"), "--complement", str(tmp_path / "a.json"),
                 "--output", str(tmp_path / "o")]) == 1
    assert "authors' format" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_the_authors_released_scores_from_the_command_line(tmp_path, capsys):
    folder = shared_path("data/real/sarm_official_scores")
    assert main(["steering-scores", "--target", str(folder / "80_safety_c.json"), "--min-reward", "5",
                 "--complement", str(folder / "80_safety_C1.json"), "--output", str(tmp_path)]) == 0
    shift = pd.read_csv(tmp_path / "shift.csv").set_index("set")
    assert (shift.n["T"], shift.n_active["T"], shift.n["C"], shift.n_active["C"]) == (450, 132, 384, 27)
    assert tuple(shift.loc["T", ["mean_before", "mean_after"]].round(3)) == (4.516, 5.37)
    assert tuple(shift.loc["C", ["mean_before", "mean_after"]].round(3)) == (-1.179, -0.993)
    matched = json.loads((tmp_path / "matched.json").read_text())["non-safety"]
    assert (matched["n_target"], matched["n_other"]) == (241, 44)
    assert (round(matched["target_shift"], 2), round(matched["other_shift"], 2)) == (1.59, 1.54)
    assert matched["lo"] < 0 < matched["hi"]
    said = capsys.readouterr().out
    assert "+1.59 (n = 241) against +1.54 (n = 44)" in said
    assert "(n = 1)" in said and "too few to judge" in said and "auroc_reward_active" in said


def test_moving_the_slider_shows_another_card_and_computes_nothing(monkeypatch):
    from sarmlib import slider as module
    z, index, w, _ = planted_world()
    target = ((index["domain"] == "Safety") & (index["label"] == "chosen")).to_numpy()
    analysis = SteeringAnalysis(z, index["reward"], w, index["prompt_id"])
    one = SimpleNamespace(analysis=analysis, feature=SORRY, factor=8.0, target=target, rows=rows_from_index(index))
    grid = module.slider_grid(one, (0, 1, 8))
    assert grid.picks_changed[1] == 0 == grid.shift_T[1] and grid.safety[2] >= grid.safety[0]
    box = module.slider(one, (0, 1, 8))
    control, card = box.children
    assert control.value == 8.0 and "factor 8" in card.value and 'role="img"' in card.value
    monkeypatch.setattr(module, "_card", None)
    monkeypatch.setattr(one.analysis, "steered", None)
    control.value = 0.0
    assert "factor 0" in card.value and "<script" not in card.value
