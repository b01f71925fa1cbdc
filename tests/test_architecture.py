"""Imports point only downward, without a circle; ``import sarmlib`` is light; the house stays small."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "sarmlib"
# From the ground up.  A module imports from floors below, and from its own where there is no circle.
FLOORS = [
    "errors registration", "store", "hub chat jobs sae.kernels", "profiles sae.topk",
    "backbone sae.formats sae.training endpoint", "extractor sae.quality", "data", "plan sarm.model",
    "evaluation.statistics evaluation.rewardbench2 evaluation.rm_bench evaluation.published "
    "evaluation.readout",
    "evaluation.scorer", "sarm.released evaluation.judges sarm.training sarm.attribution sarm.steering",
    "interpretation", "pipeline", "results figures claims browser", "runner", "cli", "__main__"]
FLOOR = {f"sarmlib.{name}": number for number, names in enumerate(FLOORS) for name in names.split()}
LAZY = {("sarmlib.evaluation.scorer", "sarmlib.sarm.released")}
"""Upward imports inside a function: a reader of any checkpoint knows the authors' layout too."""
TOOLS = {"datasets", "matplotlib", "seaborn", "trl", "wandb", "papermill"}
HEAVY = TOOLS | {"transformers", "pandas", "scipy", "torch"}
MOST_LIBRARY, MOST_TESTS, MOST_FUNCTION = 9803, 7500, 60
"""Lines of sarmlib/ (Python), of tests/, and of one function: where the house stands.  Raised only with what it buys:
last for JumpReLU encoders, the decoder without pairs, claims with controls, bounded input, models on "meta"."""


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def floor(module: str) -> int | None:
    """Of the module, or of the package it lies in."""
    while module and module not in FLOOR:
        module = module.rpartition(".")[0]
    return FLOOR.get(module)


def imports(module: str, path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere, except for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # "from package import module" imports the module, "from module import name" does not
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return {name for name in found if name in known and name != module}


def graph_of(package: Path = PACKAGE) -> dict[str, set[str]]:
    found = modules(package)
    graph = {name: imports(name, path, set(found)) for name, path in found.items()}
    return {module: {t for t in targets if (module, t) not in LAZY} for module, targets in graph.items()}


def upward(graph: dict[str, set[str]]) -> list[str]:
    return [f"{module} imports {target}, which is not below it" for module, targets in graph.items()
            for target in sorted(targets) if floor(module) is not None and floor(target) is not None
            and floor(target) > floor(module)]


def circle(graph: dict[str, set[str]]) -> set[str]:
    """What is left when all that import nothing left are taken away: circles, and modules above them."""
    left = dict(graph)
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    return set(left)


def test_imports_point_downward_without_a_circle():
    graph = graph_of()
    assert [m for m in graph if floor(m) is None and not PACKAGE.joinpath(*m.split(".")[1:]).is_dir()] == []
    assert upward(graph) == [] and circle(graph) == set()
    assert not {"sarmlib.pipeline", "sarmlib.results"} & (graph["sarmlib.figures"] | graph["sarmlib.claims"])
    assert graph["sarmlib.profiles"] <= {"sarmlib.errors"}


def test_the_check_itself_can_fail(tmp_path):
    (package := tmp_path / "sarmlib").mkdir()
    (package / "sarm").mkdir()
    for name in ("__init__", "sarm/__init__", "pipeline"):
        (package / f"{name}.py").write_text("")
    (package / "sarm" / "model.py").write_text("def f():\n    from ..chat import g\n")
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sarmlib.pipeline\n"
    (package / "chat.py").write_text(typed)
    graph = graph_of(package)
    assert graph["sarmlib.sarm.model"] == {"sarmlib.chat"} and upward(graph) == [] and circle(graph) == set()
    (package / "chat.py").write_text("from sarmlib.sarm import model\n")
    assert upward(graph_of(package)) == ["sarmlib.chat imports sarmlib.sarm.model, which is not below it"]
    assert circle(graph_of(package)) == {"sarmlib.chat", "sarmlib.sarm.model"}


def lines(folder: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py"))


def test_the_house_stays_small():
    assert lines(PACKAGE) <= MOST_LIBRARY and lines(ROOT / "tests") <= MOST_TESTS
    assert [f"{path.name}: {node.name}" for path in PACKAGE.rglob("*.py")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_FUNCTION] == []


@pytest.mark.parametrize("statement, without", [
    ("import sarmlib", HEAVY),
    ("import sarmlib.profiles, sarmlib.store, sarmlib.cli, sarmlib.runner", HEAVY),
    ("from sarmlib import TopKSAE, SarmForSequenceClassification", TOOLS)])
def test_imports_are_light(statement, without):
    code = f"import sys, time, json; {statement}; print(json.dumps([list(sys.modules), time.process_time()]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names, seconds = json.loads(done.stdout)
    assert {name.split(".")[0] for name in names} & without == set()
    assert seconds < 3 or without is not HEAVY
