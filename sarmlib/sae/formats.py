"""SAE files of other libraries: the official SARM ``.pt``, SAELens folders (also written), sparsify folders."""

import json
import os
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarmlib.errors import ConfigError, ModelError
from sarmlib.sae.topk import CONFIG, WEIGHTS, TopKSAE, readable
from sarmlib.store import write_atomic, write_json

SAELENS_VERSION = "6.54.12"  # of the format written here; SAELens treats files without a version >= 6 as legacy
SAELENS_WEIGHTS, FOREIGN_CONFIG = "sae_weights.safetensors", "cfg.json"


def load_sae(path: str | os.PathLike, k: int | None = None) -> TopKSAE:
    """An SAE of any known format, told by what ``path`` holds: our own folder, SAELens', sparsify's, or the official
    ``.pt`` file.  ``k`` replaces the stored number of kept features.  ModelError when it is none of them.
    """
    path = Path(path)
    if path.is_file():
        return load_official(path, k)
    if (path / CONFIG).exists():
        sae = TopKSAE.load(path)
    elif (path / SAELENS_WEIGHTS).exists():
        sae = load_saelens(path)
    else:
        sae = load_sparsify(path)
    return sae if k is None else TopKSAE.from_state(sae.state_dict(), **sae.settings() | {"k": k})


def load_official(path: str | os.PathLike, k: int | None = None) -> TopKSAE:
    """The released code's SAE file, a ``torch.save``d dict: signed (``relu=False``), biased and normalising.

    ``k`` None reads it from a name such as ``..._Latent65536_Layer16_K192_....pt``.
    """
    path = Path(path)
    if k is None:
        found = re.search(r"_K(\d+)(?:[_.]|$)", path.name)
        if not found:
            raise ConfigError(f"k is not stored in {path.name!r} and its name holds no '_K<number>_'; pass k")
        k = int(found[1])
    with readable(path, "torch file of plain tensors"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        return _built(state["encoder.weight"], state["decoder.weight"].T, state["pre_bias"], state["latent_bias"],
                      k=k, relu=False, normalize=True)


def load_saelens(folder: str | os.PathLike) -> TopKSAE:
    """Read a SAELens TopK folder as float32; ModelError for settings that our equations do not have.

    With ``rescale_acts_by_decoder_norm`` SAELens multiplies pre-activations by the length n_m of decoder row m and
    divides activations by it again, which equals unit rows W_dec/n with n W_enc and n b_enc.
    """
    with readable(folder, "SAELens SAE"):
        config, state = _read_folder(
            folder, SAELENS_WEIGHTS, architecture=("topk",), apply_b_dec_to_input=(True, None),
            normalize_activations=("layer_norm", "none", None), reshape_activations=("none", None))
        W_enc, W_dec, b_enc = state["W_enc"].T, state["W_dec"], state["b_enc"]
        if config.get("rescale_acts_by_decoder_norm"):
            norms = W_dec.norm(dim=-1, keepdim=True).clamp_(min=torch.finfo(W_dec.dtype).tiny)
            W_enc, W_dec, b_enc = W_enc * norms, W_dec / norms, b_enc * norms[:, 0]
        return _built(W_enc, W_dec, state["b_dec"], b_enc if b_enc.any() else None, k=config["k"], relu=True,
                      normalize=config.get("normalize_activations") == "layer_norm")


def save_saelens(sae: TopKSAE, folder: str | os.PathLike, **metadata: str) -> Path:
    """Write a folder for ``sae_lens.SAE.load_from_disk``; ConfigError for a signed SAE.

    An SAE that normalises takes raw states there too, but SAELens adds 1e-5 to the std where we add 1e-6 (features
    differ by about 1e-4).  ``metadata``: model_name, hook_name (after layer l: ``blocks.{l-1}.hook_resid_post``).
    """
    if not sae.relu:
        raise ConfigError("SAELens applies ReLU and would lose the negative values of this SAE (relu=False)")
    folder = Path(folder)
    b_enc = sae.W_enc.new_zeros(sae.n_features) if sae.b_enc is None else sae.b_enc
    state = {"W_enc": sae.W_enc.T, "b_enc": b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    state = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in state.items()}
    config = {
        "architecture": "topk", "d_in": sae.d_model, "d_sae": sae.n_features, "k": sae.k, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "reshape_activations": "none",
        "normalize_activations": "layer_norm" if sae.normalizes else "none", "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": SAELENS_VERSION, "model_name": None, "hook_name": None, **metadata}}
    write_atomic(folder / SAELENS_WEIGHTS, lambda path: save_file(state, path))
    write_json(folder / FOREIGN_CONFIG, config)
    return folder


def load_sparsify(folder: str | os.PathLike) -> TopKSAE:
    """Read a sparsify folder (never normalises) as float32; ModelError for GroupMax, transcoders, skip connections."""
    with readable(folder, "SAE of sarmlib, SAELens or sparsify"):
        config, state = _read_folder(folder, WEIGHTS, activation=("topk", None), transcode=(False, None),
                                     skip_connection=(False, None))
        return _built(state["encoder.weight"], state["W_dec"], state["b_dec"], state["encoder.bias"], k=config["k"],
                      relu=True, normalize=False)


def _built(W_enc: Tensor, W_dec: Tensor, b_pre: Tensor, b_enc: Tensor | None, **settings) -> TopKSAE:
    state = {"W_enc": W_enc, "W_dec": W_dec, "b_pre": b_pre} | ({} if b_enc is None else {"b_enc": b_enc})
    state = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    M, d = W_enc.shape
    return TopKSAE.from_state(state, d_model=d, n_features=M, encoder_bias=b_enc is not None, **settings)


def _read_folder(folder: str | os.PathLike, weights: str, **allowed: tuple) -> tuple[dict, dict[str, Tensor]]:
    """Config and float32 weights; ``allowed`` settings are those under which our equations hold (None: absent)."""
    config = json.loads(Path(folder, FOREIGN_CONFIG).read_text(encoding="utf-8"))
    for name, values in allowed.items():
        if config.get(name) not in values:
            raise ModelError(f"{str(folder)!r}: {name}={config.get(name)!r} is not supported, only {values[0]!r}")
    return config, {name: tensor.float() for name, tensor in load_file(Path(folder, weights)).items()}
