"""The reward models of a run on pairs that none of them was trained on, for example HH after RMB.

    python benchmarks/other_pairs.py --profile smollm2 --data DATA --pairs FOLDER \\
        --name hh --output results/smollm2/hh.csv

At most 400 pairs whose sides both have at most ``preferences.longest`` tokens and that ask nothing a benchmark asks.
``value``: share of pairs in which the chosen answer gets more; intervals resample prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from sarmlib.data.pairs import conversations, drop_contaminated, drop_identical, load_pairs
from sarmlib.errors import NotMadeError
from sarmlib.evaluation.scorer import score
from sarmlib.evaluation.statistics import bootstrap_ci
from sarmlib.pipeline import Run
from sarmlib.store import write_atomic

MOST = 400


def other_pairs(run: Run, folder: Path) -> list[dict]:
    """One pair a prompt, drawn with the profile's seed."""
    spec = run.profile.preferences
    asked = [row["prompt"] for rows in run.benchmark_rows().values() for row in rows]
    found = drop_contaminated(load_pairs(folder), asked)
    found = drop_identical(found, run.tokenizer, spec.max_length, spec.longest)
    once = list({repr(pair["prompt"]): pair for pair in found}.values())
    return [once[i] for i in np.random.default_rng(run.profile.seed).permutation(len(once))[:MOST]]


def accuracy(run: Run, variant: str, seed: int, pairs: list[dict]) -> dict:
    """One row: how often this model is right."""
    talks = [talk for pair in pairs for talk in conversations(pair)]
    rewards = score(run.load_reward(variant, seed), run.tokenizer, talks, progress=True,
                    max_length=run.profile.preferences.max_length).rewards
    right = (rewards[::2] > rewards[1::2]) + 0.5 * (rewards[::2] == rewards[1::2])
    found = bootstrap_ci(right)
    return {"variant": variant, "seed": seed, "value": found.estimate, "low": found.low, "high": found.high,
            "n": len(right), "chance": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="smollm2")
    parser.add_argument("--data")
    parser.add_argument("--runs", type=Path, help="root of the profile's artifacts")
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--name", default="other")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    run = Run(args.profile, data=args.data)
    run = Run(run.profile, root=args.runs, read_only=True)
    pairs, rows = other_pairs(run, args.pairs), []
    for variant in run.profile.variants:
        for seed in run.profile.seeds:
            try:
                rows.append({"pairs": args.name, **accuracy(run, variant, seed, pairs)})
            except NotMadeError:
                continue
            print(rows[-1])
            write_atomic(args.output, pd.DataFrame(rows).to_csv(index=False, float_format="%.5g"))


if __name__ == "__main__":
    main()
