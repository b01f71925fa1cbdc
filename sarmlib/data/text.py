"""Documents of text corpora, streamed: .txt, .jsonl, .json and .parquet (each also .gz), a folder of these, the hub.

A document is a row's ``text``, an article of a WikiText file, or a whole text file; a text file longer than 100,000
characters is cut at the next blank line, so that memory stays bounded.
"""

import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sarmlib.data import rows
from sarmlib.data.rows import ROW_SUFFIXES, Report, checked, data_files, hub_rows, iter_rows, kind_of, open_text
from sarmlib.errors import DataError

MAX_CHARS, BUFFER, OPEN_FILES = 100_000, 1000, 64
_HEADING = re.compile(r" = [^=].* = \n?$")  # WikiText: one "=" for an article, more for its sections


def iter_texts(source: str | Path, *, revision: str | None = None, seed: int | None = None) -> Iterator[str]:
    """Documents of a file, of a folder or of "hub:<owner>/<name>" (with its commit), in a reproducible order.

    Files take turns by the characters they have given, so that a long novel does not crowd out short pages.  ``seed``
    shuffles through a buffer of 1,000 documents (None: as read).  DataError for what is absent, damaged or no text.
    """
    name = str(source)
    if name.startswith("hub:"):
        streams = [checked(hub_rows(name[4:], revision, streaming=True), name[4:], _text, Report())]
    else:  # absent files are refused here, not after hours
        streams = [_text_file(path) if kind_of(path) == ".txt" else checked(iter_rows(path), str(path), _text, Report())
                   for path in data_files(source, (".txt", *ROW_SUFFIXES))]
    texts = _balanced(iter(streams), name)
    return texts if seed is None else _shuffled(texts, seed)


def _running_text(line: str) -> str:
    """A line of WikiText's spaced tokens; "[unk]", since "<unk>" is an unknown token to many tokenizers."""
    text = re.sub(r"^( =)+ (.*?)( =)+ $", r"\2", line.rstrip("\n"))
    text = re.sub(r" @([-,.])@ ", r"\1", text).replace("<unk>", "[unk]")
    text = re.sub(r'(^|[\s(\[])"\s+(.*?)\s+"(?=[\s.,;:!?)\]]|$)', r'\1"\2"', text)  # paired quotes hug their text
    text = re.sub(r"\s+(n't|'(?:s|re|ve|ll|d|m)\b|[.,;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£€])\s+", r"\1", text)
    return re.sub(r"[ \t]+", " ", text).strip()


def _text(row: dict, number: int, name: str) -> str:
    if not isinstance(row.get("text"), str):
        raise DataError(f"no text in field 'text' of {repr(row)[:60]}; rename the column")
    return row["text"] if row["text"].strip() else ""


def _text_file(path: Path) -> Iterator[str]:
    try:
        with open_text(path, _encoding(path)) as handle:
            head = handle.read(65_536)
            if "\0" in head:
                raise DataError(f"{path} is not text: it holds NUL bytes; leave it out, or save UTF-16 as UTF-8")
            wiki = " @-@ " in head and any(map(_HEADING.match, head.split("\n")))
            handle.seek(0)
            for lines in _parts(rows.lines(handle, MAX_CHARS), wiki):
                if wiki:
                    lines = [f"{_running_text(line)}\n" for line in lines if line.strip()]
                yield "".join(lines).strip()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); fetch it again") from None


def _parts(lines: Iterator[str], wiki: bool) -> Iterator[list[str]]:
    """Lines of one document each: an article, or a cut at a blank line after 100,000 characters."""
    held: list[str] = []
    size, blank = 0, True
    for line in lines:
        article = wiki and blank and _HEADING.match(line)  # "= x =" also occurs in formulas
        full = size >= MAX_CHARS and (not line.strip() or size >= 2 * MAX_CHARS)
        if held and (article or full):
            yield held
            held, size = [], 0
        held.append(line)
        size, blank = size + len(line), not line.strip()
    yield held


def _encoding(path: Path) -> str:
    """UTF-8 if the whole file is, else Latin-1 (old books)."""
    with suppress(UnicodeDecodeError), open_text(path) as handle:
        while handle.read(1 << 20):
            pass
        return "utf-8-sig"
    return "latin-1"


def _balanced(streams: Iterator[Iterator[str]], name: str) -> Iterator[str]:
    """The next document of the stream with the fewest characters so far; at most 64 files are open at a time."""
    opened: list[Any] = [[0, stream] for stream in islice(streams, OPEN_FILES)]
    empty = True
    while opened:
        least = min(opened, key=lambda one: one[0])
        text = next(least[1], None)
        if text:
            empty = False
            yield text
            least[0] += len(text)
        elif text is None:
            least[1] = next(streams, None)
            opened = [one for one in opened if one[1]]
    if empty:
        raise DataError(f"{name} gave no document: its files are empty")


def _shuffled(texts: Iterable[str], seed: int) -> Iterator[str]:
    """Each document leaves the buffer at a random moment: an approximate shuffle in bounded memory."""
    rng = np.random.default_rng(seed)
    held: list[str] = []
    for text in texts:
        held.append(text)
        if len(held) >= BUFFER:
            i = int(rng.integers(len(held)))
            held[i], held[-1] = held[-1], held[i]
            yield held.pop()
    yield from (held[i] for i in rng.permutation(len(held)))
