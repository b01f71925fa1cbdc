import numpy as np
import pandas as pd
import pytest

from sarmlib.interpretation.ground_truth import match_concepts, shuffled_concepts
from tests.planted import APPLE, LONG, SORRY, planted_world


@pytest.fixture(scope="module")
def world():
    z, index, _, _ = planted_world()
    concepts = pd.DataFrame({"apology": index["text"].str.contains("sorry").to_numpy(),
                             "apple": index["text"].str.contains("apple").to_numpy(),
                             "long": (index["length"] > 24).to_numpy(),
                             "unrelated": np.random.default_rng(9).random(len(index)) < 0.3,
                             "never": np.zeros(len(index), bool)})
    return z, concepts, index["prompt_id"]


def test_every_planted_concept_finds_its_feature_on_other_prompts(world):
    table = match_concepts(*world, n_boot=100).set_index("concept")
    planted = table.loc[["apology", "apple", "long"]]
    assert planted["feature"].tolist() == [SORRY, APPLE, LONG]
    assert (planted["auroc"] > 0.95).all() and (planted["f1"] > 0.95).all()
    assert (planted["auroc_lo"] <= planted["auroc"] + 1e-12).all() and (planted["auroc"] <= planted["auroc_hi"]).all()
    never = table.loc["never"]
    assert pd.isna(never["feature"]) and np.isnan(never["auroc"]) and "20 needed" in never["reason"]


def test_choosing_among_many_features_gains_nothing_on_the_other_half(world):
    z, _, prompts = world
    rng = np.random.default_rng(0)
    concepts = pd.DataFrame({f"c{i}": rng.random(z.shape[0]) < 0.2 for i in range(20)})
    table = match_concepts(rng.random((z.shape[0], 300)), concepts, prompts, n_boot=50)
    assert abs(table["auroc"].mean() - 0.5) < 0.03


def test_signed_lets_a_neuron_mean_a_concept_by_being_low(world):
    _, concepts, prompts = world
    neuron = np.random.default_rng(0).normal(size=(len(concepts), 5))
    neuron[:, 2] -= 5 * concepts["apple"]
    plain = match_concepts(neuron, concepts[["apple"]], prompts, n_boot=10).iloc[0]
    signed = match_concepts(neuron, concepts[["apple"]], prompts, signed=True, n_boot=10).iloc[0]
    assert plain["auroc"] < 0.6 and signed["auroc"] > 0.95
    assert signed["feature"] == 2 and signed["f1"] > 0.9


def test_with_shuffled_concepts_nothing_is_found(world):
    z, concepts, prompts = world
    null = shuffled_concepts(z, concepts[["apple", "long"]], prompts, times=10)
    assert abs(null.mean() - 0.5) < 0.03 and null.std() > 0 and np.abs(null - 0.5).max() < 0.12
