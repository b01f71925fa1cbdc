"""Scoring: the SAE at the reward position only, against the SAE at every token (the official code), and full depth.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/scoring.py

Random Llama of hidden 256 and 8 layers (the Llama-3 proportions), cut at 4; M = 16384, k = 12; batches of 8 texts of
128 to 256 tokens, right-padded.  Times are process-CPU time of one thread, contestants interleaved, median of the
rounds' ratios.  Memory is the growth of the peak resident set (VmHWM, reset after one short warm-up) of a fresh process
that scores four batches, one process for each contestant; Linux only.  Contestants that should give the same rewards
are checked to.  Best of 4: answers of 32 to 64 tokens to prompts of three lengths, with the prompt's tokens computed
once and without.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from table2 import machine
from transformers import AutoModel, LlamaConfig

from sarmlib.backbone import cut_config, strip_final_norm
from sarmlib.chat import collate, reward_position
from sarmlib.evaluation import scorer
from sarmlib.sae.topk import TopKSAE
from sarmlib.sarm.model import SarmForSequenceClassification, ScalarRewardModel

D, LAYERS, CUT, M, K, T, BATCH = 256, 8, 4, 16384, 12, 256, 8


def backbone(layers: int, keep_norm: bool = False):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=D, intermediate_size=D * 7 // 2, num_hidden_layers=LAYERS, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=1000, max_position_embeddings=2048, pad_token_id=0)
    model = AutoModel.from_config(cut_config(config, layers)).eval()
    if not keep_norm:
        strip_final_norm(model)
    return model


def sarm(topk: bool = True) -> SarmForSequenceClassification:
    sae = TopKSAE(D, M, K, relu=False, encoder_bias=True, generator=torch.Generator().manual_seed(0))
    model = SarmForSequenceClassification.from_backbone_and_sae(backbone(CUT), sae, topk=topk)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    return model.eval()


def every_token(model: SarmForSequenceClassification):
    """The official order of work: normalise, encode, dense top k and score at each token; then pick the last."""
    sae = model.sae

    def forward(input_ids, attention_mask):
        hidden = model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        x = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.std(-1, keepdim=True) + 1e-6)
        latents = torch.nn.functional.linear(x - sae.b_pre, sae.W_enc, sae.b_enc)
        if model.config.topk:
            values, indices = torch.topk(latents, sae.k, dim=-1)
            latents = torch.zeros_like(latents).scatter_(-1, indices, values)
        return model.score(latents)[torch.arange(len(input_ids)), reward_position(attention_mask)]

    return forward


def contestants() -> dict:
    """Name -> a function that builds the forward pass (input_ids, attention_mask) -> rewards [B, 1]."""
    def ours(topk):
        model = sarm(topk)
        return lambda **batch: model(**batch).logits

    def scalar():
        full = ScalarRewardModel.from_backbone(backbone(LAYERS, keep_norm=True))
        return lambda **batch: full(**batch).logits

    def decoder():
        half = backbone(CUT)
        return lambda **batch: half(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return {"reward position": lambda: ours(True), "every token": lambda: every_token(sarm()),
            "reward position, no TopK": lambda: ours(False), "every token, no TopK": lambda: every_token(sarm(False)),
            "scalar, all 8 layers": scalar, "4 layers alone": decoder}


def batches(n: int) -> list[dict]:
    rng = torch.Generator().manual_seed(2)
    sizes = [[T, *torch.randint(T // 2, T + 1, (BATCH - 1,), generator=rng).tolist()] for _ in range(n)]
    return [collate([torch.randint(6, 1000, (size,), generator=rng).tolist() for size in row]) for row in sizes]


def resident(field: str) -> float:
    """MiB of VmRSS or VmHWM of this process."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@torch.inference_mode()
def memory(name: str) -> None:
    """Print the extra peak of one contestant in this (fresh) process."""
    forward = contestants()[name]()
    forward(**{key: value[:1, :8] for key, value in batches(1)[0].items()})
    given = batches(4)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    before = resident("VmRSS")
    for batch in given:
        forward(**batch)
    print(resident("VmHWM") - before)


def extra(name: str, rounds: int) -> float:
    """Median MiB over fresh processes."""
    command = [sys.executable, __file__, "--memory", name]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return statistics.median(float(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
                             for _ in range(rounds))


@torch.inference_mode()
def forwards(rounds: int, processes: int) -> None:
    forms = {name: make() for name, make in contestants().items()}
    times, given = {name: [] for name in forms}, batches(rounds + 1)
    for number, batch in enumerate(given):
        rewards = {}
        for name, forward in forms.items():
            start = time.process_time()
            rewards[name] = forward(**batch)
            if number:  # the first round warms up
                times[name].append(time.process_time() - start)
        for topk in ("", ", no TopK"):
            ours, other = (rewards[kind + topk] for kind in ("reward position", "every token"))
            gaps = ((ours - other).abs() / (1 + other.abs())).flatten().sort().values
            assert gaps[-2] < 1e-4, gaps  # in one text, rounding may swap two features at the edge of TopK
    base = times["reward position"]
    print(f"forward of {BATCH} texts of {T // 2} to {T} tokens, d {D}, M {M}, k {K}; {rounds} rounds, {processes} "
          "processes")
    for name, taken in times.items():
        ratio = statistics.median(t / b for t, b in zip(taken, base, strict=True))
        print(f"  {name:<26}{statistics.median(taken) * 1e3:>7.0f} ms{ratio:>7.2f}x{extra(name, processes):>8.0f} MiB "
              "extra", flush=True)


def best_of_4(rounds: int, prompts: int = 16) -> None:
    """Rewards of 4 answers to each prompt, with and without its prefix shared."""
    model, rng = sarm(), torch.Generator().manual_seed(3)
    print(f"best of 4, {prompts} prompts")
    for length in (64, 192, 448):
        texts = []
        for _ in range(prompts):
            prompt = torch.randint(6, 1000, (length,), generator=rng).tolist()
            sizes = torch.randint(32, 65, (4,), generator=rng).tolist()
            texts += [prompt + torch.randint(6, 1000, (size,), generator=rng).tolist() for size in sizes]
        times, found = {"each": [], "shared": []}, {}
        for number in range(rounds + 1):
            for name in times:
                scorer._SHARES[model] = name == "shared"
                start = time.process_time()
                found[name] = scorer.score_ids(model, texts)[0]
                if number:
                    times[name].append(time.process_time() - start)
        assert scorer._probe(model), "the model could not share"
        gap = abs(found["each"] - found["shared"]).max() / abs(found["each"]).max()
        assert gap < 1e-5, gap
        gain = statistics.median(a / b for a, b in zip(times["each"], times["shared"], strict=True))
        once = sum(map(len, texts)) / (sum(map(len, texts)) - 3 * prompts * length)
        print(f"  prompt {length:>4} tokens: each text alone {statistics.median(times['each']) * 1e3:.0f} ms, shared "
              f"{statistics.median(times['shared']) * 1e3:.0f} ms, {gain:.2f}x (tokens {once:.2f}x fewer); largest gap "
              f"{gap:.0e} of the largest reward", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=3, help="fresh processes for each memory figure")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        return memory(arguments.memory)
    forwards(arguments.rounds, arguments.processes)
    best_of_4(arguments.rounds)
    print(f"load {os.getloadavg()[0]:.1f}\n{machine()}")


if __name__ == "__main__":
    main()
