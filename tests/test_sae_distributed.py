"""Two gloo processes on the CPU train an SAE like one."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from sarmlib.sae import training
from sarmlib.sae.topk import TopKSAE
from sarmlib.sae.training import SAETrainConfig, train_sae
from sarmlib.store import write_json
from tests.helpers import two_ranks
from tests.test_sae_training import SIZES, planted, stream_of


def work(folder, accelerator=None):
    """An odd batch size: the two processes get parts of different length."""
    training.BUFFER = 130
    config = SAETrainConfig(lr=1e-3, steps=12, batch_size=63, log_every=4, auxk_coef=1 / 32, dead_after=200,
                            checkpoint_every=5)
    return train_sae(stream_of(planted()), config, **SIZES, encoder_bias=True, progress=False,
                     resume_dir=folder / "checkpoint", accelerator=accelerator)


def rank(folder: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    sae, log = work(Path(folder), accelerator)
    write_json(sae.save(Path(folder, f"rank{accelerator.process_index}")) / "log.json", log)
    accelerator.end_training()


def test_two_processes_give_the_result_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "BUFFER", training.BUFFER)  # put back afterwards
    two_ranks(f"from tests.test_sae_distributed import rank; rank({str(tmp_path / 'two')!r})")
    one, log = work(tmp_path / "one")
    first, second = (TopKSAE.load(tmp_path / "two" / f"rank{rank}") for rank in range(2))
    assert first.content_hash() == second.content_hash()
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(first.get_parameter(name), parameter, atol=2e-4, rtol=0)
    lines = json.loads((tmp_path / "two" / "rank0" / "log.json").read_text())
    for mine, other in zip(log, lines, strict=True):
        assert mine.keys() == other.keys()
        assert all(other[name] == pytest.approx(mine[name], rel=1e-3) for name in mine)
