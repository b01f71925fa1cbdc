import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from sarmlib.errors import DataError
from sarmlib.interpretation.contexts import Contexts, assert_disjoint, check, prompt_split
from tests.planted import SORRY, planted_world


@pytest.fixture(scope="module")
def contexts():
    z, index, w, _ = planted_world()
    return Contexts(z, index, w)


def test_no_prompt_is_on_two_sides_and_shares_are_as_asked(contexts):
    sides = pd.Series(contexts.split).groupby(contexts.index["prompt_id"]).nunique()
    assert (sides == 1).all()
    share = pd.Series(contexts.split).value_counts(normalize=True)
    assert abs(share["explain"] - 0.5) < 0.1 and abs(share["tune"] - 0.2) < 0.1 and abs(share["test"] - 0.3) < 0.1


def test_adding_prompts_moves_no_old_prompt_and_the_seed_matters():
    index = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(200)]})
    first = prompt_split(index.iloc[:100])
    assert (prompt_split(index)[:100] == first).all()
    assert (prompt_split(index.iloc[:100], seed=1) != first).any()


def test_copies_of_a_prompt_go_together_but_other_numbers_are_other_prompts():
    texts = [f"What is the capital of land{i}?" for i in range(60)]
    index = pd.DataFrame({"prompt_id": range(120), "prompt_text": texts + [t.upper() + "  !!" for t in texts]})
    split = prompt_split(index)
    assert (split[:60] == split[60:]).all()
    sums = pd.DataFrame({"prompt_id": range(60), "prompt_text": [f"{i} + {i}?" for i in range(60)]})
    assert len(set(prompt_split(sums))) == 3


def test_one_id_with_two_texts_stays_whole():
    index = pd.DataFrame({"prompt_id": np.repeat(np.arange(50), 2), "prompt_text": [f"text {i}" for i in range(100)]})
    split = prompt_split(index)
    assert (split[::2] == split[1::2]).all()


def test_a_leak_is_refused(contexts):
    leaked = contexts.split.copy()
    leaked[0] = "test" if leaked[0] != "test" else "explain"
    with pytest.raises(DataError, match="split by prompt"):
        assert_disjoint(contexts.index, leaked)
    with pytest.raises(DataError, match="split by prompt"):
        Contexts(contexts.z, contexts.index, split=leaked)
    with pytest.raises(DataError, match="sum to 1"):
        prompt_split(contexts.index, {"a": 0.5, "b": 0.2})


def test_feature_table_against_plain_dense_arithmetic(contexts):
    table, z, index = contexts.features(rare=60), contexts.z.toarray().astype(float), contexts.index
    assert len(table) == z.shape[1] and set(table["kind"]) == {"dead", "rare", "usual"}
    assert (table["kind"] == "dead").sum() == 40 and table.loc[SORRY, "kind"] == "rare"
    some = np.random.default_rng(0).random(len(index)) < 0.6  # prompts with unequal numbers of responses
    drift = pd.factorize(index["prompt_id"])[0] * 0.1  # a feature that differs between prompts
    uneven = Contexts(contexts.z[some] + sparse.csr_array(drift[some, None] * (np.arange(80) == 7)), index[some])
    within = [v - v.groupby(uneven.index["prompt_id"]).transform("mean")
              for v in (pd.Series(uneven.activation(7)), (uneven.index["label"] == "chosen").astype(float))]
    assert uneven.features().loc[7, "preference_corr"] == pytest.approx(np.corrcoef(*within)[0, 1], abs=1e-6)
    i, y = 7, (index["label"] == "chosen").astype(float)
    within = [v - v.groupby(index["prompt_id"]).transform("mean") for v in (pd.Series(z[:, i]), y)]
    assert table.loc[i, "preference_corr"] == pytest.approx(np.corrcoef(*within)[0, 1], abs=1e-6)
    assert table.loc[i, "reward_corr"] == pytest.approx(np.corrcoef(z[:, i], index["reward"])[0, 1], abs=1e-6)
    assert table.loc[i, "contribution_sd"] == pytest.approx((contexts.w[i] * z[:, i]).std(), abs=1e-6)
    assert table.loc[i, "mean_active"] == pytest.approx(z[z[:, i] > 0, i].mean(), rel=1e-6)
    assert np.isnan(table.loc[79, "preference_corr"])  # dead: no correlation rather than 0


def test_a_feature_constant_within_prompts_has_no_preference_correlation():
    index = pd.DataFrame({"prompt_id": np.repeat(np.arange(30), 2), "domain": "d", "label": ["chosen", "rejected"] * 30,
                          "length": 5, "reward": 0.0, "text": "a"})
    z = np.repeat(np.random.default_rng(0).random(30), 2)[:, None]
    assert np.isnan(Contexts(z, index).features().loc[0, "preference_corr"])


def test_examples_cover_the_deciles_and_depend_on_the_seed_alone(contexts):
    shown = contexts.examples(7, per_decile=2)
    again = contexts.examples(7, per_decile=2)
    pd.testing.assert_frame_equal(shown, again)
    assert list(shown["decile"].unique()) == list(range(10, 0, -1))
    assert shown.drop_duplicates("decile")["n_in_decile"].sum() == (contexts.activation(7) != 0).sum()
    assert shown.groupby("decile")["z"].min().is_monotonic_increasing
    assert (shown["text"].to_numpy() == contexts.index["text"].to_numpy()[shown["row"]]).all()
    assert len(contexts.examples(79)) == 0
    only = contexts.examples(7, split="test")
    assert (contexts.split[only["row"]] == "test").all()


def test_signed_and_duplicate_entries_are_read_as_summed():
    index = pd.DataFrame({"prompt_id": [0, 1], "domain": "d", "label": "chosen", "length": 1, "reward": 0.0,
                          "text": ""})
    z = sparse.coo_array(([1.0, 2.0, 0.0, -1.0], ([0, 0, 1, 1], [3, 3, 0, 1])), shape=(2, 4))
    contexts = Contexts(z, index)
    assert contexts.activation(3).tolist() == [3, 0] and contexts.features()["n_active"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("change, message", [
    (lambda i: i.drop(columns="length"), "lacks"), (lambda i: i.iloc[1:], "rows"),
    (lambda i: i.assign(reward=np.nan), "reward"), (lambda i: i.assign(label="good"), "label")])
def test_bad_index_frames_are_named(contexts, change, message):
    with pytest.raises(DataError, match=message):
        check(contexts.z, change(contexts.index))


def test_bad_activations_and_weights_are_named(contexts):
    bad = contexts.z.copy()
    bad.data[0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        check(bad, contexts.index)
    with pytest.raises(DataError, match="w has 3"):
        Contexts(contexts.z, contexts.index, w=np.ones(3))
    with pytest.raises(DataError, match="outside"):
        contexts.activation(80)
