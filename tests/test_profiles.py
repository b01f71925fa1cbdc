"""Profiles: typed, complete, honest about where they leave the paper."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from sarmlib import profiles
from sarmlib.errors import ConfigError, DataError
from sarmlib.profiles import Profile, load_profile, profile_names
from tests.helpers import shared_path

NAMES = {"gpu", "local", "paper-2b", "paper-3b", "paper-4b", "released", "smollm2", "toy"}


def load(name, **overrides):
    return load_profile(name, data="." if name in ("local", "smollm2") else None, **overrides)


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
    return re.sub(r"\s+", " ", text.replace("“", '"').replace("”", '"')).strip()


def test_every_profile_of_the_design_loads_and_has_a_reason_for_every_departure():
    assert NAMES <= set(profile_names())
    for name in profile_names():
        profile = load(name)
        assert profile.name == name and profile.description and profile.hardware and profile.cost
        hash(profile)  # frozen all the way down
        assert all(why for _, paper, _, why in profile.diff_from_paper() if paper != "not stated"), name
        assert {setting for setting, _ in profile.reasons} <= {"all", *profiles.STATED}, name
    toy = load("toy")
    assert toy.device == "cpu" and toy.workers == 2 and len(toy.seeds) == 3
    assert load("released").variants == ()  # trains nothing


@pytest.mark.parametrize("name", ["paper-2b", "paper-3b", "paper-4b"])
def test_paper_profiles_keep_every_value_the_paper_states(name):
    allowed = {"backbone.layer"} if name == "paper-3b" else set()  # 2.7B parameters need layer 21 of 28
    profile = load(name)
    assert {path for path, paper, *_ in profile.diff_from_paper() if paper != "not stated"} == allowed
    assert (profile.reward.lr, profile.reward.batch_size, profile.reward.epochs) == (4e-6, 512, 3.0)


def test_departures_are_listed_and_defaults_are_the_papers():
    diff = {path: (paper, here) for path, paper, here, _ in load("toy").diff_from_paper()}
    assert diff["reward.lr"] == ("0.000004", "0.0003") and diff["sae.vectors"] == ("50,000,000", "40,000")
    assert diff["backbone.source"] == ("Llama-3.1-8B-Instruct or Llama-3.2-3B-Instruct", "toy")
    assert "sae.expansion" not in diff and "sae.renorm_every" not in diff
    llm = profiles.Interpretation(explainer="llm")
    rest = Profile(name="x", description="", hardware="", cost="", interpretation=llm).diff_from_paper()
    assert len(rest) >= 10 and {paper for _, paper, *_ in rest} == {"not stated"}
    assert ("sae.steps", "not stated", "one pass over the vectors", "") in rest


def test_k_and_width_follow_the_papers_rule():
    sae = load("toy").sae
    assert [sae.k(d) for d in (4, 64, 128, 576, 4096)] == [1, 3, 6, 27, 192]
    assert [sae.n_features(d) for d in (64, 576, 4096)] == [1024, 9216, 65536]


def test_quotations_are_the_papers_words():
    paper = plain(shared_path("reference/paper.txt").read_text(encoding="utf-8"))
    stated = Path(profiles.__file__).read_text().partition("class Backbone")[2].partition("class Profile")[0]
    quotes = re.findall(r'# .*?"(.+)"$', stated, re.MULTILINE)
    assert len(quotes) >= 18
    quotes += [q for p in profiles.FOLDER.glob("*.yaml") for q in re.findall(r'"([^"]{12,})"', p.read_text())]
    assert len(quotes) > 30 and [quote for quote in quotes if plain(quote) not in paper] == []


@pytest.mark.parametrize("text, value", [("4e-6", 4e-6), ("'3e-4'", 3e-4), ("1", 1.0), ("1/1024", 1 / 1024)])
def test_numbers_that_yaml_reads_as_text_are_converted(tmp_path, text, value):
    lr = load_profile(write(tmp_path, f"reward: {{lr: {text}}}\n")).reward.lr
    assert lr == value and isinstance(lr, float)


@pytest.mark.parametrize("text, message", [
    ("reward: {lr: fast}", r"reward\.lr = 'fast': must be a valid number"),
    ("reward: {lr: .nan}", r"reward\.lr = nan: must be a finite number"),
    ("reward: {lr: 0}", r"reward\.lr = 0: must be greater than 0"),
    ("sae: {steps: 1.5}", r"sae\.steps = 1\.5: must be a valid integer"),
    ("sae: {k_ratio: 3/0}", r"sae\.k_ratio = '3/0': must be a valid number"),
    ("sae: {betas: [0.9, 1]}", r"sae\.betas\.1 = 1: must be less than 1"),
    ("sae: {relu: 'false'}", r"sae\.relu = 'false': must be a valid boolean"),
    ("sae: {expnsion: 16}", r"unknown setting 'sae\.expnsion'; did you mean 'expansion'"),
    ("1: 2", r"unknown setting '1'"),
    ("sae: 3", r"sae = 3: must be a valid dictionary"),
    ("seeds: []", r"seeds = \[\]"),
    ("seeds: [1, 1]", r"seeds = .*: must be distinct"),
    ("backbone: {revision: 1234567}", r"backbone\.revision = 1234567: must be a valid string"),
    ("name: ../elsewhere", r"name = '\.\./elsewhere'"),
    ("device: tpu", r"device = 'tpu': must be 'auto', 'cpu'"),
    ("{", "cannot be read"), ("seed: 1\nseed: 2", "given twice among .*seed"),
])
def test_bad_values_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_profile(write(tmp_path, text + "\n"))


def test_bad_files_are_refused(tmp_path):
    bad = tmp_path / "bad.yaml"
    for name, text, message in (("toys", "", "did you mean 'toy'"), ("../profiles/toy", "", "unknown profile"),
                                (tmp_path / "absent.yaml", "", "cannot be read"), (bad, "- 1\n", "as a mapping"),
                                (bad, "hardware: h\ncost: c\n", "'description' is missing")):
        bad.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_profile(name)


def test_overrides_change_one_value_and_leave_the_rest():
    base = load("toy")
    changed = load("toy", **{"sae.steps": 10, "reward.lr": "1e-3", "seeds": [7]})
    assert (changed.sae.steps, changed.reward.lr, changed.seeds) == (10, 1e-3, (7,))
    assert changed.sae.lr == base.sae.lr and changed.reward.head_lr == base.reward.head_lr
    assert load("toy") == base and base.sae.k_ratio == 3 / 64
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        load("toy", **{"sae.stps": 10})
    with pytest.raises(ConfigError, match="seed = .*must be a valid integer"):
        load("toy", **{"seed.x": 10})
    with pytest.raises(ValidationError):
        base.sae.lr = 1.0


def test_local_profile_asks_for_its_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("SARMLIB_DATA", raising=False)
    with pytest.raises(ConfigError, match="DATA=folder"):
        load_profile("local")
    with pytest.raises(ConfigError, match="does not exist"):
        load_profile("local", data=tmp_path / "absent")
    monkeypatch.setenv("SARMLIB_DATA", str(tmp_path))
    local = load_profile("local")
    assert local.data == str(tmp_path.resolve()) and load_profile("toy").data is None
    with pytest.raises(ConfigError, match="reads no data folder"):
        load_profile("toy", data=tmp_path)
    (tmp_path / "pairs").mkdir()
    assert local.folder("pairs") == tmp_path.resolve() / "pairs" and local.folder("rm_bench") is None
    with pytest.raises(DataError, match="no folder corpus/"):
        local.folder("corpus")
