"""The feature browser and the exports: right numbers, no injected element, no leak, nothing lost."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from sarmlib.browser import ORDERS, Browser, histogram, visible
from sarmlib.errors import ConfigError, DataError
from sarmlib.export import SCHEMA, write_jsonl, write_neuronpedia
from sarmlib.interpretation.contexts import Contexts
from sarmlib.interpretation.explainers import KeywordExplainer, Label
from sarmlib.interpretation.judges import KeywordJudge, judge_labels
from tests.hostile import ALLOWED, PAYLOADS
from tests.planted import APPLE, SORRY, planted_world

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LINK = re.compile(r"(feature-\d+|pair-\d+|by-[a-z]+|index|pairs|skipped|about)\.html")


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.attributes, self.words, self._raw = [], [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


@pytest.fixture(scope="module")
def made():
    z, index, w, _ = planted_world()
    contexts = Contexts(z, index, w)
    explainer = KeywordExplainer(contexts)
    labels = explainer.explain_all(range(12))
    judge = KeywordJudge(explainer.vocabulary)
    judged = judge_labels(contexts, labels, judge, n_boot=100, also=("matched", "neighbour"))
    decoder = np.random.default_rng(0).normal(size=(80, 6))
    return contexts, labels, judged, judge, decoder


@pytest.fixture(scope="module")
def browser(made):
    contexts, labels, judged, judge, decoder = made
    return Browser(contexts, labels, judged, judge, decoder=decoder)


@pytest.fixture(scope="module")
def pages(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "pages"
    browser.write(folder, {"profile": "planted", "seed": "0"}, n_pairs=6, progress=False)
    return {path.name: path.read_text() for path in folder.glob("*.html")}


@pytest.fixture(scope="module")
def hostile(made, tmp_path_factory):
    """(folder of pages on a hostile corpus, folder of the same pages on a harmless one)"""
    contexts, labels, judged, _, decoder = made
    folders = []
    for name, wrap in (("hostile", lambda i: PAYLOADS[i % len(PAYLOADS)]), ("harmless", lambda i: f"text {i % 19}")):
        index = contexts.index.copy()
        index["text"] = [f"{wrap(i)} {text}" for i, text in enumerate(index["text"])]
        index["prompt_text"] = [f"{wrap(int(p[1:]))} {p}" for p in index["prompt_id"]]
        names = {d: wrap(5 + 4 * i) for i, d in enumerate(sorted(set(index["domain"])))}
        index["domain"] = index["domain"].map(names)
        marked = [replace(one, text=wrap(one.feature), evidence=tuple({**row, "term": wrap(one.feature + 3)}
                                                                      for row in one.evidence)) for one in labels]
        table = judged.assign(verdict=[wrap(i) for i in range(len(judged))])
        one = Browser(Contexts(contexts.z, index, contexts.w, split=contexts.split), marked, table, decoder=decoder)
        folders.append(tmp_path_factory.mktemp("xss") / name)
        one.write(folders[-1], {"profile": wrap(0), wrap(1): wrap(2)}, n_pairs=19, progress=False)
    return folders


def test_no_element_comes_from_the_corpus(hostile):
    seen = ""
    for path in sorted(hostile[0].glob("*.html")):
        page, harmless = Page(path.read_text()), Page((hostile[1] / path.name).read_text())
        assert set(page.elements) <= ALLOWED, path.name
        assert page.elements == harmless.elements, path.name  # the same corpus without payloads, element by element
        for name, value in page.attributes:
            assert not name.startswith("on") and name not in ("style", "src", "srcdoc", "action"), (path.name, name)
            assert name != "href" or LINK.fullmatch(value), (path.name, value)
        seen += page.text
    for payload in PAYLOADS:
        assert visible(payload) in seen, payload
    hidden = r"[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
    assert not re.search(hidden, seen)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_chromium_runs_and_requests_nothing(hostile, tmp_path):
    for name in ("index.html", f"feature-{SORRY}.html", "pair-1.html", "about.html"):
        log = tmp_path / "net.json"
        dom = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
             f"--log-net-log={log}", "--virtual-time-budget=2000", "--dump-dom", f"file://{hostile[0] / name}"],
            capture_output=True, text=True, timeout=120).stdout
        page = Page(dom)
        assert set(page.elements) <= ALLOWED and "pwned" not in (re.search("<title>(.*?)</title>", dom) or "")[1]
        assert page.elements.count("style") == 1 and len(page.text) > 500
        assert "evil.example" not in log.read_text()


CONTRAST = """() => {
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => (x /= 255) <= .03928 ? x / 12.92
                         : ((x + .055) / 1.055) ** 2.4); return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] }
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
                          if (c != 'rgba(0, 0, 0, 0)') return c } return 'rgb(255, 255, 255)' }
  const words = [...document.querySelectorAll('body *')].filter(e => !e.closest('svg') &&
      [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
  return Math.min(...words.map(e => { const [a, b] = [light(getComputedStyle(e).color), light(ground(e))]
                                      return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) })) }"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None or not importlib.util.find_spec("playwright"), reason="needs chromium, playwright")
def test_the_keyboard_reaches_everything_and_words_have_contrast(browser, tmp_path):
    from playwright.sync_api import sync_playwright
    browser.write(tmp_path / "pages", n_pairs=2, progress=False)
    at, veil = f"file://{tmp_path}/pages/", "document.activeElement.parentElement"
    with sync_playwright() as play:
        page = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()

        def tab_to(test: str) -> None:
            for _ in range(80):
                page.keyboard.press("Tab")
                if page.evaluate(test):
                    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
                    return
            raise AssertionError(f"the Tab key never reaches {test}")

        page.goto(at + "index.html")
        tab_to("document.activeElement.textContent.startsWith('weight')")
        with page.expect_navigation():
            page.keyboard.press("Enter")
        assert page.url.endswith("by-weight.html")
        page.goto(at + f"feature-{SORRY}.html")
        tab_to(f"{veil}.className == 'veil'")
        blur = f"getComputedStyle({veil}, '::details-content').filter"
        assert not page.evaluate(f"{veil}.open") and "blur" in page.evaluate(blur)
        page.keyboard.press("Enter")
        assert page.evaluate(f"{veil}.open") and page.evaluate(blur) == "none"
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for name in ("index", f"feature-{SORRY}", "pair-1", "skipped", "about"):
                page.goto(f"{at}{name}.html")
                assert page.evaluate(CONTRAST) >= 4.5, (scheme, name)


def test_the_policy_allows_one_style_sheet_and_nothing_else(pages):
    for name, html in pages.items():
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
        css = re.search("<style>(.*?)</style>", html, re.S)[1]
        sha = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
        assert policy.startswith(f"default-src 'none'; style-src 'sha256-{sha}'"), name
        assert "url(" not in css and "@import" not in css and "<script" not in html and "http://" not in html


def test_every_link_leads_to_a_page(pages):
    for html in pages.values():
        links = {value for name, value in Page(html).attributes if name == "href"}
        assert links <= set(pages)
    assert {name for _, name in ORDERS.values()} | {"pairs.html", "skipped.html", "about.html"} <= set(pages)


def test_the_index_sorts_by_every_column(pages, browser):
    for order, (key, name) in ORDERS.items():
        ids = [int(i) for i in re.findall(r'<th scope="row"><a href="feature-(\d+)', pages[name])]
        values = np.array([browser.summary(i)[key] if browser.summary(i)[key] is not None else -np.inf for i in ids])
        assert sorted(ids) == sorted(browser.shown)
        assert (np.diff(values) >= 0).all() if key == "id" else (np.diff(values[np.isfinite(values)]) <= 0).all(), order
        assert pages[name].count('aria-sort="descending"') == 1


def test_a_page_says_what_the_tables_say(pages, browser, made):
    contexts, labels, judged, _, _ = made
    page, row = pages[f"feature-{APPLE}.html"], judged.set_index("feature").loc[APPLE]
    assert "✓ reliable" in page and "“apple”" in page
    assert f"{row.auroc:.3f} [{row.auroc_lo:.3f}, {row.auroc_hi:.3f}]" in page
    found = browser.feature(APPLE)
    z = contexts.activation(APPLE)
    deciles = [unit["decile"] for unit in found["examples"]]
    assert deciles == sorted(deciles, reverse=True) and set(deciles) == set(range(1, 11))
    for unit in found["examples"]:
        assert unit["contribution"] == pytest.approx(contexts.w[APPLE] * unit["z"])
    assert [unit["z"] for unit in found["near"]] == pytest.approx(np.sort(z[z > 0])[:4])
    fits = ["apple" in unit["text"] for unit in found["false_positives"]]
    assert all(fits) and fits and all(unit["z"] == 0 for unit in found["false_positives"])  # apple, feature silent
    wanted = {True: ("good", "✓ reliable"), False: ("bad", "✗ not reliable")}
    for feature, row in judged.set_index("feature").iterrows():
        if row.auroc == row.auroc:
            one = browser.summary(feature)
            assert (one["badge"], one["badge_text"]) == wanted[row.reliable], feature
    assert set(judged[judged.auroc.notna()].reliable) == {True, False}
    assert "✗ abstained" in "".join(pages.values())


def test_a_pair_adds_up_and_a_wrong_reward_is_told(browser, made, pages):
    contexts, *_ = made
    numbers = browser.pairs(10)
    assert len(set(numbers)) == 10
    rewards = contexts.index["reward"].to_numpy()
    assert {rewards[a] > rewards[b] for a, b in numbers} == {True, False}
    for i, (a, b) in enumerate(numbers):
        assert contexts.index["prompt_id"][a] == contexts.index["prompt_id"][b]
        one = browser.pair(i, a, b)
        assert one["exact"] and sum(row["value"] for row in one["table"]) == pytest.approx(rewards[a] - rewards[b])
        ends = one["bars"][-1]
        assert ends["name"] == "margin" and ends["value"] == pytest.approx(rewards[a] - rewards[b])
    index = contexts.index.copy()
    index.loc[numbers[0][0], "reward"] += 0.01
    wrong = Browser(Contexts(contexts.z, index, contexts.w, split=contexts.split)).pair(1, *numbers[0])
    assert not wrong["exact"] and "not the margin (gap 1.0e-02)" in wrong["check_text"]
    assert "Exact: the contributions" in pages["pair-1.html"]


def test_histograms_count_everything():
    z, chosen = np.array([0, 0, 1.0, 2, 4, 4, 0]), np.array([1, 0, 1, 1, 1, 0, 0], bool)
    found = histogram(z, chosen)
    assert sum(row[1] for row in found["rows"]) == 4 and sum(row[2] for row in found["rows"]) == 3
    assert found["rows"][0] == ("0", 1, 2)
    assert max(max(bar["c"], bar["r"]) for bar in found["bars"]) == 100
    assert histogram(np.zeros(3), np.array([True, False, True]))["zero_c"] == 100


def test_safety_responses_are_closed_and_blurred(pages):
    html = pages[f"feature-{SORRY}.html"]
    veiled = re.findall(r'<details class="veil">(.*?)</details>', html, re.S)
    assert veiled and all("sorry" in part for part in veiled[:3]) and "<details class=\"veil\" open" not in html
    assert "sorry" not in re.sub(r"<details.*?</details>", "", html.split("Responses by decile")[1].split("Neighb")[0],
                                 flags=re.S)
    assert ".veil:not([open])" in html and "blur(" in html


def test_redacted_pages_and_files_hold_no_words(made, tmp_path):
    contexts, labels, judged, judge, decoder = made
    index = contexts.index.copy()
    index["text"], index["prompt_text"] = "SECRETWORD " + index["text"], "SECRETPROMPT " + index["prompt_text"]
    labels = [replace(one, text="SECRETLABEL" if not one.abstained else one.text,
                      weights={f"SECRETTERM {t}": v for t, v in one.weights.items()},
                      evidence=tuple({**row, "term": "SECRETTERM"} for row in one.evidence)) for one in labels]
    judged = judged.assign(label="SECRETLABEL")
    contexts = Contexts(contexts.z, index, contexts.w, split=contexts.split)
    for redact in (True, False):
        one = Browser(contexts, labels, judged, decoder=decoder, redact=redact)
        one.write(tmp_path / "pages", progress=False)
        write_jsonl(one, tmp_path / "files")
        write_neuronpedia(one, tmp_path / "np", model="m", source="s")
        text = "".join((gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()).decode()
                       for p in tmp_path.rglob("*") if p.is_file())
        assert ("SECRET" in text) is not redact
    sha = hashlib.sha256(index["text"][contexts.activation(APPLE).argmax()].encode()).hexdigest()[:12]
    assert sha in text


def test_a_folder_is_replaced_only_when_it_was_written_here(browser, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="no feature browser"):
        browser.write(mine, progress=False)
    assert (mine / "thesis.txt").read_text() == "years of work"
    target = tmp_path / "pages"
    first = browser.write(target, n_pairs=2, progress=False)
    again = browser.write(target, n_pairs=2, progress=False)
    assert first == again and sorted(p.name for p in tmp_path.iterdir()) == ["mine", "pages"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="no feature browser"):
        browser.write(tmp_path / "file", progress=False)


def test_what_has_no_page_is_listed(browser, made):
    groups = {name: (count, ids) for name, _, count, ids in browser.skipped()}
    kinds = browser.table.kind.value_counts()
    assert groups["Dead"][0] == kinds["dead"] == 40
    assert groups["No page"][0] == 0 and groups["Abstained"][0] == sum(one.abstained for one in made[1])
    few = Browser(made[0], made[1], made[2], n_features=5)
    assert len(few.shown) == 5 and set(few.shown) <= set(range(12))  # labelled ones come first
    assert dict((name, count) for name, _, count, _ in few.skipped())["No page"] == 35


def test_a_card_is_caged_and_shows_no_harmful_text(browser):
    html = browser.card(SORRY)._repr_html_()
    assert html.startswith("<iframe sandbox ") and html.count("<") == 2  # all of the page is inside an attribute
    assert "sorry" not in html.lower().replace("“sorry”", "") and "text withheld" in html
    with pytest.raises(DataError, match="dead"):
        browser.card(79)


def test_bad_input_is_named(made):
    contexts = made[0]
    with pytest.raises(DataError, match="head weights"):
        Browser(Contexts(contexts.z, contexts.index))
    with pytest.raises(ConfigError, match="n_features=0"):
        Browser(contexts, n_features=0)
    with pytest.raises(DataError, match="every feature is dead"):
        Browser(Contexts(contexts.z * 0, contexts.index, contexts.w))


def test_visible_shows_what_cannot_be_seen():
    assert visible("a\u202eb\u200b\x00\n\t") == "a⟨U+202E⟩b⟨U+200B⟩⟨U+0000⟩\n\t"
    assert visible("x" * 30, 10) == "x" * 10 + " … (20 more characters)"
    assert visible("lone \ud800") == "lone ⟨U+D800⟩"
    assert visible("naïve 漢字 🙂") == "naïve 漢字 🙂" and visible(visible("\u2066")) == visible("\u2066")


def test_exported_lines_follow_their_schema(browser, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    n = write_jsonl(browser, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "features.jsonl").read_text().splitlines()]
    assert len(lines) == n == len(browser.shown) and json.loads((tmp_path / "schema.json").read_text()) == SCHEMA
    for line in lines:
        jsonschema.validate(line, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**lines[0], "kind": "odd"}, SCHEMA)
    apple = next(line for line in lines if line["feature"] == APPLE)
    assert apple["label"]["weights"]["apple"] > 0 and apple["scores"]["auroc"] > 0.9
    assert apple["examples"][0]["contribution"] == pytest.approx(apple["w"] * apple["examples"][0]["z"])
    assert json.loads((tmp_path / "summary.json").read_text())["features"]["dead"] == 40


def test_neuronpedias_layout(browser, tmp_path):
    write_neuronpedia(browser, tmp_path, model="sarm", source="3-reward")
    root = tmp_path / "sarm/3-reward"
    assert {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} == {
        "release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl", "features/batch-0.jsonl.gz",
        "activations/batch-0.jsonl.gz", "explanations/batch-0.jsonl.gz"}
    read = {name: [json.loads(line) for line in gzip.decompress((root / name / "batch-0.jsonl.gz").read_bytes()).split(
        b"\n") if line] for name in ("features", "activations", "explanations")}
    assert [row["index"] for row in read["features"]] == [str(f) for f in browser.shown]
    for row in read["activations"]:
        assert len(row["tokens"]) == len(row["values"]) > 0
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"]
        assert row["binMin"] <= row["maxValue"] + 1e-6 and row["maxValue"] <= row["binMax"] + 1e-6
    spoken = {str(f) for f, one in browser.labels.items() if not one.abstained}
    assert {row["index"] for row in read["explanations"]} == spoken
    before = {p: p.read_bytes() for p in root.rglob("*.gz")}
    write_neuronpedia(browser, tmp_path, model="sarm", source="3-reward")
    assert before == {p: p.read_bytes() for p in root.rglob("*.gz")}


def test_labels_that_a_person_or_a_model_made_need_no_judge(made):
    contexts, _, _, _, _ = made
    one = Browser(contexts, [Label(APPLE, "apples", kind="llm", self_grade=4)])
    page = one.feature(APPLE)
    assert "chat model" in page["source"] and "self-grade 4 of 5" in page["source"]
    assert page["no_errors"] == "no judge given" and page["badge_text"] == "○ not scored"
