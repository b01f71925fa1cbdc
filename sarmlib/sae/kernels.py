"""Sparse forward and backward of a TopK autoencoder: only the encoder product is a dense matrix product.

Decoding and the gradients of W_dec and W_enc cost O(B k d) each: ``embedding_bag`` sums rows of W, and after one sort
of the B*k active (sample, feature) pairs by feature both weight gradients are again bag sums.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def topk_encode(x: Tensor, W_enc: Tensor, b_pre: Tensor, b_enc: Tensor | None, k: int | None, relu: bool,
                threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """TopK(W_enc (x - b_pre) + b_enc) (paper eq. 4) -> indices [B,k] int64, values [B,k], in falling order.

    ``relu`` sets negative survivors to 0.  With ``threshold`` [M], none below 0, it is JumpReLU, a [a > threshold],
    and k the most active features of any row; shorter rows are filled with zeros at other features.
    Differentiable in x and all parameters, but not in the threshold.
    """
    with full_precision(W_enc):
        return _TopKEncode.apply(x.to(W_enc.dtype), W_enc, b_pre, b_enc, k, relu, threshold)


def sparse_decode(indices: Tensor, values: Tensor, W: Tensor) -> Tensor:
    """W^T z = sum_j values[b,j] W[indices[b,j]] (paper eq. 3 without b_pre): [B,k], [B,k], [M,d] -> [B,d]."""
    return F.embedding_bag(indices, W, per_sample_weights=values.to(W.dtype), mode="sum")


def topk_autoencode(x: Tensor, W_enc: Tensor, b_pre: Tensor, b_enc: Tensor | None, W_dec: Tensor, k: int, relu: bool, *,
                    workspace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One training pass x [B,d] -> (x_hat [B,d], indices [B,k], values [B,k]); paper eqs. 3 and 4.

    ``workspace`` [>=B, M] receives the pre-activations, which saves page faults, and its type is that of the encoder
    product (bfloat16 on a GPU).  The gradient of W_dec comes without its radial part <g_m, W_m> W_m, which only
    changes a column's length.  x and the values get no gradient.
    """
    with full_precision(W_enc):
        return _TopKAutoencode.apply(x.to(W_enc.dtype), W_enc, b_pre, b_enc, W_dec, k, relu, workspace)


def topk(a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact ``a.topk(k, -1)`` of [B,M], faster for k << M: (values, indices), in falling order.

    Ties at the k-th place: the same row gives the same indices in every batch and on every run of one device and torch
    version, but they need not be the lowest ones.
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


class Pairs:
    """The B*k active (sample, feature) pairs sorted by feature."""

    def __init__(self, indices: Tensor, n_features: int):
        k = indices.shape[1]
        features, self.order = indices.reshape(-1).sort(stable=True)
        self.samples = self.order // k
        self.offsets = F.pad(torch.bincount(features, minlength=n_features).cumsum(0), (1, 0))

    def scatter(self, src: Tensor, values: Tensor) -> Tensor:
        """[B,d], [B,k] -> [M,d]; row m is sum_{b,j: indices[b,j]=m} values[b,j] src[b]."""
        weights = values.reshape(-1)[self.order]
        return F.embedding_bag(self.samples, src, self.offsets, per_sample_weights=weights, mode="sum",
                               include_last_offset=True)


def full_precision(W: Tensor) -> torch.autocast:
    """No autocast, which would round the product beside float32 weights."""
    return torch.autocast(W.device.type, enabled=False)


def _per_feature(indices: Tensor, values: Tensor, n_features: int) -> Tensor:
    return values.new_zeros(n_features).index_add_(0, indices.reshape(-1), values.reshape(-1))


def _keep_topk(pre: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    values, indices = topk(pre, k)
    return (values.clamp_(min=0) if relu else values), indices


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_pre, b_enc, k, relu, threshold):
        pre = F.linear(x - b_pre, W_enc, b_enc)
        if threshold is not None:
            k = max([1, *(pre > threshold).sum(-1).tolist()])
            pre.masked_fill_(pre <= threshold, 0)
        values, indices = _keep_topk(pre, k, relu)
        ctx.relu = relu
        ctx.save_for_backward(x, W_enc, b_pre, indices, values)
        ctx.mark_non_differentiable(indices)
        return indices, values

    @staticmethod
    def backward(ctx, _, g):
        x, W_enc, b_pre, indices, values = ctx.saved_tensors
        needs_x, needs_W, needs_pre, needs_enc = ctx.needs_input_grad[:4]
        g = (g * (values > 0) if ctx.relu else g).contiguous()
        to_x = sparse_decode(indices, g, W_enc) if needs_x or needs_pre else None
        to_W = Pairs(indices, W_enc.shape[0]).scatter(x - b_pre, g) if needs_W else None
        to_enc = _per_feature(indices, g, W_enc.shape[0]) if needs_enc else None
        return to_x if needs_x else None, to_W, -to_x.sum(0) if needs_pre else None, to_enc, None, None, None


class _TopKAutoencode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_pre, b_enc, W_dec, k, relu, workspace):
        centered = x - b_pre
        a, b, out = centered.to(workspace.dtype), W_enc.t().to(workspace.dtype), workspace[: len(x)]
        if b_enc is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(b_enc.to(workspace.dtype), a, b, out=out)
        values, indices = _keep_topk(out, k, relu)
        values = values.to(x.dtype)
        ctx.relu = relu
        ctx.save_for_backward(centered, W_enc, W_dec, indices, values)
        ctx.mark_non_differentiable(indices, values)
        with torch.enable_grad():  # keeps what embedding_bag needs for the gradient of its values
            ctx.leaf = values.detach().requires_grad_()
            ctx.decoded = sparse_decode(indices, ctx.leaf, W_dec.detach())
        return ctx.decoded.detach().add_(b_pre), indices, values  # in place: no gradient reads the bag's output

    @staticmethod
    def backward(ctx, g, _, __):
        centered, W_enc, W_dec, indices, values = ctx.saved_tensors
        n_features, g = W_enc.shape[0], g.contiguous()
        (d_values,) = torch.autograd.grad(ctx.decoded, ctx.leaf, g, retain_graph=True)
        if ctx.relu:
            d_values = d_values * (values > 0)
        pairs = Pairs(indices, n_features)  # sorted once for both weight gradients
        radial = _per_feature(indices, values * d_values, n_features)
        to_dec = pairs.scatter(g, values).addcmul_(W_dec, radial[:, None], value=-1)
        to_enc = pairs.scatter(centered, d_values)
        per_feature = _per_feature(indices, d_values, n_features)
        # d/db_pre goes through the decoder (+) and, as -W_enc b_pre, through the encoder: an M-vector times W_enc
        to_pre = g.sum(0) - per_feature @ W_enc
        return None, to_enc, to_pre, per_feature if ctx.needs_input_grad[3] else None, to_dec, None, None, None
