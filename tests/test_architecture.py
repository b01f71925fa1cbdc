"""The floors of the house: imports point only downward, there is no circle, and ``import sarmlib`` is light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sarmlib"

# From the ground up.  A module may import from floors below its own, and from its own room (package).
FLOORS = [
    ["sarmlib.errors"],
    ["sarmlib.artifacts", "sarmlib.profiles"],
    ["sarmlib.backbone", "sarmlib.chat"],
    ["sarmlib.data"],
    ["sarmlib.extractor"],
    ["sarmlib.activations", "sarmlib.endpoint"],
    ["sarmlib.evaluation"],
    ["sarmlib.sae"],
    ["sarmlib.figures", "sarmlib.claims", "sarmlib.runner"],
    ["sarmlib.figures_rq3", "sarmlib.figures_pairs"],
    ["sarmlib.sarm"],
    ["sarmlib.interpretation"],
    ["sarmlib.browser"],
    ["sarmlib.export"],
    ["sarmlib.stages"],
    ["sarmlib.analysis"],
    ["sarmlib.gallery", "sarmlib.plan", "sarmlib.report", "sarmlib.slider"],
    ["sarmlib.commands"],
    ["sarmlib.__main__"],
]
HEAVY = {"transformers", "datasets", "matplotlib", "seaborn", "trl", "wandb", "pandas", "scipy", "torch", "papermill"}


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def floor_and_room(module: str) -> tuple[int, str] | None:
    for number, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return number, room
    return None


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
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            # "from package import module" imports the module, "from module import name" does not
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return {name for name in found if name in known and name != module}


def upward(graph: dict[str, set[str]]) -> list[str]:
    problems = []
    for module, targets in graph.items():
        own = floor_and_room(module)
        for target in sorted(targets):
            other = floor_and_room(target)
            if own and other and not (other[0] < own[0] or other[1] == own[1]):
                problems.append(f"{module} imports {target}, which is not below it")
    return problems


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports, or an empty list."""
    state: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> list[str]:
        state[module] = 1
        for target in sorted(graph.get(module, ())):
            if state.get(target) == 1:
                return [*path, module, target]
            if target not in state and (found := visit(target, [*path, module])):
                return found
        state[module] = 2
        return []

    for module in graph:
        if module not in state and (found := visit(module, [])):
            return found
    return []


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    found = modules()
    return {name: imports(name, path, set(found)) for name, path in found.items()}


def test_every_module_has_a_floor(graph):
    assert [m for m in graph if m != "sarmlib" and floor_and_room(m) is None] == []


def test_imports_point_downward(graph):
    assert upward(graph) == []


def test_there_is_no_circle_of_imports(graph):
    assert circle(graph) == []


def test_library_imports_nothing_from_tests_or_notebooks():
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            target = getattr(node, "module", None) or ""
            assert not target.startswith(("tests", "notebooks")), name


def test_the_check_itself_can_fail(tmp_path):
    package = tmp_path / "sarmlib"
    (package / "sarm").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "sarm" / "__init__.py").write_text("")
    (package / "sarm" / "model.py").write_text("def f():\n    from ..chat import g\n")
    (package / "chat.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sarmlib.stages\n")
    (package / "stages.py").write_text("")

    def build():
        found = modules(package)
        return {name: imports(name, path, set(found)) for name, path in found.items()}

    assert build()["sarmlib.sarm.model"] == {"sarmlib.chat"} and upward(build()) == [] and circle(build()) == []
    (package / "chat.py").write_text("from sarmlib.sarm import model\n")
    assert upward(build()) == ["sarmlib.chat imports sarmlib.sarm.model, which is not below it"]
    assert set(circle(build())) == {"sarmlib.chat", "sarmlib.sarm.model"}


def loaded_after(statement: str) -> tuple[set[str], float]:
    code = f"import sys, time, json; {statement}; print(json.dumps([sorted(sys.modules), time.process_time()]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names, seconds = json.loads(done.stdout)
    return {name.split(".")[0] for name in names}, seconds


def test_import_is_light():
    names, seconds = loaded_after("import sarmlib")
    assert names & HEAVY == set()
    assert seconds < 3


def test_profiles_claims_and_store_need_no_torch():
    names, _ = loaded_after("import sarmlib.profiles, sarmlib.claims, sarmlib.artifacts")
    assert names & HEAVY == set()


def test_models_need_no_plotting_data_sets_or_trackers():
    names, _ = loaded_after("from sarmlib import TopKSAE, SarmForSequenceClassification")
    assert names & {"datasets", "matplotlib", "seaborn", "trl", "wandb", "papermill"} == set()


def test_every_public_name_exists():
    code = "import sarmlib; print([n for n in sarmlib.__all__ if getattr(sarmlib, n, None) is None])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
