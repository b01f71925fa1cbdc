"""Content-addressed store: a stage runs once, and what it wrote is found again by what went in.

An artifact is the folder ``<root>/<stage>/<key>/``.  ``key`` hashes the stage's settings, the keys of its inputs and
the source bytes of the modules that make it, so a changed setting or line of code gives another folder.  Versions of
torch and friends are recorded in the manifest but are not part of the key.  A folder is written under a temporary
name, flushed to disk and renamed, so a half-written artifact never has the final name; every file is hashed, and an
artifact whose files do not match its manifest is rebuilt, never read.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sarmlib.errors import ArtifactError, NotMadeError

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_STALE_SECONDS = 24 * 3600
STORAGE = {errno.ENOSPC: "free some disk space or name another folder with --runs",
           errno.EDQUOT: "free some of your quota or name another folder with --runs",
           errno.EACCES: "make the folder writable or name another one with --runs",
           errno.EPERM: "make the folder writable or name another one with --runs",
           errno.EROFS: "name a folder on a writable disk with --runs"}
"""Error numbers of a disk that takes no more, and the cure."""


def default_root(profile: str = "toy") -> Path:
    """Folder of a profile's artifacts: ``$SARMLIB_RUNS/<profile>``, else ``runs/<profile>`` of the checkout or, for an
    installed package, of the current directory.  Absolute, so that every caller means the same folder."""
    root = os.environ.get("SARMLIB_RUNS")
    checkout = Path(__file__).resolve().parents[1]
    base = Path(root) if root else (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "runs"
    return base.resolve() / profile


def write_atomic(path: str | Path, data: str | bytes) -> Path:
    """Write a file under a temporary name beside it, flush it, and rename it over ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically; NaN and infinity raise ValueError, because JSON has neither."""
    return write_atomic(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def canonical(value: Any, where: str = "settings") -> Any:
    """Plain JSON form of a setting: dataclasses and mappings -> dict, tuples -> list.  Anything that has no single
    text form (NaN, sets, objects) raises ArtifactError naming the place."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if bad := [k for k in value if not isinstance(k, str)]:
            raise ArtifactError(f"{where}: keys must be strings, got {bad[0]!r}")
        return {k: canonical(value[k], f"{where}.{k}") for k in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [canonical(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return value
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return canonical(value.item(), where)
    raise ArtifactError(f"{where} = {value!r} has no plain JSON form; give finite numbers, text, lists or mappings")


def hash_json(value: Any) -> str:
    """Hexadecimal SHA-256 of the canonical JSON of ``value``."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_version(modules: Iterable[str]) -> dict[str, str]:
    """Module name -> SHA-256 of its source bytes; a package stands for all ``.py`` files below it."""
    versions = {}
    for name in sorted(set(modules)):
        try:
            spec = find_spec(name)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None:
            raise ArtifactError(f"code module {name!r} does not exist or has no source file")
        folder = Path(spec.origin).parent
        files = sorted(folder.rglob("*.py")) if spec.submodule_search_locations else [Path(spec.origin)]
        parts = [(file.relative_to(folder).as_posix(), hash_file(file)) for file in files]
        versions[name] = hash_json(parts)
    return versions


def peak_rss_mib() -> float | None:
    """Largest resident memory so far of this process or of any finished child, in MiB (None on Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    usage = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(usage * unit / 2**20, 1)


def versions() -> dict[str, str]:
    """Versions that a result depends on: Python, platform and the main libraries (read without importing them)."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("sarmlib", "torch", "transformers", "numpy", "scipy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A finished, checked artifact."""

    path: Path
    key: str
    manifest: dict
    fresh: bool = False
    """True when this call made it, False when it was found."""

    @property
    def meta(self) -> dict:
        """What ``make`` returned."""
        return self.manifest["meta"]

    def file(self, name: str) -> Path:
        """Path of one file or folder inside; ArtifactError lists what there is when ``name`` is absent."""
        if not (self.path / name).exists():
            held = ", ".join(self.manifest["files"]) or "nothing"
            raise ArtifactError(f"{self.path} has no {name!r}; it holds {held}")
        return self.path / name

    def json(self, name: str) -> Any:
        """Parsed JSON file of the artifact."""
        return json.loads(self.file(name).read_text())


class Store:
    """Artifacts below one root folder; safe for several processes on one machine at once.

    ``lock_timeout``: seconds to wait for another process that is making the same artifact.  ``read_only``: raise
    NotMadeError instead of making anything.
    """

    def __init__(self, root: str | Path, lock_timeout: float = 4 * 3600, read_only: bool = False):
        self.root = Path(root).resolve()
        self.read_only = read_only
        self.lock_timeout = lock_timeout

    def key(self, stage: str, settings: Any, inputs: Mapping[str, str] = {}, code: Iterable[str] = ()) -> str:
        """Sixteen hexadecimal digits that name the artifact."""
        return hash_json([stage, canonical(settings), dict(inputs), code_version(code)])[:16]

    def get_or_make(self, stage: str, settings: Any, inputs: Mapping[str, str], make: Callable[[Path], dict | None],
                    code: Iterable[str] = (), *, resumable: bool = False, force: bool = False) -> Artifact:
        """The artifact for these settings, inputs and code; made by ``make(folder)`` when it is absent or damaged.

        ``make`` writes files into the empty ``folder`` and may return a JSON-able dict, kept as ``artifact.meta``.
        With ``resumable`` the unfinished folder of a killed run is handed to ``make`` again instead of being emptied,
        so that training can go on from its checkpoint.  ``force`` makes it anew.
        Raises ArtifactError when another process keeps the lock longer than ``lock_timeout`` seconds.
        """
        key = self.key(stage, settings, inputs, code)
        final = self.root / stage / key
        if not force and (found := self._read(final)):
            return found
        if self.read_only:
            raise NotMadeError(f"{stage}/{key} has not been made under {self.root}")
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(final.with_name(f".{key}.lock"))
        owner = final.with_name(f".{key}.owner")
        try:
            lock.acquire(timeout=self.lock_timeout)
        except Timeout:
            who = owner.read_text().strip() if owner.exists() else "an unknown process"
            raise ArtifactError(f"{stage}/{key} is locked by {who} for more than {self.lock_timeout:g} s; "
                                f"wait for that process or end it") from None
        try:
            if not force and (found := self._read(final)):  # another process made it while this one waited
                return found
            write_atomic(owner, f"pid {os.getpid()} on {socket.gethostname()}\n")
            self._sweep(final.parent, keep=key)
            return self._make(final, stage, settings, inputs, make, code, resumable)
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def _make(self, final: Path, stage, settings, inputs, make, code, resumable) -> Artifact:
        work = final.with_name(f".partial-{final.name}")  # the lock is ours, so whatever is there was left by a kill
        if not resumable:
            shutil.rmtree(work, ignore_errors=True)
        start = time.perf_counter()
        try:
            work.mkdir(exist_ok=True)
            meta = make(work) or {}
        except BaseException as error:
            if not resumable:
                shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in STORAGE:
                raise ArtifactError(f"{stage}/{final.name} cannot be stored under {self.root}: {error.strerror}; "
                                    f"{STORAGE[error.errno]}, then run the same command again") from error
            raise
        plain = canonical(settings)
        manifest = {
            "stage": stage, "key": final.name, "settings": plain, "inputs": dict(inputs), "code": code_version(code),
            "meta": canonical(meta, "meta"), "seed": plain.get("seed") if isinstance(plain, dict) else None,
            "wall_s": round(time.perf_counter() - start, 3), "peak_rss_mib": peak_rss_mib(), "versions": versions(),
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "files": _fingerprints(work),
        }
        write_json(work / MANIFEST, manifest)
        _fsync_tree(work)
        if final.exists():  # damaged or forced
            shutil.rmtree(final)
        os.rename(work, final)
        _fsync(final.parent)
        return Artifact(final, final.name, manifest, fresh=True)

    def _read(self, path: Path) -> Artifact | None:
        """The artifact at ``path`` when it is whole; None (and a log line) when absent or damaged."""
        if not path.exists():
            return None
        if problems := _problems(path):
            log.warning("damaged artifact %s will be rebuilt: %s", path, "; ".join(problems))
            return None
        return Artifact(path, path.name, json.loads((path / MANIFEST).read_text()))

    def _sweep(self, folder: Path, keep: str) -> None:
        """Remove unfinished folders of other keys that no process holds and that are a day old."""
        for partial in folder.glob(".partial-*"):
            key = partial.name.removeprefix(".partial-")
            if key == keep or time.time() - partial.stat().st_mtime < _STALE_SECONDS:
                continue
            try:
                with FileLock(folder / f".{key}.lock", timeout=0):
                    shutil.rmtree(partial, ignore_errors=True)
            except Timeout:
                pass

    def artifacts(self) -> list[Path]:
        """Folders of all finished artifacts, sorted."""
        return sorted(p for p in self.root.glob("*/*") if p.is_dir() and re.fullmatch("[0-9a-f]{16}", p.name))

    def verify(self) -> dict[str, list[str]]:
        """``"stage/key" -> problems`` of every artifact below the root; an empty list means whole."""
        return {name: self.problems(name) for name in (f"{p.parent.name}/{p.name}" for p in self.artifacts())}

    def problems(self, name: str) -> list[str]:
        """What is wrong with artifact ``"stage/key"``; an empty list means whole."""
        return _problems(self.root / name)


def _fingerprints(folder: Path) -> dict[str, dict]:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ArtifactError(f"{path} is a link; an artifact must hold its own bytes")
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            files[name] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
    return files


def _problems(path: Path) -> list[str]:
    try:
        expected = dict(json.loads((path / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"{MANIFEST} is unreadable ({type(error).__name__})"]
    try:
        found = _fingerprints(path)
    except (OSError, ArtifactError) as error:
        return [str(error)]
    problems = [f"{name} is missing" for name in expected if name not in found]
    both = sorted(expected.keys() & found)
    problems += [f"{name} differs from its checksum" for name in both if found[name] != expected[name]]
    return problems + [f"{name} is not in the manifest" for name in found if name not in expected]


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot flush a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _fsync(path)
