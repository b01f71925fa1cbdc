"""Accuracy against the number of preference pairs: SARM, token-level SAE, random encoder, scalar half and full (toy).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/learning_curve.py --pairs 48 192 96 --seeds 0 1 2 3 4

Every model sees the first n pairs of its seed, for the profile's epochs but at least 24 optimiser steps.  Writes
runs/long/learning_curve.jsonl (resumable) and benchmarks/learning_curve.csv, learning_curve.md; the largest size is
taken from table2.jsonl where that run is there.
"""

from __future__ import annotations

from collections import Counter

import pandas as pd
from table2 import MEASURES, NAMES, append, arguments, gap_of, machine, measure, read, seed_means, train, values

from sarmlib import figures
from sarmlib.evaluation.statistics import seeds_ci
from sarmlib.pipeline import Run
from sarmlib.profiles import load_profile

SHOWN = ("sarm", "token_sae", "random_encoder", "scalar_half", "scalar_full")
STEPS = 24
ITEMS = 60
"""Rows per RewardBench 2 subset that are scored (the first ones), so that a curve costs minutes."""


def first_rows(rows: list[dict]) -> list[dict]:
    """The first ITEMS rows of each subset."""
    seen: Counter = Counter()
    return [row for row in rows if seen.update([row["subset"]]) or seen[row["subset"]] <= ITEMS]


def first_units(units: list[list]) -> list[list]:
    """What `first_rows` leaves of the units of all rows; a unit of Ties is a couple of rows."""
    seen: Counter = Counter()
    return [unit for unit in units
            if seen.update([unit[0]]) or seen[unit[0]] <= (ITEMS // 2 if unit[0] == "Ties" else ITEMS)]


def summary(lines: list[dict], seeds: list[int]) -> pd.DataFrame:
    """One row per size, variant and measure: mean over seeds with its t interval, and SARM minus it, paired."""
    rows = []
    for n in sorted({line["n"] for line in lines}):
        part = [line for line in lines if line["n"] == n]
        for name in MEASURES:
            ours, strata = values(part, "sarm", name, seeds)
            for variant in SHOWN:
                theirs, _ = values(part, variant, name, seeds)
                mean = seeds_ci(seed_means(theirs, strata))
                row = {"pairs": n, "variant": variant, "measure": name, "value": mean.estimate, "low": mean.low,
                       "high": mean.high, "seeds": len(seeds)}
                rows.append(row if variant == "sarm" else row | gap_of(name, ours, theirs, strata))
    return pd.DataFrame(rows)


def cell(row: dict) -> str:
    """One score, with SARM minus it in brackets; bold where the interval leaves zero out."""
    text = f"{100 * row['value']:.1f}"
    if row["variant"] == "sarm":
        return text
    gap = f"[{100 * row['sarm_minus']:+.1f}: {100 * row['gap_low']:+.1f}, {100 * row['gap_high']:+.1f}]"
    return f"{text} **{gap}**" if row["gap_low"] > 0 or row["gap_high"] < 0 else f"{text} {gap}"


def markdown(table: pd.DataFrame, command: str) -> str:
    """The results as they stand in benchmarks/learning_curve.md."""
    lines = ["# Learning curve in the toy world\n", f"`{command}`; {machine()}.\n",
             f"Percent, mean of {table.seeds.iloc[0]} seeds. Brackets: SARM minus that variant, paired over seeds and "
             "prompts, 95 % interval; bold where the interval leaves zero out."]
    for name in MEASURES:
        part = table[table.measure == name]
        sizes = sorted(part.pairs.unique())
        lines += [f"\n## {name}\n", "| variant | " + " | ".join(f"{n} pairs" for n in sizes) + " |",
                  "|---" * (len(sizes) + 1) + "|"]
        for variant in SHOWN:
            rows = part[part.variant == variant].sort_values("pairs").to_dict("records")
            lines.append(f"| {NAMES[variant]} | " + " | ".join(map(cell, rows)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, then write the summary."""
    given = arguments(__doc__, "learning_curve", [0, 1, 2, 3, 4], [48, 192, 96])
    run = Run(load_profile("toy", seeds=given.seeds), progress=False)
    rows = first_rows(run.benchmark_rows()["rewardbench2"])
    jobs = [{"variant": v, "seed": s, "n": n} for n in given.pairs for s in given.seeds for v in SHOWN]
    lines = append(given.lines, jobs, lambda job: measure(
        run, train(run, job["variant"], job["seed"], job["n"], STEPS), job["seed"], rows))
    full = [{**line, "n": run.profile.preferences.train_pairs, "rewardbench2": first_units(line["rewardbench2"])}
            for line in read(given.lines.with_name("table2.jsonl"))
            if line["variant"] in SHOWN and line["seed"] in given.seeds]
    if len(full) == len(SHOWN) * len(given.seeds):
        lines = [*lines, *full]
    table = summary(lines, given.seeds)
    table.to_csv(given.out / "learning_curve.csv", index=False, float_format="%.5f")
    part = table[table.measure == "rewardbench2"]
    data = pd.DataFrame({"variant": [NAMES[v] for v in part.variant], "pairs": part.pairs, "value": 100 * part.value,
                         "lo": 100 * part.low.clip(lower=0), "hi": 100 * part.high.clip(upper=1)})
    drawn = figures.curves(data, "pairs", "Score against the number of training pairs",
                           "preference pairs for training (95 % intervals)", "score (%)")
    figures.save(drawn, data, "learning_curve", given.out / "figures", "toy")
    (given.out / "learning_curve.md").write_text(markdown(table, given.command))


if __name__ == "__main__":
    main()
