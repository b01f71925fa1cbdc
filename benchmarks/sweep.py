"""SARM's sensitivity to layer, width and k at toy scale (the paper's appendix figures).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/sweep.py --seeds 0 1 2

One setting is changed at a time from the toy profile; SAE, reward model and scores are made anew.  Writes
runs/long/sweep.jsonl (resumable) and benchmarks/sweep.csv, sweep.md.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from table2 import append, arguments, machine, measure, percent, train

from sarmlib.evaluation.statistics import seeds_ci
from sarmlib.pipeline import Run
from sarmlib.profiles import load_profile

SETTINGS = {"layer": ("backbone.layer", (1, 2, 3, 4, 5, 6)), "width": ("sae.expansion", (2, 4, 8, 16, 32)),
            "k": ("sae.k_ratio", (1 / 128, 3 / 128, 3 / 64, 3 / 32, 3 / 16))}


def work(job: dict) -> dict:
    """One SARM with one setting changed."""
    profile = load_profile("toy", seeds=[job["seed"]], **{SETTINGS[job["setting"]][0]: job["value"]})
    run = Run(profile, progress=False)
    model, sae = train(run, "sarm", job["seed"]), run.sae("sentence_end", job["seed"]).meta
    shape = {f"n_{name}": value for name, value in run.shape.items()}
    found = measure(run, model, job["seed"], run.benchmark_rows()["rewardbench2"])
    return {**found, **shape, "fvu": sae["fvu"], "dead": sae["dead_fraction"]}


def overall(units: list[list]) -> float:
    """The mean over subsets."""
    return float(pd.DataFrame(units).groupby(0)[1].mean().mean())


def summary(lines: list[dict]) -> pd.DataFrame:
    """One row per setting and value: means over seeds, and the t interval of the RewardBench 2 score."""
    rows = []
    for (setting, value), part in pd.DataFrame(lines).groupby(["setting", "value"], sort=False):
        scores = [overall(units) for units in part.rewardbench2]
        row = {"setting": setting, "value": value, "layer": part.n_layer.iloc[0],
               "n_features": part.n_n_features.iloc[0], "k": part.n_k.iloc[0], "seeds": len(part),
               "rewardbench2": np.mean(scores), "pairs": np.mean([np.mean(one) for one in part.pairs]),
               "fvu": part.fvu.mean(), "dead": part.dead.mean(), "low": np.nan, "high": np.nan}
        if len(part) > 1:
            interval = seeds_ci(scores)
            row |= {"low": max(0.0, interval.low), "high": min(1.0, interval.high)}
        rows.append(row)
    return pd.DataFrame(rows).sort_values(["setting", "value"])


def markdown(table: pd.DataFrame, command: str) -> str:
    """The results as they stand in benchmarks/sweep.md."""
    lines = ["# Layer, width and k in the toy world\n", f"`{command}`; {machine()}.\n",
             "Percent; interval 95 %, t over seeds. Each row changes one setting of the toy profile.\n",
             "| changed | layer l | M | k | RewardBench 2 | held-out pairs | FVU | dead | seeds |", "|---" * 9 + "|"]
    for row in table.to_dict("records"):
        lines.append(f"| {row['setting']} | {row['layer']} | {row['n_features']} | {row['k']} | "
                     f"{percent(row['rewardbench2'], row['low'], row['high'])} | {100 * row['pairs']:.1f} | "
                     f"{row['fvu']:.4f} | {100 * row['dead']:.0f} | {row['seeds']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, then write the summary."""
    given = arguments(__doc__, "sweep", [0, 1, 2])
    jobs = [{"setting": name, "value": value, "seed": seed} for seed in given.seeds
            for name, (_, values) in SETTINGS.items() for value in values]
    table = summary(append(given.lines, jobs, work))
    table.to_csv(given.out / "sweep.csv", index=False, float_format="%.5f")
    (given.out / "sweep.md").write_text(markdown(table, given.command))


if __name__ == "__main__":
    main()
