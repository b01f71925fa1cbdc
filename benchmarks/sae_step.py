"""One SAE training step: ours against the encoder product alone and a dense autograd step, interleaved, CPU time."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from sarmlib.sae.kernels import topk_autoencode
from sarmlib.sae.model import TopKSAE, normalized_mse

SIZES = {"A": (512, 8192, 24, 1024), "B": (256, 4096, 12, 4096), "toy": (128, 2048, 6, 512)}


def make(size: tuple[int, int, int, int]) -> dict:
    """The three steps of a size (d, M, k, batch), each with weights and a fused Adam of its own."""
    d, m, k, batch = size
    x = torch.randn(batch, d, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    ours, dense = (TopKSAE(d, m, k, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    adams = [torch.optim.Adam(sae.parameters(), lr=5e-4, fused=True) for sae in (ours, dense)]
    buffer = torch.empty(batch, m)

    def product():
        torch.mm(x, ours.W_enc.detach().t(), out=buffer)

    def sparse_step():
        adams[0].zero_grad()
        x_hat = topk_autoencode(x, ours.W_enc, ours.b_pre, ours.b_enc, ours.W_dec, k, True, workspace=buffer,
                                tangent=True)[0]
        normalized_mse(x_hat, x).backward()
        adams[0].step()

    def dense_step():
        adams[1].zero_grad()
        a = (x - dense.b_pre) @ dense.W_enc.t()
        top = a.topk(k)
        z = torch.zeros_like(a).scatter(1, top.indices, top.values.relu())
        normalized_mse(z @ dense.W_dec + dense.b_pre, x).backward()
        adams[1].step()

    return {"encoder product": product, "ours": sparse_step, "dense autograd": dense_step}


def main() -> None:
    """Print, per size, the median ratio to the encoder product over interleaved rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print(f"{'size':<6}{'d, M, k, batch':<24}{'ours':>8}{'dense':>8}   (times the encoder product, one thread)")
    for name, size in SIZES.items():
        steps, times = make(size), {}
        for number in range(rounds + 1):
            for label, step in steps.items():
                start = time.process_time()
                step()
                if number:  # the first round warms up
                    times.setdefault(label, []).append(time.process_time() - start)
        base = times["encoder product"]
        ratios = {label: statistics.median(t / b for t, b in zip(values, base, strict=True))
                  for label, values in times.items()}
        print(f"{name:<6}{str(size)[1:-1]:<24}{ratios['ours']:>7.2f}x{ratios['dense autograd']:>7.2f}x")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
