"""The runner: papermill's silent failures are refused, unchanged notebooks are not run again, failures are kept."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest

from sarmlib import runner
from sarmlib.artifacts import Store
from sarmlib.errors import ConfigError, SarmlibError
from sarmlib.runner import check_notebook, notebook_names, refresh_committed, run_notebooks


def notebook(path: Path, *sources: str, parameters: str = 'profile = "toy"', tags: dict | None = None) -> Path:
    """A notebook whose cell 0 is the ``parameters`` cell, with ``sources`` behind it."""
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(textwrap.dedent(s).strip(), metadata={"tags": (tags or {}).get(i, [])})
              for i, s in enumerate(sources, start=1)]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {
        "name": "python3", "display_name": "Python 3", "language": "python"}}), path)
    return path


def test_order_is_by_number(tmp_path):
    for name in ("02_b", "10_c", "01_a", "notes"):
        notebook(tmp_path / f"{name}.ipynb", "1")
    assert notebook_names(tmp_path) == ["01_a", "02_b", "10_c"]


@pytest.mark.parametrize("source, message", [
    ("import sys\nsys.exit(0)", "exit ends the kernel"),
    ("exit()", "exit ends the kernel"),
    ("raise SystemExit", "SystemExit ends the kernel"),
    ("import os; os._exit(0)", "_exit ends the kernel"),
    ("!false", "shell command"),
    ("x = !ls", "shell command"),
    ("import os; os.system('false')", "shell command"),
    ("%%bash\nfalse", "%bash runs a shell command"),
    ("%system false", "shell command"),
    ("%pip install x", "%pip runs a shell command"),
    ("def f(:", "cell 1"),
])
def test_silent_failures_are_refused_before_a_kernel_starts(tmp_path, source, message):
    path = notebook(tmp_path / "01_a.ipynb", source)
    with pytest.raises(ConfigError, match=message):
        check_notebook(path, {})


def test_harmless_cells_pass(tmp_path):
    path = notebook(tmp_path / "01_a.ipynb", "%matplotlib inline\nprint('!ls', 'sys.exit(0)')  # !ls",
                    "import sys\nif 'google.colab' in sys.modules:\n    %pip install x", tags={2: ["nbval-skip"]})
    check_notebook(path, {"profile": "toy"})


def test_unknown_parameter_and_missing_parameters_cell_are_refused(tmp_path):
    path = notebook(tmp_path / "01_a.ipynb", "1", parameters='profile = "toy"\nseed: int = 0')
    check_notebook(path, {"profile": "toy", "seed": 1})
    with pytest.raises(ConfigError, match="no parameter sead; it has profile, seed"):
        check_notebook(path, {"sead": 1})
    with pytest.raises(ConfigError, match="sead"):
        run_notebooks("toy", ["01_a"], folder=tmp_path, runs=tmp_path / "runs", parameters={"sead": 1})
    plain = nbformat.read(path, 4)
    plain.cells[0].metadata.tags = []
    nbformat.write(plain, path)
    with pytest.raises(ConfigError, match="0 cells tagged 'parameters'"):
        check_notebook(path, {})
    plain.cells[0].metadata.tags = plain.cells[1].metadata.tags = ["parameters"]
    nbformat.write(plain, path)
    with pytest.raises(ConfigError, match="2 cells"):
        check_notebook(path, {})
    with pytest.raises(ConfigError, match="raises-exception"):
        check_notebook(notebook(tmp_path / "b.ipynb", "1", tags={1: ["raises-exception"]}), {})
    with pytest.raises(ConfigError, match="cannot be read"):
        check_notebook(tmp_path / "absent.ipynb", {})


GOOD = """
import json, os, pathlib, sys
from sarmlib.artifacts import default_root
place = default_root(profile) / "seen.json"
place.parent.mkdir(parents=True, exist_ok=True)
runs = json.loads(place.read_text()) if place.exists() else []
place.write_text(json.dumps([*runs, [profile, lr, sys.executable, os.getcwd()]]))
print("progress: 50%|##", file=sys.stderr)
"""


def test_run_then_unchanged_then_run_again_when_something_changed(tmp_path, monkeypatch):
    path = notebook(tmp_path / "nb" / "01_a.ipynb", GOOD, parameters='profile = "none"\nlr = 0.0')
    arguments = dict(folder=path.parent, runs=tmp_path / "runs", parameters={"lr": 4e-6}, progress=False)
    monkeypatch.setattr(runner, "_fingerprint", lambda folder: ["the same code"])
    first, = run_notebooks("toy", **arguments)
    seen = tmp_path / "runs" / "toy" / "seen.json"
    assert first.status == "ran" and Path(first.output).exists() and first.peak_rss_mib > 10
    # the profile name, a float that YAML 1.1 would read as text, this very interpreter, the notebook's own folder
    assert json.loads(seen.read_text()) == [["toy", 4e-6, sys.executable, str(path.parent)]]

    monkeypatch.setattr(runner, "_execute", lambda *a: pytest.fail("ran again"))
    again, = run_notebooks("toy", **arguments)
    assert (again.status, again.seconds) == ("unchanged", first.seconds)

    calls = []
    monkeypatch.setattr(runner, "_execute", lambda *a: calls.append(1) or first)
    run_notebooks("toy", **{**arguments, "force": True})
    run_notebooks("toy", **{**arguments, "parameters": {"lr": 5e-6}})
    monkeypatch.setattr(runner, "_fingerprint", lambda folder: ["other code"])
    run_notebooks("toy", **arguments)
    monkeypatch.setattr(runner, "_fingerprint", lambda folder: ["the same code"])
    assert len(calls) == 3
    notebook(path, GOOD + "\n# changed", parameters='profile = "none"\nlr = 0.0')
    run_notebooks("toy", **arguments)
    assert len(calls) == 4


def test_fingerprint_follows_code_bytes_and_data_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PACKAGE", tmp_path / "lib")
    for folder in (tmp_path / "lib", tmp_path / "data"):
        (folder / "__pycache__").mkdir(parents=True)
        (folder / "a.py").write_text("1")
        before = runner._fingerprint(folder)
        (folder / "__pycache__" / "a.pyc").write_text("x")
        assert runner._fingerprint(folder) == before
        (folder / "a.py").write_text("22")
        assert runner._fingerprint(folder) != before
    assert runner._fingerprint(None) == []


def test_a_removed_artifact_or_output_makes_the_notebook_run_again(tmp_path):
    root, out = tmp_path / "runs", tmp_path / "runs" / "notebooks" / "01_a.ipynb"
    artifact = Store(root).get_or_make("s", {}, {}, lambda f: None)
    run = runner.NotebookRun("01_a", "ran", 1.0, str(out), "")
    out.parent.mkdir()
    out.write_text("{}")
    (root / "results").mkdir()
    (claims := root / "results" / "01_a.json").write_text("{}")
    record = {"run": runner.asdict(run), "stamp": "abc", "sha256": runner._sums(out, root),
              "artifacts": [f"s/{artifact.key}"]}
    out.with_suffix(".run.json").write_text(json.dumps(record))
    assert runner._finished(out, "abc", root).status == "unchanged"
    assert runner._finished(out, "abd", root) is None
    out.write_text("{ }")
    assert runner._finished(out, "abc", root) is None
    out.write_text("{}")
    claims.write_text("{ ")
    assert runner._finished(out, "abc", root) is None
    claims.write_text("{}")
    assert runner._finished(out, "abc", root).status == "unchanged"
    (artifact.path / "stranger").write_text("x")
    assert runner._finished(out, "abc", root) is None
    (artifact.path / "stranger").unlink()
    artifact.path.rename(tmp_path / "elsewhere")
    assert runner._finished(out, "abc", root) is None


def test_failures_are_kept_and_others_still_run(tmp_path, monkeypatch):
    folder = tmp_path / "nb"
    notebook(folder / "01_bad.ipynb", "print('before')", "raise ValueError('boom')", "print('after')")
    # ends the kernel in a way no reader of the source can see; papermill alone reports success
    notebook(folder / "02_sly.ipynb", "import sys\ngetattr(sys, 'ex' + 'it')(0)", "print('never')")
    arguments = dict(folder=folder, runs=tmp_path / "runs", progress=False)
    results = run_notebooks("toy", check=False, **arguments)
    assert [r.status for r in results] == ["failed", "failed"]
    assert "boom" in results[0].error and "never executed" in results[1].error
    kept = nbformat.read(results[0].output, 4)
    assert any("before" in str(c.get("outputs")) for c in kept.cells) and "boom" in str(kept)
    assert runner._finished(Path(results[0].output), "", tmp_path / "runs" / "toy") is None  # tried again next time

    outcomes = list(results)  # the same outcomes, no new kernels
    monkeypatch.setattr(runner, "_execute", lambda *a: outcomes.pop(0))
    with pytest.raises(SarmlibError, match="(?s)01_bad failed.*boom.*02_sly failed"):
        run_notebooks("toy", **arguments)


def test_braces_in_the_path_are_refused(tmp_path):
    path = notebook(tmp_path / "nb" / "01_a.ipynb", "1")
    with pytest.raises(ConfigError, match="braces"):
        run_notebooks("toy", folder=path.parent, runs=tmp_path / "a{b}", progress=False)


def test_refresh_writes_outputs_and_counts_but_no_timings_paths_or_progress(tmp_path):
    path = notebook(tmp_path / "nb" / "01_a.ipynb", "import sys\nprint('[ok] C1')\nprint('50%|', file=sys.stderr)")
    bad = notebook(tmp_path / "nb" / "02_b.ipynb", "1 / 0")
    before = bad.read_text()
    with pytest.raises(SarmlibError, match="02_b failed"):
        refresh_committed(folder=path.parent, runs=tmp_path / "runs", progress=False)
    assert bad.read_text() == before
    done = nbformat.read(path, 4)
    assert [c.execution_count for c in done.cells] == [1, 2]  # and no injected parameters cell
    assert [o.text for o in done.cells[1].outputs] == ["[ok] C1\n"]
    assert done.cells[0].metadata.tags == ["parameters"]
    text = path.read_text()
    assert "papermill" not in text and "duration" not in text and str(tmp_path) not in text
    assert not list(path.parent.glob("*.tmp*"))


def test_module_is_light():
    code = "import sys, sarmlib.runner; print([m for m in ('papermill', 'IPython', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=runner.PACKAGE.parent, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
