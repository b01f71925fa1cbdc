"""Accuracy against the number of preference pairs: SARM, token-level SAE, random encoder, scalar half and full (toy).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/learning_curve.py --pairs 48 96 192 --seeds 0 1 2 3 4

Every model sees the first n pairs of its seed, for the profile's epochs but at least 24 optimiser steps.  Writes
runs/long/learning_curve.jsonl (resumable) and benchmarks/learning_curve.csv, learning_curve.md; the largest size is
taken from table2.jsonl where that run is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from table2 import values
from variants import NAMES, append, machine, measure, read, train

from sarmlib.evaluation.statistics import seeds_and_prompts_ci, seeds_ci, verdict
from sarmlib.profiles import load_profile
from sarmlib.stages import Run

HERE = Path(__file__).parent
SHOWN = ("sarm", "token_sae", "random_encoder", "scalar_half", "scalar_full")
MEASURES = ("rewardbench2", "pairs")
STEPS = 24


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
                    gap = seeds_and_prompts_ci(ours - theirs, strata=strata)
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
    parser.add_argument("--pairs", type=int, nargs="+", default=[48, 96, 192])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--lines", type=Path, default=HERE.parent / "runs/long/learning_curve.jsonl")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(load_profile("toy", seeds=arguments.seeds), progress=False)
    rows = {"rewardbench2": run.benchmark_rows()["rewardbench2"]}
    jobs = [{"variant": v, "seed": s, "n": n} for n in arguments.pairs for s in arguments.seeds for v in SHOWN]
    lines = append(arguments.lines, jobs, lambda job: measure(
        run, train(run, job["variant"], job["seed"], job["n"], STEPS), run.pairs(job["seed"])["eval"], rows))
    table2 = read(arguments.lines.with_name("table2.jsonl"))
    full = [{**line, "n": run.profile.preferences.train_pairs} for line in table2
            if line["variant"] in SHOWN and line["seed"] in arguments.seeds]
    if len(full) == len(SHOWN) * len(arguments.seeds):
        lines = [*lines, *full]
    table = summary(lines, arguments.seeds)
    table.to_csv(arguments.out / "learning_curve.csv", index=False, float_format="%.5f")
    command = (f"python benchmarks/learning_curve.py --pairs {' '.join(map(str, arguments.pairs))} "
               f"--seeds {' '.join(map(str, arguments.seeds))}")
    (arguments.out / "learning_curve.md").write_text(markdown(table, command))


if __name__ == "__main__":
    main()
