"""The reward models: SARM (paper eqs. 6, 7, 9) and the conventional scalar model it is compared with.

    X  = RM_theta^l(T)                       backbone cut after layer l, residual stream           eq. 6
    z  = TopK(W_enc (x_last - b_pre))        frozen encoder (or JumpReLU), at the reward position   eq. 7
    r  = sum_i w_i z_i                       linear head without bias                               eq. 9

Importing this module registers both with ``AutoConfig`` and ``AutoModelForSequenceClassification``.
"""

import copy
import inspect
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import ModelOutput

from sarmlib.backbone import check_cut, check_positions, load_backbone, n_layers, strip_final_norm
from sarmlib.chat import reward_position
from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.hub import quiet, weights_from_hub
from sarmlib.sae.topk import SparseCode, TopKSAE
from sarmlib.store import imports_of, write_atomic, writing

EXPORTED = "modeling_sarm"  # name of this module beside exported weights


@dataclass
class RewardOutput(ModelOutput):
    """What a reward model returns for a batch of B sequences."""

    loss: Tensor | None = None  # scalar: mean squared error to `labels`, when they are given
    logits: Tensor | None = None  # [B, 1] float32: the reward r
    hidden_states: tuple[Tensor, ...] | None = None  # the backbone's, when asked for
    attentions: tuple[Tensor, ...] | None = None  # the backbone's, when asked for
    code: SparseCode | None = None  # z at the reward position (None for `ScalarRewardModel`)
    hidden: Tensor | None = None  # [B, d]: the state at the reward position, before normalisation


class _RewardConfig(PretrainedConfig):
    """A nested backbone config and the depth l at which the backbone is cut."""

    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["code", "hidden", "hidden_states", "attentions"]

    def __init__(self, backbone_config=None, layer: int | None = None, **kwargs):
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        if backbone_config is not None:
            depth = n_layers(backbone_config)
            if layer not in (None, depth):
                raise ConfigError(f"layer={layer} but backbone_config has {depth} layers; they must be equal")
            layer = depth
            for name in ("hidden_size", "vocab_size", "initializer_range"):  # other libraries read these here
                kwargs[name] = getattr(backbone_config, name, None)
        if kwargs.get("id2label") is None:
            kwargs.setdefault("num_labels", 1)
        self.backbone_config, self.layer = backbone_config, layer
        super().__init__(**kwargs)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            given = kwargs.get(name)
            setattr(self, name, getattr(backbone_config, name, None) if given is None else given)

    def to_dict(self):
        """As JSON types; rope settings also under the names of transformers 4, which reads no others."""
        output = super().to_dict()
        if isinstance(backbone := output.get("backbone_config"), dict):
            backbone.pop("_name_or_path", None)  # a path of this machine is no part of the model
            backbone.update(_old_rope_keys(backbone.get("rope_parameters") or {}))
        return output


def _old_rope_keys(rope: dict) -> dict:
    local = rope.get("sliding_attention") or {}  # Gemma 3 has an entry per type of layer
    rope = rope.get("full_attention", rope)
    keys = {"rope_theta": rope.get("rope_theta"), "rope_local_base_freq": local.get("rope_theta")}
    if rope.get("rope_type", "default") != "default":
        outside = ("rope_theta", "partial_rotary_factor")
        keys["rope_scaling"] = {name: value for name, value in rope.items() if name not in outside}
    return {name: value for name, value in keys.items() if value is not None}


class SarmConfig(_RewardConfig):
    """What decides what a SARM computes: M, k, encoder_bias, relu, normalize as of `TopKSAE`, and a backbone.

    `backbone_config` has `layer` layers (paper: half depth); topk=False scores all M activations, also those of an SAE
    that JumpReLU cuts (k=None).
    """

    model_type = "sarm"

    def __init__(self, backbone_config=None, layer: int | None = None, n_features: int | None = None,
                 k: int | None = None, encoder_bias: bool = False, relu: bool = True, normalize: bool = True,
                 topk: bool = True, frozen_sae: bool = True, **kwargs):
        self.n_features, self.k = n_features, k
        switches = {"encoder_bias": encoder_bias, "relu": relu, "normalize": normalize, "topk": topk,
                    "frozen_sae": frozen_sae}
        for name, value in switches.items():
            if not isinstance(value, bool):  # the text "false" would count as true
                raise ConfigError(f"{name}={value!r} in a SARM config must be true or false")
            setattr(self, name, value)
        super().__init__(backbone_config, layer, **kwargs)


class ScalarRewardConfig(_RewardConfig):
    """Config of the conventional reward model: a decoder of `layer` layers with its final norm."""

    model_type = "sarm_scalar"

    def __init__(self, backbone_config=None, layer: int | None = None, **kwargs):  # transformers needs one
        super().__init__(backbone_config, layer, **kwargs)


class _RewardModel(PreTrainedModel):
    """A decoder and a head: ``reward(hidden [B, d]) -> (r [B, 1] float32, z or None)`` of a subclass."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # tells transformers' Trainer that `loss` is a plain mean
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        if config.num_labels != 1:
            raise ConfigError(f"num_labels={config.num_labels}: a reward model has one output; leave it at 1")
        self.model = AutoModel.from_config(config.backbone_config)

    def _init_weights(self, module):
        # The head starts at zero: no reward before training, and a feature that never fires keeps weight 0.
        if module is getattr(self, "score", None):
            module.weight.data.zero_()
        elif not isinstance(module, TopKSAE):
            super()._init_weights(module)

    @classmethod
    def _around(cls, backbone: PreTrainedModel, config: _RewardConfig):
        """A model before training: a given decoder, and the head at zero."""
        with torch.device("meta"):
            model = cls(config)
        dtype = torch.float32 if cls._keep_in_fp32_modules_strict else backbone.dtype
        weight = torch.zeros(1, model.score.in_features, device=backbone.device, dtype=dtype)
        model.model, model.score.weight = backbone, nn.Parameter(weight)
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, output_loading_info: bool = False, **kwargs):
        """Load a saved reward model; ModelError for missing, unexpected or misshapen weights."""
        kinds = ("missing", "unexpected", "mismatched")
        _check_numbers(pretrained_model_name_or_path)
        model, info = weights_from_hub(super(), pretrained_model_name_or_path, kinds=kinds, **kwargs)
        model.freeze()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args, **kwargs):
        with quiet(), writing(args[0] if args else kwargs["save_directory"]):
            return super().save_pretrained(*args, **kwargs)

    def freeze(self) -> None:
        """Set ``requires_grad`` as the config says; transformers 5 makes every loaded parameter trainable."""

    def resize_token_embeddings(self, *args, **kwargs):
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.backbone_config.vocab_size = self.config.vocab_size
        return embeddings

    def reward_state(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """x_last [B, d]: state of the last attended token (eq. 6); without a mask, pad tokens are padding."""
        return self._run(input_ids, attention_mask)[0]

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                labels: Tensor | None = None, output_hidden_states: bool | None = None,
                output_attentions: bool | None = None, return_dict: bool | None = None, **ignored):
        """Rewards of a batch: int64 [B, T] -> `RewardOutput`; `labels` [B] are target rewards."""
        if input_ids is None:
            raise DataError("input_ids are needed; rewards are not defined on inputs_embeds here")
        hidden, states = self._run(input_ids, attention_mask, output_hidden_states=output_hidden_states,
                                   output_attentions=output_attentions)
        logits, code = self.reward(hidden)
        loss = None if labels is None else nn.functional.mse_loss(logits[:, 0], labels.reshape(-1).float())
        seen = states.get("hidden_states"), states.get("attentions")
        output = RewardOutput(loss, logits, *seen, code, hidden)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def _run(self, input_ids: Tensor, attention_mask: Tensor | None, **asked) -> tuple[Tensor, ModelOutput]:
        """(state of the last attended token [B, d], all that the backbone returned)."""
        if attention_mask is None:
            attention_mask = self._mask_from_ids(input_ids)
        if not (exporting := torch.compiler.is_exporting()):
            check_positions(self.model, input_ids.shape[-1])
        last, attended = reward_position(attention_mask), attention_mask != 0
        inputs = {"input_ids": input_ids, "use_cache": False}
        asked = {name: getattr(self.config, name) if wanted is None else wanted for name, wanted in asked.items()}
        inputs |= {name: wanted for name, wanted in asked.items() if wanted}  # not every family takes each name
        if exporting or not bool((attended[:, 1:] <= attended[:, :-1]).all()):
            # Padding on the left or in between: mask it, and count positions from the first attended token.
            inputs["attention_mask"] = attention_mask
            if "position_ids" in inspect.signature(self.model.forward).parameters:
                inputs["position_ids"] = (attended.cumsum(-1) - 1).clamp(min=0)
        # Padding on the right needs no mask: a causal decoder never looks ahead, and pads are not read out.
        states = self.model(**inputs)
        return states.last_hidden_state[torch.arange(len(last), device=last.device), last], states

    def _mask_from_ids(self, input_ids: Tensor) -> Tensor:
        pad, eos = self.config.pad_token_id, self.config.eos_token_id
        if pad is None and len(input_ids) == 1:
            return torch.ones_like(input_ids)
        padded = input_ids == pad
        if pad is None or pad in (eos if isinstance(eos, list) else [eos]) and bool(padded.any()):
            raise DataError(f"pad_token_id={pad}, eos_token_id={eos}: padding cannot be told from text; pass "
                            "attention_mask")
        return (~padded).long()


class SarmForSequenceClassification(_RewardModel):
    """SARM (eqs. 6, 7, 9): ``model`` (decoder, no final norm), ``sae`` (`TopKSAE`), ``score`` [1, M].

    Encoder and head are float32 whatever the decoder is, so that a reward is the sum of the parts that are shown.
    """

    config_class = SarmConfig
    _keep_in_fp32_modules_strict = ["sae", "score"]

    def __init__(self, config: SarmConfig):
        super().__init__(config)
        strip_final_norm(self.model)
        switches = {name: getattr(config, name) for name in ("encoder_bias", "relu", "normalize")}
        self.sae = TopKSAE(config.hidden_size, config.n_features, config.k, **switches)
        self.score = nn.Linear(config.n_features, 1, bias=False)
        self.post_init()
        self.freeze()

    @classmethod
    def from_backbone_and_sae(cls, backbone, sae: TopKSAE, layer: int | None = None, *, topk: bool = True,
                              frozen_sae: bool = True, **load_kwargs) -> "SarmForSequenceClassification":
        """SARM before reward training: a decoder cut after `layer`, a copy of an SAE, and a head at zero.

        `backbone` is what `load_backbone` returned, or its first argument with others in `load_kwargs`.
        """
        backbone = _backbone(backbone, layer, load_kwargs)
        if sae.d_model != backbone.config.hidden_size:
            raise ModelError(f"the SAE reads states of size {sae.d_model}, but the backbone has hidden_size "
                             f"{backbone.config.hidden_size}")
        settings = sae.settings()
        del settings["d_model"]
        config = SarmConfig(backbone.config, topk=topk, frozen_sae=frozen_sae, **settings)
        model = cls._around(backbone, config)
        model.sae = copy.deepcopy(sae).to(backbone.device)
        model.freeze()
        return model.eval()

    @classmethod
    def from_backbone_with_random_encoder(cls, backbone, layer: int | None = None, *, n_features: int, k: int,
                                          seed: int = 0, **load_kwargs) -> "SarmForSequenceClassification":
        """The paper's ablation "SAE Encoder with Random Init" (Table 2), frozen like the SAE it replaces."""
        backbone = _backbone(backbone, layer, load_kwargs)
        random = torch.Generator().manual_seed(seed)
        sae = TopKSAE(backbone.config.hidden_size, n_features, k, generator=random)
        return cls.from_backbone_and_sae(backbone, sae)

    def freeze(self) -> None:
        self.sae.requires_grad_(not self.config.frozen_sae)

    def sae_hash(self) -> str:
        """sha256 of the encoder's settings and weights: equal before and after training when it is frozen."""
        return self.sae.content_hash()

    def encode(self, hidden: Tensor) -> SparseCode:
        """z (eq. 7) of raw hidden states [B, d]; without TopK every one of the M activations is kept."""
        if self.config.topk:
            return self.sae(hidden, "code")
        values = self.sae(hidden, "preactivations")
        values = values.relu() if self.config.relu else values
        indices = torch.arange(values.shape[-1], device=values.device).expand_as(values)
        return SparseCode(indices, values, values.shape[-1])

    def reward(self, hidden: Tensor) -> tuple[Tensor, SparseCode]:
        """(r = sum_i w_i z_i [B, 1] float32 (eq. 9), z) of raw hidden states [B, d]."""
        code = self.encode(hidden)
        if type(self.score) is not nn.Linear or hasattr(self.score, "_hf_hook"):  # adapters, offloading, quantisation
            return self.score(code.dense()).float(), code
        weights = self.score.weight[0][code.indices] if self.config.topk else self.score.weight[0]
        return (code.values.float() * weights.float()).sum(-1, keepdim=True), code


class ScalarRewardModel(_RewardModel):
    """The conventional reward model: r = v . norm(x_last), the final norm kept, v at zero before training."""

    config_class = ScalarRewardConfig

    def __init__(self, config: ScalarRewardConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone, layer: int | None = None, **load_kwargs) -> "ScalarRewardModel":
        """A decoder of `layer` layers (None: half depth, as SARM) with its final norm and a zero head."""
        backbone = _backbone(backbone, layer, {**load_kwargs, "keep_final_norm": True})
        return cls._around(backbone, ScalarRewardConfig(backbone.config))

    def reward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """(r [B, 1] float32, None) of states [B, d] after the final norm."""
        return self.score(hidden).float(), None


def _check_numbers(folder) -> None:
    for file in Path(folder or os.devnull).glob("*.safetensors"):
        with suppress(OSError, SafetensorError), safe_open(file, "pt") as weights:  # a damaged one is told of later
            kinds = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
            if wrong := [f"{name} is {kind}" for name, kind in kinds.items() if not kind.startswith(("F", "BF"))]:
                raise ModelError(f"{str(file)!r}: {wrong[0]}; weights are real numbers")


def _backbone(backbone, layer: int | None, load_kwargs: dict) -> PreTrainedModel:
    if not isinstance(backbone, PreTrainedModel):
        return load_backbone(backbone, layer, **load_kwargs)
    if layer not in (None, n_layers(backbone.config)):
        raise ConfigError(f"layer={layer}, but the given backbone has {n_layers(backbone.config)} layers")
    check_cut(backbone, keep_final_norm=load_kwargs.get("keep_final_norm", False))
    return backbone


def export_with_code(model: SarmForSequenceClassification, folder: str | os.PathLike) -> Path:
    """Save a SARM with this very code beside it: it loads without this package, by ``trust_remote_code=True``.

    The rewards are the same there (transformers 4.57 and 5).
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    stems = {name: EXPORTED if name == __name__ else name.rpartition(".")[2] for name in imports_of(__name__)}
    # transformers 4 copies only the files that the first one names
    named = "".join(f"from .{stem} import __doc__ as _\n" for stem in stems.values() if stem != EXPORTED)
    for name, stem in stems.items():
        source = Path(find_spec(name).origin).read_text(encoding="utf-8")
        beside = re.sub(r"(?m)^(\s*from )sarmlib\.(?:\w+\.)*(\w+) import ", r"\1.\2 import ", source)
        write_atomic(folder / f"{stem}.py", beside + (named if stem == EXPORTED else ""))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": SarmConfig, "AutoModelForSequenceClassification": SarmForSequenceClassification}
    config["auto_map"] = {auto: f"{EXPORTED}.{own.__name__}" for auto, own in classes.items()}
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return folder


if __name__.startswith("sarmlib."):  # an exported copy is found by its config's auto_map
    for _model in (SarmForSequenceClassification, ScalarRewardModel):
        AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
        AutoModelForSequenceClassification.register(_model.config_class, _model, exist_ok=True)
