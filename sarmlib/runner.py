"""Run the notebooks in order with papermill, and notice what papermill would pass over in silence.

papermill exits with 0 for a parameter that the notebook does not have, for a notebook without a ``parameters`` cell,
for ``sys.exit(0)`` in a cell and for a failing shell command.  All four are refused before a kernel starts, and
afterwards every code cell must have been executed.  A notebook that succeeded is not run again while its source, the
library, the profile, the user's data and the stored artifacts stay the same; a failed one is kept for inspection.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm

from sarmlib.artifacts import Store, default_root, hash_file, hash_json, peak_rss_mib, write_json
from sarmlib.errors import ConfigError, SarmlibError
from sarmlib.profiles import load_profile

PACKAGE = Path(__file__).resolve().parent
NOTEBOOKS = next(p for p in (PACKAGE.parent / "notebooks", PACKAGE / "notebooks") if p.is_dir() or p.parent == PACKAGE)
"""Of the checkout, else the copy inside the installed package."""
STRIP_KEYS = "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.language_info.version"
_SHELL_MAGICS = {"system", "sx", "sc", "bash", "sh", "script", "perl", "ruby", "cmd"}
_EXITS = {"exit", "quit", "_exit", "abort", "SystemExit"}


@dataclass(frozen=True)
class NotebookRun:
    """What happened to one notebook."""

    name: str
    status: str
    """``ran``, ``unchanged`` or ``failed``."""
    seconds: float
    """Wall time of the last execution."""
    output: str
    """The executed notebook."""
    log: str
    """Everything the kernel and papermill wrote."""
    error: str = ""
    """Last lines of the log of a failed run."""
    peak_rss_mib: float | None = None
    """Largest resident memory of a single process so far."""


def notebook_names(folder: str | Path = NOTEBOOKS) -> list[str]:
    """Names of the numbered notebooks in their order, without ``.ipynb``."""
    return sorted(p.stem for p in Path(folder).glob("[0-9][0-9]_*.ipynb"))


def check_notebook(path: str | Path, parameters: dict[str, Any]) -> None:
    """Refuse a notebook that papermill would run wrongly without saying so.

    Raises ConfigError for a missing or double ``parameters`` cell, an unknown parameter, a call that ends the kernel, a
    shell cell (``%pip`` is allowed in a cell tagged ``nbval-skip``), a ``raises-exception`` tag, or a syntax error.
    """
    import papermill
    path = Path(path)
    try:
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"notebook {path} cannot be read: {error!r}") from error
    tags = [c.get("metadata", {}).get("tags", []) for c in cells]
    if (count := sum("parameters" in t for t in tags)) != 1:
        raise ConfigError(f"{path.name} has {count} cells tagged 'parameters'; it needs exactly one")
    if unknown := sorted(set(parameters) - set(known := papermill.inspect_notebook(str(path)))):
        raise ConfigError(f"{path.name} has no parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    for number, (cell, tag) in enumerate(zip(cells, tags, strict=True)):
        where = f"{path.name}, code cell {number} (counted from 0)"
        if "raises-exception" in tag:
            raise ConfigError(f"{where}: tag 'raises-exception' makes papermill fail; catch the error and print it")
        for problem in _hazards("".join(cell["source"]), where, pip="nbval-skip" in tag):
            raise ConfigError(f"{where}: {problem}")


def _hazards(source: str, where: str, pip: bool) -> Iterator[str]:
    from IPython.core.inputtransformer2 import TransformerManager
    try:  # IPython rewrites "!ls" and "%magic" to calls, which can then be found by name
        tree = ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError as error:
        raise ConfigError(f"{where}: {error}") from error
    for node in ast.walk(tree):
        name = getattr(node, "id", None) or getattr(node, "attr", None)
        if name in _EXITS:
            yield f"{name} ends the kernel, and papermill would call the run a success"
        if name in ("system", "getoutput", "getoutputs", "popen"):
            yield "a shell command may fail unnoticed; use Python"
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("run_line_magic", "run_cell_magic"):
            magic = getattr(node.args[0], "value", "")
            if magic in _SHELL_MAGICS or (magic in ("pip", "conda") and not pip):
                yield f"magic %{magic} runs a shell command, which may fail unnoticed"


def run_notebooks(profile: str | Path = "toy", names: Sequence[str] | None = None, *, folder: str | Path = NOTEBOOKS,
                  runs: str | Path | None = None, data: str | Path | None = None,
                  parameters: dict[str, Any] | None = None, force: bool = False, check: bool = True,
                  progress: bool = True, timeout: float | None = None) -> list[NotebookRun]:
    """Execute notebooks with a profile (name or YAML file), one after the other.

    ``runs``: folder of all profiles' artifacts (default ``$SARMLIB_RUNS`` or ``runs``); executed notebooks and logs go
    to ``<runs>/<profile>/notebooks``.  ``parameters`` besides ``profile``.  ``force``: run unchanged notebooks too.
    ``timeout``: seconds per cell.  All notebooks are tried; with ``check`` a failure raises SarmlibError at the end.
    """
    loaded = load_profile(profile, data=data)
    root = (Path(runs).resolve() / loaded.name) if runs else default_root(loaded.name)
    names = list(names) if names is not None else notebook_names(folder)
    values = {"profile": str(Path(profile).resolve() if Path(profile).suffix else profile), **(parameters or {})}
    sources = [Path(folder) / f"{name}.ipynb" for name in names]
    for path in sources:  # all of them, before the first minute is spent
        check_notebook(path, values)
    base = [loaded.to_dict(), _fingerprint(PACKAGE), _fingerprint(loaded.data), str(root), values]
    results = []
    for path in sources:
        out = root / "notebooks" / path.name
        stamp = hash_json([*base, _source(path)])
        with _alone(out):
            done = None if force else _finished(out, stamp, root)
            results.append(done or _execute(path, out, stamp, root, values, loaded.data, progress, timeout))
    if check and (failed := [r for r in results if r.status == "failed"]):
        raise SarmlibError("\n\n".join(f"{r.name} failed; see {r.output}\n{r.error}" for r in failed))
    return results


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time executes a notebook into ``out``; a second one waits, and then finds it done."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.stem}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{out.stem} is being run by another process; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _source(path: Path) -> list:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [[c["cell_type"], "".join(c["source"]), c.get("metadata", {}).get("tags", [])] for c in cells
            if c["cell_type"] == "code"]


def _fingerprint(folder: str | Path | None) -> list:
    """Library: bytes of each file.  The user's data may be large, so there size and time of change must do."""
    if folder is None:
        return []
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    if Path(folder) == PACKAGE:
        return [[p.relative_to(folder).as_posix(), hash_file(p)] for p in files]
    return [[p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _finished(out: Path, stamp: str, root: Path) -> NotebookRun | None:
    try:
        last = json.loads(out.with_suffix(".run.json").read_text())
        whole = last["run"]["status"] != "failed" and last["stamp"] == stamp and last["sha256"] == _sums(out, root)
    except (OSError, ValueError, KeyError):
        return None
    if not whole or any(Store(root).problems(a) for a in last["artifacts"]):
        return None
    return NotebookRun(**{**last["run"], "status": "unchanged"})


def _execute(path: Path, out: Path, stamp: str, root: Path, values: dict, data: str | None, progress: bool,
             timeout: float | None) -> NotebookRun:
    if set("{}") & set(str(out)):
        raise ConfigError(f"papermill cannot write to {out}: the path contains braces")
    out.parent.mkdir(parents=True, exist_ok=True)
    log, record = out.with_suffix(".log"), out.with_suffix(".run.json")
    record.unlink(missing_ok=True)
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "papermill", str(path), str(out), "--cwd", str(path.parent), "-k", "python3",
               "--no-progress-bar", "--log-output"]
    if values:
        command += ["-b", base64.b64encode(yaml.safe_dump(values).encode()).decode()]
    if timeout:
        command += ["--execution-timeout", str(int(timeout))]
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "SARMLIB_RUNS": str(root.parent), "JUPYTER_PREFER_ENV_PATH": "1",
                   "PYTHONPATH": os.pathsep.join(paths), **({"SARMLIB_DATA": data} if data else {})}
    cells = len(json.loads(path.read_text(encoding="utf-8"))["cells"]) + bool(values)  # one is injected
    start = time.perf_counter()
    with open(log, "w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        try:
            _watch(process, log, path.stem, cells, progress)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    error = "" if process.returncode == 0 else _tail(log, f"papermill ended with {process.returncode}")
    error = error or _unexecuted(out)
    run = NotebookRun(path.stem, "failed" if error else "ran", round(time.perf_counter() - start, 1), str(out),
                      str(log), error, peak_rss_mib())
    kept = [p.relative_to(root).as_posix() for p in Store(root).artifacts()]
    write_json(record, {"run": asdict(run), "stamp": "" if error else stamp, "artifacts": kept,
                        "sha256": _sums(out, root) if out.exists() else []})
    return run


def _sums(out: Path, root: Path) -> list[str]:
    """Checksums of an executed notebook and of the claims it checked."""
    results = root / "results" / f"{out.stem}.json"
    return [hash_file(path) for path in (out, results) if path == out or path.exists()]


def _watch(process: subprocess.Popen, log: Path, name: str, cells: int, progress: bool) -> None:
    """A bar over the notebook's cells on stderr, with the latest progress line from inside it."""
    quiet_for = 0.2 if sys.stderr.isatty() else 10.0  # a log file needs no animation
    with tqdm(total=cells, desc=name, unit="cell", disable=not progress, mininterval=quiet_for) as bar:
        shown = time.monotonic()
        with open(log, errors="replace") as lines:
            while True:
                ended = process.poll() is not None
                for line in lines:
                    if "Ending Cell" in line:
                        bar.update(1)
                        bar.set_postfix_str("", refresh=False)
                    elif "%|" in line:
                        bar.set_postfix_str(line.strip().split("|")[0][-40:], refresh=False)
                if ended or time.monotonic() - shown >= quiet_for:
                    bar.refresh()
                    shown = time.monotonic()
                if ended:
                    return
                time.sleep(0.2)


def _tail(log: Path, reason: str, lines: int = 25) -> str:
    return "\n".join([reason, *log.read_text(errors="replace").splitlines()[-lines:]])


def _unexecuted(out: Path) -> str:
    """Why an output notebook that papermill calls finished is not, or an empty text."""
    if not out.exists():
        return "papermill wrote no output"
    cells = [c for c in json.loads(out.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        if "".join(cell["source"]).strip() and (
                cell["execution_count"] is None or cell["metadata"].get("papermill", {}).get("status") != "completed"):
            return f"code cell {number} (counted from 0) was never executed, although papermill reported success"
    return ""


def refresh_committed(names: Sequence[str] | None = None, *, folder: str | Path = NOTEBOOKS,
                      runs: str | Path | None = None, progress: bool = True) -> list[NotebookRun]:
    """Execute notebooks with their own defaults and put the outputs into the committed files.

    Progress output (stderr), papermill's metadata and timings are removed; execution counts and results stay, because
    nbval compares with them.  A notebook that fails is left as it was; SarmlibError is raised after the others ran.
    """
    root = (Path(runs).resolve() / "toy") if runs else default_root("toy")
    failed, results = [], []
    for name in names if names is not None else notebook_names(folder):
        path, out = Path(folder) / f"{name}.ipynb", root / "committed" / f"{name}.ipynb"
        check_notebook(path, {})
        run = _execute(path, out, "", root, {}, None, progress, None)
        results.append(run)
        if run.status == "failed":
            failed.append(run)
            continue
        notebook = json.loads(out.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
        new = out.with_suffix(".new.ipynb")
        new.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        subprocess.run([sys.executable, "-m", "nbstripout", "--keep-output", "--keep-count", "--extra-keys", STRIP_KEYS,
                        str(new)], check=True)
        shutil.copyfile(new, beside := path.with_suffix(".ipynb.tmp"))
        os.replace(beside, path)
        new.unlink()
    if failed:
        raise SarmlibError("\n\n".join(f"{r.name} failed; see {r.output}\n{r.error}" for r in failed))
    return results
