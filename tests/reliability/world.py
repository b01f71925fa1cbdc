"""A miniature of the whole paper in a folder: its profile, one way to run it, and what its results are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from sarmlib.artifacts import Store, hash_file
from tests.miniature import SMALL, save_backbone

ROOT = Path(__file__).resolve().parents[2]
CLOCKED = {"log.json"}  # logs hold seconds


def write_profile(folder: Path) -> Path:
    """``mini.yaml`` in ``folder``: the toy profile on a random decoder of 3 layers, every stage in seconds."""
    settings = yaml.safe_load((ROOT / "sarmlib/profiles/toy.yaml").read_text())
    for name, value in {**SMALL, "backbone.source": str(save_backbone(folder / "backbone"))}.items():
        node = settings
        *path, last = name.split(".")
        for part in path:
            node = node[part]
        node[last] = value
    (folder / "mini.yaml").write_text(yaml.safe_dump(settings))
    return folder / "mini.yaml"


def start(profile: Path, runs: Path, log: Path) -> subprocess.Popen:
    """``python -m sarmlib reproduce`` (what ``make reproduce`` calls) in a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("SARMLIB_RUNS", None)
    with open(log, "a") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "sarmlib", "reproduce", "--profile", str(profile), "--runs", str(runs)],
            stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True)


def fingerprint(runs: Path) -> dict[str, str]:
    """Checksum of every result: artifacts' files, claims and recorded numbers, and the figures' numbers."""
    root = runs / "mini"
    found = {p.relative_to(root).as_posix(): hash_file(p)
             for pattern in ("results/*.json", "figures/*.csv") for p in root.glob(pattern)}
    for artifact in Store(root).artifacts():
        files = json.loads((artifact / "manifest.json").read_text())["files"]
        found.update({f"{artifact.parent.name}/{artifact.name}/{name}": one["sha256"]
                      for name, one in files.items() if name not in CLOCKED})
    return found
