"""Claims: stable lines, NaN and departures fail, verdicts come from intervals; the project's own file."""

import json
import math
import re

import pytest

from sarmlib.claims import FILE, NOT_MEASURED, Claims, load_claims, verdicts
from sarmlib.errors import ClaimError
from sarmlib.profiles import profile_names
from tests.helpers import ROOT, shared_path


def claim(lo, hi, **fields):
    """One entry of the file; TOML writes texts and numbers as JSON does."""
    entry = {**fields, "sentence": "s", "where": "w", "quantity": "q", "paper_value": 0.1}
    written = [f"{name} = {json.dumps(value)}" for name, value in entry.items()]
    band = f'band.toy = {{ lo = {lo}, hi = {hi}, seeds = 5, date = "2026-01-01" }}'
    return "\n".join(["[[claim]]", *written, band, ""])


TOML = (claim(0.1, 0.3, id="C1", title="error", notebook="01_a", direction="<", threshold=0.5, kind="evidence")
        + claim("-inf", 1e-5, id="C2", title="exactness", notebook="01_a", direction="<", threshold=1e-5,
                kind="construction")
        + claim(-1.0, 1.0, id="C3", title="shift", notebook="02_b", direction=">", threshold=0.0, kind="evidence"))


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text(TOML)
    return path


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_a_line_never_shows_the_value_and_close_names_what_is_outside_its_band(tmp_path, toml, capsys):
    for value in (0.123456, 0.1, 0.3):  # bounds belong to the band
        assert Claims("toy", "01_a", tmp_path, toml).check("C1", value, (0.1, 0.25))
    assert lines(capsys) == ["[ok] C1 error (band 0.1 .. 0.3)"] * 3
    claims = Claims("toy", "01_a", tmp_path, toml)
    assert not claims.check("C1", math.nextafter(0.3, 1))
    assert claims.check("C2", 0.0)
    with pytest.raises(ClaimError, match="^C1 outside its band$"):
        claims.close()
    assert lines(capsys) == ["[FAIL] C1 error (band 0.1 .. 0.3)", "[ok] C2 exactness (band -inf .. 1e-05)",
                             "1/2 claims checked"]


@pytest.mark.parametrize("value, interval", [(math.nan, None), (math.inf, None), (0.2, (math.nan, 0.3))])
@pytest.mark.parametrize("profile", ["toy", "local"])
def test_not_a_number_fails_with_and_without_a_band(tmp_path, toml, capsys, value, interval, profile):
    claims = Claims(profile, "01_a", tmp_path, toml)
    assert not claims.check("C1", value, interval)
    assert lines(capsys)[0].startswith("[FAIL] C1") and json.loads(claims.file.read_text())
    with pytest.raises(ClaimError, match="C1"):
        claims.close()


def test_wrong_calls_are_refused_by_name(tmp_path, toml, capsys):
    claims = Claims("toy", "01_a", tmp_path, toml)
    for name in ("C11", "C3"):  # unknown, of another notebook
        with pytest.raises(ClaimError, match=f"claim '{name}' is none of notebook '01_a': C1, C2"):
            claims.check(name, 1.0)
    claims.check("C1", 0.2)
    with pytest.raises(ClaimError, match="checked twice"):
        claims.check("C1", 0.2)
    with pytest.raises(ClaimError, match="no claim belongs to notebook '09_z'"):
        Claims("toy", "09_z", tmp_path, toml)
    with pytest.raises(ClaimError, match="^C2 never checked$"):
        claims.close()


def test_skipping_is_allowed_only_without_a_band(tmp_path, toml, capsys):
    local = Claims("local", "02_b", tmp_path, toml)
    local.skip("C3", "the folder has no RewardBench 2 file")
    local.close()
    assert lines(capsys)[0] == "[--] C3 shift (not measured: the folder has no RewardBench 2 file)"
    row = verdicts(tmp_path, toml).set_index("id").loc["C3"]
    assert row["verdict"] == NOT_MEASURED and "RewardBench 2" in row["reason"]
    toy = Claims("toy", "02_b", tmp_path, toml)
    toy.skip("C3", "no")
    with pytest.raises(ClaimError):
        toy.close()


def test_results_hold_values_intervals_bands_and_numbers(tmp_path, toml, capsys):
    claims = Claims("toy", "01_a", tmp_path, toml)
    claims.check("C1", 0.2, (0.15, 0.25))
    claims.check("C2", 0.0)
    claims.record("fvu", [0.2, 0.21])
    kept = json.loads((tmp_path / "01_a.json").read_text())
    assert kept["claims"]["C1"] == {"ok": True, "value": 0.2, "interval": [0.15, 0.25], "band": [0.1, 0.3]}
    assert kept["claims"]["C2"]["band"] == [None, 1e-5] and kept["claims"]["C2"]["interval"] == [0.0, 0.0]
    assert kept["numbers"] == {"fvu": [0.2, 0.21]} and kept["profile"] == "toy" and "torch" in kept["versions"]


@pytest.mark.parametrize("value, interval, ok", [
    (0.5, None, True), (0.2, None, False), (0.2, (0.1, 0.6), True), (0.2, (0.1, 0.4), False)])
def test_a_control_must_leave_the_band_or_by_its_interval_not_hold(tmp_path, toml, capsys, value, interval, ok):
    claims = Claims("toy", "01_a", tmp_path, toml)
    with pytest.raises(ClaimError, match="before its check"):
        claims.control("C1", value, "too wide", interval)
    claims.check("C1", 0.2)
    assert claims.control("C1", value, "too wide", interval) == ok
    assert lines(capsys)[-1] == ("[can fail] C1 too wide" if ok else "[FAIL] C1 too wide: stays inside the band")
    stored = json.loads(claims.file.read_text())["claims"]["C1"]
    assert (stored["control"], stored["ok"]) == (value, ok)


@pytest.mark.parametrize("interval, expected", [
    ((0.1, 0.4), "holds"), ((0.6, 0.9), "does not hold here"), ((0.4, 0.6), "undecided"), (None, "undecided"),
    ((-math.inf, math.inf), "undecided")])
def test_verdict_comes_from_the_interval_not_from_the_band(tmp_path, toml, capsys, interval, expected):
    claims = Claims("toy", "01_a", tmp_path, toml)
    assert claims.check("C1", 0.2, interval)
    claims.check("C2", 3e-7)
    frame = verdicts(tmp_path, toml).set_index("id")
    assert frame.verdict.tolist() == [expected, "holds", NOT_MEASURED] and frame.loc["C1", "paper"] == 0.1
    assert frame.loc["C1", ["band_lo", "band_hi"]].tolist() == [0.1, 0.3]


@pytest.mark.parametrize("old, new, message", [
    ('direction = ">"', 'direction = "up"', "C3.*direction"),
    ('id = "C2"', 'id = "C1"', "twice"),
    ("lo = 0.1, hi = 0.3", "lo = 0.4, hi = 0.3", "C1.*lo"),
    ("[[claim]]", "[[claim", "cannot be read"),
])
def test_malformed_files_are_refused(tmp_path, toml, old, new, message):
    toml.write_text(TOML.replace(old, new))
    with pytest.raises(ClaimError, match=message):
        load_claims(toml)


def test_the_projects_own_file_is_whole_and_its_bands_are_measured_and_stand_in_the_document():
    claims = load_claims()
    assert list(claims) == [f"C{i}" for i in range(1, len(claims) + 1)] and len(claims) >= 13
    for claim in claims.values():
        assert ("toy" in claim.band or "authors' released" in claim.quantity), claim.id
        assert set(claim.band) <= set(profile_names()), claim.id
        assert re.fullmatch(r"\d\d_[a-z_]+", claim.notebook)
        assert len(claim.title) < 70
        if claim.kind != "evidence":
            assert claim.direction == "<" and claim.band["toy"].hi <= max(claim.threshold, 0), claim.id
        for profile, band in claim.band.items():
            where = f"{claim.id}, {profile} in {FILE.name}"
            least = 5 if profile == "toy" else 3
            assert not band.provisional and band.seeds >= least, f"{where}: a band needs runs with {least} seeds"
            if claim.kind == "evidence":
                assert not (math.isinf(band.lo) and math.isinf(band.hi)), f"{where}: any value would pass"
    text = (ROOT / "REPRODUCIBILITY.md").read_text()
    rows = re.findall(r"^\| (C\d+) \| (.+?) \| (\S+) \.\. (\S+) \| (\d+) \|", text, re.M)
    assert {id: (title, float(lo), float(hi), int(seeds)) for id, title, lo, hi, seeds in rows} == {
        id: (c.title, c.band["toy"].lo, c.band["toy"].hi, c.band["toy"].seeds) for id, c in claims.items() if c.band}


def test_sentences_are_the_papers_words():
    paper = " ".join(shared_path("reference/paper.txt").read_text(encoding="utf-8").split())
    for claim in load_claims().values():
        assert " ".join(claim.sentence.split()) in paper, claim.id
