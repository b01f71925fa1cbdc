"""Reward training: the loss, the data order, what is trained and at which precision, and exact resumption."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.sarm import training as T
from sarmlib.sarm.model import ScalarRewardConfig, ScalarRewardModel
from tests.tiny import tiny_config, tiny_pairs, tiny_sarm, tiny_tokenizer, weights

FAST = dict(lr=3e-3, batch_size=16, epochs=3, warmup_ratio=0.0, log_every=2, seed=1, use_cpu=True)


def make(model=None, pairs=64, data_seed=0, output_dir=None, **settings):
    return T.RewardTrainer(model or tiny_sarm(head=0.1), tiny_tokenizer(), tiny_pairs(pairs, data_seed),
                           tiny_pairs(24, 9), T.RewardTrainConfig(**FAST | settings), output_dir)


def trained(model=None, pairs=64, resume=None, **settings):
    trainer = make(model, pairs, **settings)
    trainer.train(resume)
    return trainer


def test_bradley_terry_is_equation_1():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 3.0])
    wanted = -torch.log(1 / (1 + torch.exp(-(chosen - rejected))))
    torch.testing.assert_close(T.bradley_terry(chosen, rejected), wanted)
    assert torch.isfinite(T.bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4]))).all()
    metrics = T.pair_metrics(np.array([1.0, 0.0, -1.0]))
    loss = np.mean(np.log1p(np.exp([-1.0, 0.0, 1.0])))
    assert metrics == pytest.approx({"accuracy": 0.5, "margin": 0, "loss": loss})


@pytest.mark.parametrize("scalar", [False, True])
def test_training_learns_the_preference_writes_no_files_and_prints_nothing(tmp_path, monkeypatch, capfd, scalar):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = ScalarRewardModel(ScalarRewardConfig(backbone_config=tiny_config())) if scalar else None
    trainer = trained(model, lr=1e-2, epochs=6)
    history = trainer.log_history
    evals = [entry for entry in history if "eval_accuracy" in entry]
    assert len(evals) == 6 and evals[-1]["eval_accuracy"] >= 0.95 and evals[-1]["eval_loss"] < 0.3
    assert {"loss", "accuracy", "margin", "grad_norm", "learning_rate"} <= set(history[0])
    assert list(tmp_path.iterdir()) == [] and not trainer.model.training
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_all_but_a_frozen_encoder_moves_at_the_papers_learning_rate(frozen, bf16):
    model = tiny_sarm(head=0.1, encoder_bias=True).to(torch.bfloat16)
    model.config.frozen_sae = frozen
    with pytest.warns(UserWarning, match="bfloat16 are trained as float32"):
        trainer = make(model, pairs=16, epochs=1, lr=4e-6, bf16=bf16)
    before = weights(model)
    trainer.train()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        still = name.startswith("sae.") if frozen else name == "sae.W_dec"  # which no reward depends on
        assert torch.equal(tensor, before[name]) == still, name


def before_step(trainer, step, act):
    """Have ``act`` run before that step of a training."""
    class Before(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == step:
                act()

    trainer.add_callback(Before())


@pytest.mark.parametrize(("part", "value", "words"), [
    ("sae.W_enc", 1, "not the one training started with"), ("score.weight", float("inf"), "loss is")])
def test_an_overwritten_encoder_and_a_loss_that_is_not_finite_are_noticed(part, value, words):
    trainer = make(pairs=16)
    before_step(trainer, 0, lambda: trainer.model.get_parameter(part).data[:1].add_(value))
    with pytest.raises(ModelError, match=words):
        trainer.train()


def test_resuming_is_bit_exact_and_uses_whole_checkpoints_only(tmp_path):
    settings = dict(save_every=4, log_every=5, output_dir=tmp_path)
    undisturbed = trained(resume=True, **settings | {"output_dir": tmp_path / "empty"})
    whole, trainer = weights(undisturbed.model), make(**settings)
    before_step(trainer, 11, Mock(side_effect=RuntimeError("stopped")))
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("check*")) == ["checkpoint-10", "checkpoint-5"]
    record = json.loads((tmp_path / "checkpoint-10/complete.json").read_text())
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(record["files"])
    (tmp_path / "checkpoint-11").mkdir()  # one that was cut off
    optimizer = bytearray((tmp_path / "checkpoint-10/optimizer.pt").read_bytes())
    optimizer[len(optimizer) // 2] ^= 1  # one flipped bit, of the same size
    (tmp_path / "checkpoint-10/optimizer.pt").write_bytes(optimizer)
    other = tiny_sarm(head=0.1)
    other.model.layers[0].mlp.up_proj.weight.data.zero_()  # what counts is in the checkpoint
    with pytest.warns(UserWarning, match="checkpoint-1[01] is incomplete or damaged"):
        again = trained(other, resume=True, **settings)
    assert again.state.global_step == 12 and all(whole[name].equal(got) for name, got in weights(again.model).items())
    assert again.log_history == undisturbed.log_history
    with pytest.raises(ModelError, match="holds another encoder"):
        trained(tiny_sarm(head=0.1, seed=5), resume=True, **settings)
    with pytest.raises(ConfigError, match="other training pairs"):
        trained(data_seed=3, resume=True, **settings)


def test_a_checkpoint_at_an_epochs_end_holds_its_evaluation(tmp_path):
    trainer = trained(save_every=4, log_every=4, output_dir=tmp_path)
    for step in (8, 12):
        state = json.loads((tmp_path / f"checkpoint-{step}/trainer_state.json").read_text())
        assert sum("eval_loss" in one for one in state["log_history"]) == step // 4
    assert sum("eval_loss" in one for one in trainer.log_history) == 3


def test_accumulated_micro_batches_give_the_same_step():
    # 12 pairs in micro batches of 8 and 4: every pair must weigh the same
    one = weights(trained(pairs=12, epochs=1).model)
    two = weights(trained(pairs=12, epochs=1, micro_batch_size=8).model)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-3)


def test_head_learning_rate_applies_to_the_head_only():
    model = tiny_sarm(head=0.1)
    before = weights(model)
    trained(model, pairs=16, epochs=1, lr=1e-9, head_lr=1e-2)
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in model.state_dict().items()}
    assert moved.pop("score.weight") > 1e-3 and max(moved.values()) < 1e-6


def test_batches_have_similar_lengths_cover_everything_and_depend_on_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(5, 200, 1003)
    sampler = T.LengthGroupedSampler(lengths, 8, seed=3)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == list(range(1003)) and first == again != list(sampler)
    assert first != list(T.LengthGroupedSampler(lengths, 8, seed=4))
    spread = [np.ptp(lengths[first[i:i + 8]]) for i in range(0, 1000, 8)]
    assert np.mean(spread) < 20 < 100 < np.mean([np.ptp(lengths[i:i + 8]) for i in range(0, 1000, 8)])


def test_pairs_of_every_form_are_encoded_and_keep_the_end_of_turn():
    pairs, tokenizer = tiny_pairs(8), tiny_tokenizer()
    texts = [{**pair, "prompt": pair["prompt"][0]["content"]} for pair in pairs]
    assert T.encode_pairs(tokenizer, texts, 64) == T.encode_pairs(tokenizer, pairs, 64)
    cut = T.encode_pairs(tokenizer, pairs, max_length=6)
    assert all(len(pair[side]) <= 6 and pair[side][-1] == 5 for pair in cut for side in ("chosen", "rejected"))
    with pytest.warns(UserWarning, match="kept 8 of 9 rows; left out 1: chosen equals rejected"):
        assert len(T.encode_pairs(tokenizer, [*pairs, {"prompt": "w1", "chosen": "w2", "rejected": "w2"}], 64)) == 8


def test_bad_settings_and_no_pairs_are_refused():
    out = [dict(lr=0), dict(lr=float("inf")), dict(lr=float("nan")), dict(head_lr=-1.0), dict(head_lr=float("nan")),
           dict(seed=-1), dict(weight_decay=-1.0), dict(warmup_ratio=-1.0), dict(log_every=0), dict(scheduler="x")]
    for settings, words in (*((one, "positive") for one in out), (dict(micro_batch_size=7), "no multiple"),
                            (dict(max_length=1), "max_length must"), (dict(save_every=1), "output_dir"),
                            (dict(pairs=0), "no usable row")):
        with pytest.raises((ConfigError, DataError), match=words):
            make(**settings)
