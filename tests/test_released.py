"""Official checkpoints: settings, weights, and parity with recorded outputs of the released code."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sarmlib.errors import ConfigError, ModelError
from sarmlib.sae.formats import load_official
from sarmlib.sarm.model import SarmForSequenceClassification
from sarmlib.sarm.released import load_released, merge_official, official_settings
from sarmlib.sarm.training import RewardTrainConfig, preference_loss, set_trainable
from tests.helpers import shared_path

GOLDEN = "data/golden/sarm_official_tiny"


@pytest.fixture(scope="module")
def golden():
    folder = shared_path(GOLDEN)
    return folder, json.loads((folder / "inputs.json").read_text()), json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="module")
def models(golden):
    return {top_k: load_released(golden[0], layer=4, k=3, top_k=top_k) for top_k in (True, False)}


def batch_of(inputs, name):
    case = next(case for case in inputs["cases"] if case["name"] == name)
    return torch.tensor(case["input_ids"]), torch.tensor(case["attention_mask"])


def test_rewards_codes_and_states_equal_the_released_code(golden, models):
    _, inputs, expected = golden
    for name, case in expected["cases"].items():
        for top_k, key in ((True, "logit_topk"), (False, "logit_no_topk")):
            with torch.inference_mode():
                output = models[top_k](*batch_of(inputs, name))
            wanted = torch.tensor([row[key] for row in case["rows"]])
            torch.testing.assert_close(output.logits[:, 0], wanted, atol=1e-5, rtol=0)
            wanted = torch.tensor([row["hidden_last"] for row in case["rows"]])
            torch.testing.assert_close(output.hidden, wanted, atol=2e-5, rtol=0)
            if top_k:
                assert output.code.indices.tolist() == [row["topk_indices"] for row in case["rows"]]
                wanted = torch.tensor([row["topk_values"] for row in case["rows"]])
                torch.testing.assert_close(output.code.values, wanted, atol=1e-5, rtol=0)


def test_rewards_in_bfloat16_agree_to_its_precision(golden):
    folder, inputs, expected = golden
    model = load_released(folder, layer=4, k=3, top_k=False, dtype=torch.bfloat16)
    for name, case in expected["bf16"]["cases"].items():
        with torch.inference_mode():
            logits = model(*batch_of(inputs, name)).logits[:, 0]
        torch.testing.assert_close(logits, torch.tensor(case["logit_no_topk"]), atol=3e-2, rtol=2e-2)


def test_a_batch_without_mask_counts_pads_by_id_as_the_released_code(golden, models):
    _, inputs, expected = golden
    ids, _ = batch_of(inputs, "batch_right_pad")
    wanted = torch.tensor(expected["behaviours"]["no_attention_mask_right_pad"]["value"])
    torch.testing.assert_close(models[False](ids).logits[:, 0], wanted, atol=1e-5, rtol=0)


def test_steering_by_head_weights_equals_the_released_steering(golden, models):
    _, inputs, expected = golden
    spec = expected["steering"]
    for top_k, key in ((True, "logits_topk"), (False, "logits_no_topk")):
        model, shift = models[top_k], 0.0
        original = model.score.weight.data.clone()
        for feature, (operation, value) in spec["steering"].items():
            weight = model.score.weight.data[0, int(feature)]
            if operation == "*":
                weight *= value
            else:
                shift += value * float(weight)  # z_i + v adds w_i v to every reward, also where z_i is inactive
        logits = model(*batch_of(inputs, spec["case"])).logits[:, 0] + shift
        model.score.weight.data.copy_(original)
        torch.testing.assert_close(logits, torch.tensor(spec[key]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode,topk,rec_level", [(0, False, False), (1, False, False), (1, True, False),
                                                 (3, True, True), (3, False, True)])
def test_three_training_steps_equal_the_released_code(golden, mode, topk, rec_level):
    folder, inputs, expected = golden
    run = next(run for run in expected["train"]["runs"]
               if (run["mode"], run["use_topk"], run["sequence_level"]) == (mode, topk, rec_level))
    model = load_released(folder, layer=4, k=3, top_k=topk)
    ids, mask = batch_of(inputs, "pairs_train")
    order = [0, 2, 1, 3]  # recorded as chosen, rejected, chosen, rejected; ours has all chosen first
    batch = {"input_ids": ids[order], "attention_mask": mask[order]}
    set_trainable(model, mode)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.001)
    config = RewardTrainConfig(mode=mode, rec_coef=1.0)
    names = {"sae.b_pre": "sae.pre_bias", "sae.b_enc": "sae.latent_bias", "sae.W_enc": "sae.encoder.weight",
             "sae.W_dec": "sae.decoder.weight"}
    for step in run["steps"]:
        losses, rewards = preference_loss(model, batch, config)
        torch.testing.assert_close(rewards[[0, 2, 1, 3]], torch.tensor(step["rewards"]), atol=1e-5, rtol=3e-5)
        assert losses.mean().item() == pytest.approx(step["loss"], abs=1e-5)
        optimizer.zero_grad()
        losses.mean().backward()
        norms = {names.get(name, name): float(parameter.grad.norm()) for name, parameter in model.named_parameters()
                 if parameter.grad is not None}
        for name, norm in step["grad_norms"].items():
            assert norms[name] == pytest.approx(norm, abs=2e-5, rel=1e-5), name
        optimizer.step()
    with torch.inference_mode():
        rewards = model(ids, mask).logits[:, 0]
    torch.testing.assert_close(rewards, torch.tensor(run["rewards_after_3_steps"]), atol=1e-5, rtol=3e-5)


def test_round_trip_through_our_own_format(golden, models, tmp_path):
    _, inputs, _ = golden
    models[True].save_pretrained(tmp_path)
    again = SarmForSequenceClassification.from_pretrained(tmp_path)
    case = batch_of(inputs, "batch_right_pad")
    assert torch.equal(again(*case).logits, models[True](*case).logits)
    assert again.sae_hash() == models[True].sae_hash()
    assert not again.sae.W_enc.requires_grad and again.score.weight.requires_grad


def test_merge_of_base_and_sae_gives_the_released_features(golden, models):
    folder, inputs, _ = golden
    sae_file = folder / "base" / "sae_sequence_Latent1024_Layer4_K3_tiny.pt"
    merged = merge_official(folder / "base", sae_file)
    case = batch_of(inputs, "batch_right_pad")
    ours, theirs = merged(*case), models[True](*case)
    assert torch.equal(ours.code.indices, theirs.code.indices) and torch.equal(ours.hidden, theirs.hidden)
    assert not ours.logits.any() and merged.config.layer == 4
    assert merged.sae_hash() == load_official(sae_file).content_hash()


def write_official(folder, golden, name, change_config=None, change_state=None):
    target = folder / name
    target.mkdir()
    config = json.loads((golden[0] / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **(change_config or {})}))
    if change_state is None:
        shutil.copy(golden[0] / "model.safetensors", target / "model.safetensors")
    else:
        state = load_file(golden[0] / "model.safetensors")
        save_file(change_state(state), target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_settings_come_from_the_name_the_config_or_arguments(golden, tmp_path):
    named = write_official(tmp_path, golden, "Llama_Latent1024_Layer4_K3_50M-TopK")
    assert official_settings(named) | {"source": None} == dict(layer=4, k=3, n_features=1024, top_k=True, source=None)
    without = write_official(tmp_path, golden, "Llama_Latent1024_Layer4_K3_50M-woTopK")
    assert official_settings(without)["top_k"] is False
    assert official_settings(without, top_k=True)["top_k"] is True
    param = {"sae_source_layer": 4, "sae_latent_size": 1024, "sae_k": 3, "sarm_use_activation": True}
    stored = write_official(tmp_path, golden, "plain", {"sarm_param": param, "auto_map": {"AutoModel": "evil.Evil"}})
    assert official_settings(stored)["source"]["k"] == "config.json"
    case = batch_of(golden[1], "single_3")
    for path in (named, stored):
        row = golden[2]["cases"]["single_3"]["rows"][0]
        assert load_released(path)(*case).logits.item() == pytest.approx(row["logit_topk"], abs=1e-5)
    assert load_released(without)(*case).logits.item() == pytest.approx(row["logit_no_topk"], abs=1e-5)


def test_missing_or_contradicting_settings_are_refused_by_name(golden, tmp_path):
    plain = write_official(tmp_path, golden, "plain")
    with pytest.raises(ConfigError, match="layer, k, top_k"):
        load_released(plain)
    with pytest.raises(ConfigError, match="layer=9"):
        load_released(plain, layer=9, k=3, top_k=True)
    named = write_official(tmp_path, golden, "x_Latent1024_Layer4_K3_TopK")
    with pytest.raises(ConfigError, match="k=5"):
        load_released(named, k=5)
    wide = write_official(tmp_path, golden, "x_Latent2048_Layer4_K3_TopK")
    with pytest.raises(ConfigError, match="2048"):
        load_released(wide)
    with pytest.raises(ModelError, match="not a local folder"):
        load_released(tmp_path / "absent")


def test_too_deep_a_layer_is_missing_weights_not_random_ones(golden):
    with pytest.raises(ModelError, match=r"missing keys.*layers\.4"):
        load_released(golden[0], layer=5, k=3, top_k=True)


def test_missing_and_unexpected_tensors_are_refused(golden, tmp_path):
    lacking = write_official(tmp_path, golden, "a", None,
                             lambda state: {n: t for n, t in state.items() if n != "sae.latent_bias"})
    with pytest.raises(ModelError, match="b_enc"):
        load_released(lacking, layer=4, k=3, top_k=True)
    extra = write_official(tmp_path, golden, "b", None, lambda state: {**state, "score.bias": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"score\.bias"):
        load_released(extra, layer=4, k=3, top_k=True)
