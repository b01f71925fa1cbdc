"""Content-addressed store: a stage runs once, and what it wrote is found again by what went in.

An artifact is the folder ``<root>/<stage>/<key>/``; ``key`` hashes the stage's settings, the keys of its inputs and the
source code that makes it.  It is written under a temporary name and renamed, so none is half-written.
"""

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
import re
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sarmlib.errors import ArtifactError, NotMadeError

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]
HOUSE = __name__.partition(".")[0]
MANIFEST = "manifest.json"
LOCK_SECONDS = 4 * 3600  # how long to wait for another process that is making the same artifact
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EIO)


def default_root(profile: str = "toy") -> Path:
    """``$SARMLIB_RUNS/<profile>``, else ``runs/<profile>`` of the checkout or of the current directory; absolute."""
    home = ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()
    return Path(os.environ.get("SARMLIB_RUNS") or home / "runs").resolve() / profile


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """What the disk refuses is an ArtifactError; safetensors, torch and tokenizers lose its number, not its words."""
    try:
        yield
    except Exception as error:
        wrapped = re.search("No space left|inline_container|os error 28|while serializing", str(error))
        if not wrapped and getattr(error, "errno", None) not in _DISK:
            raise
        raise ArtifactError(f"cannot write {str(path)!r}: {error}; free some disk space, make the folder writable or "
                            "name another one") from error


def write_atomic(path: str | os.PathLike, data: str | bytes | Callable[[Path], Any]) -> Path:
    """Write text, bytes or what ``data(temporary_path)`` writes; the file appears complete or not at all.

    ArtifactError when the disk is full, not writable, or ``path`` is something else than a regular file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{str(path)!r} is no regular file and cannot be replaced; name another path")
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if callable(data):
                data(temporary)
            else:
                temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


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
    found, new = set(), set(modules)
    while new:
        found |= new
        new = set().union(*map(_imports_of_module, new)) - found
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
    source = inspect.getsource(sys.modules[function.__module__])
    statements, names, named = ast.parse(source).body, {function.__name__}, []
    while new := [node for node in statements if node not in named and names & _binds(node)]:
        named += new
        names |= {part.id for node in new for part in ast.walk(node) if isinstance(part, ast.Name)}
    modules = imports_of(*set().union(*(_imported(node, function.__module__) for node in named)))
    texts = sorted(ast.get_source_segment(source, node) for node in named)
    return hash_json([texts, {name: hash_file(_source_file(name)) for name in modules}])


def _binds(node: ast.stmt) -> set[str]:
    """Names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


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
    """Artifacts below one root folder, safe for several processes on one machine; ``read_only`` makes none."""

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
            with writing(final):
                final.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(final.with_name(f".{key}.lock"), timeout=LOCK_SECONDS):
                    return _read(final) or _make(final, settings, inputs, make, resumable)  # made meanwhile?
        except Timeout:
            raise ArtifactError(f"{stage}/{key} is locked by another process; wait for it or end it") from None

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
    files = {name: {"sha256": digest, "bytes": (work / name).stat().st_size}
             for name, digest in hash_tree(work).items() if name != MANIFEST}
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    mib = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    write_json(work / MANIFEST, {
        "stage": final.parent.name, "key": final.name, "settings": settings, "inputs": inputs, "meta": meta,
        "wall_s": round(time.perf_counter() - start, 3), "peak_rss_mib": round(peak / mib, 1), "versions": versions(),
        "files": files})
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
    return None if wrong else Artifact(folder, folder.name, meta)


def _check(folder: Path, checksums: bool = False) -> tuple[dict, list[str]]:
    """What ``make`` returned; files of another size, or with ``checksums`` all that differ or are strange."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        wrong = {name for name, one in files.items() if (folder / name).stat().st_size != one["bytes"]}
        if checksums:
            stored = {(name, one["sha256"]) for name, one in files.items()}
            wrong |= {name for name, _ in hash_tree(folder).items() ^ stored} - {MANIFEST}
        return manifest["meta"], [f"{name} is not what was stored" for name in sorted(wrong)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return {}, [f"{MANIFEST} or a file cannot be read: {error}"]
