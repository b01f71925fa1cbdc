"""``pretrain-sae``: text in, evaluated SAE out; alone, or on many devices through ``accelerate launch``."""

from __future__ import annotations

HELP = "Pretrain an SAE on a decoder's hidden states; with many devices: accelerate launch -m sarmlib pretrain-sae."


def add_arguments(parser) -> None:
    parser.add_argument("--profile", default="paper-4b", help="settings that no other option names (default paper-4b)")
    parser.add_argument("--data", help="your folder, for profiles whose sources are 'data'")
    parser.add_argument("--model", help="decoder: a folder, a hub id, or toy")
    parser.add_argument("--corpus", help="text: a file, a folder, a hub id, or toy")
    parser.add_argument("--layer", type=int, help="layer l whose output is read, from 1 (default: half depth)")
    parser.add_argument("--positions", help="sentence_end, official, every or last")
    parser.add_argument("--features", type=int, help="M (default: the profile's expansion x d)")
    parser.add_argument("--k", type=int, help="features kept per vector (default: the profile's k_ratio x d)")
    parser.add_argument("--vectors", type=int, help="states to train on")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: one pass)")
    parser.add_argument("--batch-size", type=int, help="vectors per step over all processes")
    parser.add_argument("--seed", type=int, help="of initialisation and shuffling")
    parser.add_argument("--cache-gb", type=float, default=1000.0, help="largest activation cache, in 10^9 bytes")
    parser.add_argument("--downstream", type=int, default=0, metavar="N",
                        help="measure the loss recovered in the whole decoder on N documents")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--output", required=True, help="folder of the SAE, its cache, checkpoint, metrics.jsonl and "
                                                        "evaluation.json; the same command goes on after a stop")


def run(arguments) -> None:
    import os

    if arguments.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import shutil
    from dataclasses import asdict
    from pathlib import Path
    from typing import Any

    import torch
    from accelerate import Accelerator

    from ..activations import write_cache
    from ..artifacts import write_json
    from ..backbone import load_backbone
    from ..errors import ConfigError
    from ..extractor import ActivationExtractor
    from ..profiles import load_profile
    from ..sae.model import TopKSAE
    from ..sae.training import SAETrainConfig, evaluate_sae, train_sae
    from ..stages import HELD_OUT, Run

    given = {"backbone.source": arguments.model, "corpus.source": arguments.corpus, "backbone.layer": arguments.layer,
             "sae.positions": arguments.positions, "sae.vectors": arguments.vectors, "sae.steps": arguments.steps,
             "sae.batch_size": arguments.batch_size, "seed": arguments.seed}
    overrides = {name: value for name, value in given.items() if value is not None}
    if arguments.model:
        overrides["backbone.revision"] = None  # the profile's commit is another model's
    if arguments.corpus:
        overrides["corpus.revision"] = None
    accelerator = Accelerator(cpu=arguments.cpu)
    device, output = accelerator.device, Path(arguments.output)
    if device.type == "cpu":
        overrides |= {"device": "cpu", "dtype": "float32"}
    job = Run(load_profile(arguments.profile, data=arguments.data, **overrides), progress=accelerator.is_main_process)
    profile, spec, shape = job.profile, job.profile.sae, dict(job.shape)
    shape |= {name: value for name, value in (("n_features", arguments.features), ("k", arguments.k)) if value}
    sizes: dict[str, Any] = {name: shape[name] for name in ("d_model", "n_features", "k")}
    with torch.device("meta"):
        TopKSAE(**sizes)  # impossible sizes are refused before anything is extracted
    if spec.batch_size < accelerator.num_processes:
        raise ConfigError(f"batch size {spec.batch_size} gives {accelerator.num_processes} processes less than a "
                          "vector each; raise --batch-size")
    dtype = getattr(torch, profile.dtype)
    backbone = load_backbone(job.backbone_path, shape["layer"], revision=profile.backbone.revision, dtype=dtype,
                             trust_remote_code=profile.backbone.trust_remote_code)
    extractor = ActivationExtractor(backbone, job.tokenizer, spec.positions, window=profile.corpus.window,
                                    batch_size=profile.corpus.batch_size, device=device)
    settings = {"backbone": job.backbone_key, "layer": shape["layer"], "positions": spec.positions,
                "corpus": asdict(profile.corpus), "seed": profile.seed,
                "data": job._fingerprint(profile.corpus.source, "corpora")}
    cache = write_cache(output / "activations", extractor, job.texts(profile.seed), settings,
                        vectors=spec.vectors + HELD_OUT, max_bytes=int(arguments.cache_gb * 1e9),
                        dtype=dtype, accelerator=accelerator, progress=accelerator.is_main_process)
    extraction = extractor.stats.summary()
    del backbone, extractor
    train, held_out = cache.split(min(HELD_OUT, max(len(cache) // 10, 1)))
    config = SAETrainConfig(
        lr=spec.lr, betas=(spec.betas[0], spec.betas[1]), batch_size=spec.batch_size, renorm_every=spec.renorm_every,
        auxk_coef=spec.auxk_coef, dead_after=spec.dead_after, steps=spec.steps, seed=profile.seed,
        matmul_dtype="bfloat16" if device.type == "cuda" else "float32")
    trained, _ = train_sae(train.epochs(profile.seed), config, **sizes, encoder_bias=spec.encoder_bias, relu=spec.relu,
                           device=device, resume_dir=output / "checkpoint", log_dir=output, accelerator=accelerator,
                           progress=accelerator.is_main_process)
    if accelerator.is_main_process:
        trained.save(output)
        found = evaluate_sae(trained, held_out)
        if arguments.downstream:
            found |= _downstream(job, trained, shape["layer"], arguments.downstream, dtype, device)
        write_json(output / "evaluation.json", found | {"extraction": extraction})
        shutil.rmtree(output / "checkpoint", ignore_errors=True)
        print(", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        print(f"SAE: {output}   (its activation cache, {output / 'activations'}, can be removed)")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _downstream(job, sae, layer: int, documents: int, dtype, device) -> dict:
    from itertools import islice

    from transformers import AutoModelForCausalLM

    from ..backbone import _from_hub
    from ..sae.downstream import loss_recovered
    spec = job.profile.backbone
    model = _from_hub(AutoModelForCausalLM, job.backbone_path, revision=spec.revision, dtype=dtype,
                      trust_remote_code=spec.trust_remote_code)
    return loss_recovered(model.to(device).eval(), job.tokenizer, sae, layer,
                          islice(job.texts(job.profile.seed + 1), documents), job.profile.sae.positions,
                          max_tokens=job.profile.corpus.window)
