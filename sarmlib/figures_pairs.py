"""Figures about single rewards and pairs."""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.figure import Figure

from sarmlib.errors import DataError
from sarmlib.figures import BLUE, DARK, GREY, ORANGE, PAGE, _axes, _figure, _titled


@_figure
def waterfall(explanation, title: str = "", most: int = 12) -> Figure:
    """How a reward, or the margin of a pair, adds up: one bar per feature from where the last one ended.

    ``explanation``: an `Explanation` (or anything with ``table`` [feature, contribution, maybe label], ``rest`` and
    ``reward``).  At most ``most`` features are drawn; the others are one bar, so the bars always end at the reward.
    Bars to the right are blue and carry "+", bars to the left orange, hatched, and carry "-".
    """
    table = explanation.table
    if not len(table) and not explanation.rest:
        raise DataError("nothing to draw: the reward has no active feature")
    shown, more = table.head(most), explanation.n_active - min(most, len(table))
    names = [f"{textwrap.shorten(str(word), 46, placeholder='…')}  ({feature})" if word else f"feature {feature}"
             for feature, word in zip(shown["feature"], shown.get("label", [""] * len(shown)), strict=True)]
    steps = shown["contribution"].tolist()
    if more:
        names.append(f"{more} more features")
        steps.append(float(explanation.rest + table["contribution"].iloc[most:].sum()))
    ends = np.cumsum(steps)
    starts = np.r_[0.0, ends[:-1]]
    fig, ax = _axes(PAGE * 0.8, 0.85 + 0.2 * (len(steps) + 1))
    span = max(np.ptp(np.r_[0.0, ends]), 1e-12)
    for place, (start, step) in enumerate(zip(starts, steps, strict=True)):
        up = step >= 0
        ax.barh(place, step, left=start, height=0.68, color=BLUE if up else ORANGE, hatch=None if up else "////",
                edgecolor="white", linewidth=0)
        ax.plot([start + step] * 2, [place - 0.34, place + 1.34], color=GREY, lw=0.6)
        tip = max(start, start + step)
        ax.annotate(f"{step:+.3g}", (tip, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5)
    total = float(ends[-1])
    ax.barh(len(steps), total, height=0.68, color=DARK)
    ax.annotate(f"= {total:+.4g}", (max(total, 0), len(steps)), xytext=(3, 0), textcoords="offset points", va="center",
                fontsize=7, fontweight="bold")
    ax.axvline(0, color=DARK, lw=0.7)
    is_pair = "z_chosen" in table
    ax.set_yticks(range(len(steps) + 1), [*names, "margin" if is_pair else "reward"])
    ax.set_ylim(len(steps) + 0.6, -0.6)
    ax.set_xlim(min(0, ends.min(), starts.min()) - 0.03 * span, max(0, ends.max(), starts.max()) + 0.14 * span)
    ax.set_xlabel("$w_i (z_i^{chosen} - z_i^{rejected})$, added up" if is_pair else "$w_i z_i$, added up")
    ax.tick_params(axis="y", length=0)
    return _titled(fig, title)
