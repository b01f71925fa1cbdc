"""SARM's sensitivity to layer, width and k at toy scale (the paper's appendix figures).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/sweep.py --seeds 0 1 2

One setting is changed at a time from the toy profile; SAE, reward model and scores are made anew.  Writes
runs/long/sweep.jsonl (resumable) and benchmarks/sweep.csv, sweep.md, figures/sweep.*.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from variants import append, machine, measure, train

from sarmlib import figures, figures_rq3
from sarmlib.evaluation.statistics import seeds_ci
from sarmlib.profiles import load_profile
from sarmlib.stages import Run

HERE = Path(__file__).parent
SETTINGS = {"layer": ("backbone.layer", (1, 2, 3, 4, 5, 6)), "width": ("sae.expansion", (2, 4, 8, 16, 32)),
            "k": ("sae.k_ratio", (1 / 128, 3 / 128, 3 / 64, 3 / 32, 3 / 16))}


def work(job: dict) -> dict:
    """One SARM with one setting changed."""
    profile = load_profile("toy", seeds=[job["seed"]], **{SETTINGS[job["setting"]][0]: job["value"]})
    run = Run(profile, progress=False)
    model = train(run, "sarm", job["seed"])
    sae = run.sae("sentence_end", job["seed"]).meta
    rows = {"rewardbench2": run.benchmark_rows()["rewardbench2"]}
    shape = {f"n_{name}": value for name, value in run.shape.items()}
    found = measure(run, model, run.pairs(job["seed"])["eval"], rows)
    return {**found, **shape, "fvu": sae["fvu"], "dead": sae["dead_fraction"]}


def summary(lines: list[dict]) -> pd.DataFrame:
    """One row per setting and value: means over seeds, and the t interval of the RewardBench 2 score."""
    rows = []
    for (setting, value), part in pd.DataFrame(lines).groupby(["setting", "value"], sort=False):
        scores = [float(pd.DataFrame(units).groupby(0)[1].mean().mean()) for units in part.rewardbench2]
        row = {"setting": setting, "value": value, "layer": part.n_layer.iloc[0],
               "n_features": part.n_n_features.iloc[0], "k": part.n_k.iloc[0], "seeds": len(part),
               "rewardbench2": np.mean(scores), "pairs": np.mean([np.mean(one) for one in part.pairs]),
               "fvu": part.fvu.mean(), "dead": part.dead.mean()}
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
        interval = f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" if row.get("low") == row.get("low") else ""
        lines.append(f"| {row['setting']} | {row['layer']} | {row['n_features']} | {row['k']} | "
                     f"{100 * row['rewardbench2']:.1f}{interval} | {100 * row['pairs']:.1f} | {row['fvu']:.4f} | "
                     f"{100 * row['dead']:.0f} | {row['seeds']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lines", type=Path, default=HERE.parent / "runs/long/sweep.jsonl")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [{"setting": name, "value": value, "seed": seed} for seed in arguments.seeds
            for name, (_, values) in SETTINGS.items() for value in values]
    table = summary(append(arguments.lines, jobs, work))
    table.to_csv(arguments.out / "sweep.csv", index=False, float_format="%.5f")
    shape = Run(load_profile("toy"), progress=False).shape
    used = {"layer": shape["layer"], "width": shape["n_features"], "k": shape["k"]}
    data = pd.DataFrame({"setting": table.setting, "x": np.select([table.setting == "layer", table.setting == "width"],
                                                                  [table.layer, table.n_features], table.k),
                         **{name: 100 * table[column] for name, column in
                            (("value", "rewardbench2"), ("lo", "low"), ("hi", "high"), ("dead", "dead"))}})
    data["used"] = [row.x == used[row.setting] for row in data.itertuples()]
    fig = figures_rq3.sensitivity(data, "Layer, width and k (toy world)")
    figures.save_figure(fig, "sweep", arguments.out / "figures", data, "SARM's score over layer l, width M and k, one "
                        f"changed at a time (filled: the profile's own), seeds {arguments.seeds}; below, dead "
                        "features.", "toy")
    command = f"python benchmarks/sweep.py --seeds {' '.join(map(str, arguments.seeds))}"
    (arguments.out / "sweep.md").write_text(markdown(table, command))


if __name__ == "__main__":
    main()
