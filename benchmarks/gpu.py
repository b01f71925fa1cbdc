"""The paper's shapes on one GPU: SAE step and extraction, as shares of the measured matrix-product rate.

Needs CUDA, about 16 GB for the step and 20 GB for the extraction.  ``--device cpu`` with small sizes only shows that
the script runs: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from transformers import AutoModel, LlamaConfig

from sarmlib.backbone import cut_config, strip_final_norm
from sarmlib.sae.topk import TopKSAE
from sarmlib.sae.training import SAETrainConfig, _Trainer


def seconds(step, device: torch.device, repeats: int) -> float:
    """Median wall time of one call after two to warm up."""
    times = []
    for number in range(repeats + 2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number > 1:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak(device: torch.device) -> str:
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else "not measured"


def sae_step(d: int, m: int, k: int, batch: int, device: torch.device, repeats: int) -> None:
    """ms per whole training step (normalise, forward, backward, Adam, counters) beside the bare bf16 encode product."""
    x = torch.randn(batch, d, device=device)
    product = _product(batch, d, m, device, repeats)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    sae = TopKSAE(d, m, k).to(device)
    config = SAETrainConfig(batch_size=batch, matmul_dtype="bfloat16", log_every=10**9)
    trainer = _Trainer(sae, config)
    step = seconds(lambda: trainer.train_step(x), device, repeats)
    rate = 2 * batch * d * m / product
    print(f"SAE step, d {d} M {m} k {k} batch {batch}, bf16 product, fp32 weights:\n"
          f"  encode product {product * 1e3:.2f} ms = {rate / 1e12:.1f} TFLOP/s (the measured rate)\n"
          f"  whole step {step * 1e3:.2f} ms = {step / product:.2f}x; the dense product takes "
          f"{product / step:.0%} of it (aim 60 %); peak memory {peak(device)}")


@torch.no_grad()
def extraction(width: int, layers: int, vocabulary: int, batch: int, device: torch.device, repeats: int) -> None:
    """tokens/s and MFU (2 FLOP per weight and token, plus attention) of a random Llama-3.1 cut at half depth."""
    heads = max(width // 128, 1)
    config = cut_config(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), max_position_embeddings=8192))
    window = 1024
    size = 8192 if device.type == "cuda" else 512
    rate = 2 * size**3 / _product(size, size, size, device, repeats)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.device(device):
        model = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    strip_final_norm(model)
    ids = torch.randint(vocabulary, (batch, window), device=device)
    taken = seconds(lambda: model(input_ids=ids, use_cache=False), device, repeats)
    weights = sum(p.numel() for p in model.layers.parameters())
    flop = 2 * weights * batch * window + config.num_hidden_layers * 2 * batch * window**2 * width  # causal half
    depth = f"{config.num_hidden_layers} of {layers} layers"
    print(f"extraction, random Llama d {width}, {depth}, bf16, {batch} x {window} tokens\n"
          f"  {batch * window / taken:,.0f} tokens/s; {flop / taken / 1e12:.1f} TFLOP/s = {flop / taken / rate:.0%} of "
          f"the measured rate {rate / 1e12:.1f} (aim 50 %); peak memory {peak(device)}")


def _product(rows: int, inner: int, columns: int, device: torch.device, repeats: int) -> float:
    """Seconds of a bare bf16 matrix product [rows, inner] x [inner, columns]."""
    a, b = (torch.randn(n, inner, device=device, dtype=torch.bfloat16) for n in (rows, columns))
    return seconds(lambda: torch.mm(a, b.t()), device, repeats)


def main() -> int:
    """Print both measurements; without CUDA say so and stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sae", type=int, nargs=4, default=(4096, 65536, 192, 4096), metavar=("D", "M", "K", "BATCH"))
    parser.add_argument("--llama", type=int, nargs=4, default=(4096, 32, 128256, 16),
                        metavar=("D", "LAYERS", "VOCABULARY", "BATCH"))
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured; run this on a machine with a GPU", file=sys.stderr)
        return 1
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: these numbers mean nothing"
    print(f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}")
    sae_step(*arguments.sae, device, arguments.repeats)
    extraction(*arguments.llama, device, arguments.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
