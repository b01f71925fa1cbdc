"""Profiles: every setting of a run in one typed, frozen object, read from ``profiles/<name>.yaml``.

A field left out of a YAML file has the paper's value, where the paper states one: the fields of ``STATED``, whose
comments quote it.  ``Profile.diff_from_paper()`` lists where a profile departs.
"""

import difflib
import os
from contextlib import suppress
from fractions import Fraction
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError

from sarmlib.errors import ConfigError, DataError

FOLDER = Path(__file__).parent / "profiles"
Variant = Literal["sarm", "token_sae", "random_encoder", "scalar_half", "scalar_full"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


def _number(value: Any) -> Any:
    """``3/64`` and ``4e-6``, which YAML reads as text, as numbers; true and false are none."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("is too large")
    if isinstance(value, str):
        with suppress(ValueError, ArithmeticError):  # pydantic says what is wrong
            return float(Fraction(value) if "/" in value else value)
    return value


class Loader(yaml.SafeLoader):
    """Plain YAML: aliases can blow up to any size, and of two equal keys one would be lost."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if len({str(key) for key in keys}) < len(keys):
            raise yaml.YAMLError(f"a setting is given twice among {', '.join(map(str, keys))}"[:300])
        return super().construct_mapping(node, deep)


def _distinct(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("must be distinct")
    return values


Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_number)]
Count = Annotated[Whole, Field(ge=1)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[NotNegative, Field(le=1)]
ProperShare = Annotated[NotNegative, Field(lt=1)]
_Frozen = BeforeValidator(lambda value: tuple(value.items()) if isinstance(value, dict) else value)
Parts = Annotated[tuple[tuple[str, Count], ...], _Frozen]
Reasons = Annotated[tuple[tuple[str, str], ...], _Frozen]


class Settings(BaseModel):
    """Base of all sections: frozen, hashable, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Backbone(Settings):
    """The pretrained decoder."""

    source: str = "meta-llama/Llama-3.1-8B-Instruct"  # toy, data, a path or a hub id; "Llama-3 models (3B and 8B)"
    revision: str | None = None  # commit on the hub; None = newest, which is not reproducible
    layer: Count | None = None  # l, from 1; None = half, "hidden states from the midpoint layer"
    trust_remote_code: StrictBool = False  # run Python code that comes with a checkpoint


class Corpus(Settings):
    """Text for SAE pretraining."""

    source: str = "segyges/OpenWebText2"  # toy, data, a path or a hub id; "sampled from OpenWebText2"
    revision: str | None = None
    documents: Count | None = None  # read at most; None = as many as the SAE needs
    window: Annotated[Whole, Field(ge=2)] = 1024  # tokens per row (not stated in the paper)
    batch_size: Count = 16  # windows per forward pass
    dialogue_share: ProperShare = 0.0  # share of training conversations; "each sentence in a general corpus"
    budget_gb: NotNegative = 8.0  # largest file of vectors, 10^9 bytes; above, the SAE trains on a stream


class Sae(Settings):
    """The TopK sparse autoencoder, equations 2-5, 7 and 8."""

    expansion: Count = 16  # M = expansion x d; "set to $16 \times$ the hidden size of the LLM"
    k_ratio: Annotated[Positive, Field(le=1)] = 3 / 64  # k = k_ratio x d; "fixed at $\frac{3}{64}$ of the hidden size"
    # "exclusively on activations from the final token of each sentence"
    positions: Literal["sentence_end", "official", "every", "last"] = "sentence_end"
    vectors: Count = 50_000_000  # "50M sequences (approximately 1B tokens)"
    steps: Count | None = None  # None = one pass over the vectors
    batch_size: Count = 4096  # vectors per step (not stated in the paper)
    lr: Positive = 5e-4  # "a learning rate of 5×10^{-4}"
    betas: tuple[ProperShare, ProperShare] = (0.9, 0.999)  # "$\beta_1 = 0.9$, $\beta_2 = 0.999$"
    renorm_every: Count = 10  # "unit-norm regularization to the decoder columns every 10 steps"
    auxk_coef: NotNegative = 0.0  # of a dead-feature loss; "trained to minimize the reconstruction error"
    dead_after: Count = 10_000_000  # vectors without activation after which a feature is dead
    encoder_bias: StrictBool = False  # inside TopK; the paper has b_pre alone
    relu: StrictBool = True  # "only if it is activated, i.e., $z_i > 0$"

    def n_features(self, d_model: int) -> int:
        """M for hidden size d."""
        return self.expansion * d_model

    def k(self, d_model: int) -> int:
        """k for hidden size d: k_ratio x d, rounded, at least 1."""
        return max(1, round(self.k_ratio * d_model))


class Preferences(Settings):
    """Preference pairs."""

    # toy, data, a file or folder, or a hub id; "exclusively on the Skywork-Reward-Preference-80K-v0.2 dataset"
    source: str = "Skywork/Skywork-Reward-Preference-80K-v0.2"
    revision: str | None = None
    train_pairs: Count | None = None  # None = all that are not held out
    eval_pairs: Count = 1000  # of those held out
    eval_fraction: Annotated[Positive, Field(lt=1)] = 0.1  # of the prompts; none is on both sides
    label_noise: Share = 0.0  # of the training pairs, labels swapped (toy world only)
    longest: Count | None = None  # pairs with a side of more tokens are left out (not in the toy world)
    max_length: Count = 4096  # tokens per conversation, as in the released code; the beginning is cut


class Reward(Settings):
    """Reward model training, equations 1 and 9."""

    lr: Positive = 4e-6  # of the backbone; "the learning rate to 4×10^{-6}"
    head_lr: Positive | None = None  # of the value head; None = lr
    epochs: Positive = 3.0  # "for 3 epochs"
    batch_size: Count = 512  # pairs per step; "We set the global batch size to 512"
    micro_batch_size: Count | None = None  # pairs per device and forward pass; None = batch_size
    warmup_ratio: Share = 0.0  # of the steps (not stated in the paper)
    weight_decay: NotNegative = 0.0  # AdamW's (not stated in the paper)
    scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
                       "inverse_sqrt"] = "cosine"  # a transformers name (not stated in the paper)
    gradient_checkpointing: StrictBool = False  # trade compute for memory


class Benchmarks(Settings):
    """RewardBench 2 (Tables 1 and 2, Figure 3) and RM-Bench (contexts and scores): toy, data, a file or a hub id."""

    rewardbench2: str = "allenai/reward-bench-2"  # "We use RewardBench 2 (Malik et al. 2025)"
    rewardbench2_revision: str | None = None
    rm_bench: str = "THU-KEG/RM-Bench"  # "the out-of-distribution preference dataset RM-Bench"
    rm_bench_revision: str | None = None
    items_per_subset: Count | Parts | None = None  # or per domain; {code: 60}: of this one; None = all
    max_length: Count = 2048  # tokens per conversation, as both official scorers


class Interpretation(Settings):
    """Labels for features (RQ1)."""

    features: Count = 40  # labelled: half with w > 0, half with w < 0
    permutations: Count = 1000  # of the labels, behind each p value
    top_keywords: Count = 8  # per label
    fdr: Share = 0.1  # false discovery rate at which a label counts as above chance
    # the paper: "sent to GPT-4o to generate human-readable interpretations"
    explainer: Literal["keywords", "llm"] = "keywords"


class Steering(Settings):
    """Scaling one weight of the value head (RQ2, Figure 3)."""

    factor: Number = 8.0  # the paper multiplies by a constant that it does not state
    doses: Annotated[tuple[Number, ...], Field(min_length=1)] = (
        -8.0, -2.0, 0.0, 0.5, 1.0, 2.0, 5.0, 8.0, 10.0, 20.0, 40.0, 80.0, 160.0)
    bootstrap: Count = 2000  # resamples behind each interval


class Profile(Settings):
    """All settings of one run."""

    name: Annotated[str, Field(pattern=r"^[^/\\.][^/\\]*$")]  # of the folder of results too: no separators
    description: str
    reasons: Reasons = ()  # setting -> why it is not the paper's; "all": of those without a reason of their own
    hardware: str  # what it needs, in words
    cost: str  # minutes, memory and download, and whether they were measured
    seed: Seed = 0  # of everything that is made once
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_distinct)] = (0, 1, 2)
    workers: Count = 1  # trainings side by side, each a process with one thread
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of products; weights train in float32
    data: str | None = None  # folder of the sources called data
    variants: Annotated[tuple[Variant, ...], AfterValidator(_distinct)] = VARIANTS
    backbone: Backbone = Backbone()
    corpus: Corpus = Corpus()
    sae: Sae = Sae()
    preferences: Preferences = Preferences()
    reward: Reward = Reward()
    benchmarks: Benchmarks = Benchmarks()
    interpretation: Interpretation = Interpretation()
    steering: Steering = Steering()

    def folder(self, kind: str) -> Path | None:
        """``DATA/<kind>``; None for a benchmark that is not there, DataError for anything else that is not."""
        found = Path(self.data or "", kind)
        if self.data and (found.is_dir() or kind in ("rewardbench2", "rm_bench")):
            return found if found.is_dir() else None
        raise DataError(f"the data folder {self.data} has no folder {kind}/; it needs backbone/ (a decoder with its "
                        "tokenizer), corpus/ (text), pairs/ (preference pairs), and rewardbench2/ or rm_bench/")

    def diff_from_paper(self) -> list[tuple[str, str, str, str]]:
        """``(setting, paper's value, value here, why)`` of each stated setting that this profile changes, and then of
        what the paper does not state."""
        values, why = ((name, attrgetter(name)(PAPER), attrgetter(name)(self)) for name in STATED), dict(self.reasons)
        changed = [(name, _shown(name, paper), _shown(name, here), why.get(name, why.get("all", "")))
                   for name, paper, here in values if here != paper and not {paper, here} <= set(DECODERS)]
        settings = [(name, _shown(name, attrgetter(name)(self))) for name in UNSTATED]
        return changed + [(name, "not stated", here, "") for name, here in (*settings, *IN_CODE)]


PAPER = Profile.model_construct(interpretation=Interpretation(explainer="llm"))
STATED = (
    "backbone.source", "backbone.layer", "corpus.source", "corpus.dialogue_share",
    *(f"sae.{name}" for name in ("vectors", "positions", "expansion", "k_ratio", "lr", "betas", "renorm_every",
                                 "auxk_coef", "encoder_bias", "relu")),
    "preferences.source", "preferences.train_pairs", "preferences.longest",
    "reward.epochs", "reward.batch_size", "reward.lr", "reward.head_lr",
    "benchmarks.rewardbench2", "benchmarks.rm_bench", "benchmarks.items_per_subset", "interpretation.explainer")
"""Settings that the paper states."""
UNSTATED = ("dtype", "corpus.window", "sae.batch_size", "sae.steps", "preferences.eval_fraction",
            "preferences.max_length", "reward.warmup_ratio", "reward.weight_decay", "reward.scheduler",
            "steering.factor")
IN_CODE = (("sae initialisation", "W_dec = W_enc^T, random unit columns; b_pre at the geometric median"),
           ("sae gradient", "its part along a decoder column is removed"),
           ("context of a sentence", "the text before it, up to the window"),
           ("benchmark prompts", "pairs that ask one, exactly or nearly, are dropped"),
           ("gradient clipping", "norm 1 in reward training"))
"""What it does not state: settings, and what is the same in every profile."""
DECODERS = ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "Schrieffer/Llama-SARM-4B")
NONE = {"backbone.layer": "half of them", "reward.head_lr": "as reward.lr", "preferences.longest": "any length",
        "sae.steps": "one pass over the vectors"}


def _shown(name: str, value: Any) -> str:
    """A value as a table shows it: 0.000004 and 50,000,000, and what None means."""
    if value == PAPER.backbone.source:
        return " or ".join(path.partition("/")[2] for path in DECODERS[:2])
    if value is None:
        return NONE.get(name, "all")
    if isinstance(value, tuple):
        return ", ".join(_shown(name, one) for one in value)
    if isinstance(value, float):
        return f"{value:.10f}".rstrip("0").rstrip(".")
    return str(value) if isinstance(value, (bool, str)) else f"{value:,}"


def profile_names() -> list[str]:
    """Names of the profiles that come with the library."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load_profile(name_or_path: str | Path = "toy", *, data: str | Path | None = None, **overrides: Any) -> Profile:
    """A profile by name or YAML path.  ``overrides`` are dotted paths: ``**{"sae.steps": 10}``.

    ``data``: the user's folder (default ``$SARMLIB_DATA``), needed when a source is called ``data``.
    Raises ConfigError for an unknown profile, an unknown key (with the closest known one) or a bad value.
    """
    raw = _read(name_or_path)
    for path, value in overrides.items():
        *parents, last = path.split(".")
        section = raw
        for part in parents:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[last] = value
    try:
        profile = Profile(**{str(key): value for key, value in raw.items()})
    except ValidationError as error:
        raise ConfigError("; ".join(map(_in_words, error.errors()))) from None
    sources = [part.source for part in (profile.backbone, profile.corpus, profile.preferences)]
    if "data" not in [*sources, profile.benchmarks.rewardbench2, profile.benchmarks.rm_bench]:
        if data:
            raise ConfigError(f"profile {profile.name!r} reads no data folder (got {str(data)!r}); use profile local")
        return profile
    data = data or profile.data or os.environ.get("SARMLIB_DATA")
    if not data:
        raise ConfigError(f"profile {profile.name!r} reads your own data: name its folder with "
                          f"`make reproduce PROFILE={profile.name} DATA=folder` or load_profile(..., data=folder)")
    if not Path(data).is_dir():
        raise ConfigError(f"data folder {str(data)!r} does not exist")
    return profile.model_copy(update={"data": str(Path(data).resolve())})


def _read(name_or_path: str | Path) -> dict:
    path, known = Path(name_or_path), profile_names()
    if path.suffix not in (".yaml", ".yml"):
        if str(path) not in known:
            raise ConfigError(f"unknown profile {str(path)!r}{_closest(str(path), known)}")
        path = FOLDER / f"{path}.yaml"
    try:
        return {"name": path.stem, **(yaml.load(path.read_text(encoding="utf-8"), Loader) or {})}
    except (OSError, ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"profile {path} cannot be read as a mapping of settings: {error}") from error


def _in_words(error: Any) -> str:
    """One of pydantic's errors as "sae.steps = 0: must be greater than or equal to 1"."""
    *parents, last = error["loc"]
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        section = Profile.model_fields[parents[0]].annotation if parents else Profile
        return f"unknown setting {where!r}{_closest(str(last), list(section.model_fields))}"
    if error["type"] == "missing":
        return f"setting {where!r} is missing"
    rule = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    try:
        return f"{where} = {error['input']!r:.200}: {rule}"
    except ValueError:  # thousands of digits
        return f"{where}: {rule}"


def _closest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
