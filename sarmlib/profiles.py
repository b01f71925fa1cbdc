"""Profiles: every setting of a run in one typed, frozen object, read from ``profiles/<name>.yaml``.

A field left out of a YAML file has the paper's value, where the paper states one; ``PAPER`` holds these values with the
sentence they come from, and ``Profile.diff_from_paper()`` lists where a profile departs.  Values are checked, not
guessed: unknown keys, wrong types and values out of range are refused by name, and a number that YAML 1.1 reads as
text (``4e-6``) is converted.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from sarmlib.errors import ConfigError

FOLDER = Path(__file__).parent / "profiles"
VARIANTS = ("sarm", "token_sae", "random_encoder", "scalar_half", "scalar_full")
LOCAL = "data"
"""Source name that stands for "found in the folder given by DATA"."""


def _check(ok: bool, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{name} = {value!r}: must be {rule}")


def _at_least(section: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _check(value is None or value >= low, f"{type(section).__name__.lower()}.{name}", value, f"at least {low:g}")


def _fraction(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _check(0 <= value <= 1, f"{type(section).__name__.lower()}.{name}", value, "between 0 and 1")


@dataclass(frozen=True)
class Backbone:
    """The pretrained decoder."""

    source: str = "meta-llama/Llama-3.1-8B-Instruct"
    """``toy`` (shipped), ``data`` (from DATA), a folder, or a hub id."""
    revision: str | None = None
    """Commit on the hub; None = newest, which is not reproducible."""
    layer: int | None = None
    """Layer l whose output is read, counted from 1; None = half: "we extract hidden states from the midpoint layer"."""
    trust_remote_code: bool = False
    """Run Python code that comes with a checkpoint; only for sources you trust."""

    def __post_init__(self):
        _at_least(self, 1, "layer")


@dataclass(frozen=True)
class Corpus:
    """Text for SAE pretraining: "sampled from OpenWebText2"."""

    source: str = "segyges/OpenWebText2"
    """``toy``, ``data``, a file or folder, or a hub id."""
    revision: str | None = None
    """Commit on the hub."""
    documents: int | None = None
    """Documents read at most; None = as many as the SAE needs."""
    window: int = 1024
    """Tokens per forward pass (not stated in the paper)."""
    batch_size: int = 16
    """Windows per forward pass."""
    text_field: str = "text"
    """Column that holds the text."""
    dialogue_share: float = 0.0
    """Share of the documents that are conversations from the training pairs, so that the end of a turn is among the
    SAE's positions (the paper: a general corpus only)."""

    def __post_init__(self):
        _at_least(self, 1, "documents", "window", "batch_size")
        _check(0 <= self.dialogue_share < 1, "corpus.dialogue_share", self.dialogue_share, "at least 0 and below 1")


@dataclass(frozen=True)
class Sae:
    """The TopK sparse autoencoder, equations 2-5, 7 and 8."""

    expansion: int = 16
    """M = expansion x d: "The SAE uses a feature dimension set to 16x the hidden size of the LLM"."""
    k_ratio: float = 3 / 64
    """k = k_ratio x d: "the sparsity constraint k is fixed at 3/64 of the hidden size"."""
    positions: str = "sentence_end"
    """Position rule: "exclusively on activations from the final token of each sentence in a general corpus"."""
    vectors: int = 50_000_000
    """Activation vectors collected: "using 50M sequences (approximately 1B tokens)"."""
    steps: int | None = None
    """Optimizer steps; None = one pass over the vectors (not stated in the paper)."""
    batch_size: int = 4096
    """Vectors per step (not stated in the paper)."""
    lr: float = 5e-4
    """Adam learning rate: "a learning rate of 5x10^-4"."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Adam: "standard hyperparameters: beta_1 = 0.9, beta_2 = 0.999"."""
    renorm_every: int = 10
    """Steps between projections to unit norm: "unit-norm regularization to the decoder columns every 10 steps"."""
    auxk_coef: float = 0.0
    """Weight of the dead-feature loss; the paper has none."""
    dead_after: int = 10_000_000
    """Vectors without activation after which a feature counts as dead."""
    encoder_bias: bool = False
    """Extra bias inside TopK; equation 4 has none."""
    relu: bool = True
    """Keep z >= 0 after TopK: "a feature contributes to the final reward only if it is activated, i.e., z_i > 0"."""

    def __post_init__(self):
        _at_least(self, 1, "expansion", "vectors", "steps", "batch_size", "renorm_every", "dead_after")
        _at_least(self, 0, "auxk_coef")
        _check(0 < self.k_ratio <= 1, "sae.k_ratio", self.k_ratio, "above 0 and at most 1")
        _check(self.lr > 0, "sae.lr", self.lr, "above 0")
        _check(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "sae.betas", self.betas, "two in [0, 1)")

    def n_features(self, d_model: int) -> int:
        """M for hidden size d."""
        return self.expansion * d_model

    def k(self, d_model: int) -> int:
        """k for hidden size d: k_ratio x d, rounded, at least 1."""
        return max(1, round(self.k_ratio * d_model))


@dataclass(frozen=True)
class Preferences:
    """Preference pairs: "exclusively on the Skywork-Reward-Preference-80K-v0.2 dataset"."""

    source: str = "Skywork/Skywork-Reward-Preference-80K-v0.2"
    """``toy``, ``data``, a file, or a hub id."""
    revision: str | None = None
    """Commit on the hub."""
    train_pairs: int | None = None
    """Pairs to train on; None = all that are not held out."""
    eval_pairs: int = 1000
    """Pairs scored of those held out (not stated in the paper)."""
    eval_fraction: float = 0.1
    """Share of the prompts that is held out; no prompt is on both sides (not stated in the paper)."""
    label_noise: float = 0.0
    """Fraction of training pairs whose labels are swapped (toy world only)."""
    max_length: int = 4096
    """Tokens per conversation; longer ones lose their beginning (4096 in the released code, not in the paper)."""

    def __post_init__(self):
        _at_least(self, 1, "train_pairs", "eval_pairs", "max_length")
        _fraction(self, "label_noise")


@dataclass(frozen=True)
class Reward:
    """Reward model training, equations 1 and 9."""

    lr: float = 4e-6
    """Learning rate of the backbone: "the learning rate to 4x10^-6"."""
    head_lr: float | None = None
    """Learning rate of the value head; None = lr."""
    epochs: float = 3.0
    """Passes over the pairs: "for 3 epochs"."""
    batch_size: int = 512
    """Pairs per step over all devices: "We set the global batch size to 512"."""
    micro_batch_size: int | None = None
    """Pairs per device and forward pass; None = batch_size.  Gradients are accumulated up to batch_size."""
    warmup_ratio: float = 0.0
    """Fraction of steps with rising learning rate (not stated in the paper)."""
    weight_decay: float = 0.0
    """AdamW weight decay (not stated in the paper)."""
    scheduler: str = "cosine"
    """Learning-rate schedule by its transformers name (not stated in the paper)."""
    gradient_checkpointing: bool = False
    """Trade compute for memory."""

    def __post_init__(self):
        _check(self.lr > 0, "reward.lr", self.lr, "above 0")
        _check(self.head_lr is None or self.head_lr > 0, "reward.head_lr", self.head_lr, "above 0")
        _check(self.epochs > 0, "reward.epochs", self.epochs, "above 0")
        _at_least(self, 1, "batch_size", "micro_batch_size")
        _at_least(self, 0, "weight_decay")
        _fraction(self, "warmup_ratio")


@dataclass(frozen=True)
class Benchmarks:
    """RewardBench 2 (Tables 1 and 2, Figure 3) and RM-Bench (feature contexts and scores)."""

    rewardbench2: str = "allenai/reward-bench-2"
    """``toy``, ``data``, a file, or a hub id: "We use RewardBench 2 (Malik et al. 2025) as the benchmark"."""
    rewardbench2_revision: str | None = None
    """Commit on the hub."""
    rm_bench: str = "THU-KEG/RM-Bench"
    """``toy``, ``data``, a file or folder, or a hub id: "the out-of-distribution preference dataset RM-Bench"."""
    rm_bench_revision: str | None = None
    """Commit on the hub."""
    items_per_subset: int | None = None
    """Items per subset or domain; None = all."""
    max_length: int = 2048
    """Tokens per conversation (as both official scorers)."""
    batch_tokens: int = 16384
    """Padded tokens per forward pass."""

    def __post_init__(self):
        _at_least(self, 1, "items_per_subset", "max_length", "batch_tokens")


@dataclass(frozen=True)
class Interpretation:
    """Labels for features (RQ1)."""

    features: int = 40
    """Features labelled: half with the largest, half with the smallest head weight."""
    min_positives: int = 30
    """Activating samples a feature needs before it is labelled."""
    permutations: int = 1000
    """Label permutations behind each p value."""
    top_keywords: int = 8
    """Keywords per label."""
    fdr: float = 0.1
    """False discovery rate at which a label counts as above chance."""
    explainer: str = "keywords"
    """``keywords`` (offline) or ``llm``; the paper: "sent to GPT-4o to generate human-readable interpretations"."""

    def __post_init__(self):
        _at_least(self, 1, "features", "min_positives", "permutations", "top_keywords")
        _fraction(self, "fdr")
        _check(self.explainer in ("keywords", "llm"), "interpretation.explainer", self.explainer, "keywords or llm")


@dataclass(frozen=True)
class Steering:
    """Scaling one weight of the value head (RQ2, Figure 3)."""

    factor: float = 8.0
    """"We then multiply the i-th value-head parameter by a constant" (the constant is not stated)."""
    doses: tuple[float, ...] = (-8.0, -2.0, 0.0, 0.5, 1.0, 2.0, 5.0, 8.0, 10.0, 20.0, 40.0, 80.0, 160.0)
    """Factors of the dose-response curve."""
    bootstrap: int = 2000
    """Resamples behind each interval."""

    def __post_init__(self):
        _at_least(self, 1, "bootstrap")
        _check(len(self.doses) > 0, "steering.doses", self.doses, "at least one factor")


@dataclass(frozen=True)
class Profile:
    """All settings of one run."""

    name: str
    """File name without ``.yaml``."""
    description: str
    """One sentence for the table in the README."""
    hardware: str
    """What it needs, in words."""
    cost: str
    """Minutes, memory and download, and whether they were measured."""
    seed: int = 0
    """Seed of everything that is made once (data, first model)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the repeated trainings."""
    workers: int = 1
    """Trainings side by side, each a process with one thread."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``mps``."""
    dtype: str = "float32"
    """Backbone number format: float32, bfloat16 or float16."""
    data: str | None = None
    """Folder with the user's own data, for sources called ``data``."""
    variants: tuple[str, ...] = VARIANTS
    """Reward models trained: Table 2's ablations and the scalar baselines."""
    backbone: Backbone = field(default_factory=Backbone)
    corpus: Corpus = field(default_factory=Corpus)
    sae: Sae = field(default_factory=Sae)
    preferences: Preferences = field(default_factory=Preferences)
    reward: Reward = field(default_factory=Reward)
    benchmarks: Benchmarks = field(default_factory=Benchmarks)
    interpretation: Interpretation = field(default_factory=Interpretation)
    steering: Steering = field(default_factory=Steering)

    def __post_init__(self):
        _at_least(self, 1, "workers")
        _check(len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "distinct seeds")
        _check(self.device in ("auto", "cpu", "cuda", "mps"), "device", self.device, "auto, cpu, cuda or mps")
        _check(self.dtype in ("float32", "bfloat16", "float16"), "dtype", self.dtype, "float32, bfloat16 or float16")
        for variant in self.variants:
            _check(variant in VARIANTS, "variants", variant, f"among {', '.join(VARIANTS)}")

    def to_dict(self) -> dict:
        """Plain nested dict."""
        return dataclasses.asdict(self)

    def get(self, path: str) -> Any:
        """Value at a dotted path, for example ``sae.lr``."""
        value: Any = self
        for part in path.split("."):
            value = getattr(value, part)
        return value

    def diff_from_paper(self) -> list[tuple[str, Any, Any]]:
        """``(field, paper's value, value here)`` for each setting that the paper states and this profile changes."""
        rows = [(path, paper, self.get(path)) for path, (paper, _) in PAPER.items()]
        return [(path, paper, here) for path, paper, here in rows
                if here not in (paper if isinstance(paper, Choice) else (paper,))]


class Choice(tuple):
    """Several values that all agree with the paper; shown as its first."""

    def __repr__(self) -> str:
        return " or ".join(map(str, self))


PAPER: dict[str, tuple[Any, str]] = {
    "backbone.source": (
        Choice(("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "Schrieffer/Llama-SARM-4B")),
        "We pretrain the SAE on hidden activations from Llama-3 models (3B and 8B)"),
    "backbone.layer": (None, "we extract hidden states from the midpoint layer"),
    "corpus.source": ("segyges/OpenWebText2", "sampled from OpenWebText2"),
    "corpus.dialogue_share": (0.0, "from the final token of each sentence in a general corpus"),
    "sae.vectors": (50_000_000, "using 50M sequences (approximately 1B tokens)"),
    "sae.positions": ("sentence_end", "exclusively on activations from the final token of each sentence"),
    "sae.expansion": (16, "The SAE uses a feature dimension set to $16 \\times$ the hidden size of the LLM"),
    "sae.k_ratio": (3 / 64, "the sparsity constraint k is fixed at $\\frac{3}{64}$ of the hidden size"),
    "sae.lr": (5e-4, "a learning rate of 5×10^{-4}"),
    "sae.betas": ((0.9, 0.999), "$\\beta_1 = 0.9$, $\\beta_2 = 0.999$"),
    "sae.renorm_every": (10, "unit-norm regularization to the decoder columns every 10 steps"),
    "sae.auxk_coef": (0.0, "The model is trained to minimize the reconstruction error"),
    "sae.encoder_bias": (False, "\\text{TopK}(\\mathbf{W}_{\\text{enc}}(\\mathbf{x} - \\mathbf{b}_{\\text{pre}}))"),
    "sae.relu": (True, "a feature contributes to the final reward only if it is activated, i.e., $z_i > 0$"),
    "preferences.source": ("Skywork/Skywork-Reward-Preference-80K-v0.2",
                           "exclusively on the Skywork-Reward-Preference-80K-v0.2 dataset"),
    "preferences.train_pairs": (None, "exclusively on the Skywork-Reward-Preference-80K-v0.2 dataset"),
    "reward.epochs": (3.0, "for 3 epochs"),
    "reward.batch_size": (512, "We set the global batch size to 512"),
    "reward.lr": (4e-6, "the learning rate to 4×10^{-6}"),
    "reward.head_lr": (None, "the learning rate to 4×10^{-6}"),
    "benchmarks.rewardbench2": ("allenai/reward-bench-2", "We use RewardBench 2 (Malik et al. 2025) as the benchmark"),
    "benchmarks.rm_bench": ("THU-KEG/RM-Bench", "the out-of-distribution preference dataset RM-Bench"),
    "benchmarks.items_per_subset": (None, "We use RewardBench 2 (Malik et al. 2025) as the benchmark"),
    "interpretation.explainer": ("llm", "sent to GPT-4o to generate human-readable interpretations"),
}
"""Settings the paper states: dotted field -> (value, the paper's words)."""


def profile_names() -> list[str]:
    """Names of the profiles that come with the library."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load_profile(name_or_path: str | Path = "toy", *, data: str | Path | None = None, **overrides: Any) -> Profile:
    """A profile by name or YAML path.  ``overrides`` are dotted paths or nested dicts: ``**{"sae.steps": 10}``.

    ``data``: the user's folder (default ``$SARMLIB_DATA``), needed when a source is called ``data``.
    Raises ConfigError for an unknown profile, an unknown key (with the closest known one) or a bad value.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name_or_path}.yaml"
        if not path.is_file():
            raise ConfigError(f"unknown profile {str(name_or_path)!r}{_closest(str(name_or_path), profile_names())}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"profile {path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"profile {path} must be a mapping of settings, got {type(raw).__name__}")
    raw = {"name": path.stem, **raw}
    for key, value in overrides.items():
        _assign(raw, key.split("."), value)
    profile = _build(Profile, raw, "")
    wanted = LOCAL in (profile.backbone.source, profile.corpus.source, profile.preferences.source,
                       profile.benchmarks.rewardbench2, profile.benchmarks.rm_bench)
    if not wanted and data:
        raise ConfigError(f"profile {profile.name!r} reads no data folder (got {str(data)!r}); use profile local")
    if not wanted:
        return profile
    data = data or profile.data or os.environ.get("SARMLIB_DATA")
    if not data:
        raise ConfigError(f"profile {profile.name!r} reads your own data: name its folder with "
                          f"`make reproduce PROFILE={profile.name} DATA=folder` or load_profile(..., data=folder)")
    if not Path(data).is_dir():
        raise ConfigError(f"data folder {str(data)!r} does not exist")
    return dataclasses.replace(profile, data=str(Path(data).resolve()))


def _assign(raw: dict, path: list[str], value: Any) -> None:
    for part in path[:-1]:
        raw = raw.setdefault(part, {})
    if isinstance(value, dict) and isinstance(raw.get(path[-1]), dict):
        value = {**raw[path[-1]], **value}
    raw[path[-1]] = value


def _closest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _build(cls: type, raw: Any, where: str) -> Any:
    """A dataclass from a mapping, each value converted to its field's type."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must be a mapping of settings, got {raw!r}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in raw:
        if key not in known:
            raise ConfigError(f"unknown setting {f'{where}.{key}'.lstrip('.')!r}{_closest(str(key), known)}")
    for f in dataclasses.fields(cls):
        if f.name not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"setting {f'{where}.{f.name}'.lstrip('.')!r} is missing")
    return cls(**{key: _convert(value, hints[key], f"{where}.{key}".lstrip(".")) for key, value in raw.items()})


def _convert(value: Any, kind: Any, where: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else _build(kind, value, where)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, typing.get_args(kind)[0], where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} = {value!r}: must be a list")
        return tuple(_convert(v, typing.get_args(kind)[0], f"{where}[{i}]") for i, v in enumerate(value))
    if kind is bool or kind is str:
        _check(isinstance(value, kind), where, value, "true or false" if kind is bool else "text (quote it in YAML)")
        return value
    if isinstance(value, str):  # YAML 1.1 reads 4e-6 as text; 3/64 is text too
        try:
            value = float(Fraction(value.strip())) if "/" in value else float(value)
        except (ValueError, ZeroDivisionError):
            raise ConfigError(f"{where} = {value!r}: must be a number") from None
    _check(isinstance(value, (int, float)) and not isinstance(value, bool), where, value, "a number")
    _check(math.isfinite(value), where, value, "a finite number")
    if kind is int:
        _check(float(value).is_integer(), where, value, "a whole number")
    return kind(value)
