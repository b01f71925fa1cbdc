import math

import numpy as np
import pytest
from scipy import sparse

from sarmlib.errors import ConfigError, DataError
from sarmlib.interpretation.contexts import Contexts
from sarmlib.interpretation.explainers import (
    KeywordExplainer,
    Vocabulary,
    describe,
    log_odds,
    shuffle_by_prompt,
)
from tests.planted import APPLE, LONG, planted_world


@pytest.fixture(scope="module")
def explainer():
    z, index, w, _ = planted_world()
    return KeywordExplainer(Contexts(z, index, w), seed=0)


def test_log_odds_by_hand():
    # 8 of 10 active, 2 of 20 inactive responses; background share 0.25, prior of 4 documents: a = 1, b = 3.
    delta = math.log(9 / 5) - math.log(3 / 21)
    expected = delta / math.sqrt(1 / 9 + 1 / 5 + 1 / 3 + 1 / 21)
    assert log_odds(8, 10, 2, 20, 0.25, 4.0) == pytest.approx((delta, expected))
    assert log_odds(2, 20, 8, 10, 0.25, 4.0) == pytest.approx((-delta, -expected))


def test_a_strong_prior_shrinks_and_equal_shares_score_zero():
    assert abs(log_odds(8, 10, 2, 20, 0.25, 1e6)[0]) < 0.05
    assert log_odds(5, 10, 10, 20, 0.5, 4.0)[0] == pytest.approx(0)


def test_the_planted_keyword_is_found_and_counted(explainer):
    label = explainer.explain(APPLE)
    assert not label.abstained and next(iter(label.weights)) == "apple" and "“apple”" in label.text
    first, rows = label.evidence[0], explainer.rows
    has = explainer.contexts.index["text"].iloc[rows].str.contains("apple").to_numpy()
    active = explainer.contexts.activation(APPLE)[rows] != 0
    assert (first["active"], first["n_active"]) == ((has & active).sum(), active.sum())
    assert (first["inactive"], first["n_inactive"]) == ((has & ~active).sum(), (~active).sum())
    assert label.p_value < 0.01 and first["score"] > 0 and label.weights["apple"] == first["delta"] > 0


def test_a_term_that_separates_perfectly_is_named_first():
    z, index, _, _ = planted_world()
    fires = index["text"].str.contains("apple").to_numpy()
    index["text"] += np.where(fires & (np.random.default_rng(0).random(len(fires)) < 0.8), " pear", "")
    label = KeywordExplainer(Contexts(sparse.csr_array(fires[:, None].astype(float)), index)).explain(0)
    assert next(iter(label.weights)) == "apple"


def test_a_length_feature_is_labelled_as_length(explainer):
    assert "longest fifth" in explainer.explain(LONG).text


def test_noise_features_make_the_explainer_abstain(explainer):
    labels = explainer.explain_all(range(4, 40))
    assert np.mean([label.abstained for label in labels]) > 0.8  # 5 % family-wise each
    silent = next(label for label in labels if label.abstained)
    assert silent.text == "no reliable lexical label" and not silent.weights and "null" in silent.reason


def test_dead_features_say_why(explainer):
    label = explainer.explain(79)
    assert label.abstained and "0 active" in label.reason


def test_shuffles_keep_the_number_of_labels_and_their_clustering():
    prompt = np.repeat(np.arange(200), 4)
    y = np.repeat(np.random.default_rng(0).random(200) < 0.3, 4)  # whole prompts fire
    shuffled = shuffle_by_prompt(y, prompt, 20, np.random.default_rng(1))
    assert (shuffled.sum(axis=1) == y.sum()).all() and (shuffled != y).any()
    sums = shuffled.reshape(20, 200, 4).sum(axis=2)
    assert set(np.unique(sums)) == {0, 4}
    chosen = np.tile([True, False, False, False], 200)  # the first response of every prompt fires
    moved = shuffle_by_prompt(chosen, prompt, 5, np.random.default_rng(1)).reshape(5, 200, 4)
    assert (moved.sum(axis=2) == 1).all() and 0.15 < moved[:, :, 0].mean() < 0.35


def test_a_feature_of_random_prompts_is_not_explained_by_their_topic_words():
    z, index, _, _ = planted_world()
    rng, prompts = np.random.default_rng(3), index["prompt_id"].unique()
    fires = np.column_stack([index["prompt_id"].isin(rng.choice(prompts, 70, replace=False)) for _ in range(20)])
    explainer = KeywordExplainer(Contexts(sparse.csr_array(fires.astype(float)), index))
    assert sum(not label.abstained for label in explainer.explain_all(range(20))) <= 4


def test_words_of_the_test_prompts_are_unknown(explainer):
    contexts = explainer.contexts
    index = contexts.index.copy()
    index.loc[contexts.rows("test"), "text"] += " zebra"
    fresh = KeywordExplainer(Contexts(contexts.z, index, split=contexts.split))
    assert "zebra" not in fresh.vocabulary.column and "apple" in fresh.vocabulary.column


def test_nested_and_duplicate_terms_are_kept_once():
    z, index, _, _ = planted_world()
    index["text"] = index["text"].str.replace("apple", "green apple pie")
    label = KeywordExplainer(Contexts(z, index)).explain(APPLE)
    about = [t for t in label.weights if {"green", "apple", "pie"} & set(t.split())]
    assert len(about) == 1
    some = np.random.default_rng(0).random(len(index)) < 0.6  # "apple and" nests, but is far from always there
    index["text"] = "and " + index["text"].str.replace("green apple pie", "apple")
    index["text"] = index["text"].where(~some, index["text"].str.replace("apple", "apple and"))
    label = KeywordExplainer(Contexts(z, index)).explain(APPLE)
    assert [t for t in label.weights if "apple" in t] == ["apple"]


def test_format_terms():
    texts = ["# Title\n- one\n- two", "```python\nx = 1\n```", "I'm sorry, no.", "Is it **so**?", "plain words only"]
    vocabulary = Vocabulary([*texts, "filler"], np.arange(1, 7), min_df=1)
    found = [vocabulary.terms(text, 3) for text in texts]
    assert {"[header]", "[list]"} <= found[0] and {"[code block]", "[digits]"} <= found[1]
    assert "[refusal opening]" in found[2] and {"[bold]", "[ends with a question]"} <= found[3]
    assert not {t for t in found[4] if t.startswith("[") and "fifth" not in t}


def test_the_label_is_a_template_of_its_terms():
    assert describe({"a b": 3.0, "[list]": 2.0, "x": -4.0}) == "more often: “a b”, list; less often: “x”"


def test_the_same_seed_gives_the_same_labels(explainer):
    again = KeywordExplainer(explainer.contexts, seed=0)
    assert again.explain(APPLE) == explainer.explain(APPLE)
    assert [one.abstained for one in explainer.explain_all([APPLE, 79])] == [False, True]


def test_bad_settings_are_named(explainer):
    with pytest.raises(ConfigError, match="at least 20"):
        KeywordExplainer(explainer.contexts, permutations=10)
    with pytest.raises(DataError, match="no term"):
        KeywordExplainer(explainer.contexts, min_df=10_000)


def test_lengths_that_were_cut_off_are_not_called_fifths():
    texts = [f"w{i % 7} w{i % 5}" for i in range(100)]
    cut = Vocabulary(texts, np.r_[np.arange(10, 40), np.full(70, 512)])
    assert not any("fifth" in name for name in cut.names)
    assert "[longer responses]" in cut.terms("w1", 512) and "[shorter responses]" in cut.terms("w1", 12)
    spread = Vocabulary(texts, np.arange(100))
    assert "[longest fifth]" in spread.terms("w1", 99) and "[shortest fifth]" in spread.terms("w1", 0)
    same = Vocabulary(texts, np.full(100, 7))
    assert not any(name.startswith("[short") or name.startswith("[long") for name in same.names)
