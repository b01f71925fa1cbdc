"""The SAE's equations, its golden numbers, half precision, ties, and its files."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.sae.topk import CONFIG, WEIGHTS, SparseCode, TopKSAE, normalized_mse
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
    M, d = t["sae.encoder.weight"].shape
    state = {"W_enc": t["sae.encoder.weight"], "W_dec": t["sae.decoder.weight"].T, "b_pre": t["sae.pre_bias"],
             "b_enc": t["sae.latent_bias"]}
    sae = TopKSAE.from_state(state, d_model=d, n_features=M, k=3, encoder_bias=True, relu=False)
    for row in (row for case in expected["cases"].values() for row in case["rows"]):
        h = torch.tensor(row["hidden_last"])[None]
        _, mean, std = sae.normalize(h)
        assert mean.item() == pytest.approx(row["mean"], abs=2e-6)
        assert std.item() == pytest.approx(row["std"], rel=2e-6)
        code = sae.encode(h)
        assert code.indices[0].tolist() == row["topk_indices"]
        assert code.values[0].tolist() == pytest.approx(row["topk_values"], abs=5e-6)
        assert sae.preactivations(h)[0, :8].tolist() == pytest.approx(row["pre_acts_first8"], abs=5e-6)
        assert (code.dense() @ t["score.weight"].T).item() == pytest.approx(row["logit_topk"], abs=2e-6)
    losses = expected["losses"]
    x, x_hat = torch.tensor(losses["x"]), torch.tensor(losses["x_hat"])
    assert normalized_mse(x_hat, x).item() == pytest.approx(losses["normalized_mse"], rel=1e-5)
    wanted = torch.tensor(losses["pre_process_of_x"]["x"])
    torch.testing.assert_close(TopKSAE(4, 8, 2).normalize(x)[0], wanted, atol=2e-6, rtol=0)


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
    out = sae(h)
    torch.testing.assert_close(out.loss, ((x - x_hat).square().sum(-1) / x.square().sum(-1)).mean())
    torch.testing.assert_close(out.x_hat, x_hat * (h.std(-1, keepdim=True) + 1e-6) + h.mean(-1, keepdim=True))


def test_initialisation_is_tied_unit_norm_and_seeded():
    sae = make(seed=7)
    assert torch.equal(sae.W_enc, sae.W_dec) and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(32))
    assert torch.equal(sae.W_enc, make(seed=7).W_enc) and not torch.equal(sae.W_enc, make(seed=8).W_enc)


def test_normalisation_round_trips_leaves_no_state_and_forgets_scale_and_offset():
    sae, h = make(), states(6, 8)
    before = set(vars(sae))
    x, mean, std = sae.normalize(h)
    torch.testing.assert_close(x * std + mean, h)
    torch.testing.assert_close(x.square().sum(-1), torch.full((6,), 7.0), rtol=1e-5, atol=1e-5)  # d - 1
    a, b = sae.encode(h), sae.encode(10 * h + 3)
    assert torch.equal(a.indices, b.indices) and set(vars(sae)) == before
    torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-5)
    assert torch.equal(make(normalize=False).normalize(h)[0], h)
    constant = torch.full((1, 8), 2.0, requires_grad=True)
    sae.encode(constant).values.sum().backward()
    assert torch.isfinite(constant.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_encoded_in_float32(dtype):
    sae = make()
    h = (states(20, 8) * 2000).to(dtype)  # squares overflow float16
    wanted = sae(h.float())
    out = sae(h)
    assert torch.equal(out.code.indices, wanted.code.indices) and torch.equal(out.code.values, wanted.code.values)
    assert out.code.values.dtype == torch.float32 and out.x_hat.dtype == dtype and torch.isfinite(out.x_hat).all()
    half = make().to(dtype)
    assert half.encode(h).values.dtype == dtype and torch.isfinite(half(h).loss)
    close = (half.encode(h).dense() - wanted.code.dense()).abs().amax(-1) < 0.1
    assert close.float().mean() > 0.7  # rounding may swap features at the k-th place


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


def test_normalized_mse_ignores_vectors_without_energy():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    x_hat = torch.tensor([[1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    loss = normalized_mse(x_hat, x)
    loss.backward()
    assert loss.item() == 0.5 and torch.isfinite(x_hat.grad).all() and x_hat.grad[0].abs().sum() == 0


@pytest.mark.parametrize("options", [{}, dict(encoder_bias=True, relu=False), dict(normalize=False)])
def test_save_and_load_keep_every_bit(options, tmp_path):
    sae = make(**options)
    loaded = TopKSAE.load(sae.save(tmp_path / "sae"))
    assert loaded.settings() == sae.settings() and loaded.content_hash() == sae.content_hash()
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == sorted([WEIGHTS, CONFIG])
    assert make(**options | {"k": 4}).content_hash() != sae.content_hash()
    with torch.no_grad():
        loaded.b_pre.view(torch.int32)[0] ^= 1  # one bit
    assert loaded.content_hash() != sae.content_hash()


def test_load_refuses_damage(tmp_path):
    with pytest.raises(ModelError, match="no readable SAE"):
        TopKSAE.load(tmp_path)
    config = json.loads((make().save(tmp_path) / CONFIG).read_text())
    for change, word in (({"encoder_bias": True}, "b_enc"), ({"n_features": 33}, "size mismatch"),
                         ({"format": "other"}, "format"), ({"relu": "false"}, "relu='false'.*true or false"),
                         ({"normalize": "no"}, "normalize='no'"), ({"encoder_bias": "no"}, "bias='no'"),
                         ({"k": True}, "k=True")):
        (tmp_path / CONFIG).write_text(json.dumps(config | change))
        with pytest.raises((ModelError, ConfigError), match=word):
            TopKSAE.load(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(ModelError, match="no readable SAE"):
        TopKSAE.load(tmp_path)


def test_impossible_sizes():
    for sizes in ((8, 4, 5), (1, 4, 2), (8, 4, 2.0)):
        with pytest.raises(ConfigError):
            TopKSAE(*sizes)
    with pytest.raises(DataError, match="d_model=8"):
        make().encode(torch.zeros(2, 9))
