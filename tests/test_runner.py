"""The runner: papermill's silent failures are found, unchanged notebooks stay, failed ones are kept."""

import json
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from sarmlib import jobs, runner
from sarmlib.errors import ConfigError, SarmlibError
from sarmlib.runner import run_notebooks


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What a run leaves in the environment is taken back."""
    for name in ("SARMLIB_RUNS", "PYTHONPATH", "JUPYTER_PREFER_ENV_PATH"):
        monkeypatch.setenv(name, "")


def notebook(path: Path, *sources: str, parameters: str = 'profile = "toy"') -> Path:
    """A notebook whose cell 0 is the ``parameters`` cell, with ``sources`` behind it."""
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def test_unknown_names_and_notebooks_without_the_parameter_are_refused_before_a_kernel_starts(tmp_path):
    for name in ("02_b", "10_c", "01_a", "notes"):
        notebook(tmp_path / f"{name}.ipynb", "1", parameters="profil = 0")
    with pytest.raises(ConfigError, match="no notebook 03_x in .*it has 01_a, 02_b, 10_c"):
        run_notebooks("toy", ["03_x"], folder=tmp_path, runs=tmp_path / "runs")
    with pytest.raises(ConfigError, match="01_a.ipynb has no parameter profile; it has profil"):
        run_notebooks("toy", folder=tmp_path, runs=tmp_path / "runs")


GOOD = """
import json, os, sys, time
from sarmlib.store import default_root
time.sleep(1)
root = default_root(profile)
(root / "seen.json").write_text(json.dumps([profile, sys.executable, os.getcwd()]))
(root / "results").mkdir(exist_ok=True)
(root / "results" / "01_a.json").write_text("{}")
"""


def test_two_processes_run_a_notebook_once_and_it_runs_again_when_something_changed(tmp_path, monkeypatch):
    path = notebook(tmp_path / "nb" / "01_a.ipynb", GOOD, parameters='profile = "none"')
    code = ("import sys; from sarmlib.runner import run_notebooks\n"
            "print(run_notebooks('toy', folder=sys.argv[1], runs=sys.argv[2], progress=False)[0].status)")
    both = [subprocess.Popen([sys.executable, "-c", code, path.parent, tmp_path / "runs"], text=True,
                             cwd=runner.PACKAGE.parent, stdout=subprocess.PIPE) for _ in range(2)]
    assert sorted(one.communicate(timeout=120)[0].strip() for one in both) == ["ran", "unchanged"]
    arguments = {"folder": path.parent, "runs": tmp_path / "runs", "progress": False}
    first, = run_notebooks("toy", **arguments)
    root = tmp_path / "runs" / "toy"
    assert first.status == "unchanged" and Path(first.output).exists()
    # the profile's name, this very interpreter, the notebook's own folder
    assert json.loads((root / "seen.json").read_text()) == ["toy", sys.executable, str(path.parent)]

    monkeypatch.setattr(runner, "_execute", lambda *a: first._replace(status="ran"))

    def runs_again() -> bool:
        return run_notebooks("toy", **arguments)[0].status == "ran"

    assert not runs_again()
    for touched in (Path(first.output), root / "results" / "01_a.json"):
        before = touched.read_text()
        touched.write_text(before + " ")
        assert runs_again()
        touched.write_text(before)
    with monkeypatch.context() as other:
        other.setattr(runner, "PACKAGE", path.parent)  # another library
        assert runs_again()
    assert not runs_again()
    notebook(path, GOOD + "\n# changed", parameters='profile = "none"')
    assert runs_again()


def test_failures_are_kept_and_others_still_run(tmp_path):
    folder = tmp_path / "nb"
    notebook(folder / "01_bad.ipynb", "print('before')", "raise ValueError('boom')", "print('after')")
    # ends the kernel in a way no reader of the source can see; papermill alone reports success
    notebook(folder / "02_sly.ipynb", "import sys\ngetattr(sys, 'ex' + 'it')(0)", "print('never')")
    with pytest.raises(SarmlibError, match="(?s)01_bad failed; see .*boom.*02_sly failed.*never exec") as caught:
        run_notebooks("toy", folder=folder, runs=tmp_path / "runs", progress=False)
    assert "\x1b" not in str(caught.value)
    out = tmp_path / "runs" / "toy" / "notebooks" / "01_bad.ipynb"
    kept = nbformat.read(out, 4)
    assert any("before" in str(cell.get("outputs")) for cell in kept.cells) and "boom" in str(kept)
    assert not out.with_suffix(".run.json").exists()  # tried again next time


def test_refresh_writes_outputs_and_counts_but_no_timings_paths_or_progress(tmp_path, capfd):
    path = notebook(tmp_path / "nb" / "01_a.ipynb", "import sys\nprint('[ok] C1')\nprint('50%|', file=sys.stderr)")
    bad = notebook(tmp_path / "nb" / "02_b.ipynb", "1 / 0")
    before = bad.read_text()
    with pytest.raises(SarmlibError, match="02_b failed"):
        run_notebooks(folder=path.parent, runs=tmp_path / "runs", progress=False, refresh=True)
    assert bad.read_text() == before and "IPKernelApp" not in capfd.readouterr().err
    done = nbformat.read(path, 4)
    assert [cell.execution_count for cell in done.cells] == [1, 2]  # and no injected parameters cell
    assert [output.text for output in done.cells[1].outputs] == ["[ok] C1\n"]
    assert done.cells[0].metadata == {"tags": ["parameters"]}
    assert not any(word in path.read_text() for word in ("papermill", "duration", "iopub", str(tmp_path)))
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".ipynb"] == []


def test_the_line_says_where_a_run_is_and_how_long_it_has_taken():
    line = runner._Line("01_a (1 of 5)", time.perf_counter() - 151, True)
    line.cells = 22
    line.begin()
    line.write("\rtoy, up to sae: 3 of 11 jobs done, about 01:20 to go: sae every 1 53%\x1b[A")
    line.write("words that are no progress\n")
    assert str(line) == "01_a (1 of 5), 02:31, cell 1 of 22: 3 of 11 jobs done, about 01:20 to go: sae every 1 53%"
    line.begin()
    assert str(line) == "01_a (1 of 5), 02:31, cell 2 of 22"


def test_the_time_left_waits_for_a_finished_job_of_each_stage(monkeypatch):
    monkeypatch.setattr(jobs.time, "perf_counter", lambda: 100.0)
    todo, took, began = [("sae", 1), ("sae", 2)], {("sae", 0): 60.0}, {("sae", 1): 80.0}
    assert jobs._left(todo, took, began, workers=2) == ", about 00:50 to go"  # (60 - 20 + 60) / 2
    assert jobs._left([*todo, ("scores", 0)], took, began, 2) == jobs._left([], took, began, 2) == ""
