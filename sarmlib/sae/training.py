"""Training a TopK SAE with the paper's recipe: resumable to the last bit, fast on one core or one GPU."""

import inspect
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
Activations: TypeAlias = Tensor | Iterable[Tensor] | Callable[..., Iterable[Tensor]]
OTHERS = "the activations differ from those before the checkpoint; remove resume_dir"


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
    returns one, of [n, d] tensors, mixed by ``ShuffleBuffer``; a function of two numbers is asked, at a resumption, for
    what follows so many tensors and vectors (others are read again).  Incomplete last batches are dropped.
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
    trainer.run(activations, progress)
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


class ShuffleBuffer:
    """Mixes a stream of [n, d] tensors into shuffled batches [batch_size, d]; saved, it goes on without the past.

    It fills to ``size`` vectors, is permuted, and gives out half of itself before it is filled again.
    An incomplete last batch is dropped, unless it would be the only one.
    """

    def __init__(self, batch_size: int, size: int, generator: torch.Generator):
        self.batch_size, self.size, self.generator = batch_size, max(size, 2 * batch_size), generator
        self.held: list[Tensor] = []  # not yet mixed
        self.ready: list[Tensor] = []  # batches not yet given
        self.last = torch.zeros(0)  # the last tensor read
        self.read = self.rows = self.given = 0  # tensors and vectors read, batches given

    def mix(self, stream: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches that are left."""
        yield from self._give()
        for self.last in stream:
            self.held.append(self.last)
            self.read, self.rows = self.read + 1, self.rows + len(self.last)
            if (held := sum(map(len, self.held))) >= self.size:
                yield from self._give(held - self.size // 2)
        held = sum(map(len, self.held))
        yield from self._give(held, only=not self.given and held < self.batch_size)

    def _give(self, out: int = 0, only: bool = False) -> Iterator[Tensor]:
        if out := out if only else out - out % self.batch_size:
            rows = torch.cat([part.to(self.last.device) for part in self.held])
            rows = rows[torch.randperm(len(rows), generator=self.generator).to(rows.device)]
            self.ready, self.held = list(rows[:out].split(self.batch_size)), [rows[out:]]
        while self.ready:
            self.given += 1
            yield self.ready.pop(0)

    def state(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """(counts, tensors) of a checkpoint."""
        parts = {"held": self.held, "ready": self.ready}
        tensors = {name: torch.cat(part) if part else self.last[:0] for name, part in parts.items()}
        counts = {"read": self.read, "rows": self.rows, "given": self.given, "last": len(self.last)}
        return counts, tensors | {"first": self.last[:1], "generator": self.generator.get_state()}

    def restore(self, counts: dict[str, int], tensors: dict[str, Tensor], activations: Activations) -> Iterator[Tensor]:
        """Go back to a state; returns the stream after it (DataError if another one is given)."""
        self.read, self.rows, self.given = counts["read"], counts["rows"], counts["given"]
        self.held, ready = [tensors["held"]], tensors["ready"]
        self.ready = list(ready.split(self.batch_size)) if len(ready) else []
        self.generator.set_state(tensors["generator"])
        before, rows = self.read - 1, self.rows - counts["last"]
        if callable(activations) and inspect.signature(activations).parameters:
            stream = iter(activations(before, rows))  # type: ignore[call-arg]
        else:
            stream = itertools.islice(activations() if callable(activations) else activations, before, None)
        self.last = next(stream, torch.zeros(0))
        if not torch.equal(self.last[:1].cpu(), tensors["first"]):
            raise DataError(OTHERS)
        return stream


class _Batches:
    """Batches of one pass, or with ``steps`` of as many as are asked for."""

    def __init__(self, activations: Activations, config: SAETrainConfig):
        self.activations, self.config, self.epoch = activations, config, 1
        self.buffer: ShuffleBuffer | None = None
        self.stream: Iterator[Tensor] | None = None  # the rest of one that was begun

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            batch = None
            for batch in self._epoch():
                yield batch
            if batch is None and not (self.buffer and self.buffer.given):
                raise DataError(f"the activations are empty in pass {self.epoch}; for several, pass a function that "
                                "returns a fresh stream")
            if not self.config.steps:
                return
            self.epoch, self.buffer, self.stream = self.epoch + 1, None, None

    def _epoch(self) -> Iterator[Tensor]:
        if isinstance(self.activations, Tensor):
            size = min(self.config.batch_size, len(self.activations))
            order = torch.randperm(len(self.activations), generator=self._generator()).to(self.activations.device)
            return (self.activations[rows] for rows in order[: len(order) // size * size].split(size))
        self.buffer = self.buffer or ShuffleBuffer(self.config.batch_size, BUFFER, self._generator())
        stream = self.activations if self.stream is None else self.stream
        return self.buffer.mix(stream() if callable(stream) else stream)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.epoch) % 2**63)

    def state(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """What a checkpoint keeps of a stream; nothing of a tensor, whose batches are known by their number."""
        counts, tensors = self.buffer.state() if self.buffer else ({}, {})
        return counts and counts | {"epoch": self.epoch}, {f"stream.{name}": value for name, value in tensors.items()}

    def resume(self, step: int, counts: dict[str, int] | None, tensors: dict[str, Tensor]) -> Iterator[Tensor]:
        """The batches after ``step``; DataError if the activations are others."""
        if not counts:
            batches = iter(self)
            last = deque(itertools.islice(batches, step), maxlen=1)
            if not last or not torch.equal(last[0][0].cpu(), tensors["last_row"]):
                raise DataError(OTHERS)
            return batches
        self.epoch = counts["epoch"]
        self.buffer = ShuffleBuffer(self.config.batch_size, BUFFER, self._generator())
        own = {name.removeprefix("stream."): value for name, value in tensors.items()}
        self.stream = self.buffer.restore(counts, own, self.activations)
        return iter(self)


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

    def run(self, activations: Activations, progress: bool) -> None:
        self.source = _Batches(activations, self.config)
        batches = self.resume()
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
        counts, streamed = self.source.state()
        held = self.live | {"last_row": batch[0]} | streamed
        tensors = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
        state = json.dumps({"run": self.identity, "step": self.step, "log": self.log, "stream": counts})
        metadata = {"state": state, "sha256": hash_tensors(tensors, state)}
        write_atomic(self.folder / CHECKPOINT, lambda path: save_file(tensors, path, metadata=metadata))

    def resume(self) -> Iterator[Tensor]:
        """Go back to the checkpoint, if any; returns the batches after it."""
        if not self.folder or not (path := self.folder / CHECKPOINT).exists():
            return iter(self.source)
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
        return self.source.resume(self.step, state.get("stream"), tensors)
