"""Helpers shared by the tests."""

import os
import socket
import subprocess
import sys
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


def two_ranks(code: str) -> None:
    """Run code on two gloo processes on the CPU; an error of one fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                        "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ranks = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                              stdout=subprocess.DEVNULL, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank in range(2)]
    for process in ranks:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
