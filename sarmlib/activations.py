"""On-disk cache of hidden states: safetensors shards, each with its own checksum and the settings that made it.

Documents are numbered in reading order and cut into blocks; one block is one shard.  With several processes the blocks
are dealt out in turn, so the cache holds the same vectors in the same order however many processes wrote it.  A shard
appears complete or not at all (temporary name, flush, rename), and a run that was killed goes on after its last shard.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from sarmlib.artifacts import canonical, hash_json, write_atomic, write_json
from sarmlib.errors import ArtifactError, ConfigError, DataError
from sarmlib.extractor import ActivationExtractor

INDEX = "cache.json"
BLOCK = 256
"""Documents per shard."""


class ActivationCache:
    """A finished cache, opened for reading; ``len`` is its number of vectors, ``d_model`` their size.

    Raises ArtifactError when the folder holds no finished cache, ConfigError when it was made with other ``settings``
    (the message names those that differ; None accepts any).
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any] | None = None):
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / INDEX).read_text())
            theirs, self.d_model, self.shards = index["settings"], index["d_model"], index["shards"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{str(self.folder)!r} holds no finished activation cache ({error}); make it again, "
                                "a killed run goes on after its last shard") from error
        mine = theirs if settings is None else canonical(settings)
        if differ := sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name)):
            what = ", ".join(f"{name}={theirs.get(name)!r} (now {mine.get(name)!r})" for name in differ)
            raise ConfigError(f"activation cache {str(self.folder)!r} is of other settings: {what}; use another folder")
        self.fingerprint = hash_json(theirs)

    def __len__(self) -> int:
        return sum(shard["rows"] for shard in self.shards)

    def stream(self, seed: int | None = None) -> Iterator[Tensor]:
        """All vectors once, one shard [n, d] float32 at a time, each shard's checksum tested when it is read.

        Mixing with a ``seed``: the order of shards is a uniform permutation and so is the order within each shard;
        vectors of different shards are mixed only by the reader's buffer (``train_sae`` has one: see
        ``shuffle_buffer``).  None: in document order.
        """
        generator = torch.Generator().manual_seed(seed or 0)
        order = range(len(self.shards)) if seed is None else torch.randperm(len(self.shards), generator=generator)
        for number in map(int, order):
            states = self._load(self.shards[number]["file"])[: self.shards[number]["rows"]].float()
            yield states if seed is None else states[torch.randperm(len(states), generator=generator)]

    def _load(self, name: str) -> Tensor:
        states = _read(self.folder / name, self.fingerprint)
        if states is None:
            raise ArtifactError(f"shard {str(self.folder / name)!r} is absent or damaged; remove {INDEX} and make the "
                                "cache again (sound shards are kept)")
        return states

    def split(self, held_out: int) -> tuple[ActivationCache, Tensor]:
        """(a cache without the last ``held_out`` vectors, these as float32 [held_out, d])."""
        if not 0 < held_out < len(self):
            raise ConfigError(f"held_out={held_out} must lie between 0 and the {len(self)} vectors of the cache")
        front, parts, room = copy.copy(self), [], len(self) - held_out
        front.shards = []
        for shard in self.shards:
            kept = min(room, shard["rows"])
            room -= kept
            if kept:
                front.shards.append(shard | {"rows": kept})
            if kept < shard["rows"]:
                parts.append(self._load(shard["file"])[kept : shard["rows"]].float())
        return front, torch.cat(parts)

    def epochs(self, seed: int) -> Callable[[], Iterator[Tensor]]:
        """What ``train_sae`` takes: a function whose n-th call streams the n-th epoch in an order of its own."""
        numbers = count()
        return lambda: self.stream((seed * 1_000_003 + next(numbers)) % 2**63)


def write_cache(
    folder: str | Path,
    extractor: ActivationExtractor,
    texts: Iterable[str | list[int]],
    settings: dict[str, Any],
    *,
    vectors: int,
    max_bytes: int,
    dtype: torch.dtype = torch.float32,
    accelerator=None,
    progress: bool = True,
) -> ActivationCache:
    """Extract the first ``vectors`` states (in block order) into ``folder``; a finished cache is only opened.

    ``texts`` has to give the same documents in every process and every run; ``settings`` must name all that decides
    them (model, layer, positions, corpus, ...).  ``dtype`` torch.bfloat16 halves the size and loses nothing when the
    model runs in bfloat16.  ``accelerator``: an ``accelerate.Accelerator``; its processes share work and folder.
    Raises ConfigError when the cache would exceed ``max_bytes``, ArtifactError when the disk is or gets full, DataError
    for an empty corpus or one that gives no state.
    """
    folder = Path(folder)
    settings = canonical(settings | {"vectors": vectors, "dtype": str(dtype), "block": BLOCK})
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    if (folder / INDEX).exists():
        return ActivationCache(folder, settings)
    d_model = extractor.backbone.config.hidden_size
    size = vectors * d_model * dtype.itemsize
    if size > max_bytes:
        raise ConfigError(f"{vectors} vectors of size {d_model} take {size:,} bytes, more than "
                          f"max_bytes={max_bytes:,}; raise it or lower the number of vectors")
    fingerprint = hash_json(settings)
    shards: list[dict] = []
    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob("block-*.safetensors"))
    if size > free:
        raise ArtifactError(f"{vectors} vectors take {size:,} bytes, {str(folder)!r} has {free:,} free; make room")
    blocks = _blocks(texts)
    with tqdm(total=vectors, disable=not progress or rank > 0, unit="state", desc="activations") as bar:
        while sum(shard["rows"] for shard in shards) < vectors:
            block = None
            for number, documents in islice(blocks, world):  # one block for each process
                if number % world == rank:
                    block = number, documents
            mine = [] if block is None else [_extract(folder, extractor, *block, fingerprint, dtype)]
            found = mine if world == 1 else _gathered(mine)
            if not found:
                break
            shards += [shard for shard in sorted(found, key=lambda shard: shard["file"]) if shard["rows"]]
            bar.update(sum(shard["rows"] for shard in found))
            stats = extractor.stats.summary()
            bar.set_postfix(tokens_per_s=f"{stats['tokens_per_second']:,.0f}", used=f"{stats['used_share']:.2f}",
                            refresh=False)
    if not shards:
        raise DataError("the corpus gave no state at the chosen positions; pass text, or another position rule")
    extra = sum(shard["rows"] for shard in shards) - vectors
    while extra > 0:  # the last round may have given more than was asked for
        cut = min(extra, shards[-1]["rows"])
        shards[-1]["rows"] -= cut
        extra -= cut
        if not shards[-1]["rows"]:
            shards.pop()
    if rank == 0:
        with _disk(folder):
            write_json(folder / INDEX, {"settings": settings, "d_model": d_model, "shards": shards})
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return ActivationCache(folder, settings)


def _blocks(texts: Iterable[str | list[int]]) -> Iterator[tuple[int, list[str | list[int]]]]:
    texts = iter(texts)
    for number in count():
        if not (block := list(islice(texts, BLOCK))):
            return
        yield number, block


def _extract(folder: Path, extractor, number: int, documents: list, fingerprint: str, dtype: torch.dtype) -> dict:
    """Make one shard, or take it from an earlier run of the same settings."""
    path = folder / f"block-{number:06d}.safetensors"
    states = _read(path, fingerprint)
    if states is None:
        parts = list(extractor.iter_activations(documents, allow_empty=True))
        d_model = extractor.backbone.config.hidden_size
        states = torch.cat(parts).to(dtype).cpu() if parts else torch.zeros(0, d_model, dtype=dtype)
        metadata = {"sha256": _hash(states), "settings": fingerprint}
        with _disk(folder):
            write_atomic(path, save({"states": states}, metadata))
    return {"file": path.name, "rows": len(states)}


def _read(path: Path, fingerprint: str) -> Tensor | None:
    """The states of a sound shard of these settings, else None."""
    try:
        with safe_open(path, "pt") as handle:
            metadata, states = handle.metadata() or {}, handle.get_tensor("states")
    except (OSError, SafetensorError):
        return None
    return states if metadata == {"sha256": _hash(states), "settings": fingerprint} else None


def _hash(states: Tensor) -> str:
    return hashlib.sha256(states.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _gathered(mine: list[dict]) -> list[dict]:
    from accelerate.utils import gather_object

    return gather_object(mine)


class _disk:
    """Full disk, no permission, ...: ArtifactError, and no temporary file stays behind."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, OSError):
            for path in self.folder.glob(f".*.{os.getpid()}.tmp"):
                path.unlink(missing_ok=True)
            raise ArtifactError(f"cannot write the activation cache {str(self.folder)!r}: {error}; "
                                "make room there, then run again: finished shards are kept") from error
