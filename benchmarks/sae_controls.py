"""Does the dictionary matter?  SARM with SAEs whose decoder stays random, or near it (arXiv 2602.14111), on real data.

    OMP_NUM_THREADS=1 python benchmarks/sae_controls.py --profile smollm2 --data DATA [--runs runs] [--seeds 0]
        --output results/smollm2/sae_controls.json

By the profile's own recipe on its own pairs; SARM of the same seeds is read from the run.  The
third control of that paper, a frozen random encoder, is the random encoder.  A killed run goes on after its last model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from table2 import LEAST_COSINE, NAMES, append, held_sae, units_of

from sarmlib import pipeline, results
from sarmlib.evaluation.scorer import score_rows
from sarmlib.evaluation.statistics import bootstrap_ci, seeds_and_prompts_ci
from sarmlib.sae.quality import evaluate_sae
from sarmlib.sarm.model import SarmForSequenceClassification
from sarmlib.store import write_json


def work(run: pipeline.Run, variant: str, seed: int) -> dict:
    """One model: its held-out accuracy, RewardBench 2 units, and its SAE's FVU and dead share."""
    spec, sae = run.profile, held_sae(run, seed, LEAST_COSINE[variant])
    quality = evaluate_sae(sae, run.vectors("sentence_end")["held_out"])
    torch.manual_seed(seed)
    model = SarmForSequenceClassification.from_backbone_and_sae(
        run.backbone_path, sae, run.shape["layer"], dtype=torch.float32, **run.hub)
    with tempfile.TemporaryDirectory() as folder:
        metrics = pipeline.train_reward(spec.reward, model, run.tokenizer, run.pairs(seed), Path(folder), seed=seed,
                                        max_length=spec.preferences.max_length, device=run.device,
                                        bf16=spec.dtype == "bfloat16", progress=True)
        model = SarmForSequenceClassification.from_pretrained(
            Path(folder) / "model", dtype=getattr(torch, spec.dtype)).eval()
    rows = run.benchmark_rows()["rewardbench2"]
    groups, _ = score_rows(model, run.tokenizer, rows, max_length=spec.benchmarks.max_length,
                           progress=True)
    return {"pairs": [metrics["eval_accuracy"]], "rewardbench2": units_of(rows, groups),
            "fvu": quality["fvu"], "dead": quality["dead_fraction"]}


def summary(run: pipeline.Run, lines: list[dict], seeds: list[int]) -> list[dict]:
    """One row per model: means over seeds, and SARM minus it on RewardBench 2 with its 95 % interval, over prompts
    alone for one seed."""
    stored, strata = results.units(run, "sarm", "rewardbench2")
    ours = stored[[run.profile.seeds.index(seed) for seed in seeds]]
    rows = []
    for variant in LEAST_COSINE:
        mine = {line["seed"]: line for line in lines if line["variant"] == variant}
        theirs = np.array([[value for _, value in mine[seed]["rewardbench2"]] for seed in seeds])
        row = {"variant": NAMES[variant], "seeds": seeds, "rewardbench2": float(theirs.mean()),
               "pairs": float(np.mean([mine[seed]["pairs"] for seed in seeds])),
               "fvu": [mine[seed]["fvu"] for seed in seeds], "dead": [mine[seed]["dead"] for seed in seeds]}
        gap = ours - theirs
        interval = (seeds_and_prompts_ci(gap, strata=strata) if len(seeds) > 1
                    else bootstrap_ci(gap[0], strata=strata))
        rows.append(row | {"sarm_minus": interval.estimate, "low": interval.low, "high": interval.high})
    return rows


def main() -> None:
    """Train what is missing, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="smollm2")
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lines", type=Path, default=Path("runs/long/sae_controls.jsonl"))
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = pipeline.Run(given.profile, data=given.data, root=given.runs and given.runs / given.profile)
    jobs = [{"variant": variant, "seed": seed} for seed in given.seeds for variant in LEAST_COSINE]
    lines = append(given.lines, jobs, lambda job: work(run, **job))
    write_json(given.output, summary(run, lines, given.seeds))


if __name__ == "__main__":
    main()
