"""Which learning rate a profile should train with: one for all variants, judged on training pairs.

    python benchmarks/learning_rates.py --profile smollm2 --data DATA --output results/smollm2/learning_rates.csv

Each setting trains one epoch on 320 of the profile's training pairs and is judged on 200 others, of other prompts.
Neither the held-out pairs nor a benchmark is looked at.  The rate with the best mean over a model with an encoder and
one without is taken for all.  Rows that the output has are not made again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch

from sarmlib.pipeline import SAE_OF_VARIANT, Run, train_reward, untrained
from sarmlib.store import write_atomic

LR, HEAD_LR, TRAIN, CHECKED = (2e-5, 6e-5, 2e-4), 1e-3, 320, 200


def parts(pairs: list[dict]) -> dict[str, list[dict]]:
    """320 pairs, and 200 that share no prompt with them."""
    train = pairs[:TRAIN]
    asked = {repr(pair["prompt"]) for pair in train}
    return {"train": train, "eval": [pair for pair in pairs[TRAIN:] if repr(pair["prompt"]) not in asked][:CHECKED]}


def trial(run: Run, variant: str, lr: float) -> dict:
    """One row: the accuracy that ``lr`` reaches."""
    spec, rule, seed = run.profile, SAE_OF_VARIANT.get(variant), run.profile.seed
    shape = {name: run.shape[name] for name in ("layer", "n_layers", "n_features", "k")}
    model = untrained(variant, run.backbone_path, sae=run.load_sae(rule, seed) if rule else None, seed=seed,
                      **shape, **run.hub)
    pairs = parts(run.pairs(seed)["train"])
    reward = spec.reward.model_copy(update={"lr": lr, "head_lr": HEAD_LR})
    with tempfile.TemporaryDirectory() as folder:
        found = train_reward(reward, model, run.tokenizer, pairs, Path(folder), seed=seed, device=run.device,
                             max_length=spec.preferences.max_length, bf16=spec.dtype == "bfloat16", progress=True)
    return {"variant": variant, "lr": lr, "head_lr": HEAD_LR, "train_pairs": len(pairs["train"]),
            "checked_pairs": len(pairs["eval"]), "accuracy": found["eval_accuracy"], "loss": found["eval_loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="smollm2")
    parser.add_argument("--data")
    parser.add_argument("--runs", type=Path, help="root of the profile's artifacts")
    parser.add_argument("--variants", nargs="*", default=["scalar_half", "sarm"])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    run = Run(args.profile, data=args.data, root=args.runs)
    torch.set_num_threads(1)
    for variant in args.variants:
        for lr in LR:
            table = pd.read_csv(args.output) if args.output.exists() else pd.DataFrame(columns=["variant", "lr"])
            if ((table.variant == variant) & (table.lr == lr)).any():
                continue
            row = pd.DataFrame([trial(run, variant, lr)])
            table = pd.read_csv(args.output) if args.output.exists() else table
            write_atomic(args.output, pd.concat([table, row]).to_csv(index=False, float_format="%.5g"))
            print(row.to_string(index=False))


if __name__ == "__main__":
    main()
