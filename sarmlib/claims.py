"""Claims of the paper, the bands that our values must stay in, and verdicts.

Two questions are kept apart.  *Is the run healthy?*  ``Claims.check`` compares a value with the band in which earlier
runs of the same profile fell, and prints one line that never shows the value, so that it is the same on every machine.
*Does the claim hold?*  ``verdicts`` compares the stored interval with the claim's threshold.  A claim that does not
hold at this scale is a finding: it stays in the table and does not fail the run.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarmlib.artifacts import default_root, versions, write_json
from sarmlib.errors import ClaimError

if TYPE_CHECKING:
    import pandas as pd

FILE = Path(__file__).with_name("claims.toml")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Band:
    """Where earlier runs of a profile fell."""

    lo: float
    hi: float
    seeds: int
    """Number of seeds the band comes from."""
    date: str
    """Day of these runs, YYYY-MM-DD."""
    provisional: bool = False
    """True until somebody has measured it."""

    def __post_init__(self):
        if not self.lo <= self.hi:
            raise ValueError(f"lo = {self.lo}, hi = {self.hi}: lo must not exceed hi")
        date.fromisoformat(self.date)

    def __contains__(self, value: float) -> bool:
        return self.lo <= value <= self.hi

    def __str__(self) -> str:
        return f"band {self.lo:g} .. {self.hi:g}"


@dataclass(frozen=True)
class Claim:
    """One claim; the fields are explained at the top of ``claims.toml``."""

    id: str
    title: str
    sentence: str
    where: str
    notebook: str
    quantity: str
    direction: str
    threshold: float
    same: str
    paper_value: float | str | None = None
    band: dict[str, Band] = field(default_factory=dict)

    def __post_init__(self):
        if self.direction not in ("<", ">"):
            raise ClaimError(f"claim {self.id}: direction = {self.direction!r}; use '<' or '>'")
        if self.same not in ("quantity", "direction", "exact"):
            raise ClaimError(f"claim {self.id}: same = {self.same!r}; use 'quantity', 'direction' or 'exact'")


def load_claims(path: str | Path = FILE) -> dict[str, Claim]:
    """``id -> Claim`` in the file's order; ClaimError names what is missing, unknown or double."""
    try:
        entries = tomllib.loads(Path(path).read_text(encoding="utf-8"))["claim"]
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise ClaimError(f"claims file {path} cannot be read: {error!r}") from error
    claims: dict[str, Claim] = {}
    for entry in entries:
        name = f"claim {entry.get('id', '(without id)')}"
        bands = {p: _build(Band, b, f"{name}, band.{p}") for p, b in entry.get("band", {}).items()}
        claim = _build(Claim, {**entry, "band": bands}, name)
        if claim.id in claims:
            raise ClaimError(f"{name} stands twice in {path}")
        claims[claim.id] = claim
    return claims


def _build(cls: type, entry: dict, where: str) -> Any:
    known = {f.name for f in fields(cls)}
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if wrong := sorted((set(entry) - known) | (needed - set(entry))):
        raise ClaimError(f"{where}: missing or unknown {', '.join(wrong)}; known: {', '.join(sorted(known))}")
    try:
        return cls(**entry)
    except (TypeError, ValueError) as error:
        raise ClaimError(f"{where}: {error}") from error


class Claims:
    """The checks of one notebook.

    ``profile``: a Profile or its name; ``notebook``: its name without ``.ipynb``, so that ``close`` can tell whether
    every claim that belongs to it was checked.  Values go to ``<results_dir>/<notebook>.json`` (default: the
    ``results`` folder of the profile's artifacts), written anew after each check.
    """

    def __init__(self, profile: Any, results_dir: str | Path | None = None, notebook: str | None = None,
                 path: str | Path = FILE):
        self.profile = profile if isinstance(profile, str) else profile.name
        self.claims = load_claims(path)
        self.notebook = notebook
        if notebook and notebook not in {c.notebook for c in self.claims.values()}:
            raise ClaimError(f"no claim belongs to notebook {notebook!r}")
        folder = Path(results_dir) if results_dir else default_root(self.profile) / "results"
        self.file = folder / f"{notebook or 'claims'}.json"
        self.results: dict[str, dict] = {}
        self.numbers: dict[str, Any] = {}

    def check(self, id: str, value: float, interval: Sequence[float] | Any = None) -> bool:
        """Print ``[ok] C9 title (band lo .. hi)`` or ``[FAIL] ...``, store the value, return whether it is in band.

        ``interval``: the value's (low, high) at 95 %, or an object with ``low`` and ``high``; exact claims need none.
        NaN fails.  Without a band for this profile the line starts with ``[--]`` and only a NaN fails.
        """
        claim = self._claim(id)
        value = float(value)
        low, high = _ends(claim, value, interval)
        band = claim.band.get(self.profile)
        finite = all(math.isfinite(v) for v in (value, low, high) if v is not None)
        ok = finite and (band is None or value in band)
        mark = "[FAIL]" if not ok else "[--]" if band is None else "[ok]"
        print(f"{mark} {claim.id} {claim.title} ({band or f'no band for profile {self.profile}'})"
              + ("" if finite else ": not a finite number"))
        self._store(claim, ok=ok, value=_plain(value), interval=None if low is None else [_plain(low), _plain(high)],
                    band=band and [_plain(band.lo), _plain(band.hi)])
        return ok

    def control(self, id: str, value: float, broken: str) -> bool:
        """Show that a claim can fail: ``value``, measured on a deliberately broken version, must leave the band.

        Prints ``[can fail] C9 broken`` or ``[FAIL] ...``; ``broken`` says what was broken.  Call it after ``check``.
        """
        if id not in self.results:
            raise ClaimError(f"control of claim {id!r} before its check")
        band = self.claims[id].band.get(self.profile)
        ok = band is None or float(value) not in band
        print(f"{'[can fail]' if ok else '[FAIL]'} {id} {broken}" + ("" if ok else ": stays inside the band"))
        self.results[id] |= {"control": _plain(float(value)), "broken": broken, "ok": self.results[id]["ok"] and ok}
        self._write()
        return ok

    def skip(self, id: str, reason: str) -> None:
        """Say that this profile's data cannot measure a claim; fails where the profile has a band for it."""
        claim = self._claim(id)
        ok = self.profile not in claim.band
        print(f"{'[--]' if ok else '[FAIL]'} {claim.id} {claim.title} (not measured: {reason})")
        self._store(claim, ok=ok, value=None, interval=None, band=None, reason=reason)

    def record(self, name: str, value: Any) -> None:
        """Keep another number, list or dict beside the claims, for the report (NaN and infinity as null)."""
        self.numbers[name] = _finite(value)
        self._write()

    def close(self) -> None:
        """Print ``n/n claims checked``; ClaimError names the checks that failed or were left out."""
        expected = [c.id for c in self.claims.values() if c.notebook == self.notebook] if self.notebook else []
        failed = [i for i, r in self.results.items() if not r["ok"]]
        absent = [i for i in expected if i not in self.results]
        total = len(self.results) + len(absent)
        print(f"{total - len(failed) - len(absent)}/{total} claims checked")
        if not total:
            raise ClaimError("no claim was checked")
        if failed or absent:
            raise ClaimError("; ".join(filter(None, [failed and f"outside their band: {', '.join(failed)}",
                                                     absent and f"never checked: {', '.join(absent)}"])))

    def _claim(self, id: str) -> Claim:
        if id not in self.claims:
            near = difflib.get_close_matches(id, self.claims, n=1)
            raise ClaimError(f"unknown claim {id!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if self.notebook and self.claims[id].notebook != self.notebook:
            raise ClaimError(f"claim {id} belongs to notebook {self.claims[id].notebook!r}, not {self.notebook!r}")
        if id in self.results:
            raise ClaimError(f"claim {id} is checked twice")
        return self.claims[id]

    def _store(self, claim: Claim, **result: Any) -> None:
        self.results[claim.id] = result
        self._write()

    def _write(self) -> None:
        write_json(self.file, {"profile": self.profile, "notebook": self.notebook, "versions": versions(),
                               "claims": self.results, "numbers": self.numbers})


def _ends(claim: Claim, value: float, interval: Any) -> tuple[float | None, float | None]:
    if interval is None:
        return (value, value) if claim.same == "exact" else (None, None)
    low, high = (interval.low, interval.high) if hasattr(interval, "low") else interval
    if low > high:
        raise ClaimError(f"claim {claim.id}: interval ({low}, {high}) is reversed")
    return float(low), float(high)


def _plain(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return _plain(value) if isinstance(value, float) else value


def verdicts(results_dir: str | Path, path: str | Path = FILE) -> pd.DataFrame:
    """One row per claim: ``holds``, ``does not hold here``, ``undecided`` or ``not measured``; the paper's value apart.

    Columns: id, title, sentence, where, notebook, quantity, same, direction, threshold, paper, value, low, high,
    verdict, in_band, reason.  A sampled claim without an interval is ``undecided``.
    """
    import pandas as pd

    from sarmlib.evaluation.statistics import UNDECIDED, verdict
    found: dict[str, dict] = {}
    for file in sorted(Path(results_dir).glob("*.json")):
        try:
            found.update(json.loads(file.read_text(encoding="utf-8"))["claims"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ClaimError(f"results file {file} is damaged ({error!r}); `make reproduce` writes it again") from error
    rows = []
    for claim in load_claims(path).values():
        result = found.get(claim.id, {"value": None, "interval": None, "ok": None})
        low, high = result["interval"] or (None, None)
        if result["value"] is None:
            judged = NOT_MEASURED
        else:
            judged = UNDECIDED if low is None else verdict((low, high), claim.threshold, claim.direction)
        rows.append({
            "id": claim.id, "title": claim.title, "sentence": claim.sentence, "where": claim.where,
            "notebook": claim.notebook, "quantity": claim.quantity, "same": claim.same, "direction": claim.direction,
            "threshold": claim.threshold, "paper": claim.paper_value, "value": result["value"], "low": low,
            "high": high, "verdict": judged, "in_band": result["ok"], "reason": result.get("reason", ""),
        })
    return pd.DataFrame(rows)
