"""Figures of the benchmark question (RQ3): tables in, a matplotlib Figure out, in the style of `sarmlib.figures`."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .errors import DataError
from .figures import BLUE, DARK, GREY, ORANGE, PAGE, PALETTE, STYLES
from .figures import MARKER_TEXT as TEXT
from .figures import MARKERS as MARKS
from .figures import _axes as axes
from .figures import _end_labels as end_labels
from .figures import _errors as errors
from .figures import _figure as figure
from .figures import _need as need
from .figures import _titled as titled

PUBLISHED = "as printed in the paper (single runs)"


@figure
def table1_dots(ours: pd.DataFrame, published: pd.DataFrame, title: str = "", xlabel="RewardBench 2 overall (%)"
                ) -> Figure:
    """Table 1 as dots: our systems with intervals above, the published rows as hollow diamonds in a panel of their own.

    ours: columns model, value (percent), optional lo, hi; published: model, kind, value.  Two axes, because the rows
    are not comparable: other models, other data.
    """
    ours = need(ours, "model", "value")
    published = need(published, "model", "kind", "value").sort_values("value", kind="stable")
    fig, (ax, other) = axes(PAGE * 0.8, 0.9 + 0.19 * (len(ours) + len(published)), 2, 1,
                             height_ratios=[len(ours) + 0.6, len(published) + 0.6])
    place = np.arange(len(ours))[::-1]
    errors(ax, ours, "value", place, color=BLUE)
    ax.set_yticks(place, list(ours["model"]))
    ax.set(ylim=(-0.7, len(ours) - 0.3), title="here: mean and 95 % interval")
    for i, kind in enumerate(pd.unique(published["kind"])):
        part = published["kind"].to_numpy() == kind
        other.scatter(published["value"][part], np.flatnonzero(part), marker="Ds^"[i % 3], s=24, facecolors="none",
                      edgecolors=(DARK, ORANGE, BLUE)[i % 3], linewidths=1, label=str(kind))
    other.set_yticks(range(len(published)), list(published["model"]), fontsize=6.5)
    other.set(ylim=(-0.7, len(published) - 0.3), xlabel=xlabel, title=PUBLISHED)
    other.legend(loc="lower right", handletextpad=0.2)
    for one in (ax, other):
        one.grid(axis="y", lw=0.3, color="#DDDDDD")
        one.margins(x=0.08)
    return titled(fig, title)


@figure
def paired_differences(data: pd.DataFrame, title: str = "", xlabel="SARM minus variant (points)") -> Figure:
    """Table 2 as paired differences: one row per variant, mean and 95 % interval, one tick per seed; zero marked.

    Columns: variant, value, lo, hi (points of percent), optional points (a list per row) and published (the paper's own
    difference of single runs, a hollow diamond).
    """
    data = need(data, "variant", "value", "lo", "hi")
    place = np.arange(len(data))
    fig, ax = axes(PAGE * 0.75, 0.85 + 0.27 * len(data))
    ax.axvline(0, color=GREY, lw=0.8)
    if "points" in data:
        for i, points in enumerate(data["points"]):
            ax.scatter(points, np.full(len(points), i), marker="|", s=45, color=GREY, linewidths=0.9,
                       label="one seed" if i == 0 else None)
    decided = ((data["lo"] > 0) | (data["hi"] < 0)).to_numpy()
    for mask, face, word in ((decided, BLUE, "interval leaves zero out"), (~decided, "white", "undecided")):
        if mask.any():
            errors(ax, data[mask], "value", place[mask], color=BLUE, mfc=face, label=word, zorder=3)
    if "published" in data:
        known = data["published"].notna().to_numpy()
        ax.scatter(data["published"][known], place[known], marker="D", s=26, facecolors="none", edgecolors=DARK,
                   linewidths=1, zorder=4, label="paper, single runs")
    ax.set_yticks(place, list(data["variant"]))
    ax.set(xlabel=xlabel, ylim=(len(data) - 0.4, -0.6))
    ax.margins(x=0.08)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, handletextpad=0.3, columnspacing=1)
    return titled(fig, title)


@figure
def part_heat_map(table: pd.DataFrame, title: str = "", unit="%") -> Figure:
    """Scores per variant (rows) and subset (columns) with the number in every cell; absent cells are hatched.

    table: index = variants, columns = subsets, values in percent.  Colour only repeats the number.
    """
    if not table.size:
        raise DataError("nothing to draw: the table has no cell")
    values = table.to_numpy(dtype=float)
    fig, ax = axes(PAGE, 0.9 + 0.26 * len(table))
    low, high = np.nanmin(values), np.nanmax(values)
    image = ax.imshow(values, cmap="cividis", aspect="auto", vmin=low, vmax=high if high > low else low + 1)
    for (i, j), value in np.ndenumerate(values):
        if np.isnan(value):
            ax.add_patch(mpl.patches.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", ec=GREY, lw=0))
            continue
        dark = (value - low) / max(high - low, 1e-9) < 0.55
        ax.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    ax.set_xticks(range(table.shape[1]), [str(name) for name in table.columns])
    ax.set_yticks(range(len(table)), [str(name) for name in table.index])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    fig.colorbar(image, ax=ax, label=f"score ({unit})", pad=0.01)
    return titled(fig, title)


def reward_margins(rows: list[dict]) -> np.ndarray:
    """Reward of the chosen answer minus that of each rejected one, over scored best-of-N rows of RewardBench 2 [n]."""
    return np.array([row["scores"][0] - other for row in rows if row["subset"].lower() != "ties"
                     for other in row["scores"][1:]])


def calibration_table(margins: np.ndarray, right: np.ndarray | None = None, bins: int = 10) -> pd.DataFrame:
    """Predicted against observed preference: what Bradley-Terry says of a reward margin m, sigma(|m|), in equal-count
    bins, and the share of pairs with the right sign.

    margins [n]: reward of chosen minus that of rejected; ``right`` [n] defaults to margin > 0 (a tie counts half).
    Columns: predicted, observed, lo, hi (95 % Wilson interval), n.  All but n are shares in [0, 1].
    """
    margins = np.asarray(margins, float)
    right = (margins > 0) + 0.5 * (margins == 0) if right is None else np.asarray(right, float)
    predicted, rows = 1 / (1 + np.exp(-np.abs(margins))), []
    for part in np.array_split(np.argsort(predicted, kind="stable"), min(bins, len(margins))):
        n, p, z = len(part), float(right[part].mean()), 1.959964
        middle, half = (p + z**2 / (2 * n)) / (1 + z**2 / n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        half /= 1 + z**2 / n
        rows.append((float(predicted[part].mean()), p, middle - half, middle + half, n))
    return pd.DataFrame(rows, columns=["predicted", "observed", "lo", "hi", "n"])


@figure
def calibration_and_margins(margins: dict[str, np.ndarray], title: str = "", bins: int = 10) -> Figure:
    """Left: is sigma(margin) the accuracy?  Right: the margins.  margins: model -> [n] chosen minus rejected."""
    if not margins or not all(len(values) for values in margins.values()):
        raise DataError("nothing to draw: a model has no margins")
    fig, (ax, other) = axes(PAGE, 2.5, 1, 2)
    ax.plot([0.5, 1], [0.5, 1], color=GREY, lw=0.8, ls=":", label="calibrated")
    edges = np.quantile(np.concatenate([np.asarray(v, float) for v in margins.values()]), [0.005, 0.995])
    grid = np.linspace(*(edges if edges[0] < edges[1] else edges + [-1, 1]), 41)  # type: ignore[call-overload]
    for i, (name, values) in enumerate(margins.items()):
        values, colour = np.asarray(values, float), PALETTE[i % 10]
        table = calibration_table(values, bins=bins)
        ax.errorbar(table["predicted"], table["observed"], color=colour, fmt=MARKS[i % 8] + STYLES[i % 4], ms=3.5,
                    lw=0.9, mfc=colour if i == 0 else "white", elinewidth=0.7, label=name,
                    yerr=np.abs(np.array([table["observed"] - table["lo"], table["hi"] - table["observed"]])))
        other.hist(np.clip(values, grid[0], grid[-1]), grid, histtype="step", color=colour, ls=STYLES[i % 4], lw=1.2,
                   density=True)
    ax.set(xlabel="predicted: $\\sigma(|r_c - r_r|)$", ylabel="share of pairs in the right order", xlim=(0.48, 1.02))
    ax.set_ylim(min(0.45, ax.get_ylim()[0]), 1.03)
    other.axvline(0, color=GREY, lw=0.8)
    other.set(xlabel="margin $r_c - r_r$ (outermost bins hold the tails)", ylabel="density", yticks=[])
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(margins) + 1))
    return titled(fig, title)


@figure
def learning_curve(data: pd.DataFrame, title: str = "", ylabel="RewardBench 2 overall (%)") -> Figure:
    """Score against the number of training pairs (log scale), one line per variant, mean with interval over seeds.

    Columns: variant, pairs, value, lo, hi (percent).
    """
    data = need(data, "variant", "pairs", "value", "lo", "hi")
    fig, ax = axes(PAGE * 0.75, 2.7)
    ends, names = [], list(pd.unique(data["variant"]))
    for i, name in enumerate(names):
        part, colour = data[data["variant"] == name].sort_values("pairs"), PALETTE[i % 10]
        x = part["pairs"] * (1 + 0.022 * (i - (len(names) - 1) / 2))  # side by side, so that intervals can be read
        ax.plot(x, part["value"], STYLES[i % 4], color=colour)
        errors(ax, part, "value", x, horizontal=False, fmt=MARKS[i % 8], color=colour, mfc="white" if i else colour,
                ms=3.5, elinewidth=0.8, capsize=1.5)
        ends.append((float(part["value"].iloc[-1]), f"{TEXT[i % 8]} {name}", colour))
    sizes = sorted(data["pairs"].unique())
    ax.set_xscale("log")
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    ax.set(xlabel="preference pairs for training", ylabel=ylabel)
    end_labels(ax, ends)
    return titled(fig, title)


@figure
def sensitivity(data: pd.DataFrame, title: str = "", ylabel="RewardBench 2 overall (%)") -> Figure:
    """One panel per setting (layer, width, k), score with interval over seeds at every value; dead features below.

    Columns: setting, x, value, lo, hi, dead (percent); optional used (True at the profile's own value, drawn filled).
    """
    data = need(data, "setting", "x", "value", "lo", "hi", "dead")
    names = list(pd.unique(data["setting"]))
    fig, grid = axes(PAGE, 3.2, 2, len(names), sharex="col", sharey="row", height_ratios=[3, 1], squeeze=False)
    for (top, low), name in zip(grid.T, names, strict=True):
        part = data[data["setting"] == name].sort_values("x")
        used = part["used"].to_numpy(bool) if "used" in part else np.zeros(len(part), bool)
        place = np.arange(len(part))
        top.plot(place, part["value"], color=GREY, lw=0.8)
        for mask, face in ((used, BLUE), (~used, "white")):
            if mask.any():
                errors(top, part[mask], "value", place[mask], horizontal=False, fmt="o", color=BLUE, mfc=face, ms=4)
        low.bar(place, part["dead"], color=GREY, width=0.6)
        low.set_xticks(place, [f"{x:g}" for x in part["x"]])
        low.set(xlabel=name, ylim=(0, 100))
    grid[0, 0].set_ylabel(ylabel)
    grid[1, 0].set_ylabel("dead (%)")
    return titled(fig, title)
