"""The store: same inputs -> same folder; damage, kills and second writers are survived."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sarmlib.artifacts import Store, canonical, code_version, default_root, hash_json, write_atomic, write_json
from sarmlib.errors import ArtifactError

ROOT = Path(__file__).resolve().parents[1]


class Maker:
    """Writes one file and counts its calls."""

    def __init__(self, text="hello"):
        self.text, self.calls = text, 0

    def __call__(self, folder: Path) -> dict:
        self.calls += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "out.txt").write_text(self.text)
        return {"loss": 0.5}


def test_second_call_finds_what_the_first_made(tmp_path):
    store, make = Store(tmp_path), Maker()
    first = store.get_or_make("sae", {"lr": 5e-4, "seed": 3}, {"activations": "abc"}, make)
    again = store.get_or_make("sae", {"seed": 3, "lr": 5e-4}, {"activations": "abc"}, make)
    assert make.calls == 1 and first.fresh and not again.fresh
    assert first.path == again.path == tmp_path / "sae" / first.key
    assert again.file("sub/out.txt").read_text() == "hello" and again.meta == {"loss": 0.5}
    assert again.manifest["seed"] == 3 and again.manifest["peak_rss_mib"] > 1
    assert again.manifest["files"]["sub/out.txt"]["bytes"] == 5
    assert again.manifest["versions"]["python"].startswith("3.")


def test_anything_that_goes_in_changes_the_key(tmp_path):
    store = Store(tmp_path)
    base = store.key("sae", {"lr": 1.0}, {"a": "x"}, ["sarmlib.errors"])
    others = [store.key("sarm", {"lr": 1.0}, {"a": "x"}, ["sarmlib.errors"]),
              store.key("sae", {"lr": 1.0 + 1e-15}, {"a": "x"}, ["sarmlib.errors"]),
              store.key("sae", {"lr": 1.0}, {"a": "y"}, ["sarmlib.errors"]),
              store.key("sae", {"lr": 1.0}, {"b": "x"}, ["sarmlib.errors"]),
              store.key("sae", {"lr": 1.0}, {"a": "x"}, ["sarmlib.artifacts"])]
    assert len({base, *others}) == 6


def test_code_version_follows_source_bytes(tmp_path, monkeypatch):
    package = tmp_path / "madeup_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_version(["madeup_pkg", "madeup_pkg.part"])
    (package / "part.py").write_text("x = 2\n")
    after = code_version(["madeup_pkg", "madeup_pkg.part"])
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)
    with pytest.raises(ArtifactError, match="madeup_pkg.absent"):
        code_version(["madeup_pkg.absent"])


@pytest.mark.parametrize("damage", ["change", "remove", "extra", "manifest"])
def test_damage_is_detected_reported_and_rebuilt(tmp_path, damage, caplog):
    store, make = Store(tmp_path), Maker()
    artifact = store.get_or_make("s", {}, {}, make)
    name = f"s/{artifact.key}"
    assert store.verify() == {name: []}
    target = artifact.path / "sub" / "out.txt"
    if damage == "change":
        target.write_text("jello")  # the same length
    elif damage == "remove":
        target.unlink()
    elif damage == "extra":
        (artifact.path / "stray").write_text("")
    else:
        (artifact.path / "manifest.json").write_text("{")
    assert store.verify()[name]
    rebuilt = store.get_or_make("s", {}, {}, make)
    assert make.calls == 2 and rebuilt.path == artifact.path and "damaged" in caplog.text
    assert target.read_text() == "hello" and store.verify() == {name: []}
    assert not (artifact.path / "stray").exists()


def test_a_failing_stage_leaves_nothing_that_could_be_read(tmp_path):
    def broken(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("boom")

    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="boom"):
        store.get_or_make("s", {}, {}, broken)
    assert store.artifacts() == []
    assert not list((tmp_path / "s").glob(".partial-*"))
    assert store.get_or_make("s", {}, {}, Maker()).fresh  # and the lock is free again


def test_resumable_stage_gets_its_unfinished_folder_back(tmp_path):
    seen = []

    def training(folder):
        seen.append(sorted(p.name for p in folder.iterdir()))
        (folder / "checkpoint").write_text("step 5")
        if len(seen) == 1:
            raise KeyboardInterrupt
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.get_or_make("s", {}, {}, training, resumable=True)
    artifact = store.get_or_make("s", {}, {}, training, resumable=True)
    assert seen == [[], ["checkpoint"]] and artifact.fresh


def test_kill_minus_nine_is_cleaned_up_by_the_next_run(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        from sarmlib.artifacts import Store
        def make(folder):
            (folder / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
        Store(sys.argv[1]).get_or_make("s", {}, {}, make)
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    store = Store(tmp_path, lock_timeout=5)
    assert store.artifacts() == [] and list((tmp_path / "s").glob(".partial-*/half"))
    artifact = store.get_or_make("s", {}, {}, Maker())
    assert sorted(artifact.manifest["files"]) == ["sub/out.txt"]
    assert not list((tmp_path / "s").glob(".partial-*"))


def test_old_unfinished_folders_of_other_keys_are_swept(tmp_path):
    old, new = tmp_path / "s" / ".partial-old", tmp_path / "s" / ".partial-new"
    old.mkdir(parents=True), new.mkdir()
    two_days_ago = time.time() - 2 * 86400
    os.utime(old, (two_days_ago, two_days_ago))
    Store(tmp_path).get_or_make("s", {}, {}, Maker())
    assert not old.exists() and new.exists()


def _make_slowly(root, queue):
    def make(folder):
        time.sleep(0.5)
        (folder / "pid").write_text(str(os.getpid()))
    queue.put((os.getpid(), Store(root).get_or_make("s", {}, {}, make).fresh))


def test_two_processes_make_an_artifact_once(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_make_slowly, args=(tmp_path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join(timeout=20)
    assert sorted(fresh for _, fresh in results) == [False, True]


def test_a_lock_held_too_long_names_the_process(tmp_path):
    ready, finish = multiprocessing.Event(), multiprocessing.Event()

    def hold(root):
        def make(folder):
            ready.set()
            finish.wait(20)
        Store(root).get_or_make("s", {}, {}, make)

    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,))
    holder.start()
    try:
        assert ready.wait(20)
        with pytest.raises(ArtifactError, match=rf"locked by pid {holder.pid} "):
            Store(tmp_path, lock_timeout=0.2).get_or_make("s", {}, {}, Maker())
    finally:
        finish.set()
        holder.join(timeout=20)


def test_a_link_is_refused(tmp_path):
    def make(folder):
        (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="link"):
        Store(tmp_path).get_or_make("s", {}, {}, make)


def test_canonical_has_one_form_and_refuses_what_has_none():
    @dataclass(frozen=True)
    class Config:
        lr: float = 4e-6
        betas: tuple = (0.9, 0.999)

    assert canonical(Config()) == {"betas": [0.9, 0.999], "lr": 4e-6}
    assert canonical({"a": np.float32(0.5), "b": np.int64(3)}) == {"a": 0.5, "b": 3}
    assert hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
    for bad in (float("nan"), {1, 2}, object(), {1: 2}, np.zeros(2)):
        with pytest.raises(ArtifactError, match="settings"):
            canonical(bad)
    with pytest.raises(ArtifactError, match=r"settings\.sae\.lr"):
        canonical({"sae": {"lr": float("inf")}})


def test_files_are_replaced_whole(tmp_path):
    path = write_json(tmp_path / "a" / "b.json", {"x": 1})
    assert json.loads(path.read_text()) == {"x": 1}
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}
    write_atomic(path, b"bytes")
    assert [p.name for p in path.parent.iterdir()] == ["b.json"] and path.read_bytes() == b"bytes"


def test_missing_file_is_named(tmp_path):
    artifact = Store(tmp_path).get_or_make("s", {}, {}, Maker())
    with pytest.raises(ArtifactError, match=r"weights\.bin.*sub/out\.txt"):
        artifact.file("weights.bin")


def test_default_root_is_one_absolute_place(tmp_path, monkeypatch):
    monkeypatch.delenv("SARMLIB_RUNS", raising=False)
    assert default_root("toy") == ROOT / "runs" / "toy"
    monkeypatch.setenv("SARMLIB_RUNS", str(tmp_path))
    assert default_root("gpu") == tmp_path / "gpu"
