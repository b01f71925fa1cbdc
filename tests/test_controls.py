"""Controls of an edit: learned directions, chance over prompts, many features, best-of-n, SAFER's sums."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from sarmlib.errors import DataError
from sarmlib.sarm.controls import (
    best_of_n,
    compare_edits,
    control_edits,
    max_t,
    pareto,
    selection_directions,
    sentence_end_features,
)
from sarmlib.sarm.steering import SteeringAnalysis, rows_from_index
from tests.planted import GOOD, SORRY, planted_world


@pytest.fixture(scope="module")
def world():
    z, index, w, _ = planted_world()
    analysis = SteeringAnalysis(z, index["reward"], w, index["prompt_id"])
    target = ((index["domain"] == "Safety") & (index["label"] == "chosen")).to_numpy()
    return analysis, index, target, rows_from_index(index)


def test_directions_point_from_rejected_to_chosen():
    rng = np.random.default_rng(0)
    pos, neg = rng.random((200, 5)) * [1, 1, 1, 0, 1], rng.random((200, 5)) * [1, 1, 1, 0, 1]
    pos[:, 1] += 1.0
    neg[:, 2] += 1.0
    found = selection_directions(pos, neg)
    np.testing.assert_allclose(found["difference in means"], pos.mean(0) - neg.mean(0))
    for v in found.values():
        assert v[1] > 0 > v[2] and v[3] == 0, "a dead feature is in no direction"
    probe = found["logistic probe"]
    assert ((pos @ probe).mean() - (neg @ probe).mean()) > 0 and abs(probe[0]) < 0.3 * probe[1]


def test_every_control_has_the_size_of_the_edit_and_blind_ones_are_told_apart(world):
    analysis, index, target, rows = world
    lengths = np.random.default_rng(0).normal(size=len(target))
    changes = control_edits(analysis, SORRY, 8.0, {"same": np.eye(len(analysis.w))[SORRY]}, lengths)
    table = compare_edits(analysis, changes, target, rows, target_subsets=("Safety",)).set_index("edit")
    assert list(table.index) == [f"feature {SORRY}", "same", "reward stretch", "length"]
    chosen, same = table.iloc[0], table.loc["same"]
    assert chosen.did == pytest.approx(same.did) and chosen.matched_did == pytest.approx(same.matched_did)
    assert chosen.matched_did > 5 * abs(table.loc["length"].matched_did)
    assert chosen.matched_did > 2 * abs(table.loc["reward stretch"].matched_did)
    with pytest.raises(DataError, match="changes no reward"):
        compare_edits(analysis, {"a": changes["same"], "nothing": np.zeros(len(target))}, target)


def test_chance_over_prompts_keeps_the_planted_feature_and_nothing_that_ignores_safety(world):
    analysis, index, target, _ = world
    eligible = (index["label"] == "chosen").to_numpy()
    table = max_t(analysis, target, eligible, n_perm=300)
    assert table.feature.iloc[0] == SORRY and table.p_max.iloc[0] < 0.01
    assert table.set_index("feature").loc[GOOD, "p_max"] > 0.05, "a reward feature fires on all chosen answers alike"
    assert (table.p <= table.p_max + 1e-12).all() and (table.q >= table.p - 1e-12).all()
    prompts = np.random.default_rng(1).permutation(analysis.groups.max() + 1)[: len(set(analysis.groups[target]))]
    drawn = eligible & np.isin(analysis.groups, prompts)
    assert max_t(analysis, drawn, eligible, n_perm=300).p_max.iloc[0] > 0.05, "prompts at random"
    with pytest.raises(DataError, match="not eligible"):
        max_t(analysis, target, ~eligible, n_perm=5)


def test_the_front_holds_what_nothing_beats(world):
    analysis, index, target, rows = world
    table = pareto(analysis, [SORRY, GOOD], 1.0, rows, ("Safety",))
    assert set(table.features) == {1, 2} and table.front.any()
    for row in table.itertuples():
        better = table[(table.target_margin >= row.target_margin) & (table.worst_off_target >= row.worst_off_target)
                       & ((table.target_margin > row.target_margin) | (table.worst_off_target > row.worst_off_target))]
        assert row.front == (not len(better))
    one = table[table.features == 1].iloc[-1]
    moved = analysis.steered({SORRY: one.factor}) - analysis.rewards
    assert np.sqrt((moved**2).mean()) == pytest.approx(one["size"])
    safe = rows[rows.subset == "Safety"]
    margin = np.mean([moved[c].mean() - moved[r].mean() for c, r in zip(safe.chosen, safe.rejected, strict=True)])
    assert one.target_margin == pytest.approx(margin / analysis.rewards.std()) and margin > 0
    with pytest.raises(DataError, match="inside and outside"):
        pareto(analysis, [SORRY], 1.0, rows, ("Elsewhere",))


def test_best_of_n_by_hand():
    z = np.array([[1.0, 0], [0, 1], [0, 0.5], [1, 0], [0, 1]])
    analysis = SteeringAnalysis(z, z @ [1.0, 2.0], np.array([1.0, 2.0]), [0, 0, 0, 1, 1])
    rows = pd.DataFrame({"subset": ["a", "b"], "chosen": [[0], [4]], "rejected": [[1, 2], [3]]})
    table = best_of_n(analysis, {0: 5.0}, rows).set_index("subset")
    assert (table.loc["a", ["changed", "good_before", "good_after"]] == [1, 0, 1]).all()
    assert (table.loc["b", ["changed", "good_before", "good_after"]] == [1, 1, 0]).all()
    assert (best_of_n(analysis, {0: 1.0}, rows).changed == 0).all()


def test_features_are_summed_over_sentence_ends_alone():
    from sarmlib.extractor import position_rule
    from tests.tiny import tiny_sarm, tiny_tokenizer
    model, tokenizer = tiny_sarm(), tiny_tokenizer()
    talks = [[{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": " ".join(["w3"] * n)}]
             for n in (2, 9, 4)]
    summed = sentence_end_features(model, tokenizer, talks, batch_tokens=16).toarray()
    for talk, found in zip(talks, summed, strict=True):
        ids = torch.tensor([tokenizer.apply_chat_template(talk, return_dict=False)])
        mask = position_rule(tokenizer)(ids, torch.ones_like(ids))
        assert mask.sum() == 2  # both turns end
        with torch.no_grad():
            code = model.encode(model.model(input_ids=ids).last_hidden_state[mask])
        np.testing.assert_allclose(found, code.dense().sum(0).numpy(), atol=1e-5)
