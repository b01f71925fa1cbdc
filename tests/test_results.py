"""Quantities behind the claims, against hand computations and planted values; each with a control that must differ."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from sarmlib import figures, results
from sarmlib.errors import DataError
from sarmlib.evaluation import rewardbench2, rm_bench
from sarmlib.evaluation.statistics import auroc, verdict
from sarmlib.pipeline import NO_PAIRS, Run, Scored
from sarmlib.sarm.steering import matched_difference, summarise_shift
from tests.helpers import shared_path
from tests.miniature import miniature, save_backbone

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """SARM and the scalar model in miniature, two seeds, trained in this process."""
    backbone = save_backbone(tmp_path_factory.mktemp("backbone"))
    profile = miniature(backbone, seeds=list(SEEDS), variants=["sarm", "scalar_full"],
                        **{"preferences.train_pairs": 48, "steering.bootstrap": 20, "interpretation.features": 4})
    run = Run(profile, root=tmp_path_factory.mktemp("runs"), progress=False)
    for method, *arguments in run.plan("labels"):
        getattr(run, method)(*arguments)
    return run


def best_of(subset, number, *scores):
    return {"id": str(number), "subset": subset, "scores": list(scores), "num_correct": 1}


A = [  # credits of two seeds: Safety 1, 0 / 1, 1; Focus 1/2, 0, 1 / 1, 0, 1
    [best_of("Safety", 0, 2, 1, 0), best_of("Safety", 1, 0, 1, 0), best_of("Focus", 2, 1, 1),
     best_of("Focus", 3, 0, 1), best_of("Focus", 4, 1, 0)],
    [best_of("Safety", 0, 2, 1, 0), best_of("Safety", 1, 3, 1, 0), best_of("Focus", 2, 2, 1),
     best_of("Focus", 3, 0, 1), best_of("Focus", 4, 1, 0)]]
B = [[{**row, "scores": [0.0, *[1.0] * (len(row["scores"]) - 1)]} for row in rows] for rows in A]  # always wrong
SCORE = np.mean([(1 / 2 + 1.5 / 3) / 2, (1 + 2 / 3) / 2])


def hand_made(**variants):
    """A run of two seeds whose RewardBench 2 rows are given by hand."""
    seeds = tuple(range(len(next(iter(variants.values())))))
    rows = {**dict.fromkeys(NO_PAIRS, B * len(seeds)), **variants}
    return SimpleNamespace(profile=SimpleNamespace(seeds=seeds, seed=0, variants=tuple(variants)),
                           scored=lambda variant, seed: Scored(rows[variant][seed], [], pd.DataFrame(), None),
                           benchmark_rows=lambda: {"rewardbench2": A[0], "rm_bench": []})


def test_difference_by_hand():
    stub = hand_made(sarm=A, token_sae=B)
    values, strata = results.units(stub, "sarm", "rewardbench2")
    np.testing.assert_array_equal(values, [[1, 0, 0.5, 0, 1], [1, 1, 1, 0, 1]])
    assert strata == ["Safety"] * 2 + ["Focus"] * 3
    gap = results.difference(stub, "sarm", "token_sae")
    assert gap.estimate == pytest.approx(SCORE) and gap.low < gap.estimate < gap.high
    assert results.difference(stub, "token_sae", "sarm").estimate == pytest.approx(-SCORE)
    same = results.difference(stub, "sarm", "sarm")
    assert same.estimate == 0 and verdict(same) == "undecided"  # no spread is no evidence
    table = results.differences(stub).iloc[0]
    assert table.variant == "token-level SAE" and table.value == pytest.approx(100 * SCORE)


def test_the_blind_control_gets_what_guessing_gets():
    stub, chance = hand_made(sarm=A, token_sae=B), ((1 / 3 + 1 / 3) / 2 + 1 / 2) / 2  # one of three, one of two
    assert results.difference(stub, "sarm", "token_sae", blind=True).estimate == pytest.approx(chance)
    table = results.against_chance(stub).set_index("variant")
    assert table.chance.tolist() == pytest.approx([100 * chance] * 4)
    assert table.verdict["token-level SAE"] == "not told from chance" and table.high.le(100).all()  # of five prompts


def test_missing_parts_and_benchmarks_are_named():
    rows = {"rewardbench2": [{"subset": "Safety"}, {"subset": "Ties"}],
            "rm_bench": [{"domain": "safety-refuse"}, {"domain": "code"}]}
    stub = SimpleNamespace(benchmark_rows=lambda: rows)
    assert results.missing_parts(stub) == {"rewardbench2": ["Factuality", "Precise IF", "Math", "Focus"],
                                           "rm_bench": ["chat", "math"]}
    with pytest.raises(DataError, match="no samples"):
        results.difference(hand_made(sarm=A), "sarm", "sarm", "rm_bench")


def test_score_table_is_the_benchmarks_own_scorers(run):
    table = results.score_table(run).set_index(["variant", "seed", "benchmark", "part"]).value
    assert not table.index.has_duplicates and results.missing_parts(run) == {"rewardbench2": [], "rm_bench": []}
    for variant, seed in (("sarm", 0), ("scalar_full", 1)):
        scored = run.scored(variant, seed)
        result = rewardbench2.score(scored.rewardbench2)
        assert table[variant, seed, "rewardbench2", "overall"] == pytest.approx(result["overall"])
        assert table[variant, seed, "rewardbench2", "Safety"] == result["subsets"]["Safety"]
        result = rm_bench.score(scored.rm_bench)
        for part, name in (("overall", "total_avg_acc"), ("chat", "chat"), ("hard_acc", "hard_acc")):
            assert table[variant, seed, "rm_bench", part] == pytest.approx(result[name])
    for name in ("rewardbench2", "rm_bench"):
        gap = results.difference(run, "sarm", "scalar_full", name).estimate
        mean = table.xs(name, level="benchmark").xs("overall", level="part").groupby("variant").mean()
        assert gap == pytest.approx(mean["sarm"] - mean["scalar_full"], abs=1e-9)


def test_the_share_of_the_reward_under_reliable_labels(run, monkeypatch):
    features = [3, 5]
    table = pd.DataFrame({"feature": features, "reliable": [True, False], "auroc_matched": [0.6, 0.9],
                          "null_95": [0.7, 0.7], "label": ["a word", None]})
    monkeypatch.setattr(Run, "label_table", lambda self, seed: table)
    z = run.scored("sarm", 0).part("rm_bench")[1].toarray()
    parts = np.abs(z * run.head("sarm", 0))
    found = results.attributed(run).iloc[0]
    assert found.share == pytest.approx(parts[:, 3].sum() / parts.sum()) and found.share_harder == 0
    assert found.top == pytest.approx((parts.argmax(axis=1) == 3).mean()) and found.alive == (z != 0).any(axis=0).sum()
    control = results.attributed(run, tested=False).iloc[0]
    assert (control.reliable, control.share_harder) == (1, pytest.approx(found.share))


def test_tables_hold_every_variant(run):
    table = results.variant_table(run)
    assert table.variant.tolist() == ["SARM", "scalar, full depth", "decoder, no pairs", "whole decoder, no pairs"]
    assert np.isnan(table.pairs[2]) and table.rewardbench2[2] > 0  # it never saw a pair
    accuracies = [run.reward("sarm", seed).meta["eval_accuracy"] for seed in SEEDS]
    row = table.set_index("variant").loc["SARM"]
    assert row.pairs == pytest.approx(np.mean(accuracies))
    assert row.pairs_se == pytest.approx(np.std(accuracies, ddof=1) / np.sqrt(2))
    wide = results.part_table(run, "rewardbench2")
    assert list(wide.columns) == ["overall", *rewardbench2.SUBSETS] and list(wide.index) == table.variant.tolist()
    assert wide.loc["SARM", "overall"] == pytest.approx(100 * row.rewardbench2)
    assert set(results.reward_training(run).variant) == {"SARM", "scalar, full depth"}
    assert set(results.sae_table(run).positions) == {"sentence ends"}
    second = results.table2(run).set_index("variant").loc["SARM"]
    assert np.mean(second.points) == pytest.approx(second.value) and 0 <= second.lo <= second.value <= second.hi <= 100
    first = results.table1(run)
    assert set(first.subset) == {"overall", *rewardbench2.SUBSETS} and first.hi.max() <= 100
    assert first.set_index(["model", "subset"]).paper["SARM", "Math"] == 63.9


def test_pair_accuracy_is_that_of_training_and_half_of_the_shuffled_is_lost(run):
    for variant in ("sarm", "scalar_full"):
        assert results.pair_accuracy(run, variant, 0) == pytest.approx(run.reward(variant, 0).meta["eval_accuracy"])
    assert all(0.1 < results.pair_accuracy(run, "sarm", seed, shuffled=True) < 0.9 for seed in SEEDS)


def test_reward_is_the_sum_of_its_features_and_not_without_one(run):
    for seed in SEEDS:
        assert results.reward_sum_error(run, seed) < 1e-4
        assert results.reward_sum_error(run, seed, drop_feature=True) > 0.05


def test_sae_in_the_trained_model_is_the_pretrained_one_bit_by_bit(run, monkeypatch):
    assert results.changed_sae_tensors(run, 0) == 0
    assert results.changed_sae_tensors(run, 0, frozen=False) >= 2
    model = run.load_reward("sarm", 0)
    with torch.no_grad():
        model.sae.b_pre[3] = torch.nextafter(model.sae.b_pre[3], torch.tensor(9.0))
    monkeypatch.setattr(run, "load_reward", lambda variant, seed: model)
    assert results.changed_sae_tensors(run, 0) == 1


def test_weight_preference_auroc_on_planted_features():
    features = pd.DataFrame({"feature": range(6), "kind": ["usual"] * 4 + ["rare", "dead"],
                             "preference_corr": [0.2, 0.1, -0.1, -0.3, -0.9, np.nan],
                             "w": [3.0, 0.5, 0.5, -1.0, 9.0, 0.0]})
    assert results.weight_preference_auroc(features) == (1 + 1 + 1 + 0.5) / 4
    features.loc[1, "preference_corr"] = np.nan
    assert results.weight_preference_auroc(features) == 1.0


def test_cases_have_the_signs_of_their_side():
    labels = pd.DataFrame({"feature": range(5), "w": [1.0, -1, 2, -2, 3], "preference_corr": [0.1, -0.1, 0.2, 0.3, 0.3],
                           "contribution_sd": [0.1, 0.2, 0.3, 0.4, 0.5], "label": "x", "auroc": 0.9, "auroc_lo": 0.8,
                           "rate": 0.1, "verdict": "reliable", "auroc_other_label": 0.5})
    stub = SimpleNamespace(label_table=lambda seed: labels)
    found = results.case_studies(stub, 0)[["side", "feature"]].values.tolist()
    assert found == [["positive", 4], ["positive", 2], ["positive", 0], ["negative", 1]]


def test_what_the_paper_says_of_size_geometry_and_meaning_can_fail(run):
    assert results.size_ratio(run) < results.size_ratio(run, layer=run.shape["n_layers"])
    few = results.column_overlap(run, 0)
    assert 0 < few < 0.5 < results.column_overlap(run, 0, common=3.0)
    units, z = run.scored("sarm", 0).part("rm_bench")
    safety, fires = units.domain.str.startswith("safety").to_numpy(), z[:, [3]].toarray()[:, 0] != 0
    assert results.safety_rate(run, 0, 3) == pytest.approx(fires[safety].mean() - fires[~safety].mean())
    assert -1 <= results.safety_rate(run, 0) <= results.safety_rate(run, 0, 3)


def test_an_interval_of_factors_stays_positive():
    found = results.log_interval([0.75, 1.18, 2.13])
    assert found.low > 0 and found.estimate == pytest.approx((0.75 * 1.18 * 2.13) ** (1 / 3))
    assert results.log_interval([-1.0, 1.0]) == results.seed_interval([-1.0, 1.0])
    assert results.log_interval([2.0]) is None


def test_no_superiority_claim_passes_where_sarm_is_a_random_encoder(monkeypatch):
    rng, seeds = np.random.default_rng(0), (0, 1, 2)

    def rows(seed):
        return [best_of(("Safety", "Focus")[i % 2], i, *rng.normal(size=4)) for i in range(200)]

    same = {name: [rows(seed) for seed in seeds] for name in ("sarm", "random_encoder", "token_sae", "scalar_full")}
    stub = hand_made(**same)
    for other in ("random_encoder", "token_sae", "scalar_full"):
        assert verdict(results.difference(stub, "sarm", other)) != "holds"
    assert verdict(results.null_difference(stub)) != "holds"
    assert verdict(results.null_difference(hand_made(sarm=same["sarm"]))) != "holds"  # in a profile of SARM alone


def test_concepts_are_those_of_the_rows(run):
    table = results.concept_table(run, 0)
    assert {"SARM", "state coordinates"} <= set(table.representation) <= {"SARM", "state coordinates", "keyword labels"}
    assert {"task:math", "good", "style:markdown"} <= set(table.concept)
    scored = table[table.reason == ""]
    assert len(scored) and scored.auroc.between(0, 1).all()
    summary = results.concept_summary(table).set_index("representation")
    assert summary.auroc["SARM"] == pytest.approx(scored[scored.representation == "SARM"].auroc.mean())
    null = results.concept_null(run, 0)
    assert null.low <= null.estimate <= null.high and abs(null.estimate - 0.5) < 0.06


def test_steering_chooses_on_rm_bench_safety_and_moves_rewardbench2(run):
    one = results.steering(run, 0)
    units, z = run.scored("sarm", 0).part("rm_bench")
    safety = units.domain.str.startswith("safety").to_numpy()
    asked = set(one.units[one.units.domain == "Safety"].prompt_text)
    assert one.dropped == 0 and not asked & set(units[safety].prompt_text)
    c, j = (np.asarray(z[safety & (units.label == side).to_numpy()].sum(axis=0)).ravel()
            for side in ("chosen", "rejected"))
    s = (c - j) / (c + j + (c + j)[c + j > 0].mean())
    assert one.scores.s.iloc[0] == pytest.approx(s[one.feature]) and one.factor == run.profile.steering.factor
    assert set(one.units.benchmark) == {"rewardbench2"} and one.target.sum() == 8
    assert set(one.table.category) == {"T", "safety, rejected", "not safety"}
    title = results.steering_title(run, one)
    assert title.startswith(f"Steering feature {one.feature} (") and title.endswith(f"by a factor of {one.factor:g}")


def test_prompts_that_rewardbench2_asks_too_choose_nothing(run, monkeypatch):
    scored = run.scored("sarm", 0)
    units = scored.units.copy()
    question = units[(units.benchmark == "rewardbench2") & (units.domain == "Safety")].prompt_text.iloc[0]
    safety = (units.benchmark == "rm_bench") & units.domain.str.startswith("safety")
    first = units[safety].prompt_id.iloc[0]
    units.loc[units.prompt_id == first, "prompt_text"] = question.upper()
    monkeypatch.setattr(run, "scored", lambda variant, seed: dataclasses.replace(scored, units=units))
    one = results.steering(run, 0)
    assert one.dropped == 1 and one.selection[0].shape[0] == (safety & (units.label == "chosen")).sum() - 3
    units.loc[safety, "prompt_text"] = question
    with pytest.raises(DataError, match="no prompt is left"):
        results.steering(run, 0)


def test_closed_form_is_what_the_edited_model_says(run):
    one = results.steering(run, 0)
    found = results.steered_forward(run, one)
    assert found["closed_form_error"] < 1e-5 and found["inactive_change"] < 1e-5 and found["activation_change"] == 0
    broken = results.steered_forward(run, one, encoder=True)
    assert broken["inactive_change"] > 1e-4 and broken["activation_change"] > 1e-4


def test_shifts_by_hand(run):
    one = results.steering(run, 1)
    z = one.analysis.z[:, [one.feature]].toarray().ravel()
    change = 2.0 * run.head("sarm", 1)[one.feature] * z / one.analysis.rewards.std()
    assert one.shifts(3.0) == pytest.approx((change[one.target].mean(), change[~one.target].mean()))
    assert one.shifts(factor=1.0) == (0, 0)
    change = (one.factor - 1) / 2 * change
    assert one.moved_elsewhere() == pytest.approx(np.abs(change[~one.target]).mean())
    assert one.moved_elsewhere(every_weight=True) > one.moved_elsewhere()
    assert one.changed_choices(factor=1.0).sum() == 0 and one.changed_choices(factor=-1e6).sum() > 0
    found = results.changed_interval(run)
    assert found.estimate == pytest.approx(results.steering_table(run).changed.mean())
    assert 0 <= found.low <= found.estimate <= found.high < 1
    row = results.steering_table(run).set_index("seed").loc[1]
    assert row.feature == one.feature and (row.shift_T, row.shift_C) == pytest.approx(one.shifts())
    assert row.active_T == pytest.approx((z[one.target] != 0).mean())


@pytest.mark.parametrize("draw", [
    lambda run: figures.sae_training(results.sae_training(run, 0)),
    lambda run: figures.reward_training(results.reward_training(run)),
    lambda run: figures.feature_weights(results.feature_table(run, 0)),
    lambda run: figures.concepts(results.concept_table(run, 0)),
    lambda run: figures.figure3(results.steering(run, 0).table), lambda run: figures.table1(results.table1(run)),
    lambda run: figures.table2(results.table2(run)), lambda run: figures.differences(results.differences(run))])
def test_a_table_of_a_run_is_what_its_figure_draws(run, draw):
    assert len(draw(run).alt) > 40


def test_the_released_scores_give_the_published_shift_and_the_confound():
    folder = shared_path("data/real/sarm_official_scores")
    table = results.official_scores(folder / "80_safety_c.json", folder / "80_safety_C1.json")
    shift = summarise_shift(table).set_index("set")
    t, c = shift.loc["T"], shift.loc["C"]
    assert (t["n"], t["n_active"], c["n"], c["n_active"]) == (450, 132, 384, 27)
    assert t["share_active"] == pytest.approx(0.293, abs=5e-4) and t["shift"] == pytest.approx(0.853, abs=5e-4)
    assert (t["mean_before"], t["mean_after"]) == pytest.approx((4.516, 5.370), abs=1e-3)
    assert (c["mean_before"], c["mean_after"]) == pytest.approx((-1.179, -0.993), abs=1e-3)
    assert (t["shift_lo"], t["shift_hi"]) == pytest.approx((0.73, 0.98), abs=0.02)
    for inside, expected in ((table.is_target, 0.967), (~table.is_target, 0.981)):  # the reward tells it alone
        found = auroc(table.reward[inside & table.active], table.reward[inside & ~table.active])
        assert found == pytest.approx(expected, abs=1e-3)
    matched = matched_difference(table[table["category"] != "safety, rejected"], min_reward=5)
    assert (matched["n_target"], matched["n_other"]) == (241, 44)
    assert (matched["target_shift"], matched["other_shift"]) == pytest.approx((1.59, 1.54), abs=5e-3)
    assert matched["lo"] < 0 < matched["hi"] and t["shift"] - c["shift"] > 0.5
    assert "29.3 % of T moves" in figures.figure3(table).alt


@pytest.mark.parametrize("text", ["[1]", "{", json.dumps({"1": {"reward": 1.0}})])
def test_files_of_another_layout_are_named(tmp_path, text):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(DataError, match="scores.json is not in the authors' format"):
        results.official_scores(path, path)


def test_a_checkpoint_in_the_authors_layout_is_the_runs_own(run):
    folder, which = results.released_checkpoint(run)
    assert (folder / "config.json").exists() and (folder / "tokenizer.json").exists() and "not the authors'" in which
