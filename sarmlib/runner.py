"""Run the notebooks in order with papermill, and notice what papermill would pass over in silence.

papermill calls a run a success when a parameter is unknown or a cell ends the kernel; both are failures here.
A notebook that succeeded is not run again while all that it depends on and what it made stay the same.
"""

import io
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from tqdm import tqdm

from sarmlib.errors import ConfigError, SarmlibError
from sarmlib.profiles import load_profile
from sarmlib.store import Store, default_root, hash_file, hash_json, write_atomic, write_json

PACKAGE = Path(__file__).resolve().parent
NOTEBOOKS = PACKAGE.parent / "notebooks"
if not NOTEBOOKS.is_dir():  # no checkout: the copy inside the installed package
    NOTEBOOKS = PACKAGE / "notebooks"


class NotebookRun(NamedTuple):
    """What became of one notebook."""

    name: str
    status: str  # ran, unchanged or failed
    seconds: float
    output: str  # the executed notebook
    error: str = ""


def run_notebooks(profile: str = "toy", names: list[str] | None = None, *, folder: str | Path = NOTEBOOKS,
                  runs: str | Path | None = None, data: str | None = None, progress: bool = True,
                  refresh: bool = False) -> list[NotebookRun]:
    """Execute notebooks with a profile (name or YAML file), one by one, into ``<runs>/<profile>/notebooks``.

    ``refresh``: with their own defaults, and their outputs go into the committed files.  SarmlibError at the end
    names those that failed; ConfigError, before anything runs, an unknown notebook or one without ``profile``.
    """
    loaded, sources = load_profile(profile, data=data), _sources(Path(folder), names)
    root = Path(runs).resolve() / loaded.name if runs else default_root(loaded.name)
    given = str(Path(profile).resolve()) if Path(profile).suffix else profile
    # the user's data may be large, so there size and time of change must do
    users = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in _files(loaded.data)]
    base = [loaded.model_dump(), [hash_file(p) for p in _files(PACKAGE)], users, str(root), given]
    values, done, began = {} if refresh else {"profile": given}, [], time.perf_counter()
    target = root / ("committed" if refresh else "notebooks")
    target.mkdir(parents=True, exist_ok=True)
    paths = filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])
    os.environ |= {"SARMLIB_RUNS": str(root.parent), "JUPYTER_PREFER_ENV_PATH": "1",
                   "PYTHONPATH": os.pathsep.join(paths), "SARMLIB_DATA": loaded.data or ""}
    with FileLock(target / ".lock"):  # a second process waits, and then finds the work done
        for number, path in enumerate(sources, 1):
            out, stamp = target / path.name, hash_json([*base, path.read_text(encoding="utf-8")])
            line = _Line(f"{path.stem} ({number} of {len(sources)})", began, progress)
            found = None if refresh else _finished(out, stamp)
            done.append(found or _execute(path, out, root, stamp, values, line))
            if refresh and not done[-1].error:
                write_atomic(path, json.dumps(clean(_read(out)), indent=1, ensure_ascii=False) + "\n")
    if failed := [run for run in done if run.error]:
        raise SarmlibError("\n\n".join(f"{run.name} failed; see {run.output}\n{run.error}" for run in failed))
    return done


def _sources(folder: Path, names: list[str] | None) -> list[Path]:
    import papermill
    known = sorted(p.stem for p in folder.glob("[0-9][0-9]_*.ipynb"))
    if unknown := [name for name in names or () if name not in known]:
        raise ConfigError(f"no notebook {', '.join(unknown)} in {folder}; it has {', '.join(known)}")
    paths = [folder / f"{name}.ipynb" for name in names or known]
    for path in paths:
        if "profile" not in (found := papermill.inspect_notebook(str(path))):
            raise ConfigError(f"{path.name} has no parameter profile; it has {', '.join(found) or 'none'}")
    return paths


def _files(folder: str | Path | None) -> list[Path]:
    found = Path(folder).rglob("*") if folder else ()
    return sorted(p for p in found if p.is_file() and "__pycache__" not in p.parts)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _hashes(paths: Iterable[str | Path]) -> dict[str, str]:
    return {str(p): hash_file(p) for p in paths if Path(p).exists()}


def _finished(out: Path, stamp: str) -> NotebookRun | None:
    """The last run, when it was of the same things and what it made is untouched."""
    record = out.with_suffix(".run.json")
    last = _read(record) if record.exists() else {}
    same = last.get("stamp") == stamp and last["made"] == _hashes(last["made"])
    return NotebookRun(out.stem, "unchanged", last["seconds"], str(out)) if same else None


def _execute(path: Path, out: Path, root: Path, stamp: str, values: dict, line: "_Line") -> NotebookRun:
    import papermill
    record, start, error = out.with_suffix(".run.json"), time.perf_counter(), ""
    record.unlink(missing_ok=True)
    line.cells = len(_read(path)["cells"]) + bool(values)
    with line.shown():
        try:
            papermill.execute_notebook(
                str(path), str(out), values, cwd=str(path.parent), kernel_name="python3", progress_bar=False,
                stderr_file=line, on_cell_start=line.begin,
                extra_arguments=["--log-level=CRITICAL"])  # the interrupt that ends a kernel is at times an error
            error = _unexecuted(out)
        except Exception as failure:  # a cell's error, a dead kernel, a damaged notebook
            plain = re.sub(r"\x1b\[[0-9;]*m", "", str(failure).strip() or repr(failure))
            error = "\n".join(plain.splitlines()[-25:])
    seconds = round(time.perf_counter() - start, 1)
    if not error:
        made = [out, root / "results" / path.with_suffix(".json").name]
        made += [artifact / "manifest.json" for artifact in Store(root).artifacts()]
        write_json(record, {"stamp": stamp, "seconds": seconds, "made": _hashes(made)})
    return NotebookRun(path.stem, "failed" if error else "ran", seconds, str(out), error)


def _unexecuted(out: Path) -> str:
    """Why a notebook that papermill calls finished is not, or an empty text."""
    for number, cell in enumerate(c for c in _read(out)["cells"] if c["cell_type"] == "code"):
        completed = cell["metadata"].get("papermill", {}).get("status") == "completed"
        if "".join(cell["source"]).strip() and not (completed and cell["execution_count"]):
            return f"code cell {number} (from 0) was never executed, although papermill reported success"
    return ""


def clean(notebook: dict) -> dict:
    """Without what differs from run to run."""
    notebook["metadata"].get("language_info", {}).pop("version", None)
    for one in (notebook, *notebook["cells"]):
        one["metadata"].pop("papermill", None)
        one["metadata"].pop("execution", None)
        if "outputs" in one:
            one["outputs"] = [output for output in one["outputs"] if output.get("name") != "stderr"]
    return notebook


class _Line(io.StringIO):
    """What a run is doing, in one line.  Cells write their errors here: of these the latest progress counts."""

    def __init__(self, title: str, began: float, show: bool):
        super().__init__()
        self.title, self.began, self.show = title, began, show
        self.cell, self.cells, self.latest = 0, 0, ""

    def begin(self, **_) -> None:
        self.cell, self.latest = self.cell + 1, ""

    def write(self, text: str) -> int:
        if found := re.findall(r"\d+ of \d+ jobs done[^\r\n\x1b]*|[^\r\n]*%\|[^\r\n\x1b]*", text):
            self.latest = ": " + re.sub(r"[|].*[|]", "", found[-1]).strip()
        return len(text)

    def __str__(self) -> str:
        elapsed = tqdm.format_interval(time.perf_counter() - self.began)
        return f"{self.title}, {elapsed}, cell {self.cell} of {self.cells}{self.latest}"

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While the block runs: in place each second on a terminal, a line each minute in a log."""
        terminal, width, over = sys.stderr.isatty(), shutil.get_terminal_size().columns - 1, threading.Event()

        def show():
            while not over.wait(1 if terminal else 60):
                print(f"\r{str(self)[:width]:<{width}}" if terminal else self, end="" if terminal else "\n",
                      file=sys.stderr, flush=True)
            if terminal:
                print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)

        thread = threading.Thread(target=show, daemon=True)
        if self.show:
            thread.start()
        try:
            yield
        finally:
            over.set()
            if self.show:
                thread.join()
