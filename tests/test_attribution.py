"""Contributions sum to the reward exactly."""

import pytest
import torch

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
    assert "reward" in found._repr_html_() and "&lt;eot&gt;" in found._repr_html_()


def test_top_keeps_the_largest_and_the_rest_completes_the_sum():
    found = explain(tiny_sarm(), tiny_tokenizer(), TALK, top=2, labels={0: "zero"})
    assert len(found.table) == 2 and found.n_active > 2 and "label" in found.table
    assert found.table["contribution"].sum() + found.rest == pytest.approx(found.reward, abs=1e-5)
    with pytest.raises(DataError, match="top"):
        explain(tiny_sarm(), tiny_tokenizer(), TALK, top=0)


def test_pair_differences_sum_to_the_margin():
    model, tokenizer = tiny_sarm(), tiny_tokenizer()
    found = explain_pair(model, tokenizer, "w5 w6", "w7 w8", "w9")
    one, other = (explain(model, tokenizer, conversation("w5 w6", answer)) for answer in ("w7 w8", "w9"))
    assert found.reward == pytest.approx(one.reward - other.reward, abs=1e-6)
    assert found.table["contribution"].sum() == pytest.approx(found.reward, abs=1e-5)
    assert set(found.table["feature"]) == set(one.table["feature"]) | set(other.table["feature"])
    assert not found.table.isna().any().any()


def test_a_model_without_features_cannot_be_explained():
    from sarmlib.sarm.model import ScalarRewardConfig

    model = ScalarRewardModel(ScalarRewardConfig(backbone_config=tiny_config()))
    with pytest.raises(ModelError, match="no sparse features"):
        explain(model, tiny_tokenizer(), TALK)


def test_a_head_that_is_not_linear_is_caught():
    class Shifted(type(tiny_sarm())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.tensor(0.01)
            return output

    model = tiny_sarm()
    model.__class__ = Shifted
    with pytest.raises(ModelError, match="contributions sum"):
        explain(model, tiny_tokenizer(), TALK)
