"""Layers above l cost nothing: their bytes stay on the disk, and their parameters are in no count."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, LlamaConfig

from sarmlib.backbone import load_backbone

PAGE = mmap.PAGESIZE


def resident(path: Path) -> int:
    """Bytes of a file that are in the page cache (mincore), without reading any."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        pages = ctypes.create_string_buffer((size + PAGE - 1) // PAGE)
        assert libc.mincore(address, size, pages) == 0, os.strerror(ctypes.get_errno())
        libc.munmap(address, size)
    finally:
        os.close(descriptor)
    return sum(byte & 1 for byte in pages.raw) * PAGE


def evict(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def ahead(path: Path) -> int:
    """Bytes the kernel reads ahead on the device of `path`."""
    device = os.stat(path).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(setting.read_text()) * 1024 if setting.exists() else 128 * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page residency is asked of Linux")
@pytest.mark.parametrize("layer", [2, 4])
def test_only_the_lower_layers_are_read(tmp_path, layer):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
                         vocab_size=64, max_position_embeddings=64)
    whole = AutoModel.from_config(config)
    per_layer = 4 * sum(p.numel() for p in whole.layers[0].parameters())
    whole.save_pretrained(tmp_path, max_shard_size="20MB")
    del whole
    place = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed, spared = {}, {}
    for name, shard in place.items():
        above = name.startswith("layers.") and int(name.split(".")[1]) >= layer
        (spared if above else needed).setdefault(shard, []).append(name)
    spared = [tmp_path / shard for shard in spared if shard not in needed]
    for shard in tmp_path.glob("*.safetensors"):
        evict(shard)
    if sum(resident(shard) for shard in tmp_path.glob("*.safetensors")) > 2**20:
        pytest.skip("this file system keeps files in memory")
    model = load_backbone(tmp_path, layer)
    assert model(torch.ones(1, 3, dtype=torch.long)).last_hidden_state.isfinite().all()
    read = sum(resident(tmp_path / shard) for shard in needed)
    assert read >= layer * per_layer
    # Of a file above l the header that names its tensors is read, and what the kernel reads ahead of any first read.
    allowed = ahead(tmp_path) + 64 * 1024
    for shard in spared:
        assert resident(shard) <= allowed < 0.6 * shard.stat().st_size
    assert len(spared) == {2: 5, 4: 3}[layer]
