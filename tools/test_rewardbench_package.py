"""A saved SARM in another environment: transformers 4.57 gives our rewards, and so does RewardBench's own pipeline.

    SARMLIB_OTHER_PYTHON=/path/to/venv/bin/python pytest tools/test_rewardbench_package.py

That environment needs torch and transformers (RewardBench pins 4.57.6), and for the second test rewardbench.
"""

import json
import os
import subprocess

import numpy as np
import pytest
import torch

from sarmlib.chat import encode_conversations
from sarmlib.evaluation.scorer import score
from sarmlib.sarm.model import export_with_code
from tests.helpers import ROOT
from tests.test_sarm_model import FAMILIES
from tests.test_scorer import bos_tokenizer
from tests.tiny import ROWS, conversation, padded, tiny_pairs, tiny_sarm

PYTHON = os.environ.get("SARMLIB_OTHER_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="SARMLIB_OTHER_PYTHON names no interpreter")
TALKS = [conversation("w3 w4", "w5"), conversation("w6", "w7 w8 w9 w10 w11"), conversation("w12 w13 w14", "")]


def save_tokenizer(tokenizer, folder):
    """Written under the names of transformers 4 too, which RewardBench pins."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens", [])
    file.write_text(json.dumps(settings))
    return folder


def test_another_transformers_and_the_pipeline_of_rewardbench_give_the_same_rewards(tmp_path):
    """Of the toy SARM with scaled rope, of one without TopK and with signed values, and of another family."""
    models = [tiny_sarm(FAMILIES["llama"]()), tiny_sarm(topk=False, relu=False, encoder_bias=True),
              tiny_sarm(FAMILIES["qwen3"]())]
    tokenizer, (ids, mask) = bos_tokenizer(), padded(ROWS, "left")  # a second BOS: the pipeline masks the first
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in TALKS]
    assert len({len(one) for one in encode_conversations(tokenizer, TALKS)}) > 1  # so the pipeline pads
    folders = [str(save_tokenizer(tokenizer, export_with_code(model, tmp_path / str(number))))
               for number, model in enumerate(models)]
    asked = {"folders": folders, "ids": ids.tolist(), "mask": mask.tolist(), "texts": texts}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([PYTHON, str(ROOT / "tools" / "other_transformers.py"), json.dumps(asked)], text=True,
                          capture_output=True, cwd=tmp_path, env=env | {"HF_MODULES_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    with torch.no_grad():
        ours = [model(ids, mask).logits[:, 0].numpy() for model in models]
    piped = [score(model, tokenizer, TALKS).rewards for model in models] if found["pipeline"] else []
    assert not found["sarmlib"] and len(found["rewards"]) == 3
    for wanted, got in zip([*ours, *piped], [*found["rewards"], *found["pipeline"]], strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6 * (1 + abs(wanted).max()), rtol=0)


COMMAND = """
import sys, torch, transformers
if not torch.cuda.is_available():  # its batches go to "cuda" without asking
    transformers.BatchEncoding.to = lambda self, device: self
from rewardbench.rewardbench import main
main()
"""


def test_the_command_of_rewardbench_scores_a_folder_as_we_do(tmp_path):
    if subprocess.run([PYTHON, "-c", "import rewardbench"], capture_output=True, cwd=tmp_path).returncode:
        pytest.skip("its environment has no rewardbench, which needs transformers 4.51 and trl 0.15")
    model, tokenizer = tiny_sarm(), bos_tokenizer()
    save_tokenizer(tokenizer, export_with_code(model, tmp_path / "model"))
    talks = [[*pair["prompt"], {"role": "assistant", "content": pair[side]}]
             for pair in tiny_pairs(40) for side in ("chosen", "rejected")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(
        {"prompt": one[0]["content"], "chosen": one, "rejected": other}) + "\n"
        for one, other in zip(talks[::2], talks[1::2], strict=True)))
    done = subprocess.run(
        [PYTHON, "-c", COMMAND, "--model", tmp_path / "model", "--dataset", tmp_path / "rows.jsonl", "--load_json",
         "--trust_remote_code", "--torch_dtype", "float32", "--not_quantized", "--save_all", "--output_dir", tmp_path],
        text=True, capture_output=True, cwd=tmp_path, env=os.environ | {
            "PYTHONPATH": "", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "c")})
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in next(tmp_path.rglob("*_all.jsonl")).read_text().splitlines()]
    found = [value for line in lines for value in line.values()]  # chosen, rejected
    np.testing.assert_allclose(np.ravel(found), score(model, tokenizer, talks).rewards, atol=1e-5)
