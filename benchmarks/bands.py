"""Per-seed values of the sampled claims, and the bands that follow: how the bands in claims.toml were made.

    .venv/bin/python benchmarks/bands.py 0 1 2 3 4 5 > benchmarks/toy_bands.md
"""

from __future__ import annotations

import sys

import numpy as np

from sarmlib import results
from sarmlib.claims import load_claims
from sarmlib.pipeline import Run
from sarmlib.profiles import load_profile

RIVALS = {"C11": "scalar_full", "C12": "random_encoder", "C13": "token_sae"}
RANGES = {"C1": (0, np.inf), "C5": (0, 1), "C6": (0, 1), "C7": (0, 1)}


def per_seed(run: Run) -> dict[str, list[float]]:
    """Claim id -> its value for each seed of the run."""
    values: dict[str, list[float]] = {}
    for seed in run.profile.seeds:
        shift_t, shift_c = results.steering(run, seed).shifts()
        for claim, value in {
            "C1": run.sae("sentence_end", seed).meta["fvu"], "C5": results.pair_accuracy(run, "sarm", seed),
            "C6": results.weight_preference_auroc(run.contexts(seed).features()),
            "C7": results.label_score(run, seed), "C9": shift_t, "C10": shift_t - shift_c,
        }.items():
            values.setdefault(claim, []).append(value)
    for claim, rival in RIVALS.items():
        (ours, strata), (theirs, _) = (results.units(run, name, "rewardbench2") for name in ("sarm", rival))
        groups = [np.array(strata) == name for name in dict.fromkeys(strata)]
        values[claim] = [float(np.mean([row[group].mean() for group in groups])) for row in ours - theirs]
    return values


def main(seeds: list[int]) -> None:
    """Train what is missing, and print the table."""
    run = Run(load_profile("toy", seeds=seeds))
    run.ensure("labels")
    titles = load_claims()
    print(f"# Toy profile, seeds {', '.join(map(str, seeds))}\n")
    print("Band: mean ± max(4 sd / √3, 10 % of the mean), cut at the quantity's range; the value of a run is a mean of "
          "three seeds.\n")
    print("| claim | " + " | ".join(f"seed {s}" for s in seeds) + " | mean [95 %] | band |")
    print("|---" * (len(seeds) + 3) + "|")
    for claim, values in sorted(per_seed(run).items(), key=lambda item: int(item[0][1:])):
        low, high = RANGES.get(claim, (-np.inf, np.inf))
        mean = float(np.mean(values))
        half = max(4 * np.std(values, ddof=1) / np.sqrt(3), 0.1 * abs(mean))
        interval = results.seed_interval(values, low, high)
        print(f"| {claim} {titles[claim].title} | " + " | ".join(f"{value:.4f}" for value in values)
              + f" | {mean:.4f} [{interval.low:.4f}, {interval.high:.4f}] "
              f"| {max(low, mean - half):.4f} .. {min(high, mean + half):.4f} |")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]])
