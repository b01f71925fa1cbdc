"""Contributions sum to the reward exactly."""

import pytest
import torch
from transformers import AutoModel

from sarmlib.errors import DataError, ModelError
from sarmlib.sarm.attribution import explain, explain_pair
from sarmlib.sarm.model import ScalarRewardModel
from tests.tiny import conversation, tiny_config, tiny_sarm, tiny_tokenizer

TALK = conversation("w5 w6", "w7 w8 w9")


@pytest.mark.parametrize("settings", [{}, {"topk": False}, {"relu": False, "encoder_bias": True}])
def test_every_active_feature_and_the_exact_sum(settings):
    model, tokenizer = tiny_sarm(**settings), tiny_tokenizer()
    found = explain(model, tokenizer, TALK)
    table = found.table
    assert table["contribution"].sum() == pytest.approx(found.reward, abs=1e-5)
    assert (table["z"] != 0).all() and table["feature"].is_unique and found.n_active == len(table)
    assert list(table["w"]) == model.score.weight[0, table["feature"].tolist()].tolist()
    assert table["contribution"].abs().is_monotonic_decreasing
    assert found.token == "<eot>" and found.rest == 0


def test_an_explanation_reads_well_as_text():
    found = explain(tiny_sarm(), tiny_tokenizer(), TALK, top=2, labels=dict.fromkeys(range(64), "politeness"))
    first, header, *rows = str(found).splitlines()
    assert first == (f"reward {found.reward:+.2f} at token '<eot>' = sum of 4 features "
                     f"(2 more features: {found.rest:+.2f})")
    assert header.split() == ["label", "feature", "z", "w", "contribution"]
    assert found.table["contribution"].sum() + found.rest == pytest.approx(found.reward, abs=1e-5)
    assert len(rows) == 2 and "politeness" in rows[0] and f"{found.table['z'][0]:+.2f}" in rows[0]
    same = explain_pair(tiny_sarm(), tiny_tokenizer(), "w5", "w6", "w6")  # every feature pays nothing
    assert str(same).startswith("margin +0.00 at token") and len(same.table) == 4 and "contribution +" not in str(same)
    assert str(same).endswith("= sum of 4 features (4 of them adding 0)")
    bare, = {str(explain(tiny_sarm(), tiny_tokenizer(), TALK, labels=none)) for none in (None, {})}
    assert bare.splitlines()[1].split() == ["feature", "z", "w", "contribution"]  # no column without words
    assert (found.prompt, found.answers, same.answers) == ("w5 w6", ("w7 w8 w9",), ("w6", "w6"))
    assert explain(tiny_sarm(), tiny_tokenizer(), TALK[1:]).prompt == ""


def test_pair_differences_sum_to_the_margin():
    model, tokenizer = tiny_sarm(), tiny_tokenizer()
    found = explain_pair(model, tokenizer, "w5 w6", "w7 w8", "")
    one, other = (explain(model, tokenizer, conversation("w5 w6", answer)) for answer in ("w7 w8", ""))
    assert found.reward == pytest.approx(one.reward - other.reward, abs=1e-5)
    assert found.table["contribution"].sum() == pytest.approx(found.reward, abs=1e-5)
    assert set(found.table["feature"]) == set(one.table["feature"]) | set(other.table["feature"])
    assert list(found.table) == ["feature", "z_chosen", "z_rejected", "w", "contribution"]
    assert not found.table.isna().any().any()


def test_what_cannot_be_explained_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ModelError, match="no sparse features"):
        explain(ScalarRewardModel.from_backbone(AutoModel.from_config(tiny_config())), tokenizer, TALK)
    with pytest.raises(DataError, match="top must be"):
        explain(tiny_sarm(), tokenizer, TALK, top=0)
    with pytest.raises(DataError, match="role 'user'"):
        explain(tiny_sarm(), tokenizer, TALK[:1])
    broken = tiny_sarm()
    broken.score.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="finite"):
        explain(broken, tokenizer, TALK)


def test_a_head_that_is_not_linear_is_caught():
    class Shifted(type(tiny_sarm())):
        def reward(self, hidden):
            reward, code = super().reward(hidden)
            return reward + torch.tensor(0.01), code

    model = tiny_sarm()
    model.__class__ = Shifted
    with pytest.raises(ModelError, match="contributions sum"):
        explain(model, tiny_tokenizer(), TALK)
