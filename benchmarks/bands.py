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
SHARE, POSITIVE = (0, 1), (0, np.inf)
RANGES = {"C1": POSITIVE, "C2": POSITIVE, "C5": SHARE, "C6": SHARE, "C7": SHARE, "C9": POSITIVE, "C10": POSITIVE,
          "C16": SHARE, "C18": (-1, 1), "C19": SHARE, "C20": SHARE}
LOGARITHMS = ("C9",)


def per_seed(run: Run) -> dict[str, list[float]]:
    """Claim id -> its value for each seed of the run."""
    seeds, steered = run.profile.seeds, results.steering_table(run)
    values = {
        "C1": [run.sae("sentence_end", seed).meta["fvu"] for seed in seeds],
        "C2": [results.decoder_norm_drift(run, seed) for seed in seeds],
        "C5": [results.pair_accuracy(run, "sarm", seed) for seed in seeds],
        "C6": [results.weight_preference_auroc(run.contexts(seed).features()) for seed in seeds],
        "C7": results.attributed(run).share_harder.tolist(), "C9": steered.shift_T.tolist(),
        "C10": steered.moved_C.tolist(), "C16": [results.column_overlap(run, seed) for seed in seeds],
        "C18": steered.safety_rate.tolist(), "C19": [results.labels_elsewhere(run, seed) for seed in seeds],
        "C20": steered.changed.tolist()}
    for claim, rival in RIVALS.items():
        (ours, strata), (theirs, _) = (results.units(run, name, "rewardbench2") for name in ("sarm", rival))
        groups = [np.array(strata) == name for name in dict.fromkeys(strata)]
        values[claim] = [float(np.mean([row[group].mean() for group in groups])) for row in ours - theirs]
    return values


def band(claim: str, values: list[float]) -> tuple[float, float]:
    """Mean +- max(4 sd / sqrt 3, 10 % of the mean), of logarithms for factors, cut at the quantity's range."""
    low, high = RANGES.get(claim, (-np.inf, np.inf))
    x = np.log(values) if claim in LOGARITHMS else np.array(values)
    half = max(4 * x.std(ddof=1) / np.sqrt(3), 0.1 * (1 if claim in LOGARITHMS else abs(x.mean())))
    ends = x.mean() - half, x.mean() + half
    return tuple(np.clip(np.exp(ends) if claim in LOGARITHMS else ends, low, high))


def main(seeds: list[int]) -> None:
    """Train what is missing, and print the table."""
    run = Run(load_profile("toy", seeds=seeds))
    run.ensure("labels")
    titles = load_claims()
    print(f"# Toy profile, seeds {', '.join(map(str, seeds))}\n")
    print("Band: mean ± max(4 sd / √3, 10 % of the mean), cut at the quantity's range (C9: of logarithms); the value "
          "of a run is a mean of three seeds.\n")
    print("| claim | " + " | ".join(f"seed {s}" for s in seeds) + " | mean [95 %] | band |")
    print("|---" * (len(seeds) + 3) + "|")
    for claim, values in sorted(per_seed(run).items(), key=lambda item: int(item[0][1:])):
        interval = results.log_interval(values) if claim in LOGARITHMS else results.seed_interval(
            values, *RANGES.get(claim, (-np.inf, np.inf)))
        low, high = band(claim, values)
        print(f"| {claim} {titles[claim].title} | " + " | ".join(f"{value:.4f}" for value in values)
              + f" | {interval.estimate:.4f} [{interval.low:.4f}, {interval.high:.4f}] | {low:.4f} .. {high:.4f} |")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]])
