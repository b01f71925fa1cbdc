"""The TopK sparse autoencoder of the paper (eqs. 2-5, 7-8).

    x     = (h - mean(h)) / (std(h) + 1e-6)              per vector; unbiased std; statistics are returned, never kept
    z     = TopK(W_enc (x - b_pre) [+ b_enc])            eqs. 4, 7
            or a [a > threshold] of the same a           JumpReLU, of released SAEs (arXiv 2407.14435)
    x_hat = W_dec^T z + b_pre                            eqs. 3, 8   (row m of our W_dec is the paper's column m)
    loss  = mean_b |x - x_hat|^2 / |x|^2                 eq. 5 up to a constant: |x|^2 = d - 1 after normalisation
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sarmlib.errors import ConfigError, DataError, ModelError, SarmlibError
from sarmlib.sae.kernels import full_precision, sparse_decode, topk_encode
from sarmlib.store import write_atomic, write_json

STD_EPS = 1e-6
WEIGHTS, CONFIG = "sae.safetensors", "sae_config.json"
FORMAT = "sarmlib.topk_sae.v1"


class SparseCode(NamedTuple):
    """Sparse feature vectors z: the k kept features of each sample, strongest first, all different."""

    indices: Tensor  # [..., k] int64: which features were kept
    values: Tensor  # [..., k]: their activations z (0: a negative one under ReLU, or fewer than k are active)
    n_features: int  # M

    def dense(self) -> Tensor:
        """z as a dense [..., M] tensor."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], self.n_features)
        return zeros.scatter(-1, self.indices, self.values)

    def to_csr(self):
        """z as a float32 ``scipy.sparse.csr_array`` [n, M] without stored zeros and with sorted indices."""
        from scipy.sparse import csr_array
        values = self.values.detach().float().cpu().numpy().flatten()  # copies: what follows works in place
        indices = self.indices.cpu().numpy().flatten()
        rows = torch.arange(self.indices.shape[:-1].numel() + 1).mul(self.indices.shape[-1]).numpy()
        csr = csr_array((values, indices, rows), shape=(len(rows) - 1, self.n_features))
        csr.eliminate_zeros()
        csr.sort_indices()
        return csr


class SAEOutput(NamedTuple):
    """What ``TopKSAE.forward`` returns."""

    x_hat: Tensor  # [..., d] reconstruction in the space of the input (normalisation undone)
    code: SparseCode
    loss: Tensor  # scalar: mean_b |x - x_hat|^2 / |x|^2 in normalised space (eq. 5)


class TopKSAE(nn.Module):
    """TopK sparse autoencoder, paper eqs. 2-5 and 7-8.

    Parameters: W_enc [M,d], b_pre [d], optional b_enc [M], W_dec [M,d] with unit rows (= the paper's decoder columns),
    at first W_dec = W_enc, random directions from ``generator``.  All is computed in their type, also under autocast.
    ``d_model``: d; ``n_features``: M (paper: 16 d); ``k``: features kept per vector (paper: 3/64 d), or None: JumpReLU,
    which keeps those above a fixed ``threshold`` [M] >= 0 (a buffer); ``encoder_bias``: add b_enc before TopK;
    ``relu``: set negative survivors of TopK to 0 (the released code has the bias and no ReLU); ``normalize``:
    standardise each vector first.
    Raises ConfigError for impossible sizes, DataError for states of another size.
    """

    def __init__(self, d_model: int, n_features: int, k: int | None, *, encoder_bias: bool = False,
                 relu: bool = True, normalize: bool = True, generator: torch.Generator | None = None):
        super().__init__()
        most = n_features if k is None else k
        integers = all(type(size) is int for size in (d_model, n_features, most))
        if not integers or d_model < 2 or not 1 <= most <= n_features:
            raise ConfigError(f"{d_model=}, {n_features=}, {k=} are no integers with d_model > 1, 1 <= k <= n_features")
        if not all(isinstance(switch, bool) for switch in (encoder_bias, relu, normalize)):
            raise ConfigError(f"{encoder_bias=}, {relu=}, {normalize=} must be true or false")
        self.d_model, self.n_features, self.k = d_model, n_features, k
        self.relu, self.normalizes = relu, normalize
        directions = nn.functional.normalize(torch.randn(n_features, d_model, generator=generator), dim=-1)
        self.W_enc = nn.Parameter(directions)
        self.W_dec = nn.Parameter(directions.clone())
        self.b_pre = nn.Parameter(torch.zeros(d_model))
        self.b_enc = nn.Parameter(torch.zeros(n_features)) if encoder_bias else None
        self.register_buffer("threshold", torch.zeros(n_features) if k is None else None)

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x - mean) / (std + 1e-6) per vector, std unbiased: [..., d] -> (x_norm, mean [..., 1], std + 1e-6 [..., 1]).

        Half precision is normalised in float32, where squares cannot overflow; without normalisation mean = 0, std = 1.
        """
        if x.shape[-1] != self.d_model:
            raise DataError(f"the last dimension of the input is {x.shape[-1]}, the SAE expects d_model={self.d_model}")
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        if not self.normalizes:
            zero = x.new_zeros(*x.shape[:-1], 1)
            return x, zero, zero + 1
        mean = x.mean(-1, keepdim=True)
        centered = x - mean
        # |x - mean| / sqrt(d - 1) is the unbiased std; unlike Tensor.std it is fast and has a gradient at 0
        std = torch.linalg.vector_norm(centered, dim=-1, keepdim=True) / math.sqrt(self.d_model - 1) + STD_EPS
        # of a constant state all is zero, its gradient too
        return centered / std.masked_fill(std == STD_EPS, torch.inf), mean, std

    def preactivations(self, x: Tensor) -> Tensor:
        """W_enc (x_norm - b_pre) [+ b_enc] before TopK (eq. 2), of raw input x: [..., d] -> [..., M] (dense)."""
        x_norm = self.normalize(x)[0].to(self.W_enc.dtype)
        with full_precision(self.W_enc):
            return nn.functional.linear(x_norm - self.b_pre, self.W_enc, self.b_enc)

    def encode(self, x: Tensor) -> SparseCode:
        """z = TopK(W_enc (x_norm - b_pre)) (eqs. 4, 7) of raw input x [..., d]; normalises first if the SAE does."""
        return self._encode_normalized(self.normalize(x)[0])

    def decode(self, code: SparseCode) -> Tensor:
        """x_hat = W_dec^T z + b_pre (eqs. 3, 8): [..., d], in normalised space."""
        k = code.indices.shape[-1]
        flat = sparse_decode(code.indices.reshape(-1, k), code.values.reshape(-1, k), self.W_dec)
        return flat.view(*code.indices.shape[:-1], self.d_model) + self.b_pre

    def forward(self, x: Tensor, part: str = "all"):
        """Encode, decode and undo the normalisation -> `SAEOutput`; the loss is taken in normalised space.

        ``part``: "code" gives :meth:`encode` alone, "preactivations" those: called as a module, so that hooks
        (offloading) see it.
        """
        if part != "all":
            return self.encode(x) if part == "code" else self.preactivations(x)
        x_norm, mean, std = self.normalize(x)
        code = self._encode_normalized(x_norm)
        x_hat = self.decode(code)
        return SAEOutput((x_hat * std + mean).to(x.dtype), code, normalized_mse(x_hat, x_norm))

    @torch.no_grad()
    def renormalize_decoder(self) -> None:
        """Bring every decoder row back to unit length ("maintaining each column at unit length")."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_(min=torch.finfo(self.W_dec.dtype).tiny))

    def settings(self) -> dict:
        """The constructor arguments (JSON types)."""
        return {"d_model": self.d_model, "n_features": self.n_features, "k": self.k,
                "encoder_bias": self.b_enc is not None, "relu": self.relu, "normalize": self.normalizes}

    def content_hash(self) -> str:
        """sha256 over settings and parameter bytes; equal on every device, changed by any bit of any weight."""
        return hash_tensors(self.state_dict(), json.dumps(self.settings(), sort_keys=True))

    def save(self, folder: str | os.PathLike) -> Path:
        """Write sae.safetensors and sae_config.json atomically."""
        folder = Path(folder)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomic(folder / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
        write_json(folder / CONFIG, {"format": FORMAT, **self.settings()})
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "TopKSAE":
        """Read what ``save`` wrote; ModelError when a file, a weight or a shape is missing or wrong."""
        with readable(folder, f"SAE ({WEIGHTS} + {CONFIG})"):
            settings = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
            if settings.pop("format", None) != FORMAT:
                raise ModelError(f"{str(folder)!r}: the format is not {FORMAT!r}")
            return cls.from_state(load_file(Path(folder, WEIGHTS)), **settings)

    @classmethod
    def from_state(cls, state: dict[str, Tensor], **settings) -> "TopKSAE":
        """An SAE around given weights, without drawing random ones first."""
        with torch.device("meta"):
            sae = cls(**settings)
        if wrong := [f"{name} {tensor.dtype}" for name, tensor in state.items() if not tensor.is_floating_point()]:
            raise ModelError(f"weights of an SAE are real numbers, not {', '.join(wrong)}")
        if (sae.k is None) != ("threshold" in state):
            raise ConfigError(f"k={sae.k} {'with' if sae.k else 'without'} a threshold: a TopK SAE needs k, a "
                              "JumpReLU SAE has a threshold in its place; pass k for the first only")
        sae.load_state_dict(state, assign=True)
        return sae.requires_grad_(True)

    def _encode_normalized(self, x: Tensor) -> SparseCode:
        flat = x.reshape(-1, self.d_model)
        indices, values = topk_encode(flat, self.W_enc, self.b_pre, self.b_enc, self.k, self.relu, self.threshold)
        shape = (*x.shape[:-1], indices.shape[-1])
        return SparseCode(indices.view(shape), values.view(shape), self.n_features)


def normalized_mse(x_hat: Tensor, x: Tensor) -> Tensor:
    """mean_b |x - x_hat|^2 / |x|^2 (eq. 5 relative to the input's energy) -> scalar; a vector x of zeros counts 0."""
    energy = x.square().sum(-1)
    return ((x_hat - x).square().sum(-1) / energy.masked_fill(energy == 0, torch.inf)).mean()


def hash_tensors(tensors: Mapping[str, Tensor], text: str) -> str:
    """sha256 over a text and the names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def readable(path: str | os.PathLike, what: str, kind: type[SarmlibError] = ModelError) -> Iterator[None]:
    """One error for all that damaged bytes, missing names and wrong shapes raise."""
    try:
        yield
    except SarmlibError:
        raise
    except Exception as error:
        raise kind(f"{str(path)!r} is no readable {what}: {error!r}") from error
