"""Reward training by the Bradley-Terry loss (paper eq. 1) on a thin subclass of ``transformers.Trainer``."""

import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, SchedulerType, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from sarmlib.chat import collate, encode_conversations, fit_length, pad_id, warn_of_open_turns
from sarmlib.data.pairs import SIDES, conversations, load_pairs
from sarmlib.errors import ConfigError, ModelError
from sarmlib.evaluation.scorer import score_ids
from sarmlib.sae.topk import hash_tensors
from sarmlib.store import hash_json, hash_tree, write_json, writing

RECORD = "complete.json"  # written last into a checkpoint


@dataclass(frozen=True)
class RewardTrainConfig:
    """Settings of reward training; the defaults are the paper's, or else those of the released code."""

    lr: float = 4e-6  # paper: "the learning rate to 4 x 10^-6"
    head_lr: float | None = None  # of the head alone, useful when it starts at zero; None = lr
    epochs: float = 3.0  # paper: "for 3 epochs"
    batch_size: int = 512  # pairs per step over all devices; paper: "We set the global batch size to 512"
    micro_batch_size: int | None = None  # pairs per forward pass and device; None = as batch_size allows
    max_length: int = 4096  # tokens per conversation, at most the model's context; longer ones lose their beginning
    scheduler: str = "cosine"  # a transformers name
    warmup_ratio: float = 0.03  # share of the steps
    weight_decay: float = 0.001  # AdamW, not on biases and norms
    seed: int = 0  # of the data order and of dropout
    log_every: int = 10  # steps between entries of the log
    save_every: int = 0  # steps, up to the next log entry, between checkpoints (two are kept); 0 = none
    bf16: bool = False  # compute in bfloat16; the weights that are trained stay float32
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    use_cpu: bool = False  # stay on the CPU even when there is an accelerator


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_c - r_r) per pair (paper eq. 1): [B], [B] -> [B]."""
    return -F.logsigmoid(chosen - rejected)


def pair_metrics(margin: np.ndarray) -> dict[str, float]:
    """Means over pairs of loss (eq. 1), accuracy (a tie counts 1/2) and margin from margins r_c - r_r [n]."""
    accuracy = (margin > 0) + 0.5 * (margin == 0)
    means = {"loss": np.logaddexp(0.0, -margin), "accuracy": accuracy, "margin": margin}
    return {name: float(values.mean()) for name, values in means.items()}


def encode_pairs(tokenizer, pairs: Sequence[dict], max_length: int) -> list[dict]:
    """Token ids {"chosen": ids, "rejected": ids} of pairs in any form that `load_pairs` reads; warns of drops."""
    loaded = load_pairs(pairs)
    if loaded.report.dropped:
        warnings.warn("; ".join(loaded.report.lines()), stacklevel=3)
    ids = encode_conversations(tokenizer, [talk for pair in loaded for talk in conversations(pair)], max_length)
    warn_of_open_turns(tokenizer, ids)
    return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in zip(ids[::2], ids[1::2], strict=True)]


def collate_pairs(pairs: Sequence[dict], pad_id: int = 0) -> dict[str, Tensor]:
    """Batch of B encoded pairs: right-padded ids [2B, T] (all chosen, then all rejected), labels [B]."""
    batch = collate([pair[side] for side in SIDES for pair in pairs], pad_id)
    return batch | {"labels": torch.ones(len(pairs), dtype=torch.int64)}  # by which the Trainer counts pairs


@dataclass(eq=False)
class LengthGroupedSampler(Sampler):
    """Chunks of 50 groups sorted by length, the groups shuffled: a random order that seed and epoch alone decide."""

    lengths: np.ndarray
    group: int
    seed: int
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        full, rest = np.split(order, [len(order) // self.group * self.group])  # a group that is not full stays last
        for start in range(0, len(full), 50 * self.group):
            chunk = full[start:start + 50 * self.group]
            chunk[:] = chunk[np.argsort(-self.lengths[chunk], kind="stable")]
        groups = full.reshape(-1, self.group)
        yield from np.concatenate([groups[rng.permutation(len(groups))].ravel(), rest]).tolist()


class _EvaluateFirst(TrainerCallback):
    """A checkpoint at an epoch's end waits for the evaluation, which a run that resumes there does not repeat."""

    def on_step_end(self, args, state, control, **_):
        self.late = control.should_save and state.epoch == int(state.epoch)
        control.should_save &= not self.late

    def on_epoch_end(self, args, state, control, **_):
        control.should_save |= self.late


class RewardTrainer(Trainer):
    """Train `model` (`SarmForSequenceClassification` or `ScalarRewardModel`) in place by the loss of equation 1.

    A frozen encoder's hash is compared before and after (`ModelError` if it changed).  Weights become float32: steps
    of 4e-6 are below the resolution of less.  `eval_pairs` are scored after each epoch.
    """

    loss_is_scaled_for_ga = True  # our loss is already divided by the pairs of the whole accumulated batch

    def __init__(self, model, tokenizer, train_pairs: Sequence[dict], eval_pairs: Sequence[dict] | None = None,
                 config: RewardTrainConfig | None = None, output_dir: str | Path | None = None, *,
                 progress: bool = False):
        self.reward_config = config = config or RewardTrainConfig()
        if config.save_every and output_dir is None:
            raise ConfigError("save_every > 0 needs an output_dir for the checkpoints")
        _prepare(model)
        length = fit_length(model, config.max_length)
        train_set = encode_pairs(tokenizer, train_pairs, length)
        eval_set = encode_pairs(tokenizer, eval_pairs, length) if eval_pairs else None
        self._margins: list[Tensor] = []
        super().__init__(model=model, args=_arguments(config, output_dir, bool(eval_set), progress),
                         train_dataset=train_set, eval_dataset=eval_set, processing_class=tokenizer,
                         data_collator=partial(collate_pairs, pad_id=pad_id(tokenizer)))
        self.remove_callback(PrinterCallback)  # quiet; the log is in log_history
        self.add_callback(_EvaluateFirst)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the pairs of an accumulated batch

    def train(self, resume: bool | str | None = None):
        """Train; `resume`: from the newest complete checkpoint, if any (`ConfigError` if it is of other pairs)."""
        frozen = getattr(self.model.config, "frozen_sae", False)
        if frozen and is_deepspeed_zero3_enabled():
            raise ConfigError("under DeepSpeed ZeRO 3 the frozen encoder cannot be checked; use FSDP or ZeRO 2")
        dtype = torch.bfloat16 if self.is_deepspeed_enabled else torch.float32  # DeepSpeed may round the weights
        before = frozen and encoder_hash(self.model, dtype)
        checkpoint = self._find_checkpoint() if resume and self.reward_config.save_every else None
        result = super().train(resume_from_checkpoint=checkpoint)
        if frozen and encoder_hash(self.model, dtype) != before:
            raise ModelError("the frozen encoder is not the one training started with: something overwrote it, or the "
                             "resumed checkpoint holds another encoder")
        self.model.eval()
        return result

    @property
    def log_history(self) -> list[dict]:
        """Training entries (loss, grad_norm, learning_rate, accuracy, margin) and evaluation entries (eval_...)."""
        return [one for one in self.state.log_history if "train_loss" not in one]  # a sum since the last resumption

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Mean Bradley-Terry loss over the pairs of the (accumulated, distributed) batch."""
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        chosen, rejected = output.logits.squeeze(-1).chunk(2)
        # gradients are averaged over processes afterwards
        loss = bradley_terry(chosen, rejected).sum() / num_items_in_batch * self.accelerator.num_processes
        if not bool(torch.isfinite(loss)):
            raise ModelError(f"the loss is {loss.item()} at step {self.state.global_step}; lower the learning rate")
        self._margins.append(chosen.detach().float() - rejected.detach().float())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._margins:
            logs = pair_metrics(torch.cat(self._margins).cpu().numpy()) | logs
            self._margins.clear()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """`pair_metrics` of encoded pairs (default: the eval pairs); every process scores all of them."""
        pairs = eval_dataset or self.eval_dataset
        sequences = [pair[side] for side in SIDES for pair in pairs]
        with self.accelerator.autocast():
            rewards = score_ids(self.model, sequences, pad_id=pad_id(self.processing_class))[0]
        chosen, rejected = np.split(rewards, 2)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in pair_metrics(chosen - rejected).items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model=None):
        fresh, config = self.optimizer is None, self.reward_config
        optimizer = super().create_optimizer(model)
        if fresh and config.head_lr is not None:
            head = [p for name, p in (model or self.model).named_parameters() if ".score." in f".{name}"]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if all(p is not one for one in head)]
            optimizer.add_param_group({"params": head, "lr": config.head_lr, "weight_decay": config.weight_decay})
        return optimizer

    def floating_point_ops(self, inputs) -> int:
        return 0  # counting parameters at each step costs as much as a step of a toy model

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        lengths = np.array([max(map(len, pair.values())) for pair in self.train_dataset])
        group = self.args.per_device_train_batch_size * self.args.world_size
        return LengthGroupedSampler(lengths, group, self.reward_config.seed)

    def _save_checkpoint(self, model, trial) -> None:
        with writing(self.args.output_dir):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            write_json(folder / RECORD, self._record(folder))

    def _record(self, folder: Path) -> dict:
        """sha256 of each file of a checkpoint, and of the training pairs."""
        files = hash_tree(folder)
        files.pop(RECORD, None)
        return {"files": files, "pairs": hash_json(self.train_dataset)}

    def _find_checkpoint(self) -> str | None:
        folders = Path(self.args.output_dir).glob("checkpoint-*")
        for folder in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
            found, written = self._record(folder), {}
            with suppress(OSError, ValueError):
                written = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            if written == found:
                return str(folder)
            if written.get("files") == found["files"]:
                raise ConfigError(f"{folder} comes from other training pairs, another tokenizer or max_length; choose "
                                  "another output_dir")
            warnings.warn(f"{folder} is incomplete or damaged and is not used", stacklevel=3)
        return None


def _arguments(config: RewardTrainConfig, output_dir, has_eval: bool, progress: bool) -> TrainingArguments:
    numbers = (config.lr, config.head_lr or 1, config.epochs, config.batch_size, config.micro_batch_size or 1,
               config.log_every)
    shares = (config.weight_decay, config.warmup_ratio)
    if not (all(0 < one < float("inf") for one in numbers) and all(0 <= one < float("inf") for one in shares)
            and 0 <= config.seed < 2**32 and config.scheduler in list(SchedulerType)):
        raise ConfigError(f"lr, head_lr, epochs, batch_size, micro_batch_size and log_every must be positive and "
                          f"finite, seed in 0..2^32-1, scheduler one of {', '.join(SchedulerType)}: {config}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    share = max(1, config.batch_size // world)
    micro = min(config.micro_batch_size or share, share)
    if config.batch_size % (micro * world):
        raise ConfigError(f"batch_size={config.batch_size} is no multiple of {micro} x {world} processes")
    return TrainingArguments(
        output_dir=str(output_dir or tempfile.gettempdir()),  # without checkpoints nothing is written there
        learning_rate=config.lr, num_train_epochs=config.epochs, lr_scheduler_type=config.scheduler,
        per_device_train_batch_size=micro, gradient_accumulation_steps=config.batch_size // (micro * world),
        warmup_steps=config.warmup_ratio, weight_decay=config.weight_decay, seed=config.seed,
        bf16=config.bf16, activation_checkpointing=config.gradient_checkpointing, use_cpu=config.use_cpu,
        logging_steps=config.log_every, disable_tqdm=not progress, report_to="none",
        eval_strategy="epoch" if has_eval else "no", remove_unused_columns=False,
        save_strategy="steps" if config.save_every else "no", save_total_limit=2,
        save_steps=math.ceil((config.save_every or 500) / config.log_every) * config.log_every,  # a log entry is whole
        ddp_find_unused_parameters=False,  # every trainable parameter is used
        dataloader_pin_memory=torch.cuda.is_available() and not config.use_cpu)


def _prepare(model) -> None:
    """Float32 master weights; everything trained but a frozen encoder."""
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        warnings.warn(f"weights in {model.dtype} are trained as float32: small steps vanish in half precision; pass "
                      "bf16=True to compute in bfloat16", stacklevel=3)
        model.float()
    frozen = getattr(model.config, "frozen_sae", False)
    for name, parameter in model.named_parameters():
        read = name != "sae.W_dec"  # no reward depends on it, and DDP waits for every gradient
        parameter.requires_grad_(read and not (frozen and name.startswith("sae.")))


def encoder_hash(model, dtype: torch.dtype = torch.float32) -> str:
    """sha256 of a SARM's encoder weights as `dtype`; every process calls it, to gather what FSDP shares out."""
    tensors = {}
    for name, parameter in model.sae.named_parameters():
        value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        tensors[name] = value.detach().to("cpu", dtype, copy=True)  # FSDP cannot free memory that numpy has seen
    return hash_tensors(tensors, "")
