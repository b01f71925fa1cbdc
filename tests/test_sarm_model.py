"""The reward models: the function they compute, what they save, and what they refuse."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    MistralConfig,
    Qwen3Config,
)

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.sae.model import TopKSAE
from sarmlib.sarm.model import SarmConfig, SarmForSequenceClassification, ScalarRewardModel, export_with_code
from tests.helpers import ROOT
from tests.tiny import VOCAB, tiny_backbone, tiny_config, tiny_sarm

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=VOCAB,
             pad_token_id=0, bos_token_id=2, eos_token_id=5, max_position_embeddings=128)
GROUPED = dict(**SIZES, num_key_value_heads=2, head_dim=8)
FAMILIES = {
    "llama": lambda: tiny_config(4, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                                      high_freq_factor=4.0, original_max_position_embeddings=32)),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=4),
    "gemma2": lambda: Gemma2Config(**GROUPED, sliding_window=4),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, sliding_window=4),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
}


def padded(rows, side="right", pad=0):
    width = max(map(len, rows))
    fill = [[pad] * (width - len(row)) for row in rows]
    ids = [row + gap if side == "right" else gap + row for row, gap in zip(rows, fill, strict=True)]
    mask = [[1] * len(row) + [0] * len(gap) if side == "right" else [0] * len(gap) + [1] * len(row)
            for row, gap in zip(rows, fill, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


ROWS = [[2, 10, 11, 5], [2, 12, 5, 13, 14, 15, 16, 5], [2, 5]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_rewards_the_residual_stream_after_layer_l(family, tmp_path):
    torch.manual_seed(0)
    full = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    full.save_pretrained(tmp_path / "base")
    sae = TopKSAE(32, 64, 4, generator=torch.Generator().manual_seed(0))
    model = SarmForSequenceClassification.from_backbone_and_sae(tmp_path / "base", sae, layer=2)
    model.score.weight.data.normal_()
    for row in ROWS:
        output = model(*padded([row]))
        with torch.no_grad():
            state = full(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[2][:, -1]
        torch.testing.assert_close(output.hidden, state, atol=2e-6, rtol=1e-5)
        dense = sae.encode(state).dense()
        torch.testing.assert_close(output.logits, dense @ model.score.weight.detach().T, atol=2e-5, rtol=1e-4)
    alone = torch.cat([model(*padded([row])).logits for row in ROWS])
    for side in ("right", "left"):
        torch.testing.assert_close(model(*padded(ROWS, side)).logits, alone, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "sarm")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sarm")
    assert torch.equal(again(*padded(ROWS)).logits, model(*padded(ROWS)).logits)


def test_reward_is_the_sum_of_contributions_and_the_head_starts_at_zero():
    model = tiny_sarm()
    output = model(*padded(ROWS))
    by_hand = (output.code.dense() * model.score.weight[0]).sum(-1, keepdim=True)
    torch.testing.assert_close(output.logits, by_hand)
    assert (output.code.values >= 0).all() and (output.code.dense() > 0).sum(-1).max() <= 4
    fresh = SarmForSequenceClassification.from_backbone_and_sae(tiny_backbone(), TopKSAE(32, 64, 4))
    assert not fresh.score.weight.any()
    assert not SarmForSequenceClassification(fresh.config).score.weight.any()


def test_without_topk_the_reward_is_one_linear_function_of_the_normalised_state():
    model = tiny_sarm(topk=False, relu=False, encoder_bias=True)
    model.sae.b_enc.data.normal_()
    output = model(*padded(ROWS))
    x, w = model.sae.normalize(output.hidden)[0], model.score.weight[0]
    by_hand = (x - model.sae.b_pre) @ (model.sae.W_enc.T @ w) + w @ model.sae.b_enc
    torch.testing.assert_close(output.logits[:, 0], by_hand, atol=1e-4, rtol=1e-4)
    assert (tiny_sarm(topk=False)(*padded(ROWS)).code.values >= 0).all()  # relu on


def test_pad_equal_to_end_of_text_is_told_apart_by_the_mask_only():
    model = tiny_sarm()
    model.config.pad_token_id = 5
    alone = torch.cat([model(*padded([row])).logits for row in ROWS])
    ids, mask = padded(ROWS, pad=5)
    torch.testing.assert_close(model(ids, mask).logits, alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="attention_mask"):
        model(ids)
    model.config.pad_token_id = None
    with pytest.raises(DataError, match="pad_token_id"):
        model(ids)
    with pytest.raises(DataError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))


def test_extra_arguments_are_ignored_and_tuples_available():
    model, (ids, mask) = tiny_sarm(), padded(ROWS)
    output = model(input_ids=ids, attention_mask=mask, use_cache=True, token_type_ids=ids, labels=None)
    assert torch.equal(model(ids, mask, return_dict=False)[0], output.logits) and output.logits.shape == (3, 1)


def test_loading_freezes_the_encoder_again_although_transformers_does_not(tmp_path):
    tiny_sarm().save_pretrained(tmp_path)
    for model in (SarmForSequenceClassification.from_pretrained(tmp_path),
                  AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        assert not any(p.requires_grad for p in model.sae.parameters())
        assert all(p.requires_grad for p in model.model.parameters()) and model.score.weight.requires_grad
    model.config.frozen_sae = False
    model.save_pretrained(tmp_path)
    assert all(p.requires_grad for p in SarmForSequenceClassification.from_pretrained(tmp_path).sae.parameters())


def test_hash_sees_every_bit_and_the_given_sae_is_copied():
    sae = TopKSAE(32, 64, 4)
    model = SarmForSequenceClassification.from_backbone_and_sae(tiny_backbone(), sae)
    assert model.sae_hash() == sae.content_hash()
    model.sae.W_enc.data[3, 7] += 1e-7 + model.sae.W_enc.data[3, 7].abs() * 1e-6
    assert model.sae_hash() != sae.content_hash()


def test_config_stores_everything_and_the_old_rope_keys(tmp_path):
    model = tiny_sarm(FAMILIES["llama"](), relu=False, encoder_bias=True)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    wanted = dict(model_type="sarm", layer=4, n_features=64, k=4, topk=True, relu=False, encoder_bias=True,
                  normalize=True, encoder="sae", frozen_sae=True, hidden_size=32, pad_token_id=0)
    assert {name: stored[name] for name in wanted} == wanted and list(stored["id2label"]) == ["0"]
    rope = stored["backbone_config"]
    assert rope["rope_theta"] == rope["rope_parameters"]["rope_theta"]
    assert rope["rope_scaling"]["rope_type"] == "llama3" and rope["rope_scaling"]["factor"] == 8.0
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.backbone_config.rope_parameters == model.config.backbone_config.rope_parameters
    assert again.num_labels == 1 and again.layer == 4


def test_old_rope_keys_of_a_model_with_two_kinds_of_layers(tmp_path):
    tiny_sarm(FAMILIES["gemma3"]()).save_pretrained(tmp_path)
    backbone = json.loads((tmp_path / "config.json").read_text())["backbone_config"]
    rope = backbone["rope_parameters"]
    assert backbone["rope_theta"] == rope["full_attention"]["rope_theta"]
    assert backbone["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]


def tamper(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_unexpected_and_misshapen_weights_are_refused_by_name(tmp_path):
    for name, change, match in (
        ("missing", lambda s: s.pop("sae.b_pre"), r"missing keys.*sae\.b_pre"),
        ("extra", lambda s: s.update({"model.extra": torch.zeros(1)}), r"unexpected keys.*model\.extra"),
        ("shape", lambda s: s.update({"score.weight": torch.zeros(1, 65)}),
         r"mismatched keys.*score\.weight \(1, 65\), not \(1, 64\)"),
    ):
        tiny_sarm().save_pretrained(tmp_path / name)
        tamper(tmp_path / name, change)
        with pytest.raises(ModelError, match=match):
            SarmForSequenceClassification.from_pretrained(tmp_path / name)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="layer=2"):
        SarmConfig(backbone_config=tiny_config(3), layer=2, n_features=8, k=2)
    with pytest.raises(ConfigError, match="encoder='other'"):
        SarmConfig(encoder="other")
    with pytest.raises(ModelError, match="size 16"):
        SarmForSequenceClassification.from_backbone_and_sae(tiny_backbone(), TopKSAE(16, 64, 4))
    with pytest.raises(ConfigError, match="k=99"):
        SarmForSequenceClassification(SarmConfig(backbone_config=tiny_config(), n_features=64, k=99))
    with pytest.raises(ConfigError, match="layer=1"):
        SarmForSequenceClassification.from_backbone_and_sae(tiny_backbone(), TopKSAE(32, 64, 4), layer=1)


def test_random_encoder_is_the_same_model_with_random_rows():
    backbone = tiny_backbone()
    one, two, other = (SarmForSequenceClassification.from_backbone_with_random_encoder(
        backbone, n_features=64, k=4, seed=seed) for seed in (0, 0, 1))
    assert one.config.encoder == "random" and one.sae_hash() == two.sae_hash() != other.sae_hash()
    assert not one.sae.W_enc.requires_grad and not one.score.weight.any()
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in tiny_sarm().parameters())


def test_resized_embeddings_survive_a_round_trip(tmp_path):
    model = tiny_sarm()
    model.resize_token_embeddings(VOCAB + 3)
    model.save_pretrained(tmp_path)
    again = SarmForSequenceClassification.from_pretrained(tmp_path)
    assert again.get_input_embeddings().num_embeddings == VOCAB + 3
    assert torch.equal(again(*padded(ROWS)).logits, model(*padded(ROWS)).logits)


@pytest.mark.parametrize("layer,depth", [(None, 2), (3, 3), ("full", 4)])
def test_scalar_model_is_the_conventional_one(layer, depth, tmp_path):
    torch.manual_seed(0)
    base = AutoModel.from_config(tiny_config(4))
    base.norm.weight.data.uniform_(0.5, 2)
    base.save_pretrained(tmp_path / "base")
    model = ScalarRewardModel.from_backbone(tmp_path / "base", layer)
    assert not model.score.weight.any()
    model.score.weight.data.normal_()
    output = model(*padded(ROWS))
    with torch.no_grad():
        states = base(*padded(ROWS), output_hidden_states=True)
        if depth == 4:
            states = states.last_hidden_state
        else:
            states = base.norm(states.hidden_states[depth])
    last = torch.stack([states[i, len(row) - 1] for i, row in enumerate(ROWS)])
    torch.testing.assert_close(output.logits, last @ model.score.weight.T, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "rm")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert isinstance(again, ScalarRewardModel) and torch.equal(again(*padded(ROWS)).logits, output.logits)


def test_saved_models_load_in_a_fresh_process_without_and_with_the_package(tmp_path):
    rows, models = [[2, 10, 11, 5], [2, 12, 5]], [
        tiny_sarm(FAMILIES["llama"]()), tiny_sarm(topk=False, relu=False, encoder_bias=True)]
    for name, model in zip("ab", models, strict=True):
        export_with_code(model, tmp_path / name)
    code = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification
ids, mask = (torch.tensor(x) for x in json.loads(sys.argv[1]))
def rewards(**kwargs):
    models = [AutoModelForSequenceClassification.from_pretrained(name, **kwargs) for name in "ab"]
    frozen = [not p.requires_grad for m in models for p in m.sae.parameters()]
    return [m(*x, use_cache=True).logits.tolist() for x in ((ids, mask), (ids,)) for m in models], all(frozen)
first = rewards(trust_remote_code=True), "sarmlib" in sys.modules
import sarmlib.sarm.model
print(json.dumps([first, rewards()]))
"""
    ids, mask = padded(rows)
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, json.dumps([ids.tolist(), mask.tolist()])], capture_output=True,
                          text=True, env=env, cwd=tmp_path, check=True)
    ((alone, frozen), imported), (with_package, frozen_too) = json.loads(done.stdout.strip().splitlines()[-1])
    assert frozen and frozen_too and not imported
    for found in (alone, with_package):
        for got, model in zip(found, models * 2, strict=True):
            torch.testing.assert_close(torch.tensor(got), model(ids, mask).logits, atol=1e-5, rtol=0)
