"""Table 2 with intervals: every encoder of the paper's ablation, and what it leaves out, over many seeds (toy world).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/table2.py --seeds 0 1 2 3 4

Every model is trained by the profile's recipe (`pipeline.train_reward`) and scored on the toy benchmark and on held-out
pairs.  Writes runs/long/table2.jsonl (one line per model; a killed run goes on), benchmarks/table2.csv and table2.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch

from sarmlib import figures, pipeline
from sarmlib.evaluation import rewardbench2
from sarmlib.evaluation.scorer import score, score_rows
from sarmlib.evaluation.statistics import seeds_and_prompts_ci, seeds_ci
from sarmlib.profiles import load_profile
from sarmlib.sae import training
from sarmlib.sae.topk import TopKSAE
from sarmlib.sarm.model import SarmForSequenceClassification

HERE = Path(__file__).parent
NAMES = {
    "sarm": "SARM", "token_sae": "token-level SAE", "random_encoder": "random encoder",
    "scalar_half": "scalar, half depth", "scalar_full": "scalar, full depth",
    "no_topk": "head on all activations, no TopK", "trained_sae": "SAE trained with the reward",
    "released_recipe": "SAE trained, no TopK (released recipe)", "neuron_basis": "TopK of the state's coordinates",
    "frozen_decoder": "SAE, decoder left random", "soft_frozen_decoder": "SAE, decoder within cosine 0.8 of random",
    "same_text": "token-level SAE, the text of SARM's",
}
LEAST_COSINE = {"frozen_decoder": 1.0, "soft_frozen_decoder": 0.8}
"""Sanity controls of arXiv 2602.14111: SAEs whose decoder columns may not leave (the neighbourhood of) a random draw.
Its third control, a frozen random encoder, is "random encoder" here: a reward model reads no decoder."""
MEASURES = ("rewardbench2", "pairs")


# -- one model ---------------------------------------------------------------------------------------------------


def neuron_basis(d: int, k: int) -> TopKSAE:
    """An encoder whose features are the state's coordinates, each with both signs: M = 2 d."""
    sae = TopKSAE(d, 2 * d, k)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        sae.W_dec.copy_(sae.W_enc)
        sae.b_pre.zero_()
    return sae


class HeldTrainer(training._Trainer):
    """SAE training that keeps each decoder column within ``least`` (a cosine) of its random start."""

    def __init__(self, sae: TopKSAE, *args, least: float):
        super().__init__(sae, *args)
        self.first, self.least = sae.W_dec.detach().clone(), least

    def train_step(self, batch: torch.Tensor) -> dict | None:
        metrics = super().train_step(batch)
        hold(self.sae.W_dec.data, self.first, self.least)
        return metrics


def hold(columns: torch.Tensor, first: torch.Tensor, least: float) -> None:
    """In place: each row [d] at unit length, and turned towards ``first`` until their cosine is ``least`` or more."""
    unit = torch.nn.functional.normalize(columns, dim=1)
    cosine = (unit * first).sum(1, keepdim=True)
    aside = torch.nn.functional.normalize(unit - cosine * first, dim=1)
    columns.copy_(torch.where(cosine < least, least * first + (1 - least**2) ** 0.5 * aside, unit))


def held_sae(run: pipeline.Run, seed: int, least: float) -> TopKSAE:
    """An SAE by the profile's recipe on sentence ends whose decoder is held near its random start."""
    held = partial(HeldTrainer, least=least)
    with tempfile.TemporaryDirectory() as folder, patch.object(training, "_Trainer", held):
        pipeline.pretrain_sae(run.profile.sae, run.vectors("sentence_end")["train"], Path(folder), seed=seed,
                              d_model=run.shape["d_model"], progress=False)
        return TopKSAE.load(Path(folder) / "sae")


def same_text_sae(run: pipeline.Run, seed: int) -> TopKSAE:
    """A token-level SAE on as many vectors as SARM's has, drawn from all tokens of the same documents.

    The profile's token-level SAE matches vectors alone: it meets a fifth of the text."""
    made, spec = run.activations("sentence_end").meta, run.profile
    wanted, drawn = made["vectors"] + made["held_out"], torch.Generator().manual_seed(seed)
    share = wanted / made["tokens"]
    extractor = pipeline._extractor(run, lambda ids, mask: torch.rand(ids.shape, generator=drawn) < share)
    states = extractor.collect(itertools.islice(run.texts(spec.seed), made["documents"]))
    with tempfile.TemporaryDirectory() as folder:
        found = pipeline.pretrain_sae(spec.sae, states[pipeline.HELD_OUT:], Path(folder), seed=seed, progress=False,
                                      d_model=run.shape["d_model"], held_out=states[:pipeline.HELD_OUT])
        print(f"same text: {len(states)} of {wanted} vectors, FVU", found["fvu"])
        return TopKSAE.load(Path(folder) / "sae")


def build(run: pipeline.Run, variant: str, seed: int):
    """An untrained model of a variant."""
    shape, path = run.shape, run.backbone_path
    if variant in ("no_topk", "trained_sae", "released_recipe"):
        return SarmForSequenceClassification.from_backbone_and_sae(
            path, run.load_sae("sentence_end", seed), shape["layer"], topk=variant == "trained_sae",
            frozen_sae=variant == "no_topk")
    if variant == "neuron_basis":
        return SarmForSequenceClassification.from_backbone_and_sae(
            path, neuron_basis(shape["d_model"], shape["k"]), shape["layer"])
    if variant in ("same_text", *LEAST_COSINE):
        sae = held_sae(run, seed, LEAST_COSINE[variant]) if variant in LEAST_COSINE else same_text_sae(run, seed)
        return SarmForSequenceClassification.from_backbone_and_sae(path, sae, shape["layer"])
    rule = pipeline.SAE_OF_VARIANT.get(variant)
    return pipeline.untrained(variant, path, layer=shape["layer"], n_layers=shape["n_layers"], k=shape["k"],
                              sae=run.load_sae(rule, seed) if rule else None, n_features=shape["n_features"], seed=seed)


def train(run: pipeline.Run, variant: str, seed: int):
    """The variant trained on the pairs of ``seed`` by the profile's recipe."""
    model = build(run, variant, seed)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.train_reward(run.profile.reward, model, run.tokenizer,
                              {"train": run.pairs(seed)["train"], "eval": []}, Path(folder),
                              max_length=run.profile.preferences.max_length, seed=seed)
    return model.eval()


def pair_credit(run: pipeline.Run, model, pairs: list[dict]) -> list[float]:
    """1, 0 or a half (equal rewards) per held-out pair."""
    talks = [[*pair["prompt"], {"role": "assistant", "content": pair[side]}]
             for side in ("chosen", "rejected") for pair in pairs]
    rewards = score(model, run.tokenizer, talks).rewards
    margin = rewards[:len(pairs)] - rewards[len(pairs):]
    return ((margin > 0) + 0.5 * (margin == 0)).tolist()


def measure(run: pipeline.Run, model, seed: int, rows: list[dict]) -> dict:
    """``{"pairs": [credit], "rewardbench2": [[subset, value]]}``."""
    groups, _ = score_rows(model, run.tokenizer, rows)
    return {"pairs": pair_credit(run, model, run.pairs(seed)["eval"]), "rewardbench2": units_of(rows, groups)}


def units_of(rows: list[dict], groups: list) -> list[list]:
    """[[subset, value]] of the answers' rewards, a group per row."""
    scored = [{**row, "scores": group} for row, group in zip(rows, groups, strict=True)]
    return [[part, round(value, 5)] for part, _, value in rewardbench2.units(scored)]


# -- many models -------------------------------------------------------------------------------------------------


def append(path: Path, jobs: list[dict], work) -> list[dict]:
    """Do every job that ``path`` does not hold yet; each line is the job and what ``work(job)`` returned."""
    done = read(path)
    known = [{name: line[name] for name in jobs[0]} for line in done]
    for job in jobs:
        if job in known:
            continue
        start = time.time()
        line = {**job, **work(job), "seconds": round(time.time() - start, 1)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        done.append(line)
        print(job, f"{np.mean(line['pairs']):.4f}", line["seconds"], flush=True)
    return done


def read(path: Path) -> list[dict]:
    """The finished jobs of a results file; a line torn by a kill is left out (and its job done again)."""
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            pass
    return lines


def machine() -> str:
    """Processor, cores and platform, for the head of a results file."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return (f"{names[0] if names else platform.processor()}, {os.cpu_count()} logical processors, one thread used; "
            f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}")


def arguments() -> argparse.Namespace:
    """Options; one thread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--lines", type=Path, default=HERE.parent / "runs/long/table2.jsonl")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--train-only", action="store_true", help="write no summary (so that two runs share the seeds)")
    torch.set_num_threads(1)
    return parser.parse_args()


def values(lines: list[dict], variant: str, name: str, seeds: list[int]) -> tuple[np.ndarray, list[str]]:
    """[seeds, units] of one variant, and each unit's subset.  Held-out pairs differ by seed but not in number."""
    chosen = {line["seed"]: line[name] for line in lines if line["variant"] == variant}
    if name == "pairs":
        return np.array([chosen[s] for s in seeds]), ["pairs"] * len(chosen[seeds[0]])
    return np.array([[v for _, v in chosen[s]] for s in seeds]), [part for part, _ in chosen[seeds[0]]]


def seed_means(matrix: np.ndarray, strata: list[str]) -> list[float]:
    """Each seed's mean over subsets of the mean over units."""
    groups = [np.array(strata) == part for part in dict.fromkeys(strata)]
    return [float(np.mean([row[group].mean() for group in groups])) for row in matrix]


def interval_of(name: str, matrix: np.ndarray, strata: list[str]):
    """95 % interval of the mean of [seeds, units].  Benchmark rows are the same for every seed: crossed with them.
    Held-out pairs are each seed's own, so the spread of the seeds' means holds theirs too."""
    return seeds_ci(matrix.mean(1)) if name == "pairs" else seeds_and_prompts_ci(matrix, strata=strata)


def gap_of(name: str, ours: np.ndarray, theirs: np.ndarray, strata: list[str]) -> dict:
    """SARM minus a variant, with its interval."""
    gap = interval_of(name, ours - theirs, strata)
    return {"sarm_minus": gap.estimate, "gap_low": gap.low, "gap_high": gap.high}


def p_value(per_seed: list[float]) -> float:
    """Two-sided t test of the seeds' differences (1 when they are all zero)."""
    from scipy.stats import ttest_1samp
    return 1.0 if not np.any(per_seed) else float(ttest_1samp(per_seed, 0.0).pvalue)


def holm(p: list[float]) -> np.ndarray:
    """Holm's step-down adjusted p values (family-wise error), in the order given."""
    order, adjusted = np.argsort(p, kind="stable"), np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.array(p)[order] * (len(p) - np.arange(len(p)))), 1.0)
    return adjusted


def summary(lines: list[dict], seeds: list[int]) -> pd.DataFrame:
    """One row per variant and measure: mean, SARM minus it with the 95 % interval, verdict, Holm's p, seed values."""
    rows = []
    for name in MEASURES:
        ours, strata = values(lines, "sarm", name, seeds)
        part = []
        for variant in NAMES:
            theirs, _ = values(lines, variant, name, seeds)
            interval, means = interval_of(name, theirs, strata), seed_means(theirs, strata)
            row = {"measure": name, "variant": variant, "value": interval.estimate, "low": interval.low,
                   "high": interval.high, **{f"seed_{s}": v for s, v in zip(seeds, means, strict=True)}}
            if variant != "sarm":
                row |= gap_of(name, ours, theirs, strata) | {"p": p_value(seed_means(ours - theirs, strata))}
            part.append(row)
        for row, p in zip(part[1:], holm([row["p"] for row in part[1:]]), strict=True):
            row |= {"p_holm": p, "sarm_better": "undecided" if p >= 0.05 else "yes" if row["sarm_minus"] > 0 else "no"}
        rows += part
    return pd.DataFrame(rows)


def percent(value: float, low: float, high: float, sign: str = "") -> str:
    """"value [low, high]" in percent."""
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def markdown(table: pd.DataFrame, seeds: list[int]) -> str:
    """The results as they stand in benchmarks/table2.md."""
    command = f"python benchmarks/table2.py --seeds {' '.join(map(str, seeds))}"
    lines = ["# Table 2 in the toy world\n", f"`{command}`; {machine()}.\n",
             f"Seeds {', '.join(map(str, seeds))}: each has its own pairs, label noise, SAE and data order. Percent; "
             "intervals 95 % over seeds and prompts, not adjusted for their number; p: t test over seeds, Holm over "
             "the variants of a measure. The verdict asks for p below .05.\n"]
    for name in MEASURES:
        lines += [f"\n## {name}\n", "| variant | score | SARM minus it | SARM better? | p (Holm) | seeds |",
                  "|---" * 6 + "|"]
        for row in table[table.measure == name].to_dict("records"):
            cells = ["–"] * 3
            if row["variant"] != "sarm":
                cells = [percent(row["sarm_minus"], row["gap_low"], row["gap_high"], "+"), row["sarm_better"],
                         f"{row['p_holm']:.3f}" if row["p_holm"] >= 0.001 else "< .001"]
            points = " ".join(f"{100 * row[f'seed_{s}']:.1f}" for s in seeds)
            score_cell = percent(row["value"], row["low"], row["high"])
            lines.append(f"| {NAMES[row['variant']]} | {score_cell} | {' | '.join(cells)} | {points} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, then write the summary."""
    given = arguments()
    run = pipeline.Run(load_profile("toy", seeds=given.seeds), progress=False)
    rows = run.benchmark_rows()["rewardbench2"]
    jobs = [{"variant": v, "seed": s} for s in given.seeds for v in NAMES]
    lines = append(given.lines, jobs, lambda job: measure(
        run, train(run, job["variant"], job["seed"]), job["seed"], rows))
    if given.train_only:
        return
    table = summary(lines, given.seeds)
    table.to_csv(given.out / "table2.csv", index=False, float_format="%.5f")
    gaps = table[(table.measure == "rewardbench2") & (table.variant != "sarm")]
    data = pd.DataFrame({"variant": [NAMES[v] for v in gaps.variant], "value": 100 * gaps.sarm_minus,
                         "lo": 100 * gaps.gap_low, "hi": 100 * gaps.gap_high})
    figures.save(figures.differences(data, "SARM minus each variant, RewardBench 2"), data, "table2_differences",
                 given.out / "figures", "toy")
    (given.out / "table2.md").write_text(markdown(table, given.seeds))


if __name__ == "__main__":
    main()
