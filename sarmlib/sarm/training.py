"""Reward training by the Bradley-Terry loss (paper eq. 1) on a thin subclass of ``transformers.Trainer``.

Ours: the pair loss, the collator, batches of similar length, pair metrics, and the guarantee that a frozen encoder is
bit-identical after training.  Theirs: optimisation, precision, distribution, checkpoints and exact resumption.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerControl, TrainingArguments

from ..chat import check_conversation, collate, count_not_end_of_turn, encode_conversations, fit_length, pad_id
from ..errors import ConfigError, DataError, ModelError
from ..evaluation.scoring import score_token_ids
from ..sae.model import TopKSAE, normalized_mse

MODES = {
    0: ("score",),
    1: ("model", "score"),
    3: ("model", "sae", "score"),
}
"""Trained parts by the released code's mode number: 0 head only, 1 backbone and head, 3 the encoder too."""


@dataclass(frozen=True)
class RewardTrainConfig:
    """Settings of reward training; the defaults are the paper's where it names one."""

    lr: float = 4e-6
    """Peak learning rate. Paper: "the learning rate to 4 x 10^-6" (released recipe: 2e-6 to 4e-6)."""
    head_lr: float | None = None
    """Learning rate of the head alone; None = `lr`. Not in the paper; useful when the head starts at zero."""
    epochs: float = 3.0
    """Paper: "for 3 epochs"."""
    max_steps: int = -1
    """Optimizer steps instead of epochs, when positive."""
    batch_size: int = 512
    """Pairs per optimizer step over all devices. Paper: "We set the global batch size to 512"."""
    micro_batch_size: int | None = None
    """Pairs per forward pass and device; None = as many as `batch_size` allows. Must divide it."""
    mode: int = 1
    """What is trained: 0 head; 1 backbone and head, paper: "train only the first l layers of the backbone language
    model along with the final linear head"; 3 the encoder too, with a reconstruction loss (released recipe)."""
    rec_coef: float = 1.0
    """Weight of the encoder's reconstruction loss at the reward position (mode 3 only; released recipe: 1)."""
    use_margin: bool = False
    """Subtract ``pair["meta"]["margin"]`` inside the sigmoid (Llama 2 style). Not in the paper."""
    center: float = 0.0
    """Weight of (r_c + r_r)^2, which centres rewards at zero. Not in the paper (0.01 is usual)."""
    max_length: int = 4096
    """Tokens per conversation, at most the model's context; longer ones lose tokens on the left (released: 4096)."""
    scheduler: str = "cosine"
    """Learning rate schedule, a transformers name. Not in the paper; cosine in the released code."""
    warmup_ratio: float = 0.03
    """Warmup as a share of the steps. Not in the paper; .03 in the released code."""
    weight_decay: float = 0.001
    """AdamW weight decay, not on biases and norms. Not in the paper; .001 in the released code."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 = off."""
    group_by_length: bool = True
    """Pairs of similar length share a forward pass; the order of batches stays random."""
    seed: int = 0
    """Seed of the data order and of dropout."""
    log_every: int = 10
    """Optimizer steps between entries of the log."""
    eval_every: int = 0
    """Optimizer steps between evaluations; 0 = after each epoch when there are eval pairs, -1 = never."""
    save_every: int = 0
    """Optimizer steps between checkpoints under `output_dir`; 0 = none."""
    keep_checkpoints: int = 1
    """Older checkpoints are deleted."""
    bf16: bool = False
    """Mixed precision (GPU)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    lora_rank: int = 0
    """When positive, the backbone's linear layers get trained LoRA adapters of this rank instead of being trained
    themselves; after training the adapters are merged into them. Needs peft. Not in the paper."""
    lora_alpha: float | None = None
    """Adapters are scaled by alpha / rank; None = 2 x rank."""
    use_cpu: bool = False
    """Stay on the CPU even when there is an accelerator."""

    def __post_init__(self):
        if self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r} is unknown; choose one of {sorted(MODES)}")
        for name in ("lr", "batch_size", "epochs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.lora_rank < 0 or (self.lora_rank and self.mode == 0):
            raise ConfigError(f"lora_rank={self.lora_rank} with mode={self.mode}: a rank is not negative, and mode 0 "
                              "trains no backbone to adapt")
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise ConfigError(f"micro_batch_size={self.micro_batch_size} must divide batch_size={self.batch_size}")


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_c - r_r - margin) per pair (paper eq. 1 with margin 0): [B], [B] -> [B]."""
    return -F.logsigmoid(chosen - rejected - margin)


def preference_loss(model, batch: dict[str, Tensor], config: RewardTrainConfig) -> tuple[Tensor, Tensor]:
    """Loss per pair [B] and rewards [2B] of a batch from `PairCollator` (all chosen first, then all rejected).

    Mode 3 adds the encoder's normalised reconstruction error (eq. 5) at the reward position; the hidden state is
    detached there, so the backbone learns from preferences only.
    """
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    rewards = output.logits.squeeze(-1)
    chosen, rejected = rewards.chunk(2)
    loss = bradley_terry(chosen, rejected, batch["margin"] if config.use_margin else 0.0)
    if config.center:
        loss = loss + config.center * (chosen + rejected).square()
    if config.mode == 3 and config.rec_coef and hasattr(unwrap(model), "sae"):
        sae = unwrap(model).sae
        x = sae.normalize(output.hidden.detach())[0]
        loss = loss + config.rec_coef * normalized_mse(sae.decode(sae.encode(output.hidden.detach())), x)
    return loss, rewards


def unwrap(model):
    """The reward model inside a distributed wrapper."""
    return getattr(model, "module", model)


def encoder_hash(model, dtype: torch.dtype | None = None) -> str:
    """sha256 of a SARM's encoder as it is, or of its weights as `dtype`; gathers what FSDP 2 or ZeRO 3 shares out, so
    that every process has to call it."""
    sae = unwrap(model).sae
    if dtype is None:
        return sae.content_hash()
    parameters = dict(sae.named_parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        import deepspeed
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            values = {name: parameter.detach().to(dtype, copy=True) for name, parameter in parameters.items()}
    else:
        values = {name: (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter)
                  .detach().to(dtype, copy=True) for name, parameter in parameters.items()}
    with torch.device("meta"):
        whole = TopKSAE(**sae.settings())
    whole.load_state_dict(values, assign=True)
    return whole.content_hash()


def encode_pairs(tokenizer, pairs: Sequence[dict], max_length: int) -> list[dict]:
    """Token ids of preference pairs: ``{"chosen": ids, "rejected": ids, "margin": float}``; raises `DataError`."""
    conversations = []
    for number, pair in enumerate(pairs):
        missing = [field for field in ("prompt", "chosen", "rejected") if field not in pair]
        if missing:
            raise DataError(f"pair {number} (id {pair.get('id')!r}) has no field {missing[0]!r}")
        for side in ("chosen", "rejected"):
            talk = [*pair["prompt"], {"role": "assistant", "content": pair[side]}]
            try:
                check_conversation(talk)
            except DataError as error:
                raise DataError(f"pair {number} (id {pair.get('id')!r}), {side}: {error}") from None
            conversations.append(talk)
        margin = (pair.get("meta") or {}).get("margin") or 0.0
        if not isinstance(margin, (int, float)) or not np.isfinite(margin):
            raise DataError(f"pair {number} (id {pair.get('id')!r}) has margin {margin!r}; a finite number is needed")
    ids = encode_conversations(tokenizer, conversations, max_length)
    count_not_end_of_turn(tokenizer, ids)
    return [{"chosen": ids[2 * n], "rejected": ids[2 * n + 1],
             "margin": float((pair.get("meta") or {}).get("margin") or 0.0)} for n, pair in enumerate(pairs)]


@dataclass(frozen=True)
class PairCollator:
    """Batch of B encoded pairs: right-padded ids [2B, T] (all chosen, then all rejected), margin [B], labels [B].

    The labels only let the Trainer count pairs, so that the mean over an accumulated batch is exact.
    """

    pad_id: int = 0

    def __call__(self, pairs: Sequence[dict]) -> dict[str, Tensor]:
        batch = collate([pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs], self.pad_id)
        batch["margin"] = torch.tensor([pair["margin"] for pair in pairs])
        batch["labels"] = torch.ones(len(pairs), dtype=torch.int64)
        return batch


class LengthGroupedSampler(Sampler):
    """Random order in which each run of `group` indices has similar lengths; a function of seed and epoch alone.

    The shuffled data are cut into chunks of 50 groups, each chunk sorted by length, and the groups shuffled.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int, by_length: bool = True):
        self.lengths, self.group, self.seed, self.by_length = np.asarray(lengths), group, seed, by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        if self.by_length:
            full = len(order) // self.group * self.group  # a group that is not full stays last
            chunk = 50 * self.group
            parts = [order[start:min(start + chunk, full)] for start in range(0, full, chunk)]
            parts = [part[np.argsort(-self.lengths[part], kind="stable")] for part in parts]
            groups = np.concatenate(parts).reshape(-1, self.group) if parts else np.empty((0, self.group), int)
            order = np.concatenate([groups[rng.permutation(len(groups))].ravel(), order[full:]])
        yield from order.tolist()


class _NoFiles(TrainingArguments):
    """Training arguments of a run that writes nothing."""

    @property
    def should_save(self) -> bool:
        return False


class RewardTrainer(Trainer):
    """Train a reward model on preference pairs by the Bradley-Terry loss (paper eq. 1).

    Args:
        model: `SarmForSequenceClassification` or `ScalarRewardModel`; trained in place.
        tokenizer: its chat template renders the pairs.
        train_pairs, eval_pairs: pairs ``{"id", "prompt": messages, "chosen": str, "rejected": str, "meta"}``.
        config: `RewardTrainConfig`.
        output_dir: where checkpoints go (needed when `config.save_every` > 0); None writes no files.
        progress: show a progress bar.  callbacks: further transformers callbacks.

    ``train(resume=True)`` continues from the last checkpoint, bit-exactly on one CPU device.  ``log_history`` is the
    log.  Before training the trainable set is checked against `config.mode`; a frozen encoder's hash is compared before
    and after (`ModelError` if it changed).  With several processes the last batch of an epoch is filled up with pairs
    from its beginning.
    """

    loss_is_scaled_for_ga = True  # our loss is already divided by the pairs of the whole accumulated batch

    def __init__(self, model, tokenizer, train_pairs: Sequence[dict], eval_pairs: Sequence[dict] | None = None,
                 config: RewardTrainConfig | None = None, output_dir: str | Path | None = None, *,
                 progress: bool = False, callbacks=None):
        self.reward_config = config = config or RewardTrainConfig()
        if len(train_pairs) == 0:
            raise DataError("there are no training pairs")
        if config.save_every and output_dir is None:
            raise ConfigError("save_every > 0 needs an output_dir for the checkpoints")
        if config.lora_rank:
            add_adapters(model, config)
        set_trainable(model, config.mode)
        max_length = fit_length(model, config.max_length)
        train_set = encode_pairs(tokenizer, train_pairs, max_length)
        eval_set = encode_pairs(tokenizer, eval_pairs, max_length) if eval_pairs else None
        arguments = self._arguments(config, output_dir, bool(eval_set), progress)
        self._metrics = defaultdict(list)
        super().__init__(model=model, args=arguments, train_dataset=train_set, eval_dataset=eval_set,
                         data_collator=PairCollator(pad_id(tokenizer)), processing_class=tokenizer, callbacks=callbacks)
        if config.lora_rank and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ConfigError(f"lora_rank={config.lora_rank}: adapters cannot be merged into weights that FSDP or "
                              "DeepSpeed shares out; use ddp.yaml, adapters need little memory")
        self.remove_callback(PrinterCallback)  # quiet; the log is in state.log_history
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the pairs of an accumulated batch

    @staticmethod
    def _arguments(config: RewardTrainConfig, output_dir, has_eval: bool, progress: bool) -> TrainingArguments:
        world = int(os.environ.get("WORLD_SIZE", 1))
        if config.batch_size % world:
            raise ConfigError(f"batch_size={config.batch_size} must be divisible by the {world} processes")
        micro = min(config.micro_batch_size or config.batch_size // world, config.batch_size // world)
        if config.batch_size % (micro * world):
            raise ConfigError(f"batch_size={config.batch_size} is no multiple of micro_batch_size={micro} x {world} "
                              "processes")
        evaluate = has_eval and config.eval_every >= 0
        return (TrainingArguments if output_dir is not None else _NoFiles)(
            output_dir=str(output_dir) if output_dir is not None else "unused",
            learning_rate=config.lr, num_train_epochs=config.epochs, max_steps=config.max_steps,
            per_device_train_batch_size=micro, per_device_eval_batch_size=micro,
            gradient_accumulation_steps=config.batch_size // (micro * world),
            lr_scheduler_type=config.scheduler, warmup_steps=config.warmup_ratio, weight_decay=config.weight_decay,
            adam_beta1=config.betas[0], adam_beta2=config.betas[1], max_grad_norm=config.max_grad_norm,
            seed=config.seed, bf16=config.bf16, activation_checkpointing=config.gradient_checkpointing,
            use_cpu=config.use_cpu, disable_tqdm=not progress, report_to="none",
            logging_strategy="steps", logging_steps=config.log_every, logging_nan_inf_filter=False,
            eval_strategy=("steps" if config.eval_every > 0 else "epoch") if evaluate else "no",
            eval_steps=config.eval_every if config.eval_every > 0 else None,
            save_strategy="steps" if config.save_every else "no", save_steps=config.save_every or 500,
            save_total_limit=config.keep_checkpoints, remove_unused_columns=False, label_names=["labels"],
            ddp_find_unused_parameters=False,  # every trainable parameter is used
            dataloader_pin_memory=torch.cuda.is_available() and not config.use_cpu,
        )

    def train(self, resume: bool | str | Path | None = None, **kwargs):
        """Train; returns the Trainer's output.

        `resume`: a checkpoint folder, True for the last complete checkpoint under `output_dir` (`ConfigError` when
        there is none), or "auto" for that checkpoint if there is one.
        """
        model, mode = self.model, self.reward_config.mode
        check_trainable(model, mode)
        # FSDP and DeepSpeed keep the weights in a precision of their own, so that their rounding is not a change
        dtype = torch.bfloat16 if self.is_fsdp_enabled or self.is_deepspeed_enabled else None
        before = encoder_hash(model, dtype) if hasattr(model, "sae_hash") and mode != 3 else None
        if resume in (True, "auto"):
            last = last_checkpoint(self.args.output_dir)
            if last is None and resume is True:
                raise ConfigError(f"there is no complete checkpoint under {self.args.output_dir!r} to resume from")
            resume = last
        result = super().train(resume_from_checkpoint=str(resume) if resume else None, **kwargs)
        if before is not None and encoder_hash(self.model, dtype) != before:
            raise ModelError("the frozen encoder is not the one training started with, so its features are no longer "
                             "those that were interpreted: something un-froze or overwrote it, or the checkpoint that "
                             "was resumed holds another encoder")
        if self.reward_config.lora_rank:
            merge_adapters(unwrap(self.model))
        self.model.eval()
        return result

    @property
    def log_history(self) -> list[dict]:
        """Training entries (loss, grad_norm, learning_rate, accuracy, margin) and evaluation entries (eval_...)."""
        return self.state.log_history

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Mean Bradley-Terry loss over the pairs of the (accumulated, distributed) batch."""
        losses, rewards = preference_loss(model, inputs, self.reward_config)
        count = num_items_in_batch if num_items_in_batch is not None else len(losses)
        loss = losses.sum() / count
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes afterwards
        if not bool(torch.isfinite(loss)):
            raise ModelError(f"the loss is {loss.item()} at step {self.state.global_step}; lower the learning rate or "
                             "train in float32 or bfloat16")
        chosen, rejected = rewards.detach().chunk(2)
        self._metrics["accuracy"].append(_accuracy(chosen - rejected))
        self._metrics["margin"].append(chosen - rejected)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pair accuracy and margin since the last entry to training entries of the log."""
        if "loss" in logs and self._metrics:
            logs = {**logs, **{name: float(torch.cat(values).mean()) for name, values in self._metrics.items()}}
            self._metrics.clear()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss, accuracy (a tie counts 1/2), margin and reward statistics on held-out pairs.

        `eval_dataset`: encoded pairs (default: those given to the constructor).  Every process scores all of them.
        """
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        if not pairs:
            raise DataError("there are no evaluation pairs")
        sequences = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
        rewards, _ = score_token_ids(self.model, sequences, pad_id=self.data_collator.pad_id)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in pair_metrics(*np.split(rewards, 2)).items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        pairs = self.train_dataset if train_dataset is None else train_dataset
        lengths = [max(len(pair["chosen"]), len(pair["rejected"])) for pair in pairs]
        group = self.args.per_device_train_batch_size * self.args.world_size
        return LengthGroupedSampler(lengths, group, self.reward_config.seed, self.reward_config.group_by_length)

    def create_optimizer(self, model=None):
        """AdamW with one more pair of parameter groups when the head has its own learning rate."""
        optimizer = super().create_optimizer(model)
        head_lr = self.reward_config.head_lr
        if head_lr is not None and not any(group.get("is_head") for group in optimizer.param_groups):
            head = {id(p) for name, p in (model or self.model).named_parameters() if ".score." in f".{name}"}
            moved = []
            for group in optimizer.param_groups:
                moved += [p for p in group["params"] if id(p) in head]
                group["params"] = [p for p in group["params"] if id(p) not in head]
            optimizer.add_param_group({"params": moved, "lr": head_lr, "is_head": True,
                                       "weight_decay": self.reward_config.weight_decay})
        return optimizer

    def floating_point_ops(self, inputs) -> int:
        """0: counting parameters at each step costs as much as a step of a toy model."""
        return 0


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint folder (its trainer_state.json is written last), or None."""
    found = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def add_adapters(model, config: RewardTrainConfig) -> None:
    """Put LoRA adapters on every linear layer of the backbone, and on nothing else; `ConfigError` without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(f"lora_rank={config.lora_rank} needs peft: pip install 'sarmlib[lora]'") from None
    alpha = config.lora_alpha if config.lora_alpha is not None else 2 * config.lora_rank
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        inject_adapter_in_model(LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules="all-linear"),
                                model.model)


def merge_adapters(model) -> None:
    """Add the adapters to the layers they adapt and remove them: the model is a plain one again."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.base_layer)


def set_trainable(model, mode: int) -> None:
    """Set ``requires_grad`` of every part for `mode`, and record in the config whether the encoder is frozen.

    Of a backbone with adapters only the adapters are trained.
    """
    for _, parameter, wanted in _wanted(model, mode):
        parameter.requires_grad_(wanted)
    if hasattr(model, "sae"):
        model.config.frozen_sae = "sae" not in MODES[mode]


def check_trainable(model, mode: int) -> None:
    """Raise `ModelError` unless exactly the parts of `mode` are trainable."""
    for name, parameter, wanted in _wanted(model, mode):
        if parameter.requires_grad != wanted:
            raise ModelError(f"{name} is {'trainable' if not wanted else 'frozen'}, but mode {mode} trains "
                             f"{', '.join(MODES[mode])}; do not change requires_grad after making the trainer")


def _wanted(model, mode: int) -> Iterator[tuple[str, torch.nn.Parameter, bool]]:
    adapted = any(".lora_" in name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        yield name, parameter, part in MODES[mode] and (part != "model" or not adapted or ".lora_" in name)


def _accuracy(margin: Tensor) -> Tensor:
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def pair_metrics(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Metrics of held-out pairs from rewards [n], [n]: loss (eq. 1), accuracy, margin, reward mean, std, quantiles."""
    margin, rewards = chosen - rejected, np.concatenate([chosen, rejected])
    quantiles = {f"reward_q{q:02d}": float(np.quantile(rewards, q / 100)) for q in (5, 50, 95)}
    return {"loss": float(np.logaddexp(0.0, -margin).mean()),
            "accuracy": float(((margin > 0) + 0.5 * (margin == 0)).mean()), "margin": float(margin.mean()),
            "reward_mean": float(rewards.mean()), "reward_std": float(rewards.std()), **quantiles}
