"""Quantities behind the claims, against hand computations and planted values; each with a control that must differ."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array

from sarmlib import analysis, gallery
from sarmlib.data.toyworld import pretrain
from sarmlib.errors import ConfigError, DataError
from sarmlib.evaluation import rewardbench2, rm_bench
from sarmlib.profiles import load_profile
from sarmlib.stages import Run, Scored
from tests.miniature import miniature, save_backbone
from tests.tiny import conversation

SEEDS = (0, 1)
VARIANTS = ["sarm", "token_sae", "random_encoder", "scalar_full"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four variants of the miniature, two seeds, trained in this process."""
    backbone = save_backbone(tmp_path_factory.mktemp("backbone"))
    small = {"preferences.train_pairs": 48, "steering.bootstrap": 20, "interpretation.features": 4}
    profile = miniature(backbone, seeds=list(SEEDS), variants=VARIANTS, **small)
    run = Run(profile, root=tmp_path_factory.mktemp("runs"), progress=False)
    for method, arguments, _ in run.plan("labels"):
        getattr(run, method)(*arguments)
    return run


@pytest.fixture(scope="module")
def one(run):
    """The steering experiment of seed 0."""
    return analysis.steering(run, 0)


# -- benchmarks ------------------------------------------------------------------------------------------------------

def test_score_table_is_the_benchmarks_own_scorers(run):
    table = analysis.score_table(run).set_index(["variant", "seed", "benchmark", "part"]).value
    assert analysis.present(run) == ["rewardbench2", "rm_bench"] and not table.index.has_duplicates
    for variant, seed in (("sarm", 0), ("scalar_full", 1)):
        scored = run.scored(variant, seed)
        result = rewardbench2.score(scored.rewardbench2)
        assert table[variant, seed, "rewardbench2", "overall"] == pytest.approx(result["overall"])
        assert table[variant, seed, "rewardbench2", "Safety"] == result["subsets"]["Safety"]
        result = rm_bench.score(scored.rm_bench)
        for part, name in (("overall", "total_avg_acc"), ("chat", "chat"), ("hard_acc", "hard_acc")):
            assert table[variant, seed, "rm_bench", part] == pytest.approx(result[name])


def test_missing_parts_are_named():
    rows = {"rewardbench2": [{"subset": "Safety"}, {"subset": "Ties"}],
            "rm_bench": [{"domain": "safety-refuse"}, {"domain": "code"}]}
    stub = SimpleNamespace(benchmark_rows=lambda: rows)
    assert analysis.missing_parts(stub) == {"rewardbench2": ["Factuality", "Precise IF", "Math", "Focus"],
                                            "rm_bench": ["chat", "math"]}
    rows["rm_bench"] = []
    assert analysis.missing_parts(stub)["rm_bench"] == ["chat", "math", "code", "safety"]
    assert analysis.present(stub) == ["rewardbench2"]


def test_nothing_is_missing_from_the_toy_world(run):
    assert analysis.missing_parts(run) == {"rewardbench2": [], "rm_bench": []}


def best_of(subset, number, *scores):
    return {"id": str(number), "subset": subset, "scores": list(scores), "num_correct": 1}


A = [  # credits of two seeds: Safety 1, 0 / 1, 1; Focus 1/2, 0, 1 / 1, 0, 1
    [best_of("Safety", 0, 2, 1, 0), best_of("Safety", 1, 0, 1, 0), best_of("Focus", 2, 1, 1),
     best_of("Focus", 3, 0, 1), best_of("Focus", 4, 1, 0)],
    [best_of("Safety", 0, 2, 1, 0), best_of("Safety", 1, 3, 1, 0), best_of("Focus", 2, 2, 1),
     best_of("Focus", 3, 0, 1), best_of("Focus", 4, 1, 0)]]
B = [[{**row, "scores": [0.0, *[1.0] * (len(row["scores"]) - 1)]} for row in rows] for rows in A]  # always wrong


def hand_made(**variants):
    """A run of two seeds whose RewardBench 2 rows are given by hand."""
    seeds = tuple(range(len(next(iter(variants.values())))))
    return SimpleNamespace(profile=SimpleNamespace(seeds=seeds, variants=tuple(variants)),
                           scored=lambda variant, seed: Scored(variants[variant][seed], [], pd.DataFrame(), None),
                           benchmark_rows=lambda: {"rewardbench2": A[0], "rm_bench": []})


def test_difference_by_hand():
    stub = hand_made(a=A, b=B)
    values, strata = analysis.units(stub, "a", "rewardbench2")
    np.testing.assert_array_equal(values, [[1, 0, 0.5, 0, 1], [1, 1, 1, 0, 1]])
    assert strata == ["Safety"] * 2 + ["Focus"] * 3
    per_seed = [(1 / 2 + 1.5 / 3) / 2, (1 + 2 / 3) / 2]
    gap = analysis.difference(stub, "a", "b")
    assert gap.estimate == pytest.approx(np.mean(per_seed)) and gap.low < gap.estimate < gap.high
    assert analysis.difference(stub, "b", "a").estimate == pytest.approx(-gap.estimate)
    assert analysis.overall(stub, "a").estimate == pytest.approx(np.mean(per_seed))
    assert analysis.difference(stub, "a", "a")[:3] == (0, 0, 0)


def test_blind_control_gives_every_response_the_same_reward():
    chance = ((1 / 3 + 1 / 3) / 2 + 1 / 2) / 2  # one correct of three, of two
    gap = analysis.difference(hand_made(a=A, b=B), "a", "b", blind=True)
    assert gap.estimate == pytest.approx(chance)


def test_difference_on_the_miniature_equals_its_scores(run):
    table = analysis.score_table(run)
    for name in ("rewardbench2", "rm_bench"):
        mean = table[(table.benchmark == name) & (table.part == "overall")].groupby("variant").value.mean()
        gap = analysis.difference(run, "sarm", "scalar_full", name)
        assert gap.estimate == pytest.approx(mean["sarm"] - mean["scalar_full"], abs=1e-9)


def test_one_seed_gives_an_interval_over_prompts_alone():
    stub = hand_made(a=A[:1], b=B[:1])
    one = analysis.overall(stub, "a")
    assert one.estimate == pytest.approx((1 / 2 + 1.5 / 3) / 2) and one.low < one.estimate < one.high
    assert analysis.difference(stub, "a", "b").estimate == pytest.approx(one.estimate)


def test_no_rows_is_an_error_that_names_the_benchmark():
    with pytest.raises(DataError, match="no rows of rm_bench"):
        analysis.units(hand_made(a=A), "a", "rm_bench")


def test_tables_hold_every_variant(run):
    table = analysis.variant_table(run)
    assert table.variant.tolist() == [analysis.VARIANT_NAMES[v] for v in run.profile.variants]
    accuracies = [run.reward("sarm", seed).meta["eval_accuracy"] for seed in SEEDS]
    row = table.set_index("variant").loc["SARM"]
    assert row.pairs == pytest.approx(np.mean(accuracies))
    assert row.pairs_se == pytest.approx(np.std(accuracies, ddof=1) / np.sqrt(2))
    wide = analysis.part_table(run, "rewardbench2")
    assert list(wide.columns) == ["overall", *rewardbench2.SUBSETS] and list(wide.index) == table.variant.tolist()
    assert wide.loc["SARM", "overall"] == pytest.approx(100 * row.rewardbench2)
    curves = analysis.training_curves(run)
    assert set(curves.variant) == set(table.variant) and curves.accuracy.between(0, 1).all()
    second = analysis.table_2_rows(run).set_index("variant").loc["SARM"]
    assert np.mean(second.points) == pytest.approx(second.value) and second.lo <= second.value <= second.hi
    first = analysis.table_1_rows(run)
    assert set(first.model) == {"SARM", "scalar, full depth"}
    assert set(first.subset) == {"Overall", *rewardbench2.SUBSETS}


def test_pair_accuracy_is_that_of_training_and_half_of_the_shuffled_is_lost(run):
    for variant in ("sarm", "scalar_full"):
        assert analysis.pair_accuracy(run, variant, 0) == pytest.approx(run.reward(variant, 0).meta["eval_accuracy"])
    values = [analysis.pair_accuracy(run, "sarm", seed, shuffled=True) for seed in SEEDS]
    assert all(0.1 < value < 0.9 for value in values)


# -- the SAE and the reward ------------------------------------------------------------------------------------------

def test_reward_is_the_sum_of_its_features_and_not_without_one(run):
    for seed in SEEDS:
        assert analysis.reward_sum_error(run, seed) < 1e-4
        assert analysis.reward_sum_error(run, seed, drop_feature=True) > 0.05


def test_sae_in_the_trained_model_is_the_pretrained_one_bit_by_bit(run, monkeypatch):
    assert analysis.changed_sae_tensors(run, 0) == 0
    assert analysis.changed_sae_tensors(run, 0, positions="every") >= 2
    model = run.load_reward("sarm", 0)
    with torch.no_grad():
        model.sae.b_pre[3] = torch.nextafter(model.sae.b_pre[3], torch.tensor(9.0))
    monkeypatch.setattr(run, "load_reward", lambda variant, seed: model)
    assert analysis.changed_sae_tensors(run, 0) == 1


def test_decoder_columns_have_unit_length(run):
    assert analysis.decoder_norm_error(run, 0) < 1e-5
    assert analysis.decoder_norm_error(run, 0, stretch=1.5) == pytest.approx(0.5, abs=1e-4)


def test_sae_tables(run):
    table = analysis.sae_table(run)
    assert table[["positions", "seed"]].values.tolist() == [[rule, seed] for rule in ("sentence_end", "every")
                                                            for seed in SEEDS]
    trained = table.fvu[table.positions == "sentence_end"].max()
    assert table.fvu.gt(0).all() and analysis.untrained_sae_fvu(run) > trained
    log = analysis.sae_logs(run, 0)
    assert set(log.run) == {"sentence_end", "every"} and {"step", "loss"} <= set(log)
    assert analysis.held_out_states(run).shape[1] == run.shape["d_model"]


# -- features --------------------------------------------------------------------------------------------------------

def test_weight_preference_auroc_on_planted_features():
    features = pd.DataFrame({"feature": range(6), "kind": ["usual"] * 4 + ["rare", "dead"],
                             "preference_corr": [0.2, 0.1, -0.1, -0.3, -0.9, np.nan],
                             "w": [3.0, 0.5, 0.5, -1.0, 9.0, 0.0]})
    assert analysis.weight_preference_auroc(features) == (1 + 1 + 1 + 0.5) / 4
    assert analysis.weight_preference_auroc(features, w=-features.w.to_numpy()) == 0.5 / 4
    other = np.zeros(100)
    other[[0, 3]] = 1, 2
    assert analysis.weight_preference_auroc(features, w=other) == (1 + 0 + 0.5 + 0) / 4
    with pytest.raises(DataError, match="one direction only"):
        analysis.weight_preference_auroc(features[:2])
    features.loc[1, "preference_corr"] = np.nan
    assert analysis.weight_preference_auroc(features) == 1.0


def test_concepts_are_those_of_the_rows(run):
    long, summary = analysis.concept_table(run, 0)
    names = {"SARM", "token-level SAE", "random encoder", "state coordinates"}
    names |= {"keyword labels"} if any(label.weights for label in run.label_objects(0)) else set()
    assert set(long.representation) == names and set(summary.representation) == names
    assert {"task:math", "good", "style:markdown"} <= set(long.concept)
    scored = long[long.reason == ""]
    assert len(scored) and scored.auroc.between(0, 1).all()


def test_states_are_what_the_encoder_reads(run):
    states, z = run.states("sarm", 0), run.scored("sarm", 0).part("rm_bench")[1]
    code = run.load_reward("sarm", 0).encode(torch.from_numpy(states)).to_csr()
    np.testing.assert_allclose(code.toarray(), z.toarray(), atol=1e-4)
    assert run.states("sarm", 0) is states


def test_shuffled_concepts_are_found_by_nothing(run):
    null = analysis.concept_null(run, 0, times=8)
    assert null.low <= null.estimate <= null.high and abs(null.estimate - 0.5) < 0.06 and null.n == 8


def test_label_scores_stand_in_the_labels_column(run):
    scores, contexts = analysis.label_scores(run, 0), run.contexts(0)
    assert scores.shape == contexts.z.shape
    spoken = {label.feature for label in run.label_objects(0) if label.weights}
    assert set(np.flatnonzero(np.diff(scores.tocsc().indptr))) <= spoken


def test_the_browser_of_a_run(run, tmp_path, capsys):
    from sarmlib.__main__ import main
    browser, provenance = gallery.browser_of(run, 0, n_features=7)
    made = browser.write(tmp_path / "pages", provenance, n_pairs=3, progress=False)
    assert made["features"] == 7 and made["pairs"] == 3
    assert run.labels(0).key in (tmp_path / "pages/index.html").read_text()
    assert all(browser.pair(1, a, b)["exact"] for a, b in browser.pairs(50))  # the model's own rewards add up
    for command in ("browse", "export"):
        assert main([command, "--runs", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
        assert "has not been made" in capsys.readouterr().err
        assert main([command, "--seed", "77", "--output", str(tmp_path / "out")])
        assert "--seed 77" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_concepts_need_the_toy_world(run, monkeypatch):
    scored = run.scored("sarm", 0)
    bare = dataclasses.replace(scored, units=scored.units.assign(concepts=[()] * len(scored.units)))
    monkeypatch.setattr(run, "scored", lambda variant, seed: bare)
    monkeypatch.setattr(run, "_memo", {})
    with pytest.raises(ConfigError, match="no planted concepts"):
        analysis.concept_table(run, 0)


# -- steering --------------------------------------------------------------------------------------------------------

def test_steering_chooses_on_rm_bench_safety_and_moves_rewardbench2(run, one):
    units, z = run.scored("sarm", 0).part("rm_bench")
    safety = units.domain.str.startswith("safety").to_numpy()
    c, j = (np.asarray(z[safety & (units.label == side).to_numpy()].sum(axis=0)).ravel()
            for side in ("chosen", "rejected"))
    live = c + j > 0
    s = (c - j) / (c + j + (c + j)[live].mean())
    assert one.scores.s.iloc[0] == pytest.approx(s[one.feature]) and one.factor == run.profile.steering.factor
    assert set(one.units.benchmark) == {"rewardbench2"} and one.target.sum() == 8
    assert set(one.category) == {"T", "safety, rejected", "not safety"}


def test_closed_form_is_what_the_edited_model_says(run, one):
    found = analysis.steered_forward(run, one, n=60)
    assert found["closed_form_error"] < 1e-5 and found["inactive_change"] < 1e-5 and found["n_inactive"] > 0
    control = analysis.steered_forward(run, one, n=60, add=0.5)
    assert control["inactive_change"] == pytest.approx(0.5, abs=1e-4)
    assert control["closed_form_error"] == pytest.approx(0.5, abs=1e-4)


def test_shifts_by_hand(run):
    one = analysis.steering(run, 1)
    z = one.analysis.z[:, [one.feature]].toarray().ravel()
    change = 2.0 * run.head("sarm", 1)[one.feature] * z / one.analysis.rewards.std()
    assert one.shifts(factor=3.0) == pytest.approx((change[one.target].mean(), change[~one.target].mean()))
    assert one.shifts(factor=1.0) == (0, 0)
    table = analysis.steering_table(run).set_index("seed")
    assert list(table.index) == list(SEEDS) and table.feature[1] == one.feature
    assert (table.shift_T[1], table.shift_C[1]) == pytest.approx(one.shifts())
    assert table.active_T[1] == pytest.approx((z[one.target] != 0).mean())


def test_shuffled_target_moves_like_the_rest(one):
    everyone = dataclasses.replace(one, target=one.target.copy())
    assert everyone.shuffled_difference() == one.shuffled_difference()
    spread = [dataclasses.replace(one, seed=seed).shuffled_difference() for seed in range(200)]
    assert abs(np.mean(spread)) < 4 * np.std(spread) / np.sqrt(200)


def test_no_prompt_of_rewardbench2_chooses_the_feature(run, one):
    asked = set(one.units[one.units.domain == "Safety"].prompt_text)
    units = run.scored("sarm", 0).part("rm_bench")[0]
    units = units[units.domain.str.startswith("safety")]
    kept = units[~units.prompt_id.isin(analysis._asked_in(units, one.units[one.units.domain == "Safety"]))]
    assert not set(kept.prompt_text) & asked and one.selection[0].shape[0] == (kept.label == "chosen").sum()
    assert one.dropped == units.prompt_id.nunique() - kept.prompt_id.nunique()


def test_controls_and_chance_of_a_run(run, one):
    table = analysis.control_table(run, one)
    assert {"difference in means", "logistic probe", "reward stretch", "length"} < set(table.edit)
    assert table.edit[0] == f"feature {one.feature}"
    change = (one.factor - 1) * one.analysis.contribution(one.feature)
    assert table.did[0] == pytest.approx(change[one.target].mean() - change[~one.target].mean())
    chance = analysis.chance_table(one, n_perm=50)
    assert chance.p_max.between(1 / 51, 1).all() and set(chance.feature) <= set(one.analysis.live)


# -- figures ---------------------------------------------------------------------------------------------------------

ALWAYS = ["sae_training", "feature_density", "reward_training", "feature_weights", "concepts", "figure3",
          "shift_by_set", "doses", "pareto", "dose_response", "selectivity", "confound", "table1", "table2",
          "decoder_cosine", "subset_heat_map", "table1_dots", "differences", "calibration"]


@pytest.mark.parametrize("name", ALWAYS)
def test_every_figure_is_drawn_and_saved_with_its_numbers(run, one, name, monkeypatch):
    monkeypatch.setattr(analysis, "steering", lambda run, seed: one)  # the same for four figures
    assert gallery.show(run, name) is not None
    folder = gallery.folder(run)
    for suffix in ("png", "pdf", "csv", "txt"):
        assert (folder / f"{name}.{suffix}").stat().st_size > 0, suffix
    assert len(pd.read_csv(folder / f"{name}.csv")) and "seeds 0, 1" in (folder / f"{name}.txt").read_text()
    assert (folder / f"{name}.png").stat().st_size < 300_000
    if name == "table2":
        drawn = pd.read_csv(folder / "table2.csv").set_index("variant").value
        table = analysis.variant_table(run).set_index("variant").rewardbench2
        np.testing.assert_allclose(drawn[table.index], 100 * table, atol=1e-3)


def test_a_figure_that_a_run_cannot_have_says_why(run, tmp_path, capsys, monkeypatch):
    local = Run(load_profile("local", data=tmp_path), root=tmp_path / "runs", progress=False)
    assert gallery.show(local, "probe_report") is None and gallery.show(local, "concepts") is None
    assert gallery.show(run, "claims") is None
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("probe_report: only the toy world") and said[1].startswith("concepts: only the toy world")
    assert said[2] == "claims: no claim has been checked yet"
    assert not (tmp_path / "runs").exists()


def test_without_rewardbench2_its_figures_say_so(run, capsys, monkeypatch):
    scored = {}

    def part(variant, seed):
        if (variant, seed) not in scored:
            whole = real(variant, seed)
            units, z = whole.part("rm_bench")
            scored[variant, seed] = Scored([], whole.rm_bench, units, z)
        return scored[variant, seed]

    real, rows = run.scored, run.benchmark_rows()
    monkeypatch.setattr(run, "scored", part)
    monkeypatch.setattr(run, "benchmark_rows", lambda: {**rows, "rewardbench2": []})
    for name in ("table1", "figure3", "dose_response", "selectivity", "confound"):
        assert gallery.show(run, name) is None
        assert "RewardBench 2" in capsys.readouterr().out
    assert gallery.show(run, "table2") is not None  # falls back to RM-Bench


def test_probe_figure_reads_the_shipped_report(run, tmp_path, monkeypatch):
    rows = [(name, layer, model, 0.9) for name in ("arithmetic", "tone") for layer in (1, 2, 3)
            for model in ("pretrained", "random weights")]
    pd.DataFrame(rows, columns=["attribute", "layer", "model", "auroc"]).to_csv(tmp_path / "probe_report.csv")
    monkeypatch.setattr(pretrain, "BACKBONE_DIR", tmp_path)
    profile = dataclasses.replace(run.profile, backbone=dataclasses.replace(run.profile.backbone, source="toy"))
    toy = Run(profile, root=run.store.root, progress=False)
    toy.shape = run.shape
    assert gallery.show(toy, "probe_report") is not None
    drawn = pd.read_csv(gallery.folder(run) / "probe_report.csv")
    assert set(drawn.layer) == {run.shape["layer"]} and len(drawn) == 4


def test_labels_are_drawn_or_refused_with_a_reason(run, capsys):
    drawn = gallery.show(run, "label_auroc")
    assert (drawn is None) == capsys.readouterr().out.startswith("label_auroc: ")
    assert (drawn is None) == (not run.label_table(0).auroc.notna().any())


def test_scores_of_one_response_by_hand(run):
    from sarmlib.evaluation.scoring import score_conversations
    units, z = run.scored("sarm", 1).part("rm_bench")
    row = units.iloc[17]
    one = score_conversations(run.load_reward("sarm", 1), run.tokenizer, [conversation(row.prompt_text, row.text)],
                              max_length=128)
    assert one.rewards[0] == pytest.approx(row.reward, abs=1e-5)
    assert float((z[[17]] @ run.head("sarm", 1))[0]) == pytest.approx(row.reward, abs=1e-5)
    assert isinstance(z, csr_array)


def test_guessing_is_told_from_skill(run):
    table = analysis.against_chance(run)
    assert set(table.benchmark) == {"rewardbench2", "rm_bench"}
    guess = table.set_index("benchmark").chance
    assert (guess["rm_bench"] == 50).all() and (guess["rewardbench2"] < 25).all()  # Ties: a constant reward gets 0
    inside = (table.low <= table.chance) & (table.chance <= table.high)
    assert (inside == (table.verdict == "not told from chance")).all()
