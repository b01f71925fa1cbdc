"""One set of dependencies in three files, nothing private in any file, and Make targets that stand alone."""

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

import sarmlib
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line and not line.startswith("#")]
TARGETS = ["setup", "reproduce", "test", "notebooks", "figures", "report", "backbone", "verify"]


def name(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def test_lock_pins_every_line_names_no_source_and_keeps_cuda_out():
    text = (ROOT / "requirements.lock").read_text()
    assert len(LOCK) > 100 and not re.search(r"^\s*-|://|\+", text, re.M)
    assert [r for r in LOCK if not re.fullmatch(r"==[0-9][0-9A-Za-z.]*", str(r.specifier))] == []
    assert [r for r in LOCK if name(r).startswith(("nvidia-", "cuda-", "triton", "pytorch-triton"))] == []
    assert [str(r) for r in LOCK if name(r) == "torch"] == ["torch==2.13.0"]


@pytest.mark.parametrize("python, platform", [("3.11", "linux"), ("3.13", "darwin"), ("3.11", "win32")])
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


def test_dependencies_are_bounded_from_below_and_every_import_is_one():
    project = PROJECT["project"]
    assert {s.operator for text in project["dependencies"] for s in Requirement(text).specifier} == {">="}
    extras = project["optional-dependencies"]
    assert set(extras["llm"] + extras["gguf"]) <= set(extras["dev"]), "the tests run what these extras add"
    known = {name(Requirement(t)) for ts in (project["dependencies"], *extras.values()) for t in ts}
    known |= {"sarmlib", "yaml", "IPython", "huggingface-hub",  # comes with transformers
              "deepspeed"}  # imported only where accelerate was told to use it
    found = set()
    for path in (ROOT / "sarmlib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    assert {one for one in found - sys.stdlib_module_names if one.replace("_", "-") not in known} == set()
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "sarmlib").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == there | {"sarmlib.notebooks"}


def test_no_file_names_a_package_registry_or_somebodys_machine():
    hosts = ["py" + "pi.org", "python" + "hosted.org", "download." + "pytorch.org", "ana" + "conda.org",
             "ana" + "conda.com"]
    paths = re.compile("(?<![\\w.])/(?:ho" + "me/[a-z]|Us" + "ers/[a-z]|ro" + "ot/|wo" + "rk/)", re.I)
    command = ["git", "ls-files", "-co", "--exclude-standard"]  # under version control, or could be
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the checkout is not under git")
    problems = []
    for path in filter(Path.is_file, map(ROOT.joinpath, listed.stdout.splitlines())):
        assert path.stat().st_size <= 6_000_000, f"{path} is too large for version control"
        text = path.read_bytes().decode("utf-8", "ignore")
        problems += [f"{path.relative_to(ROOT)} names {host}" for host in hosts if host in text]
        problems += [f"{path.relative_to(ROOT)} holds the path {m.group()}" for m in paths.finditer(text)]
    assert problems == []


def test_citation_is_whole_and_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"] and citation["title"]
    assert citation["version"] == PROJECT["project"]["version"] == sarmlib.__version__
    assert citation["license"] == PROJECT["project"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_targets_stand_alone_and_say_what_they_do():
    text = (ROOT / "Makefile").read_text()
    assert [target for target in TARGETS if not re.search(rf"^{target}: \$\(STAMP\)", text, re.M)] == []
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(re.search(rf"^  {target} ", shown, re.M) for target in [*TARGETS, "clean", "distclean"]), shown
    plan = subprocess.run(["make", "-n", "reproduce", "PROFILE=local", "DATA=some folder"], cwd=ROOT,
                          capture_output=True, text=True, check=True).stdout
    assert '-m sarmlib reproduce --profile local --runs runs --data "some folder"' in plan
