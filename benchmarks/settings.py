"""Do the scalar models lose with few pairs because SARM's settings do not suit them?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/settings.py --pairs 96 --seeds 0 1 2 3 4

SARM and both scalar models on the first n pairs, with the learning rates of backbone and head and the number of steps
changed one at a time.  Writes runs/long/settings.jsonl (resumable) and benchmarks/settings.csv, settings.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from learning_curve import STEPS, first_rows
from variants import NAMES, append, machine, measure, train

from sarmlib.evaluation.statistics import seeds_ci
from sarmlib.profiles import load_profile
from sarmlib.stages import Run

HERE = Path(__file__).parent
SETTINGS = {"as in the curve": {}, "backbone lr x 3": {"reward.lr": 3}, "backbone lr / 3": {"reward.lr": 1 / 3},
            "head lr x 3": {"reward.head_lr": 3}, "head lr / 3": {"reward.head_lr": 1 / 3},
            "head lr / 10": {"reward.head_lr": 0.1}, "4 times the steps": {"steps": 4}}
SHOWN = ("sarm", "scalar_half", "scalar_full")


def work(job: dict) -> dict:
    """One model with one setting changed."""
    base, change = load_profile("toy").reward, SETTINGS[job["setting"]]
    rates = {name: getattr(base, name.partition(".")[2]) * factor for name, factor in change.items() if name != "steps"}
    run = Run(load_profile("toy", seeds=[job["seed"]], **rates), progress=False)
    model = train(run, job["variant"], job["seed"], job["n"], STEPS * change.get("steps", 1))
    rows = {"rewardbench2": first_rows(run.benchmark_rows()["rewardbench2"])}
    return measure(run, model, run.pairs(job["seed"])["eval"], rows)


def summary(lines: list[dict]) -> pd.DataFrame:
    """Mean over seeds with its t interval per size, setting, variant and measure."""
    rows = []
    for (n, setting, variant), part in pd.DataFrame(lines).groupby(["n", "setting", "variant"], sort=False):
        found = {"rewardbench2": [pd.DataFrame(u).groupby(0)[1].mean().mean() for u in part.rewardbench2],
                 "pairs": [np.mean(one) for one in part.pairs]}
        for name, values in found.items():
            interval = seeds_ci([float(value) for value in values])
            rows.append({"pairs": n, "setting": setting, "variant": variant, "measure": name,
                         "value": interval.estimate, "low": interval.low, "high": interval.high, "seeds": len(values)})
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame, command: str) -> str:
    """The results as they stand in benchmarks/settings.md."""
    lines = ["# Do other settings suit the scalar models better? (toy world)\n", f"`{command}`; {machine()}.\n",
             "Percent, mean of seeds; 95 %, t over seeds. The best setting of each model in bold: it is chosen on the "
             "numbers shown, which flatters every model alike."]
    for (n, name), part in table.groupby(["pairs", "measure"], sort=False):
        lines += [f"\n## {n} pairs, {name}\n", "| setting | " + " | ".join(NAMES[v] for v in SHOWN) + " |",
                  "|---" * (len(SHOWN) + 1) + "|"]
        best = part.groupby("variant").value.max()
        for setting, group in part.groupby("setting", sort=False):
            cells = []
            for variant in SHOWN:
                row = group[group.variant == variant].iloc[0]
                cell = f"{100 * row.value:.1f} [{100 * row.low:.1f}, {100 * min(1, row.high):.1f}]"
                cells.append(f"**{cell}**" if row.value == best[variant] else cell)
            lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[96])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--lines", type=Path, default=HERE.parent / "runs/long/settings.jsonl")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [{"setting": setting, "variant": variant, "seed": seed, "n": n} for n in arguments.pairs
            for seed in arguments.seeds for setting in SETTINGS for variant in SHOWN]
    table = summary(append(arguments.lines, jobs, work))
    table.to_csv(arguments.out / "settings.csv", index=False, float_format="%.5f")
    command = (f"python benchmarks/settings.py --pairs {' '.join(map(str, arguments.pairs))} "
               f"--seeds {' '.join(map(str, arguments.seeds))}")
    (arguments.out / "settings.md").write_text(markdown(table, command))


if __name__ == "__main__":
    main()
