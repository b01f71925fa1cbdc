"""Figures of RQ3: what is drawn is what the table says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sarmlib import figures_rq3 as figures
from sarmlib.errors import DataError
from sarmlib.evaluation import published


def variants(n: int = 4) -> pd.DataFrame:
    return pd.DataFrame({"variant": [f"variant {i}" for i in range(n)], "value": [2.0, -1.0, 0.5, 3.0][:n],
                         "lo": [0.5, -2.0, -1.0, 1.0][:n], "hi": [3.5, 0.5, 2.0, 5.0][:n],
                         "points": [[1.0, 3.0]] * n, "published": [2.1, np.nan, 5.2, np.nan][:n]})


def test_table_1_keeps_ours_and_the_papers_on_axes_apart():
    ours = pd.DataFrame({"model": ["SARM", "scalar"], "value": [90.0, 88.0], "lo": [89.0, 86.0], "hi": [91.0, 90.0]})
    paper = published.table_1().rename(columns={"Overall": "value"})
    ax, other, *_ = figures.table1_dots(ours, paper, "Table 1").axes
    names = {text.get_text() for text in other.get_yticklabels()}
    assert names == set(paper.model) and [t.get_text() for t in ax.get_yticklabels()] == ["SARM", "scalar"]
    drawn = np.concatenate([c.get_offsets()[:, 0] for c in other.collections])
    assert sorted(drawn.tolist()) == sorted(paper.value)
    assert all(len(c.get_facecolor()) == 0 for c in other.collections)  # hollow
    assert "printed" in other.get_title(loc="left") and "here" in ax.get_title(loc="left")


def test_paired_differences_mark_what_is_undecided():
    ax = figures.paired_differences(variants()).axes[0]
    words = {text.get_text() for text in ax.figure.legends[0].get_texts()}
    assert words == {"one seed", "interval leaves zero out", "undecided", "paper, single runs"}
    with pytest.raises(DataError, match="lo"):
        figures.paired_differences(variants().drop(columns="lo"))


def test_the_heat_map_writes_every_number_and_hatches_what_is_absent():
    table = pd.DataFrame([[90.0, 80.5], [np.nan, 70.0]], index=["SARM", "scalar"], columns=["Math", "Ties"])
    ax = figures.part_heat_map(table).axes[0]
    assert [text.get_text() for text in ax.texts] == ["90.0", "80.5", "70.0"]
    assert [patch.get_hatch() for patch in ax.patches] == ["////"]
    with pytest.raises(DataError):
        figures.part_heat_map(pd.DataFrame())


def test_calibration_recovers_a_calibrated_model_and_shows_an_overconfident_one():
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 2, 20_000))
    margins = size * np.where(rng.random(20_000) < 1 / (1 + np.exp(-size)), 1, -1)
    table = figures.calibration_table(margins)
    assert ((table.lo <= table.predicted) & (table.predicted <= table.hi)).sum() >= 8
    assert table.n.sum() == 20_000 and np.abs(table.predicted - table.observed).max() < 0.03
    loud = figures.calibration_table(3 * margins)
    assert (loud.predicted - loud.observed).iloc[2:].min() > 0
    assert figures.calibration_table(np.zeros(4)).observed.eq(0.5).all()
    fig = figures.calibration_and_margins({"SARM": margins[:500], "scalar": margins[500:900]})
    assert len(fig.axes) == 2 and "r_c - r_r" in fig.axes[1].get_xlabel()


def test_margins_are_chosen_minus_each_rejected_and_leave_ties_out():
    rows = [{"subset": "Math", "scores": [3.0, 1.0, 4.0]}, {"subset": "Ties", "scores": [9.0, 0.0]}]
    assert figures.reward_margins(rows).tolist() == [2.0, -1.0]


def test_the_learning_curve_ends_with_its_name():
    data = pd.DataFrame([{"variant": v, "pairs": n, "value": 50 + n / 10 + i, "lo": 45, "hi": 99}
                         for i, v in enumerate(("SARM", "scalar")) for n in (48, 96, 192)])
    ax = figures.learning_curve(data).axes[0]
    assert [text.get_text()[2:] for text in ax.texts] == ["SARM", "scalar"] and ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["48", "96", "192"]


def test_sensitivity_has_a_panel_per_setting_and_marks_the_profiles_own_value():
    data = pd.DataFrame([{"setting": name, "x": x, "value": 50 + x, "lo": 45, "hi": 60 + x, "dead": 10 * x,
                          "used": x == 3} for name in ("layer", "k") for x in (1, 3, 2)])
    fig = figures.sensitivity(data, "Title")
    assert [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()] == ["layer", "k"]
    assert [t.get_text() for t in fig.axes[2].get_xticklabels()] == ["1", "2", "3"]
    assert fig.axes[0].lines[0].get_ydata().tolist() == [51, 52, 53]
    with pytest.raises(DataError, match="dead"):
        figures.sensitivity(data.drop(columns="dead"))
