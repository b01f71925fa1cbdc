"""A run as plain files: results/<profile>/*.csv, claims.json, run.json and notebooks/, and figures/<profile>/.

    python tools/results_csv.py --profile smollm2 --data DATA [--runs runs] [--output results/smollm2]

Only what is made is written: a run of some hours can be read while it grows.  ``value`` is a share; ``low`` and
``high`` hold 95 %, whole prompts resampled; ``chance`` is what guessing gives.  Notebooks are as they were executed,
without timings and paths.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from sarmlib import results
from sarmlib.claims import verdicts
from sarmlib.errors import NotMadeError
from sarmlib.evaluation import rewardbench2, rm_bench
from sarmlib.evaluation.statistics import bootstrap_ci
from sarmlib.pipeline import BENCHMARKS, NO_PAIRS, Run
from sarmlib.runner import clean
from sarmlib.store import MANIFEST, versions, write_atomic, write_json

SCORERS = {"rewardbench2": rewardbench2, "rm_bench": rm_bench}


def made(run: Run, stage: str, *arguments):
    """An artifact or a table of the run; None while it is not made."""
    try:
        return getattr(run, stage)(*arguments)
    except NotMadeError:
        return None


def pair_rows(run: Run, variant: str, seed: int) -> list[dict]:
    """Accuracy on held-out pairs, whole prompts resampled."""
    if variant not in run.profile.variants or made(run, "reward", variant, seed) is None:
        return []
    meta = run.reward(variant, seed).meta
    n = run.preferences(seed).meta["eval"]
    return [{"benchmark": "pairs", "part": "held out", "value": meta["eval_accuracy"], "n": n, "chance": 0.5}]


def benchmark_rows(run: Run, variant: str, seed: int) -> list[dict]:
    """Every part of both benchmarks."""
    if (scored := made(run, "scored", variant, seed)) is None:
        return []
    found = []
    for name in BENCHMARKS:
        if not (rows := getattr(scored, name)):
            continue
        table = pd.DataFrame(SCORERS[name].units(rows), columns=["part", "prompt", "value"])
        parts = {part: values.to_numpy(float) for part, values in table.groupby("part").value}
        chance = 0.5 if name == "rm_bench" else 1 / np.mean([len(row["scores"]) for row in rows])
        for part, values in parts.items():
            interval = bootstrap_ci(values, n=2000)
            found.append({"benchmark": name, "part": part, "value": values.mean(), "low": interval.low,
                          "high": interval.high, "n": len(values), "chance": chance})
    return found


def score_table(run: Run) -> pd.DataFrame:
    """One row per variant, seed, benchmark and part."""
    models = [*itertools.product(run.profile.variants, run.profile.seeds),
              *((name, run.profile.seed) for name in NO_PAIRS)]
    rows = [{"variant": variant, "seed": seed, **row} for variant, seed in models
            for row in pair_rows(run, variant, seed) + benchmark_rows(run, variant, seed)]
    columns = ["variant", "seed", "benchmark", "part", "value", "low", "high", "n", "chance"]
    return pd.DataFrame(rows, columns=columns)


def run_record(run: Run) -> dict:
    """Profile, hashes, versions, hardware, and the hours and memory of every stage."""
    stages = [json.loads((folder / MANIFEST).read_text(encoding="utf-8")) for folder in run.store.artifacts()]
    keep = ("stage", "key", "wall_s", "peak_rss_mib", "meta")
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "unknown") if Path("/proc/cpuinfo").exists() else "unknown"
    return {"profile": run.profile.model_dump(exclude={"data"}, mode="json"), "backbone": run.backbone_key,
            "data": {name: run.fingerprint("data", name) for name in ("corpus", "pairs", *BENCHMARKS)},
            "departures": run.profile.diff_from_paper(), "versions": versions(), "processor": cpu,
            "stages": [{name: one[name] for name in keep} for one in stages]}


def copy_pages(run: Run, output: Path, figures: Path) -> None:
    """The executed notebooks and the figures, where there are any."""
    for path in sorted((run.store.root / "notebooks").glob("*.ipynb")):
        page = json.dumps(clean(json.loads(path.read_text(encoding="utf-8"))), indent=1, ensure_ascii=False) + "\n"
        print(write_atomic(output / "notebooks" / path.name, page))
    drawn = run.store.root / "figures"
    if drawn.is_dir():
        print(shutil.copytree(drawn, figures / run.profile.name, dirs_exist_ok=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="smollm2")
    parser.add_argument("--data")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all profiles' artifacts")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figures", type=Path, default=Path("figures"))
    args = parser.parse_args()
    run = Run(args.profile, data=args.data, progress=False, read_only=True)
    run = Run(run.profile, root=args.runs / run.profile.name, progress=False, read_only=True)
    output = args.output or Path("results") / run.profile.name
    tables, ready = {"scores": score_table(run)}, [s for s in run.profile.seeds if made(run, "labels", s) is not None]
    if ready:
        part = Run(run.profile.model_copy(update={"seeds": tuple(ready)}), root=run.store.root, read_only=True)
        tables["labels"] = pd.concat([run.label_table(seed).assign(seed=seed) for seed in ready], ignore_index=True)
        tables["steering"] = results.steering_table(part)
    for name, table in tables.items():
        print(write_atomic(output / f"{name}.csv", table.to_csv(index=False, float_format="%.5g")))
    print(write_json(output / "run.json", run_record(run)))
    if (run.store.root / "results").is_dir():
        claims = verdicts(run.store.root / "results").drop(columns=["band_lo", "band_hi", "in_band"])
        print(write_json(output / "claims.json", json.loads(claims.to_json(orient="records"))))
    copy_pages(run, output, args.figures)


if __name__ == "__main__":
    main()
