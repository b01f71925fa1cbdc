"""Pretrain the toy backbone.

The loss is next-token cross-entropy at the last layer plus ``early_exit_weight`` times the same at layer
*l* (through the same final norm and head).  Without the second term a small model keeps nothing about an
answer's quality at half depth, and no reward model cut there can read what is not in the state.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ...artifacts import write_atomic
from ...errors import ConfigError
from . import lexicon as lx
from .datasets import EOT, corpus, dialogue, lesson
from .grammar import TASKS, make_problem

BACKBONE_DIR = Path(__file__).parent / "backbone"


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


def batches(tokenizer: PreTrainedTokenizerFast, config: PretrainConfig, start: int = 0
            ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, loss weight) [rows, T] of the steps from ``start`` on; a step's batch depends on seed and step alone.

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
def build_model(config: PretrainConfig, vocab_size: int, pad_id: int, bos_id: int, eos_id: int) -> LlamaForCausalLM:
    """A random Llama, seeded, with two aids to learning.

    W_Q = W_K and W_O ~ W_V^T in layers 1..l (cf. Trockman and Kolter 2023, mimetic initialisation): heads then look
    for equal tokens from the start, and comparing an answer with a request or a known fact is learned several times
    sooner.  Layers above l start as the identity (zero output projections).
    """
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_heads,
        max_position_embeddings=256, tie_word_embeddings=True, rms_norm_eps=1e-5, initializer_range=0.04,
        pad_token_id=pad_id, bos_token_id=bos_id, eos_token_id=eos_id, use_cache=False,
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


@torch.no_grad()
def verdict_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: PretrainConfig,
                     n: int = 100) -> dict[str, float]:
    """Share of answers per task after which layer l, through the head, prefers the true verdict to the false one."""
    rng, result = random.Random("verdicts"), {}
    for task in TASKS:
        good, texts = [], []
        for number in range(n):
            problem = make_problem(task, rng)
            good.append(number % 2 == 0)
            texts.append(dialogue(problem.prompt, problem.answer(good[-1], rng).text))
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        model.config.num_hidden_layers = config.layer
        hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        model.config.num_hidden_layers = config.n_layers
        logits = model.lm_head(hidden[torch.arange(n), batch["attention_mask"].sum(1) - 1])
        yes, no = tokenizer.convert_tokens_to_ids([f" {word}" for word in lx.VERDICTS[task]])
        result[task] = float(((logits[:, yes] > logits[:, no]) == torch.tensor(good)).float().mean())
    return result


def pretrain(tokenizer: PreTrainedTokenizerFast, config: PretrainConfig, work_dir: Path, *, log_every: int = 50,
             save_every: int = 200, progress: bool = True) -> tuple[LlamaForCausalLM, list[dict]]:
    """Train the backbone; ``work_dir`` holds a checkpoint from which an interrupted run goes on to the same result."""
    work_dir.mkdir(parents=True, exist_ok=True)
    model = build_model(config, len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    start, log, tokens, before = _resume(work_dir, config, named, optimizer)
    began = time.monotonic() - before
    bar = tqdm(total=config.steps, initial=start, desc="pretrain backbone", disable=not progress)
    for step, (batch, weight) in enumerate(batches(tokenizer, config, start), start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss, last, early = training_loss(model, batch, weight, config, lessons=step < config.lesson_steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += int((weight > 0).sum())
        bar.update()
        if (step + 1) % log_every == 0 or step + 1 == config.steps:
            verdicts = verdict_accuracy(model, tokenizer, config)
            log.append({"step": step + 1, "tokens": tokens, "loss": round(last.item(), 4),
                        "loss_layer_l": round(early.item(), 4), "seconds": round(time.monotonic() - began, 1),
                        "verdicts": {task: round(value, 3) for task, value in verdicts.items()}})
            bar.set_postfix(loss=log[-1]["loss"], verdicts=f"{sum(verdicts.values()) / len(verdicts):.2f}")
            write_atomic(work_dir / "log.json", json.dumps(log, indent=0))
        if (step + 1) % save_every == 0 and step + 1 < config.steps:
            _save(work_dir, config, named, optimizer, step + 1, log, tokens, time.monotonic() - began)
    bar.close()
    return model, log


def _save(work_dir, config, named, optimizer, step, log, tokens, seconds) -> None:
    tensors = {}
    for name, parameter in named.items():
        tensors[f"w.{name}"] = parameter.data
        if state := optimizer.state.get(parameter):  # the upper layers have none before they are trained
            tensors |= {f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"], f"t.{name}": state["step"]}
    meta = {"config": json.dumps(asdict(config)), "log": json.dumps(log), "step": str(step),
            "tokens": str(tokens), "seconds": str(seconds)}
    save_file(tensors, work_dir / "state.tmp", metadata=meta)
    os.replace(work_dir / "state.tmp", work_dir / "state.safetensors")


def _resume(work_dir, config, named, optimizer) -> tuple[int, list[dict], int, float]:
    path = work_dir / "state.safetensors"
    if not path.exists():
        return 0, [], 0, 0.0
    with safe_open(path, "pt") as saved:
        meta = saved.metadata()
        if json.loads(meta["config"]) != json.loads(json.dumps(asdict(config))):
            raise ConfigError(f"{path} holds a run with other settings ({meta['config']}); move it away to start anew")
        held = set(saved.keys())
        for name, parameter in named.items():
            parameter.data.copy_(saved.get_tensor(f"w.{name}"))
            if f"m.{name}" in held:
                optimizer.state[parameter] = {
                    "step": saved.get_tensor(f"t.{name}"), "exp_avg": saved.get_tensor(f"m.{name}"),
                    "exp_avg_sq": saved.get_tensor(f"v.{name}")}
    return int(meta["step"]), json.loads(meta["log"]), int(meta["tokens"]), float(meta["seconds"])
