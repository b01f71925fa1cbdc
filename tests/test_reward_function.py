"""The reward function for GRPO and RLOO: TRL's calling convention, both data formats, and who paid."""

import random

import numpy as np
import pytest
import torch

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.evaluation.scoring import score_conversations
from sarmlib.sarm.model import ScalarRewardConfig, ScalarRewardModel
from sarmlib.sarm.reward_function import SarmRewardFunction
from tests.tiny import conversation, tiny_config, tiny_sarm, tiny_tokenizer, words


@pytest.fixture
def batch():
    rng = random.Random(0)
    prompts = [text for text in (words(rng, 8, 14) for _ in range(3)) for _ in range(4)]
    return prompts, [words(rng, 1, 6) for _ in prompts]


def test_conversations_and_their_text_get_the_reward_of_plain_scoring(batch):
    model, tokenizer = tiny_sarm(), tiny_tokenizer()
    talks = [conversation(*pair) for pair in zip(*batch, strict=True)]
    expected = score_conversations(model, tokenizer, talks).rewards
    reward = SarmRewardFunction(model, tokenizer)
    found = reward(prompts=[talk[:1] for talk in talks], completions=[talk[1:] for talk in talks],
                   completion_ids=[[1]] * 12, trainer_state=object(), answer=["x"] * 12)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    cut = [text.index("<assistant>") + len("<assistant>") for text in texts]
    found = reward([text[:at] for text, at in zip(texts, cut, strict=True)],
                   [text[at:].replace("<eot>", "") for text, at in zip(texts, cut, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-4)  # the turn is closed here
    assert reward.__name__ == "sarm" and all(type(value) is float for value in found) and not reward.model.training


def test_the_features_that_paid_are_logged_and_sum_to_the_reward(batch):
    model, metrics, columns = tiny_sarm(), {}, {}
    reward = SarmRewardFunction(model, tiny_tokenizer(), log_features=3, labels={i: f"word {i}" for i in range(64)})
    found = reward(*batch, log_metric=metrics.__setitem__, log_extra=columns.__setitem__)
    entry = reward.history[-1]
    assert entry["reward"] == pytest.approx(np.mean(found))
    assert sum(entry["features"].values()) + entry["rest"] == pytest.approx(np.mean(found), abs=1e-5)
    sizes = list(map(abs, entry["features"].values()))
    assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True)
    first = next(iter(entry["features"]))
    assert metrics[f"sarm/feature {first} (word {first})"] == entry["features"][first] and len(metrics) == 4
    assert len(columns["sarm_features"]) == 12 and "feature" in columns["sarm_features"][0]
    one = SarmRewardFunction(model, tiny_tokenizer(), log_features=64)
    one(batch[0][:1], batch[1][:1])
    assert one.history[0]["rest"] == pytest.approx(0, abs=1e-5)


def test_without_features_any_reward_model_will_do(batch):
    torch.manual_seed(0)
    scalar = ScalarRewardModel(ScalarRewardConfig(backbone_config=tiny_config())).eval()
    reward = SarmRewardFunction(scalar, tiny_tokenizer(), log_features=0)
    assert len(reward(*batch)) == 12 and not reward.history and reward([], []) == []
    with pytest.raises(ModelError, match="log_features=0"):
        SarmRewardFunction(scalar, tiny_tokenizer())


def test_bad_input_is_refused(batch):
    reward = SarmRewardFunction(tiny_sarm(), tiny_tokenizer())
    for prompts, completions, match in (
            (["w3"], [], "1 prompts but 0"), (["w3"], [[{"role": "assistant", "content": "w4"}]], "pair 0: the prompt"),
            ([[{"role": "user", "content": "w3"}]], [[{"role": "user", "content": "w4"}]], "query 0.*'user'")):
        with pytest.raises(DataError, match=match):
            reward(prompts, completions)
    with pytest.raises(ConfigError, match="log_features=-1"):
        SarmRewardFunction(tiny_sarm(), tiny_tokenizer(), log_features=-1)
    reward.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        reward(*batch)
