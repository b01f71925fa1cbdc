"""Reward training: the loss, the data order, what is trained, and exact resumption."""

import concurrent.futures
import multiprocessing
import os

import numpy as np
import pytest
import torch

from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.sarm.model import SarmForSequenceClassification, ScalarRewardConfig, ScalarRewardModel
from sarmlib.sarm.training import (
    LengthGroupedSampler,
    PairCollator,
    RewardTrainConfig,
    RewardTrainer,
    bradley_terry,
    encode_pairs,
    pair_metrics,
    preference_loss,
)
from tests.tiny import tiny_config, tiny_pairs, tiny_sarm, tiny_tokenizer

FAST = dict(lr=3e-3, batch_size=16, epochs=3, warmup_ratio=0.0, log_every=2, seed=1)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def trained(model=None, pairs=64, resume=None, **settings):
    model = model or tiny_sarm(head=0.1)
    where = settings.pop("output_dir", None)
    trainer = RewardTrainer(model, tiny_tokenizer(), tiny_pairs(pairs), tiny_pairs(24, 9),
                            RewardTrainConfig(**{**FAST, **settings}), where)
    trainer.train(resume)
    return trainer


def test_bradley_terry_is_equation_1():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 3.0])
    wanted = -torch.log(1 / (1 + torch.exp(-(chosen - rejected))))
    torch.testing.assert_close(bradley_terry(chosen, rejected), wanted)
    assert bradley_terry(chosen, rejected, torch.tensor([1.0, 0.0]))[0].item() == pytest.approx(np.log(2))
    assert torch.isfinite(bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4]))).all()


def test_margin_and_centering_enter_the_loss():
    model, pairs = tiny_sarm(), tiny_pairs(4)
    for number, pair in enumerate(pairs):
        pair["meta"]["margin"] = float(number)
    batch = PairCollator()(encode_pairs(tiny_tokenizer(), pairs, 64))
    plain, rewards = preference_loss(model, batch, RewardTrainConfig())
    chosen, rejected = rewards.chunk(2)
    with_both = preference_loss(model, batch, RewardTrainConfig(use_margin=True, center=0.5))[0]
    margin = torch.arange(4.0)
    torch.testing.assert_close(plain, bradley_terry(chosen, rejected))
    torch.testing.assert_close(with_both, bradley_terry(chosen, rejected, margin) + 0.5 * (chosen + rejected) ** 2)


def test_training_learns_the_preference_writes_no_files_and_prints_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    trainer = trained(lr=1e-2, epochs=6)
    history = trainer.log_history
    evals = [entry for entry in history if "eval_accuracy" in entry]
    assert len(evals) == 6 and evals[-1]["eval_accuracy"] >= 0.95 and evals[-1]["eval_loss"] < 0.3
    assert {"loss", "accuracy", "margin", "grad_norm", "learning_rate"} <= set(history[0])
    assert list(tmp_path.iterdir()) == [] and not trainer.model.training
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("mode,changed", [(0, {"score"}), (1, {"model", "score"}), (3, {"model", "sae", "score"})])
def test_each_mode_trains_exactly_its_parts(mode, changed):
    model = tiny_sarm(head=0.1)
    before, hash_before = weights(model), model.sae_hash()
    trained(model, pairs=32, mode=mode, epochs=1)
    moved = {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == changed and (model.sae_hash() == hash_before) == (mode != 3)
    assert model.config.frozen_sae == (mode != 3)


def test_encoder_of_a_loaded_model_stays_frozen(tmp_path):
    tiny_sarm(head=0.1).save_pretrained(tmp_path)
    model = SarmForSequenceClassification.from_pretrained(tmp_path)
    before = model.sae_hash()
    trained(model, pairs=32, epochs=1)
    assert model.sae_hash() == before


def test_a_changed_encoder_or_trainable_set_is_noticed():
    model = tiny_sarm(head=0.1)
    trainer = RewardTrainer(model, tiny_tokenizer(), tiny_pairs(16), None, RewardTrainConfig(**FAST))
    model.sae.W_enc.requires_grad_(True)
    with pytest.raises(ModelError, match=r"sae\.W_enc is trainable"):
        trainer.train()
    model.sae.W_enc.requires_grad_(False)
    loss = trainer.compute_loss

    def overwrite(*args, **kwargs):
        model.sae.W_enc.data[0, 0] += 1
        return loss(*args, **kwargs)

    trainer.compute_loss = overwrite
    with pytest.raises(ModelError, match="not the one training started with"):
        trainer.train()


def test_same_seed_same_weights_other_seed_other_weights():
    one, two = weights(trained(epochs=1).model), weights(trained(epochs=1).model)
    assert same(one, two) and not same(one, weights(trained(epochs=1, seed=2).model))


def test_resuming_is_bit_exact(tmp_path):
    whole = weights(trained(epochs=3).model)
    settings = dict(epochs=3, save_every=5, output_dir=tmp_path)

    class Stop(Exception):
        pass

    model = tiny_sarm(head=0.1)
    trainer = RewardTrainer(model, tiny_tokenizer(), tiny_pairs(64), None,
                            RewardTrainConfig(**{**FAST, "epochs": 3, "save_every": 5}), tmp_path)
    step = trainer.training_step

    def stop_at_seven(*args, **kwargs):
        if trainer.state.global_step == 7:
            raise Stop
        return step(*args, **kwargs)

    trainer.training_step = stop_at_seven
    with pytest.raises(Stop):
        trainer.train()
    (tmp_path / "checkpoint-11").mkdir()  # a checkpoint that was cut off is not used
    other = tiny_sarm(head=0.1)
    other.model.layers[0].mlp.up_proj.weight.data.zero_()  # what counts is in the checkpoint
    again = trained(other, resume=True, **settings)
    assert again.state.global_step == 12 and same(whole, weights(again.model))
    with pytest.raises(ModelError, match="holds another encoder"):
        trained(tiny_sarm(head=0.1, seed=5), resume=True, **settings)
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        trained(resume=True, output_dir=tmp_path / "empty")


def test_accumulated_micro_batches_give_the_same_step():
    # 28 pairs in batches of 16: the last step has micro batches of 8 and 4, and every pair must weigh the same
    one = weights(trained(pairs=28, epochs=1, group_by_length=False).model)
    two = weights(trained(pairs=28, epochs=1, group_by_length=False, micro_batch_size=8).model)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-3)


def test_head_learning_rate_applies_to_the_head_only():
    model = tiny_sarm(head=0.1)
    before = weights(model)
    trained(model, pairs=16, epochs=1, lr=1e-9, head_lr=1e-2)
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in model.state_dict().items()}
    assert moved["score.weight"] > 1e-3
    assert max(value for name, value in moved.items() if name != "score.weight") < 1e-6


def test_batches_have_similar_lengths_cover_everything_and_depend_on_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(5, 200, 1003)
    sampler = LengthGroupedSampler(lengths, 8, seed=3)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == list(range(1003)) and first == again != second
    assert first != list(LengthGroupedSampler(lengths, 8, seed=4))
    spread = [np.ptp(lengths[first[i:i + 8]]) for i in range(0, 1000, 8)]
    assert np.mean(spread) < 20 < 100 < np.mean([np.ptp(lengths[i:i + 8]) for i in range(0, 1000, 8)])
    middles = np.array([lengths[first[i]] for i in range(0, 1000, 8)])
    assert abs(np.corrcoef(np.arange(len(middles)), middles)[0, 1]) < 0.3  # the order of batches is random


def test_long_pairs_keep_the_end_of_turn():
    encoded = encode_pairs(tiny_tokenizer(), tiny_pairs(8), max_length=6)
    assert all(len(pair[side]) <= 6 and pair[side][-1] == 5 for pair in encoded for side in ("chosen", "rejected"))


def test_scalar_models_train_with_the_same_trainer():
    torch.manual_seed(0)
    trainer = trained(ScalarRewardModel(ScalarRewardConfig(backbone_config=tiny_config())), lr=1e-2, epochs=6)
    assert trainer.evaluate()["eval_accuracy"] >= 0.95


def test_pair_metrics_by_hand():
    metrics = pair_metrics(np.array([1.0, 2.0, 0.0]), np.array([0.0, 2.0, 1.0]))
    assert metrics["accuracy"] == pytest.approx(0.5) and metrics["margin"] == pytest.approx(0)
    assert metrics["loss"] == pytest.approx(np.mean(np.log1p(np.exp([-1.0, 0.0, 1.0]))))


def test_bad_settings_and_data_are_refused():
    for settings, match in ((dict(mode=2), "mode=2"), (dict(lr=0), "lr"), (dict(micro_batch_size=7), "divide")):
        with pytest.raises(ConfigError, match=match):
            RewardTrainConfig(**settings)
    with pytest.raises(DataError, match="no training pairs"):
        RewardTrainer(tiny_sarm(), tiny_tokenizer(), [])
    with pytest.raises(DataError, match="'rejected'"):
        RewardTrainer(tiny_sarm(), tiny_tokenizer(), [{"prompt": [], "chosen": "w1"}])
    with pytest.raises(ConfigError, match="output_dir"):
        RewardTrainer(tiny_sarm(), tiny_tokenizer(), tiny_pairs(2), config=RewardTrainConfig(save_every=1))


def test_a_loss_that_is_not_finite_stops_the_run():
    model = tiny_sarm()
    model.score.weight.data[:] = float("inf")
    with pytest.raises(ModelError, match="loss is"):
        trained(model, pairs=16, epochs=1)


def _accuracy_in_worker(_):
    torch.set_num_threads(1)
    return trained(pairs=16, epochs=1).evaluate()["eval_loss"]


def test_a_spawned_worker_gives_the_same_numbers():
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(_accuracy_in_worker, None).result() == pytest.approx(_accuracy_in_worker(None), abs=1e-6)
