"""The SAE's equations, its golden numbers, and its files."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sarmlib.errors import ArtifactError, ConfigError, DataError, ModelError
from sarmlib.sae.formats import from_tensors
from sarmlib.sae.model import CONFIG, WEIGHTS, SparseCode, TopKSAE, default_k, normalized_mse, write_atomic
from tests.helpers import shared_path


def make(d=8, m=32, k=3, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(d, m, k, generator=generator, **options)
    with torch.no_grad():
        sae.b_pre.copy_(torch.randn(d, generator=generator) * 0.2)
        if sae.b_enc is not None:
            sae.b_enc.copy_(torch.randn(m, generator=generator) * 0.2)
    return sae


def states(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_golden_codes_statistics_and_losses():
    folder = shared_path("data/golden/sarm_official_tiny")
    expected = json.loads((folder / "expected.json").read_text())
    t = load_file(folder / "model.safetensors")
    sae = from_tensors(
        t["sae.encoder.weight"], t["sae.decoder.weight"].T, t["sae.pre_bias"], t["sae.latent_bias"], 3,
        relu=False, normalize=True,
    )
    for case in expected["cases"].values():
        for row in case["rows"]:
            h = torch.tensor(row["hidden_last"])[None]
            _, mean, std = sae.normalize(h)
            assert mean.item() == pytest.approx(row["mean"], abs=2e-6)
            assert std.item() == pytest.approx(row["std"], rel=2e-6)
            code = sae.encode(h)
            assert code.indices[0].tolist() == row["topk_indices"]
            assert code.values[0].tolist() == pytest.approx(row["topk_values"], abs=5e-6)
            pre = sae.preactivations(h)[0]
            assert pre[:8].tolist() == pytest.approx(row["pre_acts_first8"], abs=5e-6)
            assert (code.dense() @ t["score.weight"].T).item() == pytest.approx(row["logit_topk"], abs=2e-6)
    losses = expected["losses"]
    x, x_hat = torch.tensor(losses["x"]), torch.tensor(losses["x_hat"])
    assert normalized_mse(x_hat, x).item() == pytest.approx(losses["normalized_mse"], rel=1e-5)
    tiny = TopKSAE(4, 8, 2)
    torch.testing.assert_close(tiny.normalize(x)[0], torch.tensor(losses["pre_process_of_x"]["x"]), atol=2e-6, rtol=0)


def test_equations_2_to_8_written_out():
    sae, h = make(encoder_bias=True), states(5, 8)
    x = (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-6)
    pre = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    z = torch.zeros_like(pre)
    for b in range(5):
        for i in pre[b].argsort(descending=True)[:3]:
            z[b, i] = pre[b, i].clamp(min=0)
    x_hat = z @ sae.W_dec + sae.b_pre
    code = sae.encode(h)
    torch.testing.assert_close(sae.preactivations(h), pre)
    torch.testing.assert_close(code.dense(), z)
    torch.testing.assert_close(sae.decode(code), x_hat)
    torch.testing.assert_close(sae.decode(z), x_hat)
    out = sae(h)
    torch.testing.assert_close(out.loss, ((x - x_hat).square().sum(-1) / x.square().sum(-1)).mean())
    torch.testing.assert_close(out.x_hat, x_hat * (h.std(-1, keepdim=True) + 1e-6) + h.mean(-1, keepdim=True))
    torch.testing.assert_close(sae.decode(out.code, out.mean, out.std), out.x_hat)


def test_initialisation_is_tied_unit_norm_and_seeded():
    sae = TopKSAE(16, 64, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(sae.W_enc, sae.W_dec) and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
    assert torch.equal(sae.W_enc, TopKSAE(16, 64, 4, generator=torch.Generator().manual_seed(7)).W_enc)
    assert not torch.equal(sae.W_enc, TopKSAE(16, 64, 4, generator=torch.Generator().manual_seed(8)).W_enc)


def test_normalisation_round_trips_and_leaves_no_state():
    sae, h = make(), states(6, 8)
    before = set(vars(sae))
    x, mean, std = sae.normalize(h)
    torch.testing.assert_close(x * std + mean, h)
    torch.testing.assert_close(x.square().sum(-1), torch.full((6,), 7.0), rtol=1e-5, atol=1e-5)  # d - 1
    sae.encode(h)
    sae.decode(sae.encode(states(2, 8)))
    assert set(vars(sae)) == before
    assert torch.equal(sae.decode(sae.encode(h)), sae.decode(sae.encode(h)))


def test_normalisation_makes_the_code_invariant_to_scale_and_offset():
    sae, h = make(), states(4, 8)
    a, b = sae.encode(h), sae.encode(10 * h + 3)
    assert torch.equal(a.indices, b.indices)
    torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-5)
    plain = make(normalize=False)
    assert not torch.allclose(plain.encode(h).values, plain.encode(10 * h + 3).values)
    assert torch.equal(plain.normalize(h)[0], h)


def test_constant_vector_gives_finite_code_and_gradient():
    sae = make()
    h = torch.full((1, 8), 2.0, requires_grad=True)
    sae.encode(h).values.sum().backward()
    assert torch.isfinite(h.grad).all()


def test_signed_and_relu_codes():
    h = states(3, 8)
    signed, relu = make(k=32, relu=False), make(k=32)
    assert (signed.encode(h).values < 0).any() and (relu.encode(h).values >= 0).all()
    torch.testing.assert_close(signed.encode(h).dense().relu(), relu.encode(h).dense())


def test_sparse_code_forms_agree():
    sae = make(k=20)
    code = sae.encode(states(2, 3, 8))
    assert code.indices.shape == (2, 3, 20) and code.dense().shape == (2, 3, 32)
    csr = code.to_csr()
    np.testing.assert_array_equal(csr.toarray(), code.dense().reshape(6, 32).detach().numpy())
    assert (csr.data != 0).all() and csr.has_sorted_indices
    assert sae(states(2, 3, 8)).x_hat.shape == (2, 3, 8)
    empty = SparseCode(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4), 9)
    assert empty.dense().shape == (0, 9) and empty.to_csr().shape == (0, 9)


def test_frozen_encoder_passes_the_gradient_to_the_state():
    sae = make(relu=False).requires_grad_(False)
    h = states(4, 8).requires_grad_()
    sae.encode(h).values.sum().backward()
    sparse = h.grad.clone()
    h.grad = None
    pre = sae.preactivations(h)
    pre.topk(3).values.sum().backward()
    torch.testing.assert_close(sparse, h.grad)
    assert sparse.abs().sum() > 0 and all(p.grad is None for p in sae.parameters())


def test_renormalize_decoder():
    sae = make()
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(32, 1) + 0.5)
    direction = torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1)
    sae.renormalize_decoder()
    torch.testing.assert_close(sae.W_dec.detach(), direction)


@pytest.mark.parametrize("options", [{}, dict(encoder_bias=True, relu=False), dict(normalize=False)])
def test_save_and_load_keep_every_bit(options, tmp_path):
    sae, h = make(**options), states(3, 8)
    loaded = TopKSAE.load(sae.save(tmp_path / "sae"))
    assert loaded.settings() == sae.settings()
    assert loaded.content_hash() == sae.content_hash()
    for a, b in zip(sae.encode(h), loaded.encode(h), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == sorted([WEIGHTS, CONFIG])


def test_content_hash_sees_one_bit_and_every_setting():
    sae = make()
    first = sae.content_hash()
    assert make().content_hash() == first and len(first) == 64
    assert make(relu=False).content_hash() != first and make(k=4).content_hash() != first
    with torch.no_grad():
        sae.b_pre.view(torch.int32)[0] ^= 1
    assert sae.content_hash() != first


def test_load_refuses_damage(tmp_path):
    with pytest.raises(ModelError, match="no readable SAE"):
        TopKSAE.load(tmp_path)
    make().save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"encoder_bias": True}))
    with pytest.raises(ModelError, match="b_enc"):
        TopKSAE.load(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"n_features": 33}))
    with pytest.raises(ModelError, match="do not match"):
        TopKSAE.load(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"format": "other"}))
    with pytest.raises(ModelError, match="format"):
        TopKSAE.load(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(ModelError, match="no readable SAE"):
        TopKSAE.load(tmp_path)
    save_file({"W_enc": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError):
        TopKSAE.load(tmp_path)


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match="No space"):
        write_atomic(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("sizes", [(8, 4, 5), (1, 4, 2), (8, 0, 1), (8, 4, 0), (8, 4, 2.0), (8, 4, True)])
def test_impossible_sizes(sizes):
    with pytest.raises(ConfigError):
        TopKSAE(*sizes)


def test_wrong_input_size_is_named():
    with pytest.raises(DataError, match="d_model=8"):
        make().encode(torch.zeros(2, 9))


def test_paper_sparsity():
    assert [default_k(d) for d in (4096, 3072, 128, 16)] == [192, 144, 6, 1]
