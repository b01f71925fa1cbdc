"""Foreign SAE files: exact round trips and clear refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sarmlib.errors import ConfigError, ModelError
from sarmlib.sae.formats import load_official, load_sae, load_saelens, load_sparsify, save_saelens
from sarmlib.sae.topk import TopKSAE
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


def test_official_golden_file_gives_the_merged_checkpoints_weights():
    folder = shared_path("data/golden/sarm_official_tiny")
    sae = load_official(next((folder / "base").glob("*.pt")))
    merged = load_file(folder / "model.safetensors")
    assert (sae.k, sae.relu, sae.normalizes, sae.n_features) == (3, False, True, 1024)
    assert torch.equal(sae.W_enc, merged["sae.encoder.weight"]) and torch.equal(sae.b_enc, merged["sae.latent_bias"])
    assert torch.equal(sae.W_dec, merged["sae.decoder.weight"].T) and torch.equal(sae.b_pre, merged["sae.pre_bias"])


def saelens_topk(folder, x):
    """What SAELens computes from such a folder (its TopK SAE), written from the format's rules."""
    config, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    mu, std = 0.0, 1.0
    if config["normalize_activations"] == "layer_norm":
        mu = x.mean(-1, keepdim=True)
        x = x - mu
        std = x.std(-1, keepdim=True)
        x = x / (std + 1e-5)
    norms = t["W_dec"].norm(dim=-1) if config["rescale_acts_by_decoder_norm"] else 1.0
    pre = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms
    values, indices = pre.topk(config["k"], dim=-1)
    z = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    return z, ((z / norms) @ t["W_dec"] + t["b_dec"]) * std + mu


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize, tolerance", [(False, 1e-6), (True, 5e-4)])
def test_saelens_computes_the_same_and_is_read_back(bias, normalize, tolerance, tmp_path):
    sae, x = make(encoder_bias=bias, normalize=normalize), states()
    z, x_hat = saelens_topk(save_saelens(sae, tmp_path, hook_name="blocks.1.hook_resid_post"), x)
    torch.testing.assert_close(z, sae.encode(x).dense(), rtol=1e-6, atol=tolerance)
    torch.testing.assert_close(x_hat, sae(x).x_hat, rtol=1e-6, atol=tolerance)
    assert json.loads((tmp_path / "cfg.json").read_text())["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert load_saelens(tmp_path).content_hash() == sae.content_hash()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize, tolerance", [(False, 0), (True, 1e-3)])
def test_the_real_saelens_reads_our_folder(bias, normalize, tolerance, tmp_path):
    lens = pytest.importorskip("sae_lens", reason="the extra 'peers' is not installed")
    sae, x = make(encoder_bias=bias, normalize=normalize), states()
    with torch.no_grad():
        other = lens.SAE.load_from_disk(save_saelens(sae, tmp_path))
        z = other.encode(x)
        torch.testing.assert_close(z, sae.encode(x).dense(), rtol=0, atol=tolerance)
        torch.testing.assert_close(other.decode(z), sae(x).x_hat, rtol=0, atol=max(tolerance, 1e-5))


def test_the_real_sparsifys_folder_is_read(tmp_path):
    sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed")
    coder = sparsify.SparseCoder(6, sparsify.SparseCoderConfig(num_latents=20, k=3), device="cpu")
    coder.save_to_disk(tmp_path)
    torch.testing.assert_close(load_sparsify(tmp_path)(states()).x_hat, coder(states()).sae_out, rtol=0, atol=1e-6)


def test_decoder_norms_of_saelens_are_folded(tmp_path):
    """Rows of any length, as its training default leaves them: codes and reconstructions stay the same."""
    save_saelens(make(encoder_bias=True, normalize=False), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text()) | {"rescale_acts_by_decoder_norm": True}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "sae_weights.safetensors")
    state["W_dec"] = state["W_dec"] * torch.linspace(0.1, 3, 20)[:, None]
    save_file(state, tmp_path / "sae_weights.safetensors")
    sae, x = load_sae(tmp_path), states()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(20))
    z, x_hat = saelens_topk(tmp_path, x)
    torch.testing.assert_close(sae.encode(x).dense(), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae(x).x_hat, x_hat, rtol=1e-5, atol=1e-6)
    save_file({name: t.bfloat16() for name, t in state.items()}, tmp_path / "sae_weights.safetensors")
    assert load_sae(tmp_path).W_enc.dtype == torch.float32


def test_official_refusals(tmp_path):
    with pytest.raises(ConfigError, match="pass k"):
        load_official(tmp_path / "sae.pt")
    torch.save({"pre_bias": torch.zeros(3)}, tmp_path / "part.pt")
    torch.save({"pre_bias": make()}, tmp_path / "object.pt")  # arbitrary objects are never unpickled
    for name in ("missing.pt", "part.pt", "object.pt"):
        with pytest.raises(ModelError, match="no readable torch file of plain tensors"):
            load_official(tmp_path / name, k=3)


def save_sparsify(folder, sae, **config):
    state = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    save_file({name: t.detach().clone() for name, t in state.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))


def test_every_format_is_told_by_its_contents(tmp_path):
    sae = make(encoder_bias=True, normalize=False)
    (tmp_path / "sparsify").mkdir()
    save_sparsify(tmp_path / "sparsify", sae, k=3, activation="topk", transcode=False)
    save_saelens(sae, tmp_path / "lens")
    sae.save(tmp_path / "own")
    for name in ("own", "lens", "sparsify"):
        assert load_sae(tmp_path / name).content_hash() == sae.content_hash()
        assert load_sae(tmp_path / name, k=5).k == 5
    with pytest.raises(ConfigError, match="k=21"):
        load_sae(tmp_path / "own", k=21)
    for nothing in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelError, match="no readable SAE"):
            load_sae(nothing)


@pytest.mark.parametrize("kind, name, value", [
    *(("lens", *pair) for pair in {"architecture": "gated", "normalize_activations": "x", "reshape_activations": "z",
                                   "apply_b_dec_to_input": False}.items()),
    ("sparsify", "activation", "groupmax"), ("sparsify", "transcode", True), ("sparsify", "skip_connection", True)])
def test_settings_of_other_functions_are_refused(kind, name, value, tmp_path):
    sae = make(encoder_bias=True, normalize=False)
    save_saelens(sae, tmp_path) if kind == "lens" else save_sparsify(tmp_path, sae, k=3)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ModelError, match=f"{name}={value!r}"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "k": None}))
    with pytest.raises(ConfigError, match="k=None"):
        load_sae(tmp_path)


def test_a_signed_sae_and_disagreeing_shapes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="relu=False"):
        save_saelens(make(relu=False), tmp_path)
    sae = make(encoder_bias=True)
    sae.b_enc = torch.nn.Parameter(torch.zeros(6))
    save_sparsify(tmp_path, sae, k=3)
    with pytest.raises(ModelError, match="size mismatch for b_enc"):
        load_sparsify(tmp_path)
