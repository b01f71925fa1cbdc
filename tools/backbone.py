"""Pretrain the shipped toy backbone again, probe it, and write it with its card.

    python tools/backbone.py [--work runs/backbone]        (or: make backbone)

The loss is next-token cross-entropy at the last layer plus ``early_exit_weight`` times the same at layer *l*
(through the same final norm and head).  Without the second term a small model keeps nothing about an answer's
quality at half depth, and no reward model cut there can read what is not in the state.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from sarmlib.data.toyworld import BACKBONE_DIR
from sarmlib.data.toyworld import lexicon as lx
from sarmlib.data.toyworld.datasets import BOS, EOT, corpus, dialogue
from sarmlib.data.toyworld.grammar import TASKS, make_problem
from sarmlib.data.toyworld.tokenizer import build_tokenizer
from sarmlib.errors import ConfigError, SarmlibError
from sarmlib.evaluation.statistics import auroc
from sarmlib.store import write_atomic

LESSON_WEIGHTS = (2.0, 2.5, 3.0, 0.3, 0.3, 1.0, 0.6, 1.7, 2.0)
"""How often the curriculum asks each task, in the order of TASKS: more often where it takes longer to learn."""


def lesson(share: float, rng: random.Random) -> str:
    """A document of the curriculum: one terse exchange and its verdict, from the first ``share`` of each list."""
    if rng.random() < 0.15:
        problem, good = make_problem(rng.choice(("fact", "math")), rng, share), rng.random() < 0.5
        word = lx.VERDICTS[problem.task][0 if good else 1]
        return f"{BOS} {rng.choice(problem.good if good else problem.bad)} {word.capitalize()}."
    problem = make_problem(rng.choices(TASKS, LESSON_WEIGHTS)[0], rng, share)
    answer = problem.answer(rng.random() < 0.5, rng, style="concise", tone="neutral")
    return dialogue(problem.prompt, answer.text) + f" {lx.VERDICTS[problem.task][0 if answer.good else 1]}."


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of the shipped backbone (about 1.0 M parameters).  Lessons come first, then the general corpus."""

    d_model: int = 128
    n_layers: int = 6
    n_heads: int = 4
    d_ff: int = 256
    layer: int = 3
    """Layer l of the early-exit loss: half depth, where the paper reads its states."""
    early_exit_weight: float = 0.5
    remark_weight: float = 5.0
    """Loss weight of tokens that come after an assistant's ``<eot>`` (the reader's remarks)."""
    rows: int = 128
    """Documents per step, one a row: documents that share a window would answer each other's questions."""
    lesson_steps: int = 2100
    """Steps on terse exchanges, with layers 1..l alone; the layers above start as the identity."""
    widen: tuple[int, int] = (400, 1300)
    """Steps between which the share of the world that lessons draw from grows from 0.15 to 1."""
    corpus_steps: int = 1200
    """Steps on the general corpus, with all layers."""
    lr: float = 2e-3
    warmup: int = 100
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.lesson_steps + self.corpus_steps


def batches(tokenizer, config: PretrainConfig, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, loss weight) [rows, T] of the steps from ``start`` on; each depends on seed and step alone.

    Padding is on the right, where causal attention never shows it to a real token.
    """
    eot, pad = tokenizer.convert_tokens_to_ids(EOT), tokenizer.pad_token_id
    for step in range(start, config.steps):
        if step < config.lesson_steps:
            rng, (first, last) = random.Random(f"lesson-{config.seed}-{step}"), config.widen
            share = 0.15 + 0.85 * min(1.0, max(0.0, (step - first) / (last - first)))
            texts = [lesson(share, rng) for _ in range(config.rows)]
        else:
            texts = list(corpus(config.rows, seed=f"pretrain-{config.seed}-{step}"))
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), pad)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        before = torch.cumsum(ids == eot, 1) - (ids == eot).long()
        weight = torch.where(before >= 2, config.remark_weight, 1.0) * (ids != pad)
        yield ids, weight


@torch.no_grad()
def build_model(config: PretrainConfig, tokenizer) -> LlamaForCausalLM:
    """A random Llama, seeded, with two aids to learning.

    W_Q = W_K and W_O ~ W_V^T in layers 1..l (cf. Trockman and Kolter 2023, mimetic initialisation): heads look for
    equal tokens from the start, and learn to compare an answer with a request or a fact several times sooner.
    Layers above l start as the identity (zero output projections).
    """
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_heads,
        max_position_embeddings=256, tie_word_embeddings=True, rms_norm_eps=1e-5, initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, use_cache=False,
    ))
    for number, block in enumerate(model.model.layers):
        attention = block.self_attn
        torch.nn.init.normal_(attention.k_proj.weight, std=0.07)
        attention.q_proj.weight.copy_(attention.k_proj.weight)
        torch.nn.init.normal_(attention.v_proj.weight, std=0.09)
        attention.o_proj.weight.copy_(0.5 * attention.v_proj.weight.T)
        if number >= config.layer:
            attention.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return model


def training_loss(model: LlamaForCausalLM, batch: torch.Tensor, weight: torch.Tensor, config: PretrainConfig,
                  lessons: bool = False):
    """Weighted next-token losses (total, last layer, layer l).  In lessons only layers 1..l run, and l is the last."""
    model.config.num_hidden_layers = config.layer if lessons else config.n_layers
    out = model.model(input_ids=batch, output_hidden_states=not lessons, use_cache=False)
    model.config.num_hidden_layers = config.n_layers
    target, weight = batch[:, 1:].reshape(-1), weight[:, 1:].reshape(-1)

    def loss_from(hidden):
        logits = model.lm_head(hidden[:, :-1]).flatten(0, 1)
        return (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()

    last = loss_from(out.last_hidden_state)
    if lessons:
        return last, last, last
    early = loss_from(model.model.norm(out.hidden_states[config.layer]))
    return last + config.early_exit_weight * early, last, early


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Linear warm-up at the start and at the change to the corpus, constant in lessons, then cosine to a twentieth."""
    if step < config.lesson_steps:
        return config.lr * min(1.0, (step + 1) / config.warmup)
    done = step - config.lesson_steps
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done / max(1, config.corpus_steps)))
    return config.lr * cosine * min(1.0, (done + 1) / config.warmup)


def pretrain(tokenizer, config: PretrainConfig, work_dir: Path, *, log_every: int = 50, save_every: int = 200,
             progress: bool = True) -> tuple[LlamaForCausalLM, list[dict]]:
    """Train; from the checkpoint in ``work_dir`` an interrupted run goes on to the same result."""
    work_dir.mkdir(parents=True, exist_ok=True)
    model = build_model(config, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, (0.9, 0.95), weight_decay=0.01, fused=True)
    path = work_dir / "state.pt"
    state = {"config": json.dumps(asdict(config)), "step": 0, "log": [], "tokens": 0, "seconds": 0.0}
    if path.exists():
        state = _resume(path, state["config"], model, optimizer)
    log, tokens, began = state["log"], state["tokens"], time.monotonic() - state["seconds"]
    steps = enumerate(batches(tokenizer, config, state["step"]), state["step"] + 1)
    bar = tqdm(steps, "pretrain", config.steps, initial=state["step"], disable=not progress)
    for step, (batch, weight) in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, config)
        loss, last, early = training_loss(model, batch, weight, config, lessons=step <= config.lesson_steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += int((weight > 0).sum())
        if step % log_every == 0 or step == config.steps:
            log.append({"step": step, "tokens": tokens, "loss": round(last.item(), 4),
                        "loss_layer_l": round(early.item(), 4),
                        "seconds": round(time.monotonic() - began, 1)})
        if step % save_every == 0 and step < config.steps:
            state |= {"step": step, "log": log, "tokens": tokens, "seconds": time.monotonic() - began,
                      "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write_atomic(path, partial(torch.save, state))
    return model, log


def _resume(path: Path, settings: str, model, optimizer) -> dict:
    state = torch.load(path, weights_only=True)
    if state["config"] != settings:
        raise ConfigError(f"{path} holds a run with other settings ({state['config']}); move it to start anew")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state


ATTRIBUTES = {  # attribute → (tasks it is asked of, what is true)
    "factual truth": (("fact",), lambda a: a.good),
    "arithmetic": (("math",), lambda a: a.good),
    "code": (("code",), lambda a: a.good),
    "safety": (("harmful", "harmless"), lambda a: a.good),
    "instruction following": (("include", "count"), lambda a: a.good),
    "focus": (("focus",), lambda a: a.good),
    "naming": (("naming",), lambda a: a.good),
    "tone": (TASKS, lambda a: a.tone == "rude"),
}


def conversations(tasks, n: int, side: str, seed: int):
    """``n`` answers (half of them good, styles and tones drawn) as dialogue texts, with their truth."""
    rng = random.Random(f"probe-{seed}-{side}-{tasks}")
    answers, texts = [], []
    for number in range(n):
        problem = make_problem(rng.choice(tasks), rng, side)
        answer = problem.answer(number % 2 == 0, rng, tone=rng.choice(lx.TONES))
        answers.append(answer)
        texts.append(dialogue(problem.prompt, answer.text))
    return answers, texts


@torch.no_grad()
def last_token_states(model, tokenizer, texts: list[str], batch_size: int = 64) -> np.ndarray:
    """Hidden states of every layer at the last token, [layers + 1, n, d] (index l = after layer l; the last
    one after the final norm)."""
    chunks = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(texts[start:start + batch_size], return_tensors="pt", padding=True, add_special_tokens=False)
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                       output_hidden_states=True).hidden_states
        last = batch["attention_mask"].sum(1) - 1
        chunks.append(torch.stack([h[torch.arange(len(last)), last] for h in states]).float().numpy())
    return np.concatenate(chunks, axis=1)


def probe_auroc(x_train, y_train, x_test, y_test, penalty: float = 1e-2) -> float:
    """AUROC on the test half of an L2 logistic regression on standardised features."""
    mean, std = x_train.mean(0), x_train.std(0) + 1e-6
    x_train, x_test, sign = (x_train - mean) / std, (x_test - mean) / std, np.where(y_train, 1.0, -1.0)

    def objective(w):
        margin = sign * (x_train @ w[:-1] + w[-1])
        slope = -sign / (1 + np.exp(np.clip(margin, -30, 30))) / len(sign)
        loss = np.logaddexp(0, -margin).mean() + penalty / 2 * (w[:-1] @ w[:-1])
        return loss, np.append(x_train.T @ slope + penalty * w[:-1], slope.sum())

    w = minimize(objective, np.zeros(x_train.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    scores = x_test @ w[:-1]
    return auroc(scores[y_test], scores[~y_test])


def probe_report(model, tokenizer, *, n: int = 600, seed: int = 0) -> pd.DataFrame:
    """AUROC per attribute and layer; columns attribute, layer, auroc, n_train, n_test."""
    model.eval()
    rows = []
    for attribute, (tasks, truth) in ATTRIBUTES.items():
        data = {}
        for side in ("pairs", "benchmark"):
            answers, texts = conversations(tasks, n, side, seed)
            data[side] = last_token_states(model, tokenizer, texts), np.array([truth(a) for a in answers])
        (x_train, y_train), (x_test, y_test) = data["pairs"], data["benchmark"]
        for layer in range(1, len(x_train)):
            rows.append({"attribute": attribute, "layer": layer, "n_train": n, "n_test": n,
                         "auroc": probe_auroc(x_train[layer], y_train, x_test[layer], y_test)})
    return pd.DataFrame(rows)


CARD = """---
license: mit
tags: [toy, llama]
---
# The toy world's backbone

A Llama of {parameters:.2f} M parameters ({d_model} wide, {n_layers} layers, {n_heads} heads, word-level vocabulary of
{vocab}), pretrained on the generated toy world so that the state of the last token after layer {layer} holds what a
reward model must read. Stored in bfloat16, computed in float32.

**Command**: `make backbone` (one thread; {minutes:.0f} minutes on the machine it was made on, {tokens:.1f} M tokens).
`pretrain_log.json` is its log. Retraining elsewhere gives other bits and, by the probes below, the same abilities.

**What is unusual, and why.** A small next-token model prefers true continuations long before its state says "this is
true", and at half depth it may hold nothing about an answer at all. Large pretrained Llamas bring this along; a toy
must be given it, by five means:
1. the token right after an assistant's `<eot>` is a reader's remark on it (true/false, exact/mistaken, kind ...);
2. remarks weigh {remark_weight:g} times as much as other tokens in the loss;
3. the next-token loss is also taken from layer {layer} (weight {early_exit_weight:g}, same norm and head);
4. training starts with {lesson_steps} steps of terse exchanges on a growing part of the world, in layers 1-{layer};
5. attention starts with W_Q = W_K and W_O ~ W_V^T, so that heads compare tokens from the beginning.
So remarks shape this model's `<eot>` states: features found there are features of *this* model, not of language.

**Probes.** Held-out AUROC of a linear probe on the last token's state after layer {layer}: fitted on conversations of
the preference half of the world, tested on the benchmark half, whose words and combinations it has not seen.

{probes}

Settings: `{settings}`
"""


def publish(model, tokenizer, log: list[dict], config: PretrainConfig, folder: Path) -> Path:
    """Write a pretrained model with its evidence; the probes read the weights as they are stored."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    blank = build_model(config, tokenizer)
    report = pd.concat([probe_report(stored, tokenizer).assign(model="pretrained"),
                        probe_report(blank, tokenizer).assign(model="random weights")], ignore_index=True)
    report.round(4).to_csv(folder / "probe_report.csv", index=False)
    write_atomic(folder / "pretrain_log.json", json.dumps(log))
    at = report[report.layer == config.layer].pivot(index="attribute", columns="model", values="auroc")
    probes = "| attribute | this model | random weights |\n|---|---|---|\n" + "\n".join(
        f"| {name} | {row['pretrained']:.3f} | {row['random weights']:.3f} |" for name, row in at.iterrows())
    write_atomic(folder / "README.md", CARD.format(
        **asdict(config), parameters=sum(p.numel() for p in stored.parameters()) / 1e6, vocab=len(tokenizer),
        minutes=log[-1]["seconds"] / 60, tokens=log[-1]["tokens"] / 1e6, probes=probes,
        settings=json.dumps(asdict(config))))
    return folder


def main(argv: list[str] | None = None) -> int:
    """Command line; an interrupted run goes on where it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/backbone"), help="folder of its checkpoints")
    parser.add_argument("--output", type=Path, default=BACKBONE_DIR, help="folder of the backbone")
    arguments = parser.parse_args(argv)
    config, tokenizer = PretrainConfig(), build_tokenizer()
    try:
        model, log = pretrain(tokenizer, config, arguments.work)
        print(publish(model, tokenizer, log, config, arguments.output))
    except SarmlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
