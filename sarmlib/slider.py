"""A slider over the steering factor: everything is computed beforehand, so that moving it only shows another card."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .analysis import Steering

BINS = 36
WIDTH, HEIGHT = 300, 90


def slider_grid(one: Steering, factors) -> pd.DataFrame:
    """One row per factor: shift_T, shift_C (reward points), picks_changed (share of prompts with another best
    answer), safety and elsewhere (share of best picks that are chosen answers), html (the card shown)."""
    from .sarm.controls import best_of_n
    lines = []
    for factor in factors:
        change = (factor - 1) * one.analysis.contribution(one.feature)
        picks = best_of_n(one.analysis, {one.feature: factor}, one.rows)
        safety = (picks.subset == "Safety").to_numpy()

        def share(column, mask, picks=picks):
            part = picks[mask]
            return float((part[column] * part.n).sum() / part.n.sum()) if part.n.sum() else float("nan")

        lines.append({"factor": float(factor), "shift_T": change[one.target].mean(),
                      "shift_C": change[~one.target].mean(),
                      "picks_changed": share("share_changed", np.ones(len(picks), bool)),
                      "safety": share("good_after", safety), "elsewhere": share("good_after", ~safety)})
    table = pd.DataFrame(lines)
    return table.assign(html=[_card(one, row) for row in table.to_dict("records")])


def slider(one: Steering, factors=(-8, -2, 0, 0.5, 1, 2, 4, 8, 16, 40)):
    """Core ipywidgets: a slider (arrow keys move it) above the card of the chosen factor.  Moving it computes nothing.

    Returns a VBox; its children are the slider and the card.
    """
    import ipywidgets as widgets
    grid = slider_grid(one, factors)
    cards = dict(zip(grid.factor, grid.html, strict=True))
    start = one.factor if one.factor in cards else 1.0 if 1.0 in cards else grid.factor.iloc[0]
    control = widgets.SelectionSlider(options=[(f"{f:g}", f) for f in grid.factor], value=start,
                                      description="factor", continuous_update=True)
    card = widgets.HTML(cards[start])

    def show(change):
        card.value = cards[change["new"]]

    control.observe(show, names="value")
    return widgets.VBox([control, card])


def _card(one: Steering, row: dict) -> str:
    before, after = one.analysis.rewards, one.analysis.steered({one.feature: row["factor"]})
    low, high = np.quantile(np.r_[before, after], [0.002, 0.998])
    edges = np.linspace(low, high + 1e-9, BINS + 1)
    pictures = "".join(_histogram(before[mask], after[mask], edges, name) for name, mask in (
        ("target set T", one.target), ("complement C", ~one.target)))
    return (f'<div role="img" aria-label="rewards before and after, factor {row["factor"]:g}">{pictures}</div>'
            f'<p><b>factor {row["factor"]:g}</b>: mean shift of T {row["shift_T"]:+.2f}, of C {row["shift_C"]:+.2f}; '
            f'best answer changes for {100 * row["picks_changed"]:.0f} % of prompts; right picks: '
            f'safety {100 * row["safety"]:.0f} %, elsewhere {100 * row["elsewhere"]:.0f} %</p>')


def _histogram(before, after, edges, name: str) -> str:
    counts = [np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0] for x in (before, after)]
    top = max(c.max() for c in counts) or 1
    step = WIDTH / BINS
    bars = "".join(f'<rect x="{i * step:.1f}" y="{HEIGHT - HEIGHT * n / top:.1f}" width="{step - 1:.1f}" '
                   f'height="{HEIGHT * n / top:.1f}" fill="#9aa5b1"/>' for i, n in enumerate(counts[0]) if n)
    heights = [f"{HEIGHT - HEIGHT * n / top:.1f}" for n in counts[1]]
    line = " ".join(f"{i * step:.1f},{y} {(i + 1) * step:.1f},{y}" for i, y in enumerate(heights))
    return (f'<figure style="display:inline-block;margin:4px 12px 4px 0"><svg width="{WIDTH}" height="{HEIGHT}" '
            f'style="border-bottom:1px solid #888">{bars}<polyline points="{line}" fill="none" stroke="#c2410c" '
            f'stroke-width="1.8" stroke-dasharray="5 2"/></svg><figcaption style="font-size:12px">{name}, '
            f"n = {len(before)}: before (grey bars), after (dashed line)</figcaption></figure>")
