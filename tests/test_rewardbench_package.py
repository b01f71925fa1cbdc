"""A saved SARM in another environment: transformers 4.57 gives our rewards, and so does RewardBench's own pipeline.

    SARMLIB_OTHER_PYTHON=/path/to/venv/bin/python pytest tests/test_rewardbench_package.py

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
from tests.tiny import ROWS, conversation, padded, tiny_sarm

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



@pytest.fixture(scope="module")
def models():
    """The toy SARM with scaled rope, one without TopK and with signed values, one of another family."""
    return [tiny_sarm(FAMILIES["llama"]()), tiny_sarm(topk=False, relu=False, encoder_bias=True),
            tiny_sarm(FAMILIES["qwen3"]())]


@pytest.fixture(scope="module")
def found(models, tmp_path_factory):
    python = os.environ.get("SARMLIB_OTHER_PYTHON")
    if not python:
        pytest.skip("SARMLIB_OTHER_PYTHON names no interpreter with another transformers")
    folder, tokenizer = tmp_path_factory.mktemp("saved"), bos_tokenizer()
    for number, model in enumerate(models):
        save_tokenizer(tokenizer, export_with_code(model, folder / str(number)))
    ids, mask = padded(ROWS, "left")
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in TALKS]
    asked = {"folders": [str(folder / str(i)) for i in range(len(models))], "ids": ids.tolist(), "mask": mask.tolist(),
             "texts": texts}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, str(ROOT / "tests" / "other_transformers.py"), json.dumps(asked)], text=True,
                          capture_output=True, cwd=folder, env=env | {"HF_MODULES_CACHE": str(folder / "cache")})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_other_transformers_give_the_same_rewards(models, found):
    assert not found["sarmlib"]
    for model, rewards in zip(models, found["rewards"], strict=True):
        with torch.no_grad():
            ours = model(*padded(ROWS, "left")).logits[:, 0].numpy()
        np.testing.assert_allclose(rewards, ours, atol=1e-6 * (1 + abs(ours).max()), rtol=0)


def test_the_pipeline_of_rewardbench_gives_the_same_rewards(models, found):
    if not found["pipeline"]:
        pytest.skip("that environment has no rewardbench")
    tokenizer = bos_tokenizer()  # adds a BOS to the template's: the pipeline masks the first
    assert tokenizer(tokenizer.apply_chat_template(TALKS[0], tokenize=False))["input_ids"][:2] == [2, 2]
    assert len({len(ids) for ids in encode_conversations(tokenizer, TALKS)}) > 1  # so the pipeline pads
    for model, rewards in zip(models, found["pipeline"], strict=True):
        ours = score(model, tokenizer, TALKS).rewards
        np.testing.assert_allclose(rewards, ours, atol=1e-6 * (1 + abs(ours).max()), rtol=0)
