"""Reward training: our trainer against TRL's, on the same model and pairs.

    OMP_NUM_THREADS=1 python benchmarks/reward_step.py --model FOLDER --pairs FOLDER

A scalar reward model of half depth, float32, no gradient checkpointing, batches of 16 pairs of at most 220 tokens,
AdamW; each run is a process of its own on one thread, rounds interleaved.  Time is process-CPU time of ``train()``;
memory is how far the peak grows over what the process held when it began.  Both also with TRL's defaults (bfloat16 and
gradient checkpointing).  Ours puts pairs of similar length into one batch, TRL's takes them as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from table2 import machine

from sarmlib.backbone import load_backbone, load_tokenizer
from sarmlib.chat import encode_conversations
from sarmlib.data.pairs import conversations, load_pairs
from sarmlib.sarm.model import ScalarRewardModel
from sarmlib.sarm.training import RewardTrainConfig, RewardTrainer

BATCH, LONGEST, LR = 16, 220, 2e-4


def chosen_pairs(tokenizer, source: str, count: int) -> list[dict]:
    """The first pairs of which both sides fit, so that neither trainer cuts or drops any."""
    kept = []
    for pair in load_pairs(source):
        if max(map(len, encode_conversations(tokenizer, conversations(pair), 10_000))) <= LONGEST:
            kept.append(pair)
        if len(kept) == count:
            return kept
    raise SystemExit(f"{source} has only {len(kept)} pairs of at most {LONGEST} tokens")


def ours(model, tokenizer, pairs: list[dict], folder: str, settings: dict):
    return RewardTrainer(model, tokenizer, pairs, config=RewardTrainConfig(
        lr=LR, epochs=1, batch_size=BATCH, max_length=LONGEST, use_cpu=True, **settings), output_dir=folder)


def trl(model, tokenizer, pairs: list[dict], folder: str, settings: dict):
    import datasets
    import trl
    rows = datasets.Dataset.from_list([dict(zip(("chosen", "rejected"), conversations(pair), strict=True))
                                       for pair in pairs])
    return trl.RewardTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=trl.RewardConfig(
        output_dir=folder, num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=LR,
        max_length=LONGEST, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **settings))


CONTESTANTS = {"sarmlib": (ours, {}), "TRL": (trl, {"bf16": False, "gradient_checkpointing": False}),
               "sarmlib, as TRL's defaults": (ours, {"bf16": True, "gradient_checkpointing": True}),
               "TRL, its defaults": (trl, {})}


def one(name: str, arguments: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(arguments.model)
    pairs = chosen_pairs(tokenizer, arguments.pairs, arguments.count)
    model = ScalarRewardModel.from_backbone(load_backbone(arguments.model, keep_final_norm=True))
    make, settings = CONTESTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(model, tokenizer, pairs, folder, settings)
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    return {"seconds": seconds, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024,
            "steps": trainer.state.global_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments)))
        return
    print(machine())
    found: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    for _ in range(arguments.rounds):
        for name, results in found.items():
            done = subprocess.run([sys.executable, *sys.argv, "--one", name], capture_output=True, text=True,
                                  env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
    base = [result["seconds"] for result in found["sarmlib"]]
    for name, results in found.items():
        ratio = statistics.median(one["seconds"] / least for one, least in zip(results, base, strict=True))
        print(f"{name:<26}{min(one['seconds'] for one in results):8.1f} s {ratio:6.2f}x "
              f"{statistics.median(one['mib'] for one in results):8.0f} MiB  {results[0]['steps']} steps")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
