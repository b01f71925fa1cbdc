"""Rows of files, hub data sets and lists, checked one by one; a report counts what was read, kept and left out."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

from sarmlib.errors import DataError, OfflineError
from sarmlib.hub import check_access, from_json

ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
MAX_CHARS = 10_000_000  # of one text
MAX_READ = 100 * MAX_CHARS  # of a line, or of a .json file; the rest makes it no JSON
_NOT_DATA = (".", "readme", "license", "licence", "copying", "sources", "notice", "requirements")
# what gzip, the decoders, JSON and the Parquet reader raise about a damaged file
_DAMAGED = (OSError, EOFError, ValueError, TypeError, zlib.error, NotImplementedError, LookupError, RecursionError,
            OverflowError)


@dataclass
class Report:
    """What a loader read, kept and left out: ``dropped`` is {reason: count}."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def lines(self) -> list[str]:
        """The report in words, for a terminal."""
        left_out = [f"left out {count}: {reason}" for reason, count in self.dropped.items()]
        return [f"kept {self.kept} of {self.read} rows", *left_out]


class Rows(list):
    """A list of rows with a `Report` in ``.report``."""

    def __init__(self, rows: list, report: Report):
        super().__init__(rows)
        self.report, report.kept = report, len(rows)


class Dropped(Exception):
    """A row check leaves out a sound but unwanted row; the text is the reason that is counted."""


def load_rows(source, check: Callable, *, revision: str | None = None, split: str = "train") -> Rows:
    """What `checked` keeps of the rows of a file, a folder, "hub:<owner>/<name>" or an iterable of dicts."""
    tables: Iterable[tuple[str, Iterable]] = [("rows", source)]
    if isinstance(source, str) and source.startswith("hub:"):
        tables = [(source[4:], hub_rows(source[4:], revision, split))]
    elif isinstance(source, (str, Path)):
        tables = ((str(path), iter_rows(path)) for path in data_files(source))
    report, kept = Report(), []
    for name, rows in tables:
        kept += checked(rows, name, check, report)
    if not kept:
        raise DataError(f"{name} has no usable row: {'; '.join(report.lines())}")
    return Rows(kept, report)


def checked(rows: Iterable, name: str, check: Callable, report: Report) -> Iterator:
    """``check(row, number, name)`` of each row, without the empty fields that a table fills in.

    It returns what to keep, or raises `Dropped` or DataError, to which file and row (from 1) are added.
    """
    for number, row in enumerate(rows, start=1):
        report.read += 1
        try:
            if not isinstance(row, dict):
                raise DataError(f"is a {type(row).__name__}; an object with named fields is needed")
            if any(isinstance(value, str) and len(value) > MAX_CHARS for value in row.values()):
                raise DataError(f"holds a text of more than {MAX_CHARS:,} characters; cut it")
            json.dumps(row, ensure_ascii=False, default=str).encode()
            yield check({field: value for field, value in row.items() if value is not None}, number, name)
        except Dropped as reason:
            report.drop(str(reason))
        except UnicodeEncodeError:  # no tokenizer takes it and no file can hold it
            raise DataError(f"{name}, row {number}: holds a lone surrogate, half of a character as left by cutting "
                            "UTF-16 text; write the whole character") from None
        except DataError as error:
            raise DataError(f"{name}, row {number}: {error}") from None


def iter_rows(path: Path) -> Iterator[object]:
    """Rows of a .jsonl, .json (a list) or .parquet file in order; all but a list are streamed."""
    number = 1
    try:
        for row in _read(path):
            yield row
            number += 1
    except _DAMAGED as error:
        raise DataError(f"{path}, row {number}: is damaged, not JSON or not UTF-8 ({error}); fetch it again, or "
                        "save it as UTF-8, a row a line") from None


def _read(path: Path) -> Iterator[object]:
    if kind_of(path) == ".parquet":
        import datasets
        yield from datasets.load_dataset("parquet", data_files=escape(str(path)), split="train", streaming=True)
        return
    with open_text(path) as handle:  # parsed here, since a reader of tables makes dates of texts such as "2026-01-01"
        yield from (from_json(handle.read(MAX_READ)) if kind_of(path) == ".json"
                    else map(from_json, filter(str.strip, lines(handle, MAX_READ))))


def lines(handle, longest: int) -> Iterator[str]:
    """Lines, cut after ``longest`` characters; OSError for white space without end, of which gzip makes little."""
    blank = 0
    while line := handle.readline(longest):
        blank = 0 if line.strip() else blank + len(line)
        if blank > MAX_CHARS:
            raise OSError(f"more than {MAX_CHARS:,} blank characters in a row")
        yield line


def hub_rows(repo: str, revision: str | None, split: str = "train", *, streaming: bool = False):
    """Rows of a hub data set at a pinned commit, after `hub.check_access`."""
    check_access(repo, revision, repo_type="dataset")
    import datasets
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE  # then only a whole copy in the local cache can be read
    try:
        return datasets.load_dataset(repo, revision=revision, split=split, streaming=streaming and not offline)
    except Exception as error:  # the client's own classes change between versions; all mean "not loaded"
        raise (OfflineError if offline else DataError)(
            f"data set {repo!r} at {revision}, split {split!r} cannot be loaded ({error}); download it elsewhere and "
            f"pass the file instead of 'hub:{repo}'") from error


def data_files(path: str | Path, suffixes: tuple[str, ...] = ROW_SUFFIXES) -> list[Path]:
    """The file itself, or a folder's files of these kinds (also .gz) by name, without README, LICENSE and the like."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"no such file or folder: {path}")
    named = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.lower().startswith(_NOT_DATA)]
    files = [p for p in (named if path.is_dir() else [path]) if kind_of(p) in suffixes]
    if not files:
        raise DataError(f"{path} holds nothing to read; supported: {', '.join(suffixes)}, also with .gz")
    return files


def kind_of(path: Path) -> str:
    """The suffix that says how to read a file, without ".gz": "a.jsonl.gz" -> ".jsonl"."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def open_text(path: Path, encoding: str = "utf-8-sig"):
    """Text handle of a plain or gzipped file."""
    return gzip.open(path, "rt", encoding=encoding) if path.suffix == ".gz" else path.open(encoding=encoding)
