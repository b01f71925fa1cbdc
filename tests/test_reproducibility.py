"""``REPRODUCIBILITY.md`` and the reliability results say what the files they speak of say."""

import re
from pathlib import Path

from sarmlib.claims import load_claims

ROOT = Path(__file__).resolve().parents[1]


def test_every_band_stands_in_the_document():
    text = (ROOT / "REPRODUCIBILITY.md").read_text()
    rows = {m[1]: (m[2], float(m[3]), float(m[4]), int(m[5])) for m in re.finditer(
        r"^\| (C\d+) \| (.+?) \| (\S+) \.\. (\S+) \| (\d+) \|", text, re.M)}
    assert rows == {id: (c.title, c.band["toy"].lo, c.band["toy"].hi, c.band["toy"].seeds)
                    for id, c in load_claims().items()}
    assert all(c.band["toy"].seeds >= 5 for c in load_claims().values())
