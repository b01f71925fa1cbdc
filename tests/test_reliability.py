"""Bad input, damaged artifacts, a full disk, no network, a wheel without its checkout."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from sarmlib.errors import ArtifactError
from sarmlib.store import Store
from tests.helpers import ROOT
from tests.reliability.feed import feed
from tests.reliability.world import fingerprint, write_profile


def test_bad_files_give_errors_of_the_library():
    outcomes = feed(each=30)
    assert {name: found for name, found in outcomes.items() if set(found) - {"accepted", "refused"}} == {}
    assert all(found["refused"] for found in outcomes.values())


def _too_much(folder: Path) -> None:
    (folder / "x").write_bytes(b"1" * 10**6)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path]
    if not shutil.which("mount") or subprocess.run(mount).returncode:
        pytest.skip("a full disk is made with a small tmpfs, which this system does not let us mount")
    try:
        with pytest.raises(ArtifactError, match="free some disk space"):
            Store(tmp_path).get_or_make("a", {}, {}, _too_much)
        assert [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size] == []
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


OFFLINE = """
    import socket
    attempts = []
    def refuse(*args, **kwargs):
        if getattr(args[0], "family", None) != getattr(socket, "AF_UNIX", 0):
            attempts.append(args)
            raise OSError("network is blocked")
    socket.socket.connect = socket.socket.connect_ex = refuse
    socket.getaddrinfo = socket.create_connection = refuse
"""
HUB = {
    "backbone": 'from sarmlib.backbone import load_backbone; load_backbone("meta-llama/Llama-3.2-1B", 8)',
    "pairs": f'from sarmlib.data.pairs import load_pairs; load_pairs("hub:a/b", revision="{"0" * 40}")',
    "rewardbench2": 'from sarmlib.data.benchmarks import load_rewardbench2; load_rewardbench2()',
    "corpus": f'from sarmlib.data.text import iter_texts; list(iter_texts("hub:a/b", revision="{"0" * 40}"))',
    "reward model": 'from sarmlib.evaluation.scorer import load_scorer; load_scorer("a/b")',
    "profile": 'from sarmlib.pipeline import Run; Run("paper-4b").check_hub()'}


def _offline(code: str, **environment) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OFFLINE) + textwrap.dedent(code)], text=True, cwd=ROOT, timeout=300,
        capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_toy_path_never_touches_the_network(tmp_path):
    assert _offline(f"""
        from sarmlib.pipeline import Run
        run = Run({str(write_profile(tmp_path))!r}, root={str(tmp_path / "runs")!r}, progress=False)
        run.labels(0), run.scores("scalar_half", 0)
        print("asked", attempts)
    """)[-1] == "asked []"


def test_without_network_each_hub_path_fails_soon_in_one_sentence_with_the_alternative(tmp_path):
    found = _offline(f"""
        import json, time
        import torch, transformers, datasets
        from sarmlib.errors import OfflineError
        for name, code in {HUB!r}.items():
            start = time.perf_counter()
            try:
                exec(code, {{}})
            except OfflineError as error:
                print(json.dumps([name, time.perf_counter() - start, str(error)]))
    """, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0", SARMLIB_LLM_URL="http://127.0.0.1:9/v1",
        SARMLIB_LLM_MODEL="x", SARMLIB_LLM_BUDGET="1",
        **dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), ""))
    told = {name: said for name, seconds, said in map(json.loads, found) if seconds < 20}
    assert told.keys() == HUB.keys()
    for name, said in told.items():
        assert any(word in said for word in ("folder", "file", "path")) and "\n" not in said, (name, said)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_results(tmp_path):
    command = [sys.executable, "-m", "sarmlib", "run", "labels", "--profile", write_profile(tmp_path), "--runs"]
    subprocess.run([*command, tmp_path / "whole"], cwd=ROOT, check=True)
    for seconds in (5, 8, 11):  # subprocess kills what runs longer
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([*command, tmp_path / "killed"], cwd=ROOT, timeout=seconds)
    subprocess.run([*command, tmp_path / "killed"], cwd=ROOT, check=True)
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")


@pytest.mark.slow
def test_a_wheel_reproduces_without_a_checkout(tmp_path):
    (source := tmp_path / "source").mkdir()
    for name in ("sarmlib", "notebooks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                    "--wheel-dir", tmp_path, source], check=True)
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    suffixes = (".py", ".yaml", ".toml", ".html", ".css", ".safetensors")
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "sarmlib").rglob("*") if p.suffix in suffixes}
    assert wanted - set(wheel.namelist()) == set()
    assert not [name for name in wheel.namelist() if name.startswith(("tests/", "tools/", "notebooks/"))]
    wheel.extractall(site := tmp_path / "site")
    (empty := tmp_path / "empty").mkdir()
    subprocess.run(
        [sys.executable, "-P", "-m", "sarmlib", "reproduce", "--profile", write_profile(tmp_path), "--notebook",
         "01_sae_pretraining"], cwd=empty, check=True,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "SARMLIB_RUNS": ""})
    assert (empty / "runs/mini/notebooks/01_sae_pretraining.ipynb").is_file()
    assert [p.name for p in empty.iterdir()] == ["runs"], "everything goes into the current folder"
