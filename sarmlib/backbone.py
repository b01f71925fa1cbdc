"""Any Hugging Face decoder, cut after layer *l*: its output is the residual stream X = RM_theta^l(T) (paper eq. 6).

Layers are counted from 1: ``layer=l`` runs the first l decoder layers, so the result equals ``hidden_states[l]`` of the
full model.  The final norm is not applied: the sparse autoencoder reads the raw residual stream.
"""

from __future__ import annotations

import copy
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from sarmlib.errors import ConfigError, ModelError, OfflineError

# Where the decoder families keep the norm that is applied after the last layer.
FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f", "decoder.final_layer_norm")
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")


def n_layers(config) -> int:
    """Number of decoder layers that ``config`` declares."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise ModelError(f"{type(config).__name__} declares num_hidden_layers={count!r}; a text decoder is needed")
    return count


def cut_config(config, layer: int | None = None):
    """Copy of ``config`` with ``layer`` decoder layers; None means half depth (paper: "1/2 depth").

    Raises ConfigError when ``layer`` is not in 1..L and ModelError for encoder-decoders.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{config.model_type!r} is an encoder-decoder; a decoder-only model is needed")
    depth = n_layers(config)
    layer = max(depth // 2, 1) if layer is None else layer
    if not isinstance(layer, int) or isinstance(layer, bool) or not 1 <= layer <= depth:
        raise ConfigError(f"layer={layer!r} is out of range for a {depth}-layer {config.model_type}; use 1..{depth}")
    cut = copy.deepcopy(config)
    for name in PER_LAYER_LISTS:  # one entry per layer: has to be as long as the cut model
        entries = getattr(cut, name, None)
        if isinstance(entries, (list, tuple)) and len(entries) == depth:
            setattr(cut, name, list(entries[:layer]))
    cut.num_hidden_layers = layer
    return cut


def strip_final_norm(model: PreTrainedModel) -> str:
    """Replace the norm after the last layer by the identity; returns its attribute name.

    After this ``model(...).last_hidden_state`` is the residual stream.  A family whose norm is not found is refused by
    name (ModelError), because its last hidden state would silently be another quantity.
    """
    for name in FINAL_NORMS:
        parent_name, _, attribute = name.rpartition(".")
        parent = model
        for part in filter(None, parent_name.split(".")):
            parent = getattr(parent, part, None)
        if isinstance(getattr(parent, attribute, None), nn.Module):
            setattr(parent, attribute, nn.Identity())
            return name
    raise ModelError(
        f"no final norm found in {type(model).__name__} (model_type={model.config.model_type!r}); "
        f"looked for {', '.join(FINAL_NORMS)}. Supported are decoders such as llama, qwen2, mistral, gemma2, gpt_neox."
    )


def load_backbone(
    path: str | os.PathLike,
    layer: int | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    keep_final_norm: bool = False,
) -> PreTrainedModel:
    """Load the first ``layer`` layers of a decoder: ``last_hidden_state`` [B, T, d] = residual stream after layer l.

    ``path`` is a local folder or a hub id.  The depth is set in the config before the weights are opened, so the layers
    above l are neither read nor allocated.  ``keep_final_norm`` keeps the model's own last norm (full-depth baselines).
    Raises ModelError when weights are missing (they would be random), ConfigError for a bad layer, OfflineError when
    the hub cannot be reached.
    """
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _from_hub(AutoConfig, path, **common)
    with _quiet_loading():
        model, info = _from_hub(
            AutoModel, path, config=cut_config(config, layer), dtype=dtype, output_loading_info=True, **common
        )
    bad = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if bad:
        raise ModelError(
            f"checkpoint {str(path)!r} lacks {len(bad)} weights of a {n_layers(model.config)}-layer "
            f"{model.config.model_type}: {', '.join(bad[:4])}{' ...' if len(bad) > 4 else ''}; choose a smaller layer"
        )
    if not keep_final_norm:
        strip_final_norm(model)
    model.config.use_cache = False
    return model.eval()


def load_tokenizer(
    path: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Tokenizer of a local folder or hub id; OfflineError when the hub cannot be reached."""
    return _from_hub(AutoTokenizer, path, revision=revision, trust_remote_code=trust_remote_code)


def _from_hub(auto_class, path, **kwargs):
    name = os.fspath(path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
    elif isinstance(path, Path) or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"model folder {name!r} does not exist")
    else:
        kwargs["local_files_only"] = not _hub_reachable()
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        if folder.is_dir() or isinstance(error, ValueError):
            raise ModelError(f"{name!r} cannot be loaded by {auto_class.__name__}: {error}") from error
        raise OfflineError(
            f"model {name!r} is neither a local folder nor reachable on the hub; download it once with network access, "
            f"then pass the folder's path ({str(error).splitlines()[0]})"
        ) from error


def _hub_reachable(timeout: float = 3.0) -> bool:
    """One bounded connection attempt, because the hub client alone retries for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the client can tell
    endpoint = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout).close()
    except OSError:
        return False
    return True


@contextmanager
def _quiet_loading():
    """No progress bar and no load report: layers above l are left out on purpose, and the rest is raised as errors."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
