"""Plans are arithmetic on shapes: the paper's sizes come out, and costs move as they must."""

from __future__ import annotations

import dataclasses

import pytest

from sarmlib.__main__ import main
from sarmlib.errors import ConfigError
from sarmlib.plan import lines, plan, sizes
from sarmlib.profiles import load_profile


@pytest.mark.parametrize("name, billions", [("paper-2b", 2.0), ("paper-3b", 2.7), ("paper-4b", 4.3)])
def test_the_papers_sizes_are_counted(name, billions):
    assert round(sizes(load_profile(name)).total / 1e9, 1) == billions  # Table 1


def test_the_other_depths_would_not_give_the_papers_sizes():
    for name, layer in (("paper-2b", 12), ("paper-3b", 19), ("paper-4b", 18)):
        profile = load_profile(name, **{"backbone.layer": layer})
        assert round(sizes(profile).total / 1e9, 1) not in (2.0, 2.7, 4.3)


def test_costs_scale_as_they_must():
    profile = load_profile("paper-4b")
    one, eight = (plan(profile, "h100", n).set_index("stage") for n in (1, 8))
    assert one.hours.sum() == pytest.approx(8 * eight.hours.sum())
    assert one.memory_gb["reward models"] > 80 > eight.memory_gb["reward models"]
    assert one.tokens["activations"] == 1e9 * (1 + ("token_sae" in profile.variants))  # "approximately 1B tokens"
    twice = dataclasses.replace(profile, seeds=(0, 1))
    assert plan(twice).set_index("stage").hours["reward models"] == pytest.approx(2 * one.hours["reward models"])
    assert "needs about" in lines(profile) and "needs about" not in lines(profile, devices=8)


def test_the_released_profile_trains_nothing():
    assert list(plan(load_profile("released")).stage) == ["download", "scores"]


def test_dry_run_starts_nothing(tmp_path, capsys):
    assert main(["reproduce", "--profile", "paper-4b", "--dry-run", "--hardware", "h200", "--devices", "2",
                 "--runs", str(tmp_path)]) == 0
    assert "4.28 B" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert main(["reproduce", "--profile", "toy", "--dry-run", "--runs", str(tmp_path)]) == 0
    assert main(["reproduce", "--profile", "paper-4b", "--dry-run", "--hardware", "abacus"]) == 1
    assert "choose h100" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="at least 1"):
        plan(load_profile("toy"), devices=0)
