"""Bad input, no network, a killed run, a wheel without its checkout."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.helpers import ROOT
from tests.reliability.feed import feed
from tests.reliability.world import fingerprint, write_profile


def test_bad_files_give_errors_of_the_library():
    outcomes = feed(each=30)
    assert {name: found for name, found in outcomes.items() if set(found) - {"accepted", "refused"}} == {}
    assert all(found["refused"] for found in outcomes.values())


OFFLINE = """
import json, socket, sys, time
attempts = []
def refuse(*args, **kwargs):
    if getattr(args[0], "family", None) != getattr(socket, "AF_UNIX", 0):
        attempts.append(args)
        raise OSError("network is blocked")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
import torch, transformers, datasets
from sarmlib.errors import OfflineError
from sarmlib.pipeline import Run
profile, runs, hub = sys.argv[1:]
run = Run(profile, root=runs, progress=False)
run.labels(0), run.scores("scalar_half", 0)
print("asked", attempts)
for name, code in json.loads(hub).items():
    start = time.perf_counter()
    try:
        exec(code, {})
    except OfflineError as error:
        print(json.dumps([name, time.perf_counter() - start, str(error)]))
"""
HUB = {
    "backbone": 'from sarmlib.backbone import load_backbone; load_backbone("meta-llama/Llama-3.2-1B", 8)',
    "pairs": f'from sarmlib.data.pairs import load_pairs; load_pairs("hub:a/b", revision="{"0" * 40}")',
    "rewardbench2": 'from sarmlib.data.benchmarks import load_rewardbench2; load_rewardbench2()',
    "corpus": f'from sarmlib.data.text import iter_texts; list(iter_texts("hub:a/b", revision="{"0" * 40}"))',
    "reward model": 'from sarmlib.evaluation.scorer import load_scorer; load_scorer("a/b")',
    "profile": 'from sarmlib.pipeline import Run; Run("paper-4b").check_hub()'}


def test_without_network_the_toy_path_runs_and_each_hub_path_fails_soon_with_the_alternative(tmp_path):
    proxies = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), "")
    endpoint = {"SARMLIB_LLM_URL": "http://127.0.0.1:9/v1", "SARMLIB_LLM_MODEL": "x", "SARMLIB_LLM_BUDGET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, write_profile(tmp_path), tmp_path / "runs", json.dumps(HUB)], cwd=ROOT,
        text=True, timeout=300, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0",
                                                          "HF_HOME": str(tmp_path), **proxies, **endpoint})
    assert done.returncode == 0, done.stdout + done.stderr
    asked, *found = done.stdout.splitlines()
    assert asked == "asked []", "the toy path needs no network"
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
    other = shutil.ignore_patterns(".*", "runs", "models", "__pycache__")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=other)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                    "--wheel-dir", tmp_path, source], check=True)
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    suffixes = (".py", ".yaml", ".toml", ".csv", ".html", ".css", ".safetensors")
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
