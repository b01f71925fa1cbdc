"""One set of dependencies in three files, nothing private in any file, and Make targets that stand alone."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import sarmlib
from tests.helpers import shared_path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line and not line.startswith("#")]
TARGETS = ["setup", "reproduce", "test", "notebooks", "figures", "report", "backbone", "badges", "verify"]


def own_files() -> list[Path]:
    """Files under version control, or that could be; without git, everything outside hidden and run folders."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    skipped = {"runs", "build", "dist", "__pycache__"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not skipped & set(p.parts)
            and not any(part.startswith(".") for part in p.relative_to(ROOT).parts[:-1])]


def name(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def test_lock_pins_every_line_exactly_and_names_no_source():
    assert len(LOCK) > 100
    for requirement in LOCK:
        assert re.fullmatch(r"==[0-9][0-9A-Za-z.]*", str(requirement.specifier)), requirement
        assert requirement.url is None
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"^\s*-|://|\+", text, re.M), "options, addresses and local versions do not belong in the lock"


def test_lock_keeps_cuda_out_and_pins_torch():
    names = [name(r) for r in LOCK]
    assert [n for n in names if n.startswith(("nvidia-", "cuda-", "triton", "pytorch-triton"))] == []
    assert [str(r) for r in LOCK if name(r) == "torch"] == ["torch==2.13.0"]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_each_dependency_has_one_version_that_satisfies_pyproject(python, platform):
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0",
                   "sys_platform": platform, "os_name": "nt" if platform == "win32" else "posix"}
    pins: dict[str, list[str]] = {}
    for requirement in LOCK:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            pins.setdefault(name(requirement), []).append(str(requirement.specifier)[2:])
    assert {n: v for n, v in pins.items() if len(v) != 1} == {}
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["notebooks"], *extras["dev"]]:
        wanted = Requirement(text)
        assert name(wanted) in pins, f"{text} is not locked; run make lock"
        assert wanted.specifier.contains(pins[name(wanted)][0]), f"{text}, locked {pins[name(wanted)]}"


def test_pyproject_bounds_from_below_and_leaves_optional_things_out():
    core = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    for requirement in core:
        assert [s.operator for s in requirement.specifier] == [">="], requirement
    assert {"trl", "wandb", "openai", "jupyterlab"} & {name(r) for r in core} == set()
    known = {"notebooks", "dev", "peers", "llm", "trl", "lora", "serving"}
    assert known == set(PROJECT["project"]["optional-dependencies"])


def test_every_third_party_import_is_a_declared_dependency():
    aliases = {"yaml": "pyyaml", "IPython": "ipykernel"}
    declared = {name(Requirement(t)) for t in PROJECT["project"]["dependencies"]}
    declared |= {name(Requirement(t)) for ts in PROJECT["project"]["optional-dependencies"].values() for t in ts}
    optional = {"openai", "huggingface-hub",  # come with transformers
                "deepspeed"}  # imported only where accelerate was told to use it
    missing = set()
    for path in (ROOT / "sarmlib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            for full in names:
                top = full.split(".")[0]
                package = aliases.get(top, top).replace("_", "-").lower()
                if top not in sys.stdlib_module_names and top != "sarmlib" and package not in declared | optional:
                    missing.add(f"{top} in {path.name}")
    assert missing == set()


def test_conda_environment_is_thin_and_in_step():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    pip = [d for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == [{"pip": ["-r requirements.lock", "-e ."]}]
    assert [d for d in conda if d.count("=") > 1] == [], "build strings tie the file to one platform"
    python = next(d.split("=")[1] for d in conda if d.startswith("python="))
    assert f"{python}.0" in SpecifierSet(PROJECT["project"]["requires-python"])
    assert environment["name"] == PROJECT["project"]["name"]


def test_no_file_names_a_package_registry_or_somebodys_machine():
    hosts = ["py" + "pi.org", "python" + "hosted.org", "download." + "pytorch.org", "ana" + "conda.org",
             "ana" + "conda.com"]
    paths = re.compile("(?<![\\w.])/(?:ho" + "me/[a-z]|Us" + "ers/[a-z]|ro" + "ot/|wo" + "rk/)", re.I)
    problems = []
    for path in own_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        problems += [f"{path.relative_to(ROOT)} names {host}" for host in hosts if host in text]
        problems += [f"{path.relative_to(ROOT)} holds the path {m.group()}" for m in paths.finditer(text)]
    assert problems == []


def test_citation_is_whole_and_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"] and citation["title"]
    assert citation["version"] == PROJECT["project"]["version"] == sarmlib.__version__
    assert citation["license"] == PROJECT["project"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert citation["preferred-citation"]["year"] == 2026


def test_citation_names_the_papers_authors():
    paper = shared_path("reference/paper.txt").read_text(encoding="utf-8")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    assert cited["title"] in paper
    byline = next(line for line in paper.splitlines() if line.startswith("Shuyi Zhang"))
    names = [f"{a['given-names']} {a['family-names']}" for a in cited["authors"]]
    positions = [byline.find(n) for n in names]
    assert -1 not in positions and positions == sorted(positions)
    assert len(names) == len(byline.split(", "))


def test_package_data_is_there():
    for pattern in PROJECT["tool"]["setuptools"]["package-data"]["sarmlib"]:
        if "backbone" not in pattern:
            assert list((ROOT / "sarmlib").glob(pattern)), pattern
    for path in own_files():
        assert path.stat().st_size <= 6_000_000, f"{path} is too large for version control"


def test_each_make_target_builds_its_own_environment():
    text = (ROOT / "Makefile").read_text()
    for target in TARGETS:
        assert re.search(rf"^{target}: \$\(STAMP\)", text, re.M), target
    assert re.search(r"^\$\(STAMP\): requirements\.lock pyproject\.toml", text, re.M)
    assert re.search(r"^export OMP_NUM_THREADS := 1", text, re.M)
    assert re.search(r"^\.DEFAULT_GOAL := help", text, re.M)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_and_reproduce_say_what_they_do():
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(re.search(rf"^  {target} ", shown, re.M) for target in [*TARGETS, "clean", "distclean"]), shown
    plan = subprocess.run(["make", "-n", "reproduce", "PROFILE=local", "DATA=some folder"], cwd=ROOT,
                          capture_output=True, text=True, check=True).stdout
    assert '-m sarmlib reproduce --profile local --runs runs --data "some folder"' in plan
    refused = subprocess.run(["make", "badges", "-o", ".venv/.installed"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode != 0 and "REPO=owner/name" in refused.stderr


def test_ci_runs_the_two_commands():
    script = ROOT / ".ci" / "run"
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make")] == ["make test", "make reproduce"]
    assert script.stat().st_mode & 0o100
