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
from pathlib import Path

import nbformat
import pytest

from sarmlib.claims import load_claims
from sarmlib.profiles import load_profile
from tests.helpers import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TAGS = {"parameters", "nbval-ignore-output", "nbval-skip"}
HEADINGS = ["the claim", "what you will see", "cost", "steps", "checks", "what this shows", "next"]
SHELL_MAGICS = {"system", "sx", "sc", "bash", "sh", "script", "perl", "ruby", "cmd"}
EXITS = {"exit", "quit", "_exit", "abort", "SystemExit"}
LOCAL_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work|mnt|content|opt|private|var)/|[A-Z]:\\\\")
MEASURED = re.compile(r"(?<![\w.,/])-?\d+\.\d+(?!\w|\.\d)")
"""A number with a decimal point in prose; versions (1.2.3) and names (v1.2) are none."""


def lint(path: Path) -> list[str]:
    """Everything that is wrong with a committed notebook, each with its place (code cells counted from 0)."""
    problems = []
    notebook = nbformat.read(path, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    own = [c for c in load_claims().values() if c.notebook == path.stem]
    claims = {c.id for c in own if "toy" in c.band}
    compared = ""

    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        problems.append("kernel is not python3")
    installs = [c for c in code if is_install(c.source)]
    if [c for c in code if "nbval-skip" in c.metadata.get("tags", [])] != installs or len(installs) > 1:
        problems.append("nbval-skip is for the one install cell (google.colab, %pip install)")
    if [c.execution_count for c in code] != list(range(1, len(code) + 1)):
        problems.append("execution counts are not 1..n: execute it from top to bottom with `make notebooks`")
    count = sum("parameters" in c.metadata.get("tags", []) for c in code)
    if count != 1:
        problems.append(f"{count} cells tagged 'parameters'; it needs exactly one")

    for number, cell in enumerate(code):
        where, tags = f"code cell {number}", set(cell.metadata.get("tags", []))
        lines = cell.source.splitlines()
        outputs = "".join(o.get("text", "") for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
        if tags - TAGS:
            problems.append(f"{where}: unknown tag {', '.join(sorted(tags - TAGS))}")
        if "nbval-ignore-output" in tags and ".check(" in cell.source:
            problems.append(f"{where}: a claim is checked where outputs are not compared")
        if "nbval-ignore-output" not in tags:
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
        if cell not in installs:
            problems += [f"{where}: {problem}" for problem in hazards(cell.source)]

    if claims:
        ok = re.findall(r"^\[ok\] (\w+) ", compared, re.M)
        if len(ok) < 2 or set(ok) != claims:
            problems.append(f"[ok] lines in compared cells are for {sorted(ok)}, the claims are {sorted(claims)}")
        if f"{len(own)}/{len(own)} claims checked" not in compared or ".close()" not in code[-1].source:
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
    return problems + [f"prose says {number}, which no cell prints, no profile sets and no quotation holds"
                       for number in typed_numbers(notebook)]


def is_install(source: str) -> bool:
    return "google.colab" in source and "%pip install" in source


def hazards(source: str) -> list[str]:
    """What papermill would run wrongly without saying so, by a cell's source."""
    from IPython.core.inputtransformer2 import TransformerManager
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
        if name in EXITS:
            found.append(f"{name} ends the kernel, and papermill would call the run a success")
        if name in ("system", "getoutput", "getoutputs", "popen"):
            found.append("a shell command may fail unnoticed; use Python")
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("run_line_magic", "run_cell_magic"):
            if (magic := getattr(node.args[0], "value", "")) in SHELL_MAGICS | {"pip", "conda"}:
                found.append(f"magic %{magic} runs a shell command, which may fail unnoticed")
    return found


def typed_numbers(notebook) -> list[str]:
    """Measured numbers in prose that come neither from an output, nor from the code, a quotation or the profile."""
    known = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = "".join(json.dumps(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in cell.outputs)
            known |= set(MEASURED.findall(cell.source + " " + shown))
    settings = json.dumps(load_profile("toy").model_dump(mode="json"))
    known |= set(MEASURED.findall(settings))
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"“[^”]*”|`[^`]*`|\$[^$]*\$|^>[^\n]*|\(http[^)]*\)", " ", cell.source, flags=re.M)
            found += [number for number in MEASURED.findall(prose) if number not in known
                      and not any(_rounds_to(one, number) for one in known)]
    return found


def _rounds_to(exact: str, shown: str) -> bool:
    return f"{float(exact):.{len(shown.partition('.')[2])}f}" == shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    assert lint(path) == []
    assert {c.notebook for c in load_claims().values()} <= {p.stem for p in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_pictures_of_a_notebook_have_words_in_html(path):
    from nbconvert import HTMLExporter
    body, _ = HTMLExporter(template_name="classic").from_filename(str(path))
    images = re.findall(r"<img[^>]*>", body)
    assert not [one[:200] for one in images if not re.search(r'alt="[^"]{20,}"', one, re.S)]
    assert "output_error" not in body


def test_the_readme_types_no_measured_number():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->|```.*?```|`[^`]*`", "", readme, flags=re.S)
    prose = re.sub(r"(Python|torch|transformers) \d+\.\d+", "", prose)  # versions
    assert MEASURED.findall(prose) == []


# The lint and the comparison can fail

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
    prose = "## Steps\nThe seed gives 0.93, the paper “0.555”, `x = 0.777`; eq. 7, torch 2.13.0, factor 8.0."
    said = break_it(good, lambda n, c: n.cells[2].update(source=prose))
    assert said == "prose says 0.93, which no cell prints, no profile sets and no quotation holds"
    assert break_it(good, _source(0, 'profile = "toy"\ny = 0.9312')) == ""
    skipped = {"source": INSTALL, "metadata": {"tags": ["nbval-skip"]}, "outputs": []}
    assert break_it(good, lambda n, c: c[1].update(**skipped)) == ""


INSTALL = 'import sys\nif "google.colab" in sys.modules:\n    %pip install -q sarmlib'


def _source(number, text):
    return lambda n, c: c[number].update(source=text)


def _tags(number, *tags):
    return lambda n, c: c[number].metadata.update(tags=list(tags))


def _output(kind, **values):
    return lambda n, c: c[1].outputs.append(nbformat.v4.new_output(kind, **values))


def _printed(old, new):
    return lambda n, c: c[2].outputs[0].update(text=c[2].outputs[0].text.replace(old, new))


def _title(old, new):
    return lambda n, c: n.cells[0].update(source=n.cells[0].source.replace(old, new))


@pytest.mark.parametrize("change, message", [
    (lambda n, c: [cell.update(outputs=[], execution_count=None) for cell in c], r"(?s)execution counts.*\[ok\] lines"),
    (lambda n, c: c[1].update(execution_count=7), "execution counts"),
    (_tags(0), "0 cells tagged 'parameters'"),
    (_tags(1, "raises-exception"), "unknown tag"), (_tags(1, "nbval-skip"), "the one install cell"),
    (_tags(2, "nbval-ignore-output"), r"\[ok\] lines in compared cells are for \[\]"),
    (_source(1, "claims.check('C11', 1)"), "a claim is checked where outputs are not compared"),
    (_printed("[ok] C12", "C12"), "C11', 'C13'"),
    (_printed("3/3", "2/3"), "must close the claims"),
    (_output("error", ename="E", evalue="", traceback=[]), "the committed output is an error"),
    (_output("stream", name="stderr", text="50%|"), "stderr"),
    (_output("stream", name="stdout", text="[FAIL] C11 x\n"), "a failed check is committed"),
    (_source(1, "x = 1\n" * 21), "21 lines"),
    (_source(1, "x = 1;"), "ends with ';'"),
    (_source(1, "open('/ho" + "me/me/x')"), "own machine"),
    (_source(0, 'profile = "gpu"'), "not toy"),
    (_source(1, "class A: pass"), "classes belong to the library"),
    (_source(1, "def f():\n" + "    x = 1\n" * 6), "longer than 6 lines"),
    (_source(1, "import sys; sys.exit(0)"), "ends the kernel"), (_source(1, "!ls"), "shell command"),
    (_source(1, "%%bash\nfalse"), "%bash runs a shell command"),
    (_source(1, "def f(:"), "does not parse"),
    (lambda n, c: n.cells[2].update(source="## Steps\nThe error is 0.7312."), "prose says 0.7312"),
    (lambda n, c: n.metadata.kernelspec.update(name="mine"), "kernel is not python3"),
    (_title("05 ·", "5:"), "first heading"),
    (_title("Cost", "Price"), "no heading.*cost"),
    (_title("Cost", "Cost\n## Next"), "order"),
])
def test_each_rule_can_fail(good, change, message):
    assert re.search(message, break_it(good, change))


def test_comparison_passes_and_one_corrupted_line_fails_it(good):
    bad = shutil.copy(good, good.with_stem("06_bad"))
    break_it(bad, _printed("[ok] C12", "[ok] C21"))
    shutil.copy(FOLDER / "conftest.py", good.parent)
    (good.parent / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env",
               "--nbval-cell-timeout=60", "."]
    done = subprocess.run(command, cwd=good.parent, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed, 5 passed" in done.stdout, done.stdout[-3000:]
    assert re.search(r"^FAILED .*06_bad", done.stdout, re.M)
