"""Every figure: drawn inside its page, nothing beside it, saved byte for byte, and what is drawn is the table."""

from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from sarmlib import figures
from sarmlib.errors import DataError
from sarmlib.sarm.steering import SteeringAnalysis, rows_from_index, summarise_shift
from tests.planted import SORRY, planted_explainer

SUBSETS = ["Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties", "overall"]
VARIANTS = ["SARM", "random encoder", "scalar, full depth"]


@pytest.fixture(scope="module")
def tables():
    contexts = planted_explainer().contexts
    index = contexts.index
    target = ((index["domain"] == "Safety") & (index["label"] == "chosen")).to_numpy()
    analysis = SteeringAnalysis(contexts.z, index["reward"], contexts.w, index["prompt_id"])
    steered = analysis.table(SORRY, 6.0, target, category=index["domain"])
    steps = [(variant, step, 0.5 + i * step / 9000 + seed / 5, seed) for i, variant in enumerate(VARIANTS)
             for step in (400, 800, 1600) for seed in range(3)]
    features = contexts.features().assign(label=["“sorry”, “a long label”", None] * 40)
    judged = pd.DataFrame({
        "feature": range(4), "label": ["more often: “a very long label”, " + "x" * 70, "short", "c", "d"],
        "auroc": [0.9, 0.6, np.nan, np.nan], "auroc_lo": [0.85, 0.5, np.nan, np.nan],
        "auroc_hi": [0.95, 0.7, np.nan, np.nan], "null_95": [0.55, 0.56, np.nan, np.nan],
        "auroc_length": [0.5, 0.7, np.nan, np.nan], "auroc_reward": 0.6, "auroc_domain": 0.5,
        "reliable": [True, False, False, False], "verdict": [
            "reliable", "not reliable: no better than length", "abstained: no term", "not scored: 3 positives"]})
    scores = pd.DataFrame([(model, subset, 95.0, 80.0, 110.0, 70.0) for model in VARIANTS for subset in SUBSETS],
                          columns=["model", "subset", "value", "lo", "hi", "paper"])
    verdicts = pd.DataFrame([
        ("C1", "error", 0.05, 0.04, 0.06, 0.5, "<", "holds", 0.04, 0.055),
        ("C2", "a claim whose title is so long that it has to be cut somewhere " * 2, -1.0, -2.0, -0.5, 0.0, ">",
         "does not hold here", np.nan, -0.1),
        ("C3", "exact", 0.0, 0.0, 0.0, 0.0, "<", "undecided", 0.0, 0.0),
        ("C4", "absent", np.nan, np.nan, np.nan, 0.0, "<", "not measured", np.nan, np.nan)],
        columns=["id", "title", "value", "low", "high", "threshold", "direction", "verdict", "band_lo", "band_hi"])
    verdicts["kind"] = ["evidence", "evidence", "construction", "evidence"]
    probe = pd.DataFrame({"attribute": ["truth", "a much longer attribute name"] * 2,
                          "model": ["pretrained"] * 2 + ["random"] * 2, "auroc": [0.9, 0.95, 0.5, 0.6]})
    parts = pd.DataFrame({"feature": range(20), "contribution": [1.0, -0.4, *[0.05] * 17, 0.0],
                          "z_chosen": [0.0, 1.0] + [2.0] * 18, "z_rejected": [1.0, 0.0] + [2.5] * 18,
                          "label": ["", *["more often: “a $”, “b $”, " + "“long term”, " * 9 + "x"] * 19]})
    return {
        "log": pd.DataFrame({"run": ["sentence ends"] * 5 + ["all tokens"] * 5, "step": [*range(5)] * 2,
                             "loss": np.linspace(1, 0.2, 10), "fvu": np.linspace(1, 0.2, 10), "dead_fraction": 0.4}),
        "training": pd.DataFrame(steps, columns=["variant", "step", "accuracy", "seed"]),
        "features": features, "judged": judged, "probe": probe, "steered": steered, "scores": scores,
        "concepts": probe.rename(columns={"attribute": "concept", "model": "representation"}).assign(
            auroc_lo=0.4, auroc_hi=1.0),
        "shift": summarise_shift(steered), "verdicts": verdicts,
        "dose": analysis.dose_response(SORRY, [-8, 0, 1, 2, 5, 40, 160], target, rows_from_index(index)),
        "controls": analysis.controls(SORRY, 6.0, target)[0],
        "ablation": pd.DataFrame({"variant": VARIANTS, "value": [93.0, 60, 70], "lo": [80.0, 55, 68],
                                  "hi": [106.0, 65, 72], "points": [[91, 95], [58, 62], [69, 71]],
                                  "paper": [73.6, 68.4, np.nan]}),
        "gaps": pd.DataFrame({"variant": VARIANTS[1:], "value": [2.0, -1.0], "lo": [0.5, -2.0], "hi": [3.5, 0.5]}),
        "explanation": SimpleNamespace(table=parts, rest=0.0, reward=parts.contribution.sum(), n_active=20,
                                       prompt="What costs $5?", answers=("a cake", "b " * 90))}


DRAW = {
    "architecture": None,
    "sae_training": "log", "reward_training": "training", "feature_weights": "features",
    "label_auroc": "judged", "concepts": "concepts", "probe_report": "probe", "figure3": "steered",
    "shift_by_set": "shift", "dose_response": "dose", "selectivity": "controls", "table1": "scores",
    "table2": "ablation", "differences": "gaps", "claims": "verdicts", "waterfall": "explanation"}


@pytest.mark.parametrize("name", DRAW)
def test_every_figure_is_drawn_inside_its_page(tables, name):
    settings = dict(mpl.rcParams)
    data = [tables[DRAW[name]]] if DRAW[name] else []
    fig = getattr(figures, name)(*data, *[5] * (name == "dose_response"))
    assert fig.get_figwidth() in (figures.COLUMN, figures.PAGE) and fig.get_figheight() < 7
    fig.draw_without_rendering()
    tight = fig.get_tightbbox().transformed(fig.dpi_scale_trans)  # everything visible, tick labels too
    page = fig.bbox
    assert tight.x0 > -2 and tight.y0 > -2 and tight.x1 < page.x1 + 2 and tight.y1 < page.y1 + 2
    assert plt.get_fignums() == [] and dict(mpl.rcParams) == settings  # nothing leaks into the session
    for ax in fig.axes:  # axis titles are shorter than their axes
        box = ax.get_window_extent()
        assert ax.xaxis.label.get_window_extent().width <= box.width + 2, ax.get_xlabel()
        assert ax.yaxis.label.get_window_extent().height <= box.height + 2, ax.get_ylabel()
    texts = [text for text in fig.findobj(mpl.text.Text) if text.get_visible() and text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) >= figures.SMALL
    assert len(fig.alt) > 40 and "nan" not in fig.alt
    assert all(len(legend.get_texts()) > 1 for legend in fig.legends) and (name != "differences" or not fig.legends)
    data, meta = fig._repr_mimebundle_()
    assert data["image/png"][:4] == b"\x89PNG" and meta["image/png"]["alt"] == fig.alt


def test_saving_writes_four_files_byte_for_byte_and_returns_the_figure(tables, tmp_path):
    data = pd.DataFrame({"x": [1 / 3, 2.0], "name": ["a", "ü"]})
    for folder in ("a", "b"):
        fig = figures.figure3(tables["steered"])
        for _ in range(2):
            assert figures.save(fig, data, "fig3", tmp_path / folder, note="toy profile") is fig
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["fig3.csv", "fig3.pdf", "fig3.png", "fig3.txt"]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert (tmp_path / "a/fig3.csv").read_text() == "x,name\n0.333333,a\n2,ü\n"
    assert (tmp_path / "a/fig3.txt").read_text() == f"{fig.alt} toy profile\n"
    assert (tmp_path / "a/fig3.png").stat().st_size < 300_000 and b"CreationDate" not in (
        tmp_path / "a/fig3.pdf").read_bytes()


def test_figure3_draws_counts_on_shared_bins_and_a_tick_per_moved_response(tables):
    fig = figures.figure3(tables["steered"])
    left, right = fig.axes
    bars = [[p for p in ax.patches if isinstance(p, mpl.patches.Rectangle)] for ax in fig.axes]
    edges = [sorted({round(bar.get_x(), 9) for bar in one}) for one in bars]
    assert edges[0] == edges[1] and len(edges[0]) == 40
    for ax, one in zip(fig.axes, bars, strict=True):
        assert sum(bar.get_height() for bar in one) == pytest.approx(100)
        after = next(p for p in ax.patches if isinstance(p, mpl.patches.StepPatch)).get_data().values
        assert sum(after) == pytest.approx(100)
    moved = tables["steered"].query("reward != reward_steered")
    ticks = [len(lines.get_segments()) for ax in (left, right) for lines in ax.collections]
    assert ticks == [moved.is_target.sum()] * 2 + [(~moved.is_target).sum()] * 2
    assert "mean shift +" in left.get_title("left") and "mean shift +0.00" in right.get_title("left")
    assert fig.alt.startswith("Steering one feature: 100.0 % of T moves, 0.0 % of C.")
    assert {"before", "after"} <= {text.get_text() for text in fig.legends[0].get_texts()}


def test_claims_are_turned_so_that_right_is_for_the_claim(tables):
    axis = figures.claims(tables["verdicts"]).axes[0]
    holds, fails, *_ = (line.get_xdata()[0] for line in axis.lines)
    thresholds = [path.vertices[0, 0] for path in axis.collections[1].get_paths()]
    assert holds > thresholds[0] and fails < thresholds[1]


def test_a_label_is_cut_between_terms_and_what_cannot_be_drawn_is_counted(tables):
    terms = "more often: “a term”, digits, “another”, “x”; less often: “y”"
    fig = figures.label_auroc(tables["judged"].assign(label=terms))
    assert fig.axes[0].get_yticklabels()[0].get_text() == "“a term”, digits, “another”, “x” (0)"
    assert "1 abstained; 1 could not be scored" in fig.alt


def test_the_papers_scores_have_their_own_axis(tables):
    ours, paper = figures.table1(tables["scores"]).axes
    assert ours.dataLim.x0 >= 80 and paper.collections[0].get_offsets()[:, 0].tolist() == [70.0] * len(SUBSETS)


def test_the_waterfall_says_why_an_answer_won_and_ends_at_the_margin(tables):
    explanation = tables["explanation"]
    fig = figures.waterfall(explanation)
    bars = [p for p in fig.axes[0].patches if p.get_height() == pytest.approx(0.62)]
    assert len(bars) == 13 and bars[-1].get_width() == pytest.approx(explanation.reward)
    names = [text.get_text() for text in fig.axes[0].get_yticklabels()]
    assert names[0] == r"“a \$”, “b \$”, “long term”, “long term”" + "\nonly in the chosen answer, costs reward (1)"
    assert names[1].endswith("stronger in the rejected answer, costs reward (2)")
    assert names[10:12] == ["1 feature without a label", "8 features that pay less"]
    assert any(bar.get_hatch() for bar in bars)
    assert fig.alt.startswith("“What costs $5?” Why “a cake” wins over “b b ") and "…" not in "".join(names)


@pytest.mark.parametrize("draw, message", [
    (lambda: figures.sae_training(pd.DataFrame({"step": [1]})), "'loss'"),
    (lambda: figures.figure3(pd.DataFrame({"reward": [0.0, 1], "reward_steered": [0.0, 1], "active": [False, False],
                                           "is_target": [True, True]})), "complement C is empty"),
    (lambda: figures.table1(pd.DataFrame(columns=["model", "subset", "value", "paper"])), "empty table")])
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(DataError, match=message):
        draw()
