"""The reward models: SARM (paper eqs. 6, 7, 9) and the conventional scalar reward model it is compared with.

    X  = RM_theta^l(T)                       backbone cut after layer l, residual stream           eq. 6
    z  = TopK(W_enc (x_last - b_pre))        frozen sparse encoder, at the reward position only     eq. 7
    r  = sum_i w_i z_i                       linear head without bias                               eq. 9

Importing this module registers both classes with ``AutoConfig`` and ``AutoModelForSequenceClassification``.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import ModelOutput

from ..backbone import _from_hub, _hub_reachable, _quiet_loading, load_backbone, n_layers, strip_final_norm
from ..chat import reward_position
from ..errors import ConfigError, DataError, ModelError, OfflineError, SarmlibError
from ..sae.model import SparseCode, TopKSAE, write_atomic


@dataclass
class RewardOutput(ModelOutput):
    """What a reward model returns for a batch of B sequences."""

    logits: Tensor | None = None
    """[B, 1] float32: the reward r."""
    code: SparseCode | None = None
    """Sparse features z at the reward position (None for `ScalarRewardModel`)."""
    hidden: Tensor | None = None
    """[B, d]: the hidden state at the reward position, before normalisation."""


class _RewardConfig(PretrainedConfig):
    """Common part of both configs: a nested backbone config and the depth l at which the backbone is cut."""

    sub_configs = {"backbone_config": AutoConfig}

    def __init__(self, backbone_config=None, layer: int | None = None, **kwargs):
        if isinstance(backbone_config, dict):
            settings = dict(backbone_config)
            backbone_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        if backbone_config is not None:
            layer = n_layers(backbone_config) if layer is None else layer
            if layer != n_layers(backbone_config):
                raise ConfigError(f"layer={layer} but backbone_config has {n_layers(backbone_config)} layers; a reward "
                                  "model cannot be cut again, build it from the backbone with the layer you want")
            # Settable copies: other libraries read and write these on the outer config.
            for name in ("hidden_size", "vocab_size", "initializer_range"):
                kwargs[name] = getattr(backbone_config, name, None)
            for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                if kwargs.get(name) is None:
                    kwargs[name] = getattr(backbone_config, name, None)
        self.backbone_config = backbone_config
        self.layer = layer
        if kwargs.get("id2label") is None:
            kwargs["num_labels"] = 1
        super().__init__(**kwargs)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # the base class of transformers 5 has none
            setattr(self, name, kwargs.get(name))

    def to_dict(self):
        """The config as JSON types; the backbone's rope settings are written under the old keys too.

        transformers 4 reads only ``rope_theta`` and ``rope_scaling`` and would silently fall back to theta 10000.
        """
        output = super().to_dict()
        backbone = output.get("backbone_config")
        if isinstance(backbone, dict):
            backbone.pop("_name_or_path", None)  # a path of this machine is no part of the model
            backbone.update(_rope_keys_of_transformers_4(backbone.get("rope_parameters")))
        return output


def _rope_keys_of_transformers_4(rope: dict | None) -> dict:
    if not rope:
        return {}
    if "full_attention" in rope:  # one entry per layer type (Gemma 3)
        keys, local = _rope_keys_of_transformers_4(rope["full_attention"]), rope.get("sliding_attention") or {}
        return keys | ({"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {})
    keys = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") != "default":
        keys["rope_scaling"] = scaling
    return keys


class SarmConfig(_RewardConfig):
    """Everything that decides what a SARM computes; stored in config.json.

    Args:
        backbone_config: config of the decoder, already cut to `layer` layers.
        layer: l, counted from 1 (paper: half depth).
        n_features: M (paper: 16 d).  k: features kept by TopK (paper: 3/64 d).
        encoder_bias: the encoder has a bias b_enc (released checkpoints; not in the paper's equations).
        relu: negative activations become 0, so z_i >= 0 (off for released checkpoints).
        normalize: hidden states are standardised before the encoder.
        topk: False scores all M activations (then nothing is sparse; the released training recipe did this).
        encoder: "sae" (pretrained) or "random" (paper Table 2: "a randomly initialized linear layer containing the
            same number of parameters"); only a record, both compute the same function.
        frozen_sae: the encoder is not trained (paper: "freeze the parameters of the pretrained SAE encoder"); obeyed
            after every `from_pretrained`.
    """

    model_type = "sarm"

    def __init__(self, backbone_config=None, layer=None, n_features: int | None = None, k: int | None = None,
                 encoder_bias: bool = False, relu: bool = True, normalize: bool = True, topk: bool = True,
                 encoder: str = "sae", frozen_sae: bool = True, **kwargs):
        if encoder not in ("sae", "random"):
            raise ConfigError(f"encoder={encoder!r} is unknown; choose 'sae' or 'random'")
        self.n_features, self.k = n_features, k
        self.encoder_bias, self.relu, self.normalize = encoder_bias, relu, normalize
        self.topk, self.encoder, self.frozen_sae = topk, encoder, frozen_sae
        super().__init__(backbone_config, layer, **kwargs)


class ScalarRewardConfig(_RewardConfig):
    """Config of the conventional reward model: a decoder of `layer` layers, its final norm kept, and a linear head."""

    model_type = "sarm_scalar"

    def __init__(self, backbone_config=None, layer: int | None = None, **kwargs):
        super().__init__(backbone_config, layer, **kwargs)


class _RewardModel(PreTrainedModel):
    """A decoder and a bias-free linear head on the state of the last attended token."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        if config.backbone_config is None:
            raise ConfigError(f"{type(config).__name__} has no backbone_config")
        self.model = AutoModel.from_config(config.backbone_config)

    def _init_weights(self, module):
        # The head starts at zero: no reward before training, and a feature that never fires keeps weight 0.
        if module is getattr(self, "score", None):
            module.weight.data.zero_()
        elif not isinstance(module, TopKSAE):
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, path, *args, output_loading_info: bool = False, **kwargs):
        """Load a saved reward model; the encoder is frozen again if the config says so.

        Raises `ModelError` when weights are missing (they would be random), unexpected or of another shape, and
        `OfflineError` when `path` is neither a folder nor reachable on the hub.
        """
        kwargs.setdefault("ignore_mismatched_sizes", True)  # reported below, together with the other kinds
        if path is not None and not os.path.isdir(path):
            kwargs.setdefault("local_files_only", not _hub_reachable())  # the client alone retries for half a minute
        try:
            with _quiet_loading():
                model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        except OSError as error:
            if path is None or os.path.isdir(path):
                raise ModelError(f"cannot load a reward model from {str(path)!r}: {error}") from error
            raise OfflineError(f"reward model {str(path)!r} is neither a local folder nor reachable on the hub; "
                               "pass the path of a downloaded folder") from error
        except SarmlibError:
            raise
        except Exception as error:  # damaged weights or settings: safetensors, the hub's and torch's own classes
            raise ModelError(f"cannot load a reward model from {str(path)!r}: {error!r}") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                names = sorted(key if isinstance(key, str) else f"{key[0]} {tuple(key[1])}, not {tuple(key[2])}"
                               for key in info[kind])
                raise ModelError(f"{kind.replace('_', ' ')} in {str(path)!r}: {', '.join(names[:5])}"
                                 f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}; the checkpoint does not "
                                 f"belong to this {cls.__name__} config")
        model.freeze()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args, **kwargs):
        with _quiet_loading():
            return super().save_pretrained(*args, **kwargs)

    def freeze(self) -> None:
        """Set ``requires_grad`` as the config says; loading with transformers 5 makes every parameter trainable."""

    def resize_token_embeddings(self, *args, **kwargs):
        """As in transformers; also writes the new size into the nested backbone config, so that reloading works."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size = self.config.backbone_config.vocab_size = embeddings.num_embeddings
        return embeddings

    def reward_state(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """x_last [B, d]: hidden state of the last attended token (eq. 6), for any padding side.

        Without a mask, ids equal to the pad token count as padding; that is refused when pad is also end of text.
        """
        if attention_mask is None:
            attention_mask = self._mask_from_ids(input_ids)
        rows, last = torch.arange(input_ids.shape[0], device=input_ids.device), reward_position(attention_mask)
        attended = attention_mask != 0
        inputs = {"input_ids": input_ids, "use_cache": False}
        if not bool((attended[:, 1:] <= attended[:, :-1]).all()):
            # Padding on the left or in between: mask it out, and count positions from the first attended token.
            inputs["attention_mask"] = attention_mask
            if "position_ids" in inspect.signature(self.model.forward).parameters:
                inputs["position_ids"] = (attended.cumsum(-1) - 1).clamp(min=0)
        # Padding on the right needs no mask: a causal decoder never looks ahead, and pads are not read out.
        return self.model(**inputs).last_hidden_state[rows, last]

    def _mask_from_ids(self, input_ids: Tensor) -> Tensor:
        pad, eos = self.config.pad_token_id, self.config.eos_token_id
        if pad is None:
            if input_ids.shape[0] > 1:
                raise DataError("a batch without attention_mask needs config.pad_token_id; pass attention_mask")
            return torch.ones_like(input_ids)
        if pad in (eos if isinstance(eos, list) else [eos]) and bool((input_ids == pad).any()):
            raise DataError(f"pad_token_id equals eos_token_id ({pad}), so padding cannot be told from the end of a "
                            "text; pass attention_mask")
        return (input_ids != pad).long()

    def _output(self, output: RewardOutput, return_dict: bool | None):
        return output.to_tuple() if return_dict is False else output


class SarmForSequenceClassification(_RewardModel):
    """SARM: r = sum_i w_i z_i with z the TopK sparse code of the last token's layer-l state (paper eqs. 6, 7, 9).

    Parts: ``model`` (decoder cut after layer l, final norm removed), ``sae`` (`TopKSAE`, frozen unless the config says
    otherwise) and ``score`` (Linear(M, 1) without bias, starts at zero).  The SAE runs on one vector per sequence.
    """

    config_class = SarmConfig

    def __init__(self, config: SarmConfig):
        super().__init__(config)
        strip_final_norm(self.model)
        if config.n_features is None or config.k is None:
            raise ConfigError("SarmConfig needs n_features (M) and k")
        self.sae = TopKSAE(config.hidden_size, config.n_features, config.k, encoder_bias=config.encoder_bias,
                           relu=config.relu, normalize=config.normalize)
        self.score = nn.Linear(config.n_features, 1, bias=False)
        self.post_init()
        self.freeze()

    @classmethod
    def from_backbone_and_sae(cls, backbone_path, sae: TopKSAE | str | os.PathLike, layer: int | None = None, *,
                              topk: bool = True, encoder: str = "sae", frozen_sae: bool = True,
                              **load_kwargs) -> SarmForSequenceClassification:
        """SARM before reward training: a pretrained decoder cut after `layer` and a pretrained SAE, head at zero.

        `backbone_path` is a folder, a hub id or a backbone from `load_backbone`; `sae` a `TopKSAE` (copied) or its
        folder.  `layer=None` is half depth.  `load_kwargs` go to `load_backbone` (revision, dtype, ...).
        """
        backbone = _backbone(backbone_path, layer, load_kwargs)
        sae = copy.deepcopy(sae) if isinstance(sae, TopKSAE) else TopKSAE.load(sae)
        width = backbone.config.hidden_size
        if sae.d_model != width:
            raise ModelError(f"the SAE reads states of size {sae.d_model}, but the backbone has hidden_size {width}")
        settings = {name: value for name, value in sae.settings().items() if name != "d_model"}
        config = SarmConfig(backbone.config, topk=topk, encoder=encoder, frozen_sae=frozen_sae, **settings)
        with torch.device("meta"):
            model = cls(config)
        model.model, model.sae = backbone, sae.to(backbone.device, backbone.dtype)
        model.score = _zero_head(sae.n_features, backbone)
        model.freeze()
        return model.eval()

    @classmethod
    def from_backbone_with_random_encoder(cls, backbone_path, layer: int | None = None, *, n_features: int, k: int,
                                          seed: int = 0, topk: bool = True, frozen_sae: bool = True, relu: bool = True,
                                          encoder_bias: bool = False, **load_kwargs) -> SarmForSequenceClassification:
        """The paper's ablation "SAE Encoder with Random Init" (Table 2): the same model, encoder rows random.

        The paper does not say whether its random layer was trained.  Here it is frozen like the SAE it replaces;
        train it with ``RewardTrainConfig(mode=3, rec_coef=0)``.
        """
        backbone = _backbone(backbone_path, layer, load_kwargs)
        sae = TopKSAE(backbone.config.hidden_size, n_features, k, encoder_bias=encoder_bias, relu=relu,
                      generator=torch.Generator().manual_seed(seed))
        return cls.from_backbone_and_sae(backbone, sae, topk=topk, encoder="random", frozen_sae=frozen_sae)

    def freeze(self) -> None:
        self.sae.requires_grad_(not self.config.frozen_sae)

    def sae_hash(self) -> str:
        """sha256 of the encoder's settings and weights: equal before and after training when it is frozen."""
        return self.sae.content_hash()

    def encode(self, hidden: Tensor) -> SparseCode:
        """z (eq. 7) of raw hidden states [B, d]; without TopK every one of the M activations is kept."""
        if self.config.topk:
            return self.sae.encode(hidden)
        values = self.sae.preactivations(hidden)
        values = values.relu() if self.config.relu else values
        return SparseCode(torch.arange(values.shape[-1], device=values.device).expand_as(values), values,
                          values.shape[-1])

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                return_dict: bool | None = None, **kwargs) -> RewardOutput:
        """Rewards of a batch: int64 [B, T] -> logits [B, 1] (eq. 9), code, hidden [B, d].

        Further keyword arguments (use_cache, token_type_ids, labels, ...) are accepted and ignored.
        """
        if input_ids is None:
            raise DataError("input_ids are needed; rewards are not defined on inputs_embeds here")
        hidden = self.reward_state(input_ids, attention_mask)
        code = self.encode(hidden)
        weights = self.score.weight[0][code.indices] if self.config.topk else self.score.weight[0]
        logits = (code.values.float() * weights.float()).sum(-1, keepdim=True)
        return self._output(RewardOutput(logits=logits, code=code, hidden=hidden), return_dict)


class ScalarRewardModel(_RewardModel):
    """The conventional reward model: final norm kept, r = v . norm(x_last), bias-free head that starts at zero."""

    config_class = ScalarRewardConfig

    def __init__(self, config: ScalarRewardConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone_path, layer: int | str | None = None, **load_kwargs) -> ScalarRewardModel:
        """A decoder of `layer` layers (None: half depth, as SARM; "full": all) with its final norm and a zero head."""
        if layer == "full":
            hub = {name: value for name, value in load_kwargs.items() if name != "dtype"}
            layer = n_layers(_from_hub(AutoConfig, backbone_path, **hub))
        backbone = _backbone(backbone_path, layer, {**load_kwargs, "keep_final_norm": True})
        with torch.device("meta"):
            model = cls(ScalarRewardConfig(backbone.config))
        model.model, model.score = backbone, _zero_head(backbone.config.hidden_size, backbone)
        return model.eval()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                return_dict: bool | None = None, **kwargs) -> RewardOutput:
        """Rewards of a batch: int64 [B, T] -> logits [B, 1] float32, hidden [B, d] (after the final norm)."""
        if input_ids is None:
            raise DataError("input_ids are needed; rewards are not defined on inputs_embeds here")
        hidden = self.reward_state(input_ids, attention_mask)
        return self._output(RewardOutput(logits=self.score(hidden).float(), hidden=hidden), return_dict)


def _backbone(path, layer: Any, load_kwargs: dict) -> PreTrainedModel:
    if not isinstance(path, PreTrainedModel):
        return load_backbone(path, layer, **load_kwargs)
    if layer is not None and layer != n_layers(path.config):
        raise ConfigError(f"layer={layer}, but the given backbone has {n_layers(path.config)} layers")
    return path


def _zero_head(width: int, backbone: PreTrainedModel) -> nn.Linear:
    head = nn.Linear(width, 1, bias=False, device=backbone.device, dtype=backbone.dtype)
    nn.init.zeros_(head.weight)
    return head


def export_with_code(model: SarmForSequenceClassification, folder: str | os.PathLike) -> Path:
    """Save a SARM with a self-contained modeling file, so that it loads without sarmlib.

    ``AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`` then gives the same rewards.
    Save the tokenizer into the same folder.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_sarm.SarmConfig",
                          "AutoModelForSequenceClassification": "modeling_sarm.SarmForSequenceClassification"}
    source = Path(__file__).with_name("modeling_sarm.py").read_text()
    write_atomic(folder / "modeling_sarm.py", lambda path: path.write_text(source))
    write_atomic(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    return folder


for _config, _model in ((SarmConfig, SarmForSequenceClassification), (ScalarRewardConfig, ScalarRewardModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForSequenceClassification.register(_config, _model, exist_ok=True)
