"""The activation cache: what it holds, that it mixes, and that nothing half-written or foreign is ever read."""

import errno
import json

import pytest
import torch

from sarmlib import activations
from sarmlib.activations import INDEX, ActivationCache, write_cache
from sarmlib.errors import ArtifactError, ConfigError, DataError
from sarmlib.extractor import ActivationExtractor
from sarmlib.sae.training import SAETrainConfig, train_sae
from tests.test_extractor import documents, tiny_backbone, word_tokenizer

SETTINGS = {"model": "tiny", "layer": 2, "positions": "every"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(activations, "BLOCK", 8)


def extractor(rule="every"):
    return ActivationExtractor(tiny_backbone(), word_tokenizer(), rule, window=48, batch_size=3)


def write(folder, docs=None, settings=SETTINGS, vectors=500, **options):
    options = {"max_bytes": 1 << 20, "progress": False, **options}
    docs = documents() if docs is None else docs
    return write_cache(folder, extractor(), docs, settings, vectors=vectors, **options)


def everything(cache, seed=None):
    return torch.cat(list(cache.stream(seed)))


def test_cache_holds_the_extractors_states_in_document_order(tmp_path):
    docs = documents()
    cache = write(tmp_path)
    blocks = [extractor().collect(docs[start:start + 8]) for start in range(0, len(docs), 8)]
    assert torch.equal(everything(cache), torch.cat(blocks)[:500])
    assert (len(cache), cache.d_model) == (500, 16) and not list(tmp_path.glob(".*"))
    half = write(tmp_path / "half", dtype=torch.bfloat16)
    assert torch.equal(everything(half), everything(cache).bfloat16().float())
    few = write(tmp_path / "few", vectors=10**4, max_bytes=1 << 30)  # a corpus may end early
    assert len(few) == sum(map(len, docs))


def test_a_finished_cache_is_opened_without_a_forward_pass_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    first = everything(write(tmp_path))
    (tmp_path / INDEX).unlink()  # as after a kill: shards, no index
    victim = tmp_path / "block-000001.safetensors"
    victim.write_bytes(victim.read_bytes()[:-40])  # half-written by something that does not rename
    calls, real = [], ActivationExtractor.iter_activations
    monkeypatch.setattr(ActivationExtractor, "iter_activations",
                        lambda self, docs, *a, **k: calls.append(len(docs)) or real(self, docs, *a, **k))
    assert torch.equal(everything(write(tmp_path)), first) and calls == [8]  # only the damaged block
    write(tmp_path)
    assert calls == [8]


def test_stream_is_a_seeded_permutation_over_shards_and_within(tmp_path):
    cache = write(tmp_path)
    plain, mixed = everything(cache), everything(cache, 1)
    assert torch.equal(mixed, everything(cache, 1)) and not torch.equal(mixed, everything(cache, 2))

    def ordered(x):
        return sorted(map(tuple, x.tolist()))

    assert ordered(mixed) == ordered(plain)
    sizes = [shard["rows"] for shard in cache.shards]
    assert [len(part) for part in cache.stream(1)] != sizes  # shards change places ...
    assert sorted(len(part) for part in cache.stream(1)) == sorted(sizes)  # ... whole
    source = cache.epochs(3)
    assert not torch.equal(torch.cat(list(source())), torch.cat(list(source())))


def test_an_sae_trains_from_the_cache(tmp_path):
    cache, config = write(tmp_path), SAETrainConfig(steps=6, batch_size=64, shuffle_buffer=128, log_every=3)
    options = dict(d_model=16, n_features=32, k=2, progress=False)
    first, _ = train_sae(cache.epochs(0), config, **options)
    again, _ = train_sae(cache.epochs(0), config, **options)
    assert first.content_hash() == again.content_hash()


def test_split_keeps_the_last_vectors_apart(tmp_path):
    cache = write(tmp_path)
    front, held_out = cache.split(123)
    assert (len(cache), len(front), held_out.shape) == (500, 377, (123, 16))
    assert torch.equal(torch.cat([everything(front), held_out]), everything(cache))
    with pytest.raises(ConfigError, match="500"):
        cache.split(500)


def test_cache_of_other_settings_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(ConfigError, match=r"layer=2 \(now 3\)"):
        write(tmp_path, settings=SETTINGS | {"layer": 3})
    with pytest.raises(ConfigError, match="vectors=500"):
        write(tmp_path, vectors=400)
    (tmp_path / INDEX).unlink()
    shard = (tmp_path / "block-000000.safetensors").read_bytes()
    write(tmp_path, settings=SETTINGS | {"layer": 3})  # shards of other settings are made again, never read
    assert (tmp_path / "block-000000.safetensors").read_bytes() != shard


def test_damage_is_noticed(tmp_path):
    cache = write(tmp_path)
    path = tmp_path / cache.shards[2]["file"]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        everything(ActivationCache(tmp_path))
    (tmp_path / INDEX).write_text(json.dumps({"shards": []})[:-1])
    with pytest.raises(ArtifactError, match="no finished activation cache"):
        ActivationCache(tmp_path)


def test_size_is_bounded_and_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="32,000 bytes, more than max_bytes=31,999"):
        write(tmp_path / "a", max_bytes=31_999)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ArtifactError, match="free; make room"):
        write(tmp_path / "b", vectors=10**15, max_bytes=10**18)
    written = []

    def full(handle):
        written.append(handle)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sarmlib.artifacts.os.fsync", full)
    with pytest.raises(ArtifactError, match="No space left.*finished shards are kept"):
        write(tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "block-000000.safetensors", "block-000001.safetensors"]
    monkeypatch.undo()


def test_empty_corpora(tmp_path):
    for docs in ([], ["", ""]):
        with pytest.raises(DataError, match="gave no state"):
            write(tmp_path, docs)
    with pytest.raises(DataError, match="gave no state"):
        write_cache(tmp_path, extractor("sentence_end"), [[4, 5], [6]], SETTINGS, vectors=5, max_bytes=1 << 20,
                    progress=False)
    assert not (tmp_path / INDEX).exists()
