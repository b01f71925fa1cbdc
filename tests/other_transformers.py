"""Run by a foreign interpreter (SARMLIB_OTHER_PYTHON) without sarmlib: rewards of saved models, as JSON on stdout.

    python other_transformers.py '{"folders": [...], "ids": [[...]], "mask": [[...]], "texts": [...]}'

Each folder is loaded by AutoModelForSequenceClassification with its own code.  If the rewardbench package is installed,
its RewardBenchPipeline scores the texts too; the class is read from its file, because the package as a whole needs
chat and cloud libraries.  On a machine without CUDA the pipeline's ``.to("cuda")`` is made to do nothing.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def pipeline_class():
    found = importlib.util.find_spec("rewardbench")
    if found is None:
        return None
    spec = importlib.util.spec_from_file_location("pipeline", Path(found.origin).parent / "models" / "pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not torch.cuda.is_available():
        transformers.BatchEncoding.to = lambda self, device: self
    return module.RewardBenchPipeline


asked, rewards, piped, pipeline = json.loads(sys.argv[1]), [], [], pipeline_class()
for folder in asked["folders"]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        output = model(input_ids=torch.tensor(asked["ids"]), attention_mask=torch.tensor(asked["mask"]))
    rewards.append(output.logits[:, 0].tolist())
    if pipeline is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        piped.append(pipeline("text-classification", model, tokenizer)(asked["texts"])[:, 0].tolist())
print(json.dumps({"transformers": transformers.__version__, "sarmlib": "sarmlib" in sys.modules, "rewards": rewards,
                  "pipeline": piped}))
