"""Small sound folders, which the tests damage."""

import json
import shutil

import pytest

from tests.tiny import tiny_pairs
from tools.fuzz import sound


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """sarm/, backbone/, sae/, pairs.jsonl, corpus.txt"""
    folder = tmp_path_factory.mktemp("base")
    sound(folder)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in tiny_pairs(40)))
    (folder / "corpus.txt").write_text("w1 w2 w3. w4 w5 w6! w7 w8.\n\n" * 400)
    return folder


@pytest.fixture
def job():
    return "score"


@pytest.fixture
def model(job, base, tmp_path):
    """A copy of the folder that ``job`` reads."""
    return shutil.copytree(base / ("backbone" if job in ("train", "pretrain-sae") else "sarm"), tmp_path / "model")
