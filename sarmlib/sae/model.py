"""The TopK sparse autoencoder of the paper (eqs. 2-5, 7-8).

    x     = (h - mean(h)) / (std(h) + 1e-6)              per vector; unbiased std; statistics are returned, never kept
    z     = TopK(W_enc (x - b_pre) [+ b_enc])            eqs. 4, 7
    x_hat = W_dec^T z + b_pre                            eqs. 3, 8   (row m of our W_dec is the paper's column m)
    loss  = mean_b |x - x_hat|^2 / |x|^2                 eq. 5 up to a constant: |x|^2 = d - 1 after normalisation
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sarmlib.errors import ArtifactError, ConfigError, DataError, ModelError
from sarmlib.sae.kernels import preactivations, sparse_decode, topk_encode

STD_EPS = 1e-6
WEIGHTS, CONFIG = "sae.safetensors", "sae_config.json"


class SparseCode(NamedTuple):
    """A batch of sparse feature vectors z: the k kept features of each sample, strongest first."""

    indices: Tensor
    """[..., k] int64: which features were kept."""
    values: Tensor
    """[..., k]: their activations z (0 where ReLU cut a negative survivor)."""
    n_features: int
    """M."""

    def dense(self) -> Tensor:
        """z as a dense [..., M] tensor."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], self.n_features)
        return zeros.scatter(-1, self.indices, self.values)

    def to_csr(self):
        """z as a float32 ``scipy.sparse.csr_array`` [n, M] without stored zeros and with sorted indices."""
        from scipy.sparse import csr_array

        k = self.indices.shape[-1]
        # copies: eliminate_zeros and sort_indices work in place
        values = self.values.detach().float().reshape(-1, k).cpu().numpy().copy()
        indices = self.indices.reshape(-1, k).cpu().numpy().copy()
        rows = torch.arange(len(values) + 1).mul(k).numpy()
        csr = csr_array((values.ravel(), indices.ravel(), rows), shape=(len(values), self.n_features))
        csr.eliminate_zeros()
        csr.sort_indices()
        return csr


class SAEOutput(NamedTuple):
    """What ``TopKSAE.forward`` returns."""

    x_hat: Tensor
    """[..., d] reconstruction in the space of the input (normalisation undone)."""
    code: SparseCode
    """z."""
    loss: Tensor
    """Scalar: mean_b |x - x_hat|^2 / |x|^2 in normalised space (eq. 5)."""
    mean: Tensor
    """[..., 1] per-vector mean of the input (0 without normalisation)."""
    std: Tensor
    """[..., 1] per-vector std + 1e-6 of the input (1 without normalisation)."""


class TopKSAE(nn.Module):
    """TopK sparse autoencoder, paper eqs. 2-5 and 7-8.

    Parameters: W_enc [M,d], b_pre [d], optional b_enc [M], W_dec [M,d] with unit rows (= the paper's decoder columns).
    Initialisation is tied: W_dec = W_enc, random directions from ``generator``; b_pre = 0 until trained from data.

    Args:
        d_model: d, size of a hidden state (at least 2: the std is unbiased).
        n_features: M (paper: 16 d).  k: features kept per vector (paper: 3/64 d), 1 <= k <= M.
        encoder_bias: add b_enc before TopK (the released code has it, the paper's equations have not).
        relu: set negative survivors of TopK to 0 (the released code keeps them signed).
        normalize: standardise each vector first (paper: "we normalize the LLM activations").

    Raises ConfigError for impossible sizes.
    """

    def __init__(
        self,
        d_model: int,
        n_features: int,
        k: int,
        *,
        encoder_bias: bool = False,
        relu: bool = True,
        normalize: bool = True,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        for name, value, low in (("d_model", d_model, 2), ("n_features", n_features, 1), ("k", k, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name}={value!r} must be an integer of at least {low}")
        if k > n_features:
            raise ConfigError(f"k={k} is larger than n_features={n_features}; lower k or widen the dictionary")
        self.d_model, self.n_features, self.k = d_model, n_features, k
        self.relu, self.normalizes = bool(relu), bool(normalize)
        directions = nn.functional.normalize(torch.randn(n_features, d_model, generator=generator), dim=-1)
        self.W_enc = nn.Parameter(directions)
        self.W_dec = nn.Parameter(directions.clone())
        self.b_pre = nn.Parameter(torch.zeros(d_model))
        self.b_enc = nn.Parameter(torch.zeros(n_features)) if encoder_bias else None

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x - mean) / (std + 1e-6) per vector, std unbiased: [..., d] -> (x_norm, mean [..., 1], std + 1e-6 [..., 1]).

        Without normalisation x is returned with mean 0 and std 1, so that ``decode`` needs no special case.
        """
        if not self.normalizes:
            zero = x.new_zeros(*x.shape[:-1], 1)
            return x, zero, zero + 1
        mean = x.mean(-1, keepdim=True)
        centered = x - mean
        # |x - mean| / sqrt(d - 1) is the unbiased std; unlike Tensor.std it is fast and has a gradient at 0
        std = torch.linalg.vector_norm(centered, dim=-1, keepdim=True) / math.sqrt(self.d_model - 1) + STD_EPS
        return centered / std, mean, std

    def preactivations(self, x: Tensor) -> Tensor:
        """W_enc (x_norm - b_pre) [+ b_enc] before TopK, on raw input x: [..., d] -> [..., M] (dense)."""
        return preactivations(self.normalize(self._checked(x))[0], self.W_enc, self.b_pre, self.b_enc)

    def encode(self, x: Tensor) -> SparseCode:
        """z = TopK(W_enc (x_norm - b_pre)) (eqs. 4, 7) of raw input x [..., d]; normalises first if the SAE does."""
        return self._encode_normalized(self.normalize(self._checked(x))[0])

    def decode(self, code: SparseCode | Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """x_hat = W_dec^T z + b_pre (eqs. 3, 8): [..., d].

        In normalised space, unless the statistics from ``normalize`` are passed: then x_hat * std + mean.
        A dense z [..., M] is accepted too.
        """
        if isinstance(code, Tensor):
            x_hat = code @ self.W_dec + self.b_pre
        else:
            k = code.indices.shape[-1]
            flat = sparse_decode(code.indices.reshape(-1, k), code.values.reshape(-1, k), self.W_dec)
            x_hat = flat.view(*code.indices.shape[:-1], self.d_model) + self.b_pre
        if std is not None:
            x_hat = x_hat * std
        return x_hat if mean is None else x_hat + mean

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode, decode and undo the normalisation; the loss is taken in normalised space."""
        x_norm, mean, std = self.normalize(self._checked(x))
        code = self._encode_normalized(x_norm)
        x_hat = self.decode(code)
        return SAEOutput(x_hat * std + mean, code, normalized_mse(x_hat, x_norm), mean, std)

    @torch.no_grad()
    def renormalize_decoder(self) -> None:
        """Bring every decoder row back to unit length ("maintaining each column at unit length")."""
        norms = self.W_dec.norm(dim=-1, keepdim=True).clamp_(min=torch.finfo(self.W_dec.dtype).tiny)
        self.W_dec.div_(norms)

    def settings(self) -> dict:
        """The constructor arguments (JSON types)."""
        return {
            "d_model": self.d_model,
            "n_features": self.n_features,
            "k": self.k,
            "encoder_bias": self.b_enc is not None,
            "relu": self.relu,
            "normalize": self.normalizes,
        }

    def content_hash(self) -> str:
        """sha256 over settings and parameter bytes; equal on every device, changed by any bit of any weight."""
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save(self, folder: str | os.PathLike) -> Path:
        """Write sae.safetensors and sae_config.json; each file appears complete or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomic(folder / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
        text = json.dumps({"format": "sarmlib.topk_sae.v1", **self.settings()}, indent=2) + "\n"
        write_atomic(folder / CONFIG, lambda path: path.write_text(text))
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike, *, device: str | torch.device = "cpu") -> TopKSAE:
        """Read what ``save`` wrote; ModelError when a file, a weight or a shape is missing or wrong."""
        folder = Path(folder)
        try:
            settings = json.loads((folder / CONFIG).read_text())
            state = load_file(folder / WEIGHTS, device=str(device))
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise ModelError(f"{str(folder)!r} holds no readable SAE ({WEIGHTS} + {CONFIG}): {error}") from error
        if not isinstance(settings, dict) or settings.pop("format", None) != "sarmlib.topk_sae.v1":
            raise ModelError(f"{str(folder / CONFIG)!r} has not the format 'sarmlib.topk_sae.v1'")
        try:
            with torch.device("meta"):
                sae = cls(**settings)
            sae.load_state_dict(state, assign=True)
        except (TypeError, RuntimeError) as error:
            raise ModelError(f"SAE weights and config in {str(folder)!r} do not match: {error}") from error
        return sae.requires_grad_(True)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings().items())

    def _encode_normalized(self, x: Tensor) -> SparseCode:
        indices, values = topk_encode(
            x.reshape(-1, self.d_model), self.W_enc, self.b_pre, self.b_enc, self.k, self.relu
        )
        shape = (*x.shape[:-1], self.k)
        return SparseCode(indices.view(shape), values.view(shape), self.n_features)

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_model:
            raise DataError(f"the last dimension of the input is {x.shape[-1]}, the SAE expects d_model={self.d_model}")
        return x


def normalized_mse(x_hat: Tensor, x: Tensor) -> Tensor:
    """mean_b |x - x_hat|^2 / |x|^2 (eq. 5 relative to the input's energy): [..., d], [..., d] -> scalar.

    A vector of zeros (a constant state after normalisation) counts 0.
    """
    energy = x.square().sum(-1)
    return ((x_hat - x).square().sum(-1) / energy.masked_fill(energy == 0, torch.inf)).mean()


def default_k(d_model: int) -> int:
    """The paper's sparsity: k = 3/64 of the hidden size (at least 1)."""
    return max(math.floor(d_model * 3 / 64), 1)


def write_atomic(path: Path, write) -> None:
    """Call ``write(temporary_path)``, then rename: a reader never sees half a file, a failure leaves none.

    ArtifactError when it cannot be written (disk full, no permission).
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write {str(path)!r}: {error}; check space and permissions") from error
    finally:
        temporary.unlink(missing_ok=True)
