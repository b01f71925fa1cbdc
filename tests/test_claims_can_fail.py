"""Every claim has a control in its notebook: a deliberately broken version whose value leaves the claim's band."""

import json
import re

import pytest

from sarmlib.claims import load_claims
from tests.helpers import ROOT


@pytest.mark.parametrize("claim", load_claims().values(), ids=lambda claim: claim.id)
def test_the_notebook_breaks_each_claim_on_purpose(claim):
    cells = json.loads((ROOT / "notebooks" / f"{claim.notebook}.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    source = "\n".join("".join(cell["source"]) for cell in cells)
    printed = "".join("".join(output.get("text", "")) for cell in cells for output in cell["outputs"])
    loop = re.findall(r'\("(C\d+)", "\w+"\)', source)  # ids that a loop goes over
    assert f'claims.control("{claim.id}"' in source or ("claims.control(claim" in source and claim.id in loop)
    shown = "can fail" if claim.band else "--"  # without a band: of data that the toy profile lacks
    assert re.search(rf"^\[{shown}\] {claim.id} ", printed, re.M), "the committed output shows no broken version"
