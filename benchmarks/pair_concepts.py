"""What is in the preference data, before any reward model is trained: features of chosen minus rejected answers.

    python benchmarks/pair_concepts.py --profile smollm2 --data DATA --output results/smollm2/pair_concepts.csv

The SAE reads the untrained decoder's state at the end of each answer; a_i is 1 where feature i is active.  For each
feature that is active on one side only in at least 20 training pairs: the mean over prompts of a_chosen - a_rejected,
with its interval (a prompt with many pairs counts once), the same at equal length (the intercept of a line through the
difference in log tokens), and on held-out pairs.  ``holds``: the interval excludes 0 after Bonferroni's rule, and both
other numbers have its sign.  Words are those of the run's labels, found on RM-Bench by the trained model, where it
has some for the feature.  The view is that of WIMHF (arXiv 2510.26202); no reward is used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm

from sarmlib.data.pairs import conversations
from sarmlib.errors import NotMadeError
from sarmlib.evaluation.scorer import score
from sarmlib.pipeline import Run, untrained
from sarmlib.store import write_atomic

LEAST = 20  # training pairs with the feature on one side only


def differences(run: Run, model, pairs: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a_chosen - a_rejected [n, M], log length of chosen over rejected [n], prompt of each pair [n])."""
    talks = [talk for pair in pairs for talk in conversations(pair)]
    found = score(model, run.tokenizer, talks, features=True, progress=True,
                  max_length=run.profile.preferences.max_length)
    active = (found.features > 0).toarray().astype(np.int8)
    lengths = np.log(found.lengths)
    prompts = pd.factorize(pd.Series([repr(pair["prompt"]) for pair in pairs]))[0]
    return active[::2] - active[1::2], lengths[::2] - lengths[1::2], prompts


def by_prompt(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Mean over the pairs of each prompt: [n] or [n, m] -> [prompts] or [prompts, m]."""
    return pd.DataFrame(values).groupby(prompts).mean().to_numpy()


def concept_table(train: tuple, held_out: tuple) -> pd.DataFrame:
    """One row per feature, the largest difference first."""
    delta, length, prompts = train
    features = np.flatnonzero((delta != 0).sum(0) >= LEAST)
    means, lengths = by_prompt(delta[:, features], prompts), by_prompt(length, prompts)
    error = means.std(0, ddof=1) / np.sqrt(len(means))
    reach = norm.ppf(1 - 0.025 / max(len(features), 1)) * error
    line = np.c_[np.ones(len(lengths)), lengths]
    table = pd.DataFrame({
        "feature": features, "difference": means.mean(0), "low": means.mean(0) - reach, "high": means.mean(0) + reach,
        "equal_length": np.linalg.lstsq(line, means, rcond=None)[0][0],
        "held_out": by_prompt(held_out[0][:, features], held_out[2]).mean(0),
        "pairs": (delta[:, features] != 0).sum(0)})
    sign = np.sign(table.difference)
    table["holds"] = ((table.low * table.high > 0) & (np.sign(table.equal_length) == sign)
                      & (np.sign(table.held_out) == sign))
    return table.sort_values("difference", key=abs, ascending=False, kind="stable").reset_index(drop=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="toy")
    parser.add_argument("--data")
    parser.add_argument("--runs", type=Path, help="root of the profile's artifacts")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    run = Run(args.profile, data=args.data)
    run = Run(run.profile, root=args.runs, read_only=True)
    seed, shape = run.profile.seed, {name: run.shape[name] for name in ("layer", "n_layers")}
    model = untrained("sarm", run.backbone_path, **shape, sae=run.load_sae("sentence_end", seed), **run.hub)
    model.model.to(getattr(torch, run.profile.dtype))
    pairs = run.pairs(seed)
    table = concept_table(*(differences(run, model, pairs[part]) for part in ("train", "eval")))
    try:
        words = {one.feature: one.text for one in run.label_objects(seed) if not one.abstained}
    except NotMadeError:
        words = {}
    table["label"] = table.feature.map(words).fillna("")
    write_atomic(args.output, table.to_csv(index=False, float_format="%.4g"))
    print(f"{len(table)} features differ in {LEAST} training pairs or more, {int(table.holds.sum())} hold")
    print(table[table.holds].head(20).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
