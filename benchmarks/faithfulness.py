"""Toy world: one planted concept of an answer changes; do the features that stand for it carry the reward's change?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/faithfulness.py --seeds 0 1 2

A reward is exactly the sum of its parts; that says nothing about what the parts mean.  So: 200 pairs of answers to one
prompt that differ in one thing (tone, style, or whether the core is right) and in the concepts that follow from it.
A feature stands for the concept that it tells best on RM-Bench's toy answers (AUROC at least 0.75), if any.

    net share    sum_i in S of w_i dz_i over the reward's change, both summed over pairs
    gross share  sum_i in S of |w_i dz_i| over that of all features, both summed over pairs
    others       gross share of as many features that stand for something else (mean of 200 draws)

S: the features that stand for a concept that the pair changes.  Intervals resample pairs (percentiles).  Prompts are of
the world's half that no training pair uses.  Needs the toy profile's artifacts (`make reproduce`).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import pandas as pd

from sarmlib.data.toyworld.grammar import TASKS, Answer, make_problem
from sarmlib.data.toyworld.lexicon import DEFECTS
from sarmlib.evaluation.scorer import score
from sarmlib.evaluation.statistics import aurocs
from sarmlib.pipeline import Run
from sarmlib.store import write_atomic

PAIRS, LEAST_AUROC, DRAWS = 200, 0.75, 200
CHANGES = [*(("tone", tone) for tone in ("polite", "rude")), *(("style", style) for style in ("markdown", "detailed")),
           *(("wrong", task) for task in TASKS)]


def pair(change: str, to: str, seed: int) -> tuple[str, Answer, Answer]:
    """(prompt, answer with the concept, answer without it); all else is drawn alike."""
    rng = random.Random(f"{change} {to} {seed}")
    problem = make_problem(to if change == "wrong" else rng.choice(TASKS), rng, "benchmark")
    good, bad, drawn = rng.choice(problem.good), rng.choice(problem.bad), rng.getrandbits(32)
    plain = {"style": "concise", "tone": "neutral", "core": good}
    with_it = plain | ({"core": bad} if change == "wrong" else {change: to})
    return (problem.prompt, problem.answer(change != "wrong", random.Random(drawn), **with_it),
            problem.answer(True, random.Random(drawn), **plain))


def meanings(run: Run, seed: int) -> tuple[np.ndarray, list[str]]:
    """(index of the concept each feature stands for, -1 for none [M]; concepts)."""
    units, z = run.scored("sarm", seed).part("rm_bench")
    names = sorted({name for row in units.concepts for name in row})
    truth = np.array([[name in row for row in units.concepts] for name in names])
    stands, z = np.full(z.shape[1], -1), z.tocsc()
    for feature in np.flatnonzero(np.diff(z.indptr)):
        found = np.nan_to_num(aurocs(z[:, [feature]].toarray().ravel(), truth, ~truth))
        if found.max() >= LEAST_AUROC:
            stands[feature] = found.argmax()
    return stands, names


def shares(parts: np.ndarray, change: np.ndarray, chosen: np.ndarray, rng) -> dict[str, float]:
    """Net and gross share of the chosen features with intervals; ``parts`` [pairs, M], ``change`` [pairs]."""
    mine, gross, every = parts[:, chosen].sum(1), abs(parts[:, chosen]).sum(1), abs(parts).sum(1)
    rows = rng.integers(len(parts), size=(1000, len(parts)))
    found = {}
    for name, top, bottom in (("net", mine, change), ("gross", gross, every)):
        low, high = np.quantile(top[rows].sum(1) / bottom[rows].sum(1), [0.025, 0.975])
        found |= {name: top.sum() / bottom.sum(), f"{name}_low": low, f"{name}_high": high}
    return found


def measure(run: Run, seed: int) -> pd.DataFrame:
    """One row per change."""
    model, w = run.load_reward("sarm", seed), run.head("sarm", seed)
    (stands, names), rng, rows = meanings(run, seed), np.random.default_rng(seed), []
    for change, to in CHANGES:
        made = [pair(change, to, number) for number in range(PAIRS)]
        talks = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer.text}]
                 for prompt, *answers in made for answer in answers]
        found = score(model, run.tokenizer, talks, features=True)
        z = found.features.toarray()
        parts, delta = (z[::2] - z[1::2]) * w, found.rewards[::2] - found.rewards[1::2]
        changed = {name for _, one, other in made for name in one.concepts
                   if one.concepts[name] != other.concepts[name]}
        mine = np.isin(stands, [names.index(name) for name in changed if name in names])
        others = np.flatnonzero(~mine & (stands >= 0))
        null = [abs(parts[:, rng.choice(others, min(mine.sum(), len(others)), False)]).sum() for _ in range(DRAWS)]
        rows.append({"seed": seed, "change": f"{change}: {DEFECTS[to] if change == 'wrong' else to}",
                     "task": to if change == "wrong" else "all", "reward": delta.mean(), "features": int(mine.sum()),
                     **shares(parts, delta, mine, rng), "others": float(np.mean(null) / abs(parts).sum())})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, help="root of the toy profile's artifacts")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/faithfulness.csv"))
    args = parser.parse_args()
    run = Run("toy", root=args.runs, read_only=True)
    table = pd.concat([measure(run, seed) for seed in args.seeds], ignore_index=True)
    write_atomic(args.output, table.to_csv(index=False, float_format="%.4g"))
    print(table.drop(columns="seed").groupby(["change", "task"], sort=False).mean().round(2).to_string())


if __name__ == "__main__":
    main()
