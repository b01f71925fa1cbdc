"""RewardBench 2 and RM-Bench rows from local files, from the hub, or from anything in the same schema.

Rows keep every field of the source; what scoring relies on is checked.
"""

import re
from pathlib import Path

from sarmlib.data.rows import Rows, load_rows
from sarmlib.errors import DataError

REWARDBENCH2, REWARDBENCH2_REVISION = "hub:allenai/reward-bench-2", "7ff08853b0d5686e79b13fda8677024f566a104a"
REWARDBENCH2_ROWS = {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495, "Ties": 102}
RM_BENCH_ROWS = {"chat": 129, "math": 529, "code": 228, "safety": 441}
"""Subsets and scored domains of the published benchmarks with their row counts (1865 and 1327)."""


def load_rewardbench2(source=REWARDBENCH2, *, revision: str | None = None) -> Rows:
    """RewardBench 2 rows {id, prompt, chosen [str], rejected [str], num_correct, subset}, from a file or folder
    (.parquet/.jsonl/.json, .gz), the hub (pinned commit), or an iterable of such dicts; ids become strings."""
    pinned = REWARDBENCH2_REVISION if source == REWARDBENCH2 else None
    return load_rows(source, _rewardbench2, revision=revision or pinned, split="test")


def load_rm_bench(source, *, revision: str | None = None) -> Rows:
    """RM-Bench rows {id, prompt, chosen [3 str], rejected [3 str], domain}; styles concise, plain, markdown.

    ``source``: total_dataset.json, a folder (total_dataset.json wins if present), any file, the hub (needs
    ``revision``), or an iterable of dicts.  A missing ``domain`` comes from the name of <domain>_filtered.json.
    """
    total = Path(source) / "total_dataset.json" if isinstance(source, (str, Path)) else None
    return load_rows(total if total and total.is_file() else source, _rm_bench, revision=revision)


def _rewardbench2(row: dict, number: int, source: str) -> dict:
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    if row.setdefault("num_correct", len(chosen)) != len(chosen):
        raise DataError(f"field 'num_correct' is {row['num_correct']!r} but the row has {len(chosen)}; correct it")
    _need(row, "prompt", str, "the prompt as non-empty text")
    subset = _need(row, "subset", str, f"one of {', '.join(REWARDBENCH2_ROWS)}")
    identifier = str(_need(row, "id", (str, int), "the row's id"))
    if subset.lower() == "ties" and not re.fullmatch(r"\w+:\d+", identifier):
        raise DataError(f"field 'id' is {identifier!r}; a Ties row needs 'ref:<int>' or 'tied:<int>'")
    return {**row, "id": identifier, "chosen": chosen, "rejected": rejected}


def _rm_bench(row: dict, number: int, source: str) -> dict:
    stem, end, _ = Path(source).name.partition("_filtered.json")
    row = ({"domain": stem} if end else {}) | row
    _need(row, "domain", str, "chat, code, math, safety-refuse or safety-response, or a file <domain>_filtered.json,")
    _need(row, "id", (str, int), "the row's id")
    _need(row, "prompt", str, "the prompt as non-empty text")
    return {**row, "chosen": _texts(row, "chosen", 3), "rejected": _texts(row, "rejected", 3)}


def _need(row: dict, name: str, kind: type | tuple, what: str):
    """``row[name]`` if it is of the kind (a text not blank), else a DataError: the field, its value, what is needed."""
    value = row.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is str and not str(value).strip()):
        raise DataError(f"field {name!r} is {repr(value)[:60]} (fields: {', '.join(map(str, row))}); {what} is needed")
    return value


def _texts(row: dict, name: str, length: int | None = None) -> list[str]:
    texts = row.get(name)
    good = isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts)
    if not good or length not in (None, len(texts)):
        raise DataError(f"field {name!r} is {repr(texts)[:60]}; a list of {length or 'one or more'} texts is needed")
    return list(texts)
