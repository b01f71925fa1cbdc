"""Helpers shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def shared_path(relative: str) -> Path:
    """Path of a conformance or real-data file beside the checkout; skips the test when it is absent.

    The folder is ``$SARMLIB_SHARED`` or ``../shared`` beside the repository; a plain clone has neither.
    """
    path = Path(os.environ.get("SARMLIB_SHARED", ROOT.parent / "shared")) / relative
    if not path.exists():
        pytest.skip(f"conformance data not available: {relative}")
    return path
