"""The decoder's own logits as a reward: planted words are found, and what they say is computed as the formula says."""

import numpy as np
import pytest

from sarmlib.evaluation.readout import read_out, vocabulary_readout


def test_words_that_go_with_chosen_answers_are_found_and_read_out():
    rng = np.random.default_rng(0)
    good = np.tile([1] * 3 + [0] * 3, 40)  # three chosen and three rejected answers to each of 40 prompts
    unembedding = rng.normal(size=(80, 16))
    unembedding[:2, 0], unembedding[2:4, 0], unembedding[4:, 0] = 4, -4, 0  # two words of praise, two of blame
    states = rng.normal(size=(240, 16))
    states[:, 0] = np.where(good, 3, -3)
    favoured, against, accuracy = vocabulary_readout(states, unembedding, [10], [11])
    assert set(favoured) <= {0, 1} and set(against) <= {2, 3} and accuracy > 0.99
    up, down = (np.log(np.exp(states @ unembedding[tokens].T).sum(axis=1)) for tokens in (favoured, against))
    np.testing.assert_allclose(read_out(states, unembedding, favoured, against), up - down)


def test_named_words_are_taken_when_they_do_better():
    rng = np.random.default_rng(1)
    states, unembedding = rng.normal(size=(60, 8)), rng.normal(size=(200, 8))
    states[:, 7] = np.tile([1] * 3 + [-1] * 3, 10)
    unembedding[:, 7] = 0
    unembedding[5], unembedding[6] = np.eye(8)[7], -np.eye(8)[7]
    favoured, against, accuracy = vocabulary_readout(states, unembedding, [5], [6])
    assert (favoured.tolist(), against.tolist(), accuracy) == ([5], [6], 1.0)


@pytest.mark.parametrize("states", [np.zeros((6, 4)), np.ones((12, 4))])
def test_states_that_are_all_equal_score_a_half(states):
    assert vocabulary_readout(states, np.eye(70, 4), [0], [1])[2] == 0.5
