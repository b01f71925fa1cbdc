"""Official checkpoints: settings, weights, and parity with recorded outputs of the released code."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sarmlib.errors import ConfigError, ModelError
from sarmlib.sae.formats import load_official
from sarmlib.sae.topk import TopKSAE, normalized_mse
from sarmlib.sarm.model import SarmForSequenceClassification
from sarmlib.sarm.released import load_released, official_settings, save_official
from sarmlib.sarm.steering import steer
from tests.helpers import shared_path
from tests.tiny import ROWS, padded, tiny_sarm


@pytest.fixture(scope="module")
def golden():
    folder = shared_path("data/golden/sarm_official_tiny")
    return folder, json.loads((folder / "inputs.json").read_text()), json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="module")
def models(golden):
    return {top_k: load_released(golden[0], layer=4, k=3, top_k=top_k) for top_k in (True, False)}


def batch_of(inputs, name):
    case = next(case for case in inputs["cases"] if case["name"] == name)
    return torch.tensor(case["input_ids"]), torch.tensor(case["attention_mask"])


def recorded(case, name):
    return torch.tensor([row[name] for row in case["rows"]])


def close(found, wanted, atol=1e-5, rtol=0.0):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol)


@torch.no_grad()
def test_rewards_codes_and_states_equal_the_released_code(golden, models):
    _, inputs, expected = golden
    sae = models[True].sae
    for name, case in expected["cases"].items():
        h = recorded(case, "hidden_last")
        for top_k, key in ((True, "logit_topk"), (False, "logit_no_topk")):
            output = models[top_k](*batch_of(inputs, name))
            close(output.logits[:, 0], recorded(case, key))
            close(output.hidden, h, atol=2e-5)
            close(models[top_k].reward(h)[0][:, 0], recorded(case, key), atol=2e-6)
        for code in (models[True](*batch_of(inputs, name)).code, sae.encode(h)):
            assert torch.equal(code.indices, recorded(case, "topk_indices"))
            close(code.values, recorded(case, "topk_values"), atol=5e-6)
        _, mean, std = sae.normalize(h)
        close(mean[:, 0], recorded(case, "mean"), atol=2e-6)
        close(std[:, 0], recorded(case, "std"), atol=0, rtol=2e-6)
        close(sae.preactivations(h)[:, :8], recorded(case, "pre_acts_first8"), atol=5e-6)
    ids, _ = batch_of(inputs, "batch_right_pad")  # without a mask, pads are counted by id
    wanted = torch.tensor(expected["behaviours"]["no_attention_mask_right_pad"]["value"])
    close(models[False](ids).logits[:, 0], wanted)


def test_losses_equal_the_released_code(golden):
    losses = golden[2]["losses"]
    x, x_hat = torch.tensor(losses["x"]), torch.tensor(losses["x_hat"])
    assert normalized_mse(x_hat, x).item() == pytest.approx(losses["normalized_mse"], rel=1e-5)
    close(TopKSAE(4, 8, 2).normalize(x)[0], torch.tensor(losses["pre_process_of_x"]["x"]), atol=2e-6)


def test_rewards_in_bfloat16_agree_to_its_precision(golden):
    folder, inputs, expected = golden
    model = load_released(folder, layer=4, k=3, top_k=False, dtype=torch.bfloat16)
    for name, case in expected["bf16"]["cases"].items():
        with torch.inference_mode():
            logits = model(*batch_of(inputs, name)).logits[:, 0]
        close(logits, torch.tensor(case["logit_no_topk"]), atol=3e-2, rtol=2e-2)


def test_steering_by_head_weights_equals_the_released_steering(golden, models):
    _, inputs, expected = golden
    spec = expected["steering"]
    factors, added = ({int(feature): value for feature, (operation, value) in spec["steering"].items()
                       if operation == one} for one in "*+")
    assert factors and added
    for top_k, key in ((True, "logits_topk"), (False, "logits_no_topk")):
        logits = steer(models[top_k], factors)(*batch_of(inputs, spec["case"])).logits[:, 0]
        for feature, value in added.items():  # z_i + v adds w_i v to every reward, also where z_i is inactive
            logits = logits + value * models[top_k].score.weight[0, feature]
        close(logits, torch.tensor(spec[key]))


@pytest.mark.parametrize("mode, topk, trained", [(0, False, "score"), (1, False, "score model"),
                                                 (1, True, "score model")])
def test_three_training_steps_equal_the_released_code(golden, mode, topk, trained):
    """Bradley-Terry (eq. 1) into the head (mode 0), and into head and decoder (mode 1)."""
    folder, inputs, expected = golden
    run = next(run for run in expected["train"]["runs"] if (run["mode"], run["use_topk"]) == (mode, topk))
    model = load_released(folder, layer=4, k=3, top_k=topk)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in trained)
    ids, mask = batch_of(inputs, "pairs_train")
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.001)
    for step in run["steps"]:
        rewards = model(ids, mask).logits[:, 0]  # chosen, rejected, chosen, rejected
        close(rewards, torch.tensor(step["rewards"]), rtol=3e-5)
        loss = -torch.nn.functional.logsigmoid(rewards[0::2] - rewards[1::2]).mean()
        assert loss.item() == pytest.approx(step["bt_loss"], abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        norms = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()
                 if parameter.grad is not None}
        for name, norm in step["grad_norms"].items():
            assert norms[name] == pytest.approx(norm, abs=2e-5, rel=1e-5), name
        optimizer.step()
    close(model(ids, mask).logits[:, 0], torch.tensor(run["rewards_after_3_steps"]), rtol=3e-5)


def test_base_and_sae_file_give_the_released_features(golden, models):
    """The authors' merge: first l layers of a base model, an SAE file, a zero head."""
    base, batch = golden[0] / "base", batch_of(golden[1], "batch_right_pad")
    sae = load_official(base / "sae_sequence_Latent1024_Layer4_K3_tiny.pt")
    assert (sae.k, sae.relu, sae.normalizes, sae.n_features) == (3, False, True, 1024)
    merged = SarmForSequenceClassification.from_backbone_and_sae(base, sae, layer=4)
    assert merged.sae_hash() == sae.content_hash() == models[True].sae_hash()
    ours, theirs = (model(*batch) for model in (merged, models[True]))
    assert torch.equal(ours.code.indices, theirs.code.indices) and torch.equal(ours.hidden, theirs.hidden)
    assert not ours.logits.any()


def test_our_own_model_in_the_official_layout(tmp_path):
    model = tiny_sarm()
    again = load_released(save_official(model, tmp_path / "official"))
    torch.testing.assert_close(again(*padded(ROWS)).logits, model(*padded(ROWS)).logits)
    assert again.config.k == 4 and again.config.layer == 3 and again.config.pad_token_id == 0
    for other in ({"normalize": False}, {"k": None}):
        with pytest.raises(ModelError, match="a normalising TopK SAE; this one is 'llama'"):
            save_official(tiny_sarm(**other), tmp_path / "other")


def write_official(folder, golden, name, **change):
    target = folder / name
    target.mkdir()
    config = json.loads((golden[0] / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **change}))
    shutil.copy(golden[0] / "model.safetensors", target / "model.safetensors")
    return target


def test_settings_come_from_the_name_the_config_or_arguments(golden, tmp_path):
    named = write_official(tmp_path, golden, "Llama_Latent1024_Layer4_K3_50M-TopK")
    assert official_settings(named) | {"source": None} == dict(layer=4, k=3, n_features=1024, top_k=True, source=None)
    without = write_official(tmp_path, golden, "Llama_Latent1024_Layer4_K3_50M-woTopK")
    assert official_settings(without)["top_k"] is False
    assert official_settings(without, top_k=True)["top_k"] is True
    param = {"sae_source_layer": 4, "sae_latent_size": 1024, "sae_k": 3, "sarm_use_activation": True}
    stored = write_official(tmp_path, golden, "plain", sarm_param=param, auto_map={"AutoModel": "evil.Evil"})
    assert official_settings(stored)["source"]["k"] == "config.json"
    case = batch_of(golden[1], "single_3")
    for path in (named, stored):
        row = golden[2]["cases"]["single_3"]["rows"][0]
        assert load_released(path)(*case).logits.item() == pytest.approx(row["logit_topk"], abs=1e-5)
    assert load_released(without)(*case).logits.item() == pytest.approx(row["logit_no_topk"], abs=1e-5)


LAYER_4 = {"layer": 4, "k": 3, "top_k": True}


@pytest.mark.parametrize("name, given, error, words", [
    ("plain", {}, ConfigError, "layer, k, top_k of"), ("plain", {**LAYER_4, "layer": 9}, ConfigError, "layer=9"),
    ("x_Latent1024_Layer4_K3_TopK", {"k": 5}, ConfigError, "k=5"),
    ("x_Latent2048_Layer4_K3_TopK", {}, ModelError, "mismatched.*2048"),
    ("plain", {**LAYER_4, "layer": 5}, ModelError, r"missing keys.*layers\.4")])
def test_missing_or_contradicting_settings_are_refused_by_name(name, given, error, words, golden, tmp_path):
    with pytest.raises(error, match=words):
        load_released(write_official(tmp_path, golden, name), **given)


@pytest.mark.parametrize("name, change", [("b_enc", lambda state: state.pop("sae.latent_bias")), (
    r"score\.bias", lambda state: state.update({"score.bias": torch.zeros(1)}))])
def test_missing_and_unexpected_tensors_and_an_absent_folder_are_refused(name, change, golden, tmp_path):
    folder = write_official(tmp_path, golden, "plain")
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name):
        load_released(folder, **LAYER_4)
    with pytest.raises(ModelError, match="not a local folder"):
        load_released(tmp_path / "absent")
