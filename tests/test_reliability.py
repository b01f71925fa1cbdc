"""The short forms of ``tests/reliability``: bad input, damaged artifacts, no network, a wheel without its checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from sarmlib.artifacts import Store
from tests.reliability.damage import WAYS, harm
from tests.reliability.feed import feed
from tests.reliability.world import fingerprint, write_profile

ROOT = Path(__file__).resolve().parents[1]


def test_five_hundred_bad_inputs_give_errors_of_the_library_and_no_partial_file():
    outcomes = feed(each=35)
    assert sum(len(o.seen) for o in outcomes.values()) >= 500
    assert {name: dict(o.foreign) for name, o in outcomes.items() if o.foreign} == {}
    assert {name: o.littered for name, o in outcomes.items() if o.littered} == {}
    total = {name for name, o in outcomes.items() if not o.refused}
    # these answer everything: with problems, with None, with an abstention
    assert total == {"artifacts", "judge's answer", "explainer's answer"}


def _store(root: Path) -> Store:
    store = Store(root / "mini")
    for stage in "abcde":
        store.get_or_make(stage, {"s": stage}, {}, lambda folder, s=stage: (
            (folder / "x.bin").write_bytes(s.encode() * 1000), (folder / "y.json").write_text("{}"), None)[-1])
    return store


@pytest.mark.parametrize("number", range(30))
def test_damage_is_named_and_put_right(tmp_path, number):
    store = _store(tmp_path)
    before = fingerprint(tmp_path)
    name, what = harm(tmp_path / "mini", number)
    assert [n for n, problems in store.verify().items() if problems] == [name], what
    _store(tmp_path)
    assert fingerprint(tmp_path) == before and not any(store.verify().values()), what


def test_every_way_of_damage_is_tried():
    assert {WAYS[number % len(WAYS)] for number in range(30)} == set(WAYS)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("mount"),
                    reason="a full disk is made with a small tmpfs, which needs root")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    from sarmlib.errors import ArtifactError
    from tests.reliability.damage import small_disk
    try:
        with small_disk(tmp_path / "disk", "64k"):
            with pytest.raises(ArtifactError, match="free some disk space"):
                Store(tmp_path / "disk").get_or_make("a", {}, {}, lambda f: (f / "x").write_bytes(b"1" * 10**6))
            assert [p for p in (tmp_path / "disk").rglob("*") if p.is_file() and p.stat().st_size] == []
    except subprocess.CalledProcessError:
        pytest.skip("this system does not let us mount a tmpfs")


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch, capsys):
    from sarmlib import __main__ as cli
    from sarmlib import runner

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "runs/toy/notebooks")

    monkeypatch.setattr(runner, "run_notebooks", refuse)
    assert cli.main(["reproduce", "--runs", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "runs/toy/notebooks cannot be written: Permission denied; make the folder writable" in said


OFFLINE = """
    import socket, sys
    attempts = []
    def refuse(self, address, *rest):
        if self.family != getattr(socket, "AF_UNIX", None):
            attempts.append(address)
            raise OSError("network is blocked")
    socket.socket.connect = socket.socket.connect_ex = refuse
    def lookup(*args, **kwargs):
        attempts.append(args)
        raise OSError("network is blocked")
    socket.getaddrinfo = socket.create_connection = lookup
"""


def _python(code: str, tmp_path: Path, **environment) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(OFFLINE) + textwrap.dedent(code)], text=True, cwd=ROOT,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=120)


def test_the_toy_path_never_touches_the_network(tmp_path):
    done = _python(f"""
        from sarmlib.profiles import load_profile
        from sarmlib.stages import Run
        run = Run(load_profile({str(write_profile(tmp_path))!r}), root={str(tmp_path / "runs")!r}, progress=False)
        run.labels(0), run.scores("scalar_half", 0)
        print("asked", attempts)
    """, tmp_path)
    assert done.stdout.strip().endswith("asked []"), done.stdout + done.stderr


HUB = {
    "backbone": 'from sarmlib.backbone import load_backbone; load_backbone("meta-llama/Llama-3.2-1B", 8)',
    "tokenizer": 'from sarmlib.backbone import load_tokenizer; load_tokenizer("meta-llama/Llama-3.2-1B")',
    "pairs": f'from sarmlib.data.preferences import load_pairs; load_pairs("hub:a/b", revision="{"0" * 40}")',
    "rewardbench2": 'from sarmlib.data.benchmarks import load_rewardbench2; load_rewardbench2()',
    "corpus": f'from sarmlib.data.corpora import iter_corpus; list(iter_corpus("hub:a/b", revision="{"0" * 40}"))',
    "reward model": 'from sarmlib.sarm.model import SarmForSequenceClassification as S; S.from_pretrained("a/b")',
    "profile": 'from sarmlib.stages import Run; Run("paper-4b").check_hub()',
}


def test_without_network_each_hub_path_fails_soon_in_one_sentence_with_the_alternative(tmp_path):
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
                   **dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), "")}
    done = _python(f"""
        import json, time
        import torch, transformers, datasets
        from sarmlib.errors import OfflineError
        for name, code in {HUB!r}.items():
            start = time.perf_counter()
            try:
                exec(code, {{}})
            except OfflineError as error:
                print(json.dumps([name, time.perf_counter() - start, str(error)]))
    """, tmp_path, **environment)
    found = {name: (seconds, said) for name, seconds, said in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == HUB.keys(), done.stdout + done.stderr
    assert {name: seconds for name, (seconds, _) in found.items() if seconds > 10} == {}
    for name, (_, said) in found.items():
        assert any(word in said for word in ("folder", "local file", "path")) and "\n" not in said, (name, said)


@pytest.mark.slow
def test_a_wheel_reproduces_without_a_checkout(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("sarmlib", "notebooks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                    "--wheel-dir", tmp_path, source], check=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "sarmlib").rglob("*.py") if "__pycache__" not in p.parts}
    assert modules - set(names) == set(), "modules that the wheel lacks"
    assert {f"sarmlib/notebooks/{p.name}" for p in (ROOT / "notebooks").glob("*.ipynb")} <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "notebooks/"))]
    zipfile.ZipFile(wheel).extractall(site := tmp_path / "site")
    (empty := tmp_path / "empty").mkdir()
    profile = write_profile(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sarmlib", "reproduce", "--profile", profile, "--notebooks", "01_sae_pretraining"],
        cwd=empty, env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "SARMLIB_RUNS": ""}, text=True,
        capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (empty / "runs/mini/notebooks/01_sae_pretraining.ipynb").is_file()
    assert sorted(p.name for p in empty.iterdir()) == ["runs"], "everything goes into the current folder"


def test_the_list_of_packages_is_whole():
    import tomllib
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "sarmlib").rglob("__init__.py")}
    assert set(listed) == there | {"sarmlib.notebooks"}


def test_two_processes_that_run_one_notebook_run_it_once(tmp_path):
    code = ("import sys; from pathlib import Path; from sarmlib.runner import run_notebooks\n"
            "print(run_notebooks('toy', ['00_x'], folder=sys.argv[1], runs=sys.argv[2], progress=False)[0].status)")
    import nbformat
    cells = [nbformat.v4.new_code_cell('profile = "toy"', metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("import time; time.sleep(2)")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "00_x.ipynb")
    both = [subprocess.Popen([sys.executable, "-c", code, tmp_path, tmp_path / "runs"], text=True, cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    deadline = time.monotonic() + 100
    out = [one.communicate(timeout=deadline - time.monotonic()) for one in both]
    assert sorted(o[0].strip() for o in out) == ["ran", "unchanged"], out
    assert sum("is being run by another process" in o[1] for o in out) == 1
