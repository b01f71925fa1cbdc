"""``train``: preference pairs in, reward model out; on many devices through ``accelerate launch``."""

from __future__ import annotations

HELP = ("Train a reward model on preference pairs; with many devices: accelerate launch --config_file "
        "sarmlib/profiles/accelerate/fsdp.yaml -m sarmlib train.")


def add_arguments(parser) -> None:
    parser.add_argument("--backbone", required=True, help="decoder with its tokenizer: a folder or a hub id")
    parser.add_argument("--revision", help="commit of a backbone on the hub")
    parser.add_argument("--sae", help="folder of a pretrained SAE (pretrain-sae makes one); without it: a scalar model")
    parser.add_argument("--layer", type=int, help="layer l of the SAE, from 1 (default: half depth)")
    parser.add_argument("--data", required=True, help="pairs: a file of any format load_pairs reads, or hub:<id>")
    parser.add_argument("--eval-fraction", type=float, default=0.05, help="share of the prompts that is held out")
    parser.add_argument("--mode", type=int, default=1, help="trained: 0 head; 1 backbone and head; 3 the SAE too")
    parser.add_argument("--no-topk", action="store_true", help="score all M activations (ablation)")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters on the backbone (merged after)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--lr", type=float, default=4e-6)
    parser.add_argument("--head-lr", type=float, help="of the head alone")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=512, help="pairs per step over all devices")
    parser.add_argument("--micro-batch-size", type=int, help="pairs per forward pass and device")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens per conversation")
    parser.add_argument("--margin", action="store_true", help="use the pairs' margins")
    parser.add_argument("--center", type=float, default=0.0, help="weight of (r_c + r_r)^2")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="mixed precision (accelerate's configs set it themselves)")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--output", required=True, help="folder of the model, evaluation.json, checkpoints; the same "
                                                        "command goes on after a stop")


def run(arguments) -> None:
    import json
    import os
    from pathlib import Path

    if arguments.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from ..artifacts import write_json
    from ..backbone import load_tokenizer
    from ..data.preferences import load_pairs, split_by_prompt
    from ..errors import ConfigError
    from ..sarm.model import SarmForSequenceClassification, ScalarRewardModel, export_with_code
    from ..sarm.released import save_tokenizer
    from ..sarm.training import RewardTrainConfig, RewardTrainer
    output = Path(arguments.output)
    given = {name: value for name, value in vars(arguments).items()
             if name not in ("command", "output", "cpu", "save_every", "function", "run")
             and isinstance(value, (str, int, float, bool, type(None)))}
    settings = output / "training.json"
    if settings.is_file() and (old := json.loads(settings.read_text())) != given:
        changed = sorted(name for name in old.keys() | given.keys() if old.get(name) != given.get(name))
        raise ConfigError(f"{output} holds a training with another {', '.join(changed)}; choose another --output")
    if arguments.no_topk and not arguments.sae:
        raise ConfigError("--no-topk is for a SARM: pass --sae")
    config = RewardTrainConfig(
        lr=arguments.lr, head_lr=arguments.head_lr, epochs=arguments.epochs, batch_size=arguments.batch_size,
        micro_batch_size=arguments.micro_batch_size, mode=arguments.mode, use_margin=arguments.margin,
        center=arguments.center, max_length=arguments.max_length, seed=arguments.seed, bf16=arguments.bf16,
        gradient_checkpointing=arguments.gradient_checkpointing, lora_rank=arguments.lora, use_cpu=arguments.cpu,
        save_every=arguments.save_every)
    pairs = load_pairs(arguments.data)
    train, held_out = split_by_prompt(pairs, arguments.eval_fraction, seed=arguments.seed)
    tokenizer, hub = load_tokenizer(arguments.backbone, revision=arguments.revision), {"revision": arguments.revision}
    if arguments.sae:
        model = SarmForSequenceClassification.from_backbone_and_sae(
            arguments.backbone, arguments.sae, arguments.layer, topk=not arguments.no_topk, **hub)
    else:
        model = ScalarRewardModel.from_backbone(arguments.backbone, arguments.layer, **hub)
    main = int(os.environ.get("RANK", 0)) == 0
    trainer = RewardTrainer(model, tokenizer, train, held_out, config, output / "checkpoints", progress=main)
    if main:
        output.mkdir(parents=True, exist_ok=True)
        write_json(settings, given)
    trainer.train(resume="auto")
    found = trainer.evaluate()
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(str(output))  # gathers the weights; every process takes part
    elif main:
        export_with_code(model, output) if arguments.sae else model.save_pretrained(output)
    if main:
        save_tokenizer(tokenizer, output)
        write_json(output / "evaluation.json", found | {"pairs": len(train), "held_out": len(held_out)})
        print(", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in found.items()))
        print(f"reward model: {output}   (its checkpoints, {output / 'checkpoints'}, can be removed)")
    trainer.accelerator.end_training()
