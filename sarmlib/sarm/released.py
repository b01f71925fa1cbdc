"""The authors' checkpoints: read an official SARM directory, and the official merge of a base model and an SAE file.

An official directory is a Llama checkpoint (``model.*``, ``sae.*``, ``score.weight``) whose config stores none of the
layer l, the number of features M, k or the TopK switch.  They are taken from arguments, else from a ``sarm_param`` dict
in config.json, else from the directory name (``..._Latent65536_Layer16_K192_..._TopK``).
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from ..backbone import cut_config, load_tokenizer, n_layers
from ..errors import ConfigError, ModelError
from ..evaluation.evaluate import Scorer, hub_folder, load_scorer, prepared
from ..sae.formats import load_official
from ..sae.model import write_atomic
from .model import SarmConfig, SarmForSequenceClassification

SAE_NAMES = {"sae.pre_bias": "sae.b_pre", "sae.latent_bias": "sae.b_enc", "sae.encoder.weight": "sae.W_enc",
             "sae.decoder.weight": "sae.W_dec"}
"""Official tensor name -> ours; the decoder is transposed (official [d, M], ours [M, d])."""
UNUSED = ("model.norm.weight", "lm_head.weight")
"""In official files but never used by the model: read and dropped."""


def official_settings(path, *, layer: int | None = None, k: int | None = None, top_k: bool | None = None) -> dict:
    """``{"layer", "k", "top_k", "n_features", "source"}`` of an official directory; ``source`` says where each is from.

    "woTopK" in a name means no TopK (the released evaluation code reads it as TopK, because it looks for the substring
    "TopK").  Raises `ConfigError` naming what cannot be found, and when an argument contradicts what is stored.
    """
    path = Path(path)
    name = path.resolve().name
    config = _read_json(path / "config.json")
    stored = {"layer": _in_name(name, r"_?Layer(\d+)"), "k": _in_name(name, r"_K(\d+)"),
              "n_features": _in_name(name, r"_?Latent(\d+)"), "top_k": _top_k_in_name(name)}
    source = {key: "directory name" for key, value in stored.items() if value is not None}
    param = config.get("sarm_param") or {}
    if not isinstance(param, dict):
        raise ConfigError(f"sarm_param in config.json of {str(path)!r} is {param!r}; an object is needed")
    keys = {"layer": "sae_source_layer", "k": "sae_k", "n_features": "sae_latent_size", "top_k": "sarm_use_activation"}
    for key, official in {**keys, "top_k_old": "sarm_use_topk"}.items():
        if param.get(official) is not None:
            stored[key.removesuffix("_old")] = param[official]
            source[key.removesuffix("_old")] = "config.json"
    for key, value in (("layer", layer), ("k", k), ("top_k", top_k)):
        if value is None:
            continue
        if key != "top_k" and stored[key] is not None and stored[key] != value:
            raise ConfigError(f"{key}={value} was passed, but the {source[key]} of {str(path)!r} says {stored[key]}, "
                              "with which the weights were trained. Leave the argument out")
        stored[key], source[key] = value, "argument"
    missing = [key for key in ("layer", "k", "top_k") if stored[key] is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} of {str(path)!r} cannot be found: config.json has no sarm_param, and "
                          "the directory name does not say (pattern ..._Latent<M>_Layer<l>_K<k>_..._TopK). Pass "
                          + ", ".join(f"{key}=" for key in missing))
    for key in ("layer", "k", "n_features"):
        if stored[key] is not None and (type(stored[key]) is not int or stored[key] < 1):
            raise ConfigError(f"{key} = {stored[key]!r} ({source[key]} of {str(path)!r}): a whole number is needed")
    return {**stored, "top_k": bool(stored["top_k"]), "source": source}


def load_released(path, layer: int | None = None, k: int | None = None, top_k: bool | None = None, *,
                  dtype: torch.dtype | None = None) -> SarmForSequenceClassification:
    """Load an official SARM directory as a `SarmForSequenceClassification` that computes the same numbers.

    The encoder has a bias, its values stay signed (no ReLU), the final norm is not applied, and with ``top_k=False``
    all M activations are scored.  `dtype` None keeps the file's.  Official Python code in the directory is not run.
    Raises `ConfigError` for settings that are missing or contradict each other and `ModelError` for missing or
    unexpected weights.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelError(f"official checkpoint {str(path)!r} is not a local folder; download it first, for example "
                         "Schrieffer/Llama-SARM-4B from the hub with huggingface_hub.snapshot_download")
    settings = official_settings(path, layer=layer, k=k, top_k=top_k)
    declared = _read_json(path / "config.json")
    family = {key: value for key, value in declared.items() if key not in ("architectures", "auto_map", "sarm_param")}
    try:
        backbone = AutoConfig.for_model(family.pop("model_type", "llama"), **family)
    except Exception as error:  # transformers' own validation, which has many classes
        raise ModelError(f"config.json of {str(path)!r} is not a backbone's: {error}") from error
    if settings["layer"] > n_layers(backbone):
        raise ConfigError(f"layer={settings['layer']} but config.json of {str(path)!r} has {n_layers(backbone)} layers")
    backbone = cut_config(backbone, settings["layer"])
    state = _read_weights(path, settings["layer"])
    width = state["sae.W_enc"].shape[0] if "sae.W_enc" in state else None
    if settings["n_features"] is not None and width is not None and settings["n_features"] != width:
        raise ConfigError(f"the {settings['source']['n_features']} of {str(path)!r} says {settings['n_features']} "
                          f"features, the encoder has {width}")
    config = SarmConfig(backbone, n_features=width or settings["n_features"], k=settings["k"], encoder_bias=True,
                        relu=False, topk=settings["top_k"], released_from=path.resolve().name,
                        pad_token_id=declared.get("pad_token_id"))
    dtype = dtype or state.get("score.weight", next(iter(state.values()))).dtype
    return SarmForSequenceClassification.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()


def load_any(source, *, revision: str | None = None, trust_remote_code: bool = False, dtype: str = "auto",
             device: str = "cpu") -> Scorer:
    """Any reward model as a `Scorer`: SARM, scalar, the authors' layout (without running their code), any classifier.

    Errors as of `load_scorer`; SARM loads by its registered class.
    """
    folder = Path(hub_folder(source)).expanduser()
    if (folder / "config.json").is_file() and "LlamaSARM" in (_read_json(folder / "config.json").get("architectures")
                                                              or ()):
        model = load_released(folder, dtype=None if dtype == "auto" else getattr(torch, dtype))
        return prepared(model.to(device), load_tokenizer(folder), folder)
    return load_scorer(source, revision=revision, trust_remote_code=trust_remote_code, dtype=dtype, device=device)


def merge_official(base, sae_file, *, layer: int | None = None, k: int | None = None, top_k: bool = True,
                   dtype: torch.dtype = torch.float32) -> SarmForSequenceClassification:
    """The official merge: first l layers of a base model, an official SAE ``.pt`` file, and a zero head.

    `layer` and `k` default to those in the file's name (``sae_..._Latent65536_Layer16_K192_....pt``).  The official
    script casts the SAE to bfloat16; here it takes `dtype`.
    """
    layer = layer if layer is not None else _in_name(Path(sae_file).name, r"_?Layer(\d+)")
    if layer is None:
        raise ConfigError(f"the name {Path(sae_file).name!r} has no '_Layer<number>_'; pass layer=")
    return SarmForSequenceClassification.from_backbone_and_sae(base, load_official(sae_file, k), layer, topk=top_k,
                                                               dtype=dtype)


def save_official(model: SarmForSequenceClassification, folder) -> Path:
    """Write a SARM over a Llama as the authors' directories are: their tensor names, settings in ``sarm_param``.

    Their encoder has a bias and keeps the sign of its k largest values; rewards are the same wherever the k-th is
    positive, which `load_released` of the result shows.  Raises ModelError for another family or an affine-free SAE.
    """
    config = model.config.backbone_config
    if config.model_type != "llama" or not model.sae.settings()["normalize"]:
        raise ModelError(f"the official layout holds Llama backbones with a normalising SAE; this one is "
                         f"{config.model_type!r}, {model.sae.settings()}")
    ours = {new: old for old, new in SAE_NAMES.items()}
    state = {ours.get(name, name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    state["sae.decoder.weight"] = state["sae.decoder.weight"].T.contiguous()
    state.setdefault("sae.latent_bias", torch.zeros(model.config.n_features, dtype=state["score.weight"].dtype))
    state["model.norm.weight"] = torch.ones(config.hidden_size, dtype=state["score.weight"].dtype)
    settings = {**config.to_dict(), "architectures": ["LlamaSARM"], "sarm_param": {
        "sae_source_layer": model.config.layer, "sae_k": model.config.k, "sae_latent_size": model.config.n_features,
        "sarm_use_activation": model.config.topk}}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "model.safetensors", lambda path: save_file(state, path, {"format": "pt"}))
    write_atomic(folder / "config.json", lambda path: path.write_text(json.dumps(settings, indent=2) + "\n"))
    return folder


def save_tokenizer(tokenizer, folder) -> Path:
    """Write a tokenizer so that transformers 4 (which RewardBench pins) loads it too: the old names of its class and of
    its further special tokens."""
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = _read_json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    write_atomic(path, lambda target: target.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n"))
    return folder


def _read_weights(path: Path, layer: int) -> dict[str, torch.Tensor]:
    """All tensors of a sharded or single safetensors checkpoint under our names; unused ones are not read."""
    index = path / "model.safetensors.index.json"
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    state, above = {}, re.compile(r"model\.layers\.(\d+)\.")
    with ExitStack() as stack:
        for file in files:
            try:
                shard = stack.enter_context(safe_open(path / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"cannot read {str(path / file)!r}: {error}") from error
            for name in shard.keys():
                number = above.match(name)
                if name in UNUSED or (number and int(number[1]) >= layer):
                    continue
                tensor = shard.get_tensor(name)
                state[SAE_NAMES.get(name, name)] = tensor.T.contiguous() if name == "sae.decoder.weight" else tensor
    return state


def _in_name(name: str, pattern: str) -> int | None:
    found = re.search(pattern + r"(?:[_.\-]|$)", name)
    return int(found[1]) if found else None


def _top_k_in_name(name: str) -> bool | None:
    if re.search(r"(wo|without|no)[_-]?topk", name, re.IGNORECASE):
        return False
    return True if re.search(r"topk", name, re.IGNORECASE) else None


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{str(path)!r} holds a {type(found).__name__}; an object is needed")
    return found
