import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from sarmlib import figures
from sarmlib.errors import DataError
from sarmlib.interpretation.contexts import Contexts
from sarmlib.sarm.steering import SteeringAnalysis, rows_from_index
from tests.planted import SORRY, planted_world

RNG = np.random.default_rng(0)
SUBSETS = ["Overall", "Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties"]


@pytest.fixture(scope="module")
def tables():
    z, index, w, _ = planted_world()
    target = ((index["domain"] == "Safety") & (index["label"] == "chosen")).to_numpy()
    analysis, rows = SteeringAnalysis(z, index["reward"], w, index["prompt_id"]), rows_from_index(index)
    judged = pd.DataFrame({
        "feature": range(4), "label": ["more often: “a very long label”, " + "x" * 70, "short", "c", "d"],
        "auroc": [0.9, 0.6, np.nan, np.nan], "auroc_lo": [0.85, 0.5, np.nan, np.nan],
        "auroc_hi": [0.95, 0.7, np.nan, np.nan], "null_95": [0.55, 0.56, np.nan, np.nan],
        "auroc_length": [0.5, 0.7, np.nan, np.nan], "auroc_reward": 0.6, "auroc_domain": 0.5,
        "reliable": [True, False, False, False], "verdict": [
            "reliable", "not reliable: no better than length", "abstained: no term", "not scored: 3 positives"]})
    ours = pd.DataFrame([(m, s, v, v - 4, v + 4) for m in ("SARM", "scalar, half depth", "scalar, full depth")
                         for s, v in zip(SUBSETS, RNG.uniform(30, 90, 7), strict=True)],
                        columns=["model", "subset", "value", "lo", "hi"])
    claims = pd.DataFrame([
        ("C1", "The random encoder scores lower than the pretrained one, which is the paper's main ablation",
         8.1, 4.0, 12.0, 0.0, np.inf, "holds"),
        ("C2", "C stays unchanged", 0.2, 0.1, 0.3, -0.05, 0.05, "does not hold here"),
        ("C3", "parameters", 4.3e9, np.nan, np.nan, 4.2e9, 4.4e9, "undecided")],
        columns=["id", "text", "value", "lo", "hi", "band_lo", "band_hi", "verdict"])
    probe = pd.DataFrame({"attribute": ["truth", "a much longer attribute name"] * 2,
                          "model": ["pretrained"] * 2 + ["random"] * 2, "auroc": [0.9, 0.95, 0.5, 0.6],
                          "lo": [0.8, 0.9, 0.4, 0.5], "hi": [0.95, 1.0, 0.6, 0.7]})
    gains = {"SARM": 0.3, "scalar": 0.31, "random": 0.2}
    training = pd.DataFrame([(v, s, 0.5 + g * s / 4000, k) for v, g in gains.items()
                             for s in range(0, 4001, 1000) for k in range(3)],
                            columns=["variant", "step", "accuracy", "seed"])
    log = pd.DataFrame({"step": range(10), "loss": np.linspace(1, 0.2, 10), "fvu": np.linspace(1, 0.2, 10),
                        "dead_fraction": np.linspace(0, 0.4, 10), "run": ["a"] * 5 + ["b"] * 5})
    return {"log": log, "features": Contexts(z, index, w).features(), "probe": probe, "training": training,
            "judged": judged, "steered": analysis.table(SORRY, 6.0, target, category=index["domain"]),
            "dose": analysis.dose_response(SORRY, [-8, 0, 1, 2, 5, 40], target, rows, n_boot=50),
            "controls": analysis.controls(SORRY, 6.0, target, rows, target_subsets=("Safety",), n_random=30)[0],
            "ours": ours, "published": pd.DataFrame({"subset": SUBSETS, "value": 70.0}), "claims": claims,
            "ablation": pd.DataFrame({"variant": ["random encoder", "SARM"], "value": [60.0, 70], "lo": [55.0, 68],
                                      "hi": [65.0, 72], "points": [[58, 62], [69, 71]]}),
            "paper2": pd.DataFrame({"variant": ["random encoder", "SARM"], "value": [68.4, 73.6]})}


DRAW = {
    "sae_training": lambda t: figures.sae_training(t["log"], title="a finding"),
    "feature_density": lambda t: figures.feature_density(t["features"]["rate"]),
    "feature_density_two": lambda t: figures.feature_density({"SAE": t["features"]["rate"], "random": RNG.random(50)}),
    "probe_report": lambda t: figures.probe_report(t["probe"], title="a finding"),
    "reward_training": lambda t: figures.reward_training(t["training"]),
    "weights": lambda t: figures.feature_weights_vs_preference(t["features"], name={0: "sorry"}),
    "label_auroc": lambda t: figures.label_auroc(t["judged"]),
    "figure3": lambda t: figures.figure3(t["steered"], title="a finding"),
    "dose_response": lambda t: figures.dose_response(t["dose"], used=5),
    "selectivity": lambda t: figures.selectivity(t["controls"]),
    "selectivity_no_rows": lambda t: figures.selectivity(t["controls"].drop(columns="worst_off_target")),
    "confound": lambda t: figures.confound(t["steered"]),
    "confound_by_category": lambda t: figures.confound(t["steered"], by="category"),
    "table1": lambda t: figures.table1(t["ours"], t["published"], title="a finding"),
    "table2": lambda t: figures.table2(t["ablation"], t["paper2"]),
    "table2_alone": lambda t: figures.table2(t["ablation"]),
    "claims_forest": lambda t: figures.claims_forest(t["claims"])}


def _texts(fig):
    return [text for text in fig.findobj(mpl.text.Text) if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("name", DRAW)
def test_every_figure_is_drawn_inside_its_page(tables, name):
    settings = dict(mpl.rcParams)
    fig = DRAW[name](tables)
    assert isinstance(fig, Figure) and 3.2 < fig.get_figwidth() <= 7.0
    fig.draw_without_rendering()
    page = fig.bbox
    ticks = {id(label) for ax in fig.findobj(mpl.axes.Axes) for axis in (ax.xaxis, ax.yaxis)
             for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)}  # unused ones lie anywhere
    outside = [text.get_text() for text in _texts(fig) if id(text) not in ticks
               for box in [text.get_window_extent()]
               if box.x0 < page.x0 - 1 or box.x1 > page.x1 + 1 or box.y0 < page.y0 - 1 or box.y1 > page.y1 + 1]
    assert outside == []
    tight = fig.get_tightbbox().transformed(fig.dpi_scale_trans)  # everything visible, tick labels too
    assert tight.x0 > -1 and tight.y0 > -1 and tight.x1 < page.x1 + 1 and tight.y1 < page.y1 + 1
    assert plt.get_fignums() == [] and dict(mpl.rcParams) == settings  # nothing leaks into the session
    labelled = [ax for ax in fig.axes if ax.get_xlabel() or ax.get_ylabel()]
    assert labelled or name == "claims_forest"


def test_saving_writes_png_pdf_csv_and_caption_byte_for_byte(tables, tmp_path):
    data = pd.DataFrame({"x": [1 / 3, 2.0], "name": ["a", "ü"]})
    first = figures.save_figure(figures.figure3(tables["steered"]), "fig3", tmp_path / "a", data, " Caption. ", "toy")
    second = figures.save_figure(figures.figure3(tables["steered"]), "fig3", tmp_path / "b", data, " Caption. ", "toy")
    assert set(first) == {"png", "pdf", "csv", "txt"}
    for suffix in first:
        assert first[suffix].read_bytes() == second[suffix].read_bytes(), suffix
    assert first["csv"].read_text() == "x,name\n0.333333,a\n2,ü\n" and first["txt"].read_text() == "Caption.\n"
    assert first["png"].stat().st_size < 300_000 and first["png"].read_bytes()[:4] == b"\x89PNG"
    assert b"CreationDate" not in first["pdf"].read_bytes() and b"toy profile" in first["pdf"].read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["fig3.csv", "fig3.pdf", "fig3.png", "fig3.txt"]


def test_a_large_figure_is_saved_coarser(tmp_path, monkeypatch, tables):
    monkeypatch.setattr(figures, "MAX_PNG", 30_000)
    paths = figures.save_figure(figures.table2(tables["ablation"]), "t", tmp_path, tables["paper2"], "c", "toy")
    assert paths["png"].stat().st_size < 30_000


def test_toy_figures_say_so_once_and_paper_figures_do_not(tables, tmp_path):
    fig = figures.table2(tables["ablation"])
    for _ in range(2):
        figures.save_figure(fig, "t", tmp_path, tables["paper2"], "c", "toy")
    assert [t.get_text() for t in _texts(fig)].count("toy profile") == 1
    fig = figures.table2(tables["ablation"])
    figures.save_figure(fig, "t", tmp_path, tables["paper2"], "c", "paper-4b")
    assert not [t for t in _texts(fig) if "profile" in t.get_text()]


def test_the_papers_numbers_are_hollow_and_named(tables):
    fig = figures.table1(tables["ours"], tables["published"])
    diamonds = [c for c in fig.axes[0].collections if c.get_label() == "paper (8B, full data)"]
    assert len(diamonds) == 1 and len(diamonds[0].get_facecolor()) == 0
    assert "paper (8B, full data)" in [t.get_text() for t in fig.legends[0].get_texts()]
    fig = figures.table2(tables["ablation"], tables["paper2"])
    assert len(fig.axes) == 2 and "paper (8B, full data)" in fig.axes[1].get_title("left")  # an axis of their own


def test_figure3_shares_its_bins_and_states_what_did_not_move(tables):
    fig = figures.figure3(tables["steered"], bins=17)
    edges = [sorted({round(p.get_x(), 9) for p in ax.patches}) for ax in fig.axes[:2]]
    assert edges[0] == edges[1] and len(edges[0]) == 17
    assert "unchanged 100 %" in fig.axes[1].texts[0].get_text() and "unchanged 0 %" in fig.axes[0].texts[0].get_text()


def test_label_figure_counts_what_it_cannot_draw(tables):
    fig = figures.label_auroc(tables["judged"])
    assert "1 abstained, 1 not scored" in fig.axes[0].get_xlabel()
    silent = tables["judged"].assign(auroc=np.nan)
    with pytest.raises(DataError, match="1 abstained"):
        figures.label_auroc(silent)


def test_direct_labels_do_not_overlap_on_linear_and_symlog_axes(tables):
    fig = figures.dose_response(tables["dose"])
    fig.draw_without_rendering()
    for ax in fig.axes:
        boxes = sorted((t.get_window_extent() for t in ax.texts), key=lambda b: b.y0)
        assert len(boxes) >= 2 and all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))
    ax = fig.axes[0]
    label = next(t for t in ax.texts if t.get_text().endswith(" T"))
    end = ax.transData.transform((1, ax.lines[0].get_ydata()[-1]))[1]
    assert abs(end - label.get_window_extent().get_points()[:, 1].mean()) < 12  # beside its own line


@pytest.mark.parametrize("draw, message", [
    (lambda: figures.sae_training(pd.DataFrame({"step": [1]})), "none of loss"),
    (lambda: figures.sae_training(pd.DataFrame({"loss": [1.0]})), r"\['step'\] are missing"),
    (lambda: figures.feature_density(np.zeros(5)), "all features are dead"),
    (lambda: figures.figure3(pd.DataFrame({"reward": [0.0, 1], "reward_steered": [0.0, 1], "is_target": [True, True]})),
     "complement C is empty"),
    (lambda: figures.table1(pd.DataFrame(columns=["model", "subset", "value"])), "empty table"),
    (lambda: figures.table2(pd.DataFrame({"variant": ["a"], "value": [1.0]}),
                            pd.DataFrame({"variant": ["b"], "value": [1.0]})), "no row of ours"),
    (lambda: figures.claims_forest(pd.DataFrame([dict.fromkeys(("value", "lo", "hi", "band_lo", "band_hi"), np.nan)
                                                 | {"id": "C9", "text": "", "verdict": ""}])), "C9")])
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(DataError, match=message):
        draw()
    plt.close("all")
