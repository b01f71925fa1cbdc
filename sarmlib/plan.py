"""What a profile will cost, before anything is downloaded: arithmetic on shapes, not a measurement."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sarmlib.data.toyworld import BACKBONE_DIR
from sarmlib.errors import ConfigError
from sarmlib.hub import from_hub
from sarmlib.profiles import Profile
from sarmlib.store import ROOT

LLAMA_8B = {"vocab_size": 128256, "head_dim": 128, "num_key_value_heads": 8, "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3B = {**LLAMA_8B, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
            "num_attention_heads": 24, "tie_word_embeddings": True}
QWEN = {"vocab_size": 151936, "head_dim": 64, "num_key_value_heads": 2, "hidden_size": 896, "qkv_biases": 18 * 64,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "tie_word_embeddings": True}
SHAPES = {"meta-llama/Llama-3.2-3B-Instruct": LLAMA_3B, "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
          "Schrieffer/Llama-SARM-4B": {**LLAMA_8B, "num_hidden_layers": 16}, "Qwen/Qwen2.5-0.5B-Instruct": QWEN}
"""Published shapes (config.json of each model on the hub), so that a plan needs no network."""
HARDWARE = {"h100": (989, 80), "h200": (989, 141), "a100": (312, 80), "l4": (121, 24), "rtx4090": (165, 24),
            "t4": (65, 16)}
"""bf16 peak in TFLOP/s and memory in GB, as the maker states them."""
SHARE = 0.4  # of the peak rate, which the hours assume (``benchmarks/gpu.py`` measures it)
VECTOR_TOKENS = 20  # "50M sequences (approximately 1B tokens)"
PAIRS, PAIR_TOKENS = 77_000, 1200  # assumed of Skywork: pairs, and tokens of a pair's two conversations
BENCHMARK_TOKENS = (1865 * 4 + 1327 * 6) * 450  # texts of both benchmarks, and an assumed length
BATCH_TOKENS = 32_768  # padded tokens of a forward pass that scores
BUFFER = 65_536  # vectors that SAE training mixes when they come as a stream


class Sizes(NamedTuple):
    """Parameters of a SARM by part, without W_dec and the language-model head, as Table 1 counts; and its shape."""

    embeddings: int
    layers: int
    encoder: int
    d: int
    n_features: int
    layer: int
    depth: int  # layers of the checkpoint; those above ``layer`` are downloaded and never read

    @property
    def total(self) -> int:
        return self.embeddings + self.layers + self.encoder + self.n_features


def backbone_path(profile: Profile) -> str:
    """Folder, GGUF file or hub id of a profile's decoder; ConfigError for one below models/ that is not made."""
    source = profile.backbone.source
    if source == "toy":
        return str(BACKBONE_DIR)
    if source == "data":
        return str(profile.folder("backbone"))
    if source.startswith("models/") and not Path(source).exists():
        if not (ROOT / source).exists():
            raise ConfigError(f"backbone.source {source!r} is not there; make it with `make "
                              f"{Path(source).name}`, or name a folder or hub id of your own")
        return str(ROOT / source)
    return source


def sizes(profile: Profile) -> Sizes:
    """Count the profile's SARM: a known Llama by its shape, another decoder by building it without memory."""
    source, layer = backbone_path(profile), profile.backbone.layer
    toy = {str(BACKBONE_DIR): json.loads((BACKBONE_DIR / "config.json").read_text())}
    known = (SHAPES | toy).get(source)
    if known and (layer or 1) <= known["num_hidden_layers"]:
        d, depth = known["hidden_size"], known["num_hidden_layers"]
        layer = layer or depth // 2
        heads = 2 * known["head_dim"] * (known["num_attention_heads"] + known["num_key_value_heads"])
        embeddings = known["vocab_size"] * d
        each = d * (heads + 3 * known["intermediate_size"] + 2) + known.get("qkv_biases", 0)  # 2: the norms
        layers = layer * each + d
    else:
        embeddings, layers, d, layer, depth = _built(source, layer, profile.backbone.revision)
    m = profile.sae.n_features(d)
    return Sizes(embeddings, layers, m * d, d, m, layer, depth)


def _built(source: str, layer: int | None, revision: str | None) -> tuple[int, int, int, int, int]:
    """(Parameters of the embeddings and of the layers, d, layer, depth); the imports cost seconds."""
    import torch
    from transformers import AutoConfig, AutoModel, LlamaConfig

    from sarmlib.backbone import cut_config, n_layers
    config = LlamaConfig(**SHAPES[source]) if source in SHAPES else from_hub(AutoConfig, source, revision=revision)
    cut = cut_config(config, layer)
    with torch.device("meta"):
        model = AutoModel.from_config(cut)
    embeddings = model.get_input_embeddings().weight.numel()
    return embeddings, model.num_parameters() - embeddings, cut.hidden_size, n_layers(cut), n_layers(config)


def plan(profile: Profile, hardware: str = "h100", devices: int = 1) -> pd.DataFrame:
    """One row per stage: tokens, hours, device_gb (each), host_gb (all processes of one machine), disk_gb.

    With N weights of the layers, t tokens and v vectors: 2 N t FLOP to read, 6 N t to train (8 N t with gradient
    checkpointing), 2 M d v for an SAE (one dense product, the rest is sparse); hours are a floor.  A trained weight
    takes 16 bytes (float32 weight, gradient, two moments).  Raises ConfigError for unknown hardware.
    """
    if hardware not in HARDWARE or devices < 1:
        raise ConfigError(f"{devices} x {hardware!r} is not known; choose 1 or more of {', '.join(HARDWARE)}")
    one, half = sizes(profile), 4e-9 if profile.dtype == "float32" else 2e-9
    download = (one.embeddings + one.layers * one.depth / one.layer) * 2e-9
    stages: list[tuple] = [("download", math.nan, 0, 0, 0, download)]
    if kinds := len({"sarm", "token_sae"} & set(profile.variants)):
        stages += _sae_stages(profile, one, kinds, devices, half)
    models = len(profile.variants) * len(profile.seeds)
    if models:
        stages.append(_reward_stage(profile, one, models, devices, half))
    weights, tokens = (one.total + one.encoder) * half, BENCHMARK_TOKENS * max(1, models)
    memory = weights + BATCH_TOKENS * one.d * 40e-9
    stages.append(("scores", tokens, 2 * one.layers * tokens, memory, weights, 0.2))
    table = pd.DataFrame(stages, columns=["stage", "tokens", "hours", "device_gb", "host_gb", "disk_gb"])
    table["hours"] /= HARDWARE[hardware][0] * 1e12 * SHARE * devices * 3600  # were FLOP
    return table


def _sae_stages(profile: Profile, one: Sizes, kinds: int, devices: int, half: float) -> list[tuple]:
    """(stage, tokens, FLOP, device GB, host GB, disk GB) of activations and SAEs."""
    sae, times, backbone = profile.sae, len(profile.seeds), (one.embeddings + one.layers) * half
    file, tokens = sae.vectors * one.d * 4e-9, sae.vectors * VECTOR_TOKENS * kinds
    extraction = backbone + profile.corpus.batch_size * profile.corpus.window * one.d * 40e-9
    memory = 2 * one.encoder * 16e-9 + sae.batch_size * one.n_features * 4e-9
    work = 2 * one.encoder * (sae.steps * sae.batch_size if sae.steps else sae.vectors) * kinds * times
    disk, buffers = 2 * one.encoder * 4e-9 * kinds * times, devices * BUFFER * one.d * 1e-8
    if file <= profile.corpus.budget_gb:
        return [("activations", tokens, 2 * one.layers * tokens, extraction, devices * backbone, file * kinds),
                ("SAE", math.nan, work, memory, buffers, disk)]
    tokens *= times  # the SAE reads the states as they are computed, once for each seed
    return [("SAE", tokens, work + 2 * one.layers * tokens, memory + extraction, buffers + devices * backbone, disk)]


def _reward_stage(profile: Profile, one: Sizes, models: int, devices: int, half: float) -> tuple:
    """(stage, tokens, FLOP, device GB, host GB, disk GB) of the reward models."""
    reward, pairs, again = profile.reward, profile.preferences, profile.reward.gradient_checkpointing
    tokens = (pairs.train_pairs or PAIRS) * PAIR_TOKENS * reward.epochs * models
    wide = (2 * one.layer + 34) if again else 34 * one.layer  # bytes per token and unit of d
    states = 2 * (reward.micro_batch_size or reward.batch_size) * pairs.max_length * one.d * wide * 1e-9
    trained = (one.embeddings + one.layers) * (16e-9 / devices + half)  # autocast keeps a copy in half precision
    weights = (one.total + one.encoder) * 4e-9
    return ("reward models", tokens, (8 if again else 6) * one.layers * tokens,
            trained + 2 * one.encoder * 4e-9 + states, devices * weights, weights * models)


def lines(profile: Profile, hardware: str = "h100", devices: int = 1) -> str:
    """`plan` as text, with what does not fit said in words, and the commands."""
    one, table = sizes(profile), plan(profile, hardware, devices)
    tflops, memory = HARDWARE[hardware]
    tokens = {"tokens": lambda count: "" if math.isnan(count) else f"{count:.3g}"}
    return "\n".join([
        f"profile {profile.name}: {one.total / 1e9:.2f} B parameters, d {one.d}, M {one.n_features}, layer "
        f"{one.layer} of {one.depth}",
        f"on {devices} x {hardware} at {SHARE:.0%} of {tflops} TFLOP/s (an assumption); nothing was started",
        table.to_string(index=False, float_format="{:,.2f}".format, formatters=tokens),
        f"together {table.hours.sum():,.2f} hours and {table.disk_gb.sum():,.2f} GB of disk",
        *(f"{row.stage} needs about {row.device_gb:.0f} GB on each device, {hardware} has {memory}: use more"
          for row in table.itertuples() if row.device_gb > memory),
        *_commands(profile, devices, large=(one.embeddings + one.layers) * 16e-9 > memory / 2)])


def _commands(profile: Profile, devices: int, large: bool) -> list[str]:
    """The commands that make the profile's stages on one machine; ``large``: one device cannot train the weights."""
    last = f"python -m sarmlib reproduce --profile {profile.name}"
    if devices == 1 or not profile.variants:
        return [last]
    launch = f"accelerate launch --num_processes {devices} --config_file examples/accelerate"
    tail, variant = f"--profile {profile.name} --seed {profile.seeds[0]}", profile.variants[0]
    return [f"{launch}/ddp.yaml -m sarmlib run sae {tail}",
            f"{launch}/{'fsdp' if large else 'ddp'}.yaml -m sarmlib run reward {tail} --variant {variant}",
            f"{last}   (what is left, and the notebooks)"]
