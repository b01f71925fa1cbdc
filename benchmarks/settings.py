"""Do the scalar models lose with few pairs because SARM's settings do not suit them?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/settings.py --pairs 96 --seeds 0 1 2 3 4

SARM and both scalar models on the first n pairs, with the learning rates of backbone and head and the number of steps
changed one at a time.  Writes runs/long/settings.jsonl (resumable) and benchmarks/settings.csv, settings.md.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from learning_curve import STEPS, first_rows
from sweep import overall
from table2 import MEASURES, NAMES, append, arguments, machine, measure, percent, train

from sarmlib.evaluation.statistics import seeds_ci
from sarmlib.pipeline import Run
from sarmlib.profiles import load_profile

SETTINGS = {"as in the curve": {}, "backbone lr x 3": {"reward.lr": 3}, "backbone lr / 3": {"reward.lr": 1 / 3},
            "head lr x 3": {"reward.head_lr": 3}, "head lr / 3": {"reward.head_lr": 1 / 3},
            "head lr / 10": {"reward.head_lr": 0.1}, "4 times the steps": {"steps": 4}}
SHOWN = ("sarm", "scalar_half", "scalar_full")


def work(job: dict) -> dict:
    """One model with one setting changed."""
    base, change = load_profile("toy"), SETTINGS[job["setting"]]
    rates = {name: base.get(name) * factor for name, factor in change.items() if name != "steps"}
    run = Run(load_profile("toy", seeds=[job["seed"]], **rates), progress=False)
    model = train(run, job["variant"], job["seed"], job["n"], STEPS * change.get("steps", 1))
    return measure(run, model, job["seed"], first_rows(run.benchmark_rows()["rewardbench2"]))


def summary(lines: list[dict]) -> pd.DataFrame:
    """Mean over seeds with its t interval per size, setting, variant and measure."""
    rows = []
    for (n, setting, variant), part in pd.DataFrame(lines).groupby(["n", "setting", "variant"], sort=False):
        found = {"rewardbench2": [overall(units) for units in part.rewardbench2],
                 "pairs": [float(np.mean(one)) for one in part.pairs]}
        for name in MEASURES:
            interval = seeds_ci(found[name])
            rows.append({"pairs": n, "setting": setting, "variant": variant, "measure": name,
                         "value": interval.estimate, "low": interval.low, "high": interval.high, "seeds": len(part)})
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
            for row in group.set_index("variant").loc[list(SHOWN)].itertuples():
                cell = percent(row.value, row.low, min(1, row.high))
                cells.append(f"**{cell}**" if row.value == best[row.Index] else cell)
            lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, then write the summary."""
    given = arguments(__doc__, "settings", [0, 1, 2, 3, 4], [96])
    jobs = [{"setting": setting, "variant": variant, "seed": seed, "n": n} for n in given.pairs
            for seed in given.seeds for setting in SETTINGS for variant in SHOWN]
    table = summary(append(given.lines, jobs, work))
    table.to_csv(given.out / "settings.csv", index=False, float_format="%.5f")
    (given.out / "settings.md").write_text(markdown(table, given.command))


if __name__ == "__main__":
    main()
