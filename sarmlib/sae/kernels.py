"""Sparse forward and backward of a TopK autoencoder: only the encoder product is a dense matrix product.

With k of M features active, a dense decode and the dense gradients of W_dec and W_enc are three more [B,d]x[d,M]
products on zeros.  Here each costs O(B k d): rows of W are gathered and summed by ``embedding_bag``, and the B*k active
(sample, feature) pairs are sorted by feature once, after which both weight gradients are again bag sums.
Gradients equal those of the dense formula; at ties the kept indices decide.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def topk_encode(
    x: Tensor, W_enc: Tensor, b_pre: Tensor, b_enc: Tensor | None, k: int, relu: bool
) -> tuple[Tensor, Tensor]:
    """TopK(W_enc (x - b_pre) + b_enc) (paper eq. 4) -> indices [B,k] int64, values [B,k], in falling order.

    ``relu`` sets negative survivors to 0.  Differentiable in x and all parameters without a [B,M] gradient.
    """
    return _TopKEncode.apply(x, W_enc, b_pre, b_enc, k, relu)


def sparse_decode(indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """W_dec^T z = sum_j values[b,j] W_dec[indices[b,j]] (paper eq. 3 without b_pre): [B,k], [B,k], [M,d] -> [B,d]."""
    return _SparseDecode.apply(indices, values, W_dec)


def topk_autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_pre: Tensor,
    b_enc: Tensor | None,
    W_dec: Tensor,
    k: int,
    relu: bool,
    *,
    workspace: Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
    tangent: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One training pass x [B,d] -> (x_hat [B,d], indices [B,k], values [B,k]); paper eqs. 3 and 4.

    ``workspace`` [>=B, M] receives the pre-activations (saves page faults); ``matmul_dtype`` is the type of the encoder
    product (bfloat16 on GPU; everything else stays in the type of x).  ``tangent`` returns the gradient of W_dec
    without its radial part <g_m, W_m> W_m, which is free here: it is a sum of values * d_values.
    x itself and the values get no gradient: the loss is a function of x_hat.
    """
    return _TopKAutoencode.apply(x, W_enc, b_pre, b_enc, W_dec, k, relu, workspace, matmul_dtype, tangent)


def preactivations(x: Tensor, W_enc: Tensor, b_pre: Tensor, b_enc: Tensor | None, out: Tensor | None = None) -> Tensor:
    """W_enc (x - b_pre) + b_enc (paper eq. 2 before sigma): [B,d] -> [B,M]."""
    return _product(x - b_pre, W_enc, b_enc, out)


def _product(centered: Tensor, W_enc: Tensor, b_enc: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:
        return F.linear(centered, W_enc, b_enc)
    out = out[: centered.shape[0]]
    return torch.mm(centered, W_enc.t(), out=out) if b_enc is None else torch.addmm(b_enc, centered, W_enc.t(), out=out)


def rows_sum(indices: Tensor, values: Tensor, W: Tensor) -> Tensor:
    """sum_j values[b,j] W[indices[b,j]]: [B,k], [B,k], [M,d] -> [B,d]."""
    return F.embedding_bag(indices, W, per_sample_weights=values, mode="sum")


def rows_dot(indices: Tensor, g: Tensor, W: Tensor) -> Tensor:
    """<g[b], W[indices[b,j]]>: the gradient of ``rows_sum`` to its values; [B,k], [B,d], [M,d] -> [B,k]."""
    with torch.enable_grad():  # embedding_bag's own weight gradient gathers no [B,k,d] temporary
        values = torch.zeros(indices.shape, dtype=W.dtype, device=W.device, requires_grad=True)
        return torch.autograd.grad(rows_sum(indices, values, W.detach()), values, g)[0]


class Pairs:
    """The B*k active pairs sorted by feature; ``scatter(src, v)`` = sum over pairs of v * src[sample] per feature."""

    def __init__(self, indices: Tensor, n_features: int):
        batch, k = indices.shape
        features, self.order = indices.reshape(-1).sort(stable=True)
        self.samples = self.order // k
        self.offsets = F.pad(torch.bincount(features, minlength=n_features).cumsum(0), (1, 0))

    def scatter(self, src: Tensor, values: Tensor) -> Tensor:
        """[B,d], [B,k] -> [M,d]; row m is sum_{b,j: indices[b,j]=m} values[b,j] src[b]."""
        weights = values.reshape(-1)[self.order]
        return F.embedding_bag(
            self.samples, src, self.offsets, per_sample_weights=weights, mode="sum", include_last_offset=True
        )


def _per_feature(indices: Tensor, values: Tensor, n_features: int) -> Tensor:
    return values.new_zeros(n_features).index_add_(0, indices.reshape(-1), values.reshape(-1))


def topk(a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact ``a.topk(k, -1)`` of [B,M], faster for k << M; among equal values other indices may be kept.

    Column j belongs to group j mod G.  The k largest entries lie in the k groups with the largest maxima, so two small
    searches (G groups, then k M/G candidates) replace one over M; M/G near sqrt(M/k) makes them equally long.
    """
    n_features = a.shape[-1]
    size = 2 ** round(math.log2(max(n_features / k, 1)) / 2)
    while size > 1 and n_features % size:
        size //= 2
    groups = n_features // size
    if size < 4 or groups < k:
        return a.topk(k, dim=-1)
    top_groups = a.view(-1, size, groups).amax(1).topk(k, dim=-1, sorted=False).indices
    steps = torch.arange(0, n_features, groups, device=a.device)
    candidates = (top_groups[:, :, None] + steps).flatten(1)
    values, chosen = a.gather(1, candidates).topk(k, dim=-1)
    return values, candidates.gather(1, chosen)


def _keep_topk(pre: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    values, indices = topk(pre, k)
    return (values.clamp_(min=0) if relu else values), indices


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_pre, b_enc, k, relu):
        values, indices = _keep_topk(preactivations(x, W_enc, b_pre, b_enc), k, relu)
        ctx.relu = relu
        ctx.save_for_backward(x, W_enc, b_pre, indices, values)
        ctx.mark_non_differentiable(indices)
        return indices, values

    @staticmethod
    def backward(ctx, _, g):
        x, W_enc, b_pre, indices, values = ctx.saved_tensors
        needs_x, needs_W, needs_pre, needs_enc = ctx.needs_input_grad[:4]
        g = (g * (values > 0) if ctx.relu else g).contiguous()
        to_x = rows_sum(indices, g, W_enc) if needs_x or needs_pre else None
        return (
            to_x if needs_x else None,
            Pairs(indices, W_enc.shape[0]).scatter(x - b_pre, g) if needs_W else None,
            -to_x.sum(0) if needs_pre else None,
            _per_feature(indices, g, W_enc.shape[0]) if needs_enc else None,
            None,
            None,
        )


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, values, W_dec):
        ctx.save_for_backward(indices, values, W_dec)
        return rows_sum(indices, values, W_dec)

    @staticmethod
    def backward(ctx, g):
        indices, values, W_dec = ctx.saved_tensors
        g = g.contiguous()
        to_values = rows_dot(indices, g, W_dec) if ctx.needs_input_grad[1] else None
        to_W = Pairs(indices, W_dec.shape[0]).scatter(g, values) if ctx.needs_input_grad[2] else None
        return None, to_values, to_W


class _TopKAutoencode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_pre, b_enc, W_dec, k, relu, workspace, matmul_dtype, tangent):
        centered = x - b_pre
        if matmul_dtype is None or matmul_dtype == x.dtype:
            pre = _product(centered, W_enc, b_enc, workspace)
        else:
            bias = None if b_enc is None else b_enc.to(matmul_dtype)
            pre = F.linear(centered.to(matmul_dtype), W_enc.to(matmul_dtype), bias)
        values, indices = _keep_topk(pre, k, relu)
        values = values.to(x.dtype)
        ctx.relu, ctx.tangent = relu, tangent
        ctx.save_for_backward(centered, W_enc, W_dec, indices, values)
        ctx.mark_non_differentiable(indices, values)
        with torch.enable_grad():  # keeps what embedding_bag needs for the gradient of its values
            ctx.leaf = values.detach().requires_grad_()
            ctx.decoded = rows_sum(indices, ctx.leaf, W_dec.detach())
        return ctx.decoded.detach().add_(b_pre), indices, values  # in place: no gradient reads the bag's output

    @staticmethod
    def backward(ctx, g, _, __):
        centered, W_enc, W_dec, indices, values = ctx.saved_tensors
        n_features, g = W_enc.shape[0], g.contiguous()
        (d_values,) = torch.autograd.grad(ctx.decoded, ctx.leaf, g, retain_graph=True)
        if ctx.relu:
            d_values = d_values * (values > 0)
        pairs = Pairs(indices, n_features)  # sorted once for both weight gradients
        to_dec = pairs.scatter(g, values)
        if ctx.tangent:
            radial = _per_feature(indices, values * d_values, n_features)
            to_dec.addcmul_(W_dec, radial[:, None], value=-1)
        to_enc = pairs.scatter(centered, d_values)
        per_feature = _per_feature(indices, d_values, n_features)
        # d/db_pre goes through the decoder (+) and, as -W_enc b_pre, through the encoder: an M-vector times W_enc
        to_pre = g.sum(0) - per_feature @ W_enc
        return None, to_enc, to_pre, per_feature if ctx.needs_input_grad[3] else None, to_dec, *(None,) * 5
