"""``sarmlib train`` from pairs to a saved model that the library scores with; it goes on after a stop."""

import json

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sarmlib.__main__ import main
from sarmlib.evaluation.scoring import score_conversations
from sarmlib.sae.model import TopKSAE
from sarmlib.sarm.training import RewardTrainer
from tests.helpers import ROOT
from tests.miniature import save_backbone
from tests.tiny import conversation


@pytest.fixture
def world(tmp_path):
    save_backbone(tmp_path / "backbone")
    TopKSAE(16, 48, 4, generator=torch.Generator().manual_seed(0)).save(tmp_path / "sae")
    names = "cook baker farmer doctor nurse pilot singer writer".split()
    rows = [{"prompt": f"who is the {name} number {i} ?", "chosen": f"he is the {name} .", "rejected": "she is here ."}
            for i in range(8) for name in names]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["train", "--cpu", "--backbone", str(tmp_path / "backbone"), "--data", str(tmp_path / "pairs.jsonl"),
            "--layer", "2", "--batch-size", "8", "--epochs", "2", "--lr", "3e-3", "--eval-fraction", "0.3",
            "--save-every", "3", "--output", str(tmp_path / "out")]


def test_from_pairs_to_a_saved_sarm_and_on_after_a_stop(world, tmp_path, capsys, monkeypatch):
    command, out = [*world, "--sae", str(tmp_path / "sae"), "--gradient-checkpointing"], tmp_path / "out"
    step = RewardTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)
    monkeypatch.setattr(RewardTrainer, "training_step", stop)
    assert main(command) != 0 and "interrupted" in capsys.readouterr().err
    done = []
    monkeypatch.setattr(RewardTrainer, "training_step", lambda self, *a, **k: (done.append(1), step(self, *a, **k))[1])
    assert main(command) == 0, capsys.readouterr().err
    found = json.loads((out / "evaluation.json").read_text())
    steps = 2 * -(-found["pairs"] // 8)
    assert len(done) == steps - 3 and found["held_out"] > 4 and found["pairs"] + found["held_out"] == 64
    assert "accuracy" in capsys.readouterr().out
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.sae_hash() == TopKSAE.load(tmp_path / "sae").content_hash() and model.score.weight.any()
    assert len(score_conversations(model, tokenizer, [conversation("who is here ?", "he is .")]).rewards) == 1
    assert (out / "modeling_sarm.py").is_file() and (model.config.layer, model.config.topk) == (2, True)
    assert main([*command, "--mode", "0"]) == 1
    assert "another mode" in capsys.readouterr().err


def test_a_scalar_model_without_sae_and_what_is_refused(world, tmp_path, capsys):
    assert main([*world, "--mode", "0", "--epochs", "1"]) == 0, capsys.readouterr().err
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "ScalarRewardModel"
    for change, word in ((["--no-topk"], "--sae"), (["--mode", "2"], "mode=2"), (["--layer", "9"], "layer=9"),
                         (["--data", str(tmp_path / "none.jsonl")], "none.jsonl"), (["--sae", "nowhere"], "nowhere"),
                         (["--eval-fraction", "2"], "fraction is 2"), (["--batch-size", "0"], "batch_size")):
        assert main([*world[:-1], str(tmp_path / "other"), *change]) == 1, change
        assert word in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed_zero2", "deepspeed_zero3"])
def test_shipped_configs_are_what_accelerate_reads(name):
    path = ROOT / "sarmlib" / "profiles" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp": "FSDP"}.get(name, "DEEPSPEED")
    known = {action.dest for action in launch_command_parser()._actions}
    raw = yaml.safe_load(path.read_text())
    assert set(raw.get("fsdp_config", {})) | set(raw.get("deepspeed_config", {})) <= known
