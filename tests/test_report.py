"""The README's generated parts, the Colab links, and the command line's errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from sarmlib.__main__ import main
from sarmlib.errors import DataError
from sarmlib.report import claims_markdown, replace_between, results_markdown, write_badges
from tests.test_notebook_lint import lint

ROOT = Path(__file__).resolve().parents[1]
ROW = {"id": "C1", "sentence": "a | b", "where": "Method", "quantity": "error", "value": 0.5, "low": 0.4, "high": 0.6,
       "paper": None, "verdict": "holds"}


def test_claims_table_keeps_ours_and_the_papers_apart():
    exact = {**ROW, "id": "C2", "value": 0.0, "low": 0.0, "high": 0.0, "paper": 0.052}
    unmeasured = {**ROW, "id": "C3", "value": None, "low": None, "high": None, "verdict": "not measured"}
    lines = claims_markdown(pd.DataFrame([ROW, exact, unmeasured])).splitlines()
    assert "a \\| b" in lines[2] and "| 0.5 [0.4, 0.6] | – | holds |" in lines[2]
    assert lines[3].endswith("| 0 | 0.052 | holds |") and lines[4].endswith("| – | – | not measured |")


def test_results_need_every_notebook(tmp_path):
    (tmp_path / "01.json").write_text(json.dumps({"numbers": {"sae": []}, "claims": {}}))
    with pytest.raises(DataError, match="variants, steering, labels"):
        results_markdown(tmp_path)


def test_text_between_markers_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("head\n<!-- x:begin -->\nold\n<!-- x:end -->\ntail\n")
    for _ in range(2):
        replace_between(page, "x", "new")
    assert page.read_text() == "head\n<!-- x:begin -->\nnew\n<!-- x:end -->\ntail\n"
    with pytest.raises(DataError, match="y:begin"):
        replace_between(page, "y", "new")


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    return tmp_path


def test_no_link_points_to_an_address_that_is_not_set():
    pages = [ROOT / "README.md", *(ROOT / "notebooks").glob("*.ipynb")]
    assert not [page.name for page in pages if "colab.research.google.com" in page.read_text()]


def test_badges_pass_the_lint_and_are_replaced_not_stacked(copy):
    write_badges(copy, "first/name")
    once = {path: path.read_text().replace("first/name", "second/name") for path in write_badges(copy, "first/name")}
    for path, text in once.items():
        write_badges(copy, "second/name")
        assert path.read_text() == text
    for path in (copy / "notebooks").glob("[0-9]*.ipynb"):
        assert lint(path) == []


def test_the_colab_cell_installs_only_in_colab(copy, monkeypatch):
    write_badges(copy, "owner/name")
    notebook = json.loads((copy / "notebooks" / "01_sae_pretraining.ipynb").read_text())
    source = "".join(next(c["source"] for c in notebook["cells"] if c["id"] == "colab-install"))
    installed = []
    source = source.replace("%pip install -q", "install(").replace('owner/name"', 'owner/name")')
    exec(source, {"install": installed.append})
    assert installed == []
    monkeypatch.setitem(__import__("sys").modules, "google.colab", object())
    exec(source, {"install": installed.append})
    assert installed == ["sarmlib[notebooks] @ git+https://github.com/owner/name"]


@pytest.mark.parametrize("arguments, message", [
    (["reproduce", "--profile", "nosuch"], "unknown profile 'nosuch'"),
    (["reproduce", "--profile", "local"], "DATA=folder"),
    (["badges", "--repo", "nobody"], "give owner/name"),
])
def test_commands_fail_with_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("SARMLIB_DATA", raising=False)
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_doctor_names_versions_profiles_and_artifacts(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    wanted = ("torch", "cores", "memory", "free disk", "hub", "paper-4b", "artifacts", "next")
    assert all(word in printed for word in wanted)
    assert re.search(r"^profile +toy +fits", printed, re.M)
