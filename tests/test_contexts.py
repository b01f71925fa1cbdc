import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from transformers import LlamaConfig

from sarmlib.chat import encode_conversations
from sarmlib.data.toyworld.tokenizer import build_tokenizer
from sarmlib.extractor import position_rule
from sarmlib.interpretation.contexts import Contexts, prompt_split, sentence_contexts
from tests.planted import SORRY, planted_contexts
from tests.tiny import tiny_sarm


@pytest.fixture
def contexts():
    return planted_contexts()


def test_adding_prompts_moves_no_old_prompt_and_the_seed_matters():
    index = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(200)]})
    first = prompt_split(index.iloc[:100])
    assert 40 < (first == "explain").sum() < 60 and 10 < (first == "tune").sum() < 30
    assert (prompt_split(index)[:100] == first).all()
    assert (prompt_split(index.iloc[:100], seed=1) != first).any()


def test_copies_of_a_prompt_go_together_but_other_numbers_are_other_prompts():
    texts = [f"What is the capital of land{i}?" for i in range(60)]
    index = pd.DataFrame({"prompt_id": range(120), "prompt_text": texts + [t.upper() + "  !!" for t in texts]})
    split = prompt_split(index)
    assert (split[:60] == split[60:]).all()
    sums = pd.DataFrame({"prompt_id": range(60), "prompt_text": [f"{i} + {i}?" for i in range(60)]})
    assert len(set(prompt_split(sums))) == 3
    two = pd.DataFrame({"prompt_id": np.repeat(np.arange(50), 2), "prompt_text": [f"text {i}" for i in range(100)]})
    assert (prompt_split(two)[::2] == prompt_split(two)[1::2]).all()  # one id with two texts stays whole


def test_feature_table_against_plain_dense_arithmetic(contexts):
    table, z = contexts.features(), contexts.z.toarray().astype(float)
    assert len(table) == z.shape[1] and set(table["kind"]) == {"dead", "rare", "usual"}
    assert (table["kind"] == "dead").sum() == 40 and table.loc[SORRY, "kind"] == "rare"
    assert table.loc[7, "contribution_sd"] == pytest.approx((contexts.w[7] * z[:, 7]).std(), abs=1e-6)
    assert table.loc[7, "rate"] == (z[:, 7] != 0).mean() and table.loc[7, "n_active"] == (z[:, 7] != 0).sum()
    assert np.isnan(table.loc[79, "preference_corr"])  # dead: no correlation rather than 0


def test_correlation_with_preference_is_within_the_prompt(contexts):
    some = np.random.default_rng(0).random(len(contexts.index)) < 0.6  # prompts with unequal numbers of responses
    drift = pd.factorize(contexts.index["prompt_id"])[0] * 0.1  # a feature that differs between prompts
    z = contexts.z[some] + sparse.csr_array(drift[some, None] * (np.arange(80) == 7))
    uneven = Contexts(z, contexts.index[some], contexts.w)
    within = [v - v.groupby(uneven.index["prompt_id"]).transform("mean")
              for v in (pd.Series(uneven.activation(7)), (uneven.index["label"] == "chosen").astype(float))]
    assert uneven.features().loc[7, "preference_corr"] == pytest.approx(np.corrcoef(*within)[0, 1], abs=1e-6)
    constant = np.random.default_rng(0).random(240)[contexts.prompt][:, None]
    assert np.isnan(Contexts(constant, contexts.index, [1]).features().loc[0, "preference_corr"])


def test_examples_cover_the_deciles_and_depend_on_the_seed_alone(contexts):
    shown = contexts.examples(7, per_decile=2)
    pd.testing.assert_frame_equal(shown, contexts.examples(7, per_decile=2))
    assert list(shown["decile"].unique()) == list(range(10, 0, -1))
    assert shown.groupby("decile")["z"].min().is_monotonic_increasing
    assert (shown["text"].to_numpy() == contexts.index["text"].to_numpy()[shown["row"]]).all()
    assert len(contexts.examples(79)) == 0
    assert (contexts.split[contexts.examples(7, split="test")["row"]] == "test").all()


def test_neighbours_fire_together_on_the_explain_split(contexts):
    near = contexts.neighbours(1, 5)
    assert len(near) == 5 and 1 not in set(near.feature) and near.jaccard.is_monotonic_decreasing
    explain = contexts.rows("explain")
    a, b = (contexts.activation(f)[explain] != 0 for f in (1, near.feature[0]))
    assert near.jaccard[0] == pytest.approx((a & b).sum() / (a | b).sum())
    assert contexts.neighbours(79).empty


TALKS = [[{"role": "user", "content": "You see goats. You see pens."}, {"role": "assistant", "content": text}]
         for text in ("One is Ardu. The emblem is lion. Many have asked the same before.", "One is Ardu.",
                      "Gladly.\n# Answer\n- You see doctors there.\n- This is known to most people here.")]


@pytest.fixture(scope="module")
def reader():
    tokenizer = build_tokenizer(4000)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
                         pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return tiny_sarm(config).eval(), tokenizer


def test_every_firing_sentence_of_the_answer_is_found_by_hand(reader):
    model, tokenizer = reader
    table = sentence_contexts(model, tokenizer, TALKS, range(model.config.n_features), per_decile=100)
    rule, expected = position_rule(tokenizer), {}
    for number, talk in enumerate(TALKS):
        ids = torch.tensor(encode_conversations(tokenizer, [talk]))
        prompt = tokenizer.decode(ids[0]).index(talk[1]["content"][:6])
        hidden = model.model(input_ids=ids).last_hidden_state[0]
        for end in rule(ids, torch.ones_like(ids))[0].nonzero()[:, 0].tolist():
            if len(tokenizer.decode(ids[0][:end + 1])) > prompt + 1:
                z = model.encode(hidden[end:end + 1]).to_csr().toarray()[0]
                for feature in np.flatnonzero(z):
                    expected[number, int(feature), round(float(z[feature]), 3)] = end == ids.shape[1] - 1
    found = {(row.conversation, row.feature, round(row.z, 3)): row.at_reward for row in table.itertuples()}
    assert found == expected and len(found) > 20
    words = {number: set(part.sentence.str.strip()) for number, part in table.groupby("conversation")}
    assert {"One is Ardu.", "The emblem is lion."} <= words[0]
    assert any(text.endswith("Many have asked the same before.<eot>") for text in words[0])
    assert not any("goats" in text or "pens" in text for texts in words.values() for text in texts)
