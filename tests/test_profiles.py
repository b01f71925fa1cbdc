"""Profiles: typed, complete, honest about where they leave the paper."""

from __future__ import annotations

import ast
import dataclasses
import re

import pytest

from sarmlib import profiles
from sarmlib.errors import ConfigError
from sarmlib.profiles import PAPER, Profile, load_profile, profile_names
from tests.helpers import shared_path

NAMES = ["gpu", "local", "paper-2b", "paper-3b", "paper-4b", "released", "toy"]


def load(name, **overrides):
    return load_profile(name, data="." if name == "local" else None, **overrides)


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text("description: d\nhardware: h\ncost: c\n" + text)
    return path


def plain(text: str) -> str:
    """Paper text and its quotations in one spelling: no LaTeX, no spaces around the times sign."""
    text = text.replace("$", "").replace("\\times", "×").replace("\\frac{3}{64}", "3/64")
    text = re.sub(r"\\beta", "beta", text)
    text = re.sub(r"\^\{([^}]*)\}", r"^\1", text)
    text = re.sub(r"(\d)\s*[×x]\s*", r"\1x", text).replace("*", "")
    return re.sub(r"\s+", " ", text.replace("i -th", "i-th").replace("“", '"').replace("”", '"')).strip()


def test_every_profile_of_the_design_loads():
    assert profile_names() == NAMES
    for name in NAMES:
        profile = load(name)
        assert profile.name == name and profile.description and profile.hardware and profile.cost
        hash(profile)  # frozen all the way down


@pytest.mark.parametrize("name", ["paper-2b", "paper-3b", "paper-4b"])
def test_paper_profiles_keep_every_value_the_paper_states(name):
    allowed = {"backbone.layer"} if name == "paper-3b" else set()  # 2.7B parameters need layer 21 of 28
    assert {path for path, _, _ in load(name).diff_from_paper()} == allowed
    profile = load(name)
    assert (profile.sae.n_features(4096), profile.sae.k(4096)) == (65536, 192)
    assert (profile.reward.lr, profile.reward.batch_size, profile.reward.epochs) == (4e-6, 512, 3.0)


def test_toy_profile_lists_its_departures():
    diff = {path: (paper, here) for path, paper, here in load("toy").diff_from_paper()}
    assert diff["reward.lr"] == (4e-6, load("toy").reward.lr)
    assert diff["preferences.source"][1] == "toy"
    assert "sae.expansion" not in diff and "sae.renorm_every" not in diff
    toy = load("toy")
    assert toy.device == "cpu" and toy.workers == 2 and len(toy.seeds) == 3


def test_k_and_width_follow_the_papers_rule():
    sae = load("toy").sae
    assert [sae.k(d) for d in (4, 64, 128, 4096)] == [1, 3, 6, 192]
    assert [sae.n_features(d) for d in (64, 128, 4096)] == [1024, 2048, 65536]


def test_paper_values_are_those_of_the_defaults():
    """A field that is left out of a YAML file has the paper's value."""
    defaults = Profile(name="x", description="", hardware="", cost="", interpretation=profiles.Interpretation(
        explainer="llm"))
    assert defaults.diff_from_paper() == []


def test_quotations_are_the_papers_words():
    paper = plain(shared_path("reference/paper.txt").read_text(encoding="utf-8"))
    for path, (_, quote) in PAPER.items():
        assert plain(quote) in paper, path
    texts = [p.read_text() for p in profiles.FOLDER.glob("*.yaml")]
    tree = ast.parse(open(profiles.__file__).read())
    texts += [node.value.value for cls in tree.body if isinstance(cls, ast.ClassDef) for node in cls.body
              if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    quotes = [q for text in texts for q in re.findall(r'"([^"]{12,})"', text)]
    assert len(quotes) > 50
    assert [q for q in quotes if plain(q) not in paper] == []


def test_every_field_has_a_docstring():
    tree = ast.parse(open(profiles.__file__).read())
    classes = {c.name: c for c in tree.body if isinstance(c, ast.ClassDef)}
    for cls in (Profile, profiles.Backbone, profiles.Corpus, profiles.Sae, profiles.Preferences, profiles.Reward,
                profiles.Benchmarks, profiles.Interpretation, profiles.Steering):
        body = classes[cls.__name__].body
        for here, after in zip(body, body[1:] + [None], strict=True):
            if isinstance(here, ast.AnnAssign) and not dataclasses.is_dataclass(getattr(profiles, str(
                    getattr(here.annotation, "id", "")), None)):
                assert isinstance(after, ast.Expr), f"{cls.__name__}.{here.target.id} has no docstring"


@pytest.mark.parametrize("text, value", [("4e-6", 4e-6), ("'3e-4'", 3e-4), ("1", 1.0), ("1/1024", 1 / 1024)])
def test_numbers_that_yaml_reads_as_text_are_converted(tmp_path, text, value):
    lr = load_profile(write(tmp_path, f"reward: {{lr: {text}}}\n")).reward.lr
    assert lr == value and isinstance(lr, float)


@pytest.mark.parametrize("text, message", [
    ("reward: {lr: fast}", r"reward\.lr = 'fast': must be a number"),
    ("reward: {lr: .nan}", r"reward\.lr = nan: must be a finite number"),
    ("reward: {lr: true}", r"reward\.lr = True: must be a number"),
    ("reward: {lr: 0}", r"reward\.lr = 0\.0: must be above 0"),
    ("sae: {steps: 1.5}", r"sae\.steps = 1\.5: must be a whole number"),
    ("sae: {steps: 0}", r"sae\.steps = 0: must be at least 1"),
    ("sae: {k_ratio: 3/0}", r"sae\.k_ratio = '3/0': must be a number"),
    ("sae: {betas: [0.9]}", r"sae\.betas = \(0\.9,\): must be two"),
    ("sae: {relu: 'yes'}", r"sae\.relu = 'yes': must be true or false"),
    ("sae: {expnsion: 16}", r"unknown setting 'sae\.expnsion'; did you mean 'expansion'"),
    ("stering: {factor: 2}", r"unknown setting 'stering'; did you mean 'steering'"),
    ("sae: 3", r"sae must be a mapping"),
    ("seeds: 3", r"seeds = 3: must be a list"),
    ("seeds: [1, 1]", r"seeds = \(1, 1\): must be distinct"),
    ("variants: [sarm, magic]", r"variants = 'magic': must be among"),
    ("backbone: {revision: 1234567}", r"backbone\.revision = 1234567: must be text"),
    ("preferences: {label_noise: 1.5}", r"preferences\.label_noise = 1\.5: must be between 0 and 1"),
    ("device: tpu", r"device = 'tpu'"),
    ("dtype: int8", r"dtype = 'int8'"),
])
def test_bad_values_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_profile(write(tmp_path, text + "\n"))


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'toy'"):
        load_profile("toys")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(bad)
    bad.write_text("- 1\n")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_profile(bad)
    bad.write_text("hardware: h\ncost: c\n")
    with pytest.raises(ConfigError, match="'description' is missing"):
        load_profile(bad)


def test_overrides_change_one_value_and_leave_the_rest():
    base = load("toy")
    changed = load("toy", **{"sae.steps": 10, "reward": {"lr": "1e-3"}, "seeds": [7]})
    assert (changed.sae.steps, changed.reward.lr, changed.seeds) == (10, 1e-3, (7,))
    assert changed.sae.lr == base.sae.lr and changed.reward.head_lr == base.reward.head_lr
    assert load("toy") == base
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        load("toy", **{"sae.stps": 10})


def test_local_profile_asks_for_its_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("SARMLIB_DATA", raising=False)
    with pytest.raises(ConfigError, match="DATA=folder"):
        load_profile("local")
    with pytest.raises(ConfigError, match="does not exist"):
        load_profile("local", data=tmp_path / "absent")
    assert load_profile("local", data=tmp_path).data == str(tmp_path.resolve())
    monkeypatch.setenv("SARMLIB_DATA", str(tmp_path))
    assert load_profile("local").data == str(tmp_path.resolve())
    assert load_profile("toy").data is None
    with pytest.raises(ConfigError, match="reads no data folder"):
        load_profile("toy", data=tmp_path)


def test_profile_is_plain_data():
    toy = load("toy")
    assert toy.to_dict()["sae"]["k_ratio"] == toy.get("sae.k_ratio") == 3 / 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        toy.sae.lr = 1.0
