"""Accuracy against the number of preference pairs: SARM, token-level SAE, random encoder, scalar half and full (toy).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/learning_curve.py --pairs 48 192 96 --seeds 0 1 2 3 4

Every model sees the first n pairs of its seed, for the profile's epochs but at least 24 optimiser steps.  Writes
runs/long/learning_curve.jsonl (resumable) and benchmarks/learning_curve.csv, learning_curve.md; the largest size is
taken from table2.jsonl where that run is there.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from table2 import interval_of, values
from variants import NAMES, append, machine, measure, read, train

from sarmlib import figures, figures_rq3
from sarmlib.evaluation.statistics import seeds_ci, verdict
from sarmlib.profiles import load_profile
from sarmlib.stages import Run

HERE = Path(__file__).parent
SHOWN = ("sarm", "token_sae", "random_encoder", "scalar_half", "scalar_full")
MEASURES = ("rewardbench2", "pairs")
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
            groups = [np.array(strata) == one for one in dict.fromkeys(strata)]
            for variant in SHOWN:
                theirs, _ = values(part, variant, name, seeds)
                mean = seeds_ci([float(np.mean([row[g].mean() for g in groups])) for row in theirs])
                row = {"pairs": n, "variant": variant, "measure": name, "value": mean.estimate, "low": mean.low,
                       "high": mean.high, "seeds": len(seeds)}
                if variant != "sarm":
                    gap = interval_of(name, ours - theirs, strata)
                    row |= {"sarm_minus": gap.estimate, "gap_low": gap.low, "gap_high": gap.high,
                            "sarm_better": verdict(gap, 0.0, ">")}
                rows.append(row)
    return pd.DataFrame(rows)


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
            cells = []
            for row in part[part.variant == variant].sort_values("pairs").to_dict("records"):
                cell = f"{100 * row['value']:.1f}"
                if variant != "sarm":
                    gap = f"[{100 * row['sarm_minus']:+.1f}: {100 * row['gap_low']:+.1f}, {100 * row['gap_high']:+.1f}]"
                    cell += f" **{gap}**" if row["gap_low"] > 0 or row["gap_high"] < 0 else f" {gap}"
                cells.append(cell)
            lines.append(f"| {NAMES[variant]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[48, 192, 96])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--lines", type=Path, default=HERE.parent / "runs/long/learning_curve.jsonl")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(load_profile("toy", seeds=arguments.seeds), progress=False)
    rows = {"rewardbench2": first_rows(run.benchmark_rows()["rewardbench2"])}
    jobs = [{"variant": v, "seed": s, "n": n} for n in arguments.pairs for s in arguments.seeds for v in SHOWN]
    lines = append(arguments.lines, jobs, lambda job: measure(
        run, train(run, job["variant"], job["seed"], job["n"], STEPS), run.pairs(job["seed"])["eval"], rows))
    table2 = read(arguments.lines.with_name("table2.jsonl"))
    full = [{**line, "n": run.profile.preferences.train_pairs, "rewardbench2": first_units(line["rewardbench2"])}
            for line in table2
            if line["variant"] in SHOWN and line["seed"] in arguments.seeds]
    if len(full) == len(SHOWN) * len(arguments.seeds):
        lines = [*lines, *full]
    table = summary(lines, arguments.seeds)
    table.to_csv(arguments.out / "learning_curve.csv", index=False, float_format="%.5f")
    command = (f"python benchmarks/learning_curve.py --pairs {' '.join(map(str, arguments.pairs))} "
               f"--seeds {' '.join(map(str, arguments.seeds))}")
    data = table[table.measure == "rewardbench2"]
    data = pd.DataFrame({"variant": [NAMES[v] for v in data.variant], "pairs": data.pairs, "value": 100 * data.value,
                         "lo": 100 * data.low.clip(lower=0), "hi": 100 * data.high.clip(upper=1)})
    fig = figures_rq3.learning_curve(data, "Data efficiency (toy world)", ylabel="RewardBench 2 overall (%)")
    figures.save_figure(fig, "learning_curve", arguments.out / "figures", data, "Score against training pairs, "
                        f"mean and 95 % t interval over seeds {arguments.seeds}.", "toy")
    (arguments.out / "learning_curve.md").write_text(markdown(table, command))


if __name__ == "__main__":
    main()
