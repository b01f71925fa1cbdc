"""Every figure of the project: plain tables in, a matplotlib figure out.

Column (3.3 in) or page (6.9 in) wide, 9-point text, and never colour alone: markers, hatches or words repeat
it.  Intervals (columns lo, hi) are 95 %.  Numbers printed in the paper are hollow diamonds.
"""

import io
import textwrap
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from sarmlib.errors import DataError
from sarmlib.store import write_atomic

COLUMN, PAGE, SMALL = 3.3, 6.9, 8
PALETTE = sns.color_palette("colorblind").as_hex()
BLUE, ORANGE, RED, SKY = PALETTE[0], PALETTE[1], PALETTE[3], PALETTE[9]
GREY, DARK, GRID = "#808080", "#333333", "#DDDDDD"
MARKERS, MARKER_TEXT, STYLES = "osD^vPX*", "●■◆▲▼✚✖★", ("-", "--", "-.", ":")
THIN = {"color": GREY, "lw": 0.8, "zorder": 0}
PAPER = {"marker": "D", "s": 28, "facecolors": "none", "edgecolors": DARK, "linewidths": 1, "zorder": 5}
STYLE = {
    **sns.axes_style("ticks"), **sns.plotting_context("paper"), "figure.dpi": 110,
    **dict.fromkeys(["font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize",
                     "legend.fontsize"], 9),
    **dict.fromkeys(["axes.linewidth", "xtick.major.width", "ytick.major.width"], 0.7),
    "font.family": "DejaVu Sans", "legend.frameon": False, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "xtick.major.size": 3, "ytick.major.size": 3,
    "lines.linewidth": 1.3, "lines.markersize": 4, "hatch.linewidth": 0.5, "pdf.fonttype": 42}


_figure = mpl.rc_context(STYLE)  # as a decorator: the house style while a figure is drawn or written


def _short(text: str, width: int, lines: int = 1) -> str:
    """Text wrapped to ``width`` and cut after so many lines; a dollar sign starts no formula."""
    return textwrap.fill(text, width, max_lines=lines, placeholder="…").replace("$", r"\$")


def _words(label, width: int, lines: int = 1) -> str:
    """What a feature goes with, on so many lines: the first terms of a list that fit, whole."""
    text = str(label).split("; less often: ")[0].removeprefix("more often: ")
    terms = text.split(", ") if "”" in text else [text]
    while len(terms) > 1 and len(textwrap.wrap(", ".join(terms), width)) > lines:
        terms.pop()
    return _short(", ".join(terms), width, lines)


class Drawing(Figure):
    """A figure outside pyplot, with its alternative text; a notebook shows it as a PNG."""

    alt = ""

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/png": self.image("png", dpi=110)}, {"image/png": {"alt": self.alt}}

    @_figure
    def image(self, kind: str, **options) -> bytes:
        """The file as "png" or "pdf"; the same figure gives the same bytes."""
        buffer, unstable = io.BytesIO(), {"png": ["Software"], "pdf": ["CreationDate", "Producer"]}
        self.savefig(buffer, format=kind, metadata=dict.fromkeys(unstable[kind]), **options)
        return buffer.getvalue()


def save(fig: Drawing, data: pd.DataFrame, name: str, folder, note: str = "") -> Drawing:
    """Write ``name``.png, .pdf, .csv (the numbers) and .txt (alternative text), and return the figure.

    ``note``, for example the profile, stands in small grey letters."""
    folder, strip = Path(folder), 0.12 / fig.get_figheight()
    folder.mkdir(parents=True, exist_ok=True)
    if note and not any(text.get_gid() == "note" for text in fig.texts):
        fig.set_layout_engine("constrained", rect=(0, strip, 1, 1 - strip))
        fig.text(0.995, 0.005, note, ha="right", va="bottom", fontsize=6.5, color=GREY, gid="note")
    data = data.map(lambda cell: f"'{cell}" if isinstance(cell, str) and cell.lstrip()[:1] in tuple("=+-@") else cell)
    files = {"png": fig.image("png", dpi=200, pil_kwargs={"optimize": True}), "pdf": fig.image("pdf"),
             "csv": data.to_csv(index=False, float_format="%.6g", lineterminator="\n"),
             "txt": f"{fig.alt} {note}".strip() + "\n"}
    for suffix, content in files.items():
        write_atomic(folder / f"{name}.{suffix}", content)
    return fig


def _need(data, *columns) -> pd.DataFrame:
    missing = [name for name in columns if name not in data]
    if missing or not len(data):
        raise DataError(f"nothing to draw: {f'columns {missing} are missing' if missing else 'empty table'}")
    return data


def _axes(width, height, cols=1, **kwargs):
    fig = Drawing(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(1, cols, **kwargs)


def _done(fig, title: str, alt: str, names=(), values=(), form="", legend=0) -> Drawing:
    """Bold title over the whole figure; a legend of ``legend`` columns below it, points with intervals first."""
    lines = textwrap.fill(title, int(fig.get_figwidth() * 13.5))
    fig.suptitle(lines, x=0.01, ha="left", fontsize=9, weight="bold")
    listed = "; ".join(f"{name} {value:{form}}" for name, value in zip(names, values, strict=True))
    fig.alt = f"{title}. {alt}{listed and ': '}{listed}.".translate({10: ", ", 160: " "}).replace(r"\$", "$")
    handles = sorted(fig.axes[0].get_legend_handles_labels()[0],
                     key=lambda handle: not isinstance(handle, mpl.container.Container))
    if legend and len(handles) > 1:  # one kind alone needs no legend
        fig.legend(handles=handles, loc="outside lower center", ncols=min(legend, len(handles)),
                   handletextpad=0.4, columnspacing=1.2, borderpad=0, borderaxespad=0.2)
    return fig


def _errors(ax, data, value, position, i=0, *, vertical=False, **kwargs):
    """Points of series ``i`` (the first is filled) with their interval lo-hi, when the table has one."""
    spans = np.abs([data[value] - data[end] for end in ("lo", "hi")]) if "lo" in data else None
    xy = (position, data[value]) if vertical else (data[value], position)
    look = {"fmt": MARKERS[i % 8], "color": PALETTE[i % 10], "mfc": "white" if i else BLUE,
            "ms": 4.5, "capsize": 2, "elinewidth": 1}
    ax.errorbar(*xy, **{"yerr" if vertical else "xerr": spans}, **look | kwargs)


def _dodged(ax, data, row, series, value, **kwargs) -> list:
    """One marker per ``series`` with its interval, side by side within each ``row``; the rows' names."""
    names, kinds = list(pd.unique(data[row])), list(pd.unique(data[series]))
    for i, kind in enumerate(kinds):
        part = data[data[series] == kind]
        place = np.array([names.index(name) for name in part[row]]) + (i - (len(kinds) - 1) / 2) * 0.16
        _errors(ax, part, value, place, i, label=str(kind), **kwargs)
    return names


def _told_apart(ax, data, value, filled: pd.Series, words=("", "")) -> None:
    """A row each: points with intervals, filled where ``filled``; a kind is in the legend if it has words."""
    place = np.arange(len(data))
    for mask, face, word in ((filled.to_numpy(), BLUE, words[0]), (~filled.to_numpy(), "white", words[1])):
        if mask.any():
            _errors(ax, data[mask], value, place[mask], mfc=face, label=word, zorder=4)


def _names_at(ax, x, y, texts, **kwargs) -> None:
    place = {"xytext": (3, 0), "va": "center"} | kwargs
    for a, b, text in zip(x, y, texts, strict=True):
        ax.annotate(text, (a, b), textcoords="offset points", fontsize=SMALL, **place)


def _end_labels(ax, ends, names) -> None:
    """The name of each series at the right edge, at its line's end (in data) or below the one above it."""
    ax.get_ylim()  # settles pending autoscaling
    heights = (ax.transData - ax.transAxes).transform([(1, end) for end in ends])[:, 1]
    place = np.inf
    for i in np.argsort(-heights, kind="stable"):
        place = min(heights[i], place - 0.09)
        ax.text(1.02, place, f"{MARKER_TEXT[i % 8]} {names[i]}", color=PALETTE[i % 10], va="center",
                transform=ax.transAxes, fontsize=SMALL)


def _rows(ax, names, size=9) -> None:
    """One row per name, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", lw=0.4, color=GRID)
    ax.tick_params(axis="y", length=0, labelsize=size)


@_figure
def architecture() -> Drawing:
    """How SARM turns a text into a reward: what is trained, what is frozen, what is left out."""
    fig, ax = _axes(PAGE, 2.0)
    ax.set(xlim=(0, 6.9), ylim=(0.05, 1.75))
    ax.axis("off")
    trained, frozen, out = ("#B9DCF2", BLUE, "-"), (GRID, DARK, "-"), ("none", GREY, "--")
    for x, width, y, height, (face, edge, style), words in (
            (1.35, 1.25, 0.5, 0.62, trained, "decoder layers\n1 … $l$\ntrained in stage 2"),
            (1.35, 1.25, 1.24, 0.46, out, "layers $l$+1 … $L$"),
            (3.28, 1.08, 0.5, 0.62, frozen, "SAE encoder,\nTopK: frozen\nafter stage 1"),
            (5.14, 0.88, 0.5, 0.62, trained, "linear head $w$\ntrained\nin stage 2")):
        ax.add_patch(mpl.patches.FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.06",
                                                fc=face, ec=edge, ls=style, lw=1.2))
        ax.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=SMALL)
    ax.plot([1.38, 2.57], [[1.26, 1.68], [1.68, 1.26]], color=GREY, lw=0.9, alpha=0.6)
    for x, cells in ((0.86, [*[GRID] * 5, BLUE]), (2.8, [BLUE] * 6), (4.6, ["w", BLUE, "w", "w", BLUE, "w"])):
        ax.bar(x, 0.103, 0.17, 0.5 + 0.103 * np.arange(6), align="edge", color=cells, ec=DARK, lw=0.7)
    arrow = {"arrowstyle": "-|>", "color": DARK, "lw": 1, "shrinkA": 0, "shrinkB": 0}
    for start, end in ((0.6, 0.84), (1.05, 1.33), (2.62, 2.78), (2.99, 3.26), (4.38, 4.58), (4.79, 5.12),
                       (6.04, 6.26)):
        ax.annotate("", (end, 0.81), (start, 0.81), arrowprops=arrow)
    for x, y, words in (
            (0.3, 0.81, "prompt\nand\nanswer"), (0.945, 0.28, "tokens,\nthe last in blue"),
            (3.0, 1.47, "discarded"), (2.885, 0.28, "state $x$ of the\nlast token"),
            (4.685, 0.28, "$k$ active of\n$M$ features $z$"), (6.57, 0.81, "reward\n$r=\\Sigma_i w_i z_i$")):
        ax.text(x, y, words, ha="center", va="center", fontsize=SMALL)
    return _done(fig, "SARM: a decoder cut after layer $l$, a frozen sparse encoder, and a linear head",
                 "The layers below and the head are trained on preferences")


@_figure
def sae_training(log: pd.DataFrame) -> Drawing:
    """Error, unexplained variance and silent features over optimiser steps, one line per ``run``."""
    log = _need(log, "run", "step", "loss", "fvu", "dead_fraction").assign(silent=100 * log["dead_fraction"])
    panels = {"loss": "normalised error", "fvu": "unexplained variance", "silent": "silent features (%)"}
    fig, axes = _axes(PAGE, 2.2, 3)
    for ax, (column, text) in zip(axes, panels.items(), strict=True):
        for i, (run, part) in enumerate(log.groupby("run", sort=False)):
            ax.plot(part["step"], part[column], STYLES[i % 4], color=PALETTE[i % 10], label=str(run))
        ax.set(xlabel="optimiser steps", title=text, ylim=(0, None))
        ax.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
    last = log.groupby("run", sort=False)["fvu"].last()
    return _done(fig, "The autoencoders learn to reconstruct the states they read",
                 "Variance unexplained at the end", last.index, last, ".3f", legend=3)


def reward_training(data: pd.DataFrame) -> Drawing:
    """Held-out accuracy over pairs seen (``step``): mean over seeds with a 95 % t interval per variant."""
    groups = _need(data, "variant", "step", "accuracy").groupby(["variant", "step"], sort=False)["accuracy"]
    mean, half = 100 * groups.mean(), 100 * groups.sem() * student_t.ppf(0.975, (groups.size() - 1).clip(1))
    stats = pd.DataFrame({"value": mean, "lo": mean - half, "hi": mean + half}).reset_index()
    return curves(stats, "step", "Accuracy on held-out pairs during reward training",
                  "training pairs seen (95 % intervals over seeds)", "accuracy (%)")


@_figure
def curves(data: pd.DataFrame, x: str, title: str, xlabel: str, ylabel: str) -> Drawing:
    """One line per ``variant``: value, lo, hi (percent) over ``x``, a log scale, side by side so that intervals can
    be read."""
    data = _need(data, "variant", x, "value", "lo", "hi")
    data = data.assign(lo=data["lo"].clip(lower=0), hi=data["hi"].clip(upper=100)).sort_values(x, kind="stable")
    sizes, names = data[x].unique(), list(data["variant"].unique())
    ends = data.groupby("variant")["value"].last()[names]
    fig, ax = _axes(PAGE, 2.6)
    for i, name in enumerate(names):
        part = data[data["variant"] == name]
        place = part[x] * (sizes[-1] / sizes[0]) ** (0.012 * (i - (len(names) - 1) / 2))
        _errors(ax, part, "value", place, i, vertical=True, ms=4, elinewidth=0.8, ls=STYLES[i % 4])
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{n:,.0f}" for n in sizes])
    ax.minorticks_off()
    ax.set(xlabel=xlabel, ylabel=ylabel)
    _end_labels(ax, ends, names)
    return _done(fig, title, f"After {sizes[-1]:g} pairs, in percent", names, ends, ".1f")


@_figure
def feature_weights(features: pd.DataFrame) -> Drawing:
    """Head weight against correlation with preference; the area is the sd of w_i z_i."""
    data = _need(features, "feature", "w", "preference_corr", "contribution_sd", "label")
    data = _need(data[(data["contribution_sd"] > 0) & data["preference_corr"].notna()])
    data = data.sort_values("contribution_sd", ascending=False)
    fig, ax = _axes(PAGE, 2.9)
    agree = np.sign(data["w"]) == np.sign(data["preference_corr"])
    area = 5 + 90 * data["contribution_sd"] / data["contribution_sd"].max()
    for mask, marker, face, edge, word in ((agree, "o", BLUE, BLUE, "same sign"),
                                           (~agree, "s", "none", RED, "opposite sign")):
        look = {"marker": marker, "facecolors": face, "edgecolors": edge, "alpha": 0.65, "linewidths": 0.8}
        ax.scatter(data["preference_corr"][mask], data["w"][mask], s=area[mask], **look)
        ax.scatter([], [], s=18, label=f"{word} ({mask.sum()} features)", **look)
    ax.axvline(0, **THIN)
    ax.axhline(0, **THIN)
    known = data.dropna(subset=["label"]).head(5).sort_values("w", ascending=False)
    for height, row in zip(np.linspace(0.95, 0.05, len(known)), known.itertuples(), strict=True):
        ax.annotate(_words(row.label, 30, 2), (row.preference_corr, row.w), (1.03, height), textcoords=ax.transAxes,
                    va="center", fontsize=SMALL, arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6})
    ax.margins(0.08)
    ax.set(xlabel="correlation with being chosen, within prompts", ylabel="head weight $w_i$")
    return _done(fig, "Head weights against what people prefer",
                 f"{agree.sum()} of {len(data)} features have a weight of the same sign as their correlation",
                 legend=3)


@_figure
def label_auroc(judged: pd.DataFrame) -> Drawing:
    """Held-out AUROC of the best 12 labels, beside shuffled activity and judges that read no label."""
    data = _need(judged, "label", "auroc", "auroc_lo", "auroc_hi", "null_95", "reliable", "verdict")
    silent = int(data["verdict"].astype(str).str.startswith("abstained").sum())
    scored = data.dropna(subset=["auroc"]).sort_values("auroc", ascending=False)
    if not len(scored):
        raise DataError(f"no label has a held-out score: {silent} abstained, the others fire too rarely")
    shown = scored.head(12).rename(columns={"auroc_lo": "lo", "auroc_hi": "hi"})
    place = np.arange(len(shown))
    fig, ax = _axes(PAGE, 1.5 + 0.28 * len(shown))
    _told_apart(ax, shown, "auroc", shown["reliable"] == 1, ("label, reliable", "label, not reliable"))
    trivial = shown[["auroc_length", "auroc_domain", "auroc_reward"]].max(axis=1)
    ax.plot(trivial, place, "^", ms=4.5, mfc="none", mec=ORANGE, label="length, domain or reward alone")
    _rows(ax, [f"{_words(row.label, 40, 2)} ({row.feature})" for row in shown.itertuples()], SMALL)
    null = shown["null_95"].max()
    ax.set_xlabel(f"held-out AUROC; chance is 0.5, and 95 % of shuffled\nactivities stay below {null:.2f}")
    return _done(fig, "How well labels predict where features fire, on prompts not seen before",
                 f"{data['reliable'].sum()} of {len(data)} labels are reliable; {silent} abstained; "
                 f"{len(data) - silent - len(scored)} could not be scored", legend=3)


@_figure
def concepts(data: pd.DataFrame) -> Drawing:
    """Held-out AUROC of the best single feature per concept and representation."""
    data = _need(data, "concept", "representation", "auroc").dropna(subset=["auroc"])
    return _dots(data.rename(columns={"auroc_lo": "lo", "auroc_hi": "hi"}), "concept", "representation",
                 "held-out AUROC of one feature", "The best single feature for each planted concept")


@_figure
def probe_report(data: pd.DataFrame) -> Drawing:
    """Held-out AUROC of a linear probe per attribute and model."""
    return _dots(_need(data, "attribute", "model", "auroc"), "attribute", "model", "held-out AUROC",
                 "What a linear probe reads from the state of the last token")


def _dots(data, row: str, series: str, xlabel: str, title: str) -> Drawing:
    """AUROC: one row per ``row``, one marker per ``series``, chance at 0.5."""
    fig, ax = _axes(PAGE, 1.1 + 0.2 * data[row].nunique())
    ax.axvline(0.5, ls=":", label="chance", **THIN)
    names = _dodged(ax, data, row, series, "auroc", capsize=0, ms=4)
    _rows(ax, [str(name).replace(":", ": ") for name in names])
    ax.set(xlabel=xlabel, xlim=(min(0.45, ax.get_xlim()[0]), 1.02))
    means = data.groupby(series, sort=False)["auroc"].mean()
    return _done(fig, title, "Mean AUROC", means.index, means, ".2f", legend=3)


@_figure
def figure3(table: pd.DataFrame, title="Steering one feature") -> Drawing:
    """The paper's Figure 3: rewards before and after steering in T and C, and a tick for each that moved.

    table: of :func:`sarmlib.sarm.steering.table_from_scores`; title: what was steered, in words; the shares of T
    and C that moved are added to it.  Raises DataError when T or C is empty."""
    table = _need(table, "reward", "reward_steered", "active", "is_target")
    both = np.r_[table["reward"], table["reward_steered"]]
    edges = np.linspace(both.min(), both.max() + 1e-9, 41)
    fig, axes = _axes(PAGE, 2.8, 2, sharex=True, sharey=True)
    moved, target = [], table["is_target"].to_numpy(bool)
    for ax, mask, name in zip(axes, (target, ~target), ("(a) target set T", "(b) complement C"), strict=True):
        part = table[mask]
        if not len(part):
            raise DataError(f"{name[4:]} is empty; Figure 3 needs both sets")
        before, after, percent = part["reward"], part["reward_steered"], np.full(len(part), 100 / len(part))
        ax.hist(before, edges, weights=percent, color=BLUE, alpha=0.45, label="before")
        ax.stairs(np.histogram(after, edges, weights=percent)[0], edges, color=ORANGE, lw=1.4, label="after")
        for values, place, colour, word in ((before, 0.1, BLUE, "before"), (after, 0.035, ORANGE, "after")):
            ax.vlines(values[before != after], place - 0.028, place + 0.028, color=colour, lw=0.7, alpha=0.7,
                      transform=ax.get_xaxis_transform())
            ax.plot([], [], "|", color=colour, ms=7, label=f"one that moved, {word}")
        ax.axhline(0, color=DARK, lw=0.7, zorder=3)
        shift = after - before
        moved.append(f"{100 * (shift != 0).mean():.1f}\u00a0%\u00a0of {name[-1]}")
        ax.set(title=f"{name}, n = {len(part)}\nmean shift {shift.mean():+.2f}", xlabel="reward")
    top = max(ax.dataLim.y1 for ax in axes)
    axes[0].set(ylabel="responses (%)", ylim=(-0.17 * top, 1.05 * top))
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if 0 <= tick <= 1.05 * top])
    panels = "; ".join(ax.get_title("left") for ax in axes)
    return _done(fig, f"{title}: {moved[0]} moves, {moved[1]}", panels, legend=4)


@_figure
def shift_by_set(summary: pd.DataFrame) -> Drawing:
    """Mean shift with interval and share of active responses, in T and in the parts of C."""
    data = _need(summary, "set", "n", "shift", "shift_lo", "shift_hi", "share_active")
    data = data.rename(columns={"shift_lo": "lo", "shift_hi": "hi"})
    data = data[data["set"] != "C"] if len(data) > 2 else data
    place, share = np.arange(len(data)), 100 * data["share_active"]
    fig, axes = _axes(PAGE, 0.9 + 0.27 * len(data), 2, sharey=True)
    axes[0].axvline(0, **THIN)
    _errors(axes[0], data, "shift", place)
    axes[1].barh(place, share, height=0.5, color=ORANGE)
    _names_at(axes[1], share, place, share.map("{:.1f}".format))
    _rows(axes[0], data["set"] + " (n = " + data["n"].astype(str) + ")")
    axes[0].set_xlabel("mean shift, 95 % interval")
    axes[1].set(xlabel="feature active (%)", xlim=(0, 108))
    axes[1].tick_params(axis="y", length=0)
    return _done(fig, "Which responses move", "Mean shift", data["set"], data["shift"], "+.2f")


@_figure
def dose_response(data: pd.DataFrame, used: float) -> Drawing:
    """Mean shift of T and C, and accuracy per subset, over the factor; ``used`` is marked."""
    data = _need(data, "dose", "quantity", "value", "lo", "hi")
    accuracy = data["quantity"].str.startswith("accuracy ")
    small = data.loc[~accuracy & data["dose"].between(0, 2), "value"].abs().max() or 1
    fig, axes = _axes(PAGE, 2.7, 2)
    axes[0].set_yscale("symlog", linthresh=small)
    for ax, part, ylabel, scale in ((axes[0], data[~accuracy], "mean reward shift", 1),
                                    (axes[1], data[accuracy], "accuracy (%)", 100)):
        ends = {}
        for i, (name, line) in enumerate(part.groupby("quantity", sort=False)):
            dose, value, lo, hi = (line["dose"], *(scale * line[column] for column in ("value", "lo", "hi")))
            ax.plot(dose, value, STYLES[i % 4], marker=MARKERS[i % 8], color=PALETTE[i % 10], ms=3)
            ax.fill_between(dose, lo, hi, color=PALETTE[i % 10], alpha=0.12, lw=0)
            ends[name.split(" ", 1)[1]] = value.iloc[-1]
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xticks([dose for dose in (-8, 0, 2, 8, 160) if part["dose"].min() <= dose <= part["dose"].max()])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        for dose, word, style, side in ((1, "unchanged", ":", "right"), (used, f"used: {used:g}", "--", "left")):
            ax.axvline(dose, ls=style, **THIN)
            ax.text(dose, 1.01, word, transform=ax.get_xaxis_transform(), ha=side, fontsize=SMALL)
        ax.set(xlabel="factor on the weight (bands: 95 %)", ylabel=ylabel)
        _end_labels(ax, ends.values(), list(ends))
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if tick == 0 or abs(tick) >= small])
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].minorticks_off()
    end = data[data["dose"] == used]
    return _done(fig, "How far the factor moves rewards, and what it does to preferences",
                 f"At factor {used:g}", end["quantity"], end["value"], ".3g")


@_figure
def selectivity(controls: pd.DataFrame) -> Drawing:
    """Mean shift of T against that of C, for every edit of ``SteeringAnalysis.controls``."""
    data = _need(controls, "kind", "chosen", "t_shift", "c_shift")
    chosen, random = data[data["chosen"].astype(bool)], data[data["kind"] == "random"]
    others = data.drop([*chosen.index, *random.index])
    fig, ax = _axes(COLUMN, 3.3)
    for part, word, marker, size, face, edge in (
            (random, f"random directions ({len(random)})", "x", 3.5, GREY, GREY),
            (others, f"other features ({len(others)})", "o", 3.7, SKY, DARK),
            (chosen, "chosen feature", "*", 10.5, RED, DARK)):
        ax.plot("c_shift", "t_shift", marker, data=part, label=word, ms=size, mfc=face, mec=edge, mew=0.8)
    ax.axvline(0, **THIN)
    ax.axhline(0, **THIN)
    ax.axline((0, 0), slope=1, ls="--", label="T and C move alike", **THIN)
    ax.margins(0.08)
    ax.set(xlabel="mean shift of C", ylabel="mean shift of T")
    return _done(fig, "The chosen feature among all others, at the same edit size",
                 "It moves", "TC", chosen[["t_shift", "c_shift"]].iloc[0], "+.2f", legend=1)


@_figure
def table1(data: pd.DataFrame) -> Drawing:
    """Score per ``subset`` and ``model`` with interval (percent); the paper's values on their own axis."""
    data = _need(data, "model", "subset", "value", "paper")
    printed = data.drop_duplicates("subset")
    fig, axes = _axes(PAGE, 1.15 + 0.28 * len(printed), 2, sharey=True, width_ratios=[1.8, 1])
    subsets = _dodged(axes[0], data, "subset", "model", "value")
    axes[1].scatter(printed["paper"], range(len(subsets)), **PAPER)
    for ax, title in zip(axes, ("this run (95 % over seeds that differ)", "◇ the paper, 4B"), strict=True):
        _rows(ax, ["Overall" if name == "overall" else name for name in subsets])
        ax.set(xlabel="score (%)", title=title)
        ax.margins(x=0.08)
    first = data[data["model"] == data["model"].iloc[0]]
    return _done(fig, "RewardBench 2 by subset", f"{first['model'].iloc[0]}, in percent", first["subset"],
                 first["value"], ".1f", legend=4)


@_figure
def table2(data: pd.DataFrame) -> Drawing:
    """One row per variant: mean, interval, one tick per seed; the paper's numbers on their own axis."""
    data = _need(data, "variant", "value", "lo", "hi", "points", "paper")
    data = data.assign(row=np.arange(len(data)))
    fig, axes = _axes(PAGE, 1.15 + 0.3 * len(data), 2, sharey=True, width_ratios=[1.8, 1])
    _errors(axes[0], data, "value", data["row"], label="mean and 95 % interval")
    axes[0].plot("points", "row", "|", data=data.explode("points"), ms=7, color=DARK, label="one seed")
    axes[1].scatter("paper", "row", data=data, **PAPER)
    axes[1].margins(x=0.25)
    for ax, column, title in zip(axes, ("value", "paper"), ("this run", "◇ the paper, 4B"), strict=True):
        known = data.dropna(subset=[column])
        words = known[column].map("{:.1f}".format)
        _names_at(ax, known[column], known["row"], words, xytext=(0, 5), ha="center", va="baseline")
        _rows(ax, data["variant"])
        ax.set(xlabel="score (%)", title=title, ylim=(len(data) - 0.5, -0.75))
    return _done(fig, "The same reward model with other encoders", "This run, in percent", data["variant"],
                 data["value"], ".1f", legend=3)


@_figure
def differences(data: pd.DataFrame, title="SARM against each of the others") -> Drawing:
    """Paired differences with interval (points of percent), one row per ``variant``; zero is marked."""
    data = _need(data, "variant", "value", "lo", "hi")
    fig, ax = _axes(PAGE, 1.1 + 0.26 * len(data))
    ax.axvline(0, ls=":", **THIN)
    decided = (data["lo"] > 0) | (data["hi"] < 0)
    _told_apart(ax, data, "value", decided)
    _rows(ax, data["variant"])
    ax.set_xlabel("SARM minus the other, percentage points\n(hollow: undecided, the 95 % interval holds 0)")
    return _done(fig, title, "SARM minus the other", data["variant"], data["value"], "+.1f")


@_figure
def claims(verdicts: pd.DataFrame) -> Drawing:
    """Each claim with a value on a scale of its own, by kind; right of the dashed line is for the claim."""
    data = _need(verdicts.dropna(subset=["value"]), "id", "title", "kind", "low", "threshold", "direction", "verdict")
    order = {"evidence": 0, "implementation": 1, "construction": 2}
    data = data.sort_values("kind", key=lambda kind: kind.map(order), kind="stable")
    first = (data["kind"] != data["kind"].shift()).to_numpy()  # below a heading
    marks, place = _on_one_scale(data), np.arange(len(data)) + np.cumsum(first)
    fig, ax = _axes(PAGE, 1.0 + 0.25 * (place[-1] + 1))
    for word, marker, face, edge in (("holds", "o", BLUE, BLUE), ("does not hold here", "X", RED, RED),
                                     ("undecided", "o", "white", BLUE)):
        mask = data["verdict"] == word
        ax.plot(marks["value"][mask], place[mask], marker, mfc=face, mec=edge, ms=5.5, zorder=3, label=word)
    ax.hlines(place, marks["low"], marks["high"], color=DARK, lw=1.2, label="95 % interval")
    ax.vlines(marks["threshold"], place - 0.38, place + 0.38, ls="--", color=DARK, lw=1,
              label="threshold of the claim")
    middle = (marks["band_lo"] + marks["band_hi"]) / 2
    reach = (marks["band_hi"] - marks["band_lo"]).abs().div(2).clip(lower=0.025)  # a band of one value shows too
    ax.hlines(place, middle - reach, middle + reach, color=SKY, alpha=0.45, lw=10, zorder=1,
              label="band of earlier runs" if middle.notna().any() else None)
    for y, kind in zip(place[first] - 1, data["kind"][first], strict=True):
        words = kind if kind == "evidence" else f"by {kind}"
        ax.text(0.5, y, words, ha="center", va="center", fontsize=SMALL, style="italic")
    for y, row in zip(place, data.itertuples(), strict=True):
        interval = f" [{row.low:.2g}, {row.high:.2g}]" if row.low < row.high else ""
        ax.text(1.08, y, f"{row.value:.2g}{interval}", va="center", fontsize=SMALL)
    names = pd.Series("", range(place[-1] + 1))
    names[place] = (data["id"] + "  " + data["title"].map(lambda text: _short(text, 60))).to_numpy()
    _rows(ax, names, SMALL)
    ax.set(xlim=(-0.06, 1.06), xticks=[], xlabel="right of the dashed line: for the claim")
    ax.spines[["left", "bottom"]].set_visible(False)
    return _done(fig, "Every claim, measured", "Verdicts", data["id"], data["verdict"], legend=3)


def _on_one_scale(data) -> pd.DataFrame:
    """Value, interval, threshold and band of each claim, scaled to 0..1 and turned: right is for the claim."""
    marks = data[["value", "low", "high", "threshold", "band_lo", "band_hi"]].astype(float)
    least, most, below = marks.min(axis=1), marks.max(axis=1), data["direction"] == "<"
    marks = marks.sub(least, axis=0).div((most - least).replace(0, 1), axis=0)
    banded = marks[["band_lo", "band_hi"]].notna().any(axis=1)
    marks.loc[banded] = marks.fillna({"band_lo": 0, "band_hi": 1})  # a band without an end goes on to the edge
    return marks.mask(below, 1 - marks)


@_figure
def waterfall(explanation) -> Drawing:
    """Why an answer won, or got its reward: one bar per feature, from where the one above ends.

    The ten labelled features that pay most; the smaller ones, and those without a label (if any has one), are
    one bar each, so that the bars always end at the margin or reward.  Raises DataError without such features."""
    parts, pair = _parts(explanation), "z_chosen" in explanation.table
    if not parts:
        raise DataError("nothing to draw: no active feature " + ("tells the answers apart" if pair else "pays"))
    names, steps = [name for name, _ in parts], np.array([step for _, step in parts])
    total = steps.sum()
    form = "+.2f" if abs(total) >= 0.1 else "+.2g"
    fig, ax = _axes(PAGE, 1.5 + (0.29 if pair else 0.22) * (len(steps) + 1))
    whom, look = "the chosen answer" if pair else "the answer", {"height": 0.62, "edgecolor": "white", "lw": 0}
    ends, place = np.cumsum(steps), np.arange(len(steps))
    starts = ends - steps
    for mask, colour, hatch, word in ((steps >= 0, BLUE, "", "for"), (steps < 0, ORANGE, "////", "against")):
        if mask.any():
            ax.barh(place[mask], steps[mask], left=starts[mask], color=colour, hatch=hatch, label=f"{word} {whom}",
                    **look)
    ax.vlines(ends, place - 0.31, place + 1.31, color=GREY, lw=0.6)
    _names_at(ax, np.maximum(starts, ends), place, [f"{step:{form}}" for step in steps])
    ax.barh(len(steps), ends[-1], color=DARK, **look)
    _names_at(ax, [max(ends[-1], 0)], [len(steps)], [f"= {ends[-1]:{form}}"], weight="bold")
    ax.axvline(0, color=DARK, lw=0.7)
    ax.margins(x=0.1)
    ax.locator_params("x", nbins=6)  # long numbers would touch
    what = "margin: reward of the chosen answer\nminus that of the rejected" if pair else "reward"
    _rows(ax, [*names, what], SMALL)
    if not names[0].startswith("feature "):
        ax.text(-0.01, 1.0, "features, by the words they go with", ha="right", va="bottom", color=GREY,
                fontsize=SMALL, transform=ax.transAxes)
    ax.set_xlabel("$w_i\\,(z_i^{chosen} - z_i^{rejected})$, added up" if pair else "$w_i\\,z_i$, added up")
    prompt, *answers = (f"“{_short(text, 70)}”" for text in (explanation.prompt, *explanation.answers))
    outcome = "wins over" if total > 0 else "loses to" if total < 0 else "ties with"
    ending = f" {outcome} {answers[1]}" if pair else f" gets the reward {total:+.2f}"
    title = f"{prompt if explanation.prompt else ''} Why {answers[0]}{ending}".strip()
    return _done(fig, title, f"The largest parts of {total:{form}}", names[:3], steps[:3], form, legend=2)


def _parts(explanation, most: int = 10) -> list[tuple[str, float]]:
    """(words, contribution) of each bar; features that pay nothing have none."""
    table = explanation.table[explanation.table["contribution"] != 0]
    table = table.assign(label=table.get("label", ""))
    labelled = table["label"].astype(bool) | ~table["label"].astype(bool).any()
    named, unnamed = table[labelled], table[~labelled]["contribution"]
    parts = [(_bar_words(row), row.contribution) for row in named.head(most).itertuples()]
    more = explanation.n_active - len(explanation.table) + max(len(named) - most, 0)
    smaller = explanation.rest + named["contribution"].iloc[most:].sum()
    for n, words, value in ((len(unnamed), " without a label", unnamed.sum()), (more, " that pay less", smaller)):
        if n:
            parts.append((f"{n} feature{'s' * (n > 1)}{words}", value))
    return parts


def _bar_words(row) -> str:
    """A feature's label; for a pair, below it, in which answer it fires and whether that answer gains by it."""
    words = _words(row.label, 48) if row.label else f"feature {row.feature}"
    number = f" ({row.feature})" if row.label else ""
    if not hasattr(row, "z_chosen"):
        return words + number
    chosen, rejected = abs(row.z_chosen), abs(row.z_rejected)
    side = "chosen" if chosen > rejected else "rejected"
    where = f"{'stronger' if chosen and rejected else 'only'} in the {side} answer"
    return f"{words}\n{where}, {'earns' if (row.contribution > 0) == (side == 'chosen') else 'costs'} reward{number}"
