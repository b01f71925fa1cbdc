import math

import numpy as np
import pytest

from sarmlib.errors import ConfigError, DataError
from sarmlib.interpretation.explainers import PRIOR, KeywordExplainer, Vocabulary, log_odds, shuffle_by_prompt
from tests.planted import APPLE, LONG, contexts_of, planted_explainer, planted_world


@pytest.fixture
def explainer():
    return planted_explainer()


def test_log_odds_by_hand():
    # 8 of 10 active, 2 of 20 inactive responses; background share 0.25, prior of 20 documents: a = 5, b = 15
    assert PRIOR == 20
    delta = math.log(13 / 17) - math.log(7 / 33)
    expected = delta / math.sqrt(1 / 13 + 1 / 17 + 1 / 7 + 1 / 33)
    assert log_odds(8, 10, 2, 20, 0.25) == pytest.approx((delta, expected))
    assert log_odds(2, 20, 8, 10, 0.25) == pytest.approx((-delta, -expected))


def test_the_planted_keyword_is_found_and_counted(explainer):
    label = explainer.explain(APPLE)
    assert not label.abstained and next(iter(label.weights)) == "apple" and "“apple”" in label.text
    first, rows = label.evidence[0], explainer.rows
    has = explainer.contexts.index["text"].iloc[rows].str.contains("apple").to_numpy()
    active = explainer.contexts.activation(APPLE)[rows] != 0
    assert (first["active"], first["n_active"]) == ((has & active).sum(), active.sum())
    assert (first["inactive"], first["n_inactive"]) == ((has & ~active).sum(), (~active).sum())
    assert label.p_value < 0.01 and first["score"] > 0 and label.weights["apple"] == first["delta"] > 0
    assert KeywordExplainer(explainer.contexts, seed=0).explain(APPLE) == label


def test_length_is_named_and_noise_and_dead_features_abstain(explainer):
    assert "longest fifth" in explainer.explain(LONG).text
    labels = explainer.explain_all(range(4, 40))
    assert np.mean([label.abstained for label in labels]) > 0.8  # 5 % family-wise each
    silent = next(label for label in labels if label.abstained)
    assert silent.text == "no reliable lexical label" and not silent.weights and "null" in silent.reason
    assert "0 active" in explainer.explain(79).reason


def test_shuffles_keep_the_number_of_labels_and_their_clustering():
    prompt = np.repeat(np.arange(200), 4)
    y = np.repeat(np.random.default_rng(0).random(200) < 0.3, 4)  # whole prompts fire
    shuffled = shuffle_by_prompt(y, prompt, 20, np.random.default_rng(1))
    assert (shuffled.sum(axis=1) == y.sum()).all() and (shuffled != y).any()
    assert set(np.unique(shuffled.reshape(20, 200, 4).sum(axis=2))) == {0, 4}
    chosen = np.tile([True, False, False, False], 200)  # the first response of every prompt fires
    moved = shuffle_by_prompt(chosen, prompt, 5, np.random.default_rng(1)).reshape(5, 200, 4)
    assert (moved.sum(axis=2) == 1).all() and 0.15 < moved[:, :, 0].mean() < 0.35


def test_a_feature_of_random_prompts_is_not_explained_by_their_topic_words():
    z, index, _, _ = planted_world()
    rng, prompts = np.random.default_rng(3), index["prompt_id"].unique()
    fires = [index["prompt_id"].isin(rng.choice(prompts, 70, replace=False)) for _ in range(20)]
    explainer = KeywordExplainer(contexts_of(np.column_stack(fires), index))
    assert sum(not label.abstained for label in explainer.explain_all(range(20))) <= 4


def test_words_of_the_test_prompts_are_unknown(explainer):
    index = explainer.contexts.index.copy()
    index.loc[explainer.contexts.rows("test"), "text"] += " zebra"
    fresh = KeywordExplainer(contexts_of(explainer.contexts.z, index))
    assert "zebra" not in fresh.vocabulary.column and "apple" in fresh.vocabulary.column


def test_nested_terms_are_kept_once():
    z, index, _, _ = planted_world()
    index["text"] = index["text"].str.replace("apple", "green apple pie")
    label = KeywordExplainer(contexts_of(z, index)).explain(APPLE)
    assert len([t for t in label.weights if {"green", "apple", "pie"} & set(t.split())]) == 1


def test_words_formats_and_lengths_are_terms():
    texts = ["1. one\n2. two `x`", "**Bold** claim?", "I'm sorry, no", "plain words"] * 25
    vocabulary = Vocabulary(texts, np.arange(100))
    assert {"[list]", "[digits]"} <= vocabulary.terms(texts[0], 0)
    assert {"[bold]", "[ends with a question]", "bold claim"} <= vocabulary.terms(texts[1], 1)
    assert {"[refusal opening]", "i'm sorry"} <= vocabulary.terms(texts[2], 2)
    assert "[longest fifth]" in vocabulary.terms("x", 99) and "[shortest fifth]" in vocabulary.terms("x", 0)
    cut = Vocabulary(texts, np.r_[np.arange(10, 40), np.full(70, 512)])  # cut off: there are no fifths
    assert not any("fifth" in name for name in cut.names)


def test_bad_settings_are_named(explainer):
    with pytest.raises(ConfigError, match="at least 20"):
        KeywordExplainer(explainer.contexts, permutations=10)
    with pytest.raises(DataError, match="no term"):
        Vocabulary(["same"] * 10, np.full(10, 7))
