"""Reward models of the long runs: the profile's five variants and what the paper's Table 2 leaves out.

Every model is trained the same way (the profile's recipe) on the first ``n`` pairs of its seed, and scored on the toy
benchmark and on held-out pairs.  Results are appended to a JSON-lines file, so that a killed run goes on.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

from sarmlib.evaluation import rewardbench2, rm_bench
from sarmlib.evaluation.scoring import score_conversations, score_rewardbench2, score_rm_bench
from sarmlib.sae.model import TopKSAE
from sarmlib.sarm.model import SarmForSequenceClassification
from sarmlib.sarm.training import RewardTrainConfig, RewardTrainer
from sarmlib.stages import Run

NAMES = {
    "sarm": "SARM", "token_sae": "token-level SAE", "random_encoder": "random encoder",
    "scalar_half": "scalar, half depth", "scalar_full": "scalar, full depth",
    "no_topk": "head on all activations, no TopK", "trained_sae": "SAE trained with the reward",
    "released_recipe": "SAE trained, no TopK (released recipe)", "neuron_basis": "TopK of the state's coordinates",
}


def neuron_basis(d: int, k: int) -> TopKSAE:
    """An encoder whose features are the state's coordinates, each with both signs: M = 2 d."""
    sae = TopKSAE(d, 2 * d, k)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        sae.W_dec.copy_(sae.W_enc)
        sae.b_pre.zero_()
    return sae


def build(run: Run, variant: str, seed: int):
    """An untrained model of a variant."""
    shape = run.shape
    if variant in ("no_topk", "trained_sae", "released_recipe"):
        return SarmForSequenceClassification.from_backbone_and_sae(
            run.backbone_path, run.load_sae("sentence_end", seed), shape["layer"],
            topk=variant == "trained_sae", frozen_sae=variant == "no_topk")
    if variant == "neuron_basis":
        return SarmForSequenceClassification.from_backbone_and_sae(
            run.backbone_path, neuron_basis(shape["d_model"], shape["k"]), shape["layer"])
    return run._untrained(variant, seed)


def train(run: Run, variant: str, seed: int, n: int | None = None, steps: int = 0):
    """The variant trained on the first ``n`` pairs of ``seed``: the profile's epochs, but at least ``steps`` steps."""
    spec, pairs = run.profile.reward, run.pairs(seed)["train"][:n]
    epochs = max(spec.epochs, steps / max(1, len(pairs) // spec.batch_size))
    model = build(run, variant, seed)
    config = RewardTrainConfig(
        lr=spec.lr, head_lr=spec.head_lr, epochs=epochs, batch_size=min(spec.batch_size, len(pairs)),
        warmup_ratio=spec.warmup_ratio, weight_decay=spec.weight_decay, scheduler=spec.scheduler, eval_every=-1,
        mode=3 if variant in ("trained_sae", "released_recipe") else 1, max_length=run.profile.preferences.max_length,
        seed=seed, use_cpu=True)
    RewardTrainer(model, run.tokenizer, pairs, None, config).train()
    return model.eval()


def pair_credit(run: Run, model, pairs: list[dict]) -> list[float]:
    """1, 0 or a half (equal rewards) per held-out pair."""
    talks = [[*pair["prompt"], {"role": "assistant", "content": pair[side]}]
             for side in ("chosen", "rejected") for pair in pairs]
    rewards = score_conversations(model, run.tokenizer, talks).rewards
    margin = rewards[:len(pairs)] - rewards[len(pairs):]
    return ((margin > 0) + 0.5 * (margin == 0)).tolist()


def measure(run: Run, model, pairs: list[dict], rows: dict[str, list[dict]]) -> dict:
    """``{"pairs": [credit], "rewardbench2": [[subset, value]], "rm_bench": [[domain, value]]}``."""
    found = {"pairs": pair_credit(run, model, pairs)}
    for name, scorer, score in (("rewardbench2", rewardbench2, score_rewardbench2),
                                ("rm_bench", rm_bench, score_rm_bench)):
        if rows.get(name):
            scored, _ = score(model, run.tokenizer, rows[name])
            found[name] = [[part, round(value, 5)] for part, _, value in scorer.units(scored)]
    return found


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
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return (f"{names[0] if names else platform.processor()}, {os.cpu_count()} logical processors, one thread used; "
            f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}")
