"""Settings, edits and labels that an enemy wrote."""

import warnings

import pandas as pd
import pytest

from sarmlib import figures
from sarmlib.sarm.attribution import explain
from tests.reliability.outcome import command, copied, edit_json, no_crash, pretrains, refused, trains
from tests.tiny import conversation, tiny_sarm, tiny_tokenizer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("factor", ["1e300", "1e39", "-1e300"])
def test_steering_never_saves_infinity(factor, sarm, tmp_path):
    refused(command("steer", "--model", sarm, "--feature", f"35={factor}", "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_steering_in_steps_never_saves_infinity(sarm, tmp_path):
    command("steer", "--model", sarm, "--feature", "35=1e30", "--output", tmp_path / "a")
    refused(command("steer", "--model", tmp_path / "a", "--feature", "35=1e30", "--output", tmp_path / "b"))


@pytest.mark.parametrize("edits", [5, [5], [{"feature": 1}], [{"feature": 999, "after": 0, "before": 1}],
                                   [{"feature": "1", "after": 0, "before": 1}], {"a": 1}])
@pytest.mark.parametrize("how", ["undo", "more"])
def test_edits_that_an_enemy_wrote(edits, how, sarm, tmp_path):
    folder = copied(sarm, tmp_path / "m")
    edit_json(folder / "config.json", sarm_edits=edits)
    words = ["--undo"] if how == "undo" else ["--feature", "1=2"]
    no_crash(command("steer", "--model", folder, "--output", tmp_path / "o", *words))


@pytest.mark.parametrize("setting", [
    "reward.head_lr=-1", "reward.lr=.inf", "reward.lr=.nan", "seed=-1", "interpretation.features=0", "seeds=[-1]",
    "reward.head_lr=.inf", "reward.weight_decay=-1", "reward.warmup_ratio=2", "reward.scheduler=nonsense",
    "seed=99999999999999999999999999",
    "reward.lr=1e300", "reward.batch_size=99999999999999999999",
    "preferences.max_length=1", "sae.lr=.inf", "reward.micro_batch_size=3"])
def test_settings_out_of_range(setting, base, tmp_path):
    found = trains(base, tmp_path / "o", setting)
    no_crash(found) if setting.startswith(("reward.micro", "sae.lr")) else refused(found)


@pytest.mark.parametrize("setting", ["seed=4294967296", "seed=9223372036854775808", "seed=18446744073709551616"])
def test_large_seeds(setting, base, tmp_path):
    no_crash(trains(base, tmp_path / "o", setting))


@pytest.mark.parametrize("first", ["reward.scheduler=nonsense", "reward.micro_batch_size=3", "reward.lr=1e30"])
def test_a_run_refused_at_the_start_blocks_no_corrected_one(first, base, tmp_path):
    found = trains(base, tmp_path / "o", first)
    if found[0] == "ok":
        pytest.skip("accepted")
    again = trains(base, tmp_path / "o")
    assert again[0] == "ok", (found, again)


def test_a_pretraining_refused_at_the_start_blocks_no_corrected_one(base, tmp_path):
    (tmp_path / "few.txt").write_text("w1 w2")
    refused(pretrains(base, tmp_path / "o", corpus=tmp_path / "few.txt"))
    found = pretrains(base, tmp_path / "o")
    assert found[0] == "ok", found


HOSTILE = ["$x_{$", "costs $5 and $6", r"$\frac{1}{$", "$$", "a $ b", "$\\nonsense$", "x^2_3 $_$"]


@pytest.mark.parametrize("label", HOSTILE)
def test_labels_with_dollars_in_the_waterfall(label, tmp_path):
    model, tokenizer = tiny_sarm(), tiny_tokenizer()
    found = explain(model, tokenizer, conversation("w1 w2", "w3"), labels=dict.fromkeys(range(64), label))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fig = figures.waterfall(found)
        figures.save(fig, found.table, "w", tmp_path)
    shown = [tick.get_text() for ax in fig.axes for tick in ax.get_yticklabels()]
    assert any(label.split()[0].replace("\\", "") in text.replace("\\", "") for text in shown)
    import matplotlib.cbook  # a text that counts as mathematics would be drawn as such
    assert not any(t.get_parse_math() and matplotlib.cbook.is_math_text(t.get_text())
                   for ax in fig.axes for t in ax.get_yticklabels() if label.split()[0] in t.get_text())


@pytest.mark.parametrize("label", HOSTILE[:3])
@pytest.mark.parametrize("kind", ["feature_weights", "label_auroc"])
def test_labels_with_dollars_in_other_figures(kind, label, tmp_path):
    columns = {"feature": [1, 2], "w": [.1, -.1], "preference_corr": [.2, .1], "contribution_sd": [1., 2.],
               "label": [label] * 2, "auroc": [.8, .7], "auroc_lo": [.7, .6], "auroc_hi": [.9, .8],
               "null_95": [.6, .6], "reliable": [1, 0], "verdict": ["a", "b"], "auroc_length": [.5, .5],
               "auroc_domain": [.5, .5], "auroc_reward": [.5, .5]}
    data = pd.DataFrame(columns)
    figures.save(getattr(figures, kind)(data), data, "f", tmp_path)


@pytest.mark.parametrize("cell", ["=1+1", "\n=1+1", "+1", "-1+cmd", "@x", "\t=1", " =1"])
def test_cells_of_exported_tables_are_no_formulas(cell, tmp_path):
    import csv
    data = pd.DataFrame({"label": [cell], "value": [-1.5]})
    fig = figures.waterfall(explain(tiny_sarm(), tiny_tokenizer(), conversation("w1 w2", "w3")))
    figures.save(fig, data, "w", tmp_path)
    with open(tmp_path / "w.csv", newline="") as file:
        row = list(csv.reader(file))[1]
    assert row[0].lstrip()[:1] not in tuple("=+-@"), row
    assert row[1] == "-1.5"
