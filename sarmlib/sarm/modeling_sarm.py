"""SARM in one file, for people without sarmlib: `export_with_code` copies it beside the weights.

    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)     transformers 4.57 and 5

Scoring only; the same numbers as `SarmForSequenceClassification`.  Equations 4, 6, 7 and 9 of the SARM paper.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f")


class SarmConfig(PretrainedConfig):
    model_type = "sarm"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(self, backbone_config=None, n_features=None, k=None, encoder_bias=False, relu=True, normalize=True,
                 topk=True, pad_token_id=None, **kwargs):
        if isinstance(backbone_config, dict):
            settings = dict(backbone_config)
            backbone_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        self.backbone_config = backbone_config
        self.n_features, self.k, self.encoder_bias = n_features, k, encoder_bias
        self.relu, self.normalize, self.topk = relu, normalize, topk
        super().__init__(pad_token_id=pad_token_id, **kwargs)
        self.pad_token_id = pad_token_id


class Encoder(nn.Module):
    """Sparse autoencoder; the decoder is carried along but not used for scoring."""

    def __init__(self, config):
        super().__init__()
        d, m = config.backbone_config.hidden_size, config.n_features
        self.W_enc, self.W_dec = nn.Parameter(torch.zeros(m, d)), nn.Parameter(torch.zeros(m, d))
        self.b_pre = nn.Parameter(torch.zeros(d))
        self.b_enc = nn.Parameter(torch.zeros(m)) if config.encoder_bias else None


class SarmForSequenceClassification(PreTrainedModel):
    config_class = SarmConfig
    base_model_prefix = "model"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.model = AutoModel.from_config(config.backbone_config)
        name = next((name for name in FINAL_NORMS if isinstance(getattr(self.model, name, None), nn.Module)), None)
        if name is None:
            raise ValueError(f"no final norm found in {type(self.model).__name__}")
        setattr(self.model, name, nn.Identity())
        self.sae = Encoder(config)
        self.score = nn.Linear(config.n_features, 1, bias=False)
        self.post_init()

    def _init_weights(self, module):
        pass

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            raise ValueError(f"missing weights: {sorted(info['missing_keys'])[:5]}")
        model.sae.requires_grad_(False)
        return (model, info) if output_loading_info else model

    def forward(self, input_ids=None, attention_mask=None, return_dict=None, **kwargs):
        if attention_mask is None:
            if input_ids.shape[0] > 1 and self.config.pad_token_id is None:
                raise ValueError("a batch without attention_mask needs config.pad_token_id")
            attention_mask = torch.ones_like(input_ids) if input_ids.shape[0] == 1 else input_ids != \
                self.config.pad_token_id
        attended = attention_mask != 0
        hidden = self.model(input_ids=input_ids, attention_mask=attended.long(), use_cache=False).last_hidden_state
        last = attended.shape[1] - 1 - attended.flip(1).int().argmax(1)
        x = hidden[torch.arange(len(last), device=last.device), last]
        if self.config.normalize:
            x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
        z = nn.functional.linear(x - self.sae.b_pre, self.sae.W_enc, self.sae.b_enc)
        weights = self.score.weight[0].expand_as(z)
        if self.config.topk:
            z, indices = z.topk(self.config.k, dim=-1)
            weights = weights.gather(-1, indices)
        z = z.relu() if self.config.relu else z
        logits = (z.float() * weights.float()).sum(-1, keepdim=True)
        return (logits,) if return_dict is False else SequenceClassifierOutputWithPast(logits=logits)
