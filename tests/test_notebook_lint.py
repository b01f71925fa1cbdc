"""Lint of the committed notebooks: without it, a comparison of outputs can be green and check nothing.

nbval passes a cell that was never executed, so executed outputs, their order and their ``[ok]`` lines are checked here,
without a kernel.  The last tests show that the lint and the comparison can fail.
"""

import ast
import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbconvert import HTMLExporter

from sarmlib.claims import load_claims
from sarmlib.profiles import load_profile
from tests.helpers import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TAGS = {"parameters", "nbval-ignore-output", "nbval-skip"}
HEADINGS = ["the claim", "what you will see", "cost", "steps", "checks", "what this shows", "next"]
MAGICS = {"system", "sx", "sc", "bash", "sh", "script", "perl", "ruby", "cmd", "pip", "conda"}
FORBIDDEN = {**dict.fromkeys(("exit", "quit", "_exit", "abort", "SystemExit"),
                             "ends the kernel, and papermill would call the run a success"),
             **dict.fromkeys(("system", "getoutput", "getoutputs", "popen"), "runs a shell command; use Python")}
LOCAL_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work|mnt|content|opt|private|var)/|[A-Z]:\\\\")
MEASURED = re.compile(r"(?<![\w.,/])-?\d+\.\d+(?!\w|\.\d)")
"""A number with a decimal point in prose; versions (1.2.3) and names (v1.2) are none."""


def lint(notebook, stem: str) -> list[str]:
    """Everything that is wrong with a committed notebook, each with its place (code cells counted from 0)."""
    code = [c for c in notebook.cells if c.cell_type == "code"]
    installs = [c for c in code if "google.colab" in c.source and "%pip install" in c.source]
    skipped, parameters = tagged(code, "nbval-skip"), len(tagged(code, "parameters"))
    problems = {
        "kernel is not python3": notebook.metadata.get("kernelspec", {}).get("name") != "python3",
        "nbval-skip is for the one install cell (google.colab, %pip install)": skipped != installs or len(installs) > 1,
        "execution counts are not 1..n: execute it from top to bottom with `make notebooks`":
            [c.execution_count for c in code] != list(range(1, len(code) + 1)),
        f"{parameters} cells tagged 'parameters'; it needs exactly one": parameters != 1}
    for number, cell in enumerate(code):
        found = cell_problems(cell) | ({} if cell in installs else dict.fromkeys(hazards(cell.source), True))
        problems |= {f"code cell {number}: {message}": wrong for message, wrong in found.items()}
    problems |= claim_problems(stem, notebook, code)
    problems |= {f"prose says {number}, which no cell prints, no profile sets and no quotation holds": True
                 for number in typed_numbers(notebook)}
    return [message for message, wrong in problems.items() if wrong]


def tagged(code: list, tag: str) -> list:
    return [cell for cell in code if tag in cell.metadata.get("tags", [])]


def printed(cell) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def cell_problems(cell) -> dict[str, object]:
    """What a code cell may have wrong: whether it has."""
    tags, lines, source = set(cell.metadata.get("tags", [])), cell.source.splitlines(), cell.source
    shown = json.dumps([o.get("text", o.get("data", "")) for o in cell.outputs])
    return {
        f"unknown tag {', '.join(sorted(tags - TAGS))}": tags - TAGS,
        "a claim is checked where outputs are not compared": "nbval-ignore-output" in tags and ".check(" in source,
        "the committed output is an error": any(o.output_type == "error" for o in cell.outputs),
        "progress or warnings (stderr) are committed": any(o.get("name") == "stderr" for o in cell.outputs),
        "a failed check is committed": "[FAIL]" in printed(cell),
        f"{len(lines)} lines, 20 at most": len(lines) > 20,
        "ends with ';', which nbval does not understand": source.rstrip().endswith(";"),
        "a path of somebody's own machine": LOCAL_PATH.search(source + shown),
        "the committed profile is not toy":
            "parameters" in tags and not re.search(r"""^profile(: str)? = ["']toy["']""", source, re.M)}


def claim_problems(stem: str, notebook, code: list) -> dict[str, object]:
    """The same of the claims that are checked and of the headings."""
    own = [c for c in load_claims().values() if c.notebook == stem]
    claims = {c.id for c in own if "toy" in c.band}
    compared = "".join(printed(cell) for cell in code if cell not in tagged(code, "nbval-ignore-output"))
    ok = re.findall(r"^\[ok\] (\w+) ", compared, re.M)
    closed = f"{len(own)}/{len(own)} claims checked" in compared and ".close()" in code[-1].source
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    titles = [title.strip().lower() for title in re.findall(r"^#{1,4} (.+)$", text, re.M)]
    places = [next((i for i, t in enumerate(titles) if t.startswith(h)), None) for h in HEADINGS]
    missing = [h for h, place in zip(HEADINGS, places, strict=True) if place is None]
    number = re.match(r"(\d\d)_|", stem)[1]
    return {
        f"the first heading is not '# {number} · Title'": number and not " ".join(titles).startswith(f"{number} ·"),
        f"[ok] lines in compared cells are for {sorted(ok)}, the claims are {sorted(claims)}":
            claims and (len(ok) < 2 or set(ok) != claims),
        "the last code cell must close the claims": claims and not closed,
        f"no heading that starts with {', '.join(missing)}": claims and missing,
        f"headings are not in the order {', '.join(HEADINGS)}": claims and not missing and places != sorted(places)}


def hazards(source: str) -> list[str]:
    """What papermill would run wrongly without saying so, by a cell's source."""
    found = []
    try:  # IPython rewrites "!ls" and "%magic" to calls, which can then be found by name
        tree = ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError as error:
        return [f"does not parse: {error}"]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found.append("a class; classes belong to the library")
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 6:
            found.append(f"function {node.name} is longer than 6 lines")
        name = getattr(node, "id", None) or getattr(node, "attr", None)
        if name in FORBIDDEN:
            found.append(f"{name} {FORBIDDEN[name]}")
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("run_line_magic", "run_cell_magic"):
            if (magic := getattr(node.args[0], "value", "")) in MAGICS:
                found.append(f"magic %{magic} runs a shell command, which may fail unnoticed")
    return found


def typed_numbers(notebook) -> list[str]:
    """Measured numbers in prose that come neither from an output, nor from the code, a quotation or the profile."""
    known = json.dumps(load_profile("toy").model_dump(mode="json"))
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = (json.dumps(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in cell.outputs)
            known += f" {cell.source} {''.join(shown)}"
        else:
            found += MEASURED.findall(re.sub(r"“[^”]*”|`[^`]*`|\$[^$]*\$|^>[^\n]*|\(http[^)]*\)", " ", cell.source,
                                             flags=re.M))
    exact = [float(number) for number in MEASURED.findall(known)]
    return [number for number in found
            if number not in {f"{one:.{len(number.partition('.')[2])}f}" for one in exact}]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    assert lint(nbformat.read(path, as_version=4), path.stem) == []
    assert {c.notebook for c in load_claims().values()} <= {p.stem for p in NOTEBOOKS}
    body, _ = HTMLExporter(template_name="classic").from_filename(str(path))
    images = re.findall(r"<img[^>]*>", body)
    assert not [one[:200] for one in images if not re.search(r'alt="[^"]{20,}"', one, re.S)], "no words for a picture"


def test_the_readme_types_no_measured_number():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->|```.*?```|`[^`]*`", "", readme, flags=re.S)
    prose = re.sub(r"(Python|torch|transformers) \d+\.\d+", "", prose)  # versions
    assert MEASURED.findall(prose) == []


# The lint and the comparison can fail

def broken(*changes):
    """What the lint says of a notebook after ``change(notebook, first cells by tag)``."""
    notebook = nbformat.read(FOLDER / "05_benchmarks.ipynb", as_version=4)
    first = {tag: cell for cell in reversed(notebook.cells) for tag in cell.metadata.get("tags", [])}
    for change in changes:
        change(notebook, first)
    return "\n".join(lint(notebook, "05_benchmarks"))


def test_numbers_that_are_printed_quoted_or_set_may_stand_in_prose():
    prose = _prose("## Cost", "## Cost\nIt is 731.93, the paper “0.555”, `x = 0.777`; eq. 7, torch 2.13.0, factor 8.0.")
    assert broken(prose) == "prose says 731.93, which no cell prints, no profile sets and no quotation holds"
    assert broken(prose, _source('profile = "toy"\ny = 731.9312', "parameters")) == ""


SHOWN = "nbval-ignore-output"


def _source(text, tag=SHOWN):
    return lambda n, c: c[tag].update(source=text)


def _tags(old, *tags):
    return lambda n, c: c[old].metadata.update(tags=list(tags))


def _output(kind, **values):
    return lambda n, c: c[SHOWN].outputs.append(nbformat.v4.new_output(kind, **values))


def _every(change):
    return lambda n, c: [change(cell) for cell in n.cells if cell.cell_type == "code"]


def _printed(old, new):
    return _every(lambda cell: [o.update(text=o.text.replace(old, new)) for o in cell.outputs if "text" in o])


def _prose(old, new):
    return lambda n, c: [cell.update(source=cell.source.replace(old, new)) for cell in n.cells
                         if cell.cell_type == "markdown"]


@pytest.mark.parametrize("change, message", [
    (_every(lambda cell: cell.update(outputs=[], execution_count=None)), r"(?s)execution counts.*\[ok\] lines"),
    (lambda n, c: c[SHOWN].update(execution_count=77), "execution counts"),
    (_tags("parameters"), "0 cells tagged 'parameters'"),
    (_tags(SHOWN, "raises-exception"), "unknown tag"), (_tags(SHOWN, "nbval-skip"), "the one install cell"),
    (_every(lambda cell: cell.metadata.update(tags=[SHOWN])), r"\[ok\] lines in compared cells are for \[\]"),
    (_source("claims.check('C11', 1)"), "a claim is checked where outputs are not compared"),
    (_printed("[ok] C12", "C12"), "C11', 'C13'"),
    (_printed("3/3", "2/3"), "must close the claims"),
    (_output("error", ename="E", evalue="", traceback=[]), "the committed output is an error"),
    (_output("stream", name="stderr", text="50%|"), "stderr"),
    (_output("stream", name="stdout", text="[FAIL] C11 x\n"), "a failed check is committed"),
    (_source("x = 1\n" * 21), "21 lines"),
    (_source("x = 1;"), "ends with ';'"),
    (_source("open('/ho" + "me/me/x')"), "own machine"),
    (_source('profile = "gpu"', "parameters"), "not toy"),
    (_source("class A: pass"), "classes belong to the library"),
    (_source("def f():\n" + "    x = 1\n" * 6), "longer than 6 lines"),
    (_source("import sys; sys.exit(0)"), "ends the kernel"), (_source("!ls"), "shell command"),
    (_source("%%bash\nfalse"), "%bash runs a shell command"),
    (_source("def f(:"), "does not parse"),
    (_prose("## Steps", "## Steps\nThe error is 0.7312."), "prose says 0.7312"),
    (lambda n, c: n.metadata.kernelspec.update(name="mine"), "kernel is not python3"),
    (_prose("05 ·", "5:"), "first heading"),
    (_prose("## Cost", "## Price"), "no heading.*cost"),
    (_prose("## Cost", "## Cost\n## Next"), "order"),
])
def test_each_rule_can_fail(change, message):
    assert re.search(message, broken(change))


def test_comparison_passes_and_one_corrupted_line_fails_it(tmp_path):
    for name, claim in (("05_good", "C12"), ("06_bad", "C21")):
        output = nbformat.v4.new_output("stream", name="stdout", text=f"[ok] {claim} x\n")
        cell = nbformat.v4.new_code_cell("print('[ok] C12 x')", outputs=[output], execution_count=1)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / f"{name}.ipynb")
    shutil.copy(FOLDER / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env",
               "--nbval-cell-timeout=60", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout[-3000:]
    assert re.search(r"^FAILED .*06_bad", done.stdout, re.M)
