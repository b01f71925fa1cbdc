"""Training on two gloo processes on the CPU gives what one gives: an SAE, a pipeline's stages, a reward model with DDP,
and one with FSDP 2 by torch's `fully_shard` alone, since accelerate keeps it for accelerators."""

import json
import os

import pytest
import torch
from accelerate import Accelerator

from sarmlib.evaluation.scorer import score_ids
from sarmlib.pipeline import Run
from sarmlib.sae import training
from sarmlib.sae.topk import TopKSAE
from sarmlib.sae.training import SAETrainConfig, train_sae
from sarmlib.sarm import training as T
from sarmlib.store import write_json
from tests.helpers import two_ranks
from tests.miniature import miniature, save_backbone
from tests.test_sae_training import SIZES, rest_of_stream
from tests.tiny import tiny_pairs, tiny_sarm, tiny_tokenizer, weights


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both ranks wrote; one start of two processes serves every test here."""
    folder = tmp_path_factory.mktemp("two")
    save_backbone(folder / "backbone")
    two_ranks(f"from pathlib import Path; from tests.test_sarm_distributed import rank; rank(Path({str(folder)!r}))")
    return folder


def rank(folder) -> None:
    sharded(folder)
    sae(folder, Accelerator(cpu=True))
    launched(folder)
    whole(folder)


def sae(folder, accelerator=None) -> tuple:
    """An odd batch size: the two processes get parts of different length, and go on after step 6."""
    training.BUFFER = 130
    for steps in (6, 12) if accelerator else (12,):
        config = SAETrainConfig(lr=1e-3, steps=steps, batch_size=63, log_every=4, auxk_coef=1 / 32, dead_after=200)
        found, log = train_sae(rest_of_stream, config, **SIZES, encoder_bias=True, progress=False,
                               resume_dir=folder / "checkpoint", accelerator=accelerator)
        accelerator and accelerator.wait_for_everyone()  # until the checkpoint is written
    number = accelerator.process_index if accelerator else 0
    write_json(found.save(folder / f"rank{number}") / "log.json", log)
    return found, log


def test_an_sae_of_two_processes_is_that_of_one(two, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "BUFFER", training.BUFFER)  # put back afterwards
    one, log = sae(tmp_path)
    first, second = (TopKSAE.load(two / f"rank{rank}") for rank in range(2))
    assert first.content_hash() == second.content_hash()
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(first.get_parameter(name), parameter, atol=2e-4, rtol=0)
    lines = [line for line in json.loads((two / "rank0" / "log.json").read_text()) if line["step"] != 6]
    for mine, other in zip(log, lines, strict=True):
        assert mine.keys() == other.keys()
        assert all(other[name] == pytest.approx(mine[name], rel=1e-3) for name in mine)


def launched(folder) -> None:
    """A pipeline extracts (kept and streamed) and trains."""
    found = []
    for budget in (0, 8):
        profile = miniature(folder / "backbone", corpus__budget_gb=budget, sae__steps=None)
        run = Run(profile, root=folder / "runs", progress=False)
        sae, reward = run.sae("sentence_end", 0), run.reward("sarm", 0)
        found.append([sae.key, sae.meta["fvu"], reward.meta["eval_accuracy"]])
    write_json(folder / f"launched{os.environ['RANK']}.json", found)


def test_processes_of_a_launch_share_their_stages(two, tmp_path):
    first, second = (json.loads((two / f"launched{rank}.json").read_text()) for rank in range(2))
    assert first == second and first[0][0] != first[1][0]
    profile = miniature(two / "backbone", sae__steps=None)
    alone = Run(profile, root=tmp_path, progress=False).sae("sentence_end", 0)
    key, fvu, accuracy = first[1]
    assert key == alone.key and abs(fvu - alone.meta["fvu"]) < 0.2 and 0 <= accuracy <= 1


def whole(folder) -> None:
    """A training of 5 steps, and one resumed at step 4; the process of rank 0 writes weights and metrics."""
    states = []
    for resume in (None, True):
        config = T.RewardTrainConfig(lr=3e-3, batch_size=8, epochs=1, warmup_ratio=0.0, seed=1, use_cpu=True,
                                     save_every=2, log_every=2, gradient_checkpointing=True)
        trainer = T.RewardTrainer(tiny_sarm(head=0.1), tiny_tokenizer(), tiny_pairs(40), tiny_pairs(12, 9), config,
                                  folder / "whole")
        trainer.train(resume)
        states.append(weights(trainer.model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    found = trainer.evaluate()
    if trainer.is_world_process_zero():
        metrics = {"metrics": torch.tensor([found["eval_loss"], found["eval_accuracy"]])}
        torch.save(states[0] | metrics, folder / "whole.pt")
    trainer.accelerator.end_training()


def test_two_processes_train_like_one_and_resume(two, tmp_path):
    # 40 training pairs, 8 a step: five full batches, 8 on one process or 4 + 4 on two
    whole(tmp_path)
    one, other = (torch.load(folder / "whole.pt", weights_only=True) for folder in (tmp_path, two))
    for name in one:
        torch.testing.assert_close(other[name], one[name], atol=1e-4, rtol=1e-3)
    assert (two / "whole" / "checkpoint-4" / "complete.json").is_file()


def three_steps(model, rank=0, world=1) -> torch.Tensor:
    """Plain descent, so gradients as they are, on a rank's share of 8 pairs a step; the rewards afterwards."""
    pairs = T.encode_pairs(tiny_tokenizer(), tiny_pairs(24), 64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for start in range(0, 24, 8):
        batch = T.collate_pairs(pairs[start + rank:start + 8:world])
        rewards = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        T.bradley_terry(*rewards.chunk(2)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(score_ids(model, [pair["chosen"] for pair in pairs])[0])


def sharded(folder) -> None:
    """Layers and root sharded: trained, scored, hashed, gathered."""
    from torch.distributed import get_rank, init_process_group
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo")
    model, before = tiny_sarm(head=0.1), T.encoder_hash(tiny_sarm(head=0.1))
    for part in (*model.model.layers, model):
        fully_shard(part)
    rewards = three_steps(model, get_rank(), 2)
    assert T.encoder_hash(model) == before
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if get_rank() == 0:
        torch.save(state | {"rewards": rewards}, folder / "sharded.pt")


def test_shared_out_weights_train_and_score_like_whole_ones(two):
    model, before = tiny_sarm(head=0.1), weights(tiny_sarm(head=0.1))
    rewards, found = three_steps(model), torch.load(two / "sharded.pt", weights_only=True)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    torch.testing.assert_close(found.pop("rewards"), rewards, atol=1e-5, rtol=1e-5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
