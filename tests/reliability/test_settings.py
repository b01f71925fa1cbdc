"""Settings, edits and labels that an enemy wrote."""

import csv
import warnings

import pandas as pd
import pytest
from matplotlib import cbook
from matplotlib.text import Text

from sarmlib import figures
from sarmlib.sarm.attribution import explain
from tests.tiny import conversation, tiny_sarm, tiny_tokenizer
from tools.outcome import command, edit_json, no_crash, refused, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("edits", [5, [5], [{"feature": 1}], [{"feature": 999, "after": 0, "before": 1}],
                                   [{"feature": "1", "after": 0, "before": 1}], {"a": 1}])
@pytest.mark.parametrize("words", [["--undo"], ["--feature", "1=2"]])
def test_edits_that_an_enemy_wrote(edits, words, model, tmp_path):
    edit_json(model / "config.json", sarm_edits=edits)
    no_crash(command("steer", "--model", model, "--output", tmp_path / "out", *words))


HARMLESS = ["sae.lr=.inf", "seed=4294967296", "seed=9223372036854775808", "seed=18446744073709551616"]


@pytest.mark.parametrize("setting", [
    *HARMLESS, "reward.head_lr=-1", "reward.lr=.nan", "seed=-1", "interpretation.features=0", "seeds=[-1]",
    "reward.warmup_ratio=2", "reward.lr=1e300", "seed=99999999999999999999999999",
    "reward.batch_size=99999999999999999999", "preferences.max_length=1"])
def test_settings_out_of_range(setting, base, tmp_path):
    found = run("train", base, tmp_path / "out", setting)
    no_crash(found) if setting in HARMLESS else refused(found)


HOSTILE = ["$x_{$", "costs $5 and $6", r"$\frac{1}{$", "$$", "a $ b", "$\\nonsense$", "x^2_3 $_$"]


@pytest.mark.parametrize("label", HOSTILE)
@pytest.mark.parametrize("kind", ["waterfall", "feature_weights", "label_auroc"])
def test_labels_with_dollars_are_drawn_as_they_are(kind, label, tmp_path):
    drawn = data = pd.DataFrame({
        "feature": [1, 2], "w": [.1, -.1], "preference_corr": [.2, .1], "contribution_sd": [1., 2.], "label": label,
        "auroc": [.8, .7], "auroc_lo": [.7, .6], "auroc_hi": [.9, .8], "null_95": .6, "reliable": [1, 0],
        "verdict": ["a", "b"], "auroc_length": .5, "auroc_domain": .5, "auroc_reward": .5})
    if kind == "waterfall":
        labels = dict.fromkeys(range(64), label)
        drawn = explain(tiny_sarm(), tiny_tokenizer(), conversation("w1 w2", "w3"), labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fig = figures.save(getattr(figures, kind)(drawn), data, "f", tmp_path)
    texts = [text for text in fig.findobj(Text) if label.replace("\\", "") in text.get_text().replace("\\", "")]
    assert texts and not any(text.get_parse_math() and cbook.is_math_text(text.get_text()) for text in texts)


@pytest.mark.parametrize("cell", ["=1+1", "\n=1+1", "+1", "-1+cmd", "@x", "\t=1", " =1"])
def test_cells_of_exported_tables_are_no_formulas(cell, tmp_path):
    figures.save(figures.architecture(), pd.DataFrame({"label": [cell], "value": [-1.5]}), "w", tmp_path)
    with open(tmp_path / "w.csv", newline="") as file:
        row = list(csv.reader(file))[1]
    assert row[0].lstrip()[:1] not in tuple("=+-@"), row
    assert row[1] == "-1.5"
