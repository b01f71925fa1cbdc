"""Lint of the committed notebooks: without it, a comparison of outputs can be green and check nothing.

nbval passes a cell that was never executed, so executed outputs, their order and their ``[ok]`` lines are checked here,
without a kernel.  The last tests show that the lint and the comparison can fail.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from sarmlib.claims import load_claims
from sarmlib.errors import ConfigError
from sarmlib.runner import check_notebook

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TAGS = {"parameters", "nbval-ignore-output", "nbval-skip"}
HEADINGS = ["the claim", "what you will see", "cost", "steps", "checks", "what this shows", "next"]
LOCAL_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work|mnt|content|opt|private|var)/|[A-Z]:\\\\")
COLAB = re.compile(r"https://colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/[\w./-]+")


def lint(path: Path) -> list[str]:
    """Everything that is wrong with a committed notebook, each with its place (code cells counted from 0)."""
    problems = []
    notebook = nbformat.read(path, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    claims = {c.id for c in load_claims().values() if c.notebook == path.stem}
    compared = ""

    if path.stat().st_size >= 1_000_000:
        problems.append("file of 1 MB or more")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        problems.append("kernel is not python3")
    if [c.execution_count for c in code] != list(range(1, len(code) + 1)):
        problems.append("execution counts are not 1..n: execute it from top to bottom with `make notebooks`")
    try:
        check_notebook(path, {"profile": "toy"})
    except ConfigError as error:
        problems.append(str(error))

    for number, cell in enumerate(code):
        where, tags = f"code cell {number}", set(cell.metadata.get("tags", []))
        lines = cell.source.splitlines()
        outputs = "".join(o.get("text", "") for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
        if tags - TAGS:
            problems.append(f"{where}: unknown tag {', '.join(sorted(tags - TAGS))}")
        if "nbval-skip" in tags and "google.colab" not in cell.source:
            problems.append(f"{where}: only the Colab install cell may be skipped")
        if "nbval-ignore-output" in tags and ".check(" in cell.source:
            problems.append(f"{where}: a claim is checked where outputs are not compared")
        if not tags & {"nbval-ignore-output", "nbval-skip"}:
            compared += outputs
        if any(o.output_type == "error" for o in cell.outputs):
            problems.append(f"{where}: the committed output is an error")
        if any(o.output_type == "stream" and o.name == "stderr" for o in cell.outputs):
            problems.append(f"{where}: progress or warnings (stderr) are committed")
        if "[FAIL]" in outputs:
            problems.append(f"{where}: a failed check is committed")
        if len(lines) > 20:
            problems.append(f"{where}: {len(lines)} lines, 20 at most")
        if lines and lines[-1].rstrip().endswith(";"):
            problems.append(f"{where}: ends with ';', which nbval does not understand")
        if LOCAL_PATH.search(cell.source + json.dumps([o.get("text", o.get("data", "")) for o in cell.outputs])):
            problems.append(f"{where}: a path of somebody's own machine")
        if "parameters" in tags and not re.search(r"""^profile(: str)? = ["']toy["']""", cell.source, re.M):
            problems.append(f"{where}: the committed profile is not toy")
        problems += [f"{where}: {p}" for p in _long_definitions(cell.source)]

    if claims:
        ok = re.findall(r"^\[ok\] (\w+) ", compared, re.M)
        if len(ok) < 2 or set(ok) != claims:
            problems.append(f"[ok] lines in compared cells are for {sorted(ok)}, the claims are {sorted(claims)}")
        if f"{len(claims)}/{len(claims)} claims checked" not in compared or ".close()" not in code[-1].source:
            problems.append("the last code cell must close the claims")

    text = [c.source for c in notebook.cells if c.cell_type == "markdown"]
    titles = [t.strip().lower() for t in re.findall(r"^#{1,4} (.+)$", "\n".join(text), re.M)]
    title = re.match(r"^(\d\d)_", path.stem)
    if title and not (titles and titles[0].startswith(f"{title[1]} ·")):
        problems.append(f"the first heading is not '# {title[1]} · Title'")
    places = [next((i for i, t in enumerate(titles) if t.startswith(h)), None) for h in HEADINGS]
    if claims and (missing := [h for h, p in zip(HEADINGS, places, strict=True) if p is None]):
        problems.append(f"no heading that starts with {', '.join(missing)}")
    elif claims and places != sorted(places):
        problems.append(f"headings are not in the order {', '.join(HEADINGS)}")
    for link in COLAB.findall("\n".join(text)):
        if not link.endswith(f"/notebooks/{path.name}"):
            problems.append(f"the Colab badge points to {link}")
    return problems


def _long_definitions(source: str) -> list[str]:
    try:
        tree = ast.parse(re.sub(r"^(\s*)%", r"\1pass  # %", source, flags=re.M))
    except SyntaxError:
        return []  # check_notebook reports it
    found = ["a class; classes belong to the library" for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    return found + [f"function {n.name} is longer than 5 lines" for n in ast.walk(tree)
                    if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno + 1 > 5]


@pytest.mark.parametrize("path", NOTEBOOKS or [None], ids=lambda p: p.stem if p else "none")
def test_notebook(path):
    if path is None:
        pytest.skip("there are no notebooks yet")
    assert lint(path) == []


def test_every_claim_has_its_notebook():
    if not NOTEBOOKS:
        pytest.skip("there are no notebooks yet")
    assert {c.notebook for c in load_claims().values()} <= {p.stem for p in NOTEBOOKS}


# ---- the lint and the comparison can fail

@pytest.fixture
def good(tmp_path):
    """A notebook without fault, named like one that has claims."""
    claims = [c for c in load_claims().values() if c.notebook == "05_benchmarks"]
    cells = [nbformat.v4.new_markdown_cell("# 05 · Benchmarks\n## The claim\n## What you will see\n## Cost"),
             nbformat.v4.new_code_cell('profile = "toy"', metadata={"tags": ["parameters"]}),
             nbformat.v4.new_markdown_cell("## Steps"),
             nbformat.v4.new_code_cell("print(1)", metadata={"tags": ["nbval-ignore-output"]}),
             nbformat.v4.new_markdown_cell("## Checks")]
    lines = [f"[ok] {c.id} {c.title} ({c.band['toy']})" for c in claims]
    lines.append(f"{len(claims)}/{len(claims)} claims checked")
    source = "class_ = 0\n" + "\n".join(f"print({line!r})" for line in lines) + "\n# claims.close()"
    output = nbformat.v4.new_output("stream", name="stdout", text="\n".join(lines) + "\n")
    cells += [nbformat.v4.new_code_cell(source, outputs=[output]),
              nbformat.v4.new_markdown_cell("## What this shows, and what it does not\n## Next")]
    for number, cell in enumerate(c for c in cells if c.cell_type == "code"):
        cell.execution_count = number + 1
    cells[3].outputs = [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
    path = tmp_path / "05_benchmarks.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {
        "name": "python3", "display_name": "Python 3", "language": "python"}}), path)
    return path


def break_it(path, change):
    notebook = nbformat.read(path, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    change(notebook, code)
    nbformat.write(notebook, path)
    return "\n".join(lint(path))


def test_a_notebook_without_fault_passes(good):
    assert lint(good) == []


def _source(number, text):
    return lambda n, c: c[number].update(source=text)


def _tags(number, *tags):
    return lambda n, c: c[number].metadata.update(tags=list(tags))


def _output(number, output):
    return lambda n, c: c[number].outputs.append(output)


STDERR = nbformat.v4.new_output("stream", name="stderr", text="50%|")
ERROR = nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
FAILED = nbformat.v4.new_output("stream", name="stdout", text="[FAIL] C11 x\n")


@pytest.mark.parametrize("change, message", [
    (lambda n, c: c[1].update(execution_count=None), "execution counts"),
    (lambda n, c: c[1].update(execution_count=7), "execution counts"),
    (_tags(0), "0 cells tagged 'parameters'"),
    (_tags(1, "parameters"), "2 cells tagged 'parameters'"),
    (_tags(1, "nbval-ignore-outputs"), "unknown tag"),
    (_tags(1, "nbval-skip"), "only the Colab install cell"),
    (_tags(2, "nbval-ignore-output"), r"\[ok\] lines in compared cells are for \[\]"),
    (_source(1, "claims.check('C11', 1)"), "a claim is checked where outputs are not compared"),
    (lambda n, c: c[2].outputs[0].update(text=c[2].outputs[0].text.replace("[ok] C12", "C12")), "C11', 'C13'"),
    (lambda n, c: c[2].outputs[0].update(text=c[2].outputs[0].text.replace("3/3", "2/3")), "must close the claims"),
    (_output(1, ERROR), "the committed output is an error"),
    (_output(1, STDERR), "stderr"),
    (_output(1, FAILED), "a failed check is committed"),
    (_source(1, "x = 1\n" * 21), "21 lines"),
    (_source(1, "x = 1;"), "ends with ';'"),
    (_source(1, "open('/ho" + "me/me/x')"), "own machine"),
    (_source(0, 'profile = "gpu"'), "not toy"),
    (_source(1, "class A: pass"), "classes belong to the library"),
    (_source(1, "def f():\n" + "    x = 1\n" * 5), "longer than 5 lines"),
    (_source(1, "import sys; sys.exit(0)"), "ends the kernel"),
    (_source(1, "!ls"), "shell command"),
    (lambda n, c: n.metadata.kernelspec.update(name="mine"), "kernel is not python3"),
    (lambda n, c: n.cells[0].update(source=n.cells[0].source.replace("05 ·", "5:")), "first heading"),
    (lambda n, c: n.cells[0].update(source=n.cells[0].source.replace("Cost", "Price")), "no heading.*cost"),
    (lambda n, c: n.cells[0].update(source=n.cells[0].source + "\n## Next"), "order"),
    (lambda n, c: n.cells[2].update(source="https://colab.research.google.com/github/a/b/blob/main/notebooks/01_x.ipynb"
                                    ), "badge points to"),
    (lambda n, c: n.cells[0].update(source=n.cells[0].source + " " * 1_000_000), "1 MB"),
])
def test_each_rule_can_fail(good, change, message):
    assert re.search(message, break_it(good, change))


def test_a_stripped_notebook_fails_the_lint(good):
    subprocess.run([sys.executable, "-m", "nbstripout", str(good)], check=True)
    problems = "\n".join(lint(good))
    assert "execution counts" in problems and "[ok] lines" in problems


def nbval(folder: Path) -> subprocess.CompletedProcess:
    shutil.copy(FOLDER / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env",
               "--nbval-cell-timeout=60", "."]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_comparison_passes_and_one_corrupted_line_fails_it(good):
    done = nbval(good.parent)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-3000:]

    def corrupt(notebook, code):
        assert "[ok] C12" in code[2].outputs[0].text
        code[2].outputs[0].text = code[2].outputs[0].text.replace("[ok] C12", "[ok] C21")
    break_it(good, corrupt)
    done = nbval(good.parent)
    assert done.returncode == 1 and "1 failed, 2 passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS[:5] or [None], ids=lambda p: p.stem if p else "none")
def test_corrupting_a_committed_notebook_is_noticed(path, tmp_path):
    if path is None:
        pytest.skip("there are no notebooks yet")
    notebook = nbformat.read(path, as_version=4)
    changed = copy.deepcopy(notebook)
    for cell in changed.cells:
        for output in cell.get("outputs", []):
            if "[ok]" in output.get("text", ""):
                output.text = output.text.replace("[ok]", "[no]", 1)
    if changed == notebook:
        pytest.skip("no claims in this notebook")
    nbformat.write(changed, tmp_path / path.name)
    assert "[ok] lines" in "\n".join(lint(tmp_path / path.name))
