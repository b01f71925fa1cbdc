"""The scalar reward model of full depth, one seed, on RewardBench 2, and SARM against it on the same prompts.

    python benchmarks/full_depth.py --profile smollm2 --data DATA --output results/smollm2/full_depth.json

For a profile that leaves ``scalar_full`` out, since it takes twice the time of the others.  Trained by the same recipe
on the same pairs; intervals resample prompts, and say nothing about other seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sarmlib.evaluation import rewardbench2
from sarmlib.evaluation.scorer import score_rows
from sarmlib.evaluation.statistics import bootstrap_ci
from sarmlib.pipeline import Run
from sarmlib.store import write_json

VARIANT, OTHERS = "scalar_full", ("sarm", "scalar_half")


def credits(rows: list[dict]) -> np.ndarray:
    """One value per prompt: [n]."""
    return np.array([value for _, _, value in rewardbench2.units(rows)], float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="smollm2")
    parser.add_argument("--data")
    parser.add_argument("--runs", type=Path, help="root of the profile's artifacts")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    run = Run(args.profile, data=args.data)
    profile = run.profile.model_copy(update={"variants": (*run.profile.variants, VARIANT)})
    run = Run(profile, root=args.runs)
    seed, rows = run.profile.seed, run.benchmark_rows()["rewardbench2"]
    made = run.reward(VARIANT, seed)
    spec = run.profile.benchmarks
    groups, _ = score_rows(run.load_reward(VARIANT, seed), run.tokenizer, rows, max_length=spec.max_length,
                           progress=True)
    full = credits([{**row, "scores": group} for row, group in zip(rows, groups, strict=True)])
    found = {"variant": VARIANT, "seed": seed, "held_out_pairs": made.meta["eval_accuracy"],
             "rewardbench2": bootstrap_ci(full)._asdict()}
    for other in OTHERS:
        gap = credits(run.scored(other, seed).rewardbench2) - full
        found[f"{other} minus it"] = bootstrap_ci(gap, shares=False)._asdict()
    print(write_json(args.output, found), found)


if __name__ == "__main__":
    main()
