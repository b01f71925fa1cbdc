"""Every figure of the project: plain tables in, a matplotlib Figure out, nothing computed that is not drawn.

Conventions: AAAI widths (column 3.3 in, page 7.0 in), 7-8 pt text, colour-blind palette, and never colour alone
(markers, hatches, line styles or direct labels repeat it).  Numbers printed in the paper are hollow diamonds named
"paper (8B, full data)", so that nobody takes them for ours.  Intervals are drawn wherever the data has ``lo, hi``.
"""

from __future__ import annotations

import functools
import io
import os
import textwrap
from pathlib import Path
from typing import cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from scipy.stats import gaussian_kde
from scipy.stats import t as student_t

from sarmlib.errors import DataError

COLUMN, PAGE = 3.3, 7.0
PAPER = "paper (8B, full data)"
PALETTE = sns.color_palette("colorblind").as_hex()
BLUE, ORANGE, GREEN, RED, PURPLE = PALETTE[:5]
GREY, DARK = "#8A8A8A", "#333333"
MARKERS, MARKER_TEXT = "osD^vPX*", "●■◆▲▼✚✖★"
STYLES = ("-", "--", "-.", ":")
MAX_PNG = 300_000


def paper_style():
    """Context manager with the settings of every figure; the figure functions enter it by themselves."""
    return mpl.rc_context({
        **sns.axes_style("ticks"), **sns.plotting_context("paper"), "figure.dpi": 110, "savefig.dpi": 200,
        "font.family": "DejaVu Sans", "font.size": 7.5, "axes.titlesize": 8, "axes.labelsize": 7.5,
        "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "legend.frameon": False,
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
        "xtick.major.width": 0.7, "ytick.major.width": 0.7, "xtick.major.size": 3, "ytick.major.size": 3,
        "lines.linewidth": 1.3, "lines.markersize": 4, "hatch.linewidth": 0.5, "pdf.fonttype": 42,
        "svg.hashsalt": "sarmlib", "axes.prop_cycle": mpl.cycler(color=PALETTE)})


def _figure(function):
    """Draw in the paper style, and take the figure out of pyplot so that notebooks do not show it twice."""
    @functools.wraps(function)
    def draw(*args, **kwargs) -> Figure:
        with paper_style():
            fig = function(*args, **kwargs)
        plt.close(fig)
        return fig
    return draw


def _need(data, *columns) -> pd.DataFrame:
    data = pd.DataFrame(data)
    missing = [name for name in columns if name not in data]
    if missing or not len(data):
        raise DataError(f"nothing to draw: {'empty table' if not missing else f'columns {missing} are missing'}; "
                        f"the table has {list(data.columns)}")
    return data


def _axes(width, height, rows=1, cols=1, **kwargs):
    return plt.subplots(rows, cols, figsize=(width, height), layout="constrained", **kwargs)


def _titled(fig, title: str) -> Figure:
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=8)
    return fig


def _end_labels(ax, labels: list[tuple[float, str, str]], gap=0.075) -> None:
    """Names at the right edge, at the height (data) of each line's end, pushed apart to ``gap`` of the axis."""
    ax.get_ylim()  # settles pending autoscaling
    to_axes = ax.transData - ax.transAxes
    wanted = sorted(((to_axes.transform((1, y))[1], *rest) for y, *rest in labels), key=lambda item: item[0])
    places = [item[0] for item in wanted]
    for _ in range(50):
        for i in range(1, len(places)):
            short = gap - (places[i] - places[i - 1])
            if short > 1e-9:
                places[i - 1], places[i] = places[i - 1] - short / 2, places[i] + short / 2
    for place, (_, text, colour) in zip(places, wanted, strict=True):
        ax.text(1.02, place, text, color=colour, transform=ax.transAxes, va="center", ha="left", fontsize=7)


def _errors(ax, data, value, position, *, horizontal=True, **kwargs):
    """Points with their lo-hi interval, when the table has one."""
    given = {"lo", "hi"} <= set(data.columns)
    spans = np.abs(np.array([data[value] - data["lo"], data["hi"] - data[value]], float)) if given else None
    x, y = (data[value], position) if horizontal else (position, data[value])
    options = {"fmt": "o", "capsize": 2, "elinewidth": 1, "ms": 4.5} | kwargs
    return ax.errorbar(x, y, **{"xerr" if horizontal else "yerr": spans}, **options)


@_figure
def sae_training(log: pd.DataFrame, title: str = "") -> Figure:
    """SAE pretraining: loss, FVU and dead fraction over steps.  Columns: step, one or more of these, optional run."""
    log = _need(log, "step")
    known = {"loss": "loss (normalised MSE)", "fvu": "variance unexplained (FVU)", "dead_fraction": "dead features (%)"}
    panels = {name: text for name, text in known.items() if name in log}
    if not panels:
        raise DataError(f"the log has none of loss, fvu, dead_fraction; it has {list(log.columns)}")
    fig, axes = _axes(PAGE, 2.0, 1, len(panels), squeeze=False)
    runs = list(log.groupby("run", sort=False)) if "run" in log else [("", log)]
    for ax, (name, text) in zip(axes[0], panels.items(), strict=True):
        for i, (run, part) in enumerate(runs):
            part = part[["step", name]].dropna()
            ax.plot(part["step"], part[name] * (100 if name == "dead_fraction" else 1), STYLES[i % 4],
                    color=PALETTE[i % 10], label=str(run))
        ax.set(xlabel="optimiser steps", ylabel=text)
        ax.set_ylim(0, max(ax.get_ylim()[1], 1e-6) * 1.03)
    if len(runs) > 1:
        axes[0, 0].legend()
    return _titled(fig, title)


@_figure
def feature_density(rates, title: str = "") -> Figure:
    """How often features fire: histogram of log10 activation rate, dead features as a bar of their own.

    rates: array [M] of shares of units in which the feature fires, or a dict name -> such an array.
    """
    series = rates if isinstance(rates, dict) else {"": rates}
    series = {name: np.asarray(values, float) for name, values in series.items()}
    live = np.concatenate([values[values > 0] for values in series.values()])
    if not len(live):
        raise DataError("all features are dead: there is no density to draw")
    low = np.floor(np.log10(live.min()) * 2) / 2
    bins = np.arange(low, 0.01, 0.25)
    fig, ax = _axes(COLUMN, 2.3)
    width = 0.3 / len(series)
    for i, (name, values) in enumerate(series.items()):
        dead, logs = (values == 0).sum(), np.log10(values[values > 0])
        at = low - 0.6 + i * width
        label = f"{name}: {len(logs)} live, {dead} dead" if name else None
        colour, hatch = PALETTE[i % 10], ("", "///", "...", "xxx")[i % 4]
        ax.hist(logs, bins, histtype="stepfilled" if i == 0 else "step", color=colour, alpha=0.55 if i == 0 else 1,
                label=label, linewidth=1.3, linestyle=STYLES[i % 4])
        ax.bar(at, dead, width * 0.9, color="white", edgecolor=colour, hatch=hatch or "\\\\\\")
        if not name:
            ax.annotate(f"{dead}", (at, dead), ha="center", va="bottom", fontsize=7, xytext=(0, 1),
                        textcoords="offset points")
    ticks = np.arange(np.ceil(low), 0.5)
    ax.set_xticks([low - 0.6 + width * (len(series) - 1) / 2, *ticks],
                  ["dead", *[f"$10^{{{int(t)}}}$" if t < 0 else "1" for t in ticks]])
    ax.set(xlabel="activation rate (share of units, log scale)", ylabel="features")
    ax.margins(y=0.1)
    ax.legend(loc="upper right") if any(series) else None
    ax.set_title(title)
    return fig


@_figure
def decoder_cosine(nearest: dict, title: str = "") -> Figure:
    """How alike decoder columns are: histogram of each column's largest cosine with another one.

    nearest: name -> array [M] (``sae.downstream.decoder_cosines``).
    """
    if not nearest:
        raise DataError("no SAE to draw")
    fig, ax = _axes(COLUMN, 2.1)
    bins = np.linspace(min(float(np.min(v)) for v in nearest.values()), 1, 41)
    for i, (name, values) in enumerate(nearest.items()):
        ax.hist(values, bins, histtype="stepfilled" if i == 0 else "step", color=PALETTE[i % 10], lw=1.3,
                alpha=0.55 if i == 0 else 1, linestyle=STYLES[i % 4], label=name)
    ax.set(xlabel="largest cosine with another column", ylabel="features")
    ax.legend(loc="upper right")
    ax.set_title(title)
    return fig


@_figure
def probe_report(data: pd.DataFrame, title: str = "", xlabel="held-out AUROC of a linear probe") -> Figure:
    """One row per attribute (or concept), one marker per model; chance at 0.5.

    Columns: attribute, model (for example "pretrained", "random"), auroc, optional lo, hi.  The first model is filled.
    """
    data = _need(data, "attribute", "model", "auroc")
    models, names = list(pd.unique(data["model"])), list(pd.unique(data["attribute"]))
    fig, ax = _axes(COLUMN if max(map(len, map(str, names))) < 22 else PAGE * 0.62, 0.75 + 0.2 * len(names))
    ax.axvline(0.5, color=GREY, lw=0.8, ls=":")
    for i, model in enumerate(models):
        part = data[data["model"] == model]
        place = np.array([names.index(a) for a in part["attribute"]]) + (i - (len(models) - 1) / 2) * 0.16
        _errors(ax, part, "auroc", place, fmt=MARKERS[i % 8], color=PALETTE[i % 10], label=str(model),
                mfc=PALETTE[0] if i == 0 else "white")
    ax.set_yticks(range(len(names)), [str(name) for name in names])
    ax.set(xlabel=xlabel, ylim=(len(names) - 0.4, -0.6))
    ax.set_xlim(min(0.45, ax.get_xlim()[0]), 1.02)
    ax.grid(axis="y", lw=0.3, color="#DDDDDD")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(models)),
               handletextpad=0.3, columnspacing=1)
    return _titled(fig, title)


@_figure
def reward_training(data: pd.DataFrame, title: str = "", xlabel="training pairs seen") -> Figure:
    """Held-out pair accuracy of variants over training, mean over seeds with a 95 % t band from two seeds on.

    Columns: variant, step (units: ``xlabel``), accuracy in [0, 1], optional seed.
    """
    data = _need(data, "variant", "step", "accuracy")
    fig, ax = _axes(PAGE * 0.62, 2.4)
    ends = []
    for i, (variant, part) in enumerate(data.groupby("variant", sort=False)):
        stats = part.groupby("step")["accuracy"].agg(["mean", "std", "count"])
        half = stats["std"] / np.sqrt(stats["count"]) * student_t.ppf(0.975, np.maximum(stats["count"] - 1, 1))
        mean, half, colour = 100 * stats["mean"], 100 * half.fillna(0), PALETTE[i % 10]
        ax.plot(stats.index, mean, STYLES[i % 4], marker=MARKERS[i % 8], color=colour, ms=3.5)
        ax.fill_between(stats.index, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
        ends.append((mean.iloc[-1], f"{MARKER_TEXT[i % 8]} {variant}", colour))
    ax.axhline(50, color=GREY, lw=0.8, ls=":")
    ax.text(0.99, 50, "chance", color=GREY, va="bottom", ha="right", fontsize=6.5, transform=ax.get_yaxis_transform())
    low, high = ax.get_ylim()
    ax.set(xlabel=xlabel, ylabel="held-out pair accuracy (%)", title=title, ylim=(max(low, 0), min(high, 101)))
    ax.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
    _end_labels(ax, ends)
    return fig


@_figure
def feature_weights_vs_preference(features: pd.DataFrame, title: str = "", name=None, n_named=6) -> Figure:
    """Does the head weight agree with what people prefer?  Area = sd of the feature's contribution to the reward.

    Columns (of ``Contexts.features``): feature, w, preference_corr, contribution_sd.  name: feature -> short label for
    the ``n_named`` largest contributions.  Filled circles agree in sign, hollow squares do not.
    """
    data = _need(features, "feature", "w", "preference_corr", "contribution_sd").dropna(
        subset=["w", "preference_corr", "contribution_sd"])
    data = _need(data[data["contribution_sd"] > 0], "feature").sort_values("contribution_sd", ascending=False)
    fig, ax = _axes(PAGE * 0.62, 2.9)
    ax.axhline(0, color=GREY, lw=0.7)
    ax.axvline(0, color=GREY, lw=0.7)
    agree = np.sign(data["w"]) == np.sign(data["preference_corr"])
    area = 4 + 90 * data["contribution_sd"] / data["contribution_sd"].max()
    looks = ((agree, "o", BLUE, BLUE, "same sign"), (~agree, "s", "none", RED, "opposite"))
    for mask, marker, face, colour, word in looks:
        ax.scatter(data["preference_corr"][mask], data["w"][mask], s=area[mask], marker=marker, facecolors=face,
                   edgecolors=colour, alpha=0.65, linewidths=0.8, label=f"{word}: {mask.sum()} features")
    span, taken = np.ptp(data[["preference_corr", "w"]].to_numpy(), axis=0) + 1e-12, []
    for row in data.head(n_named).itertuples():
        text = textwrap.shorten(str((name or {}).get(row.feature, row.feature)), 26, placeholder="…")
        at, gap = np.array([row.preference_corr, row.w]) / span, np.sqrt(area[row.Index]) / 2 + 1
        up = not any(abs(at - other)[0] < 0.012 * len(text) + 0.03 and abs(at - other)[1] < 0.05 for other in taken)
        taken.append(at)
        ax.annotate(text, (row.preference_corr, row.w), xytext=(0, gap if up else -gap), textcoords="offset points",
                    ha="center", va="bottom" if up else "top", fontsize=6.5, color=DARK)
    ax.margins(0.1)
    ax.set(xlabel="correlation of $z_i$ with chosen, within prompts",
           ylabel="head weight $w_i$ (reward per unit of $z_i$)")
    ax.ticklabel_format(axis="y", scilimits=(-3, 3), useMathText=True)
    legend = fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, handletextpad=0.3)
    for handle in legend.legend_handles:
        handle.set_sizes([18])
    return _titled(fig, title)


@_figure
def label_auroc(judged: pd.DataFrame, title: str = "", most=24) -> Figure:
    """Held-out AUROC of labels with interval, beside what shuffled activity and the best trivial judge reach.

    Columns (of ``judge_labels``): feature, label, auroc, auroc_lo, auroc_hi, null_95, auroc_length, auroc_reward,
    auroc_domain, reliable, verdict.  Labels without a score are counted below the axis.
    """
    data = _need(judged, "feature", "label", "auroc", "auroc_lo", "auroc_hi", "null_95", "reliable", "verdict")
    silent = data["verdict"].astype(str).str.startswith("abstained").sum()
    unscored = data["verdict"].astype(str).str.startswith("not scored").sum()
    shown = data.dropna(subset=["auroc"]).sort_values("auroc", ascending=False).head(most)
    if not len(shown):
        raise DataError(f"no label has a held-out score ({silent} abstained, {unscored} without enough responses)")
    shown = shown.rename(columns={"auroc_lo": "lo", "auroc_hi": "hi"})
    place = np.arange(len(shown))
    fig, ax = _axes(PAGE, 1.5 + 0.17 * len(shown))
    trivial = shown.filter(["auroc_length", "auroc_reward", "auroc_domain"]).max(axis=1)
    ax.axvline(0.5, color=GREY, lw=0.8, ls=":")
    ax.scatter(trivial, place, marker="^", s=17, facecolors="none", edgecolors=ORANGE, zorder=3, linewidths=0.9,
               label="best of length, domain, base reward")
    ax.scatter(shown["null_95"], place, marker="|", s=45, color=DARK, zorder=3, linewidths=0.9,
               label="shuffled activity (95th percentile)")
    for good, face, word in ((True, BLUE, "label, reliable"), (False, "white", "label, not reliable")):
        mask = (shown["reliable"].astype(bool) == good).to_numpy()
        if mask.any():
            _errors(ax, shown[mask], "auroc", place[mask], color=BLUE, mfc=face, label=word, zorder=4)
    texts = [f"{textwrap.shorten(str(row.label), 62, placeholder='…')}  ({row.feature})" for row in shown.itertuples()]
    ax.set_yticks(place, texts, fontsize=6.5)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlim(min(0.35, shown["lo"].min() - 0.02), 1.02)
    hidden = data["auroc"].notna().sum() - len(shown)
    notes = [f"{silent} abstained", f"{unscored} not scored"] + ([f"{hidden} weaker not shown"] if hidden else [])
    ax.set_xlabel(f"held-out AUROC (95 % interval over prompts)\n[{', '.join(notes)}]")
    ax.grid(axis="y", lw=0.3, color="#DDDDDD")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, handletextpad=0.3)
    return _titled(fig, title)


@_figure
def figure3(table: pd.DataFrame, title: str = "", names=("target set T", "complement C"), bins=40) -> Figure:
    """The paper's Figure 3: rewards before and after steering in T and C, on shared bins, with the ECDF inset.

    table: of ``table_from_scores`` (reward, reward_steered, active, is_target).  Every panel also states the share of
    responses that did not move, which two histograms hide.
    """
    table = _need(table, "reward", "reward_steered", "is_target")
    both = np.concatenate([table["reward"], table["reward_steered"]])
    edges = np.linspace(both.min(), both.max() + 1e-9, bins + 1)
    fig, axes = _axes(PAGE, 2.5, 1, 2, sharex=True, sharey=True)
    for ax, is_target, name, letter in zip(axes, (True, False), names, "ab", strict=True):
        part = table[table["is_target"].astype(bool) == is_target]
        if not len(part):
            raise DataError(f"{name} is empty; Figure 3 needs both sets")
        inset = ax.inset_axes([0.72, 0.60, 0.27, 0.36])
        for column, word, colour, style, hatch in (("reward", "before", BLUE, "-", ""),
                                                   ("reward_steered", "after", ORANGE, "--", "////")):
            values = part[column].to_numpy()
            ax.hist(values, edges, density=True, color=colour, alpha=0.32, hatch=hatch, edgecolor=colour, lw=0.2)
            if np.ptp(values) > 0:
                grid = np.linspace(edges[0], edges[-1], 300)
                ax.plot(grid, gaussian_kde(values)(grid), style, color=colour, label=word)
            inset.plot(np.sort(values), np.arange(1, len(values) + 1) / len(values), style, color=colour, lw=1)
        inset.tick_params(labelsize=5.5, length=2, pad=1)
        inset.set_yticks([0, 1])
        inset.set_title("ECDF", fontsize=6, pad=1.5, loc="center")
        same = (part["reward"] == part["reward_steered"]).mean()
        shift = (part["reward_steered"] - part["reward"]).mean()
        ax.set_title(f"({letter}) {name}, n = {len(part)}")
        ax.text(0.02, 0.97, f"mean shift {shift:+.2f}\nunchanged {100 * same:.0f} %", transform=ax.transAxes, va="top",
                fontsize=7)
        ax.set_xlabel("reward")
    axes[0].set_ylabel("density")
    axes[0].set_ylim(0, max(axes[0].dataLim.y1, axes[1].dataLim.y1) / 0.56)  # room for the inset above the bars
    axes[1].legend(loc="upper left", bbox_to_anchor=(0.0, 0.82), handlelength=2)
    return _titled(fig, title)


@_figure
def dose_response(data: pd.DataFrame, title: str = "", used: float | None = None) -> Figure:
    """Mean shift of T and C, and within-prompt accuracy per subset, over the factor on the head weight.

    data: of ``SteeringAnalysis.dose_response`` (dose, quantity, value, lo, hi).  used: the factor to mark.
    """
    data = _need(data, "dose", "quantity", "value", "lo", "hi")
    kinds = [("shift ", "mean reward shift (symlog)", 1), ("accuracy ", "within-prompt accuracy (%)", 100)]
    kinds = [kind for kind in kinds if data["quantity"].str.startswith(kind[0]).any()]
    fig, axes = _axes(PAGE, 2.5, 1, len(kinds), squeeze=False)
    for ax, (prefix, ylabel, scale) in zip(axes[0], kinds, strict=True):
        part, ends = data[data["quantity"].str.startswith(prefix)], []
        for i, (quantity, line) in enumerate(part.groupby("quantity", sort=False)):
            line, colour = line.sort_values("dose"), PALETTE[i % 10]
            ax.plot(line["dose"], scale * line["value"], STYLES[i % 4], marker=MARKERS[i % 8], color=colour, ms=3)
            ax.fill_between(line["dose"], scale * line["lo"], scale * line["hi"], color=colour, alpha=0.13, lw=0)
            ends.append((scale * line["value"].iloc[-1], f"{MARKER_TEXT[i % 8]} {quantity[len(prefix):]}", colour))
        ax.set_xscale("symlog", linthresh=1)
        doses = np.unique(part["dose"])
        ticks = [d for d in (-8, -2, 0, 1, 2, 5, 10, 40, 160) if doses.min() <= d <= doses.max()]
        ax.set_xticks(ticks, [f"{d:g}" for d in ticks])
        ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        ax.axvline(1, color=GREY, lw=0.8, ls=":")
        if used is not None:
            ax.axvline(used, color=DARK, lw=0.8, ls="--")
            place = {"transform": ax.get_xaxis_transform(), "va": "bottom", "ha": "center", "fontsize": 6.5}
            ax.text(used, 1, f"used: {used:g}", **place)
        ax.set(xlabel="factor on the head weight (1 = unchanged)", ylabel=ylabel)
        if prefix == "shift ":
            small = part.loc[part["dose"].between(0, 2), "value"].abs().max()
            ax.set_yscale("symlog", linthresh=small if small > 0 else 1)
        _end_labels(ax, ends)
    return _titled(fig, title)


@_figure
def selectivity(controls: pd.DataFrame, title: str = "", name: str = "chosen feature") -> Figure:
    """Effect on T against the effect elsewhere of every live feature at the same edit size, the chosen one marked.

    controls: frame of ``SteeringAnalysis.controls`` (kind, chosen, matched, t_shift, c_shift, optional
    worst_off_target).  Without row structure the horizontal axis is the mean shift of C.
    """
    data = _need(controls, "kind", "chosen", "matched", "t_shift", "c_shift")
    by_rows = "worst_off_target" in data and data["worst_off_target"].notna().any()
    x = 100 * data["worst_off_target"] if by_rows else data["c_shift"]
    feature, chosen, matched = data["kind"] == "feature", data["chosen"].astype(bool), data["matched"].astype(bool)
    fig, ax = _axes(PAGE * 0.62, 2.9)
    groups = ((data["kind"] == "random", "x", GREY, "random directions", 11),
              (feature & ~chosen & ~matched, "o", PALETTE[9], "live features", 11),
              (matched & ~chosen, "D", GREEN, "features matched in rate, size, reward", 15),
              (chosen, "*", RED, name, 110))
    for mask, marker, colour, word, size in groups:
        if mask.any():
            look = {"color": colour} if marker == "x" else {"facecolors": colour, "edgecolors": "white"}
            ax.scatter(x[mask], data["t_shift"][mask], s=size, marker=marker, linewidths=0.7, **look,
                       label=word if marker == "*" else f"{word} ({mask.sum()})",
                       zorder=2 + (marker in "D*") + (marker == "*"))
    ax.axhline(0, color=GREY, lw=0.7, zorder=1)
    ax.axvline(0, color=GREY, lw=0.7, zorder=1)
    ax.margins(0.08)
    ax.set(xlabel="worst accuracy change on another subset (points)" if by_rows else "mean reward shift of C",
           ylabel="mean reward shift of T")
    if not by_rows:
        ax.axline((0, 0), slope=1, color=GREY, lw=0.8, ls="--", zorder=1)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, handletextpad=0.2, columnspacing=1)
    return _titled(fig, title)


@_figure
def shift_by_set(summary: pd.DataFrame, title: str = "") -> Figure:
    """Mean shift with its interval, and the share of active responses, for T and the parts of C apart.

    summary: of ``summarise_shift``.  C as a whole is left out when its parts are there.
    """
    data = _need(summary, "set", "n", "shift", "shift_lo", "shift_hi", "share_active")
    data = data[data["set"] != "C"] if len(data) > 2 else data
    place = np.arange(len(data))[::-1]
    fig, axes = _axes(PAGE, 0.75 + 0.32 * len(data), 1, 2, sharey=True)
    axes[0].axvline(0, color=GREY, lw=0.7)
    axes[0].hlines(place, data["shift_lo"], data["shift_hi"], color=BLUE, lw=1.3)
    axes[0].plot(data["shift"], place, "o", color=BLUE)
    axes[0].set_yticks(place, [f"{name} (n = {n})" for name, n in zip(data["set"], data["n"], strict=True)])
    axes[0].set(xlabel="mean reward shift (95 %, prompts resampled)", ylim=(-0.6, len(data) - 0.4))
    axes[1].barh(place, 100 * data["share_active"], height=0.5, color=ORANGE, hatch="///", edgecolor="white", lw=0.3)
    axes[1].set(xlabel="responses with the feature active (%)", xlim=(0, 100))
    return _titled(fig, title)


@_figure
def pareto(data: pd.DataFrame, title: str = "") -> Figure:
    """Safety margin gained against the worst loss on another subset, for one to many features; the front is joined.

    data: of ``controls.pareto`` (features, target_margin, worst_off_target, front).
    """
    data = _need(data, "features", "target_margin", "worst_off_target", "front")
    fig, ax = _axes(COLUMN * 1.25, 2.6)
    for i, (count, part) in enumerate(data.groupby("features")):
        ax.plot(100 * part["worst_off_target"], part["target_margin"], MARKERS[i % 8], color=PALETTE[i % 10], ms=4,
                label=f"{count} feature{'s' if count > 1 else ''}", alpha=0.9)
    front = data[data["front"].astype(bool)].sort_values(["worst_off_target", "target_margin"])
    ax.plot(100 * front["worst_off_target"], front["target_margin"], "-", color=GREY, lw=0.9, zorder=1,
            label="front")
    ax.axhline(0, color=GREY, lw=0.5, zorder=0)
    ax.axvline(0, color=GREY, lw=0.5, zorder=0)
    ax.set(xlabel="worst accuracy change on another subset (points)", ylabel="safety margin gained (sd)")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, handletextpad=0.3, columnspacing=1)
    return _titled(fig, title)


@_figure
def doses(tables: dict[float, pd.DataFrame], title: str = "", bins=36) -> Figure:
    """The slider's cards side by side: rewards of T (upper row) and C before and after, one column per factor."""
    fig, axes = _axes(PAGE, 2.4, 2, len(tables), squeeze=False, sharex="col", sharey="row")
    for column, (factor, table) in enumerate(tables.items()):
        table = _need(table, "reward", "reward_steered", "is_target")
        both = np.r_[table["reward"], table["reward_steered"]]
        low, high = np.quantile(both, [0.002, 0.998])
        edges = np.linspace(low, high + 1e-9, bins + 1)
        for row, (name, inside) in enumerate((("T", True), ("C", False))):
            part, ax = table[table["is_target"].astype(bool) == inside], axes[row][column]
            ax.hist(part["reward"].clip(edges[0], edges[-1]), edges, density=True, color=GREY, alpha=0.5)
            ax.hist(part["reward_steered"].clip(edges[0], edges[-1]), edges, density=True, histtype="step",
                    color=ORANGE, ls="--", lw=1.1)
            ax.set_yticks([])
            ax.tick_params(labelsize=5.5)
            if not column:
                ax.set_ylabel(name)
        axes[0][column].set_title(f"factor {factor:g}", loc="center")
    fig.supxlabel("reward: before (grey), after (dashed)", fontsize=7)
    return _titled(fig, title)


@_figure
def confound(table: pd.DataFrame, title: str = "", by="set", bins=8) -> Figure:
    """Activation rate of the steered feature against the base reward: are T and C moved by safety or by reward?

    table: of ``table_from_scores``; by="set" draws T and C, by="category" the categories.  Points are quantile bins
    of all rewards with 95 % Wilson intervals; a small ring marks a bin of fewer than 10 responses.
    """
    table = _need(table, "reward", "active", "is_target", *([] if by == "set" else [by]))
    key = np.where(table["is_target"].astype(bool), "T", "C") if by == "set" else table[by].astype(str).to_numpy()
    edges = np.unique(np.quantile(table["reward"], np.linspace(0, 1, bins + 1)))
    cell = np.clip(np.digitize(table["reward"], edges[1:-1]), 0, max(len(edges) - 2, 0))
    fig, ax = _axes(COLUMN * 1.15, 2.5)
    for i, name in enumerate(pd.unique(key)):
        rows = pd.DataFrame({"cell": cell, "x": table["reward"], "on": table["active"].astype(float)})[key == name]
        binned = rows.groupby("cell").agg(x=("x", "mean"), p=("on", "mean"), n=("on", "size"))
        p, n, z2 = binned["p"], binned["n"], 1.96**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n**2))) / (1 + z2 / n)
        line = pd.DataFrame({"x": binned["x"], "value": 100 * p, "lo": 100 * np.minimum(centre - half, p),
                             "hi": 100 * np.maximum(centre + half, p)})
        colour = PALETTE[i % 10]
        _errors(ax, line, "value", line["x"], horizontal=False, fmt=MARKERS[i % 8], linestyle=STYLES[i % 4], lw=1,
                color=colour, mfc=colour if i == 0 else "white", label=f"{name} (n = {len(rows)})", elinewidth=0.7)
        few = n < 10
        ax.scatter(line["x"][few], line["value"][few], s=60, facecolors="none", edgecolors=GREY, linewidths=0.6)
    ax.set(xlabel="base reward", ylabel="responses with the feature active (%)", ylim=(-3, 103))
    ax.legend(loc="upper left")
    ax.set_title(title)
    return fig


@_figure
def table1(ours: pd.DataFrame, published=None, title: str = "", ylabel="RewardBench 2 score (%)") -> Figure:
    """Score per subset and model as bars with intervals; the paper's numbers as hollow diamonds, named as such.

    ours: columns model, subset, value (percent), optional lo, hi; published: subset, value.
    """
    ours = _need(ours, "model", "subset", "value")
    subsets, models = list(pd.unique(ours["subset"])), list(pd.unique(ours["model"]))
    fig, ax = _axes(PAGE, 2.6)
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        part = ours[ours["model"] == model]
        place = np.array([subsets.index(s) for s in part["subset"]]) - 0.4 + (i + 0.5) * width
        ax.bar(place, part["value"], width * 0.92, color=PALETTE[i % 10], alpha=0.75, label=str(model),
               hatch=("", "///", "...", "xx", "\\\\\\")[i % 5], edgecolor="white", linewidth=0)
        _errors(ax, part, "value", place, horizontal=False, fmt="none", ecolor=DARK, elinewidth=0.8)
    if published is not None:
        known = _need(published, "subset", "value")
        known = known[known["subset"].isin(subsets)]
        ax.scatter([subsets.index(s) for s in known["subset"]], known["value"], marker="D", s=26, facecolors="none",
                   edgecolors=DARK, linewidths=1, label=PAPER, zorder=5)
    ax.set_xticks(range(len(subsets)), [str(s) for s in subsets])
    ax.tick_params(axis="x", length=0)
    ax.set(ylabel=ylabel, ylim=(min(0, ours["value"].min() * 1.1), 101), xlim=(-0.55, len(subsets) - 0.45))
    entries = sorted(zip(*ax.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1] == PAPER)
    fig.legend(*zip(*entries, strict=True), loc="outside lower center", ncols=min(4, len(entries)))
    return _titled(fig, title)


@_figure
def table2(ours: pd.DataFrame, paper: pd.DataFrame | None = None, title: str = "", xlabel="score (%)") -> Figure:
    """Ablation: one row per variant, our mean with its interval over seeds; the paper's numbers in a panel apart.

    ours: variant, value (percent), optional lo, hi, and seed values as ``points`` (a list per row).
    paper: variant, value.
    """
    ours = _need(ours, "variant", "value")
    names, place = list(ours["variant"]), np.arange(len(ours))
    extra = [] if paper is None else [v for v in paper["variant"] if v not in names]
    if extra:
        raise DataError(f"the paper's variants {extra} have no row of ours; rows are {names}")
    fig, axes = _axes(PAGE * (0.62 if paper is None else 0.85), 0.95 + 0.28 * len(names), 1, 1 if paper is None else 2,
                      squeeze=False, sharey=True, width_ratios=[1] if paper is None else [1.7, 1])
    ax, above = axes[0, 0], {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 6.5}
    if "points" in ours:
        for i, points in enumerate(ours["points"]):
            ax.scatter(points, np.full(len(points), i), marker="|", s=40, color=GREY, linewidths=0.9)
    _errors(ax, ours, "value", place, color=BLUE)
    for i, row in enumerate(ours.itertuples()):
        ax.annotate(f"{row.value:.1f}", (row.value, i), **above)
    ax.set_yticks(place, names)
    ax.set(xlabel=xlabel, ylim=(len(names) - 0.4, -0.65), title="here" if paper is not None else "")
    ax.margins(x=0.12)
    if paper is not None:
        other, rows = axes[0, 1], [names.index(v) for v in paper["variant"]]
        other.scatter(paper["value"], rows, marker="D", s=26, facecolors="none", edgecolors=DARK, linewidths=1)
        for row, value in zip(rows, paper["value"], strict=True):
            other.annotate(f"{value:.1f}", (value, row), **above)
        other.set(xlabel=xlabel)
        other.set_title(f"◇ {PAPER}")
        other.margins(x=0.2)
        other.tick_params(axis="y", length=0)
    return _titled(fig, title)


@_figure
def claims_forest(claims: pd.DataFrame, title: str = "") -> Figure:
    """Every claim on its own scale: value, interval, and the band it must fall in.

    Columns: id, text (short), value, lo, hi (interval, may be NaN), band_lo, band_hi (may be infinite), verdict.
    """
    claims = _need(claims, "id", "text", "value", "lo", "hi", "band_lo", "band_hi", "verdict")
    fig, axes = _axes(PAGE, 0.35 + 0.36 * len(claims), len(claims), 1, squeeze=False)
    looks = {"holds": ("✔", GREEN), "does not hold here": ("✘", RED), "undecided": ("?", ORANGE)}
    for ax, row in zip(axes[:, 0], claims.itertuples(), strict=True):
        marks = [v for v in (row.value, row.lo, row.hi, row.band_lo, row.band_hi) if np.isfinite(v)]
        if not marks:
            raise DataError(f"claim {row.id} has no finite value, interval or band to draw")
        low, high = min(marks), max(marks)
        pad = (high - low or abs(high) or 1) * 0.15
        low, high = low - pad, high + pad
        ax.axvspan(max(row.band_lo, low), min(row.band_hi, high), color=PALETTE[9], alpha=0.3, lw=0)
        symbol, colour = looks.get(row.verdict, ("·", GREY))
        if np.isfinite(row.lo) and np.isfinite(row.hi):
            ax.plot([row.lo, row.hi], [0, 0], color=DARK, lw=1.2, marker="|", ms=5)
        if np.isfinite(row.value):
            ax.plot(row.value, 0, "o", color=colour, mec=DARK, mew=0.6, ms=5.5)
        ax.set(xlim=(low, high), ylim=(-1, 1), yticks=[])
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
        if max(abs(low), abs(high)) >= 1e4:
            ax.xaxis.set_major_formatter(mpl.ticker.EngFormatter())
        ax.tick_params(axis="x", labelsize=6, length=2, pad=1)
        words = {"va": "center", "transform": ax.transAxes, "fontsize": 7}
        text = textwrap.shorten(f"{row.id}  {row.text}", 104, placeholder="…")
        ax.text(-0.02, 0.2, textwrap.fill(text, 54), ha="right", linespacing=1.05, **words)
        ax.text(1.02, 0.5, f"{symbol} {row.verdict}", ha="left", **words)
    return _titled(fig, title or "value (dot), 95 % interval (line) and band (shaded), each on its own scale")


def png(fig: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG bytes for a notebook's output; the same bytes for the same figure."""
    buffer = io.BytesIO()
    with paper_style():
        fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def save_figure(fig: Figure, name: str, folder, data: pd.DataFrame, caption: str, profile: str) -> dict[str, Path]:
    """Write ``name``.png (200 dpi, under 300 kB), .pdf, .csv (the plotted numbers) and .txt (caption) into ``folder``.

    Byte-stable for one matplotlib version: no dates and no versions in the files.  Every profile but the paper's is
    stamped on the figure in small grey text.  Returns the paths by suffix.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = "" if profile.startswith("paper") else f"{profile} profile"
    if stamp and not any(text.get_gid() == "profile" for text in fig.texts):
        text = fig.text(0.998, 0.004, stamp, ha="right", va="bottom", fontsize=6, color=GREY, gid="profile")
        text.set_in_layout(False)
        if fig.get_layout_engine() is not None:
            strip = 0.09 / fig.get_figheight()
            cast(ConstrainedLayoutEngine, fig.get_layout_engine()).set(rect=(0, strip, 1, 1 - strip))
    with paper_style():
        for dpi in (200, 150, 110, 80):
            png = io.BytesIO()
            fig.savefig(png, format="png", dpi=dpi, metadata={"Software": None}, pil_kwargs={"optimize": True})
            if png.tell() < MAX_PNG:
                break
        pdf = io.BytesIO()
        fig.savefig(pdf, format="pdf", metadata={"CreationDate": None, "ModDate": None, "Producer": None,
                                                 "Creator": "sarmlib", "Title": name, "Subject": f"{profile} profile"})
    table = data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    contents = {"png": png.getvalue(), "pdf": pdf.getvalue(), "csv": table.encode(),
                "txt": (caption.strip() + "\n").encode()}
    paths = {}
    for suffix, content in contents.items():
        paths[suffix] = folder / f"{name}.{suffix}"
        part = folder / f".{name}.{suffix}.{os.getpid()}.part"
        part.write_bytes(content)
        os.replace(part, paths[suffix])
    return paths
