"""SAE files of other libraries: the official SARM ``.pt``, SAELens (also written), sparsify; all read one layer."""

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


def load_sae(path: str | os.PathLike, k: int | None = None, layer: int | None = None) -> TopKSAE:
    """An SAE of any known format, told by what ``path`` holds: our own folder, SAELens', sparsify's, or the official
    ``.pt`` file; or ``release:id`` of SAELens.  ``k`` replaces the stored number of kept features.  ModelError when it
    is none of them, or a SAELens SAE of other states than those after ``layer``.
    """
    path = Path(path)
    if path.is_file():
        return load_official(path, k)
    if (path / CONFIG).exists():
        sae = TopKSAE.load(path)
    elif (path / SAELENS_WEIGHTS).exists() or ":" in str(path) and not path.exists():
        sae = load_saelens(path, layer)
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


def load_saelens(source: str | os.PathLike, layer: int | None = None) -> TopKSAE:
    """Read a SAELens SAE (TopK, BatchTopK, JumpReLU) as float32, from a folder or as `_fetched`.

    ModelError for settings that our equations do not have, and for other states than those after ``layer``.
    JumpReLU keeps relu(a) where a > threshold, so one below 0 counts as 0; BatchTopK is that with one for all features.
    With ``rescale_acts_by_decoder_norm`` SAELens multiplies pre-activations by the length n_m of decoder row m and
    divides activations by it again, which equals unit rows W_dec/n with n W_enc and n b_enc.
    Without ``apply_b_dec_to_input`` W_enc x + b_enc = W_enc (x - b_dec) + (b_enc + W_enc b_dec).
    """
    with readable(source, "SAELens SAE"):
        on_disk = Path(source, SAELENS_WEIGHTS).exists()
        config, state = _read_folder(source, SAELENS_WEIGHTS) if on_disk else _fetched(str(source))
        _require(source, config, architecture=("topk", "jumprelu", "batchtopk"), reshape_activations=("none", None),
                 normalize_activations=("none", "layer_norm", None), apply_b_dec_to_input=(True, False, None))
        hook = (config.get("metadata") or config).get("hook_name")
        same = [f"blocks.{layer - 1}.hook_resid_post", f"blocks.{layer}.hook_resid_pre", None] if layer else [hook]
        if hook not in same:
            raise ModelError(f"SAE {str(source)!r} reads {hook!r}, but the backbone ends after layer {layer}, that is "
                             f"{same[0]!r}; take the SAE of that hook, or --set backbone.layer=<its number + 1>")
        W_enc, W_dec, b_enc = state["W_enc"].T, state["W_dec"], state["b_enc"]
        if config.get("rescale_acts_by_decoder_norm") and config["architecture"] != "jumprelu":
            norms = W_dec.norm(dim=-1, keepdim=True).clamp_(min=torch.finfo(W_dec.dtype).tiny)
            W_enc, W_dec, b_enc = W_enc * norms, W_dec / norms, b_enc * norms[:, 0]
        if config.get("apply_b_dec_to_input") not in (True, None):
            b_enc = b_enc + W_enc @ state["b_dec"]
        kept: dict = {"k": config.get("k")}
        if config["architecture"] != "topk":
            threshold = state["topk_threshold" if config["architecture"] == "batchtopk" else "threshold"]
            kept = {"k": None, "threshold": threshold.clamp(min=0).expand_as(b_enc)}
        return _built(W_enc, W_dec, state["b_dec"], b_enc if b_enc.any() else None, **kept, relu=True,
                      normalize=config.get("normalize_activations") == "layer_norm")


def _fetched(name: str) -> tuple[dict, dict[str, Tensor]]:
    """Config and weights of ``release:id`` of SAELens' list, or ``owner/name:folder`` of the hub, by `sae_lens` itself:
    it knows the layouts of Llama Scope, Gemma Scope, Qwen-Scope and others, and folds the scales of their inputs.
    """
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise ModelError(f"SAE {name!r} is no path, and sae_lens, which fetches released ones, cannot be imported "
                         f"({error}); pip install sae-lens, or pass a folder that its SAE.save_model wrote") from error
    release, _, sae_id = name.partition(":")
    sae = SAE.from_pretrained(release, sae_id)
    return sae.cfg.to_dict(), sae.state_dict()


def save_saelens(sae: TopKSAE, folder: str | os.PathLike, **metadata: str | int | bool) -> Path:
    """Write a folder for ``sae_lens.SAE.load_from_disk``; ConfigError for a signed SAE.

    An SAE that normalises takes raw states there too, but SAELens adds 1e-5 to the std where we add 1e-6 (features
    differ by about 1e-4).  ``metadata``: model_name, hook_name (after layer l: ``blocks.{l-1}.hook_resid_post``),
    context_size; its ``ActivationsStore.from_sae`` needs the last two and prepend_bos.
    """
    if not sae.relu:
        raise ConfigError("SAELens applies ReLU and would lose the negative values of this SAE (relu=False)")
    folder = Path(folder)
    b_enc = sae.W_enc.new_zeros(sae.n_features) if sae.b_enc is None else sae.b_enc
    state = {"W_enc": sae.W_enc.T, "b_enc": b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    state |= {} if sae.threshold is None else {"threshold": sae.threshold}
    state = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in state.items()}
    config = {
        "architecture": "topk" if sae.k else "jumprelu", "d_in": sae.d_model, "d_sae": sae.n_features, "k": sae.k,
        "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True, "reshape_activations": "none",
        "normalize_activations": "layer_norm" if sae.normalizes else "none", "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": SAELENS_VERSION, "model_name": None, "hook_name": None, "context_size": 1024,
                     "prepend_bos": True, **metadata}}
    write_atomic(folder / SAELENS_WEIGHTS, lambda path: save_file(state, path))
    write_json(folder / FOREIGN_CONFIG, config)
    return folder


def load_sparsify(folder: str | os.PathLike) -> TopKSAE:
    """Read a sparsify folder (never normalises) as float32; ModelError for GroupMax, transcoders, skip connections."""
    with readable(folder, "SAE of sarmlib, SAELens or sparsify"):
        config, state = _read_folder(folder, WEIGHTS)
        _require(folder, config, activation=("topk", None), transcode=(False, None), skip_connection=(False, None))
        return _built(state["encoder.weight"], state["W_dec"], state["b_dec"], state["encoder.bias"], k=config["k"],
                      relu=True, normalize=False)


def _built(W_enc: Tensor, W_dec: Tensor, b_pre: Tensor, b_enc: Tensor | None, threshold: Tensor | None = None,
           **settings) -> TopKSAE:
    state = {"W_enc": W_enc, "W_dec": W_dec, "b_pre": b_pre, "b_enc": b_enc, "threshold": threshold}
    state = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
             if tensor is not None}
    M, d = W_enc.shape
    return TopKSAE.from_state(state, d_model=d, n_features=M, encoder_bias=b_enc is not None, **settings)


def _read_folder(folder: str | os.PathLike, weights: str) -> tuple[dict, dict[str, Tensor]]:
    config = json.loads(Path(folder, FOREIGN_CONFIG).read_text(encoding="utf-8"))
    return config, {name: tensor.float() for name, tensor in load_file(Path(folder, weights)).items()}


def _require(source, config: dict, **allowed: tuple) -> None:
    """ModelError unless the settings are those under which our equations hold (None: absent)."""
    for name, values in allowed.items():
        if config.get(name) not in values:
            known = " or ".join(repr(value) for value in values if value is not None)
            raise ModelError(f"SAE {str(source)!r}: {name}={config.get(name)!r} is not supported, only {known}")
