"""The cut backbone equals the full model's hidden_states[l], for several families, and refuses what it cannot do."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from sarmlib.backbone import check_positions, cut_config, load_backbone, n_layers, strip_final_norm
from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.extractor import ActivationExtractor
from sarmlib.sae.topk import TopKSAE
from sarmlib.sarm.model import SarmForSequenceClassification, ScalarRewardModel
from tests.test_sarm_model import config_of
from tests.tiny import tiny_tokenizer


def tiny_model(family: str):
    """Random full-depth decoder with a head, whose final norm is far from the identity."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, 8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral", "GPTNeoX", "Gemma2"])
@pytest.mark.parametrize("loaded", [False, True])
def test_cut_backbone_equals_hidden_states(loaded, family, tmp_path):
    full = tiny_model(family)
    full.save_pretrained(tmp_path)
    input_ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    mask[1, 12:] = 0
    states = full(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states

    def cut(layer, **settings):
        backbone = load_backbone(full if loaded else tmp_path, layer, **settings)
        hidden = backbone(input_ids, attention_mask=mask).last_hidden_state[mask.bool()]
        next(backbone.parameters()).zero_()  # a copy: a given model stays as it is
        return hidden

    for layer in (1, 3):
        assert torch.equal(cut(layer), states[layer][mask.bool()])
    normed = cut(4, keep_final_norm=True)
    assert torch.equal(normed, states[4][mask.bool()]) and (cut(4) - normed).abs().max() > 0.1


def test_a_model_that_is_not_cut_is_refused_with_the_cure():
    full = tiny_model("Llama")
    for wrong, message in ((full, "LlamaForCausalLM has a head.*load_"),
                           (full.model, "has its final norm; pass load_backbone")):
        with pytest.raises(ModelError, match=message):
            SarmForSequenceClassification.from_backbone_and_sae(wrong, TopKSAE(32, 64, 4))
    with pytest.raises(ModelError, match="no final norm; pass load_backbone.*keep_final_norm=True"):
        ScalarRewardModel.from_backbone(load_backbone(full, 2))
    with pytest.raises(ModelError, match="has a head"):
        ActivationExtractor(full, tiny_tokenizer())


def test_weights_above_are_not_needed_but_weights_below_are(tmp_path):
    tiny_model("Llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    below = {name: tensor for name, tensor in weights.items() if "layers.2" not in name and "layers.3" not in name}
    save_file(below, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_backbone(tmp_path, 2, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ModelError, match=r"layers\.2"):
        load_backbone(tmp_path, 3)


def test_cut_config_copies_shortens_layer_lists_and_checks_the_layer():
    config = config_of("Gemma2")
    cut = cut_config(config, 3)
    assert n_layers(cut_config(config)) == 2  # half depth
    assert (n_layers(cut), len(cut.layer_types)) == (3, 3)
    assert (n_layers(config), len(config.layer_types)) == (4, 4)
    for layer in (0, 5, -1, 2.0, True):
        with pytest.raises(ConfigError, match=r"1\.\.4"):
            cut_config(config, layer)


def test_a_row_longer_than_a_table_of_positions_is_refused_by_name():
    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8)
    for name, words in (("GPT2", "'gpt2' has 8 positions"), ("OPT", "'opt' has 8 positions")):
        model = load_backbone(AutoModel.from_config(getattr(transformers, f"{name}Config")(**sizes)), 1)
        check_positions(model, 8)
        with pytest.raises(DataError, match=f"9 tokens, {words}; cut"):
            check_positions(model, 9)
    check_positions(tiny_model("Llama"), 10**6)  # rotary


def test_unknown_family_is_refused_by_name():
    bert = AutoModel.from_config(config_of("Bert"))
    with pytest.raises(ModelError, match="BertModel.*'bert'"):
        strip_final_norm(bert)
    with pytest.raises(ModelError, match="encoder-decoder"):
        cut_config(transformers.T5Config())
