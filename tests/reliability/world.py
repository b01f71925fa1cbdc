"""A miniature of the whole paper in a folder: its profile, and what its results are."""

import json
from pathlib import Path

from sarmlib.store import Store, hash_file, write_json
from tests.miniature import miniature, save_backbone


def write_profile(folder: Path) -> Path:
    """``mini.yaml`` in ``folder``: the toy profile on a random decoder of 3 layers, every stage in seconds."""
    profile = miniature(save_backbone(folder / "backbone"))
    settings = profile.model_dump(mode="json", exclude={"name", "data"})
    return write_json(folder / "mini.yaml", settings)  # JSON is YAML


def fingerprint(runs: Path) -> dict[str, str]:
    """Checksum of every file of every artifact; logs hold seconds."""
    found = {}
    for artifact in Store(runs / "mini").artifacts():
        files = json.loads((artifact / "manifest.json").read_text())["files"]
        found |= {f"{artifact.parent.name}/{artifact.name}/{name}": hash_file(artifact / name)
                  for name in files if name != "log.json"}
    return found
