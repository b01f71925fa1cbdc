"""Documents of text corpora, streamed: .txt, .jsonl, .json and .parquet (each also .gz), files or folders.

One document is one row of a table, one article of a WikiText file, or a whole text file; a text file longer than
``max_chars`` is cut at the next blank line, so that memory stays bounded.  Text is UTF-8, else Latin-1.
"""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sarmlib.data.files import ROW_SUFFIXES, Report, hub_rows, iter_rows, kind_of, open_text
from sarmlib.errors import ConfigError, DataError

CORPUS_SUFFIXES = (".txt", *ROW_SUFFIXES)
_HEADING = re.compile(r" = [^=].* = \n?$")  # WikiText: one "=" for an article, more for its sections
NOT_TEXT = ("readme", "license", "licence", "copying", "sources", "notice", "requirements")


def iter_corpus(source, *, text_field: str = "text", order: str = "sequential", seed: int | None = None,
                buffer: int = 1000, max_chars: int = 100_000, unk: str = "[unk]", on_bad: str = "refuse",
                revision: str | None = None, report: Report | None = None) -> Iterator[str]:
    """Documents of a file, a folder, "hub:<owner>/<name>", or a list of these, in a reproducible order.

    ``order`` "sequential" reads one source after another (files of a folder by name); "balanced" takes the next
    document from the source with the fewest characters so far, so that a long novel does not crowd out short pages.
    ``seed`` shuffles through a buffer of that many documents (None: as read).  WikiText is detokenised, and its
    "<unk>" becomes ``unk``, since many tokenizers read the literal as their unknown token.  ``on_bad``: "refuse" or
    "skip" for rows without text; pass a ``report`` to have documents and skipped rows counted.  Raises DataError for
    absent files, folders without text, files that are not text, and unreadable rows.
    """
    if order not in ("sequential", "balanced") or on_bad not in ("refuse", "skip"):
        raise ConfigError(f"order is {order!r} (sequential, balanced), on_bad is {on_bad!r} (refuse, skip)")
    report = Report() if report is None else report
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    if not sources:
        raise DataError("no corpus: pass a file, a folder or a list of them")

    def documents(one) -> Iterator[str]:
        if isinstance(one, str) and one.startswith("hub:"):
            yield from _table(hub_rows(one[4:], revision), one, text_field, on_bad, report)
            return
        for path in corpus_files(one):
            if kind_of(path) == ".txt":
                yield from _text_file(path, max_chars, unk)
            else:
                rows = iter_rows(path, columns=[text_field] if kind_of(path) == ".parquet" else None)
                yield from _table(rows, str(path), text_field, on_bad, report)

    for one in sources:  # absent files are refused before the first document, not after hours
        if not str(one).startswith("hub:"):
            corpus_files(one)
    streams = [documents(one) for one in sources]
    merged = _balanced(streams) if order == "balanced" else (doc for stream in streams for doc in stream)
    counted = _counted(merged, report)
    return counted if seed is None else _shuffled(counted, seed, buffer)


def corpus_files(path: str | Path) -> list[Path]:
    """The text files of a folder (itself, if a file), sorted by name; README, LICENSE and the like are left out."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"no such corpus: {path}")
    candidates = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files = [p for p in candidates if kind_of(p) in CORPUS_SUFFIXES
             and (p == path or not p.name.lower().startswith((*NOT_TEXT, ".")))]
    if not files:
        raise DataError(f"{path} holds no text; supported: {', '.join(CORPUS_SUFFIXES)}, also with .gz")
    return files


def detokenise_wikitext(text: str, unk: str = "[unk]") -> str:
    """WikiText's spaced tokens as running text: "@-@" joints, punctuation, brackets, quotes, contractions."""
    text = re.sub(r" @([-,.])@ ", r"\1", text).replace("<unk>", unk)
    text = re.sub(r'(^|[\s(\[])"\s+(.*?)\s+"(?=[\s.,;:!?)\]]|$)', r'\1"\2"', text)  # paired quotes hug their text
    text = re.sub(r"\s+(n't|'(?:s|re|ve|ll|d|m)\b|[.,;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£€])\s+", r"\1", text)
    return re.sub(r"[ \t]+", " ", text).strip()


def _text_file(path: Path, max_chars: int, unk: str) -> Iterator[str]:
    try:
        encoding = "utf-8-sig" if _is_utf8(path) else "latin-1"
        with open_text(path, encoding) as handle:
            head = handle.read(65536)
        wiki = " @-@ " in head and any(_HEADING.match(line) for line in head.split("\n"))
        with open_text(path, encoding) as handle:
            lines: list[str] = []
            size, blank = 0, True
            for line in iter(lambda: handle.readline(max_chars), ""):
                article = wiki and blank and _HEADING.match(line) is not None  # "= x =" also occurs in formulas
                if lines and (article or (size >= max_chars and (not line.strip() or size >= 2 * max_chars))):
                    yield from _document(lines, wiki, unk)
                    lines, size = [], 0
                lines.append(line)
                size, blank = size + len(line), not line.strip()
            yield from _document(lines, wiki, unk)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); fetch it again") from None


def _document(lines: list[str], wiki: bool, unk: str) -> Iterator[str]:
    if wiki:
        lines = [detokenise_wikitext(re.sub(r"^( =)+ (.*?)( =)+ $", r"\2", line.rstrip("\n")), unk) + "\n"
                 for line in lines if line.strip()]
    if text := "".join(lines).strip():
        yield text


def _table(rows: Iterable, name: str, field: str, on_bad: str, report: Report) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        text = row if isinstance(row, str) else row.get(field) if isinstance(row, dict) else None
        if isinstance(text, str):
            if text.strip():
                yield text
            else:
                report.read += 1
                report.drop("empty document")
            continue
        why = str(row) if isinstance(row, DataError) else (
            f"no text in field {field!r} (fields: {', '.join(row) if isinstance(row, dict) else type(row).__name__})")
        if on_bad == "refuse":
            raise DataError(f"{name}, row {number}: {why}; name the column with text_field=, or pass on_bad='skip'")
        report.read += 1
        report.drop("bad row", f"{name}, row {number}: {why}")


def _counted(documents: Iterable[str], report: Report) -> Iterator[str]:
    for document in documents:
        report.read += 1
        report.kept += 1
        yield document
    if not report.kept:
        raise DataError(f"the corpus gave no document; dropped {report.dropped or 'none'}")


def _balanced(streams: list[Iterator[str]]) -> Iterator[str]:
    taken = dict.fromkeys(range(len(streams)), 0)
    while taken:
        i = min(taken, key=lambda k: (taken[k], k))
        document = next(streams[i], None)
        if document is None:
            del taken[i]
        else:
            taken[i] += len(document)
            yield document


def _shuffled(documents: Iterable[str], seed: int, size: int) -> Iterator[str]:
    """Each document leaves the buffer at a random moment: an approximate shuffle in bounded memory."""
    rng, held = np.random.default_rng(seed), []
    for document in documents:
        held.append(document)
        if len(held) >= max(1, size):
            i = int(rng.integers(len(held)))
            held[i], held[-1] = held[-1], held[i]
            yield held.pop()
    yield from (held[i] for i in rng.permutation(len(held)))


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    with (gzip.open(path) if zipped else path.open("rb")) as handle:
        try:
            while chunk := handle.read(1 << 20):
                if b"\0" in chunk:
                    raise DataError(f"{path} is not text: it holds NUL bytes; leave binary files out of the corpus, "
                                    "and save UTF-16 text as UTF-8")
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True
