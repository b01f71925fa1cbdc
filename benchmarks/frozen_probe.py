"""What frozen states hold: a convex Bradley-Terry probe on the pairs of a profile, before any reward training.

    python benchmarks/frozen_probe.py --profile smollm2 --data DATA --output results/smollm2/probe.json

States after layer l at the reward position of the untrained decoder, each dimension divided by its standard
deviation on the training pairs.  w minimises mean -log sigmoid(w . (x_c - x_r)) + l2/2 |w|^2 (paper eq. 1 with a
linear reward); l2 is chosen by five folds of the training prompts.  The accuracy is on the held-out pairs, on which the
reward models are judged too; intervals resample prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize

from sarmlib.data.pairs import conversations
from sarmlib.evaluation.scorer import score
from sarmlib.pipeline import Run, untrained
from sarmlib.store import write_json

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def fit(delta: np.ndarray, l2: float) -> np.ndarray:
    """argmin_w of the penalised loss: [n, d] -> [d]."""
    def loss(w: np.ndarray):
        margin = delta @ w
        gradient = -(delta.T @ (1 / (1 + np.exp(margin)))) / len(delta)
        return np.logaddexp(0, -margin).mean() + l2 / 2 * w @ w, gradient + l2 * w
    return minimize(loss, np.zeros(delta.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500}).x


def right(delta: np.ndarray, w: np.ndarray) -> np.ndarray:
    """1 where the chosen answer gets more, 1/2 at a tie: [n]."""
    margin = delta @ w
    return (margin > 0) + 0.5 * (margin == 0)


def groups(pairs: list[dict]) -> np.ndarray:
    """The number of each pair's prompt."""
    names = [repr(pair["prompt"]) for pair in pairs]
    return np.unique(names, return_inverse=True)[1]


def probe(run: Run, seed: int) -> dict:
    """Held-out accuracy of the probe on one seed's pairs."""
    pairs = run.pairs(seed)
    shape = {name: run.shape[name] for name in ("layer", "n_layers")}
    model = untrained("scalar_half", run.backbone_path, **shape, **run.hub).to(getattr(torch, run.profile.dtype))
    deltas = {}
    for part, rows in pairs.items():
        talks = [talk for pair in rows for talk in conversations(pair)]
        states = score(model, run.tokenizer, talks, states=True, progress=True,
                       max_length=run.profile.preferences.max_length).states
        deltas[part] = (states[::2] - states[1::2]).astype(float)
    scale = deltas["train"].std(axis=0)
    train, held = deltas["train"] / scale, deltas["eval"] / scale
    fold = np.random.default_rng(0).permutation(5)[groups(pairs["train"]) % 5]
    folds = {l2: np.mean([right(train[fold == i], fit(train[fold != i], l2)).mean() for i in range(5)])
             for l2 in STRENGTHS}
    best = max(folds, key=lambda l2: folds[l2])
    found = right(held, fit(train, best))
    by_prompt = [found[groups(pairs["eval"]) == i] for i in np.unique(groups(pairs["eval"]))]
    sizes, sums = np.array([len(one) for one in by_prompt]), np.array([one.sum() for one in by_prompt])
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(sums), size=(2000, len(sums)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), (0.025, 0.975))
    return {"seed": seed, "train_pairs": len(train), "held_out_pairs": len(held), "l2": best,
            "five_fold": {str(l2): round(float(value), 4) for l2, value in folds.items()},
            "accuracy": float(found.mean()), "low": float(low), "high": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="smollm2")
    parser.add_argument("--data")
    parser.add_argument("--runs", type=Path, help="root of the profile's artifacts")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    run = Run(args.profile, data=args.data, root=args.runs)
    write_json(args.output, [probe(run, seed) for seed in run.profile.seeds[:1]])
    print(args.output.read_text())


if __name__ == "__main__":
    main()
