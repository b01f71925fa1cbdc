from types import SimpleNamespace

import numpy as np
import pytest

from sarmlib.evaluation.statistics import auroc, aurocs
from sarmlib.interpretation.explainers import Label
from sarmlib.interpretation.judges import KeywordJudge, auroc_bootstrap, held_out_sample, judge_labels
from tests.planted import APPLE, GOOD, LONG, SORRY, contexts_of, planted_explainer


def says(rule):
    """A judge whose scores are a function of the index rows."""
    return SimpleNamespace(score=lambda label, units: np.asarray(rule(units), float))


@pytest.fixture(scope="module")
def world():
    explainer = planted_explainer()
    return explainer.contexts, explainer, KeywordJudge(explainer.vocabulary)


@pytest.fixture(scope="module")
def judged(world):
    contexts, explainer, judge = world
    return judge_labels(contexts, explainer.explain_all(range(12)), judge, n_boot=500,
                        also=("matched", "neighbour")).set_index("feature")


def test_the_planted_keyword_is_reliable_on_unseen_prompts(judged):
    row = judged.loc[APPLE]
    assert row["auroc"] > 0.95 and row["reliable"] and row["verdict"] == "reliable"
    assert row["auroc_lo"] <= row["auroc"] <= row["auroc_hi"] and row["null_95"] < 0.65
    assert row["lift"] > 0.2 and row["q_value"] >= row["p_value"]
    assert row["auroc_matched"] > 0.9 and row["auroc_neighbour"] > 0.9


def test_a_label_no_better_than_length_or_reward_is_not_reliable(judged, world):
    row = judged.loc[LONG]
    assert row["auroc"] > 0.9 and not row["reliable"] and row["verdict"] == "not reliable: no better than length"
    oracle = says(lambda units: units["reward"])  # knows quality only as well as the reward does
    row = judge_labels(world[0], [Label(GOOD, "high quality", {"x": 1.0})], oracle, n_boot=300).iloc[0]
    assert row["auroc"] > 0.8 and row["best_trivial"] == "reward" and not row["reliable"]


def test_what_cannot_be_scored_stays_in_the_table_with_its_reason(judged, world):
    row = judged.loc[SORRY]
    assert row["n_pos"] < 30 and np.isnan(row["auroc"]) and "positives held out" in row["verdict"]
    silent = judged[judged["verdict"].str.startswith("abstained")]
    assert len(judged) == 12 and len(silent) >= 5 and silent["auroc"].isna().all() and not silent["reliable"].any()
    broken = says(lambda units: np.where(np.arange(len(units)) % 2, np.nan, 1.0))
    row = judge_labels(world[0], [Label(APPLE, "", {"a": 1.0})], broken, n_boot=50).iloc[0]
    assert "the judge failed on" in row["verdict"] and np.isnan(row["auroc"])


def test_wrong_extra_and_missing_terms_cost(world):
    """Oikarinen et al. 2025: a measure must fall when half of a label's meaning is taken away or some is added."""
    contexts, _, judge = world
    either = contexts.index["text"].str.contains(r"\bw3\b") | contexts.index["text"].str.contains("apple")
    both = contexts_of(either.to_numpy()[:, None], contexts.index)
    weights = {"apple": 5.0, "w3": 5.0}
    labels = [Label(0, "", one) for one in (weights, {"apple": 5.0}, {**weights, "w7": 5.0, "w9": 5.0, "w11": 5.0})]
    table = judge_labels(both, labels, judge, n_boot=50)
    assert table["auroc"][0] > max(table["auroc"][1:]) + 0.03
    swapped = Label(APPLE, "wrong", {"w3": 2.0, "w40": 1.0, "w51": 1.0})
    row = judge_labels(contexts, [swapped], judge, n_boot=300, also=("neighbour",)).iloc[0]
    assert abs(row["auroc"] - 0.5) < 0.12 and not row["reliable"] and "shuffled" in row["verdict"]
    assert row["auroc_neighbour"] < 0.65


def test_scores_come_from_the_test_split_alone(world):
    contexts, _, judge = world
    rows, positive = held_out_sample(contexts, APPLE)
    assert set(contexts.split[rows]) == {"test"} and positive.sum() <= 100
    assert ((contexts.activation(APPLE)[rows] != 0) == positive).all()
    seen = set()
    spy = says(lambda units: seen.update(units["prompt_id"]) or np.arange(len(units)))
    judge_labels(contexts, [Label(APPLE, "", {"apple": 1.0})], spy, n_boot=50)
    assert seen and not seen & set(contexts.index["prompt_id"][contexts.rows("explain")])


def test_harder_negatives_answer_the_same_prompts_or_fire_a_neighbour(world):
    contexts, _, _ = world
    for kind, same in (("matched", True), ("random", False)):
        rows, positive = held_out_sample(contexts, SORRY, kind)
        assert (set(contexts.prompt[rows][~positive]) <= set(contexts.prompt[rows][positive])) == same
    near = contexts.neighbours(APPLE, 5).feature
    rows, positive = held_out_sample(contexts, APPLE, "neighbour")
    assert np.any([contexts.activation(f)[rows[~positive]] for f in near], axis=0).all()
    assert held_out_sample(contexts, 79, "neighbour")[0].size == 0  # a dead feature has no neighbours


def test_many_aurocs_at_once_are_the_one_auroc_of_each():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 9, 60).astype(float), rng.random((20, 60)) < 0.4  # ties
    np.testing.assert_array_equal(aurocs(score, positive, ~positive), [auroc(score[p], score[~p]) for p in positive])
    assert np.isnan(aurocs(score, np.zeros((1, 60)), np.ones((1, 60))))


def test_cluster_bootstrap_against_plain_resampling():
    rng = np.random.default_rng(0)
    prompt, positive = np.repeat(np.arange(40), 4), rng.random(160) < 0.4
    score = np.round(positive + rng.normal(size=160) + np.repeat(rng.normal(size=40), 4), 1)  # with ties
    fast = auroc_bootstrap(score, positive, prompt, 2000, np.random.default_rng(1))
    plain, draw = [], np.random.default_rng(2)
    for _ in range(1000):
        rows = np.concatenate([np.flatnonzero(prompt == p) for p in draw.integers(40, size=40)])
        plain.append(auroc(score[rows][positive[rows]], score[rows][~positive[rows]]))
    assert fast.mean() == pytest.approx(np.mean(plain), abs=0.01)
    assert fast.std() == pytest.approx(np.std(plain), rel=0.15)
