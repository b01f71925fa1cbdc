"""Content-addressed store: a stage runs once, and what it wrote is found again by what went in.

An artifact is the folder ``<root>/<stage>/<key>/``; ``key`` hashes the stage's settings, the keys of its inputs and the
source code that makes it.  It is written under a temporary name and renamed, so none is half-written.  A read looks
whether every file is there with its size; ``verify`` compares the checksums.
"""

from __future__ import annotations

import ast
import errno
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import platform
import resource
import shutil
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from sarmlib.errors import ArtifactError, NotMadeError

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]
HOUSE = __name__.partition(".")[0]
MANIFEST = "manifest.json"
LOCK_SECONDS = 4 * 3600  # how long to wait for another process that is making the same artifact
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def default_root(profile: str = "toy") -> Path:
    """``$SARMLIB_RUNS/<profile>``, else ``runs/<profile>`` of the checkout or of the current directory; absolute."""
    base = os.environ.get("SARMLIB_RUNS") or (ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()) / "runs"
    return Path(base).resolve() / profile


def write_atomic(path: str | os.PathLike, data: str | bytes | Callable[[Path], Any]) -> Path:
    """Write text, bytes or what ``data(temporary_path)`` writes; the file appears complete or not at all.

    ArtifactError when the disk is full, not writable, or ``path`` is something else than a regular file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{str(path)!r} is no regular file and cannot be replaced; name another path")
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(data):
            data(temporary)
        else:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        if temporary.exists():
            temporary.unlink()
    return path


def _cannot_write(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"cannot write {str(path)!r}: {error}; free some disk space, make the folder writable or name "
                         "another one")


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """Write JSON atomically; NaN and infinity raise ValueError, because JSON has neither."""
    return write_atomic(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False, default=_plain) + "\n")


def hash_json(value: Any) -> str:
    """Hexadecimal SHA-256 of the JSON of ``value``, keys sorted."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:  # numpy numbers and paths
    return value.item() if hasattr(value, "item") else os.fspath(value)


def hash_file(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tree(path: str | os.PathLike) -> dict[str, str]:
    """Relative name -> SHA-256 of every file below a folder; of a single file: its name -> SHA-256."""
    path = Path(path)
    if path.is_file():
        return {path.name: hash_file(path)}
    return {p.relative_to(path).as_posix(): hash_file(p) for p in sorted(path.rglob("*")) if p.is_file()}


def imports_of(*modules: str) -> list[str]:
    """The modules of this package that ``modules`` reach by import, sorted, themselves included; none is imported."""
    found, todo = set(), set(modules)
    while todo:
        found.add(name := todo.pop())
        todo |= _imports_of_module(name) - found
    return sorted(found)


@functools.cache
def _imports_of_module(name: str) -> set[str]:
    return _imported(ast.parse(_source_file(name).read_bytes()), name)


def _imported(tree: ast.AST, module: str) -> set[str]:
    """Modules of this package that a piece of ``module``'s source imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            inner = [f"{base}.{alias.name}" for alias in node.names]
            found |= {name if _source_file(name) else base for name in inner}
    return {name for name in found if name.partition(".")[0] == HOUSE}


def _source_file(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


@functools.cache  # what runs is the code as it was loaded
def code_hash(function: Callable) -> str:
    """SHA-256 of a module-level function: its source, that of the definitions it names in its module (recursively), and
    every module of this package that these import (transitively)."""
    named = _definitions(inspect.getsource(sys.modules[function.__module__]), function.__name__)
    modules = imports_of(*set().union(*(_imported(node, function.__module__) for node in named.values())))
    return hash_json([sorted(named), [[name, hash_file(_source_file(name))] for name in modules]])


def _definitions(source: str, start: str) -> dict[str, ast.stmt]:
    """Text -> syntax tree of the top-level statements that bind ``start`` or a name these use, recursively."""
    lines, bound, found, todo = source.splitlines(), defaultdict(list), {}, {start}
    for node in ast.parse(source).body:
        for name in _binds(node):
            bound[name].append(node)
    while todo:
        for node in bound.pop(todo.pop(), []):
            found["\n".join(lines[node.lineno - 1 : node.end_lineno])] = node
            todo |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return found


def _binds(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]


def _peak_rss_mib() -> float:  # of this process or of any finished child
    usage = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(usage / (2**20 if sys.platform == "darwin" else 2**10), 1)  # macOS counts bytes, Linux KiB


def versions() -> dict[str, str]:
    """Versions that a result depends on, read without importing anything."""
    libraries = {name: metadata.version(name) for name in ("torch", "transformers", "numpy", "scipy")}
    return {"python": platform.python_version(), "platform": platform.platform(), **libraries,
            "sarmlib": sys.modules[HOUSE].__version__}


@dataclass(frozen=True)
class Artifact:
    """A finished artifact; ``meta`` is what ``make`` returned, ``fresh`` is True when this call made it."""

    path: Path
    key: str
    meta: dict
    fresh: bool = False

    def file(self, name: str) -> Path:
        return self.path / name

    def json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text(encoding="utf-8"))


class Store:
    """Artifacts below one root folder; safe for several processes on one machine at once.

    ``read_only``: raise NotMadeError instead of making anything.
    """

    def __init__(self, root: str | os.PathLike, read_only: bool = False):
        self.root = Path(root).resolve()
        self.read_only = read_only

    def key(self, stage: str, settings: Any, inputs: Mapping[str, str], make: Callable) -> str:
        """Sixteen hexadecimal digits that name the artifact; partials of ``make`` are unwrapped."""
        while isinstance(make, functools.partial):
            make = make.func
        return hash_json([stage, settings, inputs, code_hash(make)])[:16]

    def get_or_make(self, stage: str, settings: Any, inputs: Mapping[str, str], make: Callable[[Path], dict | None],
                    *, resumable: bool = False) -> Artifact:
        """The artifact for these settings, inputs and code; made by ``make(folder)`` when it is absent or damaged.

        ``make`` writes into the empty ``folder`` (with ``resumable``: into what a killed run left) and may return a
        JSON-able dict, kept as ``artifact.meta``.
        """
        key = self.key(stage, settings, inputs, make)
        final = self.root / stage / key
        if found := _read(final):
            return found
        if self.read_only:
            raise NotMadeError(f"{stage}/{key} has not been made under {self.root}")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(final.with_name(f".{key}.lock"), timeout=LOCK_SECONDS):
                return _read(final) or _make(final, settings, inputs, make, resumable)  # made meanwhile?
        except Timeout:
            raise ArtifactError(f"{stage}/{key} is locked by another process; wait for it or end it") from None
        except OSError as error:
            if error.errno in _DISK:
                raise _cannot_write(final, error) from error
            raise

    def artifacts(self) -> list[Path]:
        """Folders of all finished artifacts, sorted."""
        return sorted(self.root.glob("*/" + "[0-9a-f]" * 16))

    def verify(self) -> dict[str, list[str]]:
        """``"stage/key" -> problems`` of every artifact, all checksums compared; an empty list means whole."""
        return {f"{folder.parent.name}/{folder.name}": _check(folder, checksums=True)[1] for folder in self.artifacts()}


def _make(final: Path, settings: Any, inputs: Mapping[str, str], make: Callable, resumable: bool) -> Artifact:
    work = final.with_name(f".partial-{final.name}")  # the lock is ours, so whatever is there was left by a kill
    if not resumable:
        shutil.rmtree(work, ignore_errors=True)
    start = time.perf_counter()
    work.mkdir(exist_ok=True)
    try:
        meta = make(work) or {}
    except BaseException:
        if not resumable:
            shutil.rmtree(work, ignore_errors=True)
        raise
    write_json(work / MANIFEST, {
        "stage": final.parent.name, "key": final.name, "settings": settings, "inputs": inputs, "meta": meta,
        "wall_s": round(time.perf_counter() - start, 3), "peak_rss_mib": _peak_rss_mib(), "versions": versions(),
        "files": _files(work)})
    shutil.rmtree(final, ignore_errors=True)  # a damaged one
    os.rename(work, final)
    return replace(_read(final), fresh=True)


def _read(folder: Path) -> Artifact | None:
    """The artifact in ``folder`` when all its files have their size; None (and a log line) when absent or damaged."""
    if not folder.exists():
        return None
    meta, wrong = _check(folder)
    if wrong:
        log.warning("damaged artifact %s will be made again: %s", folder, ", ".join(wrong))
        return None
    return Artifact(folder, folder.name, meta)


def _check(folder: Path, checksums: bool = False) -> tuple[dict, list[str]]:
    """What ``make`` returned, and what is wrong: file sizes, or with ``checksums`` contents and unknown files too."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = dict(manifest["files"])
        sizes = {name: is_ | {"bytes": (folder / name).stat().st_size} for name, is_ in expected.items()}
        found = _files(folder) if checksums else sizes
        differ = [name for name in sorted(expected.keys() | found.keys()) if found.get(name) != expected.get(name)]
        return manifest["meta"], [f"{name} is not what was stored" for name in differ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return {}, [f"{MANIFEST} or a file cannot be read: {error}"]


def _files(folder: Path) -> dict[str, dict]:
    """Name -> checksum and size of every file of an artifact."""
    hashes = hash_tree(folder)
    hashes.pop(MANIFEST, None)
    return {name: {"sha256": digest, "bytes": (folder / name).stat().st_size} for name, digest in hashes.items()}
