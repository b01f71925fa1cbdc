"""Reward training on two gloo processes on the CPU: DDP with `RewardTrainer`; FSDP 2 by torch's `fully_shard` alone,
since accelerate keeps it for accelerators."""

import torch

from sarmlib.evaluation.scorer import score_ids
from sarmlib.sarm.training import (
    RewardTrainConfig,
    RewardTrainer,
    bradley_terry,
    collate_pairs,
    encode_pairs,
    encoder_hash,
)
from tests.helpers import two_ranks
from tests.tiny import tiny_pairs, tiny_sarm, tiny_tokenizer

IMPORT = "from tests.test_sarm_distributed import *"


def whole(file: str, folder: str) -> None:
    """A training of 5 steps, and one resumed at step 4; the process of rank 0 writes weights and metrics."""
    states = []
    for resume in (None, True):
        config = RewardTrainConfig(lr=3e-3, batch_size=8, epochs=1, warmup_ratio=0.0, seed=1, use_cpu=True,
                                   save_every=2, gradient_checkpointing=True)
        trainer = RewardTrainer(tiny_sarm(head=0.1), tiny_tokenizer(), tiny_pairs(40), tiny_pairs(12, 9), config,
                                folder)
        trainer.train(resume)
        states.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    found = trainer.evaluate()
    if trainer.is_world_process_zero():
        torch.save(states[0] | {"metrics": torch.tensor([found["eval_loss"], found["eval_accuracy"]])}, file)
    trainer.accelerator.end_training()


def test_two_processes_train_like_one_and_resume(tmp_path):
    # 40 training pairs, 8 a step: five full batches, 8 on one process or 4 + 4 on two
    whole(str(tmp_path / "one.pt"), str(tmp_path / "one"))
    two_ranks(f"{IMPORT}; whole({str(tmp_path / 'two.pt')!r}, {str(tmp_path / 'two')!r})")
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)
    assert (tmp_path / "two/checkpoint-4/complete.json").is_file()


def sharded(file: str) -> None:
    """What each rank does: layers and root sharded, three steps on its half of the pairs, score, hash, gather."""
    from torch.distributed import get_rank, init_process_group
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo")
    model, before = tiny_sarm(head=0.1), encoder_hash(tiny_sarm(head=0.1))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    train(model, [[batch] for batch in batches()[get_rank()::2]])
    rewards = score_ids(model, sequences())[0]
    assert encoder_hash(model) == before
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if get_rank() == 0:
        torch.save(state | {"rewards": torch.tensor(rewards)}, file)


def batches() -> list:
    pairs = encode_pairs(tiny_tokenizer(), tiny_pairs(24), 64)
    return [collate_pairs(pairs[i:i + 4]) for i in range(0, 24, 4)]


def sequences() -> list:
    return [pair["chosen"] for pair in encode_pairs(tiny_tokenizer(), tiny_pairs(8, 1), 64)]


def train(model, parts) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)  # gradients as they are
    for part in parts:
        for batch in part:
            rewards = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
            (bradley_terry(*rewards.chunk(2)).mean() / len(part)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_shared_out_weights_train_and_score_like_whole_ones(tmp_path):
    file = tmp_path / "state.pt"
    two_ranks(f"{IMPORT}; sharded({str(file)!r})")
    model, parts, before = tiny_sarm(head=0.1), batches(), tiny_sarm(head=0.1).state_dict()
    train(model, [parts[i:i + 2] for i in range(0, 6, 2)])
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    found = torch.load(file, weights_only=True)
    torch.testing.assert_close(found.pop("rewards"), torch.tensor(score_ids(model, sequences())[0]), atol=1e-5,
                               rtol=1e-5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
