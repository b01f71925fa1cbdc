"""One SAE training step: ours against the encoder product alone, a dense autograd step, and the SAE libraries that are
installed (sae-lens, eai-sparsify); interleaved in one process, process-CPU time."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from sarmlib.sae.kernels import topk_autoencode
from sarmlib.sae.topk import TopKSAE, normalized_mse

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
        x_hat = topk_autoencode(x, ours.W_enc, ours.b_pre, ours.b_enc, ours.W_dec, k, True, workspace=buffer)[0]
        normalized_mse(x_hat, x).backward()
        adams[0].step()

    def dense_step():
        adams[1].zero_grad()
        a = (x - dense.b_pre) @ dense.W_enc.t()
        top = a.topk(k)
        z = torch.zeros_like(a).scatter(1, top.indices, top.values.relu())
        normalized_mse(z @ dense.W_dec + dense.b_pre, x).backward()
        adams[1].step()

    return {"encoder product": product, "ours": sparse_step, "dense autograd": dense_step, **peers(size, x)}


def peers(size: tuple[int, int, int, int], x: torch.Tensor) -> dict:
    """Steps of other libraries, each with a fused Adam like ours and its own forward and loss; absent ones left out."""
    d, m, k, _ = size
    steps = {}

    def add(name, module, loss):
        adam = torch.optim.Adam(module.parameters(), lr=5e-4, fused=True)

        def step():
            adam.zero_grad()
            loss().backward()
            adam.step()

        steps[name] = step

    try:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.saes.sae import TrainStepInput

        lens = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=m, k=k))
        given = TrainStepInput(x, {}, None, 1, False)
        add("SAELens", lens, lambda: lens.training_forward_pass(given).loss)
    except ImportError:
        pass
    try:
        from sparsify import SparseCoder, SparseCoderConfig

        coder = SparseCoder(d, SparseCoderConfig(num_latents=m, k=k), device="cpu")

        def coder_loss():
            coder.set_decoder_norm_to_unit_norm()
            return coder(x).fvu

        add("sparsify", coder, coder_loss)
    except ImportError:
        pass
    return steps


def main() -> None:
    """Print, per size, the median ratio to the encoder product over interleaved rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print("times the encoder product, one thread: median (least) over rounds")
    for name, size in SIZES.items():
        steps, times = make(size), {}
        for number in range(rounds + 1):
            for label, step in steps.items():
                start = time.process_time()
                step()
                if number:  # the first round warms up
                    times.setdefault(label, []).append(time.process_time() - start)
        base = times.pop("encoder product")
        print(f"{name}: d, M, k, batch = {str(size)[1:-1]}; product {min(base) * 1e3:.1f} ms")
        for label, values in times.items():
            ratio = statistics.median(t / b for t, b in zip(values, base, strict=True))
            print(f"  {label:<16}{min(values) * 1e3:>9.1f} ms{ratio:>8.2f}x ({min(values) / min(base):.2f}x)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
