"""Make the shipped backbone: pretrain, round to bfloat16, probe, and write the folder with its card."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaForCausalLM

from ...artifacts import write_atomic
from .pretrain import BACKBONE_DIR, PretrainConfig, build_model, pretrain
from .probe import probe_report
from .tokenizer import build_tokenizer

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

{absent}
Settings: `{settings}`
"""


def make_backbone(work_dir: Path, folder: Path = BACKBONE_DIR, config: PretrainConfig | None = None,
                  progress: bool = True) -> Path:
    """Pretrain (resuming from ``work_dir``), and write weights, tokenizer, log, probe report and card to ``folder``."""
    config, tokenizer = config or PretrainConfig(), build_tokenizer()
    model, log = pretrain(tokenizer, config, work_dir, progress=progress)
    return publish(model, tokenizer, log, config, folder)


def publish(model, tokenizer, log: list[dict], config: PretrainConfig, folder: Path) -> Path:
    """Write a pretrained model with its evidence; the probes read the weights as they are stored."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    blank = build_model(config, len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    report = pd.concat([probe_report(stored, tokenizer).assign(model="pretrained"),
                        probe_report(blank, tokenizer).assign(model="random weights")], ignore_index=True)
    report.round(4).to_csv(folder / "probe_report.csv", index=False)
    write_atomic(folder / "pretrain_log.json", json.dumps(log))
    at = report[report.layer == config.layer].pivot(index="attribute", columns="model", values="auroc")
    probes = "| attribute | this model | random weights |\n|---|---|---|\n" + "\n".join(
        f"| {name} | {row['pretrained']:.3f} | {row['random weights']:.3f} |" for name, row in at.iterrows())
    low = [name for name, row in at.iterrows() if row["pretrained"] < 0.9]
    absent = f"**Absent** (below 0.9): {', '.join(low)}.\n" if low else "Every attribute reads 0.9 or more.\n"
    write_atomic(folder / "README.md", CARD.format(
        **asdict(config), parameters=sum(p.numel() for p in stored.parameters()) / 1e6, vocab=len(tokenizer),
        minutes=log[-1]["seconds"] / 60, tokens=log[-1]["tokens"] / 1e6, probes=probes, absent=absent,
        settings=json.dumps(asdict(config))))
    return folder
