"""Training a TopK SAE with the paper's recipe: resumable to the last bit, fast on one core or one GPU."""

import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sarmlib.errors import ArtifactError, ConfigError, DataError
from sarmlib.sae.kernels import topk_autoencode
from sarmlib.sae.topk import TopKSAE, hash_tensors, normalized_mse, readable
from sarmlib.store import write_atomic

CHECKPOINT = "sae_training.safetensors"
BUFFER = 65_536
"""Vectors held for mixing when the activations are a stream (a tensor is fully shuffled instead)."""
Activations: TypeAlias = Tensor | Iterable[Tensor] | Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class SAETrainConfig:
    """Settings of ``train_sae``; defaults are the paper's where it names one, and the rest is switched off."""

    lr: float = 5e-4  # paper: "a learning rate of 5 x 10^-4"
    betas: tuple[float, float] = (0.9, 0.999)  # paper: "standard hyperparameters"
    batch_size: int = 4096  # vectors per step; not stated in the paper
    steps: int | None = None  # optimiser steps, over the data as often as needed; None: one pass
    renorm_every: int = 10  # paper: "unit-norm regularization to the decoder columns every 10 steps"; 0: never
    auxk_coef: float = 0.0  # weight of the AuxK loss (Gao et al. 2025: 1/32); the paper has none
    dead_after: int = 10_000_000  # samples without firing after which a feature is dead (Gao et al. 2025)
    matmul_dtype: str = "float32"  # of the encoder product; "bfloat16" on GPUs (weights and Adam stay float32)
    seed: int = 0  # of the initialisation and of all shuffling
    log_every: int = 50  # steps
    checkpoint_every: int = 1000  # steps

    def __post_init__(self):
        steps = 1 if self.steps is None else self.steps
        positive = (self.lr, self.batch_size, steps, self.dead_after, self.log_every, self.checkpoint_every)
        if not (all(0 < value < math.inf for value in positive) and self.renorm_every >= 0 and self.seed >= 0
                and 0 <= self.auxk_coef < math.inf and all(0 <= beta < 1 for beta in self.betas)):
            raise ConfigError(f"a setting is not positive (renorm_every and auxk_coef may be 0): {self}")
        if self.matmul_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"matmul_dtype={self.matmul_dtype!r} is unknown; use float32 or bfloat16")


def train_sae(activations: Activations, config: SAETrainConfig | None = None, *, d_model: int, n_features: int, k: int,
              encoder_bias: bool = False, relu: bool = True, normalize: bool = True,
              device: str | torch.device = "cpu", resume_dir: str | os.PathLike | None = None, accelerator=None,
              progress: bool = True) -> tuple[TopKSAE, list[dict]]:
    """Minimise eq. 5 over activations; returns the SAE and its log.

    ``activations``: a tensor [N, d] (also memory-mapped), reshuffled for each pass; or an iterable, or a function that
    returns one, of [n, d] tensors, mixed by ``shuffle_buffer``.  Incomplete last batches are dropped.
    ``resume_dir``: for checkpoints; a later call with the same settings and activations goes on from the last one and
    ends, on a CPU, with the same bits as an uninterrupted run.
    ``accelerator``: of ``accelerate``; each process passes the same activations and takes its share of every batch.
    Log entries: step, loss (normalised MSE), fvu (of the batch; None if all its vectors are equal), dead_fraction, and
    drift (largest distance of a decoder column's length from 1 since the last entry, before it was renormalised).
    Raises ConfigError, DataError (NaN or infinity, wrong size, stream changed or empty), ArtifactError.
    """
    config = config or SAETrainConfig()
    generator = torch.Generator().manual_seed(config.seed)
    sae = TopKSAE(d_model, n_features, k, encoder_bias=encoder_bias, relu=relu, normalize=normalize,
                  generator=generator).to(device)
    total = config.steps
    if isinstance(activations, Tensor):
        if activations.ndim != 2 or activations.shape[1] != d_model or len(activations) == 0:
            raise DataError(f"activations have shape {tuple(activations.shape)}; a non-empty [N, {d_model}] is needed")
        total = total or max(len(activations) // config.batch_size, 1)
    trainer = _Trainer(sae, config, total, Path(resume_dir) if resume_dir else None, accelerator)
    trainer.run(_batches(activations, config), progress)
    return sae, trainer.log


def geometric_median(x: Tensor) -> Tensor:
    """argmin_m sum_i |x_i - m| by Weiszfeld's iteration, started at the mean: [N, d] -> [d]."""
    median = x.mean(0)
    for _ in range(100):
        weights = 1 / (x - median).norm(dim=-1).clamp(min=1e-8)
        last, median = median, (weights[:, None] * x).sum(0) / weights.sum()
        if (median - last).norm() <= 1e-6 * last.norm().clamp(min=1e-8):
            break
    return median


def auxk_loss(sae: TopKSAE, x: Tensor, x_hat: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """AuxK (Gao et al. 2025): normalised MSE of the error e = x - x_hat rebuilt from the k_aux strongest dead features.

    e is held constant.  Pre-activations keep their sign, so every dead encoder row gets a gradient.
    x, x_hat [B,d] are in normalised space, dead [n] int64.
    """
    pre = (x - sae.b_pre) @ sae.W_enc[dead].t()
    if sae.b_enc is not None:
        pre = pre + sae.b_enc[dead]
    values, chosen = pre.topk(min(k_aux, len(dead)), dim=-1)
    e_hat = torch.zeros_like(pre).scatter(-1, chosen, values) @ sae.W_dec[dead]
    return normalized_mse(e_hat, (x - x_hat).detach())


def shuffle_buffer(batches: Iterable[Tensor], batch_size: int, buffer_size: int,
                   generator: torch.Generator) -> Iterator[Tensor]:
    """Mix a stream of [n, d] tensors into shuffled batches [batch_size, d].

    The buffer fills to ``buffer_size`` vectors, is permuted, and gives out half of itself before it is filled again.
    An incomplete last batch is dropped, unless it would be the only one.
    """
    buffer_size = max(buffer_size, 2 * batch_size)
    held, n_held, given = [], 0, 0

    def mixed() -> Tensor:
        rows = torch.cat(held)
        return rows[torch.randperm(n_held, generator=generator).to(rows.device)]

    for tensor in batches:
        held.append(tensor)
        n_held += len(tensor)
        if n_held >= buffer_size:
            rows, out = mixed(), n_held - buffer_size // 2
            out -= out % batch_size
            yield from rows[:out].split(batch_size)
            given += out
            held, n_held = [rows[out:]], n_held - out
    if full := n_held - n_held % batch_size:
        yield from mixed()[:full].split(batch_size)
    elif n_held and not given:
        yield mixed()


def _batches(activations: Activations, config: SAETrainConfig) -> Iterator[Tensor]:
    """Batches of one pass, or with ``steps`` of as many as are asked for."""
    for epoch in itertools.count(1) if config.steps else [1]:
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + epoch) % 2**63)
        if isinstance(activations, Tensor):
            size = min(config.batch_size, len(activations))
            order = torch.randperm(len(activations), generator=generator).to(activations.device)
            batches = (activations[rows] for rows in order[: len(order) // size * size].split(size))
        else:
            stream = activations() if callable(activations) else activations
            batches = shuffle_buffer(stream, config.batch_size, BUFFER, generator)
        batch = None
        for batch in batches:
            yield batch
        if batch is None:
            raise DataError(f"the activations are empty in pass {epoch}; for several, pass a function that returns a "
                            "fresh stream")


class _Trainer:
    """One run; ``live`` are all tensors of a checkpoint: weights, Adam's state, vectors since each feature fired."""

    def __init__(self, sae: TopKSAE, config: SAETrainConfig, total: int | None = None, folder: Path | None = None,
                 accelerator=None):
        self.sae, self.config, self.total, self.folder, self.accelerator = sae, config, total, folder, accelerator
        self.rank, self.world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        self.adam = torch.optim.Adam(sae.parameters(), lr=config.lr, betas=config.betas, fused=True)
        self.silent = torch.zeros(sae.n_features, dtype=torch.int64, device=sae.W_enc.device)
        self.workspace = sae.W_enc.new_empty(0, sae.n_features, dtype=getattr(torch, config.matmul_dtype))
        free = dict.fromkeys(("log_every", "checkpoint_every", "steps"))  # a resumed run shares all other settings
        self.identity = json.loads(json.dumps(asdict(config) | sae.settings() | free))
        self.drift = torch.zeros((), device=sae.W_enc.device)
        self.step, self.log, self.live = 0, [], {"silent": self.silent, "drift": self.drift}
        for name, parameter in sae.named_parameters():
            moments = {part: torch.zeros_like(parameter) for part in ("exp_avg", "exp_avg_sq")}
            state = {"step": torch.zeros((), device=parameter.device), **moments}  # as Adam's first step would make it
            self.adam.state[parameter] = state
            self.live |= {name: parameter.data} | {f"{name}.{part}": tensor for part, tensor in state.items()}

    def run(self, batches: Iterator[Tensor], progress: bool) -> None:
        self.resume(batches)
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()  # no process writes a checkpoint that another is still to read
        resumed, left = self.step, None if self.total is None else max(self.total - self.step, 0)
        bar = tqdm(itertools.islice(batches, left), total=self.total, initial=self.step, desc="SAE", unit="step",
                   disable=not progress or self.rank > 0)
        for batch in bar:
            if metrics := self.train_step(batch):
                self.log.append(metrics)
                bar.set_postfix(loss=metrics["loss"], dead=metrics["dead_fraction"], refresh=False)
            if self.step % self.config.checkpoint_every == 0:
                self.save(batch)
        if self.step > resumed:
            self.save(batch)
        if self.config.renorm_every:
            self.sae.renormalize_decoder()  # the last steps after a multiple of renorm_every

    def train_step(self, batch: Tensor) -> dict | None:
        """One Adam step on raw activations [B, d]; metrics at every ``log_every`` steps."""
        sae, config = self.sae, self.config
        whole = sae.normalize(batch.to(sae.W_enc.device, sae.W_enc.dtype))[0]
        if not bool(torch.isfinite(whole.sum())):
            raise DataError(f"activations of step {self.step + 1} hold NaN or infinite values; clean them first")
        x = whole[self.rank :: self.world]
        if self.step == 0:
            sae.b_pre.data.copy_(geometric_median(whole))
        if len(self.workspace) < len(x):
            self.workspace = self.workspace.new_empty(len(x), sae.n_features)
        x_hat, indices, values = topk_autoencode(x, sae.W_enc, sae.b_pre, sae.b_enc, sae.W_dec, sae.k, sae.relu,
                                                 workspace=self.workspace)
        share = len(x) / len(batch)  # losses are means over rows: weighted by it, those of all processes add up
        loss = normalized_mse(x_hat, x) * share
        self._backward(x, x_hat, loss, share)
        for parameter in sae.parameters():
            self._sum(parameter.grad)
        self.step += 1
        self.adam.step()
        self.adam.zero_grad()
        renorm, logged = (every and self.step % every == 0 for every in (config.renorm_every, config.log_every))
        if renorm or logged or self.step == self.total:
            distance = (sae.W_dec.detach().norm(dim=1) - 1).abs().max()
            self.drift.copy_(torch.maximum(self.drift, distance))
        if renorm:
            sae.renormalize_decoder()
        fired = torch.zeros_like(self.silent, dtype=torch.int32)
        fired[indices[values != 0]] = 1
        self.silent.add_(len(batch)).masked_fill_(self._sum(fired) > 0, 0)
        if not logged and self.step != self.total:
            return None
        error = (x_hat.detach() - x).double().square().sum()
        loss, error = self._sum(torch.stack([loss.detach().double(), error])).tolist()
        spread, drift = float((whole - whole.mean(0)).double().square().sum()), float(self.drift)
        self.drift.zero_()
        return {"step": self.step, "loss": loss, "fvu": error / spread if spread else None,
                "dead_fraction": float((self.silent > config.dead_after).double().mean()), "drift": drift}

    def _backward(self, x: Tensor, x_hat: Tensor, loss: Tensor, share: float) -> None:
        """Gradients of loss + auxk_coef * AuxK."""
        sae, coef = self.sae, self.config.auxk_coef
        dead = (self.silent > self.config.dead_after).nonzero()[:, 0] if coef else ()
        if not len(dead):
            loss.backward()
            return
        aux = auxk_loss(sae, x, x_hat, dead, max(sae.d_model // 2, 1)) * share
        (loss + coef * aux).backward()
        rows, grad = sae.W_dec.detach()[dead], sae.W_dec.grad[dead]
        sae.W_dec.grad[dead] = grad - (grad * rows).sum(-1, keepdim=True) * rows  # no radial part, as in the kernel

    def _sum(self, tensor: Tensor) -> Tensor:
        """The tensor, summed in place over all processes."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def save(self, batch: Tensor) -> None:
        """Write a checkpoint with its checksum, atomically (first process only)."""
        if self.rank or not self.folder:
            return
        held = self.live | {"last_row": batch[0]}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
        state = json.dumps({"run": self.identity, "step": self.step, "log": self.log})
        metadata = {"state": state, "sha256": hash_tensors(tensors, state)}
        write_atomic(self.folder / CHECKPOINT, lambda path: save_file(tensors, path, metadata=metadata))

    def resume(self, batches: Iterator[Tensor]) -> None:
        """Go back to the checkpoint, if any, and past the batches it was trained on."""
        if not self.folder or not (path := self.folder / CHECKPOINT).exists():
            return
        with readable(path, "checkpoint (remove it to start again)", ArtifactError), safe_open(path, "pt") as handle:
            metadata = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
            if metadata["sha256"] != hash_tensors(tensors, metadata["state"]):
                raise ValueError("it differs from its checksum")
        state = json.loads(metadata["state"])
        if state["run"] != self.identity:
            raise ConfigError(f"{str(path)!r} is of another run, {state['run']}, not {self.identity}; "
                              "use another resume_dir")
        self.step, self.log = state["step"], state["log"]
        for name, tensor in self.live.items():
            tensor.copy_(tensors[name])
        last = deque(itertools.islice(batches, self.step), maxlen=1)
        if not last or not torch.equal(last[0][0].cpu(), tensors["last_row"]):
            raise DataError("the activations differ from those before the checkpoint; remove resume_dir")
