"""The reward models: the function they compute, what they save, and what they refuse."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.sae.topk import TopKSAE
from sarmlib.sarm.model import SarmForSequenceClassification, ScalarRewardModel, export_with_code
from tests.tiny import ROWS, VOCAB, padded, tiny_backbone, tiny_config, tiny_sarm

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=VOCAB,
             pad_token_id=0, bos_token_id=2, eos_token_id=5, max_position_embeddings=128)
GROUPED = ("Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3Text")
ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32)


def config_of(family: str, window: int = 64, **sizes):
    """A small decoder of any family; the grouped ones share keys and values among heads, most within a window."""
    extra = dict(num_key_value_heads=2, head_dim=8, sliding_window=window) if family in GROUPED else {}
    return getattr(transformers, f"{family}Config")(**SIZES | sizes, **extra)


FAMILIES = {
    "llama": lambda: tiny_config(4, rope_scaling=ROPE),
    "qwen3": lambda: config_of("Qwen3"),
    "mistral": lambda: config_of("Mistral", 4),
    "gemma3": lambda: config_of("Gemma3Text", 4),
    "gpt_neox": lambda: config_of("GPTNeoX"),
}


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


def test_without_a_mask_pads_are_found_by_id_unless_they_may_be_text():
    model = tiny_sarm()
    alone = torch.cat([model(torch.tensor([row])).logits for row in ROWS])
    ids, mask = padded(ROWS)
    torch.testing.assert_close(model(ids).logits, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(ids[:1]).logits, alone[:1], atol=1e-5, rtol=1e-4)  # one padded row
    model.config.pad_token_id = 5
    ids, mask = padded(ROWS, pad=5)
    torch.testing.assert_close(model(ids, mask).logits, alone, atol=1e-5, rtol=1e-4)
    for pad in (5, None):
        model.config.pad_token_id = pad
        with pytest.raises(DataError, match="pass attention_mask"):
            model(ids)
    with pytest.raises(DataError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))


@pytest.mark.parametrize("scalar", [False, True])
def test_outputs_are_those_of_a_transformers_classifier(scalar):
    model = ScalarRewardModel.from_backbone(AutoModel.from_config(tiny_config())) if scalar else tiny_sarm()
    model.score.weight.data.normal_()
    ids, mask = padded(ROWS)
    model.set_attn_implementation("eager")
    targets = torch.tensor([0.5, 1.0, -1.0])
    output = model(ids, mask, labels=targets, output_hidden_states=True, output_attentions=True, use_cache=True)
    assert output.logits.shape == (3, 1) and (output.code is None) == scalar
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - targets).square().mean())
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    assert torch.equal(output.hidden_states[-1][0, 3], output.hidden[0])
    plain = model(ids, mask, token_type_ids=ids)
    assert plain.loss is None and plain.hidden_states is None and torch.equal(plain.logits, output.logits)
    assert torch.equal(model(ids, mask, return_dict=False)[0], output.logits)
    assert torch.equal(model.reward_state(ids, mask), output.hidden)
    output.loss.backward()
    assert model.score.weight.grad.any()
    model.config.output_hidden_states = True
    assert model(ids).hidden_states is not None and model(ids, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


def test_loading_freezes_the_encoder_again_although_transformers_does_not(tmp_path):
    tiny_sarm().save_pretrained(tmp_path)
    for model in (SarmForSequenceClassification.from_pretrained(pretrained_model_name_or_path=tmp_path),
                  AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        assert not any(p.requires_grad for p in model.sae.parameters())
        assert all(p.requires_grad for p in model.model.parameters()) and model.score.weight.requires_grad
    model.config.frozen_sae = False
    model.save_pretrained(tmp_path)
    assert all(p.requires_grad for p in SarmForSequenceClassification.from_pretrained(tmp_path).sae.parameters())


@pytest.mark.parametrize("k", [4, None])
def test_the_encoder_stays_in_float32_beside_a_decoder_in_bfloat16(k, tmp_path):
    model = tiny_sarm(head=0.1, k=k)
    if k is None:
        model.sae.threshold.fill_(0.3)  # which bfloat16 does not hold
    model.save_pretrained(tmp_path / "sarm")
    half = SarmForSequenceClassification.from_pretrained(tmp_path / "sarm", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.sae_hash() == model.sae_hash()
    assert half.score.weight.dtype == torch.float32 and half.score.weight.equal(model.score.weight)
    AutoModel.from_config(tiny_config()).save_pretrained(tmp_path / "base")
    fresh = SarmForSequenceClassification.from_backbone_and_sae(tmp_path / "base", model.sae, 1, dtype=torch.bfloat16)
    assert fresh.dtype == torch.bfloat16 and fresh.sae.W_enc.dtype == torch.float32
    output = half(*padded(ROWS))
    torch.testing.assert_close(output.code.values, model.sae.encode(output.hidden.float()).values)


def test_config_stores_everything_and_the_old_rope_keys(tmp_path):
    tiny_sarm(FAMILIES["llama"](), relu=False, encoder_bias=True).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    wanted = dict(model_type="sarm", layer=4, n_features=64, k=4, topk=True, relu=False, encoder_bias=True,
                  normalize=True, frozen_sae=True, hidden_size=32, pad_token_id=0)
    assert {name: stored[name] for name in wanted} == wanted and list(stored["id2label"]) == ["0"]
    rope = stored["backbone_config"]
    assert rope["rope_theta"] == rope["rope_parameters"]["rope_theta"]
    assert rope["rope_scaling"]["rope_type"] == "llama3" and rope["rope_scaling"]["factor"] == 8.0
    two = tiny_sarm(FAMILIES["gemma3"]()).config.to_dict()["backbone_config"]  # with two kinds of layers
    assert two["rope_theta"] == two["rope_parameters"]["full_attention"]["rope_theta"]
    assert two["rope_local_base_freq"] == two["rope_parameters"]["sliding_attention"]["rope_theta"]


@pytest.mark.parametrize("change, error, match", [
    ({"layer": 2}, ConfigError, "layer=2 but backbone_config has 3"), ({"k": 99}, ConfigError, "k=99"),
    ({"k": "4"}, ConfigError, "k='4'"), ({"k": None}, ModelError, r"missing keys.*sae\.threshold"),
    *(({name: value}, ConfigError, f"{name}={value!r}.*true or false") for name, value in (
        ("relu", "false"), ("topk", "no"), ("normalize", 0), ("encoder_bias", "no"))),
    ({"id2label": {"0": "a", "1": "b"}}, ConfigError, "num_labels=2"),
    ({"n_features": 32}, ModelError, r"mismatched keys.*sae\.W_dec"),
    (2, ModelError, r"unexpected keys.*model\.layers\.2\."), (4, ModelError, r"missing keys.*model\.layers\.3\.")])
def test_settings_that_the_checkpoint_does_not_have_are_refused(tmp_path, change, error, match):
    tiny_sarm().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    if isinstance(change, int):  # a consistent config of another depth
        change = {"layer": change, "backbone_config": {**config["backbone_config"], "num_hidden_layers": change}}
    file.write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=match):
        SarmForSequenceClassification.from_pretrained(tmp_path)


def test_random_encoder_is_frozen_and_drawn_by_seed_a_given_sae_is_copied_and_the_head_starts_at_zero():
    backbone, build = tiny_backbone(), SarmForSequenceClassification.from_backbone_with_random_encoder
    one, two, other = (build(backbone, n_features=64, k=4, seed=seed).sae_hash() for seed in (0, 0, 1))
    assert one == two != other
    with pytest.raises(ModelError, match="size 16, but the backbone has hidden_size 32"):
        SarmForSequenceClassification.from_backbone_and_sae(backbone, TopKSAE(16, 64, 4))
    with pytest.raises(ConfigError, match="layer=1"):
        build(backbone, 1, n_features=64, k=4)
    sae = TopKSAE(32, 64, 7)
    model = SarmForSequenceClassification.from_backbone_and_sae(backbone, sae)
    assert model.sae_hash() == sae.content_hash() and model.config.k == 7
    assert not model.score.weight.any() and not SarmForSequenceClassification(model.config).score.weight.any()
    model.sae.W_enc.data[3, 7] += 1e-7 + model.sae.W_enc.data[3, 7].abs() * 1e-6
    assert model.sae_hash() != sae.content_hash() and not model.sae.W_enc.requires_grad


@pytest.mark.parametrize("layer, depth", [(None, 2), (4, 4)])
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
        states = states.last_hidden_state if depth == 4 else base.norm(states.hidden_states[depth])
    last = torch.stack([states[i, len(row) - 1] for i, row in enumerate(ROWS)])
    torch.testing.assert_close(output.logits, last @ model.score.weight.T, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "rm")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert isinstance(again, ScalarRewardModel) and torch.equal(again(*padded(ROWS)).logits, output.logits)


ALONE = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sarmlib":
            raise ImportError("sarmlib is not installed here")
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForSequenceClassification
ids, mask = (torch.tensor(x) for x in json.loads(sys.argv[1]))
models = [AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True) for name in "abc"]
assert not any(p.requires_grad for m in models for p in m.sae.parameters())
print(json.dumps([m(*x, use_cache=True).logits.tolist() for x in ((ids, mask), (ids,)) for m in models]))
"""


def test_exported_models_load_without_the_package(tmp_path):
    """The code beside the weights is this package's own, and complete."""
    models = [tiny_sarm(FAMILIES["llama"]()), tiny_sarm(topk=False, relu=False, encoder_bias=True), tiny_sarm(k=None)]
    models[2].sae.threshold.fill_(0.4)
    for name, model in zip("abc", models, strict=True):
        export_with_code(model, tmp_path / name)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)  # ours, in spite of the code
        assert type(again) is type(model) and again.sae_hash() == model.sae_hash()
    ids, mask = padded(ROWS)
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", ALONE, json.dumps([ids.tolist(), mask.tolist()])], check=True,
                          capture_output=True, text=True, env=env, cwd=tmp_path)
    for found, model in zip(json.loads(done.stdout.splitlines()[-1]), models * 2, strict=True):
        torch.testing.assert_close(torch.tensor(found), model(ids, mask).logits, atol=1e-5, rtol=0)


def test_resized_embeddings_survive_saving(tmp_path):
    model = tiny_sarm()
    model.resize_token_embeddings(VOCAB + 8)
    model.save_pretrained(tmp_path)
    loaded = SarmForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.tensor([[VOCAB + 3, 5, 6]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_head_that_others_replaced_is_called():
    model, ids = tiny_sarm(), torch.tensor([[5, 6, 7]])
    plain = model(ids).logits
    model.score = torch.nn.Sequential(model.score)  # as an adapter would
    torch.testing.assert_close(model(ids).logits, plain)
    model(ids).logits.sum().backward()
    assert model.score[0].weight.grad.any()
