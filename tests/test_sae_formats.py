"""Foreign SAE files: exact round trips and clear refusals."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sarmlib.cli import main
from sarmlib.errors import ConfigError, ModelError
from sarmlib.sae.formats import load_official, load_sae, load_saelens, load_sparsify, save_saelens
from sarmlib.sarm.model import SarmForSequenceClassification
from tests.miniature import save_backbone
from tests.tiny import random_sae


def edited(folder, change, **config):
    """A SAELens folder with other settings, and weights that ``change`` gets to see."""
    state, path = load_file(folder / "sae_weights.safetensors"), folder / "cfg.json"
    change(state)
    save_file(state, folder / "sae_weights.safetensors")
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def folder_of(kind, folder, **sizes):
    """A folder as SAELens writes it for each kind of SAE; Gemma Scope's are ``jumprelu``."""
    sae = random_sae(3 if kind in ("topk", "rescaled") else None, encoder_bias=True, normalize=False, **sizes)
    save_saelens(sae, folder, hook_name="blocks.1.hook_resid_post")
    if kind == "rescaled":  # decoder rows of any length, as SAELens' training default leaves them
        return edited(folder, lambda t: t["W_dec"].mul_(torch.linspace(0.1, 3, sae.n_features)[:, None]),
                      rescale_acts_by_decoder_norm=True)
    if kind == "batchtopk":  # before SAELens turns it into jumprelu
        return edited(folder, lambda t: t.update(topk_threshold=t.pop("threshold").mean().double()),
                      architecture=kind, k=2.5)
    return edited(folder, lambda t: kind == "jumprelu" and t["threshold"].sub_(0.2), apply_b_dec_to_input=False)


def states():
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(2)) * 0.3


def saelens(folder, x):
    """What SAELens computes from such a folder, written from the format's rules."""
    config, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    mu, std = 0.0, 1.0
    if config["normalize_activations"] == "layer_norm":
        mu = x.mean(-1, keepdim=True)
        x = x - mu
        std = x.std(-1, keepdim=True)
        x = x / (std + 1e-5)
    norms = t["W_dec"].norm(dim=-1) if config["rescale_acts_by_decoder_norm"] else 1.0
    pre = ((x - t["b_dec"] * config["apply_b_dec_to_input"]) @ t["W_enc"] + t["b_enc"]) * norms
    if config["architecture"] == "topk":
        values, indices = pre.topk(config["k"], dim=-1)
        z = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    else:
        z = pre.relu() * (pre > t.get("threshold", t.get("topk_threshold")))
    return z, ((z / norms) @ t["W_dec"] + t["b_dec"]) * std + mu


def real_saelens(folder, x):
    lens = pytest.importorskip("sae_lens", reason="the extra 'peers' is not installed")
    other = lens.SAE.load_from_disk(folder)
    z = other.encode(x)
    return z, other.decode(z)


@torch.no_grad()
@pytest.mark.parametrize("reader, exact", [(saelens, 1e-6), (real_saelens, 0)])
@pytest.mark.parametrize("bias, k", [(True, 3), (False, 3), (True, None)])
@pytest.mark.parametrize("normalize", [False, True])
def test_saelens_computes_the_same_and_is_read_back(reader, exact, bias, k, normalize, tmp_path):
    sae, x = random_sae(k, encoder_bias=bias, normalize=normalize), states()
    z, x_hat = reader(save_saelens(sae, tmp_path, hook_name="blocks.1.hook_resid_post"), x)
    torch.testing.assert_close(z, sae.encode(x).dense(), rtol=0, atol=5e-4 if normalize else exact)
    torch.testing.assert_close(x_hat, sae(x).x_hat, rtol=1e-6, atol=5e-4 if normalize else 1e-6)
    stored = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert stored["hook_name"] == "blocks.1.hook_resid_post" and stored["prepend_bos"] and stored["context_size"]
    assert load_saelens(tmp_path).content_hash() == sae.content_hash()


@pytest.mark.parametrize("kind", ["topk", "rescaled", "batchtopk", "jumprelu"])
def test_every_kind_of_saelens_is_the_same_function(kind, tmp_path):
    folder, x = folder_of(kind, tmp_path / "lens"), states().requires_grad_()
    sae = load_sae(folder)
    (z, x_hat), out = saelens(folder, x), sae(x)
    torch.testing.assert_close(out.code.dense(), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.x_hat, x_hat, rtol=1e-5, atol=1e-6)
    active = (z > 0).sum(-1)
    assert active.max() == out.code.indices.shape[-1] and (active.min() < active.max()) == (sae.k is None)
    assert all(len(set(row)) == len(row) for row in out.code.indices.tolist())
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    (wanted,), (got,) = (torch.autograd.grad(one, x, g) for one in (z, sae.encode(x).dense()))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for written in (sae.save(tmp_path / "own"), save_saelens(sae, tmp_path / "again")):
        assert load_sae(written).content_hash() == sae.content_hash()
    assert torch.equal(sae.encode(x[:0]).dense(), x.new_zeros(0, 20))
    if kind == "rescaled":
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(20))
    if sae.k is None:
        sae.threshold.fill_(99.0)
        assert not sae.encode(x).dense().any()
    edited(folder, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    assert load_sae(folder).W_enc.dtype == torch.float32


def test_the_command_takes_a_saelens_folder_and_refuses_another_layer(tmp_path, capsys):
    save_backbone(tmp_path / "base")
    rows = [{"prompt": f"who is number {i} ?", "chosen": "he is the cook .", "rejected": "here ."} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = folder_of("jumprelu", tmp_path / "lens", d=16, n=48)
    for layer, words in ((1, "reads 'blocks.1.hook_resid_post', but the backbone ends after layer 1"), (2, "")):
        settings = "device=cpu", f"backbone.layer={layer}", "reward.batch_size=8", "reward.epochs=1"
        status = main(["train", "--backbone", str(tmp_path / "base"), "--data", str(tmp_path / "pairs.jsonl"), "--sae",
                       str(folder), "--output", str(tmp_path / "out"), *(w for s in settings for w in ("--set", s))])
        assert status == bool(words) and words in capsys.readouterr().err
    model = SarmForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.sae_hash() == load_sae(folder).content_hash() and model.config.k is None and model.config.layer == 2
    assert model.score.weight.any()


def test_a_released_sae_is_fetched_by_saelens(tmp_path, monkeypatch):
    folder, asked = folder_of("jumprelu", tmp_path), []
    config, state = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    fetched = SimpleNamespace(cfg=SimpleNamespace(to_dict=lambda: config), state_dict=lambda: state)
    known = SimpleNamespace(from_pretrained=lambda *names: asked.append(names) or fetched)
    monkeypatch.setitem(sys.modules, "sae_lens", SimpleNamespace(SAE=known))
    assert load_sae("scope:layer_1/width_16k", layer=2).content_hash() == load_sae(folder).content_hash()
    assert asked == [("scope", "layer_1/width_16k")]
    config["normalize_activations"] = "expected_average_only_in"  # its scale was not known
    with pytest.raises(ModelError, match="'scope:x': normalize_activations='expected_average_only_in'"):
        load_sae("scope:x")
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ModelError, match="'scope:x' is no path.*pip install sae-lens"):
        load_sae("scope:x")


@pytest.mark.parametrize("kind", ["TopK", "BatchTopK", "JumpReLU"])
def test_what_the_real_saelens_trains_and_saves_is_read(kind, tmp_path):
    lens = pytest.importorskip("sae_lens", reason="the extra 'peers' is not installed")
    torch.manual_seed(0)
    config = getattr(lens, f"{kind}TrainingSAEConfig")(d_in=6, d_sae=20, **{"k": 3} if "K" in kind else {})
    trained, x = getattr(lens, f"{kind}TrainingSAE")(config), states()
    with torch.no_grad():
        trained.W_dec *= torch.linspace(0.1, 3, 20)[:, None]
        for name, tensor in trained.state_dict().items():
            if not name.startswith("W"):
                tensor.normal_(0.4, 0.2)
        trained.save_inference_model(tmp_path / "final")
        trained.save_model(tmp_path / "checkpoint")
        other = lens.SAE.load_from_disk(tmp_path / "final")
        for folder in ("final", "checkpoint"):
            sae = load_sae(tmp_path / folder)
            torch.testing.assert_close(sae.encode(x).dense(), other.encode(x), rtol=0, atol=2e-6)
            torch.testing.assert_close(sae(x).x_hat, other(x), rtol=0, atol=5e-6)


def test_the_real_saelens_hands_over_a_released_sae(tmp_path, monkeypatch):
    """Llama Scope's own files, small: a scale to fold, one threshold, b_dec only in the decoder."""
    lens = pytest.importorskip("sae_lens", reason="the extra 'peers' is not installed")
    settings, weights = tmp_path / "hyperparams.json", tmp_path / "final.safetensors"
    settings.write_text(json.dumps({"d_model": 6, "d_sae": 20, "jump_relu_threshold": 0.5, "hook_point_in":
                                    "blocks.15.hook_resid_post", "dataset_average_activation_norm": {"in": 3.0}}))
    shapes = {"encoder.weight": (20, 6), "decoder.weight": (6, 20), "encoder.bias": (20,), "decoder.bias": (6,)}
    save_file({name: torch.linspace(-1, 1, 120)[:torch.Size(shape).numel()].sin().mul(9e3).sin().reshape(shape)
               for name, shape in shapes.items()}, weights)
    monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.hf_hub_download",
                        lambda *names, **given: settings if names else weights)
    names, x = ("llama_scope_lxr_8x", "l15r_8x"), states()
    sae, other = load_sae(":".join(names), layer=16), lens.SAE.from_pretrained(*names)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x).dense(), other.encode(x), rtol=0, atol=2e-6)
        assert 0.1 < (other.encode(x) > 0).float().mean() < 0.9
    with pytest.raises(ModelError, match="reads 'blocks.15.hook_resid_post', but.* is 'blocks.14"):
        load_sae(":".join(names), layer=15)


def test_the_real_sparsifys_folder_is_read(tmp_path):
    sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed")
    coder = sparsify.SparseCoder(6, sparsify.SparseCoderConfig(num_latents=20, k=3), device="cpu")
    coder.save_to_disk(tmp_path)
    torch.testing.assert_close(load_sparsify(tmp_path)(states()).x_hat, coder(states()).sae_out, rtol=0, atol=1e-6)


def test_official_refusals(tmp_path):
    with pytest.raises(ConfigError, match="pass k"):
        load_official(tmp_path / "sae.pt")
    torch.save({"pre_bias": torch.zeros(3)}, tmp_path / "part.pt")
    torch.save({"pre_bias": random_sae()}, tmp_path / "object.pt")  # arbitrary objects are never unpickled
    for name in ("missing.pt", "part.pt", "object.pt"):
        with pytest.raises(ModelError, match="no readable torch file of plain tensors"):
            load_official(tmp_path / name, k=3)


def save_sparsify(folder, sae, **config):
    state = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    save_file({name: t.detach().clone() for name, t in state.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))


def test_every_format_is_told_by_its_contents(tmp_path):
    sae = random_sae(encoder_bias=True, normalize=False)
    (tmp_path / "sparsify").mkdir()
    save_sparsify(tmp_path / "sparsify", sae, k=3, activation="topk", transcode=False)
    save_saelens(sae, tmp_path / "lens")
    sae.save(tmp_path / "own")
    for name in ("own", "lens", "sparsify"):
        assert load_sae(tmp_path / name).content_hash() == sae.content_hash()
        assert load_sae(tmp_path / name, k=5).k == 5
    with pytest.raises(ConfigError, match="k=21"):
        load_sae(tmp_path / "own", k=21)
    with pytest.raises(ConfigError, match="k=5 with a threshold"):
        load_sae(folder_of("jumprelu", tmp_path / "jump"), k=5)
    for nothing in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelError, match="no readable SAE"):
            load_sae(nothing)


@pytest.mark.parametrize("kind, name, value", [
    *(("lens", *pair) for pair in {"architecture": "gated", "reshape_activations": "z", "apply_b_dec_to_input": "no",
                                   "normalize_activations": "constant_norm_rescale"}.items()),
    ("sparsify", "activation", "groupmax"), ("sparsify", "transcode", True), ("sparsify", "skip_connection", True)])
def test_settings_of_other_functions_are_refused(kind, name, value, tmp_path):
    sae = random_sae(encoder_bias=True, normalize=False)
    save_saelens(sae, tmp_path) if kind == "lens" else save_sparsify(tmp_path, sae, k=3)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ModelError, match=f"{name}={value!r}"):
        load_sae(tmp_path)
    for k in (None, True, "4", 4.0):
        (tmp_path / "cfg.json").write_text(json.dumps({**config, "k": k}))
        with pytest.raises(ConfigError, match=f"k={k!r}"):
            load_sae(tmp_path)


def test_a_signed_sae_and_disagreeing_shapes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="relu=False"):
        save_saelens(random_sae(relu=False), tmp_path)
    sae = random_sae(encoder_bias=True)
    sae.b_enc = torch.nn.Parameter(torch.zeros(6))
    save_sparsify(tmp_path, sae, k=3)
    with pytest.raises(ModelError, match="size mismatch for b_enc"):
        load_sparsify(tmp_path)
