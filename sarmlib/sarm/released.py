"""The authors' checkpoints: read an official SARM directory, and write one.

It is a Llama checkpoint (``model.*``, ``sae.*``, ``score.weight``) whose config lacks layer l, k, M and the
TopK switch.  They come from arguments, else ``sarm_param`` in config.json, else the directory name
(``..._Latent65536_Layer16_K192_..._TopK``).
"""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from sarmlib.backbone import cut_config
from sarmlib.errors import ConfigError, ModelError
from sarmlib.hub import hub_folder
from sarmlib.sae.topk import readable
from sarmlib.sarm.model import SarmConfig, SarmForSequenceClassification
from sarmlib.store import write_atomic

# official tensor name -> ours; the decoder is transposed (official [d, M], ours [M, d])
SAE_NAMES = {"sae.pre_bias": "sae.b_pre", "sae.latent_bias": "sae.b_enc", "sae.encoder.weight": "sae.W_enc",
             "sae.decoder.weight": "sae.W_dec"}
# our setting -> its name in ``sarm_param``
PARAMS = {"layer": "sae_source_layer", "k": "sae_k", "n_features": "sae_latent_size",
          "top_k": "sarm_use_activation"}
UNUSED = ("model.norm.weight", "lm_head.weight")  # in official files, never used by the model


def official_settings(path: str | os.PathLike, **given: int | bool | None) -> dict:
    """``{"layer", "k", "top_k", "n_features", "source"}`` of an official directory; ``source``: where from.

    `given` are the first three.  "woTopK" in a name means no TopK (the released evaluation code reads it as
    TopK).  Raises `ConfigError` naming what is missing or contradicted by an argument.
    """
    path, found, source = Path(path), {"n_features": None}, {}
    params = _read_json(path / "config.json").get("sarm_param") or {}
    stored = {key: params.get(name) for key, name in PARAMS.items()}
    stored["top_k"] = params.get("sarm_use_topk", stored["top_k"])
    if wrong := {key: value for key, value in stored.items() if value is not None
                 and type(value) is not (bool if key == "top_k" else int)}:
        raise ConfigError(f"sarm_param in config.json of {str(path)!r} holds settings of another type: {wrong}")
    named = _settings_in_name(path.resolve().name)
    for place, settings in {"directory name": named, "config.json": stored, "argument": given}.items():
        for key, value in settings.items():
            if value is None:
                continue
            if place == "argument" and key != "top_k" and found.get(key, value) != value:
                raise ConfigError(f"{key}={value} was passed, but the {source[key]} of {str(path)!r} says "
                                  f"{found[key]}: the weights were trained with that. Leave the argument out")
            found[key], source[key] = value, place
    if missing := [key for key in ("layer", "k", "top_k") if key not in found]:
        raise ConfigError(f"{', '.join(missing)} of {str(path)!r} cannot be found: there is no sarm_param in "
                          "config.json, and the name is not ..._Latent<M>_Layer<l>_K<k>_..._TopK; pass them")
    return {**found, "top_k": bool(found["top_k"]), "source": source}


def load_released(path: str | os.PathLike, layer: int | None = None, k: int | None = None,
                  top_k: bool | None = None, *, dtype: torch.dtype | None = None
                  ) -> SarmForSequenceClassification:
    """Load an official SARM directory as a `SarmForSequenceClassification` that computes the same numbers.

    The encoder has a bias and signed values (no ReLU).  `dtype` None keeps the file's.  No code in the
    directory is run.  Raises as `official_settings`, and `ModelError` for missing or unexpected weights.
    """
    path = Path(hub_folder(path)).expanduser()
    if not path.is_dir():
        raise ModelError(f"official checkpoint {str(path)!r} is not a local folder; download it first")
    settings = official_settings(path, layer=layer, k=k, top_k=top_k)
    written = {"model_type": "llama"} | _read_json(path / "config.json")
    for name in ("architectures", "auto_map", "sarm_param"):
        written.pop(name, None)
    with readable(path / "config.json", "config of a backbone"):
        backbone = AutoConfig.for_model(**written)
    backbone = cut_config(backbone, settings["layer"])
    state = _read_weights(path, settings["layer"])
    n_features = settings["n_features"] or len(state.get("sae.W_enc", ())) or None
    config = SarmConfig(backbone, n_features=n_features, k=settings["k"], encoder_bias=True, relu=False,
                        topk=settings["top_k"], released_from=path.resolve().name)
    dtype = dtype or state.get("score.weight", next(iter(state.values()))).dtype
    load = SarmForSequenceClassification.from_pretrained
    return load(None, config=config, state_dict=state, dtype=dtype).eval()


def save_official(model: SarmForSequenceClassification, folder: str | os.PathLike) -> Path:
    """Write a SARM over a Llama in the authors' layout; ModelError for another family, no normalisation, or JumpReLU.

    Their encoder has a bias and no ReLU: rewards are the same wherever the k-th activation is positive.
    """
    folder, config = Path(folder), model.config.backbone_config
    if config.model_type != "llama" or not model.config.normalize or model.config.k is None:
        raise ModelError(f"the official layout holds Llama backbones with a normalising TopK SAE; this one is "
                         f"{config.model_type!r}, normalize={model.config.normalize}, k={model.config.k}")
    theirs = {new: old for old, new in SAE_NAMES.items()}
    state = {theirs.get(name, name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    state["sae.decoder.weight"] = state["sae.decoder.weight"].T.contiguous()
    like = state["score.weight"]
    state.setdefault("sae.latent_bias", like.new_zeros(model.config.n_features))
    state["model.norm.weight"] = like.new_ones(config.hidden_size)
    params = {name: getattr(model.config, key.replace("top_k", "topk")) for key, name in PARAMS.items()}
    settings = {**config.to_dict(), "architectures": ["LlamaSARM"], "sarm_param": params}
    write_atomic(folder / "model.safetensors", lambda path: save_file(state, path, {"format": "pt"}))
    write_atomic(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    return folder


def _settings_in_name(name: str) -> dict:
    words = {"layer": r"_?Layer", "k": r"_K", "n_features": r"_?Latent"}
    found = {key: re.search(rf"{word}(\d+)(?:[_.\-]|$)", name) for key, word in words.items()}
    settings: dict = {key: int(match[1]) for key, match in found.items() if match}
    if re.search("topk", name, re.IGNORECASE):
        settings["top_k"] = not re.search(r"(wo|without|no)[_-]?topk", name, re.IGNORECASE)
    return settings


def _read_weights(path: Path, layer: int) -> dict[str, torch.Tensor]:
    """Tensors of a sharded or single safetensors checkpoint under our names; layers above l are not read."""
    index = path / "model.safetensors.index.json"
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    state = {}
    for file in files:
        if Path(str(file)).name != file:
            raise ModelError(f"{str(index)!r} names {file!r}, which is no file of its folder")
        with readable(path / file, "safetensors file"), safe_open(path / file, framework="pt") as shard:
            for name in shard.keys():
                number = re.match(r"model\.layers\.(\d+)\.", name)
                if name not in UNUSED and not (number and int(number[1]) >= layer):
                    state[SAE_NAMES.get(name, name)] = shard.get_tensor(name)
    if "sae.W_dec" in state:
        state["sae.W_dec"] = state["sae.W_dec"].T.contiguous()
    return state


def _read_json(path: Path) -> dict:
    with readable(path, "JSON object"):
        return dict(json.loads(path.read_text(encoding="utf-8")))
