"""Pretrain the shipped toy backbone again, probe it, and write it with its card.

    python tools/backbone.py [--work runs/backbone]        (or: make backbone)

Plain next-token cross-entropy at the last layer.  What makes a model this small hold an answer's quality in its state
is in the texts: of the pairs half of the world readers say right or wrong at once after an answer, and the same
questions are answered well and badly side by side; of the whole world there are many answers that nobody judges, mostly
good ones, so that what a good answer is lies in what both halves share.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
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
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sarmlib.data.toyworld import BACKBONE_DIR
from sarmlib.data.toyworld import lexicon as lx
from sarmlib.data.toyworld.datasets import ASSISTANT, BOS, CHAT_TEMPLATE, EOT, USER, corpus, dialogue
from sarmlib.data.toyworld.grammar import TASKS, make_problem
from sarmlib.errors import ConfigError, SarmlibError
from sarmlib.evaluation.statistics import auroc
from sarmlib.store import write_atomic

SPECIALS = ["<pad>", "<unk>", BOS, USER, ASSISTANT, EOT]
PATTERN = r" ?[A-Za-z]+| ?[0-9]+|\n| ?[^\sA-Za-z0-9]|\s"
LESSON_WEIGHTS = (2.0, 2.0, 2.0, 1.2, 1.2, 1.5, 1.0, 1.5, 2.0)
"""How often lessons ask each task, in the order of TASKS: more often where it takes longer to learn."""


def build_tokenizer(documents: int = 30_000) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over every word of the world, each with its leading space, and the chat template."""
    pieces = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    words: set[str] = {f" {number}" for number in range(22)}
    for text in corpus(documents, seed=0):
        for part in filter(None, re.split("|".join(SPECIALS), text)):
            words.update(word for word, _ in pieces.pre_tokenizer.pre_tokenize_str(part))
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # Every stretch of text starts with one space, so that a word is the same item with or without a template.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(left=True, right=False), normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pieces.pre_tokenizer
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token=BOS, eos_token=EOT,
        extra_special_tokens=[USER, ASSISTANT], clean_up_tokenization_spaces=False,
        model_max_length=256, truncation_side="left", padding_side="right")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def lesson(rng: random.Random, share: float) -> list[str]:
    """Terse exchanges: one of the pairs half answered well and badly, each with its verdict, and two of the whole world
    without, whose answers are mostly good."""
    problem = make_problem(rng.choices(TASKS, LESSON_WEIGHTS)[0], rng, "pairs", share)
    texts = []
    for good in (True, False):
        answer = problem.answer(good, rng, style="concise", tone="neutral")
        texts.append(dialogue(problem.prompt, answer.text) + f" {lx.VERDICTS[0 if good else 1]}.")
    for side in ("pairs", "benchmark"):
        problem = make_problem(rng.choice(TASKS), rng, side, share)
        answer = problem.answer(rng.random() < 0.9, rng, style="concise", tone="neutral")
        texts.append(dialogue(problem.prompt, answer.text))
    return texts


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of the shipped backbone (about 1.0 M parameters).  Lessons come first, then the general corpus."""

    d_model: int = 128
    n_layers: int = 6
    n_heads: int = 4
    d_ff: int = 256
    layer: int = 3
    """Layer after which the toy profile reads the states; nothing here depends on it but the card."""
    remark_weight: float = 10.0
    """Loss weight of tokens that come after an assistant's ``<eot>`` (the reader's remarks)."""
    rows: int = 128
    """Documents per step, one a row: documents that share a window would answer each other's questions."""
    lesson_steps: int = 4000
    lesson_share: float = 0.7
    """In the first ``lesson_steps`` this share of a step's documents are terse exchanges."""
    widen: tuple[int, int] = (800, 2500)
    """Steps between which the share of the world that lessons draw from grows from 0.15 to 1."""
    corpus_steps: int = 1500
    """Steps on the general corpus alone."""
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 100
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.lesson_steps + self.corpus_steps


def documents(config: PretrainConfig, step: int) -> list[str]:
    """The texts of one step; they depend on seed and step alone."""
    lessons = int(config.rows * config.lesson_share) if step < config.lesson_steps else 0
    rng = random.Random(f"lesson-{config.seed}-{step}")
    first, last = config.widen
    share = 0.15 + 0.85 * min(1.0, max(0.0, (step - first) / (last - first)))
    texts: list[str] = []
    while len(texts) < lessons:
        texts += lesson(rng, share)
    return texts[:lessons] + list(
        corpus(config.rows - lessons, seed=f"pretrain-{config.seed}-{step}"))


def batches(tokenizer, config: PretrainConfig, step: int, parts: int = 4) -> Iterator[tuple]:
    """(input_ids, loss weight) [rows / parts, T] of one step, by length, so that little of it is padding.

    Padding is on the right, where causal attention never shows it to a real token.
    """
    eot, pad = tokenizer.convert_tokens_to_ids(EOT), tokenizer.pad_token_id
    rows = sorted(tokenizer(documents(config, step), add_special_tokens=False)["input_ids"], key=len)
    for start in range(0, len(rows), len(rows) // parts):
        part = rows[start:start + len(rows) // parts]
        ids = torch.full((len(part), len(part[-1])), pad)
        for number, row in enumerate(part):
            ids[number, : len(row)] = torch.tensor(row)
        before = torch.cumsum(ids == eot, 1) - (ids == eot).long()
        yield ids, torch.where(before >= 2, config.remark_weight, 1.0) * (ids != pad)


@torch.no_grad()
def build_model(config: PretrainConfig, tokenizer) -> LlamaForCausalLM:
    """A random Llama, seeded, with one aid to learning.

    W_Q = W_K and W_O ~ W_V^T (cf. Trockman and Kolter 2023, mimetic initialisation): heads look for equal tokens from
    the start, and learn to compare an answer with a request or a fact several times sooner.
    """
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_heads,
        max_position_embeddings=256, tie_word_embeddings=True, rms_norm_eps=1e-5, initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, use_cache=False,
    ))
    for block in model.model.layers:
        attention = block.self_attn
        torch.nn.init.normal_(attention.k_proj.weight, std=0.07)
        attention.q_proj.weight.copy_(attention.k_proj.weight)
        torch.nn.init.normal_(attention.v_proj.weight, std=0.09)
        attention.o_proj.weight.copy_(0.5 * attention.v_proj.weight.T)
    return model


def training_step(model: LlamaForCausalLM, optimizer, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """One step on the weighted mean of the next-token cross-entropy over all parts; returns it."""
    total, loss = sum(weight[:, 1:].sum() for _, weight in parts), 0.0
    for ids, weight in parts:
        weight = weight[:, 1:]
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][weight > 0]  # no padding
        each = F.cross_entropy(model.lm_head(hidden), ids[:, 1:][weight > 0], reduction="none")
        mean = (each * weight[weight > 0]).sum() / total
        mean.backward()
        loss += mean.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, constant in lessons, then cosine to a twentieth."""
    done = max(0, step - config.lesson_steps) / max(1, config.corpus_steps)
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * cosine * min(1.0, (step + 1) / config.warmup)


@torch.no_grad()
def verdicts(model, tokenizer, n: int = 128) -> dict[str, dict[str, float]]:
    """AUROC of the log-odds of Right against Wrong after an answer, by half of the world and task."""
    right, wrong = (tokenizer.convert_tokens_to_ids(f" {word}") for word in lx.VERDICTS)
    direction = (model.lm_head.weight[right] - model.lm_head.weight[wrong]).numpy()
    found: dict[str, dict[str, float]] = {"pairs": {}, "benchmark": {}}
    for (side, scores), task in itertools.product(found.items(), TASKS):
        answers, texts = conversations((task,), n, side, seed=9)
        odds, good = last_token_states(model, tokenizer, texts)[-1] @ direction, np.array([a.good for a in answers])
        scores[task] = round(float(auroc(odds[good], odds[~good])), 2)
    return found


def pretrain(tokenizer, config: PretrainConfig, work_dir: Path, *, log_every: int = 50, save_every: int = 200,
             progress: bool = True) -> tuple[LlamaForCausalLM, list[dict]]:
    """Train; from the checkpoint in ``work_dir`` an interrupted run goes on to the same result."""
    work_dir.mkdir(parents=True, exist_ok=True)
    model = build_model(config, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, (0.9, 0.95),
                                  weight_decay=config.weight_decay, fused=True)
    path = work_dir / "state.pt"
    state = {"config": json.dumps(asdict(config)), "step": 0, "log": [], "tokens": 0, "seconds": 0.0}
    if path.exists():
        state = _resume(path, state["config"], model, optimizer)
    log, tokens, began = state["log"], state["tokens"], time.monotonic() - state["seconds"]
    steps = range(state["step"] + 1, config.steps + 1)
    for step in tqdm(steps, "pretrain", config.steps, initial=state["step"], disable=not progress):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, config)
        parts = list(batches(tokenizer, config, step - 1))
        loss = training_step(model, optimizer, parts)
        tokens += sum(int((weight > 0).sum()) for _, weight in parts)
        if step % log_every == 0 or step == config.steps:
            log.append({"step": step, "tokens": tokens, "loss": round(loss, 4),
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
{vocab}), pretrained on the generated toy world with next-token cross-entropy at its last layer. Stored in bfloat16,
computed in float32. The toy profile reads its states after layer {layer}.

**Command**: `make backbone` (one thread; {minutes:.0f} minutes on the machine it was made on, {tokens:.1f} M tokens).
`pretrain_log.json` is its log. Retraining elsewhere gives other bits and, by the tables below, the same abilities.

**What it is told.** Preference pairs draw from one half of the world, benchmarks from the other. Of the pairs half
many answers in the corpus are wrong, and a reader says *Right* or *Wrong* after them, two words for all tasks.
Of the benchmark half no text says what is right or wrong. What a good answer is there has to be carried over.

**What is unusual, and why.** A small next-token model prefers true continuations long before its state says "this is
true". Large pretrained Llamas bring this along; a toy must be given it, by four means:
1. a verdict comes right after an assistant's `<eot>`, and remarks weigh {remark_weight:g} times as much as the rest;
2. in the first {lesson_steps} steps most documents are terse exchanges on a growing part of the world;
3. there each judged question is answered well and badly side by side, and as many answers are not judged;
4. attention starts with W_Q = W_K and W_O ~ W_V^T, so that heads compare tokens from the beginning.
So verdicts shape this model's `<eot>` states: features found there are features of *this* model, not of language.

**Right or wrong?** AUROC of the log-odds of the two words after an answer:

{verdicts}

**Probes.** Held-out AUROC of a linear probe on the last token's state: fitted on conversations of the pairs half,
tested on the benchmark half. Random weights: after layer {layer}.

{probes}

Settings: `{settings}`
"""


def table(frame: pd.DataFrame, form: str = ".2f") -> str:
    """Markdown of a table with its index."""
    lines = [[frame.index.name, *map(str, frame.columns)], ["---"] * (len(frame.columns) + 1)]
    lines += [[str(name), *(f"{value:{form}}" for value in row)]
              for name, row in zip(frame.index, frame.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def publish(model, tokenizer, log: list[dict], config: PretrainConfig, folder: Path, n: int = 600) -> Path:
    """Write a pretrained model with its evidence, from ``n`` conversations each, by the weights as they are stored."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    blank = build_model(config, tokenizer)
    report = pd.concat([probe_report(stored, tokenizer, n=n).assign(model="pretrained"),
                        probe_report(blank, tokenizer, n=n).assign(model="random weights")], ignore_index=True)
    report.round(4).to_csv(folder / "probe_report.csv", index=False)
    write_atomic(folder / "pretrain_log.json", json.dumps(log))
    layers = report[report.model == "pretrained"].pivot(index="attribute", columns="layer", values="auroc")
    blank_at = report[(report.model == "random weights") & (report.layer == config.layer)]
    probes = layers.rename(columns="layer {}".format).assign(random=blank_at.set_index("attribute").auroc)
    told = pd.DataFrame(verdicts(stored, tokenizer, n)).rename_axis("task").rename(columns="{} half".format)
    write_atomic(folder / "README.md", CARD.format(
        **asdict(config), parameters=sum(p.numel() for p in stored.parameters()) / 1e6, vocab=len(tokenizer),
        minutes=log[-1]["seconds"] / 60, tokens=log[-1]["tokens"] / 1e6, probes=table(probes), verdicts=table(told),
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
