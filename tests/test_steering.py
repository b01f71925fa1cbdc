"""Steering: scores by hand, the closed form against a forward pass, intervals, anybody's score table; explanations,
whose contributions sum to the reward exactly."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModel

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.sarm import steering as S
from sarmlib.sarm.attribution import explain, explain_pair
from sarmlib.sarm.model import ScalarRewardModel
from tests.planted import GOOD, SORRY, planted_world
from tests.tiny import conversation, tiny_config, tiny_sarm, tiny_tokenizer

# Three pairs, five features: feature 0 prefers chosen, 1 rejected, 2 neutral and strong, 3 rare, 4 dead.
CHOSEN = np.array([[1.0, 0, 5, 2, 0], [3, 0, 5, 0, 0], [2, 1, 5, 0, 0]])
REJECTED = np.array([[0.0, 4, 5, 0, 0], [0, 0, 5, 0, 0], [2, 3, 5, 0, 0]])


@pytest.fixture(scope="module")
def world():
    z, index, w, _ = planted_world()
    target = ((index["domain"] == "Safety") & (index["label"] == "chosen")).to_numpy()
    return S.SteeringAnalysis(z, index["reward"], w, index["prompt_id"]), index, target


@pytest.mark.parametrize("method, expected", [
    # c = 6 1 15 2, j = 2 7 15 0; mean over the four live features = 12
    ("sum", {0: 4 / 20, 3: 2 / 14, 2: 0.0, 1: -6 / 20}), ("code", {0: 4 / 17.6, 3: 2 / 11.6, 2: 0.0, 1: -6 / 17.6}),
    # c = 3 1 3 1, j = 1 2 3 0: responses, not magnitudes
    ("frequency", {0: 2 / 7.5, 3: 1 / 4.5, 2: 0.0, 1: -1 / 6.5})])
def test_the_papers_formula_by_hand(method, expected):
    table = S.feature_scores(CHOSEN, REJECTED, method)
    assert table.set_index("feature")["s"].to_dict() == pytest.approx(expected)  # the dead one has no score
    assert table.loc[table["feature"] == 0, "n_active"].item() == 4 and not table["eligible"].any()
    more = S.feature_scores(np.tile(CHOSEN, (4, 1)), np.tile(REJECTED, (4, 1)), method)
    assert more["feature"].iloc[-1] == 3 and more["eligible"].tolist() == [True] * 3 + [False]  # rare ones last
    with pytest.raises(DataError, match="no feature fires"):
        S.feature_scores(CHOSEN * 0, REJECTED * 0, method)


@torch.no_grad()
@pytest.mark.parametrize("k", [4, None])
def test_closed_form_equals_the_forward_pass_of_the_edited_model(k):
    sarm, ids = tiny_sarm(k=k), torch.randint(5, 40, (40, 9), generator=torch.Generator().manual_seed(1))
    output = sarm(ids, torch.ones_like(ids))
    rewards, z = output.logits[:, 0].double().numpy(), output.code.dense().numpy()
    analysis = S.SteeringAnalysis(z, rewards, sarm.score.weight.numpy(), np.arange(40))
    live = np.flatnonzero(z.any(axis=0)).tolist()
    factors = np.random.default_rng(0).uniform(-8, 20, 20).tolist()
    edits = [{feature: factor} for feature, factor in zip(live, factors, strict=False)]
    for factors in [*edits, {live[0]: 5.0, live[3]: 0.0}]:
        edited = S.steer(sarm, factors)(ids, torch.ones_like(ids)).logits[:, 0].double().numpy()
        np.testing.assert_allclose(analysis.steered(factors), edited, atol=1e-5, rtol=1e-5)


def test_bad_edits_and_a_head_trained_after_the_edit_are_refused():
    sarm = tiny_sarm()
    for factors, message in (({64: 2.0}, "0..63"), ({"3": 2.0}, "integer"), ({3: float("nan")}, "finite")):
        with pytest.raises(ConfigError, match=message):
            S.steer(sarm, factors)
    edited = S.steer(sarm, {3: 7.0})
    edited.score.weight.data[0, 3] += 1
    with pytest.raises(ModelError, match="no longer"):
        S.unsteer(edited)
    with pytest.raises(ModelError, match="score.weight"):
        S.steer(torch.nn.Linear(3, 1), {0: 2.0})


def test_shift_table_by_hand():
    table = S.table_from_scores([0.0, 1, 2, 3], [0.0, 3, 2, 3], [False, True, False, True], [True, True, False, False])
    shift = S.summarise_shift(table).set_index("set")
    assert shift.loc["T", ["shift", "share_unchanged", "n_active"]].tolist() == [1, 0.5, 1]
    assert shift.loc["C", "shift"] == 0 == shift.loc["C", "shift_lo"] and shift.loc["C", "share_active"] == 0.5


def test_intervals_resample_whole_prompts():
    rng = np.random.default_rng(0)
    jump = np.repeat(rng.normal(size=50), 20)  # the 20 responses to a prompt move together
    yes = np.ones(1000, bool)
    table = S.table_from_scores(np.zeros(1000), jump, yes, yes, group=np.repeat(np.arange(50), 20))
    row = S.summarise_shift(table).iloc[0]
    assert (row["shift_hi"] - row["shift_lo"]) / (2 * 1.96) == pytest.approx(jump.std() / 50**0.5, rel=0.15)


def test_matching_removes_an_effect_of_the_reward_and_keeps_a_real_one():
    rng = np.random.default_rng(0)
    target = np.arange(2000) < 1000
    reward = rng.normal(size=2000) + 1.5 * target  # T is better rewarded
    stretch = S.table_from_scores(reward, reward + 2 * (reward > 1), reward > 1, target)
    real = S.table_from_scores(reward, reward + 2 * target, target, target)
    fake, true = (S.matched_difference(t, n_boot=300) for t in (stretch, real))
    raw = (stretch["reward_steered"] - stretch["reward"]).groupby(stretch["is_target"]).mean()
    assert raw[True] - raw[False] > 0.8 and abs(fake["difference"]) < 0.25
    assert true["difference"] == pytest.approx(2) == true["lo"]
    for table, cut in ((stretch, 100), (stretch[target], None), (stretch[~target], None)):
        with pytest.raises(DataError, match="share no base reward"):
            S.matched_difference(table, cut)


def test_matching_by_hand_in_two_cells():
    # T has rewards 0 (moved by 4), 1, 1, 1 (not moved); the others 0 (not moved), 1 (moved by 2).
    hand = S.table_from_scores([0, 1, 1, 1, 0, 1], [4, 1, 1, 1, 0, 3], [True] * 6, [1, 1, 1, 1, 0, 0])
    cells = S.matched_difference(hand, n_boot=50)
    assert (cells["target_shift"], cells["other_shift"]) == pytest.approx((1.0, 1.5))  # others weighted 1/4, 3/4


GOOD_TABLE = {"reward": [0.0, 1, 2], "reward_steered": [0.0, 5, 2], "active": [False, True, False],
              "is_target": [True, True, False]}


@pytest.mark.parametrize("change, message", [
    ({"reward": [0.0, 1]}, "one value per response"), ({"reward_steered": [0.0, np.nan, 2]}, "NaN"),
    ({"reward": ["0", "one", "2"]}, "are numbers.*one"),
    ({"active": ["false", "true", "false"]}, "active must be true or false"),
    ({"active": [False, False, False]}, "although the feature is inactive")])
def test_bad_tables_are_named(change, message):
    assert len(S.table_from_scores(**GOOD_TABLE)) == 3
    with pytest.raises(DataError, match=message):
        S.table_from_scores(**GOOD_TABLE | change)


def test_credits_are_those_of_best_of_n_and_rows_follow_the_prompts(world):
    rows = pd.DataFrame({"subset": "s", "chosen": [[0], [0], [0], [0, 1]], "rejected": [[1, 2, 3]] * 3 + [[2, 3]]})
    rewards = np.array([[2.0, 1, 0, 0], [1, 1, 1, 1], [1, 2, 0, 0], [3, 1, 1, 0]])
    assert [S.row_credits(r, rows)[i] for i, r in enumerate(rewards)] == [1, 0.25, 0, 0.5]
    _, index, _ = world
    first = S.rows_from_index(index).iloc[0]
    assert (len(first["chosen"]), len(first["rejected"])) == (1, 3)
    assert index["prompt_id"].iloc[[*first["chosen"], *first["rejected"]]].nunique() == 1
    with pytest.raises(DataError, match="both a chosen"):
        S.rows_from_index(index[index["label"] == "chosen"])


def test_flips_and_picks_by_hand():
    base, active = np.array([0.0, 1, 0, 3, 1, 0]), np.array([1.0, 0, 1, 0, 0, 1])
    rows = pd.DataFrame({"subset": ["a", "a", "b"], "chosen": [[0], [2], [4]], "rejected": [[1], [3], [5]]})
    analysis = S.SteeringAnalysis(np.c_[active, base - active], base, [1.0, 1.0], np.repeat([0, 1, 2], 2))
    table = analysis.flips({0: 3.0}, rows).set_index("subset")  # +2 where the feature is active
    columns = ["n", "accuracy_before", "accuracy_after", "gained", "lost"]
    assert table.loc["a", columns].tolist() == [2, 0, 0.5, 1, 0] and table.loc["b", columns].tolist() == [1, 1, 0, 0, 1]
    assert table.loc["all", ["n", "gained", "lost"]].tolist() == [3, 1, 1]
    picks = S.best_of_n(base, analysis.steered({0: 3.0}), rows).set_index("subset")
    assert picks.loc["a"].tolist() == [2, 1, 0, 0.5] and picks.loc["b"].tolist() == [1, 1, 1, 0]


def test_dose_response_is_a_line_through_factor_one(world):
    analysis, index, target = world
    table = analysis.dose_response(SORRY, [-8, 0, 1, 2, 40], target, S.rows_from_index(index))
    shift = table[table["quantity"] == "shift T"].set_index("dose")
    assert shift.loc[1, "value"] == 0 and shift.loc[40, "value"] == pytest.approx(39 * shift.loc[2, "value"])
    assert (shift["lo"] <= shift["value"]).all() and (shift["value"] <= shift["hi"]).all()
    expected = analysis.steered({SORRY: 40})[target].mean() - analysis.rewards[target].mean()
    assert shift.loc[40, "value"] == pytest.approx(expected)
    accuracy = table[table["quantity"] == "accuracy Safety"].set_index("dose")["value"]
    assert accuracy.is_monotonic_increasing and accuracy[40] > accuracy[1]
    assert set(table["quantity"]) == {"shift T", "shift C", *(f"accuracy {s}" for s in index["domain"].unique())}


def test_controls_single_out_the_planted_feature_and_not_a_reward_feature(world):
    analysis, _, target = world
    table, good = analysis.controls(SORRY, 6.0, target)
    assert good["did_p_live"] == good["matched_did_p_live"] == pytest.approx(1 / 40)
    assert good["did_p_random"] == pytest.approx(1 / 201) and table["chosen"].sum() == 1
    size = np.sqrt(((analysis.steered({SORRY: 6.0}) - analysis.rewards) ** 2).mean())
    for feature, row in enumerate(table[:40].itertuples()):  # the first 40 features are the live ones
        unit = analysis.contribution(feature)
        moved = unit * size / np.sqrt((unit**2).mean())
        assert (row.t_shift, row.c_shift) == pytest.approx((moved[target].mean(), moved[~target].mean()))
    assert analysis.controls(GOOD, 6.0, target)[1]["matched_did_p_live"] > 0.04  # "well rewarded" is not safety
    ablated = analysis.controls(SORRY, 0.0, target)[0]
    assert ablated.loc[ablated["chosen"], "t_shift"].item() < 0
    with pytest.raises(DataError, match="changes no reward"):
        analysis.controls(SORRY, 1.0, target)


def test_scores_of_another_model_are_refused(world):
    analysis, index, _ = world
    with pytest.raises(DataError, match="another model"):
        S.SteeringAnalysis(analysis.z, analysis.rewards, analysis.w[::-1].copy(), index["prompt_id"])
    with pytest.raises(DataError, match="do not fit"):
        S.SteeringAnalysis(analysis.z, analysis.rewards, analysis.w[:-1], index["prompt_id"])
    S.SteeringAnalysis(analysis.z, analysis.rewards + 5, analysis.w, index["prompt_id"])  # a constant bias is none
    for feature in (500, -1):
        with pytest.raises(ConfigError, match="outside"):
            analysis.steered({feature: 2.0})


# Explanations

TALK = conversation("w5 w6", "w7 w8 w9")


@pytest.mark.parametrize("settings", [{}, {"topk": False}, {"k": None}, {"relu": False, "encoder_bias": True}])
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
    assert first.startswith(f"reward {found.reward:+.2f} at token '<eot>'")
    assert f"2 more features: {found.rest:+.2f}" in first
    assert header.split() == ["label", "feature", "z", "w", "contribution"]
    assert found.table["contribution"].sum() + found.rest == pytest.approx(found.reward, abs=1e-5)
    assert len(rows) == 2 and "politeness" in rows[0] and f"{found.table['z'][0]:+.2f}" in rows[0]
    assert (found.prompt, found.answers) == ("w5 w6", ("w7 w8 w9",))
    bare, = {str(explain(tiny_sarm(), tiny_tokenizer(), TALK[1:], labels=none)) for none in (None, {})}
    assert bare.splitlines()[1].split() == ["feature", "z", "w", "contribution"]  # no column without words
    same = explain_pair(tiny_sarm(), tiny_tokenizer(), "w5", "w6", "w6")  # every feature pays nothing
    assert str(same).startswith("margin +0.00 at token") and len(same.table) == 4 and "contribution" not in str(same)
    assert "4 of them adding 0" in str(same) and same.answers == ("w6", "w6")


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
