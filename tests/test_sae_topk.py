"""The SAE's equations, half precision, and its files; test_released.py has its golden numbers."""

import json

import numpy as np
import pytest
import torch

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.sae.topk import CONFIG, WEIGHTS, SparseCode, TopKSAE, normalized_mse
from tests.tiny import random_sae


def states(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 3 + 1


def test_equations_2_to_8_written_out():
    sae, h = random_sae(encoder_bias=True), states(5, 6)
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
    sae, same, other = (TopKSAE(8, 32, 3, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(sae.W_enc, sae.W_dec) and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(32))
    assert torch.equal(sae.W_enc, same.W_enc) and not torch.equal(sae.W_enc, other.W_enc)


def test_normalisation_round_trips_leaves_no_state_and_forgets_scale_and_offset():
    sae, h = random_sae(), states(6, 6)
    before = set(vars(sae))
    x, mean, std = sae.normalize(h)
    torch.testing.assert_close(x * std + mean, h)
    torch.testing.assert_close(x.square().sum(-1), torch.full((6,), 5.0), rtol=1e-5, atol=1e-5)  # d - 1
    a, b = sae.encode(h), sae.encode(10 * h + 3)
    assert torch.equal(a.indices, b.indices) and set(vars(sae)) == before
    torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-5)
    assert torch.equal(random_sae(normalize=False).normalize(h)[0], h)
    constant = torch.full((1, 6), 2.0, requires_grad=True)
    sae.encode(constant).values.sum().backward()
    assert torch.isfinite(constant.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_encoded_in_float32(dtype):
    sae = random_sae()
    h = (states(20, 6) * 2000).to(dtype)  # squares overflow float16
    wanted, out = sae(h.float()), sae(h)
    assert torch.equal(out.code.indices, wanted.code.indices) and torch.equal(out.code.values, wanted.code.values)
    assert out.code.values.dtype == torch.float32 and out.x_hat.dtype == dtype and torch.isfinite(out.x_hat).all()
    half = random_sae().to(dtype)
    assert half.encode(h).values.dtype == dtype and torch.isfinite(half(h).loss)
    close = (half.encode(h).dense() - wanted.code.dense()).abs().amax(-1) < 0.1
    assert close.float().mean() > 0.7  # rounding may swap features at the k-th place


def test_sparse_code_forms_agree():
    sae = random_sae(k=12)
    code = sae.encode(states(2, 3, 6))
    assert code.indices.shape == (2, 3, 12) and code.dense().shape == (2, 3, 20)
    csr = code.to_csr()
    np.testing.assert_array_equal(csr.toarray(), code.dense().reshape(6, 20).detach().numpy())
    assert (csr.data != 0).all() and csr.has_sorted_indices and csr.nnz < 6 * 12
    assert sae(states(2, 3, 6)).x_hat.shape == (2, 3, 6)
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
    sae = random_sae(**options)
    loaded = TopKSAE.load(sae.save(tmp_path))
    assert loaded.settings() == sae.settings() and loaded.content_hash() == sae.content_hash()
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([WEIGHTS, CONFIG])
    assert random_sae(4, **options).content_hash() != sae.content_hash()
    with torch.no_grad():
        loaded.b_pre.view(torch.int32)[0] ^= 1  # one bit
    assert loaded.content_hash() != sae.content_hash()


@pytest.mark.parametrize("change, words", [
    ({"encoder_bias": True}, "b_enc"), ({"n_features": 33}, "size mismatch"), ({"format": "other"}, "format"),
    ({"relu": "false"}, "relu='false'.*true or false"), ({"normalize": "no"}, "normalize='no'"),
    ({"encoder_bias": "no"}, "bias='no'"), ({"k": True}, "k=True")])
def test_settings_that_the_weights_do_not_have_are_refused(change, words, tmp_path):
    file = random_sae().save(tmp_path) / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises((ModelError, ConfigError), match=words):
        TopKSAE.load(tmp_path)


def test_impossible_sizes():
    for sizes in ((8, 4, 5), (1, 4, 2), (8, 4, 2.0)):
        with pytest.raises(ConfigError):
            TopKSAE(*sizes)
    with pytest.raises(DataError, match="d_model=6"):
        random_sae().encode(torch.zeros(2, 9))
