"""Training a TopK SAE with the paper's recipe: resumable to the last bit, fast on one core or one GPU."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sarmlib.errors import ArtifactError, ConfigError, DataError
from sarmlib.sae.kernels import topk_autoencode
from sarmlib.sae.model import TopKSAE, normalized_mse, write_atomic

CHECKPOINT, METRICS = "sae_training.safetensors", "metrics.jsonl"
B_PRE_INITS = ("geometric_median", "mean", "zeros")
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SAETrainConfig:
    """Settings of ``train_sae``; defaults are the paper's where it names one, and the rest is switched off."""

    lr: float = 5e-4
    """Paper: "a learning rate of 5 x 10^-4"."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Paper: Adam "with standard hyperparameters: beta_1 = 0.9, beta_2 = 0.999"."""
    batch_size: int = 4096
    """Vectors per step; not stated in the paper."""
    epochs: int = 1
    """Passes over the activations (paper: one pass over 50M sequences); ignored when ``steps`` is set."""
    steps: int | None = None
    """Optimiser steps; the data is started again as often as needed."""
    renorm_every: int = 10
    """Paper: "unit-norm regularization to the decoder columns every 10 steps"; 0 switches it off."""
    tangent: bool = True
    """Remove the part of the decoder gradient that only changes a column's length."""
    b_pre_init: str = "geometric_median"
    """Start of b_pre from data: "geometric_median", "mean" or "zeros"."""
    auxk_coef: float = 0.0
    """Weight of the AuxK loss on dead features (Gao et al. 2025 use 1/32); the paper has none."""
    k_aux: int | None = None
    """Dead features in the AuxK reconstruction; None = d/2, rounded down (Gao et al. 2025)."""
    dead_after: int = 10_000_000
    """A feature is dead when it has not fired for this many samples (Gao et al. 2025: 10M)."""
    warmup_steps: int = 0
    """Linear warm-up of the learning rate."""
    decay_fraction: float = 0.0
    """Last share of the steps with the learning rate falling linearly to 0 (needs a known number of steps)."""
    shuffle_buffer: int = 65_536
    """Vectors held for mixing when the activations are a stream (a tensor is fully shuffled instead)."""
    matmul_dtype: str = "float32"
    """Type of the encoder product; "bfloat16" for GPUs. Weights, gradients and Adam stay float32."""
    seed: int = 0
    """Seed of the initialisation and of all shuffling."""
    log_every: int = 50
    """Steps between entries of the log."""
    checkpoint_every: int = 1000
    """Steps between checkpoints when ``resume_dir`` is given."""

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        positive = ("lr", "batch_size", "epochs", "dead_after", "shuffle_buffer", "log_every", "checkpoint_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be above 0")
        for name in ("renorm_every", "auxk_coef", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} must not be negative")
        for name in ("steps", "k_aux"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be None or at least 1")
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError(f"decay_fraction={self.decay_fraction!r} must lie in 0..1")
        for name, allowed in (("b_pre_init", B_PRE_INITS), ("matmul_dtype", tuple(DTYPES))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")


Activations: TypeAlias = Tensor | Iterable[Tensor] | Callable[[], Iterable[Tensor]]


def train_sae(
    activations: Activations,
    config: SAETrainConfig | None = None,
    *,
    d_model: int,
    n_features: int,
    k: int,
    encoder_bias: bool = False,
    relu: bool = True,
    normalize: bool = True,
    device: str | torch.device = "cpu",
    resume_dir: str | os.PathLike | None = None,
    log_dir: str | os.PathLike | None = None,
    accelerator=None,
    progress: bool = True,
) -> tuple[TopKSAE, list[dict]]:
    """Minimise eq. 5 over activations; returns the SAE and its log.

    ``activations``: a tensor [N, d], reshuffled each epoch by a generator of its own; or an iterable, or a function
    that returns one, of [n, d] tensors, mixed by ``shuffle_buffer``.  Incomplete last batches of an epoch are dropped.

    ``resume_dir``: checkpoints (weights, Adam, counters, log: one file, replaced atomically) are written there every
    ``checkpoint_every`` steps and on SIGINT or SIGTERM; a later call with the same settings goes on from it and ends
    with the same bits as an uninterrupted run on CPU.  A stream is replayed up to the checkpoint without training,
    which is exact when it gives the same tensors again, and the last batch is compared to make sure.

    ``log_dir``: log entries are appended to metrics.jsonl there as they come, and to TensorBoard where it is installed.
    ``accelerator``: an ``accelerate.Accelerator``.  Every process is given the same stream and trains on its part of
    each batch (``batch_size`` is the global one); gradients are summed, so the result is that of one process up to
    rounding.  The first process writes checkpoint and log; all of them read the checkpoint.

    Log entries: step, samples, loss (normalised MSE), aux_loss, fvu (of the batch, about its mean), l0, dead_fraction,
    lr, seconds.  Raises ConfigError, DataError (NaN or infinity, wrong size, stream changed or empty), ArtifactError.
    """
    config = config or SAETrainConfig()
    generator = torch.Generator().manual_seed(config.seed)
    options = {"encoder_bias": encoder_bias, "relu": relu, "normalize": normalize}
    sae = TopKSAE(d_model, n_features, k, generator=generator, **options).to(device)
    batches, total = _batches(activations, config, d_model)
    checkpoints, logs = (None if folder is None else Path(folder) for folder in (resume_dir, log_dir))
    trainer = _Trainer(sae, config, total, checkpoints, logs, accelerator)
    trainer.run(batches, progress and trainer.rank == 0)
    return sae, trainer.log


@torch.no_grad()
def evaluate_sae(sae: TopKSAE, x: Tensor, batch_size: int = 4096) -> dict[str, float]:
    """Quality of an SAE on activations x [N, d], sums in float64.

    fvu: sum |x - x_hat|^2 / sum |x - mean(x)|^2 in the SAE's (normalised) space, so predicting the mean gives 1;
    fvu_raw: the same after undoing the normalisation; loss: eq. 5 as trained; l0: non-zero features per vector;
    dead_fraction: share of features that fire on no vector of x; n: number of vectors.
    """
    if x.ndim != 2 or len(x) < 2:
        raise DataError(f"activations have shape {tuple(x.shape)}; at least two vectors [N, d] are needed")
    def chunks():
        return (part.to(sae.W_enc.device, sae.W_enc.dtype) for part in x.split(batch_size))

    means = sum(torch.stack([sae.normalize(part)[0].double().sum(0), part.double().sum(0)]) for part in chunks())
    means = means / len(x)
    sums = dict.fromkeys(("error", "variance", "raw_error", "raw_variance", "loss", "l0"), 0.0)
    fired = torch.zeros(sae.n_features, dtype=torch.bool, device=sae.W_enc.device)
    for part in chunks():
        x_norm, mean, std = sae.normalize(part)
        code = sae.encode(part)
        x_hat = sae.decode(code)
        sums["error"] += float((x_hat.double() - x_norm.double()).square().sum())
        sums["variance"] += float((x_norm.double() - means[0]).square().sum())
        sums["raw_error"] += float(((x_hat * std + mean).double() - part.double()).square().sum())
        sums["raw_variance"] += float((part.double() - means[1]).square().sum())
        sums["loss"] += float(normalized_mse(x_hat.double(), x_norm.double())) * len(part)
        sums["l0"] += float((code.values != 0).sum())
        fired[code.indices[code.values != 0]] = True
    return {
        "fvu": sums["error"] / sums["variance"] if sums["variance"] else math.nan,
        "fvu_raw": sums["raw_error"] / sums["raw_variance"] if sums["raw_variance"] else math.nan,
        "loss": sums["loss"] / len(x),
        "l0": sums["l0"] / len(x),
        "dead_fraction": 1 - float(fired.double().mean()),
        "n": len(x),
    }


@torch.no_grad()
def feature_density(sae: TopKSAE, x: Tensor, batch_size: int = 4096) -> Tensor:
    """Share of vectors of x [N, d] on which each feature fires: float64 [M]."""
    counts = torch.zeros(sae.n_features, dtype=torch.float64)
    for part in x.split(batch_size):
        code = sae.encode(part.to(sae.W_enc.device, sae.W_enc.dtype))
        counts += torch.bincount(code.indices[code.values != 0].cpu(), minlength=sae.n_features)
    return counts / len(x)


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """argmin_m sum_i |x_i - m| by Weiszfeld's iteration, started at the mean: [N, d] -> [d]."""
    median = x.mean(0)
    for _ in range(iterations):
        weights = 1 / (x - median).norm(dim=-1).clamp(min=1e-8)
        new = (weights[:, None] * x).sum(0) / weights.sum()
        moved = (new - median).norm()
        median = new
        if moved <= tolerance * median.norm().clamp(min=1e-8):
            break
    return median


def auxk_loss(sae: TopKSAE, x: Tensor, x_hat: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """AuxK (Gao et al. 2025): normalised MSE of the error e = x - x_hat rebuilt from the k_aux strongest dead features.

    e is held constant; pre-activations keep their sign, so a dead feature's encoder row gets a gradient even when its
    pre-activation is negative.  x, x_hat [B,d] in normalised space, dead [n] int64.  Only dead rows are touched.
    """
    pre = (x - sae.b_pre) @ sae.W_enc[dead].t()
    if sae.b_enc is not None:
        pre = pre + sae.b_enc[dead]
    values, chosen = pre.topk(min(k_aux, len(dead)), dim=-1)
    e_hat = torch.zeros_like(pre).scatter(-1, chosen, values) @ sae.W_dec[dead]
    return normalized_mse(e_hat, (x - x_hat).detach())


def shuffle_buffer(
    batches: Iterable[Tensor], batch_size: int, buffer_size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Mix a stream of [n, d] tensors into shuffled batches [batch_size, d]; a pure generator.

    The buffer fills to ``buffer_size`` vectors, is permuted, and gives out half of itself before it is filled again.
    Mixing: each batch is a uniform sample without replacement from the buffer (never less than half of it), every
    vector leaves exactly once, and it stays for more than r refills with probability 2^-r.  At the end of the stream
    the rest is given out; an incomplete last batch is dropped, unless it would be the only one.
    """
    buffer_size = max(buffer_size, 2 * batch_size)
    held, n_held, given = [], 0, 0
    for tensor in batches:
        held.append(tensor)
        n_held += len(tensor)
        if n_held >= buffer_size:
            mixed = torch.cat(held)
            mixed = mixed[torch.randperm(n_held, generator=generator).to(mixed.device)]
            out = n_held - buffer_size // 2
            out -= out % batch_size
            yield from mixed[:out].split(batch_size)
            given += out
            held, n_held = [mixed[out:]], n_held - out
    if n_held:
        mixed = torch.cat(held)
        mixed = mixed[torch.randperm(n_held, generator=generator).to(mixed.device)]
        full = n_held - n_held % batch_size
        if full:
            yield from mixed[:full].split(batch_size)
        elif not given:
            yield mixed


def _batches(activations: Activations, config: SAETrainConfig, d_model: int) -> tuple[Iterator[Tensor], int | None]:
    """(iterator of batches, number of steps if known)."""
    if isinstance(activations, Tensor):
        if activations.ndim != 2 or activations.shape[1] != d_model or len(activations) == 0:
            raise DataError(f"activations have shape {tuple(activations.shape)}; a non-empty [N, {d_model}] is needed")
        size = min(config.batch_size, len(activations))
        total = config.steps or config.epochs * (len(activations) // size)
        return _epochs_of_tensor(activations, size, config.seed), total
    return _epochs_of_stream(activations, config), config.steps


def _epochs_of_tensor(x: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(_mix(seed, epoch))
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for rows in order[: len(x) // size * size].split(size):
            yield x[rows]
        epoch += 1


def _epochs_of_stream(source, config: SAETrainConfig) -> Iterator[Tensor]:
    epoch = 0
    while config.steps is not None or epoch < config.epochs:
        generator = torch.Generator().manual_seed(_mix(config.seed, epoch))
        stream = source() if callable(source) else source
        empty = True
        for batch in shuffle_buffer(stream, config.batch_size, config.shuffle_buffer, generator):
            empty = False
            yield batch
        if empty:
            cure = "pass a function that returns a fresh stream" if epoch else "the corpus is empty"
            raise DataError(f"the activation stream gave no vectors in epoch {epoch + 1}; {cure}")
        epoch += 1


def _mix(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch + 1) % 2**63


class _Trainer:
    """State of one run: weights, Adam, samples since each feature fired, log; ``run`` is the loop."""

    def __init__(self, sae: TopKSAE, config: SAETrainConfig, total: int | None, folder: Path | None,
                 log_dir: Path | None = None, accelerator=None):
        if config.decay_fraction and total is None:
            raise ConfigError("decay_fraction needs a known length: set steps for a stream")
        self.sae, self.config, self.total, self.folder, self.log_dir = sae, config, total, folder, log_dir
        self.accelerator = accelerator
        self.rank, self.world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        self.adam = torch.optim.Adam(sae.parameters(), lr=config.lr, betas=config.betas, fused=True)
        self.silent = torch.zeros(sae.n_features, dtype=torch.int64, device=sae.W_enc.device)
        self.workspace: Tensor | None = None
        self.step, self.samples, self.log, self.last_row = 0, 0, [], ""

    def run(self, batches: Iterator[Tensor], progress: bool) -> None:
        resumed = self.load() if self.folder else 0
        last, seen, clock = None, 0, time.perf_counter()
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()  # no process writes a checkpoint that another is still to read
        bar = tqdm(total=self.total, initial=self.step, disable=not progress, desc="SAE", unit="step")
        with bar, _stop_signals() as stop, _metrics_log(self.log_dir if self.rank == 0 else None, self.log) as write:
            while self.total is None or seen < max(self.total, resumed):
                batch = next(batches, None)
                if batch is None:
                    break
                seen, last = seen + 1, batch
                if seen <= resumed:
                    if seen == resumed and _row_hash(batch) != self.last_row:
                        raise DataError("the activations differ from those before the checkpoint; remove resume_dir")
                    continue
                metrics = self.train_step(batch)
                bar.update()
                if metrics:
                    self.log.append(metrics | {"seconds": round(time.perf_counter() - clock, 3)})
                    write(self.log[-1])
                    bar.set_postfix(fvu=f"{metrics['fvu']:.4f}", dead=f"{metrics['dead_fraction']:.3f}", refresh=False)
                if self.world > 1:  # a signal that one process got stops all of them after the same step
                    signals = torch.tensor(stop[:1] or [0], device=self.silent.device)
                    stop[:] = [int(number) for number in self.accelerator.gather(signals) if number]
                if self.folder and (stop or self.step % self.config.checkpoint_every == 0):
                    self.save(batch)
                if stop:
                    raise KeyboardInterrupt if stop[0] == signal.SIGINT else SystemExit(128 + stop[0])
        if seen < resumed:
            raise DataError(f"the activations end after {seen} batches, the checkpoint is at batch {resumed}")
        if self.folder and self.step > resumed:
            self.save(last)
        if self.config.renorm_every:
            self.sae.renormalize_decoder()  # the last steps after a multiple of renorm_every

    def train_step(self, batch: Tensor) -> dict | None:
        """One Adam step on raw activations [B, d]; metrics at every ``log_every`` steps."""
        sae, config = self.sae, self.config
        if batch.ndim != 2 or batch.shape[1] != sae.d_model:
            raise DataError(f"a batch of activations has shape {tuple(batch.shape)}; [n, {sae.d_model}] is needed")
        with torch.no_grad():
            whole = sae.normalize(batch.to(sae.W_enc.device, sae.W_enc.dtype))[0]
            x = whole[self.rank :: self.world]
            if not bool(torch.isfinite(whole.sum())):
                raise DataError(f"activations of step {self.step + 1} hold NaN or infinite values; clean them first")
            if self.step == 0:
                self._start_b_pre(whole)
        x_hat, indices, values = topk_autoencode(
            x, sae.W_enc, sae.b_pre, sae.b_enc, sae.W_dec, sae.k, sae.relu,
            workspace=self._workspace(x), matmul_dtype=DTYPES[config.matmul_dtype], tangent=config.tangent,
        )
        share = len(x) / len(batch)  # losses are means over rows: weighted by it, those of all processes add up
        loss = normalized_mse(x_hat, x) * share
        dead = (self.silent > config.dead_after).nonzero()[:, 0] if config.auxk_coef else ()
        aux = auxk_loss(sae, x, x_hat, dead, config.k_aux or max(sae.d_model // 2, 1)) * share if len(dead) else None
        (loss if aux is None else loss + config.auxk_coef * aux).backward()
        if aux is not None and config.tangent:
            rows, grad = sae.W_dec.detach()[dead], sae.W_dec.grad[dead]
            sae.W_dec.grad[dead] = grad - (grad * rows).sum(-1, keepdim=True) * rows
        if self.world > 1:
            for parameter in sae.parameters():
                torch.distributed.all_reduce(parameter.grad)
        self.step += 1
        self.samples += len(batch)
        self.adam.param_groups[0]["lr"] = self._lr()
        self.adam.step()
        self.adam.zero_grad()
        if config.renorm_every and self.step % config.renorm_every == 0:
            sae.renormalize_decoder()
        fired = torch.zeros_like(self.silent, dtype=torch.int32)
        fired[indices[values != 0]] = 1
        self.silent.add_(len(batch)).masked_fill_(self._sum(fired) > 0, 0)
        if self.step % config.log_every and self.step != self.total:
            return None
        with torch.no_grad():
            error, spread = (x_hat - x).double().square().sum(), (whole - whole.mean(0)).double().square().sum()
            parts = [loss.double(), loss.new_zeros((), dtype=torch.float64) if aux is None else aux.double(), error,
                     (values != 0).sum().double()]
            loss_sum, aux_sum, error, active = self._sum(torch.stack(parts)).tolist()
        return {
            "step": self.step,
            "samples": self.samples,
            "loss": loss_sum,
            "aux_loss": aux_sum,
            "fvu": error / float(spread),
            "l0": active / len(batch),
            "dead_fraction": float((self.silent > config.dead_after).double().mean()),
            "lr": self.adam.param_groups[0]["lr"],
        }

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return tensor if self.world == 1 else self.accelerator.reduce(tensor, "sum")

    def _start_b_pre(self, x: Tensor) -> None:
        if self.config.b_pre_init != "zeros":
            start = geometric_median(x) if self.config.b_pre_init == "geometric_median" else x.mean(0)
            self.sae.b_pre.copy_(start)

    def _workspace(self, x: Tensor) -> Tensor:
        if self.workspace is None or len(self.workspace) < len(x):
            self.workspace = x.new_empty(len(x), self.sae.n_features)
        return self.workspace

    def _lr(self) -> float:
        config, factor = self.config, 1.0
        if config.warmup_steps:
            factor = min(factor, self.step / config.warmup_steps)
        if config.decay_fraction:
            factor = min(factor, (self.total - self.step + 1) / math.ceil(config.decay_fraction * self.total))
        return config.lr * factor

    def save(self, batch: Tensor) -> None:
        """Write weights, Adam, counters and log as one file, atomically (the first process only)."""
        if self.rank:
            return
        tensors = {"silent": self.silent}
        for name, param in self.sae.named_parameters():
            state = self.adam.state[param]
            tensors |= {name: param.detach(), f"{name}.m": state["exp_avg"], f"{name}.v": state["exp_avg_sq"]}
        state = {"run": self._identity(), "step": self.step, "samples": self.samples, "log": self.log}
        metadata = {"state": json.dumps(state | {"last_row": _row_hash(batch)})}
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_atomic(self.folder / CHECKPOINT, lambda path: save_file(tensors, path, metadata=metadata))

    def load(self) -> int:
        """Go back to the checkpoint, if there is one; returns its step."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return 0
        try:
            with safe_open(path, "pt") as handle:
                state = json.loads(handle.metadata()["state"])
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ArtifactError(f"checkpoint {str(path)!r} is damaged ({error}); remove it to start again") from error
        mine = json.loads(json.dumps(self._identity()))
        differ = sorted(name for name in mine | state["run"] if mine.get(name) != state["run"].get(name))
        if differ:
            what = ", ".join(f"{name}={state['run'].get(name)!r} (now {mine.get(name)!r})" for name in differ)
            raise ConfigError(f"checkpoint {str(path)!r} is of another run: {what}; use another resume_dir")
        self.step, self.samples, self.log, self.last_row = (
            state[name] for name in ("step", "samples", "log", "last_row")
        )
        with torch.no_grad():
            self.silent.copy_(tensors["silent"])
            for name, param in self.sae.named_parameters():
                param.copy_(tensors[name])
                self.adam.state[param] = {
                    "step": torch.tensor(float(self.step), device=param.device),
                    "exp_avg": tensors[f"{name}.m"].to(param.device),
                    "exp_avg_sq": tensors[f"{name}.v"].to(param.device),
                }
        return self.step

    def _identity(self) -> dict:
        """Everything that a resumed run has to share with the one it goes on from."""
        free = {"log_every", "checkpoint_every"} | ({"steps", "epochs"} if not self.config.decay_fraction else set())
        settings = {name: value for name, value in asdict(self.config).items() if name not in free}
        return settings | self.sae.settings() | ({} if "steps" in free else {"total": self.total})


def _row_hash(batch: Tensor) -> str:
    return hashlib.sha256(batch[0].detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()[:16]


@contextmanager
def _metrics_log(folder: Path | None, earlier: list[dict]):
    """A function that appends one entry to metrics.jsonl and TensorBoard; starts the file again from ``earlier``."""
    if folder is None:
        yield lambda entry: None
        return
    board, path = None, folder / METRICS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "w", encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot write {str(path)!r}: {error}; check space and permissions") from error
    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder), purge_step=earlier[-1]["step"] + 1 if earlier else None)
    except ImportError:  # not installed: JSON lines only
        pass

    def write(*entries: dict) -> None:
        try:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
            file.flush()
        except OSError as error:
            raise ArtifactError(f"cannot write {str(path)!r}: {error}; check space and permissions") from error
        for entry in entries if board else ():
            for name, value in entry.items():
                board.add_scalar(f"sae/{name}", value, entry["step"])

    try:
        write(*earlier)
        yield write
    finally:
        file.close()
        if board:
            board.close()


@contextmanager
def _stop_signals():
    """Collect SIGINT and SIGTERM in a list, so that the loop can stop between two steps."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    old = {number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
