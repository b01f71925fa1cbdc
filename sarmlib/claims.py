"""Claims of the paper, the bands that our values must stay in, and verdicts.

*Is the run healthy?*  ``Claims.check`` compares a value with the band of earlier runs; its line is the same
on every machine and hides the value.  *Does the claim hold?*  ``verdicts`` compares the interval with the
claim's threshold; a claim that does not hold at this scale is a finding and fails nothing.
"""

import datetime
import json
import math
import tomllib
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel

from sarmlib.errors import ClaimError
from sarmlib.evaluation.statistics import HOLDS, UNDECIDED, Interval, verdict
from sarmlib.store import default_root, versions, write_json

FILE = Path(__file__).with_name("claims.toml")
NOT_MEASURED = "not measured"


class Band(BaseModel, extra="forbid", frozen=True):
    """Where earlier runs of a profile fell: lo .. hi, over so many seeds, on that day."""

    lo: float
    hi: float
    seeds: int
    date: datetime.date
    provisional: bool = False

    def model_post_init(self, context: Any) -> None:
        if not self.lo <= self.hi:
            raise ValueError(f"lo = {self.lo} must not exceed hi = {self.hi}")

    def __contains__(self, value: float) -> bool:
        return self.lo <= value <= self.hi


class Claim(BaseModel, extra="forbid", frozen=True):
    """One claim; the fields are explained at the top of ``claims.toml``."""

    id: str
    title: str
    sentence: str
    where: str
    notebook: str
    quantity: str
    direction: Literal["<", ">"]
    threshold: float
    kind: Literal["construction", "implementation", "evidence"]
    paper_value: float | str | None = None
    band: dict[str, Band] = {}


def load_claims(path: str | Path = FILE) -> dict[str, Claim]:
    """``id -> Claim`` in the file's order; ClaimError names what is missing, unknown or double."""
    claims: dict[str, Claim] = {}
    entry: dict = {}
    try:
        for entry in tomllib.loads(Path(path).read_text(encoding="utf-8"))["claim"]:
            claim = Claim(**entry)
            if claims.setdefault(claim.id, claim) is not claim:
                raise ValueError("its id stands twice")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ClaimError(f"{path} cannot be read (last claim: {entry.get('id')}): {reason}") from error
    return claims


class Claims:
    """The checks of one notebook (its name without ``.ipynb``) under a profile, kept in
    ``<results_dir>/<notebook>.json`` (default: the ``results`` folder of the profile's artifacts)."""

    def __init__(self, profile: Any, notebook: str, results_dir: str | Path | None = None, path: str | Path = FILE):
        self.profile = profile if isinstance(profile, str) else profile.name
        self.notebook = notebook
        self.claims = {id: one for id, one in load_claims(path).items() if one.notebook == notebook}
        if not self.claims:
            raise ClaimError(f"no claim belongs to notebook {notebook!r}")
        self.file = Path(results_dir or default_root(self.profile) / "results") / f"{notebook}.json"
        self.results: dict[str, dict] = {}
        self.numbers: dict[str, Any] = {}

    def check(self, id: str, value: float, interval: Any = None) -> bool:
        """Print ``[ok] C9 title (band lo .. hi)`` or ``[FAIL] ...``, store it, and say whether it is in.

        interval: (low, high) at 95 %; where nothing is sampled there is none.  A NaN fails, also without a band
        (``[--]``).
        """
        claim, value = self._unchecked(id), float(value)
        if interval is None and claim.kind != "evidence":
            interval = (value, value)
        ends = list(interval[1:3] if isinstance(interval, Interval) else interval or ())
        band = claim.band.get(self.profile)
        finite = math.isfinite(value) and not any(map(math.isnan, ends))  # an interval without ends decides nothing
        where = f"band {band.lo:g} .. {band.hi:g}" if band else f"no band for profile {self.profile}"
        words = f"{claim.title} ({where})" + ("" if finite else ": not a finite number")
        ok = finite and (band is None or value in band)
        return self._keep(id, ok, "[ok]" if band else "[--]", words, value=value, interval=ends or None,
                          band=[band.lo, band.hi] if band else None)

    def control(self, id: str, value: float, broken: str, interval: Any = None) -> bool:
        """Show that a claim can fail: ``value``, measured on a ``broken`` version, must leave the band, or by its
        ``interval`` the claim must not hold."""
        if id not in self.results:
            raise ClaimError(f"control of claim {id!r} before its check")
        own, claim = self.results[id], self.claims[id]
        band = claim.band.get(self.profile)
        left = band is None or float(value) not in band
        if interval is not None:
            left |= verdict(interval, claim.threshold, claim.direction) != HOLDS
        return self._keep(id, left, "[can fail]", broken + ("" if left else ": stays inside the band"),
                          **own | {"control": float(value), "broken": broken, "ok": own["ok"] and left})

    def skip(self, id: str, reason: str) -> None:
        """Say that this profile's data cannot measure a claim; fails where the profile has a band for it."""
        claim = self._unchecked(id)
        self._keep(id, self.profile not in claim.band, "[--]", f"{claim.title} (not measured: {reason})",
                   value=None, reason=reason)

    def record(self, name: str, value: Any) -> None:
        """Keep another number, list or dict beside the claims, for the report (NaN and infinity as null)."""
        self.numbers[name] = value
        self._write()

    def close(self) -> None:
        """Print ``n/n claims checked``; ClaimError names the checks that failed or were left out."""
        bad = [f"{id} {'outside its band' if id in self.results else 'never checked'}" for id in self.claims
               if not self.results.get(id, {}).get("ok")]
        print(f"{len(self.claims) - len(bad)}/{len(self.claims)} claims checked")
        if bad:
            raise ClaimError("; ".join(bad))

    def _unchecked(self, id: str) -> Claim:
        if id not in self.claims:
            raise ClaimError(f"claim {id!r} is none of notebook {self.notebook!r}: {', '.join(self.claims)}")
        if id in self.results:
            raise ClaimError(f"claim {id} is checked twice")
        return self.claims[id]

    def _keep(self, id: str, in_band: bool, mark: str, words: str, /, **result: Any) -> bool:
        """Print the line and store the result, whose ``ok`` is ``in_band`` unless it says otherwise."""
        print(f"{mark if in_band else '[FAIL]'} {id} {words}")
        self.results[id] = {"ok": in_band} | result
        self._write()
        return in_band

    def _write(self) -> None:
        kept = {"profile": self.profile, "notebook": self.notebook, "versions": versions(),
                "claims": self.results, "numbers": self.numbers}
        write_json(self.file, json.loads(json.dumps(kept, default=float), parse_constant=lambda name: None))


def verdicts(results_dir: str | Path, path: str | Path = FILE) -> pd.DataFrame:
    """Each claim with value, interval, band and verdict: holds, does not hold here, undecided (always without
    an interval) or not measured."""
    found: dict[str, dict] = {}
    for file in sorted(Path(results_dir).glob("*.json")):
        try:
            found.update(json.loads(file.read_text(encoding="utf-8"))["claims"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ClaimError(f"results file {file} is damaged ({error!r}); run its notebook again") from error
    return pd.DataFrame([_row(claim, found.get(claim.id, {})) for claim in load_claims(path).values()])


def _row(claim: Claim, result: dict) -> dict:
    value, (low, high) = result.get("value"), result.get("interval") or (None, None)
    (band_lo, band_hi), judged = result.get("band") or (None, None), UNDECIDED
    if value is None:
        judged = NOT_MEASURED
    elif None not in (low, high):
        judged = verdict((low, high), claim.threshold, claim.direction)
    return {**claim.model_dump(exclude={"band", "paper_value"}), "paper": claim.paper_value, "value": value,
            "low": low, "high": high, "band_lo": band_lo, "band_hi": band_hi, "verdict": judged,
            "in_band": result.get("ok"), "reason": result.get("reason", ""), "control": result.get("control"),
            "broken": result.get("broken")}
