"""Two gloo processes on the CPU extract and train like one; the command runs from text to an evaluated SAE."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from sarmlib.__main__ import main
from sarmlib.activations import ActivationCache, write_cache
from sarmlib.sae.model import TopKSAE
from sarmlib.sae.training import SAETrainConfig, train_sae
from tests.helpers import ROOT
from tests.miniature import save_backbone
from tests.test_activations import SETTINGS, everything, extractor
from tests.test_extractor import documents

SCRIPT = """
import sys, torch
from pathlib import Path
from accelerate import Accelerator
from tests.test_sae_distributed import work
torch.set_num_threads(1)
folder, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)
assert accelerator.num_processes == 2
work(folder, accelerator)[1].save(folder / f"rank{accelerator.process_index}")
accelerator.end_training()
"""


def work(folder, accelerator=None):
    """Extraction, then training on an odd batch size: the two processes get parts of different length."""
    cache = write_cache(folder, extractor(), documents(600), SETTINGS, vectors=6000, max_bytes=1 << 20,
                        accelerator=accelerator, progress=False)
    config = SAETrainConfig(lr=1e-3, steps=12, batch_size=63, shuffle_buffer=130, log_every=4, auxk_coef=1 / 32,
                            dead_after=200, checkpoint_every=5)
    sae, log = train_sae(cache.epochs(0), config, d_model=16, n_features=64, k=3, progress=False,
                         resume_dir=folder / "checkpoint", log_dir=folder, accelerator=accelerator)
    return cache, sae, log


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_give_the_result_of_one(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                        "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ranks = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "two")], cwd=ROOT, text=True,
                              env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
             for rank in range(2)]
    one_cache, one, log = work(tmp_path / "one")
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    two_cache = ActivationCache(tmp_path / "two")
    assert torch.equal(everything(two_cache), everything(one_cache))  # extraction: to the last bit
    first, second = (TopKSAE.load(tmp_path / "two" / f"rank{rank}") for rank in range(2))
    assert first.content_hash() == second.content_hash()
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(first.get_parameter(name), parameter, atol=2e-4, rtol=0)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for mine, other in zip(log, lines, strict=True):
        assert {"seconds"} | mine.keys() == other.keys()
        assert all(other[name] == pytest.approx(mine[name], rel=1e-3) for name in mine if name != "seconds")


def test_command_from_text_to_an_evaluated_sae(tmp_path, capsys):
    save_backbone(tmp_path / "model")
    text = "".join(json.dumps({"text": f"the cook is here . he is number {i} ."}) + "\n" for i in range(400))
    (tmp_path / "corpus.jsonl").write_text(text)
    command = ["pretrain-sae", "--cpu", "--profile", "toy", "--model", str(tmp_path / "model"), "--corpus",
               str(tmp_path / "corpus.jsonl"), "--layer", "2", "--features", "48", "--k", "3", "--vectors", "300",
               "--positions", "every", "--steps", "20", "--batch-size", "32", "--downstream", "4", "--output"]
    assert main([*command, str(tmp_path / "out")]) == 0, capsys.readouterr().err
    sae = TopKSAE.load(tmp_path / "out")
    assert (sae.d_model, sae.n_features, sae.k) == (16, 48, 3)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert 0 < found["fvu"] < 2 and found["l0"] <= 3 and found["ce_zero"] > 0 and found["extraction"]["tokens"] > 0
    assert "loss_recovered" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "activations", "evaluation.json", "metrics.jsonl", "sae.safetensors", "sae_config.json"]
    for change, word in ((["--k", "49"], "k=49"), (["--layer", "4"], "layer=4"), (["--layer", "1"], "other settings"),
                         (["--corpus", str(tmp_path / "none")], "none")):
        assert main([*command, str(tmp_path / "out"), *change]) == 1
        assert word in capsys.readouterr().err
    assert TopKSAE.load(tmp_path / "out").content_hash() == sae.content_hash()
