"""Every claim has a control: a deliberately broken version whose value leaves the claim's band."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sarmlib.claims import Claims, load_claims
from sarmlib.errors import ClaimError

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CLAIMS = load_claims()


def _code(name: str) -> tuple[str, str]:
    """Source and printed output of a notebook's code cells."""
    cells = [c for c in json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    printed = "".join("".join(o.get("text", "")) for c in cells for o in c["outputs"])
    return "\n".join("".join(c["source"]) for c in cells), printed


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda c: c.id)
def test_the_notebook_breaks_each_claim_on_purpose(claim):
    source, printed = _code(claim.notebook)
    loop = re.findall(r'\("(C\d+)", "\w+"\)', source)  # ids that a loop goes over
    assert f'claims.control("{claim.id}"' in source or ("claims.control(claim" in source and claim.id in loop)
    assert re.search(rf"^\[can fail\] {claim.id} ", printed, re.M), "the committed output shows no broken version"


def _claims(tmp_path):
    claims = Claims("toy", tmp_path, notebook="01_sae_pretraining")
    claims.check("C2", 0.0)
    return claims


def test_a_control_inside_the_band_fails(tmp_path, capsys):
    claims = _claims(tmp_path)
    assert not claims.control("C2", 0.0, "nothing was broken")
    assert capsys.readouterr().out.splitlines()[-1] == "[FAIL] C2 nothing was broken: stays inside the band"
    with pytest.raises(ClaimError, match="C2"):
        claims.close()


def test_a_control_outside_the_band_is_recorded(tmp_path, capsys):
    claims = _claims(tmp_path)
    assert claims.control("C2", 0.5, "a long column")
    assert "[can fail] C2 a long column" in capsys.readouterr().out
    stored = json.loads(claims.file.read_text())["claims"]["C2"]
    assert stored["control"] == 0.5 and stored["ok"]


def test_a_control_cannot_come_first(tmp_path):
    with pytest.raises(ClaimError, match="before its check"):
        Claims("toy", tmp_path, notebook="01_sae_pretraining").control("C1", 1.0, "too early")
