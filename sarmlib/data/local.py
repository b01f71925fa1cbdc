"""What a user's folder holds: backbone, corpora, preference pairs and benchmarks, told apart by content."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sarmlib.data import benchmarks, corpora, preferences
from sarmlib.data.files import Rows, iter_rows, kind_of, open_text
from sarmlib.errors import DataError

HOW = {
    "backbone": "a folder with config.json, *.safetensors and tokenizer files, as save_pretrained writes them",
    "corpora": "text: .txt, or .jsonl/.parquet with a 'text' field (also .gz), 200 words or more",
    "pairs": "preference pairs: .jsonl/.json/.parquet rows with chosen and rejected answers (HH, RMB, chat, text)",
    "benchmark": "RM-Bench (*_filtered.json or total_dataset.json) or RewardBench 2 (parquet or jsonl with num_correct "
                 "and subset)",
}
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass
class LocalData:
    """The findings of `discover`: paths, and what was left aside with the reason."""

    folder: Path
    backbone: Path | None = None
    corpora: list[Path] = field(default_factory=list)
    pairs: list[Path] = field(default_factory=list)
    rewardbench2: Path | None = None
    rm_bench: Path | None = None
    ignored: list[tuple[Path, str]] = field(default_factory=list)

    def missing(self) -> list[str]:
        """Those of backbone, corpora, pairs, benchmark that the folder lacks."""
        has = {"backbone": self.backbone, "corpora": self.corpora, "pairs": self.pairs,
               "benchmark": self.rewardbench2 or self.rm_bench}
        return [name for name in HOW if not has[name]]

    def load_benchmarks(self, on_bad: str = "refuse") -> dict[str, Rows]:
        """{"rewardbench2": rows, "rm_bench": rows}, those that are present."""
        loaders = {"rewardbench2": benchmarks.load_rewardbench2, "rm_bench": benchmarks.load_rm_bench}
        return {name: load(getattr(self, name), on_bad=on_bad) for name, load in loaders.items() if getattr(self, name)}

    def load_pairs(self, on_bad: str = "refuse") -> Rows:
        """All pairs without those whose prompts are in the folder's benchmarks; the report counts what was dropped."""
        prompts = benchmarks.benchmark_prompts(*self.load_benchmarks(on_bad).values())
        return preferences.drop_contaminated(preferences.load_pairs(self.pairs, on_bad=on_bad), prompts)

    def documents(self, seed: int | None = 0, **kwargs) -> Iterator[str]:
        """Documents of all corpora, balanced by characters and shuffled (`corpora.iter_corpus`)."""
        return corpora.iter_corpus(self.corpora, **{"order": "balanced", "seed": seed, **kwargs})


def discover(folder: str | Path, require: tuple[str, ...] = tuple(HOW)) -> LocalData:
    """Classify everything below ``folder`` by content (the first row of each file), reading only what it must.

    ``require``: what must be there, of backbone, corpora, pairs, benchmark; otherwise a DataError names what is
    missing, how to supply it, and what was seen instead.  Where a second backbone or benchmark turns up, the first by
    path is taken and the other listed in ``ignored``; so are files of pairs whose prompts are mostly those of a
    benchmark found here.  Only the kind is judged: the loaders check every row.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"DATA folder {folder} does not exist or is not a folder; pass the folder with your data")
    found = LocalData(folder)
    texts: list[Path] = []
    for path in _walk(folder, found):
        kind, reason = _classify(path)
        if kind == "corpus":
            texts.append(path)
        elif kind == "pairs":
            found.pairs.append(path)
        elif kind == "rm_bench" and benchmarks.is_rm_bench_name(path):
            if found.rm_bench not in (None, path.parent):
                found.ignored.append((path, f"RM-Bench is taken from {found.rm_bench}"))
            found.rm_bench = found.rm_bench or path.parent
        elif kind:  # a whole benchmark in one file
            if getattr(found, kind) is None:
                setattr(found, kind, path)
            else:
                found.ignored.append((path, f"{kind} is taken from {getattr(found, kind)}"))
        else:
            found.ignored.append((path, reason))
    found.corpora = _whole_folders(texts, folder)
    _set_aside_benchmark_pairs(found)
    if lacking := [name for name in found.missing() if name in require]:
        hints = "".join(f"\n  {name}: put there {HOW[name]}" for name in lacking)
        seen = "".join(f"\n  {path}: {reason}" for path, reason in found.ignored[:8])
        raise DataError(f"{folder} lacks {', '.join(lacking)}.{hints}" + (f"\nLeft aside:{seen}" if seen else ""))
    return found


def _walk(folder: Path, found: LocalData) -> Iterator[Path]:
    """Data files below a folder in sorted order; model folders are taken or ignored whole."""
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    names = {p.name for p in entries}
    if "config.json" in names:
        reason = None
        if not any(p.suffix == ".safetensors" for p in entries):
            reason = "a model folder without *.safetensors (pickled weights are not read)"
        elif not names & set(_TOKENIZER):
            reason = "a model folder without tokenizer files"
        elif found.backbone is not None:
            reason = f"the backbone is taken from {found.backbone}"
        if reason:
            found.ignored.append((folder, reason))
        else:
            found.backbone = folder
        return
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, found)
        elif path.is_file():
            yield path


def _classify(path: Path) -> tuple[str | None, str]:
    """(kind, "") or (None, reason) from the first row or the first words of a file."""
    kind = kind_of(path)
    if path.name.lower().startswith(corpora.NOT_TEXT) or kind not in corpora.CORPUS_SUFFIXES:
        return None, "documentation, or a kind of file that is not read"
    try:
        if kind == ".txt":
            with open_text(path, "latin-1") as handle:
                long = len(handle.read(20_000).split()) >= 200
            return ("corpus", "") if long else (None, "fewer than 200 words")
        row = _first_row(path)
    except (OSError, EOFError, StopIteration, ValueError, RecursionError, zlib.error) as error:
        return None, f"unreadable or empty: {error}"
    if isinstance(row, str):
        return "corpus", ""
    if not isinstance(row, dict):
        return None, f"rows are {type(row).__name__}, not objects with named fields"
    if {"num_correct", "subset", "chosen", "rejected"} <= set(row):
        return "rewardbench2", ""
    if all(isinstance(row.get(side), list) and len(row[side]) == 3 and isinstance(row[side][0], str)
           for side in ("chosen", "rejected")):
        return "rm_bench", ""
    if preferences.pair_format(row):
        return "pairs", ""
    if isinstance(row.get("text"), str):
        return "corpus", ""
    return None, f"rows have {', '.join(list(map(str, row))[:6])}: neither text, pairs nor a known benchmark"


def _first_row(path: Path) -> object:
    """The first row, without parsing a whole .json list when its first 4 MB hold one."""
    if kind_of(path) == ".json":
        with open_text(path) as handle:
            head = handle.read(4_000_000).lstrip()
        if head.startswith("["):
            try:
                return json.JSONDecoder().raw_decode(head[1:].lstrip())[0]
            except ValueError:
                pass  # longer than the head, or damaged: let the row reader say which
    row = next(iter_rows(path))
    if isinstance(row, DataError):
        raise row
    return row


def _whole_folders(files: list[Path], root: Path) -> list[Path]:
    """Files, with a folder in their place where all text files of the folder are among them."""
    out: list[Path] = []
    for path in files:
        parent = path.parent
        whole = parent != root and set(corpora.corpus_files(parent)) <= set(files)
        out.append(parent if whole else path)
    return list(dict.fromkeys(out))


def _set_aside_benchmark_pairs(found: LocalData) -> None:
    """Move files whose first pairs mostly ask benchmark questions from ``pairs`` to ``ignored``."""
    loaded = found.load_benchmarks(on_bad="skip")
    prompts = {preferences.normalise(p) for p in benchmarks.benchmark_prompts(*loaded.values())}
    for path in list(found.pairs) if prompts else []:
        rows: list[Any] = [row for row in islice(iter_rows(path), 40) if preferences.pair_format(row) == "text"]
        known = sum(preferences.normalise(str(row["prompt"])) in prompts for row in rows)
        if rows and known > len(rows) / 2:
            found.pairs.remove(path)
            found.ignored.append((path, f"its prompts are those of a benchmark here ({known} of {len(rows)} seen)"))
