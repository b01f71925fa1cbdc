"""With TRL installed (the `trl` extra): its RewardTrainer takes a SARM unchanged."""

import datasets
import pytest
import torch

from tests.tiny import tiny_pairs, tiny_sarm, tiny_tokenizer


def test_reward_trainer_trains_a_sarm_and_leaves_the_encoder(tmp_path):
    trl = pytest.importorskip("trl", reason="the trl extra is not installed")
    model = tiny_sarm(head=0.1)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pairs = [{side: [*pair["prompt"], {"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
             for pair in tiny_pairs(16)]
    trainer = trl.RewardTrainer(
        model=model, processing_class=tiny_tokenizer(), train_dataset=datasets.Dataset.from_list(pairs),
        args=trl.RewardConfig(output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=4,
                              learning_rate=1e-3, max_length=64, logging_steps=1, report_to="none", use_cpu=True,
                              disable_tqdm=True, save_strategy="no"))
    assert trainer.args.bf16  # TRL's default
    trainer.train()
    after = model.state_dict()
    assert {name.split(".")[0] for name in after if not torch.equal(after[name], weights[name])} == {"model", "score"}
    assert any("accuracy" in key for entry in trainer.state.log_history for key in entry)
