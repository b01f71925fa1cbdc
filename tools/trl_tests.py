"""TRL's own tests of its reward trainer, run on our two reward models.

    git clone --depth 1 --branch v1.9.0 https://github.com/huggingface/trl FOLDER  # the version that is installed
    SARMLIB_TRL=FOLDER python -m tools.trl_tests [-v] [-k "sarm and peft"]

Their tests are no part of the package; they need peft.  What they name on the hub is a folder here: models of the same
decoder families with our heads, and the data sets that their own scripts make.  `LEFT_OUT` says why a test is not ours,
`SAME` which parameters need not change in training.
"""

import json
import os
import runpy
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast, training_args

from sarmlib.sarm.model import ScalarRewardModel
from tests.tiny import tiny_sarm

FOLDER = Path(os.environ.get("SARMLIB_TRL", "/nowhere")).resolve()
TEMPLATE = FOLDER / "tests/data/template.jinja"
DATA = {name: str(FOLDER / f"scripts/generate_{name}_dataset.py") for name in ("zen", "toolcall")}
LEFT_OUT = {
    "test_raises_error_when_model_num_labels_not_one": "their model has two outputs unless told; ours always has one",
    "test_trust_remote_code": "a model of theirs, by its name; ours with its code: tests/test_sarm_model.py"}
SAME = {
    "sae.": "frozen on purpose: that it does not change at all is checked instead",
    "model.final_layer_norm.bias": "of GPT-NeoX: cancels in a difference of rewards; theirs is passed over by its name"}
FAMILIES = {"Qwen2ForCausalLM-2.5": "qwen2", "Qwen2ForSequenceClassification-2.5": "qwen2",
            "LlamaForCausalLM-3.2": "llama", "Qwen3MoeForCausalLM": "qwen3_moe", "GPTNeoXForCausalLM": "gpt_neox"}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def save_models(kind: str) -> None:
    """A model under each of their names, with a tokenizer of their texts."""
    bpe, template = ByteLevelBPETokenizer(), TEMPLATE.read_text(encoding="utf-8")
    bpe.train([str(TEMPLATE), *DATA.values()], 1500, special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    for name, family in FAMILIES.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None,
                                      eos_token_id=tokenizer.eos_token_id, **SIZES)
        decoder = AutoModel.from_config(config)
        model = tiny_sarm(config) if kind == "sarm" else ScalarRewardModel.from_backbone(decoder, 2)
        model.score.weight.data.normal_()
        tokenizer.chat_template = None if family == "gpt_neox" else template
        for part in (model, tokenizer):
            part.save_pretrained(f"trl-internal-testing/tiny-{name}")
    tokenizer.chat_template, tokenizer.eos_token = template, "<|endoftext|>"  # one more token, and another end
    tokenizer.save_pretrained("Qwen/Qwen3-4B")


def save_data(sets: datasets.DatasetDict, repo: str, config_name: str) -> None:
    """In place of ``push_to_hub``: a folder, with tools as the JSON text that their tests expect."""
    folder = Path(repo, config_name)
    folder.mkdir(parents=True)
    for split, rows in sets.items():
        if "tools" in rows.features:
            features = datasets.Features(rows.features | {"tools": datasets.Value("string")})
            rows = rows.map(lambda row: {"tools": json.dumps(row["tools"])}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")
    configs = [{"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}.parquet"}
               for split in sets]} for name in os.listdir(repo) if name != "README.md"]
    Path(repo, "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")


class Ours:
    """Makes two of each test: one in a folder of SARMs, one in a folder of scalar reward models."""

    lazy_shared_datadir = pytest.fixture(lambda self: TEMPLATE.parent, name="lazy_shared_datadir")  # of pytest-datadir

    @pytest.fixture(autouse=True, params=["sarm", "scalar"])
    def ours(self, request, monkeypatch):
        test = request.node.originalname
        if test in LEFT_OUT:
            pytest.skip(LEFT_OUT[test])
        monkeypatch.chdir(request.param)
        half = (request.param, test) == ("sarm", "test_train_model_dtype")
        same = (*SAME, "score.") if half else tuple(SAME)  # the head of a SARM is float32 whatever the decoder is

        class Trainer(request.module.RewardTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                every = self.model.named_parameters
                if isinstance(self.model, PreTrainedModel):  # of a model with adapters nothing of ours may change
                    self.model.named_parameters = lambda **asked: (
                        every(**asked) if asked else (pair for pair in every() if not pair[0].startswith(same)))

            def train(self):
                vars(self.model).pop("named_parameters", None)  # training itself sees all
                encoder = getattr(self.model, "sae_hash", str)
                before = encoder()
                super().train()
                assert encoder() == before, "the frozen encoder has changed"

        monkeypatch.setattr(request.module, "RewardTrainer", Trainer)


def main() -> int:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets

    targets.update(dict.fromkeys(("sarm", "sarm_scalar"), targets["llama"]))  # it has to be told of our models
    training_args.is_torch_bf16_gpu_available = lambda: True  # TRL's default; a CPU computes it too
    datasets.DatasetDict.push_to_hub = save_data
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        for kind in ("sarm", "scalar"):
            Path(folder, kind).mkdir()
            os.chdir(Path(folder, kind))
            save_models(kind)
            for name, script in DATA.items():
                runpy.run_path(script)["main"](0.1, True, f"trl-internal-testing/{name}")
        os.chdir(folder)
        Path("theirs").symlink_to(FOLDER / "tests")  # a package that is not called like ours
        theirs = "theirs/test_reward_trainer.py::TestRewardTrainer"
        return pytest.main([theirs, "-rs", "-p", "no:cacheprovider", *sys.argv[1:]], [Ours()])


if not TEMPLATE.is_file() or not find_spec("trl") or not find_spec("peft"):
    raise SystemExit(f"SARMLIB_TRL={FOLDER} has no tests/data/template.jinja, or trl or peft is absent")
if __name__ == "__main__":
    sys.exit(main())
