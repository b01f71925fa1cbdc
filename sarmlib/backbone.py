"""Any Hugging Face decoder, cut after layer *l*: gives the residual stream X = RM_theta^l(T) (eq. 6).

Layers are counted from 1: ``layer=l`` runs the first l decoder layers, so the result equals
``hidden_states[l]`` of the full model.  The final norm is not applied: the encoder reads the raw stream.
"""

import copy
import os

import torch
from torch import nn

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.hub import from_hub, weights_from_hub

FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f", "decoder.final_layer_norm")
"""Where the decoder families keep the norm that is applied after the last layer."""


def n_layers(config) -> int:
    """Number of decoder layers that ``config`` declares."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise ModelError(f"{type(config).__name__} has num_hidden_layers={count!r}; a text decoder is needed")
    return count


def cut_config(config, layer: int | None = None):
    """Copy of ``config`` with ``layer`` decoder layers; None means half depth (paper: "1/2 depth").

    Raises ConfigError when ``layer`` is not in 1..L and ModelError for encoder-decoders.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{config.model_type!r} is an encoder-decoder; a decoder-only model is needed")
    depth = n_layers(config)
    layer = max(depth // 2, 1) if layer is None else layer
    if type(layer) is not int or not 1 <= layer <= depth:
        raise ConfigError(f"layer={layer!r} is not in 1..{depth}, the layers of this {config.model_type}")
    cut = copy.deepcopy(config)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):  # one entry per layer
        entries = getattr(cut, name, None)
        if isinstance(entries, (list, tuple)) and len(entries) == depth:
            setattr(cut, name, list(entries[:layer]))
    cut.num_hidden_layers = layer
    return cut


def _final_norm(model: nn.Module) -> str:
    """Its path; ModelError for a family whose norm is not found: its last state would be another quantity."""
    modules = dict(model.named_modules())
    if path := next((path for path in FINAL_NORMS if path in modules), None):
        return path
    raise ModelError(f"no final norm ({', '.join(FINAL_NORMS)}) in {type(model).__name__}, model_type "
                     f"{model.config.model_type!r}; use a decoder such as llama, qwen2, mistral or gpt_neox")


def strip_final_norm(model: nn.Module) -> None:
    """Replace the last norm by the identity: ``last_hidden_state`` becomes the residual stream."""
    parent, _, name = _final_norm(model).rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())


def check_cut(model, keep_final_norm: bool | None = None) -> None:
    """Raise ModelError for a loaded model with a head, or whose final norm is not as asked (None: as it is)."""
    cure = f"pass load_backbone(model, layer{', keep_final_norm=True' if keep_final_norm else ''})"
    if getattr(model, "base_model", model) is not model:
        raise ModelError(f"{type(model).__name__} has a head over its hidden states; {cure}")
    if keep_final_norm is None:
        return
    kept = not isinstance(model.get_submodule(_final_norm(model)), nn.Identity)
    if kept != keep_final_norm:
        raise ModelError(f"this {type(model).__name__} has {'its' if kept else 'no'} final norm; {cure}")


def check_positions(model, length: int) -> None:
    """Raise DataError for a row longer than the table of positions of GPT-2 or OPT; rotary positions do not end."""
    most, tokens = getattr(model.config, "max_position_embeddings", None) or length, model.get_input_embeddings()
    if length > most and any(isinstance(part, nn.Embedding) and part is not tokens for part in model.modules()):
        raise DataError(f"a row has {length} tokens, {model.config.model_type!r} has {most} positions; cut the texts "
                        "(chat.truncate_left does)")


def load_backbone(path: str | os.PathLike | nn.Module, layer: int | None = None, *, revision: str | None = None,
                  dtype: torch.dtype = torch.float32, trust_remote_code: bool = False,
                  keep_final_norm: bool = False) -> nn.Module:
    """The first ``layer`` layers (None: half) of a folder, ``.gguf`` file or hub id; last_hidden_state is [B, T, d].

    Layers above l are neither read nor allocated (but a ``.gguf`` file is read whole).  Of a loaded model, with any
    head, it is a copy, on its device and in its dtype.  Raises ModelError for missing weights, ConfigError for a bad
    layer, OfflineError when the hub cannot be reached.
    """
    from transformers import AutoConfig, AutoModel

    if isinstance(path, nn.Module):
        base = path.base_model
        model = AutoModel.from_config(cut_config(base.config, layer), dtype=base.dtype).to(base.device)
        if missing := model.load_state_dict(base.state_dict(), strict=False).missing_keys:
            raise ModelError(f"{type(path).__name__} lacks the weights {missing[:3]}; load it again from its files")
    else:
        common = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = cut_config(from_hub(AutoConfig, path, **common), layer)
        model, _ = weights_from_hub(AutoModel, path, config=config, dtype=dtype, **common)
    if not keep_final_norm:
        strip_final_norm(model)
    model.config.use_cache = False
    return model.eval()


def load_tokenizer(path: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False):
    """Tokenizer of a folder, ``.gguf`` file or hub id; OfflineError when the hub cannot be reached."""
    from transformers import AutoTokenizer

    return from_hub(AutoTokenizer, path, revision=revision, trust_remote_code=trust_remote_code)
