"""Run by a foreign interpreter (SARMLIB_OTHER_PYTHON) without sarmlib: rewards of saved models, as JSON on stdout.

    python other_transformers.py '{"folders": [...], "ids": [[...]], "mask": [[...]], "texts": [...]}'

With the rewardbench package, its RewardBenchPipeline scores the texts too; the class is read from its file, because
the package as a whole needs chat and cloud libraries.  Without CUDA its ``.to("cuda")`` is made to do nothing.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

asked, rewards, piped, package = json.loads(sys.argv[1]), [], [], find_spec("rewardbench")
if package:
    sys.path.insert(0, str(Path(package.origin).parent / "models"))
    from pipeline import RewardBenchPipeline
if not torch.cuda.is_available():
    transformers.BatchEncoding.to = lambda self, device: self
for folder in asked["folders"]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        output = model(input_ids=torch.tensor(asked["ids"]), attention_mask=torch.tensor(asked["mask"]))
    rewards.append(output.logits[:, 0].tolist())
    if package:
        scored = RewardBenchPipeline("text-classification", model, transformers.AutoTokenizer.from_pretrained(folder))
        piped.append(scored(asked["texts"])[:, 0].tolist())
print(json.dumps({"sarmlib": "sarmlib" in sys.modules, "rewards": rewards, "pipeline": piped}))
