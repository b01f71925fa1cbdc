"""Notebooks as readers meet them: exported to HTML, and run in JupyterLab in a headless browser."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.reliability.world import write_profile

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name, there in (("chromium", CHROMIUM), ("playwright", importlib.util.find_spec("playwright")))
           if not there]
RESULT = "sessionContext.session?.kernel?.status"


class Images(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[str | None] = []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.found.append(dict(attributes).get("alt"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_committed_notebook_renders_as_html_and_its_pictures_have_words(path):
    import nbformat
    from nbconvert import HTMLExporter
    body, _ = HTMLExporter(template_name="classic").from_filename(str(path))
    images = Images()
    images.feed(body)
    notebook = nbformat.read(path, as_version=4)
    drawn = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(images.found) >= len(drawn) > 0
    assert [alt for alt in images.found if not alt or len(alt) < 20] == []
    assert "output_error" not in body


@pytest.mark.browser
@pytest.mark.skipif(bool(MISSING) and not os.environ.get("REQUIRE_BROWSER"), reason=f"needs {' and '.join(MISSING)}")
@pytest.mark.parametrize("name", ["01_sae_pretraining", "04_safety_steering"])
def test_jupyterlab_runs_a_notebook_and_the_slider_obeys_the_arrow_keys(tmp_path, name):
    from playwright.sync_api import sync_playwright
    profile = write_profile(tmp_path)
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"]).replace('profile = "toy"', f"profile = {str(profile)!r}")
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    (tmp_path / "x.ipynb").write_text(json.dumps(notebook))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "SARMLIB_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(ROOT),
                   "OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1", "HOME": str(tmp_path)}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ServerApp.root_dir", str(tmp_path),
         "--IdentityProvider.token=", "--allow-root", "--LabApp.expose_app_in_browser=True"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1).status == 200, 60)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.goto(f"http://127.0.0.1:{port}/lab/tree/x.ipynb?reset")
            page.wait_for_function(f"window.jupyterapp?.shell.currentWidget?.{RESULT} === 'idle'", timeout=90_000)
            page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")
            done = """() => { const cells = window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells;
                       return [...cells].filter(c => c.cell_type === 'code' && c.execution_count).length }"""
            count = sum(cell["cell_type"] == "code" for cell in notebook["cells"])
            _wait(lambda: page.evaluate(done) == count, 240)
            errors = page.evaluate("""() => [...window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells]
                .flatMap(c => c.outputs ?? []).filter(o => o.output_type === 'error').map(o => o.evalue)""")
            assert errors == []
            if name.startswith("04"):
                handle = page.locator(".noUi-handle").first
                handle.scroll_into_view_if_needed()
                card = page.locator("p", has_text="mean shift of T").first
                _wait(lambda: card.inner_text().startswith("factor 8"), 20)
                handle.focus()
                page.keyboard.press("ArrowRight")
                _wait(lambda: card.inner_text().startswith("factor 16"), 20)
                if folder := os.environ.get("SARMLIB_SCREENSHOTS"):
                    page.screenshot(path=str(Path(folder) / "slider.png"))
            browser.close()
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def _wait(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"not reached within {seconds:g} s")
        time.sleep(0.3)
