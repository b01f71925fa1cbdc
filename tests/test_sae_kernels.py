"""Sparse kernels against dense formulas: values, gradients, exact top-k."""

import pytest
import torch

from sarmlib.sae.kernels import sparse_decode, topk, topk_autoencode, topk_encode

D, M, K, B = 6, 24, 4, 5


def weights(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=dtype) * scale).requires_grad_()

    return dict(W_enc=draw(M, D), b_pre=draw(D, scale=0.3), b_enc=draw(M, scale=0.3), W_dec=draw(M, D)), draw(B, D)


def autoencode(x, W_enc, *args, dtype=None):
    workspace = torch.full((B + 3, M), float("nan"), dtype=dtype or W_enc.dtype)
    return topk_autoencode(x.detach(), W_enc, *args, workspace=workspace)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("k", [K, M])  # at k = M half of the kept values are negative
def test_autoencode_equals_dense_autograd(bias, relu, k):
    """The textbook formula with a dense [B,M] code, and its gradients."""
    p, x = weights()
    b_enc = p["b_enc"] if bias else None
    used = [t for t in (p["W_enc"], p["b_pre"], b_enc, p["W_dec"]) if t is not None]
    g = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    pre = (x - p["b_pre"]) @ p["W_enc"].T + (b_enc if bias else 0)
    kept, where = pre.topk(k, dim=-1)
    code = torch.zeros_like(pre).scatter(-1, where, kept.relu() if relu else kept)
    dense = code @ p["W_dec"] + p["b_pre"]
    wanted = torch.autograd.grad(dense, [x, *used], g)
    x_hat, indices, values = autoencode(x, p["W_enc"], p["b_pre"], b_enc, p["W_dec"], k, relu)
    torch.testing.assert_close(x_hat, dense)
    torch.testing.assert_close(torch.zeros_like(code).scatter(-1, indices, values), code)
    got = torch.autograd.grad(x_hat, used, g)
    torch.testing.assert_close(got[:-1], wanted[1:-1])
    radial = (wanted[-1] * p["W_dec"]).sum(-1, keepdim=True)
    torch.testing.assert_close(got[-1], (wanted[-1] - radial * p["W_dec"]).detach())  # no radial part in W_dec's
    assert radial.abs().max() > 1e-3

    composed = sparse_decode(*topk_encode(x, p["W_enc"], p["b_pre"], b_enc, k, relu), p["W_dec"]) + p["b_pre"]
    torch.testing.assert_close(torch.autograd.grad(composed, [x, *used], g), wanted)


def test_a_bfloat16_workspace_rounds_only_the_code():
    p, x = weights(torch.float32)
    args = (x, p["W_enc"], p["b_pre"], p["b_enc"], p["W_dec"], K, True)
    plain, rounded = autoencode(*args)[0], autoencode(*args, dtype=torch.bfloat16)[0]
    assert rounded.dtype == torch.float32 and 0 < (plain - rounded).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("kernel", ["encode", "autoencode", "decode"])
def test_autocast_and_bfloat16_gradients_meet_float32_weights(kernel):
    """Values as without autocast; a bfloat16 gradient gives that of its float32 copy, in the weights' type."""
    p, x = weights(torch.float32)
    W_enc, b_pre, b_enc, W_dec = p.values()
    indices = torch.arange(K).repeat(B, 1)

    def run(x):
        if kernel == "encode":
            return topk_encode(x, W_enc, b_pre, b_enc, K, True)[1], [x, W_enc, b_pre, b_enc]
        if kernel == "decode":
            return sparse_decode(indices, x[:, :K], W_dec), [x, W_dec]
        return autoencode(x, W_enc, b_pre, b_enc, W_dec, K, True)[0], [W_enc, b_pre, b_enc, W_dec]

    half = x.detach().bfloat16().requires_grad_()
    wanted, used = run(half.detach().float().requires_grad_())
    g = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    wanted_grads = torch.autograd.grad(wanted, used, g.float())
    with torch.autocast("cpu", torch.bfloat16):
        got, used = run(half)
        assert torch.equal(got, wanted) and got.dtype == torch.float32
        grads = torch.autograd.grad(got, used, g)
    for a, b, tensor in zip(grads, wanted_grads, used, strict=True):
        assert a.dtype == tensor.dtype
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("n, m, k", [(7, 64, 3), (3, 1024, 3), (2, 4096, 12), (5, 100, 7), (2, 8, 8), (1, 61, 1),
                                     (16, 512, 6)])
def test_topk_is_exact_and_with_ties_keeps_the_right_values_without_repeats(n, m, k):
    generator = torch.Generator().manual_seed(m)
    a, tied = torch.randn(n, m, generator=generator), torch.randint(3, (n, m), generator=generator).float()
    values, indices = topk(a, k)
    assert torch.equal(values, a.topk(k).values) and torch.equal(indices, a.topk(k).indices)
    values, indices = topk(tied, k)
    assert torch.equal(values, tied.topk(k).values) and torch.equal(values, tied.gather(1, indices))
    for row in range(n):  # a row alone keeps what it keeps in a batch
        assert len(set(indices[row].tolist())) == k and torch.equal(topk(tied[row : row + 1], k)[1][0], indices[row])
