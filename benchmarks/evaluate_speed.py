"""Wall time of ``evaluate`` on 1,000 prompts against a loop over single texts, as the official script runs it.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/evaluate_speed.py

Same model (a sequence classifier of the toy backbone's shape), same texts and tokenizer.  Each of ``--rounds`` rounds
times both on all prompts, one after the other; both render, tokenize and score, and give the same numbers (checked).
The loop does what the official pipeline does for each text: tokenizer call, look for a doubled BOS, forward, float.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from table2 import machine
from transformers import AutoConfig, LlamaForSequenceClassification

from sarmlib.backbone import load_tokenizer
from sarmlib.data.toyworld import BACKBONE_DIR
from sarmlib.data.toyworld.datasets import rewardbench2
from sarmlib.evaluation.scorer import Scorer, answers, evaluate, prepared


@torch.no_grad()
def one_by_one(scorer: Scorer, rows: list[dict]) -> list[float]:
    """Render, tokenize and score one text at a time."""
    out = []
    for row in rows:
        for answer in answers(row):
            talk = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
            text = scorer.tokenizer.apply_chat_template(talk, tokenize=False)
            batch = scorer.tokenizer([text], return_tensors="pt", truncation=True, padding=True, max_length=256)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            start = mask.argmax(dim=1)
            if bool((ids[0, start] == scorer.tokenizer.bos_token_id) & (ids[0, start + 1] == ids[0, start])):
                mask[0, start] = 0
            out.append(float(scorer.model(input_ids=ids, attention_mask=mask).logits))
    return out


def main() -> None:
    """Time both, print the ratio of each slice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of both (unset OMP_NUM_THREADS too)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(BACKBONE_DIR, num_labels=1)
    model = LlamaForSequenceClassification(config).float()
    torch.nn.init.normal_(model.score.weight)
    scorer = prepared(model, load_tokenizer(BACKBONE_DIR), BACKBONE_DIR)
    rows = rewardbench2(arguments.prompts // 5, 0, ties=0)
    one_by_one(scorer, rows[:20])  # warm up
    ours, theirs = [], []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            evaluate(scorer, {"rewardbench2": rows}, folder)
            ours.append(time.perf_counter() - start)
            start = time.perf_counter()
            slow = one_by_one(scorer, rows)
            theirs.append(time.perf_counter() - start)
            written = map(json.loads, (Path(folder) / "scores.jsonl").read_text().splitlines()[1:])
            fast = [line["score"] for line in sorted(written, key=lambda line: (line["row"], line["slot"]))]
        gap = float(np.abs(np.subtract(fast, slow)).max())
        assert gap < 1e-4, gap
        print(f"round {number}: evaluate {ours[-1]:.2f} s, one by one {theirs[-1]:.2f} s, ratio "
              f"{theirs[-1] / ours[-1]:.1f}, largest difference {gap:.1e}", flush=True)
    print(f"{len(rows)} prompts, {4 * len(rows)} texts: fastest evaluate {min(ours):.2f} s, fastest loop "
          f"{min(theirs):.2f} s, ratio {min(theirs) / min(ours):.1f}; load {os.getloadavg()[0]:.1f}; "
          f"{torch.get_num_threads()} threads\n{machine()}")


if __name__ == "__main__":
    main()
