"""The store: same inputs -> same folder; damage, kills and second writers are survived."""

import errno
import functools
import importlib
import json
import linecache
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from sarmlib import store as house
from sarmlib.errors import ArtifactError, NotMadeError
from sarmlib.store import Store, code_hash, default_root, hash_json, hash_tree, imports_of, write_atomic
from tests.helpers import ROOT


def make(folder: Path) -> dict:
    write_atomic(folder / "sub" / "out.txt", "hello")
    return {"loss": 0.5}


def test_second_call_finds_what_the_first_made(tmp_path):
    store = Store(tmp_path)
    first = store.get_or_make("sae", {"lr": 5e-4, "seed": 3}, {"activations": "abc"}, make)
    again = store.get_or_make("sae", {"seed": 3, "lr": 5e-4}, {"activations": "abc"}, functools.partial(make))
    assert first.fresh and not again.fresh
    assert first.path == again.path == tmp_path / "sae" / first.key
    assert again.file("sub/out.txt").read_text() == "hello" and again.meta == {"loss": 0.5}
    record = again.json("manifest.json")
    assert record["files"]["sub/out.txt"]["bytes"] == 5 and record["wall_s"] >= 0
    assert record["versions"]["python"].startswith("3.") and record["key"] == first.key
    with pytest.raises(NotMadeError, match="sae/.* has not been made"):
        Store(tmp_path / "new", read_only=True).get_or_make("sae", {"lr": 1}, {}, make)
    assert not (tmp_path / "new").exists()


SOURCES = {
    "house_a/__init__.py": "",
    "house_a/stages.py": "from house_a.near import near\nfrom house_a import unused\nSIZE = 3\nOTHER = 4\n\n\n"
                         "def helper():\n    return near() + SIZE\n\n\n"
                         "def stage(folder):\n    from .inner import deep\n    return helper() + deep.x\n\n\n"
                         "def other(folder):\n    return unused.x\n",
    "house_a/near.py": "from . import far\n\n\ndef near():\n    return far.x\n",
    "house_a/far.py": "x = 1\n",
    "house_a/unused.py": "x = 1\n",
    "house_a/inner/__init__.py": "raise RuntimeError('looking for imports must not import')\n",
    "house_a/inner/deep.py": "import json\nx = 1\n",
}


def test_code_hash_follows_what_the_function_reaches_and_nothing_else(tmp_path, monkeypatch):
    for name, text in SOURCES.items():
        write_atomic(tmp_path / name, text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(house, "ROOT", tmp_path), monkeypatch.setattr(house, "HOUSE", "house_a")
    stage = importlib.import_module("house_a.stages").stage
    near = ["house_a.far", "house_a.inner.deep", "house_a.near", "house_a.stages", "house_a.unused"]
    assert imports_of("house_a.stages") == near and imports_of("house_a.near") == ["house_a.far", "house_a.near"]
    base = code_hash(stage)
    keys = [("s", 1.0, {}), ("t", 1.0, {}), ("s", 1.0 + 1e-15, {}), ("s", 1.0, {"a": "x"}), ("s", 1.0, {"b": "x"})]
    assert len({Store(tmp_path).key(*case, stage) for case in keys}) == 5

    def changed(name, old, new):
        write_atomic(tmp_path / name, SOURCES[name].replace(old, new))
        sys.modules.pop("house_a.stages")
        importlib.invalidate_caches()
        linecache.checkcache()
        found = code_hash(importlib.import_module("house_a.stages").stage)
        write_atomic(tmp_path / name, SOURCES[name])
        return found != base

    for name, old, new in (("far.py", "1", "22"), ("inner/deep.py", "1", "22"), ("stages.py", "SIZE = 3", "SIZE = 55"),
                           ("stages.py", "near() + SIZE", "near() - SIZE")):
        assert changed(f"house_a/{name}", old, new), (name, old)
    assert not changed("house_a/unused.py", "1", "22") and not changed("house_a/stages.py", "OTHER = 4", "OTHER = 55")


@pytest.mark.parametrize("damaged, text, seen_by_a_read", [
    ("sub/out.txt", "jello", False),  # the same length: only a checksum sees it
    ("sub/out.txt", "hell", True), ("sub/out.txt", None, True), ("stray", "", False), ("manifest.json", "{", True)])
def test_damage_is_reported_and_what_a_read_sees_is_made_again(tmp_path, damaged, text, seen_by_a_read, caplog):
    store = Store(tmp_path)
    artifact = store.get_or_make("s", {}, {}, make)
    name, target = f"s/{artifact.key}", artifact.file(damaged)
    assert store.verify() == {name: []}
    target.unlink() if text is None else target.write_text(text)
    assert store.verify()[name]
    assert store.get_or_make("s", {}, {}, make).fresh == ("damaged" in caplog.text) == seen_by_a_read
    assert (store.verify() == {name: []}) == seen_by_a_read


def stage_failing(folder, error):
    (folder / "half").write_text("x")
    raise error


def test_a_failing_stage_leaves_nothing_that_could_be_read(tmp_path):
    store = Store(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error, seen, words in ((RuntimeError("boom"), RuntimeError, "boom"),
                               (full, ArtifactError, "No space left.*free some disk space")):
        with pytest.raises(seen, match=words):
            store.get_or_make("s", {}, {}, functools.partial(stage_failing, error=error))
    assert store.artifacts() == [] and not list((tmp_path / "s").glob(".partial-*/half"))
    assert store.get_or_make("s", {}, {}, make).fresh  # and the lock is free again


def stage_interrupted(folder, left, die=True):
    assert sorted(p.name for p in folder.iterdir()) == left
    (folder / ("half" if die else "other")).write_text("x")
    if die:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("resumable", [True, False])
def test_kill_minus_nine_is_resumed_or_cleaned_up_by_the_next_run(tmp_path, resumable):
    store, stage = Store(tmp_path), functools.partial(stage_interrupted, left=[])
    dies = multiprocessing.get_context("fork").Process(
        target=store.get_or_make, args=("s", {}, {}, stage), kwargs={"resumable": resumable})
    dies.start()
    dies.join(60)
    assert dies.exitcode == -signal.SIGKILL and store.artifacts() == []
    kept = ["half"] if resumable else []
    stage = functools.partial(stage_interrupted, left=kept, die=False)
    again = store.get_or_make("s", {}, {}, stage, resumable=resumable)
    assert sorted(p.name for p in again.path.iterdir()) == [*kept, "manifest.json", "other"]


def stage_slow(folder, ready, finish):
    ready.set()
    finish.wait(20)
    (folder / "pid").write_text(str(os.getpid()))


def test_two_processes_make_an_artifact_once_and_a_long_lock_is_said(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    ready, finish = context.Event(), context.Event()
    store, stage = Store(tmp_path), functools.partial(stage_slow, ready=ready, finish=finish)
    holder = context.Process(target=store.get_or_make, args=("s", {}, {}, stage))
    holder.start()
    monkeypatch.setattr(house, "LOCK_SECONDS", 0.2)
    try:
        assert ready.wait(30)
        with pytest.raises(ArtifactError, match="locked by another process"):
            store.get_or_make("s", {}, {}, stage)
        finish.set()
        monkeypatch.setattr(house, "LOCK_SECONDS", 30)
        artifact = store.get_or_make("s", {}, {}, stage)
        assert not artifact.fresh and artifact.file("pid").read_text() == str(holder.pid)
    finally:
        finish.set()
        holder.join(timeout=20)


def test_plain_values_have_one_text_and_others_are_refused():
    assert hash_json({"lr": 4e-6, "betas": (0.9, 0.999)}) == hash_json({"betas": [0.9, 0.999], "lr": 4e-6})
    taken = {"a": np.float32(0.5), "b": np.int64(3), "c": Path("x")}
    assert hash_json(taken) == hash_json({"c": "x", "b": 3, "a": 0.5})
    for bad in (float("nan"), {"x": float("inf")}, {1, 2}, object(), np.zeros(2)):
        with pytest.raises((TypeError, ValueError)):
            hash_json(bad)


def test_files_are_replaced_whole(tmp_path):
    path = house.write_json(tmp_path / "a" / "b.json", {"x": 1})
    with pytest.raises(ValueError):
        house.write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtifactError, match="No space left.*free some disk space"):
        write_atomic(path, fail)
    assert json.loads(path.read_text()) == {"x": 1}
    write_atomic(path, b"bytes")
    assert [p.name for p in path.parent.iterdir()] == ["b.json"] and path.read_bytes() == b"bytes"
    array = write_atomic(tmp_path / "x.npy", lambda temporary: np.save(temporary, np.ones(3)))  # the suffix is kept
    for target in (tmp_path, Path("/dev/full")):
        with pytest.raises(ArtifactError, match="no regular file"):
            write_atomic(target, "x")
    with pytest.raises(ArtifactError, match="cannot write"):
        write_atomic(array / "below-a-file", "x")


def test_default_root(tmp_path, monkeypatch):
    monkeypatch.delenv("SARMLIB_RUNS", raising=False)
    assert default_root("toy") == ROOT / "runs" / "toy"
    monkeypatch.setenv("SARMLIB_RUNS", str(tmp_path))
    assert default_root("gpu") == tmp_path / "gpu"


def test_the_hash_of_a_folder_names_every_file_below_it(tmp_path):
    for name in ("b", "a/c"):
        write_atomic(tmp_path / name, "x")
    x = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert hash_tree(tmp_path) == {"a/c": x, "b": x} and hash_tree(tmp_path / "b") == {"b": x}
