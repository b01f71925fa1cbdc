"""Memory savers of reward training: adapters on the backbone (with peft), and activations computed twice."""

import sys

import pytest
import torch

from sarmlib.errors import ConfigError
from sarmlib.sarm.model import SarmForSequenceClassification
from sarmlib.sarm.training import RewardTrainConfig, RewardTrainer, set_trainable
from tests.test_sarm_training import FAST, trained, weights
from tests.tiny import tiny_pairs, tiny_sarm, tiny_tokenizer

needs_peft = pytest.mark.skipif(__import__("importlib.util").util.find_spec("peft") is None,
                                reason="the lora extra is not installed")


def trainer(model, **settings):
    return RewardTrainer(model, tiny_tokenizer(), tiny_pairs(64), tiny_pairs(24, 9),
                         RewardTrainConfig(**{**FAST, **settings}))


@needs_peft
def test_adapters_train_on_the_backbone_only_and_merge_into_it(tmp_path):
    model = tiny_sarm(head=0.1)
    before, rewards = weights(model), {}
    run = trainer(model, lora_rank=4, lr=1e-2, epochs=6)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable - {"score.weight"} and all(".lora_" in name for name in trainable - {"score.weight"})
    assert sum(".lora_A." in name for name in trainable) == 3 * 7  # every linear layer of three Llama layers
    evaluate = run.evaluate
    run.evaluate = lambda *args, **kwargs: rewards.update(evaluate(*args, **kwargs))  # the last: before the merge
    run.train()
    after = weights(model)
    assert after.keys() == before.keys() and run.log_history[-2]["eval_accuracy"] > 0.9
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"score.weight"} | {name for name in after if "_proj." in name}
    assert evaluate()["eval_loss"] == pytest.approx(rewards["eval_loss"], abs=1e-4)
    model.save_pretrained(tmp_path)
    again = SarmForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.state_dict().items())


@needs_peft
def test_adapters_resume_bit_exactly(tmp_path):
    settings = dict(lora_rank=2, epochs=2, save_every=3, keep_checkpoints=5, output_dir=tmp_path)
    whole = weights(trained(**settings).model)
    for folder in tmp_path.glob("checkpoint-*"):
        if folder.name != "checkpoint-3":
            folder.rename(tmp_path / f"old-{folder.name}")
    again = weights(trained(resume=True, **settings).model)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_without_peft_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"lora_rank=4 needs peft: pip install 'sarmlib\[lora\]'"):
        trainer(tiny_sarm(), lora_rank=4)
    for settings in (dict(lora_rank=-1), dict(lora_rank=4, mode=0)):
        with pytest.raises(ConfigError, match="lora_rank"):
            RewardTrainConfig(**settings)


def test_checkpointed_activations_give_the_same_weights():
    seen = []
    model = tiny_sarm(head=0.1)
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    one = weights(trained(model, pairs=16, epochs=1, gradient_checkpointing=True, eval_every=-1).model)
    assert len(seen) == 2 * 3  # each layer once forward, once again in the backward pass
    other = weights(trained(pairs=16, epochs=1).model)
    for name in other:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5)
    set_trainable(model, 0)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["score.weight"]
