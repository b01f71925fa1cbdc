"""Other libraries' SAE files: the official SARM ``.pt`` (exact both ways), SAELens folders, and sparsify folders."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarmlib.errors import ConfigError, ModelError
from sarmlib.sae.model import TopKSAE, write_atomic

SAELENS_VERSION = "6.54.12"  # of the format written here; SAELens treats files without a version >= 6 as legacy


def from_tensors(
    W_enc: Tensor, W_dec: Tensor, b_pre: Tensor, b_enc: Tensor | None, k: int, *, relu: bool, normalize: bool
) -> TopKSAE:
    """A TopKSAE around given weights: W_enc, W_dec [M,d], b_pre [d], b_enc [M] or None; ModelError if they disagree."""
    if W_enc.ndim != 2 or W_dec.shape != W_enc.shape or b_pre.shape != W_enc.shape[1:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (W_enc, W_dec, b_pre))
        raise ModelError(f"SAE shapes disagree: W_enc, W_dec, b_pre = {shapes}; expected [M,d], [M,d], [d]")
    if b_enc is not None and b_enc.shape != W_enc.shape[:1]:
        raise ModelError(f"b_enc has shape {tuple(b_enc.shape)}, expected [{W_enc.shape[0]}]")
    with torch.device("meta"):
        sae = TopKSAE(
            W_enc.shape[1], W_enc.shape[0], k, encoder_bias=b_enc is not None, relu=relu, normalize=normalize
        )
    state = {"W_enc": W_enc, "W_dec": W_dec, "b_pre": b_pre} | ({} if b_enc is None else {"b_enc": b_enc})
    sae.load_state_dict({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, assign=True)
    return sae.requires_grad_(True)


def load_official(path: str | os.PathLike, k: int | None = None) -> TopKSAE:
    """The released code's SAE file: a ``torch.save``d dict pre_bias, latent_bias, encoder.weight, decoder.weight.

    k is not stored in the file; None reads it from a name such as ``..._Latent65536_Layer16_K192_....pt``.  The result
    is signed (``relu=False``), biased and normalising, as the released code computes.  Loaded with weights_only=True.
    """
    path = Path(path)
    if k is None:
        found = re.search(r"_K(\d+)(?:[_.]|$)", path.name)
        if not found:
            raise ConfigError(f"k is not stored in {path.name!r} and its name holds no '_K<number>_'; pass k")
        k = int(found[1])
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler answers damaged bytes with errors of every kind
        raise ModelError(f"{str(path)!r} is not a readable torch file of plain tensors: {error}") from error
    W_enc, W_dec, b_pre, b_enc = _take(path, state, "encoder.weight", "decoder.weight", "pre_bias", "latent_bias")
    return from_tensors(W_enc, W_dec.T, b_pre, b_enc, k, relu=False, normalize=True)


def save_official(sae: TopKSAE, path: str | os.PathLike) -> Path:
    """Write the released code's file; a missing b_enc becomes zeros.  k is not stored: keep it in the file name."""
    if not sae.normalizes:
        raise ConfigError("the official format always normalises; an SAE with normalize=False would change meaning")
    b_enc = sae.b_enc if sae.b_enc is not None else sae.W_enc.new_zeros(sae.n_features)
    state = {"pre_bias": sae.b_pre, "latent_bias": b_enc, "encoder.weight": sae.W_enc, "decoder.weight": sae.W_dec.T}
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    write_atomic(Path(path), lambda temporary: torch.save(state, temporary))
    return Path(path)


def save_saelens(
    sae: TopKSAE,
    folder: str | os.PathLike,
    *,
    normalization: str = "layer_norm",
    model_name: str | None = None,
    hook_name: str | None = None,
    allow_relu: bool = False,
) -> Path:
    """Write a folder for ``sae_lens.SAE.load_from_disk``: cfg.json and sae_weights.safetensors.

    ``normalization="layer_norm"`` takes raw states, but SAELens adds 1e-5 to the std where we add 1e-6 (features differ
    by about 1e-4); ``"none"`` is bit-equal on states that were normalised before.  hook_name: the state after layer l
    is ``blocks.{l-1}.hook_resid_post``.  SAELens always applies ReLU, so a signed SAE is refused (ConfigError) unless
    ``allow_relu`` accepts that negative kept values are lost.
    """
    if normalization not in ("layer_norm", "none"):
        raise ConfigError(f"normalization={normalization!r}; use 'layer_norm' or 'none'")
    if normalization == "layer_norm" and not sae.normalizes:
        raise ConfigError("this SAE does not normalise; export it with normalization='none'")
    if not sae.relu and not allow_relu:
        raise ConfigError("SAELens applies ReLU, this SAE keeps signed values; pass allow_relu=True to lose them")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    b_enc = sae.b_enc if sae.b_enc is not None else sae.W_enc.new_zeros(sae.n_features)
    state = {"W_enc": sae.W_enc.T, "b_enc": b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    state = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in state.items()}
    metadata = {"sae_lens_version": SAELENS_VERSION, "model_name": model_name, "hook_name": hook_name}
    config = {
        "architecture": "topk", "d_in": sae.d_model, "d_sae": sae.n_features, "k": sae.k, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": normalization,
        "reshape_activations": "none", "rescale_acts_by_decoder_norm": False, "metadata": metadata,
    }
    write_atomic(folder / "sae_weights.safetensors", lambda path: save_file(state, path))
    write_atomic(folder / "cfg.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    return folder


def load_saelens(folder: str | os.PathLike) -> TopKSAE:
    """Read a SAELens TopK folder; ModelError for other architectures or settings that our equations do not have."""
    folder = Path(folder)
    config, state = _read_folder(folder, "cfg.json", "sae_weights.safetensors")
    wanted = {"architecture": "topk", "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False}
    for name, value in wanted.items():
        if config.get(name) != value:
            raise ModelError(f"{str(folder)!r}: {name}={config.get(name)!r} is not supported, only {value!r}")
    normalization = config.get("normalize_activations", "none")
    if normalization not in ("layer_norm", "none") or "k" not in config:
        raise ModelError(f"{str(folder)!r}: needs k and normalize_activations 'layer_norm' or 'none', got {config}")
    W_enc, W_dec, b_dec, b_enc = _take(folder, state, "W_enc", "W_dec", "b_dec", "b_enc")
    b_enc = b_enc if b_enc.any() else None
    return from_tensors(W_enc.T, W_dec, b_dec, b_enc, config["k"], relu=True, normalize=normalization == "layer_norm")


def load_sparsify(folder: str | os.PathLike) -> TopKSAE:
    """Read a sparsify folder (cfg.json, sae.safetensors); sparsify never normalises, so neither does the result."""
    config, state = _read_folder(Path(folder), "cfg.json", "sae.safetensors")
    W_enc, b_enc, W_dec, b_dec = _take(folder, state, "encoder.weight", "encoder.bias", "W_dec", "b_dec")
    if "k" not in config:
        raise ModelError(f"{str(folder)!r}: cfg.json holds no k")
    return from_tensors(W_enc, W_dec, b_dec, b_enc, config["k"], relu=True, normalize=False)


def _read_folder(folder: Path, config: str, weights: str) -> tuple[dict, dict[str, Tensor]]:
    try:
        settings, state = json.loads((folder / config).read_text()), load_file(folder / weights)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ModelError(f"{str(folder)!r} holds no readable {config} and {weights}: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{str(folder / config)!r} holds a {type(settings).__name__}; an object is needed")
    return settings, state


def _take(source, state, *names: str) -> list[Tensor]:
    if not isinstance(state, dict) or any(not isinstance(state.get(name), Tensor) for name in names):
        have = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ModelError(f"{str(source)!r} lacks one of the tensors {', '.join(names)}; it holds {have}")
    return [state[name] for name in names]
