"""What notebook 06 reads: the toy SARM in the authors' layout, or one sentence when the hub is needed and absent."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from sarmlib import analysis
from sarmlib.errors import OfflineError
from sarmlib.profiles import load_profile
from sarmlib.sarm.released import load_any, official_settings
from tests.tiny import tiny_sarm, tiny_tokenizer


def fake_run(tmp_path, profile="toy"):
    return SimpleNamespace(profile=load_profile(profile), store=SimpleNamespace(root=tmp_path),
                           tokenizer=tiny_tokenizer(), load_reward=lambda variant, seed: tiny_sarm())


def test_the_layout_gives_the_same_rewards_and_says_what_it_is(tmp_path):
    folder, which = analysis.released_checkpoint(fake_run(tmp_path))
    assert "not the authors' weights" in which and official_settings(folder)["source"]["layer"] == "config.json"
    ids = torch.tensor([tiny_tokenizer()("w1 w2 <eot>")["input_ids"]])
    with torch.no_grad():
        theirs, ours = load_any(folder).model(ids).logits, tiny_sarm()(ids).logits
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_without_a_hub_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("sarmlib.backbone._hub_reachable", lambda *a: False)
    with pytest.raises(OfflineError, match="cannot be reached; set"):
        analysis.released_checkpoint(fake_run(tmp_path, "released"))


def test_a_downloaded_folder_is_taken_as_it_is(tmp_path):
    run = fake_run(tmp_path, "released")
    local = dataclasses.replace(run.profile.backbone, source=str(tmp_path))
    run.profile = dataclasses.replace(run.profile, backbone=local)
    assert analysis.released_checkpoint(run)[0] == tmp_path
