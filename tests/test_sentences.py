"""Sentence view: the right sentences of the last turn, with the activation at their end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from sarmlib.chat import encode_conversation
from sarmlib.data.toyworld.tokenizer import build_tokenizer
from sarmlib.extractor import position_rule
from sarmlib.interpretation.sentences import sentence_contexts
from tests.tiny import tiny_sarm

TALKS = [[{"role": "user", "content": "You see goats. You see pens."}, {"role": "assistant", "content": text}]
         for text in ("One is Ardu. The emblem is lion. Many have asked the same before.", "One is Ardu.",
                      "Gladly.\n# Answer\n- You see doctors there.\n- This is known to most people here.")]


@pytest.fixture(scope="module")
def world():
    tokenizer = build_tokenizer(4000)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
                         pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return tiny_sarm(config).eval(), tokenizer


def test_every_firing_sentence_of_the_answer_is_found_by_hand(world):
    model, tokenizer = world
    features = range(model.config.n_features)
    table = sentence_contexts(model, tokenizer, TALKS, features, per_decile=100, batch_tokens=40)
    rule, expected = position_rule(tokenizer), {}
    for number, talk in enumerate(TALKS):
        ids = torch.tensor([encode_conversation(tokenizer, talk)])
        ends = rule(ids, torch.ones_like(ids))[0].nonzero()[:, 0].tolist()
        prompt = tokenizer.decode(ids[0]).index(talk[1]["content"][:6])
        hidden = model.model(input_ids=ids).last_hidden_state[0]
        for end in ends:
            if len(tokenizer.decode(ids[0][:end + 1])) > prompt + 1:
                z = model.encode(hidden[end:end + 1]).to_csr().toarray()[0]
                for feature in np.flatnonzero(z):
                    expected[number, int(feature), round(float(z[feature]), 3)] = end == ids.shape[1] - 1
    found = {(row.conversation, row.feature, round(row.z, 3)): row.at_reward for row in table.itertuples()}
    assert found.keys() == expected.keys() and found == expected and len(found) > 20


def test_sentences_are_whole_and_of_the_answer_alone(world):
    model, tokenizer = world
    table = sentence_contexts(model, tokenizer, TALKS, range(model.config.n_features), per_decile=100)
    words = {number: set(part.sentence.str.strip()) for number, part in table.groupby("conversation")}
    assert {"One is Ardu.", "The emblem is lion."} <= words[0]
    assert any(text.endswith("Many have asked the same before.<eot>") for text in words[0])
    assert not any("goats" in text or "pens" in text for texts in words.values() for text in texts)


def test_deciles_are_exact_and_the_seed_decides(world):
    model, tokenizer = world
    talks = [TALKS[i % 3] for i in range(60)]
    one = sentence_contexts(model, tokenizer, talks, [0, 1], per_decile=1, seed=3)
    same = sentence_contexts(model, tokenizer, talks, [1, 0], per_decile=1, seed=3, batch_tokens=64)
    columns = ["feature", "conversation", "decile"]
    left, right = (t.sort_values(["feature", "decile"])[columns].to_numpy().tolist() for t in (one, same))
    assert len(left) == len(right)
    for _, part in one.groupby("feature"):
        assert part.n.nunique() == 1 and (part.decile.diff().dropna() <= 0).all()
        assert len(part) == min(10, part.n.iloc[0]) and part.n_in_decile.sum() == part.n.iloc[0]
    assert sentence_contexts(model, tokenizer, talks, []).empty
