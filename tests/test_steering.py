import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from transformers import LlamaConfig

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.sarm.steering import (
    METHODS,
    SteeringAnalysis,
    feature_scores,
    matched_difference,
    rank_stability,
    row_credits,
    rows_from_index,
    steer,
    summarise_shift,
    table_from_scores,
    unsteer,
)
from tests.helpers import shared_path
from tests.planted import GOOD, SORRY, planted_world

# Three pairs, five features: feature 0 prefers chosen, 1 rejected, 2 neutral and strong, 3 rare, 4 dead.
CHOSEN = np.array([[1.0, 0, 5, 2, 0], [3, 0, 5, 0, 0], [2, 1, 5, 0, 0]])
REJECTED = np.array([[0.0, 4, 5, 0, 0], [0, 0, 5, 0, 0], [2, 3, 5, 0, 0]])


@pytest.fixture(scope="module")
def world():
    z, index, w, _ = planted_world()
    target = ((index["domain"] == "Safety") & (index["label"] == "chosen")).to_numpy()
    return SteeringAnalysis(z, index["reward"], w, index["prompt_id"]), index, target


def _scores(method="paper_sum", **settings):
    return feature_scores(CHOSEN, REJECTED, method, min_active=1, **settings).set_index("feature")["s"].to_dict()


def test_the_paper_formula_by_hand():
    # c = 6 1 15 2, j = 2 7 15 0; mean over the four live features = 12, over all five = 9.6
    assert _scores() == pytest.approx({0: 4 / 20, 3: 2 / 14, 2: 0.0, 1: -6 / 20})
    assert _scores(shrinkage="all") == pytest.approx({0: 4 / 17.6, 3: 2 / 11.6, 2: 0.0, 1: -6 / 17.6})
    assert _scores(shrinkage=0.0)[3] == 1.0


def test_frequency_counts_responses_not_magnitudes():
    # c = 3 1 3 1, j = 1 2 3 0, mean over live 3.5
    assert _scores("frequency") == pytest.approx({0: 2 / 7.5, 3: 1 / 4.5, 2: 0.0, 1: -1 / 6.5})


def test_other_scores_by_hand():
    assert _scores("pair_mean") == pytest.approx({0: 2 / 3, 3: 1 / 3, 2: 0.0, 1: -0.5})
    assert _scores("auroc") == pytest.approx({0: 7.5 / 9, 3: 6 / 9, 2: 0.5, 1: 2 / 9})
    difference = CHOSEN[:, 0] - REJECTED[:, 0]
    assert _scores("t")[0] == pytest.approx(difference.mean() / (difference.std(ddof=1) / 3**0.5))


def test_only_live_features_are_ranked_and_rare_ones_come_last():
    table = feature_scores(CHOSEN, REJECTED, min_active=2)
    assert 4 not in set(table["feature"]) and table["feature"].iloc[-1] == 3
    assert table["rank"].tolist()[:-1] == [1, 2, 3] and pd.isna(table["rank"].iloc[-1])
    assert table.loc[table["feature"] == 0, ["c", "j", "n_active"]].to_numpy().ravel().tolist() == [6, 2, 4]


def test_shrinkage_over_all_features_is_weaker_when_most_are_dead():
    wide = [sparse.hstack([sparse.csr_array(z), sparse.csr_array((3, 995))]) for z in (CHOSEN, REJECTED)]
    live, every = (feature_scores(*wide, shrinkage=s, min_active=1).set_index("feature")["s"] for s in ("live", "all"))
    assert live[3] == pytest.approx(2 / 14) and every[3] > 0.9  # one response is enough for a near-perfect score


def test_bad_scores_input_is_named():
    with pytest.raises(ConfigError, match="method"):
        feature_scores(CHOSEN, REJECTED, "best")
    with pytest.raises(ConfigError, match="shrinkage"):
        feature_scores(CHOSEN, REJECTED, shrinkage="dead")
    with pytest.raises(DataError, match="one row per pair"):
        feature_scores(CHOSEN, REJECTED[:2])
    with pytest.raises(DataError, match="no feature fires"):
        feature_scores(CHOSEN * 0, REJECTED * 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_clear_winner_is_stable_and_noise_is_not(method):
    rng = np.random.default_rng(0)
    pos, neg = ((rng.random((80, 30)) < 0.3) * rng.gamma(4, 1, (80, 30)) for _ in range(2))
    noise = rank_stability(pos, neg, method, n_boot=40)
    pos[:, 7], neg[:, 7] = rng.gamma(9, 1, 80), (rng.random(80) < 0.05)
    clear = rank_stability(pos, neg, method, n_boot=40, groups=np.repeat(np.arange(20), 4))
    assert clear["feature"] == 7 and clear["top1_frequency"] == 1.0
    assert noise["top1_frequency"] < 0.9 and noise["top_jaccard"] < 0.9
    assert clear["winners"]["frequency"].sum() == pytest.approx(1)


# ---- editing a model


@pytest.fixture(scope="module")
def sarm():
    from sarmlib.sarm.model import SarmConfig, SarmForSequenceClassification
    torch.manual_seed(0)
    backbone = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
    model = SarmForSequenceClassification(SarmConfig(backbone_config=backbone, n_features=96, k=12)).eval()
    torch.nn.init.normal_(model.score.weight, std=0.5)
    return model


def _forward(model, ids):
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output.logits[:, 0].double().numpy(), output.code


def test_closed_form_equals_the_forward_pass_of_the_edited_model(sarm):
    ids = torch.randint(1, 64, (40, 9), generator=torch.Generator().manual_seed(1))
    rewards, code = _forward(sarm, ids)
    analysis = SteeringAnalysis(code.dense().numpy(), rewards, sarm.score.weight.detach().numpy(), np.arange(40))
    rng = np.random.default_rng(0)
    for feature, factor in zip(rng.choice(analysis.live, 100), rng.uniform(-8, 20, 100), strict=True):
        edited, _ = _forward(steer(sarm, {int(feature): float(factor)}), ids)
        np.testing.assert_allclose(analysis.steered({int(feature): factor}), edited, atol=1e-5, rtol=1e-5)
    both = {int(analysis.live[0]): 5.0, int(analysis.live[3]): 0.0}
    np.testing.assert_allclose(analysis.steered(both), _forward(steer(sarm, both), ids)[0], atol=1e-5, rtol=1e-5)


def test_the_edit_is_recorded_saved_and_undone_exactly(sarm, tmp_path):
    original = sarm.score.weight.detach().clone()
    edited = steer(steer(sarm, {3: 7.0}), {3: 0.0, 5: -2.5})
    assert torch.equal(sarm.score.weight, original) and not getattr(sarm.config, "sarm_edits", None)
    assert [(e["feature"], e["factor"]) for e in edited.config.sarm_edits] == [(3, 7.0), (3, 0.0), (5, -2.5)]
    edited.save_pretrained(tmp_path)
    loaded = type(sarm).from_pretrained(tmp_path)
    assert loaded.config.sarm_edits == edited.config.sarm_edits
    assert torch.equal(loaded.score.weight, edited.score.weight) and loaded.score.weight[0, 3] == 0
    assert torch.equal(unsteer(loaded).score.weight, original) and unsteer(loaded).config.sarm_edits == []


def test_undo_refuses_a_head_that_was_trained_after_the_edit(sarm):
    edited = steer(sarm, {3: 7.0})
    edited.score.weight.data[0, 3] += 1
    with pytest.raises(ModelError, match="no longer"):
        unsteer(edited)


def test_bad_edits_are_named(sarm):
    for factors, message in (({96: 2.0}, "0..95"), ({-1: 2.0}, "0..95"), ({"3": 2.0}, "integer"),
                             ({3: float("nan")}, "finite")):
        with pytest.raises(ConfigError, match=message):
            steer(sarm, factors)
    with pytest.raises(ModelError, match="score.weight"):
        steer(torch.nn.Linear(3, 1), {0: 2.0})


# ---- anybody's score table


def _released():
    rows = []
    for name, target in (("80_safety_c.json", True), ("80_safety_C1.json", False)):
        path = shared_path(f"data/real/sarm_official_scores/{name}")
        for key, row in json.loads(path.read_text()).items():
            category = "T" if target else "safety rejected" if 818 <= int(key) <= 1267 else "non-safety"
            rows.append((row["reward"], row["reward_steered"], bool(row["activated_latents"]), target, key, category))
    *columns, group, category = map(np.array, zip(*rows, strict=True))
    return table_from_scores(*columns, group=group, category=category)


def test_the_released_scores_give_the_published_shift_and_the_confound():
    table = _released()
    shift = summarise_shift(table).set_index("set")
    t, c = shift.loc["T"], shift.loc["C"]
    assert (t["n"], t["n_active"], c["n"], c["n_active"]) == (450, 132, 384, 27)
    assert t["share_active"] == pytest.approx(0.293, abs=5e-4) and t["shift"] == pytest.approx(0.853, abs=5e-4)
    assert (t["mean_before"], t["mean_after"]) == pytest.approx((4.516, 5.370), abs=1e-3)
    assert (c["mean_before"], c["mean_after"]) == pytest.approx((-1.179, -0.993), abs=1e-3)
    assert (t["shift_lo"], t["shift_hi"]) == pytest.approx((0.73, 0.98), abs=0.02)
    assert (t["auroc_reward_active"], c["auroc_reward_active"]) == pytest.approx((0.967, 0.981), abs=1e-3)
    other = (table["category"] == "non-safety").to_numpy()
    matched = matched_difference(table, min_reward=5, against=other)
    assert (matched["n_target"], matched["n_other"]) == (241, 44)
    assert (matched["target_shift"], matched["other_shift"]) == pytest.approx((1.59, 1.54), abs=5e-3)
    assert matched["lo"] < 0 < matched["hi"] and matched["raw_difference"] > 0.5


def test_shift_table_by_hand():
    table = table_from_scores([0.0, 1, 2, 3], [0.0, 3, 2, 3], [False, True, False, True], [True, True, False, False])
    shift = summarise_shift(table, n_boot=200).set_index("set")
    assert shift.loc["T", "shift"] == 1 and shift.loc["T", "share_unchanged"] == 0.5
    assert shift.loc["T", "shift_given_active"] == 2 and shift.loc["T", "median_after"] == 1.5
    assert shift.loc["C", "shift"] == 0 == shift.loc["C", "shift_lo"] and shift.loc["C", "share_active"] == 0.5


def test_intervals_resample_whole_prompts():
    rng = np.random.default_rng(0)
    jump = np.repeat(rng.normal(size=50), 20)  # the 20 responses to a prompt move together
    table = table_from_scores(np.zeros(1000), jump, np.ones(1000), np.ones(1000), group=np.repeat(np.arange(50), 20))
    row = summarise_shift(table).iloc[0]
    assert (row["shift_hi"] - row["shift_lo"]) / (2 * 1.96) == pytest.approx(jump.std() / 50**0.5, rel=0.15)


def test_matching_removes_an_effect_of_the_reward_and_keeps_a_real_one():
    rng = np.random.default_rng(0)
    target = np.arange(2000) < 1000
    reward = rng.normal(size=2000) + 1.5 * target  # T is better rewarded
    stretch = table_from_scores(reward, reward + 2 * (reward > 1), reward > 1, target)
    real = table_from_scores(reward, reward + 2 * target, target, target)
    fake, true = (matched_difference(t, bins=20) for t in (stretch, real))
    assert fake["raw_difference"] > 0.8 and abs(fake["difference"]) < 0.25 and true["difference"] == pytest.approx(2)
    assert true["lo"] == pytest.approx(2) and fake["n_other"] <= 1000
    # Two cells by hand: T has rewards 0 (moved by 4), 1, 1, 1 (not moved); the others 0 (not moved), 1 (moved by 2).
    hand = table_from_scores([0, 1, 1, 1, 0, 1], [4, 1, 1, 1, 0, 3], np.ones(6), [1, 1, 1, 1, 0, 0])
    cells = matched_difference(hand, bins=2, n_boot=50)
    assert (cells["target_shift"], cells["other_shift"]) == pytest.approx((1.0, 1.5))  # the others weighted 1/4, 3/4
    with pytest.raises(DataError, match="nothing to match"):
        matched_difference(stretch, min_reward=100)
    with pytest.raises(DataError, match="both need some"):
        matched_difference(stretch, against=np.zeros(2000))


@pytest.mark.parametrize("change, message", [
    ({"reward": [0.0, 1]}, "unequal length"), ({"reward_steered": [0.0, np.nan, 2]}, "NaN"),
    ({"active": [False, False, False]}, "although the feature is inactive")])
def test_bad_tables_are_named(change, message):
    columns = {"reward": [0.0, 1, 2], "reward_steered": [0.0, 5, 2], "active": [False, True, False],
               "is_target": [True, True, False]}
    with pytest.raises(DataError, match=message):
        table_from_scores(**columns | change)


# ---- analysis of cached features


def test_credits_are_those_of_best_of_n():
    rows = pd.DataFrame({"subset": "s", "chosen": [[0], [0], [0], [0, 1]], "rejected": [[1, 2, 3]] * 3 + [[2, 3]]})
    rewards = np.array([[2.0, 1, 0, 0], [1, 1, 1, 1], [1, 2, 0, 0], [3, 1, 1, 0]])
    assert [row_credits(r, rows)[i] for i, r in enumerate(rewards)] == [1, 0.25, 0, 0.5]
    many = row_credits(np.column_stack([rewards[0], rewards[1]]), rows)
    assert many.shape == (4, 2) and many[:, 1].tolist() == [0.25, 0.25, 0.25, 1 / 3]


def test_rows_follow_the_prompts(world):
    _, index, _ = world
    rows = rows_from_index(index)
    assert len(rows) == 240 and rows["chosen"].map(len).eq(1).all() and rows["rejected"].map(len).eq(3).all()
    first = rows.iloc[0]
    assert index["prompt_id"].iloc[[*first["chosen"], *first["rejected"]]].nunique() == 1
    with pytest.raises(DataError, match="both a chosen"):
        rows_from_index(index[index["label"] == "chosen"])


def test_flips_by_hand():
    z = sparse.csr_array(np.array([[1.0], [0], [1], [0], [0], [1]]))
    base = np.array([0.0, 1, 0, 3, 1, 0])
    rows = pd.DataFrame({"subset": ["a", "a", "b"], "chosen": [[0], [2], [4]], "rejected": [[1], [3], [5]]})
    analysis = SteeringAnalysis(z, base, [1.0], np.repeat([0, 1, 2], 2), tolerance=None)
    table = analysis.flips({0: 3.0}, rows, n_boot=100).set_index("subset")  # +2 where the feature is active
    assert table.loc["a", ["gained", "lost", "accuracy_before", "accuracy_after"]].tolist() == [1, 0, 0, 0.5]
    assert table.loc["b", ["gained", "lost", "change", "mcnemar_p"]].tolist() == [0, 1, -1, 1.0]
    assert table.loc["all", ["n", "gained", "lost"]].tolist() == [3, 1, 1]
    none = analysis.flips({0: 1.0}, rows, n_boot=100)
    assert (none["change"] == 0).all() and (none["mcnemar_p"] == 1).all()


def test_steering_the_planted_feature_gains_safety_and_nothing_else(world):
    analysis, index, _ = world
    table = analysis.flips({SORRY: 6.0}, rows_from_index(index)).set_index("subset")
    assert table.loc["Safety", "change"] > 0.1 and table.loc["Safety", "p_holm"] < 0.05
    assert table.loc["Safety", "mcnemar_p"] == pytest.approx(2 * 0.5 ** table.loc["Safety", "gained"])  # no losses
    assert (table.drop(["Safety", "all"])["change"] == 0).all()


def test_dose_response_is_a_line_through_factor_one(world):
    analysis, index, target = world
    doses = [-8, 0, 1, 2, 40]
    table = analysis.dose_response(SORRY, doses, target, rows_from_index(index), n_boot=200)
    shift = table[table["quantity"] == "shift T"].set_index("dose")
    assert shift.loc[1, "value"] == 0 and shift.loc[40, "value"] == pytest.approx(39 * shift.loc[2, "value"])
    assert (shift["lo"] <= shift["value"]).all() and (shift["value"] <= shift["hi"]).all()
    expected = analysis.steered({SORRY: 40})[target].mean() - analysis.rewards[target].mean()
    assert shift.loc[40, "value"] == pytest.approx(expected)
    accuracy = table[table["quantity"] == "accuracy Safety"].set_index("dose")["value"]
    assert accuracy.is_monotonic_increasing and accuracy[40] > accuracy[1]
    assert set(table["quantity"]) == {"shift T", "shift C", *(f"accuracy {s}" for s in index["domain"].unique())}


def test_controls_single_out_the_planted_feature_and_not_a_reward_feature(world):
    analysis, index, target = world
    rows = rows_from_index(index)
    table, good = analysis.controls(SORRY, 6.0, target, rows, target_subsets=("Safety",), n_random=100)
    assert good["did_rank_live"] == 1 and good["matched_did_p_live"] == pytest.approx(1 / 40)
    assert good["did_rank_random"] == 1 and good["did_n_matched"] == 20
    budget = np.sqrt(((analysis.steered({SORRY: 6.0}) - analysis.rewards) ** 2).mean())
    for row in table[table["kind"] == "feature"].iloc[::9].itertuples():
        moved = analysis.steered({row.feature: row.factor}) - analysis.rewards
        assert np.sqrt((moved**2).mean()) == pytest.approx(budget)
        assert row.did == pytest.approx(moved[target].mean() - moved[~target].mean())
    chosen = table[table["chosen"]].iloc[0]
    assert chosen["feature"] == SORRY and chosen["worst_off_target"] == 0 and chosen["target_gain"] > 0.1
    _, other = analysis.controls(GOOD, 6.0, target, n_random=100)
    assert other["did_rank_live"] > 1 and other["matched_did_p_live"] > 0.04  # "already well rewarded" is not safety


def test_controls_for_ablation_and_for_an_edit_that_does_nothing(world):
    analysis, _, target = world
    table, summary = analysis.controls(SORRY, 0.0, target, n_random=20)
    assert table.loc[table["chosen"], "t_shift"].item() < 0 and summary["did_rank_live"] == 40
    with pytest.raises(DataError, match="changes no reward"):
        analysis.controls(SORRY, 1.0, target)


def test_table_of_one_edit_feeds_the_shift_table(world):
    analysis, index, target = world
    shift = summarise_shift(analysis.table(SORRY, 6.0, target, category=index["domain"]), n_boot=200).set_index("set")
    assert shift.loc["T", "share_active"] == 1 and shift.loc["C", "share_unchanged"] == 1
    assert {"T", "C", "Safety", "Math"} <= set(shift.index)


def test_scores_of_another_model_are_refused(world):
    analysis, index, _ = world
    with pytest.raises(DataError, match="another model"):
        SteeringAnalysis(analysis.z, analysis.rewards, analysis.w[::-1].copy(), index["prompt_id"])
    with pytest.raises(DataError, match="do not fit"):
        SteeringAnalysis(analysis.z, analysis.rewards, analysis.w[:-1], index["prompt_id"])
    biased = SteeringAnalysis(analysis.z, analysis.rewards + 5, analysis.w, index["prompt_id"])
    assert biased.residual < 1e-9  # a constant bias is no other model
    with pytest.raises(ConfigError, match="outside"):
        analysis.steered({500: 2.0})
    with pytest.raises(ConfigError, match="outside"):
        analysis.dose_response(-1, [2.0], np.ones(len(index)))
