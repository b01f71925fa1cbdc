"""Sparse kernels against dense formulas: values, gradients (gradcheck and dense autograd), exact top-k."""

import pytest
import torch
from torch.autograd import gradcheck

from sarmlib.sae.kernels import Pairs, rows_dot, sparse_decode, topk, topk_autoencode, topk_encode

D, M, K, B = 6, 24, 4, 5


def weights(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=dtype) * scale).requires_grad_()

    return dict(W_enc=draw(M, D), b_pre=draw(D, scale=0.3), b_enc=draw(M, scale=0.3), W_dec=draw(M, D)), draw(B, D)


def dense_code(x, W_enc, b_pre, b_enc, k, relu):
    """The textbook formula with a dense [B,M] code."""
    pre = (x - b_pre) @ W_enc.T + (0 if b_enc is None else b_enc)
    values, indices = pre.topk(k, dim=-1)
    code = torch.zeros_like(pre).scatter(-1, indices, values)
    return code.relu() if relu else code


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("k", [K, M])  # at k = M half of the kept values are negative
def test_autoencode_equals_dense_autograd(bias, relu, k):
    p, x = weights()
    b_enc = p["b_enc"] if bias else None
    used = [t for t in (p["W_enc"], p["b_pre"], b_enc, p["W_dec"]) if t is not None]
    g = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    code = dense_code(x.detach(), p["W_enc"], p["b_pre"], b_enc, k, relu)
    dense = code @ p["W_dec"] + p["b_pre"]
    wanted = torch.autograd.grad(dense, used, g)
    x_hat, indices, values = topk_autoencode(x.detach(), p["W_enc"], p["b_pre"], b_enc, p["W_dec"], k, relu)
    torch.testing.assert_close(x_hat, dense)
    torch.testing.assert_close(torch.zeros_like(code).scatter(-1, indices, values), code)
    torch.testing.assert_close(torch.autograd.grad(x_hat, used, g), wanted)

    composed = sparse_decode(*topk_encode(x, p["W_enc"], p["b_pre"], b_enc, k, relu), p["W_dec"]) + p["b_pre"]
    torch.testing.assert_close(torch.autograd.grad(composed, used, g), wanted)


def test_gradcheck_of_every_kernel():
    p, x = weights()
    W_enc, b_pre, b_enc, W_dec = p.values()
    for relu in (True, False):
        assert gradcheck(lambda *a, r=relu: topk_encode(*a, K, r)[1], (x, W_enc, b_pre, b_enc))
        parameters = (W_enc, b_pre, b_enc, W_dec)
        assert gradcheck(lambda *p, r=relu: topk_autoencode(x.detach(), *p, K, r)[0], parameters)
    indices = torch.randint(M, (B, K), generator=torch.Generator().manual_seed(1))
    values = torch.randn(B, K, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v, w: sparse_decode(indices, v, w), (values, W_dec))


def test_gradient_of_the_state_through_a_frozen_encoder():
    """What the reward model needs: only x gets a gradient, and it is the dense one."""
    p, x = weights()
    p = {name: tensor.detach() for name, tensor in p.items()}
    w = torch.randn(M, dtype=torch.float64)
    indices, values = topk_encode(x, p["W_enc"], p["b_pre"], p["b_enc"], K, False)
    (got,) = torch.autograd.grad((values * w[indices]).sum(), x)
    (wanted,) = torch.autograd.grad((dense_code(x, p["W_enc"], p["b_pre"], p["b_enc"], K, False) @ w).sum(), x)
    torch.testing.assert_close(got, wanted)


def test_tangent_removes_exactly_the_radial_part():
    p, x = weights()
    unit = torch.nn.functional.normalize(p["W_dec"].detach(), dim=-1).requires_grad_()
    args = (x.detach(), p["W_enc"], p["b_pre"], None, unit, K, True)
    plain = torch.autograd.grad(topk_autoencode(*args)[0].square().sum(), unit)[0]
    tangent = torch.autograd.grad(topk_autoencode(*args, tangent=True)[0].square().sum(), unit)[0]
    torch.testing.assert_close(tangent, plain - (plain * unit).sum(-1, keepdim=True) * unit)
    assert (plain * unit).sum(-1).abs().max() > 1e-3
    assert (tangent * unit).sum(-1).abs().max() < 1e-12


def test_workspace_changes_nothing_and_may_be_larger_than_the_batch():
    p, x = weights(torch.float32)
    args = (x.detach(), p["W_enc"], p["b_pre"], p["b_enc"], p["W_dec"], K, True)
    plain = topk_autoencode(*args)
    with_space = topk_autoencode(*args, workspace=torch.full((B + 3, M), float("nan")))
    for a, b in zip(plain, with_space, strict=True):
        torch.testing.assert_close(a, b)


def test_matmul_dtype_rounds_only_the_code():
    p, x = weights(torch.float32)
    args = (x.detach(), p["W_enc"], p["b_pre"], p["b_enc"], p["W_dec"], K, True)
    exact, rounded = topk_autoencode(*args)[0], topk_autoencode(*args, matmul_dtype=torch.bfloat16)[0]
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("n, m, k", [(7, 64, 3), (3, 1024, 3), (2, 4096, 12), (5, 100, 7), (2, 8, 8), (1, 61, 1)])
def test_topk_is_exact(n, m, k):
    a = torch.randn(n, m, generator=torch.Generator().manual_seed(m))
    values, indices = topk(a, k)
    wanted = a.topk(k)
    assert torch.equal(values, wanted.values) and torch.equal(indices, wanted.indices)


def test_topk_with_ties_keeps_the_right_values_without_repeats():
    a = torch.randint(3, (16, 512), generator=torch.Generator().manual_seed(0)).float()
    values, indices = topk(a, 6)
    assert torch.equal(values, a.topk(6).values)
    assert torch.equal(values, a.gather(1, indices))
    assert all(len(set(row.tolist())) == 6 for row in indices)


def test_pairs_scatter_and_rows_dot():
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(M, (B, K), generator=generator)
    values, src = torch.randn(B, K, generator=generator), torch.randn(B, D, generator=generator)
    wanted = torch.zeros(M, D)
    for b in range(B):
        for j in range(K):
            wanted[indices[b, j]] += values[b, j] * src[b]
    torch.testing.assert_close(Pairs(indices, M).scatter(src, values), wanted)
    W = torch.randn(M, D, generator=generator)
    torch.testing.assert_close(rows_dot(indices, src, W), torch.einsum("bkd,bd->bk", W[indices], src))
