"""From text to a trained SAE: ours, SAELens' runner and sparsify's, on the same decoder, text, positions, M and k.

    OMP_NUM_THREADS=1 python benchmarks/end_to_end.py --model FOLDER --corpus FOLDER --tokens 40000

Each run is a process of its own on one thread, rounds interleaved; time is process-CPU time after the imports, from
loading the decoder to the SAE in hand.  Peers train with their own default optimisers.  They read the whole
decoder, or one that was cut by hand and keeps its language-model head ("cut").  All states are trained on once, in rows
of 256 tokens and batches of 512; ours is also given half and a quarter of the tokens, to compare at equal quality.
With few steps the learning rate decides, so each has one of its own: ``--search`` tries the same ones with each.
FVU is on the states of documents that nobody trained on: |x - x_hat|^2 over |x - mean|^2, and per vector after the mean
of its own entries is taken off and its length made one ("each").  Memory is the process's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from table2 import machine
from transformers import AutoModelForCausalLM, AutoTokenizer

from sarmlib.backbone import load_backbone, load_tokenizer
from sarmlib.data.text import iter_texts
from sarmlib.extractor import ActivationExtractor
from sarmlib.sae.training import SAETrainConfig, train_sae

CONTEXT, BATCH, HELD_OUT = 256, 512, 40  # tokens of a row, states of a step, documents
RATES = (5e-4, 2e-3, 8e-3, 3e-2)


def ours(spec: dict, texts: list[str]):
    extractor = ActivationExtractor(load_backbone(spec["model"], spec["layer"]), load_tokenizer(spec["model"]), "every",
                                    window=CONTEXT)
    tokens = int(spec["tokens"] * spec["share"])
    states, config = extractor.collect(texts, tokens), SAETrainConfig(batch_size=BATCH, lr=spec["lr"])
    sae, _ = train_sae(states, config, progress=False, **spec["shape"])
    return lambda x: sae(x).x_hat


def saelens(spec: dict, texts: list[str]):
    import sae_lens as lens
    shape = spec["shape"]
    config = lens.LanguageModelSAERunnerConfig(
        sae=lens.TopKTrainingSAEConfig(d_in=shape["d_model"], d_sae=shape["n_features"], k=shape["k"]),
        model_name=spec["model"], model_class_name="AutoModelForCausalLM",
        hook_name=f"model.layers.{spec['layer'] - 1}",
        is_dataset_tokenized=False, streaming=False, context_size=CONTEXT, training_tokens=spec["tokens"],
        train_batch_size_tokens=BATCH, store_batch_size_prompts=8, n_batches_in_buffer=4, verbose=False, lr=spec["lr"],
        logger=lens.LoggingConfig(log_to_wandb=False), checkpoint_path=None, output_path=None)
    sae = lens.LanguageModelSAETrainingRunner(config, override_dataset=Dataset.from_dict({"text": texts})).run()
    return lambda x: sae.decode(sae.encode(x))


def sparsify(spec: dict, texts: list[str]):
    from sparsify import SaeConfig, TrainConfig, Trainer
    from sparsify.data import chunk_and_tokenize
    shape = spec["shape"]
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rows = chunk_and_tokenize(Dataset.from_dict({"text": texts}), tokenizer, max_seq_len=CONTEXT, num_proc=1)
    rows = rows.select(range(min(len(rows), spec["tokens"] // CONTEXT)))
    config = TrainConfig(SaeConfig(num_latents=shape["n_features"], k=shape["k"]), batch_size=BATCH // CONTEXT,
                         layers=[spec["layer"] - 1], lr=spec["lr"], log_to_wandb=False, save_dir=tempfile.mkdtemp())
    trainer = Trainer(config, rows, AutoModelForCausalLM.from_pretrained(spec["model"]))
    trainer.fit()
    coder = next(iter(trainer.saes.values()))
    for optimizer in trainer.optimizers:
        getattr(optimizer, "eval", lambda: None)()  # the averaged weights of its schedule-free default
    return lambda x: coder(x).sae_out


BY = {"ours": ours, "SAELens": saelens, "sparsify": sparsify}


def quality(reconstruct, x: torch.Tensor) -> dict[str, float]:
    """FVU over all states, and the mean over states of their own (the loss of eq. 5)."""
    with torch.no_grad():
        error = torch.cat([(reconstruct(part) - part).double().square().sum(1) for part in x.split(1024)])
    x = x.double()
    spread = (x - x.mean(1, keepdim=True)).square().sum(1)
    return {"fvu": float(error.sum() / (x - x.mean(0)).square().sum()), "each": float((error / spread).mean())}


def one(spec: dict) -> dict:
    """A run of one contestant in this process."""
    texts = list(iter_texts(spec["corpus"], seed=0))
    held_out, texts = texts[:HELD_OUT], texts[HELD_OUT:]
    start = time.process_time()
    reconstruct = BY[spec["by"]](spec, texts)
    seconds, memory = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    states = ActivationExtractor(load_backbone(spec["model"], spec["layer"]), load_tokenizer(spec["model"]), "every",
                                 window=CONTEXT)
    return {"seconds": seconds, "mib": memory, **quality(reconstruct, states.collect(islice(held_out, HELD_OUT)))}


def contestants(model: str, layer: int, folder: Path) -> list[tuple[str, dict]]:
    """(name, what differs) of each; the cut decoder is saved for the peers that can only take a folder."""
    decoder = AutoModelForCausalLM.from_pretrained(model)
    decoder.model.layers = decoder.model.layers[:layer]
    decoder.config.num_hidden_layers = layer
    decoder.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return [*((f"sarmlib, {share:g} of the tokens", {"by": "ours", "share": share}) for share in (1, 0.5, 0.25)),
            *((f"{by}{', cut' if cut else ''}", {"by": by, "model": str(folder) if cut else model})
              for by in ("SAELens", "sparsify") for cut in (False, True))]


def run(spec: dict) -> dict:
    """`one` in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(spec)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"})
    if done.returncode:
        raise SystemExit(f"{spec}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--corpus")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rates", nargs=3, type=float, default=[8e-3, 8e-3, 8e-3], help="of ours, SAELens, sparsify")
    parser.add_argument("--search", action="store_true", help="print the FVU of each rate; times nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(json.loads(arguments.one))))
        return
    config = AutoModelForCausalLM.from_pretrained(arguments.model).config
    layer, d = arguments.layer or config.num_hidden_layers // 2, config.hidden_size
    spec = {"model": arguments.model, "corpus": arguments.corpus, "tokens": arguments.tokens, "layer": layer,
            "shape": {"d_model": d, "n_features": 16 * d, "k": max(1, round(3 * d / 64))}}
    print(f"{machine()}\n{spec['shape']}, layer {layer} of {config.num_hidden_layers}, {arguments.tokens} tokens")
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rivals, rates = contestants(arguments.model, layer, Path(folder)), dict(zip(BY, arguments.rates, strict=True))
        if arguments.search:
            for name, differs in rivals:
                if differs.get("share", 1) == 1 and (differs["by"] == "ours" or "cut" in name):
                    tried = {rate: round(run({**spec, **differs, "lr": rate})["fvu"], 3) for rate in RATES}
                    print(f"{name}: {tried}", flush=True)
            return
        for number in range(arguments.rounds):
            for name, differs in rivals:
                found.setdefault(name, []).append(run({**spec, **differs, "lr": rates[differs["by"]]}))
                print(f"round {number + 1}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    base = [result["seconds"] for result in next(iter(found.values()))]
    for name, results in found.items():
        ratio = statistics.median(one["seconds"] / least for one, least in zip(results, base, strict=True))
        least = min(one["seconds"] for one in results)
        print(f"{name:<28}{least:8.1f} s {ratio:6.2f}x {results[0]['mib']:8.0f} MiB   FVU {results[0]['fvu']:.3f}, "
              f"each {results[0]['each']:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
