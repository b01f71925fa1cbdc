"""Reward training on two gloo processes on the CPU: DDP through the command; FSDP 2 as far as a CPU allows.

accelerate keeps FSDP and DeepSpeed for accelerators (on a CPU it makes the run plain DDP), so their configs are only
read (test_train_command).  What they do to the model is checked without it: torch's `fully_shard`, and the engine of
DeepSpeed where that is installed.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from sarmlib.__main__ import main
from sarmlib.evaluation.scoring import score_token_ids
from sarmlib.sarm.training import PairCollator, RewardTrainConfig, encode_pairs, encoder_hash, preference_loss
from tests.helpers import ROOT
from tests.test_sae_distributed import free_port
from tests.test_train_command import world  # noqa: F401  (a fixture)
from tests.tiny import tiny_pairs, tiny_sarm, tiny_tokenizer

CONFIG = RewardTrainConfig()


def two_ranks(*command: str) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                        "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
                        "DS_ACCELERATOR": "cpu"}
    ranks = [subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                              stdout=subprocess.DEVNULL, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank in range(2)]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]


def test_two_processes_train_like_one(world, tmp_path, capsys):  # noqa: F811
    # 40 training pairs, 8 a step: five full batches, 8 on one process or 4 + 4 on two
    command = [*world[:-1], str(tmp_path / "one"), "--sae", str(tmp_path / "sae"), "--gradient-checkpointing"]
    assert main(command) == 0, capsys.readouterr().err
    command[command.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    two_ranks("-m", "sarmlib", *command)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)
    found = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert found[1] == pytest.approx(found[0], abs=1e-3)


def sharded(file: str) -> None:
    """What each rank does: layers and root sharded, three steps on its half of the pairs, score, hash, gather."""
    from torch.distributed import get_rank, init_process_group
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    init_process_group("gloo")
    model, before = tiny_sarm(head=0.1), encoder_hash(tiny_sarm(head=0.1), torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    train(model, [[batch] for batch in batches()[get_rank()::2]])
    rewards = score_token_ids(model, sequences())[0]
    assert encoder_hash(model, torch.float32) == before
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if get_rank() == 0:
        torch.save(state | {"rewards": torch.tensor(rewards)}, file)


def zero(file: str, stage: int) -> None:
    """The same with DeepSpeed's engine."""
    import deepspeed
    deepspeed.init_distributed("gloo")
    rank, model = deepspeed.comm.get_rank(), tiny_sarm(head=0.1)
    before = encoder_hash(tiny_sarm(head=0.1), torch.float32)
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config={
        "zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True})
    for batch in batches()[rank::2]:
        engine.backward(preference_loss(engine, batch, CONFIG)[0].mean())
        engine.step()
    rewards = score_token_ids(model, sequences())[0]
    assert encoder_hash(model, torch.float32) == before
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if rank == 0:
        torch.save(state | {"rewards": torch.tensor(rewards)}, file)


def batches() -> list:
    pairs = encode_pairs(tiny_tokenizer(), tiny_pairs(24), 64)
    return [PairCollator()(pairs[i:i + 4]) for i in range(0, 24, 4)]


def sequences() -> list:
    return [pair["chosen"] for pair in encode_pairs(tiny_tokenizer(), tiny_pairs(8, 1), 64)]


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)  # shows gradients as they are


def train(model, parts) -> None:
    optimizer = sgd(model)
    for part in parts:
        for batch in part:
            (preference_loss(model, batch, CONFIG)[0].mean() / len(part)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("call", ["sharded({})", "zero({}, 2)", "zero({}, 3)"])
def test_shared_out_weights_train_and_score_like_whole_ones(call, tmp_path):
    if call.startswith("zero"):
        pytest.importorskip("deepspeed")
    file = tmp_path / "state.pt"
    call = call.format(repr(str(file)))
    two_ranks("-c", f"from tests.test_sarm_distributed import sharded, zero; {call}")
    model, parts, before = tiny_sarm(head=0.1), batches(), tiny_sarm(head=0.1).state_dict()
    train(model, [parts[i:i + 2] for i in range(0, 6, 2)])
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    found = torch.load(file, weights_only=True)
    torch.testing.assert_close(found.pop("rewards"), torch.tensor(score_token_ids(model, sequences())[0]), atol=1e-5,
                               rtol=1e-5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
