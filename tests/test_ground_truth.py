import numpy as np
import pandas as pd
import pytest

from sarmlib.errors import DataError
from sarmlib.interpretation.ground_truth import compare_representations, match_concepts, shuffled_concepts
from tests.planted import APPLE, LONG, SORRY, planted_world


@pytest.fixture(scope="module")
def world():
    z, index, _, quality = planted_world()
    concepts = pd.DataFrame({"apology": index["text"].str.contains("sorry").to_numpy(),
                             "apple": index["text"].str.contains("apple").to_numpy(),
                             "long": (index["length"] > 24).to_numpy(),
                             "unrelated": np.random.default_rng(9).random(len(index)) < 0.3,
                             "never": np.zeros(len(index), bool)})
    return z, concepts, index["prompt_id"]


def test_every_planted_concept_finds_its_feature(world):
    table = match_concepts(*world, n_boot=100).set_index("concept")
    assert [table.loc[c, "feature"] for c in ("apology", "apple", "long")] == [SORRY, APPLE, LONG]
    assert (table.loc[["apology", "apple", "long"], "auroc"] > 0.95).all()
    assert (table.loc[["apology", "apple", "long"], "f1"] > 0.95).all()
    assert (table["auroc_lo"].dropna() <= table["auroc"].dropna() + 1e-12).all()


def test_choosing_among_many_features_gains_nothing_on_the_other_half(world):
    z, _, prompts = world
    rng = np.random.default_rng(0)
    concepts = pd.DataFrame({f"c{i}": rng.random(z.shape[0]) < 0.2 for i in range(20)})
    noise = rng.random((z.shape[0], 300))
    table = match_concepts(noise, concepts, prompts, n_boot=50)
    assert table["auroc_select"].mean() > 0.58 and abs(table["auroc"].mean() - 0.5) < 0.03


def test_selection_and_scoring_use_different_prompts(world):
    z, concepts, prompts = world
    table = match_concepts(z, concepts, prompts, n_boot=10).set_index("concept")
    for name in ("apple", "long"):
        assert table.loc[name, "n_select"] + table.loc[name, "n_score"] == concepts[name].sum()


def test_a_rare_concept_gets_a_reason_and_no_score(world):
    row = match_concepts(*world, n_boot=10).set_index("concept").loc["never"]
    assert pd.isna(row["feature"]) and np.isnan(row["auroc"]) and "20 needed" in row["reason"]


def test_signed_lets_a_neuron_mean_a_concept_by_being_low(world):
    _, concepts, prompts = world
    neuron = np.random.default_rng(0).normal(size=(len(concepts), 5))
    neuron[:, 2] -= 5 * concepts["apple"]
    plain = match_concepts(neuron, concepts[["apple"]], prompts, n_boot=10).iloc[0]
    signed = match_concepts(neuron, concepts[["apple"]], prompts, signed=True, n_boot=10).iloc[0]
    assert plain["auroc"] < 0.6 and signed["auroc"] > 0.95
    assert (signed["feature"], signed["direction"]) == (2, -1) and signed["f1"] > 0.9 and signed["threshold"] < 0


def test_block_size_does_not_matter(world):
    a, b = (match_concepts(*world, n_boot=10, block=block) for block in (7, 512))
    pd.testing.assert_frame_equal(a, b)


def test_representations_are_compared_on_one_split(world):
    z, concepts, prompts = world
    noise = np.random.default_rng(1).random((len(concepts), 40))
    long, summary = compare_representations({"SAE": z, "random": noise}, concepts, prompts, n_boot=10)
    found = summary.set_index("representation")["n_found"]
    assert found["SAE"] == 3 and found["random"] == 0 and len(long) == 10


@pytest.mark.parametrize("change, message", [
    (lambda z, c, p: (z[:-1], c, p), "must be equal"), (lambda z, c, p: (z, c.astype(int), p), "boolean"),
    (lambda z, c, p: (z[:, 60:], c, p), "dead")])
def test_bad_input_is_named(world, change, message):
    with pytest.raises(DataError, match=message):
        match_concepts(*change(*world))


def test_with_shuffled_concepts_nothing_is_found(world):
    z, concepts, prompts = world
    null = shuffled_concepts(z, concepts[["apple", "long"]], prompts, times=10)
    assert abs(null.mean() - 0.5) < 0.03 and null.std() > 0 and np.abs(null - 0.5).max() < 0.12
