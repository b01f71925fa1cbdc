"""RewardBench 2 and RM-Bench rows from local files, from the hub, or from anything in the same schema.

Rows keep every field of the source; what scoring relies on is checked.  Subsets or domains that are absent, or have
fewer rows than the published benchmark, are named in ``rows.report.notes``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sarmlib.data.files import ROW_SUFFIXES, Report, Rows, kind_of, load_rows, need
from sarmlib.errors import DataError

REWARDBENCH2 = "hub:allenai/reward-bench-2"
RM_BENCH = "hub:THU-KEG/RM-Bench"
REWARDBENCH2_ROWS = {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495, "Ties": 102}
RM_BENCH_ROWS = {"chat": 129, "math": 529, "code": 228, "safety": 441}
"""Subsets and scored domains of the published benchmarks with their row counts (1865 and 1327)."""
RM_BENCH_DOMAINS = ("chat", "code", "math", "safety-refuse", "safety-response")


def load_rewardbench2(source=REWARDBENCH2, *, on_bad: str = "refuse", revision: str | None = None) -> Rows:
    """RewardBench 2 rows {id, prompt, chosen [str], rejected [str], num_correct, num_incorrect, total_completions,
    subset}, from a .parquet/.jsonl/.json(.gz) file, the hub (pinned commit), or an iterable of such dicts.

    Missing counts are filled in, wrong ones are bad rows; ids become strings.  ``on_bad``: "refuse" or "skip".
    """
    rows = load_rows(source, check_rewardbench2, on_bad, revision, split="test")
    _note_counts(rows, Counter(row["subset"] for row in rows), REWARDBENCH2_ROWS, "subset")
    partners = Counter(row["id"].partition(":")[2] for row in rows if row["subset"].lower() == "ties")
    if single := [number for number, count in partners.items() if count != 2]:
        rows.report.notes.append(f"Ties prompts without exactly one partner (ref/tied): {', '.join(single[:10])}")
    return rows


def load_rm_bench(source=RM_BENCH, *, on_bad: str = "refuse", revision: str | None = None,
                  domain: str | None = None) -> Rows:
    """RM-Bench rows {id, prompt, chosen [3 str], rejected [3 str], domain}; styles concise, plain, markdown.

    ``source``: total_dataset.json, one <domain>_filtered.json, a folder of these (total_dataset.json wins if
    present), any file with a ``domain`` field, the hub (needs ``revision``), or an iterable of dicts.  The
    per-domain files have no domain field: it comes from the file name, or from ``domain``.
    """
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        folder = Path(source)
        files = sorted(p for p in folder.iterdir() if is_rm_bench_name(p))
        total = [p for p in files if p.name.startswith("total_dataset")]
        if not files:
            raise DataError(f"{folder} holds no RM-Bench file: total_dataset.json or "
                            f"{', '.join(d + '_filtered.json' for d in RM_BENCH_DOMAINS)} are needed")
        parts = [_rm_bench_file(path, on_bad, None, domain) for path in total or files]
        report = sum((part.report for part in parts), Report())
        rows = Rows((row for part in parts for row in part), report)
        if total and len(files) > len(total):
            report.notes.append(f"{total[0].name} was used; the per-domain files beside it were not")
    else:
        rows = _rm_bench_file(source, on_bad, revision, domain)
    prefixes = Counter(next((d for d in RM_BENCH_ROWS if row["domain"].startswith(d)), row["domain"])
                       for row in rows)
    _note_counts(rows, prefixes, RM_BENCH_ROWS, "domain")
    return rows


def is_rm_bench_name(path: Path) -> bool:
    """True for total_dataset.* and <known domain>_filtered.* in a supported format."""
    stem = path.name.split(".")[0]
    known = stem == "total_dataset" or (stem.endswith("_filtered") and stem[:-9] in RM_BENCH_DOMAINS)
    return known and kind_of(path) in ROW_SUFFIXES


def benchmark_prompts(*benchmarks: Iterable[dict] | None) -> list[str]:
    """The distinct prompts of the given benchmark rows (None is skipped), for `preferences.drop_contaminated`."""
    return list(dict.fromkeys(row["prompt"] for rows in benchmarks if rows is not None for row in rows))


def check_rewardbench2(row: dict, number: int = 0) -> dict:
    """A checked copy of one RewardBench 2 row; DataError names the field."""
    prompt = need(row, "prompt", str, "the prompt as non-empty text")
    subset = need(row, "subset", str, f"one of {', '.join(REWARDBENCH2_ROWS)}")
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    counts = {"num_correct": len(chosen), "num_incorrect": len(rejected),
              "total_completions": len(chosen) + len(rejected)}
    for name, count in counts.items():
        if row.get(name, count) != count:
            raise DataError(f"field {name!r} is {row[name]!r} but the row has {count}; correct the count")
    identifier = str(need(row, "id", (str, int), "the row's id"))
    checked = {**row, "id": identifier, "prompt": prompt, "subset": subset, "chosen": chosen, "rejected": rejected}
    checked |= counts
    if subset.lower() == "ties" and not re.fullmatch(r"\w+:\d+", identifier):
        raise DataError(f"field 'id' is {identifier!r}; a Ties row needs 'ref:<int>' or 'tied:<int>'")
    return checked


def check_rm_bench(row: dict, number: int = 0, domain: str | None = None) -> dict:
    """A checked copy of one RM-Bench row; ``domain`` is used where the row has none."""
    row = {**row, "prompt": need(row, "prompt", str, "the prompt as non-empty text"),
           "chosen": _texts(row, "chosen", 3), "rejected": _texts(row, "rejected", 3)}
    need(row, "id", (str, int), "the row's id")
    if row.get("domain") is None:
        if domain is None:
            raise DataError("field 'domain' is missing and the file is not named <domain>_filtered; pass domain=, one "
                            f"of {', '.join(RM_BENCH_DOMAINS)}")
        row["domain"] = domain
    need(row, "domain", str, f"one of {', '.join(RM_BENCH_DOMAINS)}")
    return row


def _rm_bench_file(source, on_bad: str, revision: str | None, domain: str | None) -> Rows:
    if domain is None and isinstance(source, (str, Path)) and not str(source).startswith("hub:"):
        stem = Path(source).name.split(".")[0].removesuffix("_filtered")
        domain = stem if stem in RM_BENCH_DOMAINS else None
    return load_rows(source, lambda row, number: check_rm_bench(row, number, domain), on_bad, revision)


def _texts(row: dict, name: str, length: int | None = None) -> list[str]:
    what = f"a list of {length or 'one or more'} texts"
    texts = list(need(row, name, (list, tuple), what))
    if (len(texts) != length if length else not texts) or not all(isinstance(t, str) for t in texts):
        raise DataError(f"field {name!r} holds {len(texts)} items of {sorted({type(t).__name__ for t in texts})}; "
                        f"{what} is needed")
    return texts


def _note_counts(rows: Rows, found: Counter, expected: dict[str, int], what: str) -> None:
    notes = rows.report.notes
    if missing := [name for name in expected if not found[name]]:
        notes.append(f"{what} missing: {', '.join(missing)}")
    notes += [f"{what} {name}: {found[name]} rows, the published benchmark has {count}"
              for name, count in expected.items() if found[name] and found[name] != count]
    if unknown := [name for name in found if name not in expected]:
        notes.append(f"{what} unknown to the benchmark: {', '.join(unknown)}")
