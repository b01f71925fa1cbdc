"""What a profile will cost, before anything is downloaded: parameters, tokens, memory, disk and hours per stage.

Every number is arithmetic on shapes and on the profile (formulas in `plan`), not a measurement; hours assume a stated
share of the hardware's peak rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from .backbone import cut_config, n_layers
from .errors import ConfigError
from .profiles import Profile

LLAMA3 = {"vocab_size": 128256, "head_dim": 128, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": {**LLAMA3, "hidden_size": 4096, "intermediate_size": 14336,
                                         "num_hidden_layers": 32, "num_attention_heads": 32},
    "meta-llama/Llama-3.2-3B-Instruct": {**LLAMA3, "hidden_size": 3072, "intermediate_size": 8192,
                                         "num_hidden_layers": 28, "num_attention_heads": 24,
                                         "tie_word_embeddings": True},
}
"""Published shapes (config.json of each model on the hub, read 2026-11), so that a plan needs no network."""
SHAPES["Schrieffer/Llama-SARM-4B"] = {**SHAPES["meta-llama/Llama-3.1-8B-Instruct"], "num_hidden_layers": 16}


class Hardware(NamedTuple):
    """One accelerator: bf16 peak in TFLOP/s and memory in GB, as its maker states them."""

    tflops: float
    memory: float


HARDWARE = {"h100": Hardware(989, 80), "h200": Hardware(989, 141), "a100": Hardware(312, 80), "l4": Hardware(121, 24),
            "rtx4090": Hardware(165, 24), "t4": Hardware(65, 16)}
SHARE = 0.4
"""Share of the peak rate that the hours assume; to be replaced by your own measurement (`benchmarks/gpu.py`)."""
TOKENS_PER_VECTOR = 20
"""Paper: "50M sequences (approximately 1B tokens)"."""
PAIR_TOKENS, PAIRS, BENCHMARK_TEXTS, TEXT_TOKENS = 1200, 77_000, 1865 * 4 + 1327 * 6, 450
"""Assumed: tokens of both answers of a Skywork pair and its prompt; pairs; texts of both benchmarks; their length."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a SARM, by part (counted on the meta device: nothing is allocated)."""

    embeddings: int
    layers: int
    encoder: int
    head: int
    d: int
    n_features: int
    layer: int
    depth: int
    """Layers of the checkpoint; those above `layer` are downloaded and never read."""

    @property
    def total(self) -> int:
        """As the paper counts (Table 1): embeddings, lower layers, encoder, head; no language-model head, no W_dec."""
        return self.embeddings + self.layers + self.encoder + self.head


def sizes(profile: Profile) -> Sizes:
    """Count the profile's SARM from its backbone's config: published shapes first, else the folder or the hub."""
    import torch
    from transformers import AutoConfig, AutoModel, LlamaConfig

    from .backbone import _from_hub
    source = profile.backbone.source
    if source in ("toy", "data"):
        from .data.toyworld.pretrain import BACKBONE_DIR
        from .errors import DataError
        if source == "data":
            from .data.local import discover
            source = discover(profile.data, require=()).backbone
            if source is None:
                raise DataError(f"the folder {profile.data} holds no backbone; put one there")
        else:
            source = BACKBONE_DIR
    config = LlamaConfig(**SHAPES[source]) if source in SHAPES else _from_hub(
        AutoConfig, source, revision=profile.backbone.revision, trust_remote_code=False)
    cut = cut_config(config, profile.backbone.layer)
    with torch.device("meta"):
        model = AutoModel.from_config(cut)
    embeddings = model.get_input_embeddings().weight.numel()
    body = sum(weight.numel() for weight in model.parameters()) - embeddings
    d = cut.hidden_size
    m = profile.sae.n_features(d)
    return Sizes(embeddings, body, m * d, m, d, m, n_layers(cut), n_layers(config))


def plan(profile: Profile, hardware: str = "h100", devices: int = 1) -> pd.DataFrame:
    """One row per stage: tokens, PFLOP, memory_gb (per device), disk_gb, hours.

    With N parameters of the layers, E embeddings, M d encoder weights, t tokens and v vectors:
    extraction 2 N t; SAE 2 M d v (one dense product, the rest is sparse), 16 bytes for each of its 2 M d weights;
    reward training 6 N t (8 N t with gradient checkpointing), 16 bytes a trained weight (float32 master, gradient, two
    moments) shared by the devices, and the states of a micro-batch (2 bytes at each layer with checkpointing, 34
    without, for each of its pairs' tokens and d); scoring 2 N t.  Hours are a floor: memory traffic and waiting for
    data are not in them.  ConfigError for unknown hardware.
    """
    if hardware not in HARDWARE:
        raise ConfigError(f"hardware {hardware!r} is not known; choose {', '.join(HARDWARE)}")
    if devices < 1:
        raise ConfigError(f"{devices} devices: at least 1 is needed")
    one, spec = sizes(profile), HARDWARE[hardware]
    half = 2e-9 if profile.dtype != "float32" else 4e-9
    weights, trained = (one.total + one.n_features * one.d) * half, (one.embeddings + one.layers) * 16e-9
    rows: list[dict] = []

    def stage(name: str, tokens: float, flop: float, memory: float, disk: float) -> None:
        rows.append({"stage": name, "tokens": tokens, "pflop": flop / 1e15, "memory_gb": memory, "disk_gb": disk,
                     "hours": flop / (spec.tflops * 1e12 * SHARE * devices) / 3600})

    stage("download", math.nan, 0, 0, (one.embeddings + one.layers * one.depth / one.layer) * 2e-9)
    times = len(profile.seeds)
    if profile.backbone.source != "Schrieffer/Llama-SARM-4B":
        kinds = 1 + ("token_sae" in profile.variants)
        vectors = profile.sae.vectors
        tokens = vectors * TOKENS_PER_VECTOR
        batch = profile.corpus.batch_size * profile.corpus.window
        stage("activations", tokens * kinds, 2 * one.layers * tokens * kinds,
              (one.embeddings + one.layers) * half + batch * one.d * 40e-9, vectors * one.d * 4e-9 * kinds)
        steps = profile.sae.steps
        seen = vectors if steps is None else steps * profile.sae.batch_size
        m = one.n_features
        stage("SAE", math.nan, 2 * one.d * m * seen * kinds * times, 2 * m * one.d * 16e-9 +
              profile.sae.batch_size * m * 4e-9, 2 * m * one.d * 4e-9 * kinds * times)
        models = len(profile.variants) * times
        pairs = profile.preferences.train_pairs or PAIRS
        tokens = pairs * PAIR_TOKENS * profile.reward.epochs * models
        work = 8 if profile.reward.gradient_checkpointing else 6
        micro = profile.reward.micro_batch_size or profile.reward.batch_size
        wide = (2 * one.layer + 34) if profile.reward.gradient_checkpointing else 34 * one.layer
        states = 2 * micro * profile.preferences.max_length * one.d * wide * 1e-9
        stage("reward models", tokens, work * one.layers * tokens, trained / devices + weights + states,
              weights * models)
    else:
        models = 1
    tokens = BENCHMARK_TEXTS * TEXT_TOKENS * models
    stage("scores", tokens, 2 * one.layers * tokens, weights + profile.benchmarks.batch_tokens * one.d * 40e-9, 0.2)
    return pd.DataFrame(rows)


def lines(profile: Profile, hardware: str = "h100", devices: int = 1) -> str:
    """`plan` as text, with what does not fit said in words."""
    one, table, spec = sizes(profile), plan(profile, hardware, devices), HARDWARE[hardware]
    total = {"stage": "together", "tokens": table.tokens.sum(), "pflop": table.pflop.sum(),
             "memory_gb": table.memory_gb.max(), "disk_gb": table.disk_gb.sum(), "hours": table.hours.sum()}
    shown = pd.concat([table, pd.DataFrame([total])], ignore_index=True)
    shown["tokens"] = [("" if value != value else f"{value:.3g}") for value in shown.tokens]
    tight = table[table.memory_gb > spec.memory]
    notes = [f"{row.stage} needs about {row.memory_gb:.0f} GB on each device, {hardware} has {spec.memory:.0f}: use "
             "more devices (FSDP or DeepSpeed, see sarmlib/profiles/accelerate)" for row in tight.itertuples()]
    return "\n".join([
        f"profile {profile.name}: {one.total / 1e9:.2f} B parameters (layers {one.layers / 1e9:.2f}, embeddings "
        f"{one.embeddings / 1e9:.2f}, encoder {one.encoder / 1e9:.2f}), d {one.d}, M {one.n_features}, layer "
        f"{one.layer} of {one.depth}",
        f"on {devices} x {hardware} at {SHARE:.0%} of {spec.tflops:.0f} TFLOP/s (an assumption); nothing was started",
        shown.to_string(index=False, float_format=lambda value: f"{value:,.2f}"), *notes])
