"""Rows from JSON, JSON Lines, Parquet (optionally gzipped) and the hub, with one policy for bad rows."""

from __future__ import annotations

import gzip
import json
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sarmlib.errors import ConfigError, DataError, OfflineError

ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
HUB_REVISIONS = {"allenai/reward-bench-2": "7ff08853b0d5686e79b13fda8677024f566a104a"}
"""Pinned data set commits; any other data set needs ``revision=`` (40 hex digits) from the user."""

_ADVICE = "download it elsewhere and pass the local file or folder instead of 'hub:{}'"


@dataclass
class Report:
    """What a loader read, kept and left out: ``dropped`` {reason: count}, up to 20 ``examples``, free ``notes``."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, example: str = "") -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if example and len(self.examples) < 20:
            self.examples.append(example)

    def __add__(self, other: Report) -> Report:
        dropped = {r: self.dropped.get(r, 0) + other.dropped.get(r, 0) for r in {**self.dropped, **other.dropped}}
        return Report(self.read + other.read, self.kept + other.kept, dropped,
                      (self.examples + other.examples)[:20], self.notes + other.notes)


class Rows(list):
    """A list of rows that remembers its `Report` in ``.report``."""

    def __init__(self, rows=(), report: Report | None = None):
        super().__init__(rows)
        self.report = report or Report(read=len(self), kept=len(self))


class Dropped(Exception):
    """Raised by a row check to leave a sound but unwanted row out; its text is the reason that is counted."""


def open_text(path: Path, encoding: str = "utf-8-sig"):
    """Text handle of a plain or gzipped file (by its first bytes)."""
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding=encoding) if zipped else path.open(encoding=encoding)


def kind_of(path: Path) -> str:
    """The suffix that says how to read a file, without ".gz": "a.jsonl.gz" -> ".jsonl"."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def iter_rows(path: str | Path, columns: list[str] | None = None) -> Iterator[object]:
    """Rows of a .jsonl, .json (a list, or lines) or .parquet file in order; ``columns`` narrows Parquet only.

    A line that is not JSON is yielded as the DataError that says so, for `load_rows` to refuse or skip.  Everything
    but a .json list is streamed.  Raises DataError for an absent, damaged or unsupported file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    try:
        if kind_of(path) == ".parquet":
            import pyarrow.parquet as parquet

            for batch in parquet.ParquetFile(path).iter_batches(256, columns=columns):
                yield from batch.to_pylist()
        elif kind_of(path) in (".json", ".jsonl"):
            with open_text(path) as handle:
                if kind_of(path) == ".json":
                    text = handle.read()
                    try:
                        rows = json.loads(text)
                    except (json.JSONDecodeError, RecursionError):
                        rows = None  # perhaps JSON Lines under the wrong name
                    if isinstance(rows, list):
                        yield from rows
                        return
                    if rows is not None and text.strip().count("\n"):
                        raise DataError(f"{path} holds one JSON {type(rows).__name__}; a list of rows is needed")
                    handle = text.split("\n")
                for line in handle:
                    if line.strip():
                        yield _parse(line)
        else:
            raise DataError(f"{path}: unknown kind of file; supported: {', '.join(ROW_SUFFIXES)}, also with .gz")
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged or not UTF-8 ({error}); fetch it again") from None
    except OSError as error:  # also pyarrow's errors about damaged Parquet
        raise DataError(f"{path} cannot be read: {error}") from None
    except (ValueError, NotImplementedError, LookupError) as error:  # of pyarrow, about damaged Parquet
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read: {error}") from None


def load_rows(source, check: Callable[[dict, int], dict], on_bad: str = "refuse", revision: str | None = None,
              split: str = "train") -> Rows:
    """``check(row, number)`` applied to every row of a file, of "hub:<owner>/<name>", or of an iterable of dicts.

    ``check`` returns the row to keep, raises DataError for a bad row or `Dropped` for an unwanted one.  ``on_bad``
    "refuse" raises at the first bad row, naming file, row and field; "skip" counts and lists it in the report.
    """
    if on_bad not in ("refuse", "skip"):
        raise ConfigError(f"on_bad is {on_bad!r}; use 'refuse' or 'skip'")
    if isinstance(source, str) and source.startswith("hub:"):
        rows, name = hub_rows(source[4:], revision, split), source
    elif isinstance(source, (str, Path)):
        rows, name = iter_rows(source), str(source)
    else:
        rows, name = source, "rows"
    report, kept = Report(), Rows()
    for number, row in enumerate(rows, start=1):
        report.read += 1
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, dict):
                raise DataError(f"is a {type(row).__name__}; an object with named fields is needed")
            kept.append(check(row, number))
        except Dropped as reason:
            report.drop(str(reason))
        except DataError as error:
            message = f"{name}, row {number}: {error}"
            if on_bad == "refuse":
                raise DataError(f"{message} (on_bad='skip' leaves such rows out and counts them)") from None
            report.drop("bad row", message)
    report.kept = len(kept)
    if not kept:
        raise DataError(f"{name} has no usable row: {report.read} read, dropped {report.dropped or 'none'}"
                        + (f"; first: {report.examples[0]}" if report.examples else ""))
    kept.report = report
    return kept


def need(row: dict, name: str, kind: type | tuple, what: str):
    """``row[name]`` if it is of the kind, else a DataError naming the field, what it holds and what is needed."""
    if name not in row:
        raise DataError(f"field {name!r} is missing (fields: {', '.join(map(str, row))}); {what} is needed")
    if not isinstance(row[name], kind) or isinstance(row[name], bool) or (kind is str and not row[name].strip()):
        raise DataError(f"field {name!r} is {repr(row[name])[:60]}; {what} is needed")
    return row[name]


def check_access(repo: str, revision: str | None = None, timeout: float = 8.0) -> str:
    """The pinned commit of a hub data set that can be had: asked of the hub, or trusted under HF_HUB_OFFLINE=1.

    Raises ConfigError without a full commit hash, DataError when the hub refuses, and OfflineError within ``timeout``
    seconds when it cannot be reached.
    """
    revision = revision or HUB_REVISIONS.get(repo)
    if not revision or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ConfigError(f"data set {repo!r} needs revision=<40-digit commit> (got {revision!r}): results must not "
                          f"change under us; the commits are listed under 'Files and versions' of the data set's page")
    from huggingface_hub import constants  # here, so that importing this module stays light

    if constants.HF_HUB_OFFLINE:
        return revision
    outcome: list[Exception | None] = []
    # A thread, because neither a name look-up nor the client's retries obey a timeout.
    thread = threading.Thread(target=lambda: outcome.append(_probe(repo, revision)), daemon=True)
    thread.start()
    thread.join(timeout)
    error = outcome[0] if outcome else TimeoutError(f"no answer within {timeout:g} s")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        raise DataError(f"the hub refuses data set {repo!r} at {revision}: status {status}; check the name, the "
                        f"commit and, for a gated data set, that you are logged in")
    if error is not None:
        raise OfflineError(f"data set {repo!r} is needed and the hub cannot be reached ({type(error).__name__}); "
                           f"{_ADVICE.format(repo)}, or set HF_HUB_OFFLINE=1 to use the local cache")
    return revision


def hub_rows(repo: str, revision: str | None = None, split: str = "train", timeout: float = 8.0):
    """Rows of a hub data set at a pinned commit (datasets.load_dataset), after `check_access`.

    Raises OfflineError at once under HF_HUB_OFFLINE=1 when the data set is not in the local cache.
    """
    revision = check_access(repo, revision, timeout)
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        import datasets

        return datasets.load_dataset(repo, revision=revision, split=split)
    except Exception as error:  # the client's own error classes change between versions; all mean "not loaded"
        if offline or isinstance(error, (ConnectionError, TimeoutError)):
            raise OfflineError(f"data set {repo!r} at {revision} is not in the local cache and the hub was not asked "
                               f"(HF_HUB_OFFLINE) or is out of reach; {_ADVICE.format(repo)}") from error
        raise DataError(f"data set {repo!r} at {revision}, split {split!r} cannot be loaded: {error}") from error


def _probe(repo: str, revision: str) -> Exception | None:
    try:
        from huggingface_hub import HfApi

        HfApi().dataset_info(repo, revision=revision, timeout=5)
    except Exception as error:  # whatever went wrong is the answer, told in the caller's thread
        return error
    return None


def _parse(line: str) -> object:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return DataError(f"is not JSON: {error}; the line starts {line[:40]!r}")
