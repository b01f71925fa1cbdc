"""Input that a reward model meets sooner or later: each kind has a stated policy or one clear error, at every door.

Malformed conversations by themselves: test_chat.  Requests: test_serving.  Official checkpoints: test_released.
"""

import json

import numpy as np
import pytest
import torch

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.evaluation.scoring import score_conversations
from sarmlib.sae.model import TopKSAE
from sarmlib.sarm.attribution import explain, explain_pair
from sarmlib.sarm.model import SarmForSequenceClassification
from sarmlib.sarm.training import RewardTrainConfig, RewardTrainer, encode_pairs
from tests.tiny import conversation, tiny_backbone, tiny_pairs, tiny_sarm, tiny_tokenizer

GOOD = conversation("w3 w4", "w5 w6")
PAIR = {"id": "7", "prompt": GOOD[:1], "chosen": "w5", "rejected": "w6"}


def test_an_empty_response_is_rewarded_at_its_end_of_turn():
    model, tokenizer, empty = tiny_sarm(), tiny_tokenizer(), conversation("w3 w4", "")
    scores = score_conversations(model, tokenizer, [GOOD, empty])
    found = explain(model, tokenizer, empty)
    assert found.token == "<eot>" and found.reward == pytest.approx(scores.rewards[1], abs=1e-5)
    assert scores.not_end_of_turn == 0 and scores.rewards[0] != scores.rewards[1]
    assert explain_pair(model, tokenizer, "w3 w4", "w5 w6", "").reward == pytest.approx(-np.diff(scores.rewards)[0],
                                                                                        abs=1e-5)
    (pair,) = encode_pairs(tokenizer, [{**PAIR, "rejected": ""}], 64)
    assert pair["rejected"][-1] == 5


@pytest.mark.parametrize("talk, match", [
    ([], "non-empty"), ("w3", "non-empty"), (GOOD[:1], "role 'user'"), ([*GOOD, GOOD[0]], "role 'user'"),
    ([GOOD[0], {"role": "assistant"}], "'content'"), ([{"content": "w3"}, GOOD[1]], "'role'"),
    ([GOOD[0], {"role": "assistant", "content": None}], "'content'")])
def test_the_malformed_one_of_many_conversations_is_named(talk, match):
    with pytest.raises(DataError, match=f"conversation 1: .*{match}"):
        score_conversations(tiny_sarm(), tiny_tokenizer(), [GOOD, talk])
    with pytest.raises(DataError, match=match):
        explain(tiny_sarm(), tiny_tokenizer(), talk)


@pytest.mark.parametrize("change, match", [
    ({"prompt": "w3"}, "chosen: message 0"), ({"rejected": None}, "rejected: message 1 has no text field 'content'"),
    ({"chosen": 3}, "chosen: message 1"), ({"prompt": [{"role": "user"}]}, "chosen: message 0"),
    ({"meta": {"margin": "much"}}, "margin 'much'"), ({"meta": {"margin": float("nan")}}, "margin nan")])
def test_a_bad_pair_is_named(change, match):
    with pytest.raises(DataError, match=rf"pair 1 \(id '7'\).*{match}"):
        RewardTrainer(tiny_sarm(), tiny_tokenizer(), [*tiny_pairs(1), {**PAIR, **change}])


def test_pad_equal_to_end_of_turn_changes_no_reward_and_no_training():
    model, talks = tiny_sarm(head=0.1), [GOOD, conversation("w7", "w8 w9 w10 w11"), conversation("w3", "")]
    usual = score_conversations(model, tiny_tokenizer(), talks).rewards
    same = tiny_tokenizer(pad_token="<eot>")
    model.config.pad_token_id = 5
    np.testing.assert_allclose(score_conversations(model, same, talks).rewards, usual, atol=1e-5)
    weights = []
    for tokenizer in (tiny_tokenizer(), same):
        model = tiny_sarm(head=0.1)
        config = RewardTrainConfig(lr=1e-3, batch_size=8, epochs=1)
        RewardTrainer(model, tokenizer, tiny_pairs(8), config=config).train()
        weights.append(model.score.weight.detach().clone())
    torch.testing.assert_close(*weights)


def test_without_a_chat_template_the_fallback_serves_every_door():
    model, tokenizer = tiny_sarm(), tiny_tokenizer(template=None)
    scores = score_conversations(model, tokenizer, [GOOD])
    assert scores.not_end_of_turn == 0
    assert explain(model, tokenizer, GOOD).reward == pytest.approx(scores.rewards[0], abs=1e-5)
    assert encode_pairs(tokenizer, [PAIR], 64)[0]["chosen"][-1] == tokenizer.eos_token_id


def test_texts_longer_than_the_context_lose_their_beginning_at_every_door():
    model, tokenizer = tiny_sarm(), tiny_tokenizer()  # context 256
    long = conversation("w3 " * 300, "w4 w5")
    scores = score_conversations(model, tokenizer, [long], max_length=10**6)
    assert scores.lengths.tolist() == [256] and scores.n_truncated == 1
    assert explain(model, tokenizer, long, max_length=10**6).reward == pytest.approx(scores.rewards[0], abs=1e-5)
    config = RewardTrainConfig(max_length=10**6)
    (pair,) = RewardTrainer(model, tokenizer, [{**PAIR, "prompt": long[:1]}], config=config).train_dataset
    assert len(pair["chosen"]) == 256 and pair["chosen"][0] == 2 and pair["chosen"][-1] == 5
    with pytest.raises(ConfigError, match="max_length must be at least 2"):
        score_conversations(model, tokenizer, [long], max_length=1)


def test_a_reward_that_is_not_a_number_is_never_returned():
    model, tokenizer = tiny_sarm(), tiny_tokenizer()
    model.score.weight.data.fill_(float("nan"))
    for call in (lambda: score_conversations(model, tokenizer, [GOOD]), lambda: explain(model, tokenizer, GOOD),
                 lambda: explain_pair(model, tokenizer, "w3", "w4", "w5")):
        with pytest.raises(ModelError, match="not finite|reward is nan"):
            call()
    with pytest.raises(ModelError, match="loss is nan"):
        RewardTrainer(model, tokenizer, tiny_pairs(4), config=RewardTrainConfig(batch_size=4, use_cpu=True)).train()


@pytest.mark.parametrize("change, error, match", [
    ({"layer": 2}, ConfigError, "layer=2 but backbone_config has 3"), ({"k": 99}, ConfigError, "k=99 is larger"),
    ({"k": 0}, ConfigError, "k=0"), ({"k": "4"}, ConfigError, "k='4'"), ({"k": None}, ConfigError, "needs n_features"),
    ({"n_features": 32}, ModelError, r"mismatched keys.*sae\.W_dec \(64, 32\), not \(32, 32\)"),
    (2, ModelError, r"unexpected keys.*model\.layers\.2\."), (4, ModelError, r"missing keys.*model\.layers\.3\.")])
def test_a_layer_or_k_that_the_checkpoint_has_not_is_refused(tmp_path, change, error, match):
    tiny_sarm().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    if isinstance(change, int):  # a consistent config of another depth
        change = {"layer": change, "backbone_config": {**config["backbone_config"], "num_hidden_layers": change}}
    file.write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=match):
        SarmForSequenceClassification.from_pretrained(tmp_path)


def test_an_sae_of_another_layer_width_is_refused_and_its_own_k_is_kept():
    with pytest.raises(ModelError, match="size 16, but the backbone has hidden_size 32"):
        SarmForSequenceClassification.from_backbone_and_sae(tiny_backbone(), TopKSAE(16, 64, 4))
    assert SarmForSequenceClassification.from_backbone_and_sae(tiny_backbone(), TopKSAE(32, 64, 7)).config.k == 7
