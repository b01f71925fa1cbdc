"""Foreign SAE files: exact round trips and clear refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sarmlib.errors import ConfigError, ModelError
from sarmlib.sae.formats import from_tensors, load_official, load_saelens, load_sparsify, save_official, save_saelens
from sarmlib.sae.model import TopKSAE
from tests.helpers import shared_path


def make(**options):
    sae = TopKSAE(6, 20, 3, generator=torch.Generator().manual_seed(0), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return sae


def states(n=50):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(2)) * 0.3


def test_official_round_trip_is_exact(tmp_path):
    sae = make(encoder_bias=True, relu=False)
    path = save_official(sae, tmp_path / "sae_Latent20_Layer4_K3_tiny.pt")
    assert load_official(path).content_hash() == sae.content_hash()
    assert load_official(path, k=5).k == 5
    state = torch.load(path, weights_only=True)
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "pre_bias": (6,), "latent_bias": (20,), "encoder.weight": (20, 6), "decoder.weight": (6, 20)
    }
    unbiased = load_official(save_official(make(relu=False), tmp_path / "x_K3_.pt"))
    assert torch.equal(unbiased.b_enc, torch.zeros(20))


def test_official_golden_file_gives_the_merged_checkpoints_weights():
    folder = shared_path("data/golden/sarm_official_tiny")
    sae = load_official(next((folder / "base").glob("*.pt")))
    merged = load_file(folder / "model.safetensors")
    assert (sae.k, sae.relu, sae.normalizes, sae.n_features) == (3, False, True, 1024)
    assert torch.equal(sae.W_enc, merged["sae.encoder.weight"]) and torch.equal(sae.b_enc, merged["sae.latent_bias"])
    assert torch.equal(sae.W_dec, merged["sae.decoder.weight"].T) and torch.equal(sae.b_pre, merged["sae.pre_bias"])


def test_official_refusals(tmp_path):
    with pytest.raises(ConfigError, match="pass k"):
        load_official(tmp_path / "sae.pt")
    with pytest.raises(ModelError, match="not a readable torch file"):
        load_official(tmp_path / "missing.pt", k=3)
    torch.save({"pre_bias": torch.zeros(3)}, tmp_path / "part.pt")
    with pytest.raises(ModelError, match="latent_bias"):
        load_official(tmp_path / "part.pt", k=3)
    torch.save({"pre_bias": make()}, tmp_path / "object.pt")  # arbitrary objects are never unpickled
    with pytest.raises(ModelError, match="plain tensors"):
        load_official(tmp_path / "object.pt", k=3)
    with pytest.raises(ConfigError, match="normalises"):
        save_official(make(normalize=False), tmp_path / "x.pt")


def saelens_topk(folder, x):
    """What SAELens computes from such a folder (its TopK SAE without rescaling), written from the format's rules."""
    config, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    mu, std = 0.0, 1.0
    if config["normalize_activations"] == "layer_norm":
        mu = x.mean(-1, keepdim=True)
        x = x - mu
        std = x.std(-1, keepdim=True)
        x = x / (std + 1e-5)
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    values, indices = pre.topk(config["k"], dim=-1)
    z = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    return z, (z @ t["W_dec"] + t["b_dec"]) * std + mu


@pytest.mark.parametrize("bias", [True, False])
def test_saelens_none_is_exact_and_layer_norm_is_close(bias, tmp_path):
    sae, x = make(encoder_bias=bias), states()
    z, x_hat = saelens_topk(save_saelens(sae, tmp_path / "none", normalization="none"), sae.normalize(x)[0])
    torch.testing.assert_close(z, sae.encode(x).dense(), rtol=1e-6, atol=1e-6)
    z, x_hat = saelens_topk(save_saelens(sae, tmp_path / "ln", hook_name="blocks.1.hook_resid_post"), x)
    torch.testing.assert_close(z, sae.encode(x).dense(), rtol=0, atol=5e-4)
    torch.testing.assert_close(x_hat, sae(x).x_hat, rtol=0, atol=5e-4)
    config = json.loads((tmp_path / "ln" / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert load_saelens(tmp_path / "ln").content_hash() == sae.content_hash()
    back = load_saelens(tmp_path / "none")
    assert not back.normalizes and torch.equal(back.W_enc, sae.W_enc)


@pytest.mark.parametrize("bias", [True, False])
def test_the_real_saelens_reads_our_folder(bias, tmp_path):
    lens = pytest.importorskip("sae_lens", reason="the extra 'peers' is not installed")
    sae, x = make(encoder_bias=bias), states()
    other = lens.SAE.load_from_disk(save_saelens(sae, tmp_path / "none", normalization="none"))
    mine = sae.encode(x).dense()
    with torch.no_grad():
        z = other.encode(sae.normalize(x)[0])
        assert torch.equal(z, mine) and torch.equal(other.decode(z), sae.decode(mine))  # to the last bit
        other = lens.SAE.load_from_disk(save_saelens(sae, tmp_path / "ln"))
        z = other.encode(x)
        torch.testing.assert_close(z, mine, rtol=0, atol=1e-3)
        torch.testing.assert_close(other.decode(z), sae(x).x_hat, rtol=0, atol=1e-3)


def test_the_real_sparsifys_folder_is_read(tmp_path):
    sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed")
    coder = sparsify.SparseCoder(6, sparsify.SparseCoderConfig(num_latents=20, k=3), device="cpu")
    coder.save_to_disk(tmp_path)
    torch.testing.assert_close(load_sparsify(tmp_path)(states()).x_hat, coder(states()).sae_out, rtol=0, atol=1e-6)


def test_saelens_refusals(tmp_path):
    with pytest.raises(ConfigError, match="allow_relu"):
        save_saelens(make(relu=False), tmp_path)
    with pytest.raises(ConfigError, match="does not normalise"):
        save_saelens(make(normalize=False), tmp_path)
    with pytest.raises(ConfigError, match="'layer_norm' or 'none'"):
        save_saelens(make(), tmp_path, normalization="batch")
    with pytest.raises(ModelError, match="no readable"):
        load_saelens(tmp_path)
    save_saelens(make(relu=False), tmp_path, allow_relu=True)
    config = json.loads((tmp_path / "cfg.json").read_text())
    foreign = {"architecture": "gated", "rescale_acts_by_decoder_norm": True, "normalize_activations": "x"}
    for change in ({name: value} for name, value in foreign.items()):
        (tmp_path / "cfg.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=next(iter(change))):
            load_saelens(tmp_path)
    del config["k"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="needs k"):
        load_saelens(tmp_path)


def test_sparsify_import(tmp_path):
    sae = make(encoder_bias=True, normalize=False)
    state = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    save_file({name: t.detach().clone() for name, t in state.items()}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 6, "num_latents": 20, "k": 3}))
    assert load_sparsify(tmp_path).content_hash() == sae.content_hash()
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(ModelError, match="no k"):
        load_sparsify(tmp_path)


def test_shapes_have_to_agree():
    W, b = torch.zeros(5, 3), torch.zeros(3)
    with pytest.raises(ModelError, match="disagree"):
        from_tensors(W, W.T, b, None, 2, relu=True, normalize=True)
    with pytest.raises(ModelError, match="b_enc"):
        from_tensors(W, W, b, b, 2, relu=True, normalize=True)
