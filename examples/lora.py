"""LoRA: train a SARM on one small GPU, with adapters on the backbone (peft) and TRL's RewardTrainer.

    pip install trl peft

    python examples/lora.py --model FOLDER --data pairs.jsonl --output OUT

``--model`` is a SARM folder; ``sarmlib train --epochs 0.001`` makes an untrained one of a backbone and an SAE.  Trained
are adapters on every linear layer of the decoder, and the value head; the SAE stays frozen, and its bytes are compared.
Afterwards the adapters are merged, so that OUT is an ordinary SARM folder.
"""

from __future__ import annotations

import argparse

from sarmlib import SarmForSequenceClassification
from sarmlib.backbone import load_tokenizer
from sarmlib.data.pairs import load_pairs
from sarmlib.errors import ModelError


def with_adapters(model, rank: int):
    """The model with LoRA adapters on the backbone and a trainable head; everything else is frozen.

    peft has no default layers for a SARM, whose decoder may be of any family: without ``target_modules`` it raises.
    """
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=["score"],
                             task_type="SEQ_CLS")  # which leaves `score` out of the linear layers
    return peft.get_peft_model(model, config)


def as_conversations(pairs: list[dict]) -> list[dict]:
    """Pairs in TRL's format: both sides as whole conversations."""
    return [{side: [*pair["prompt"], {"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
            for pair in pairs]


def train(model, tokenizer, pairs: list[dict], output: str, *, rank: int = 8, **settings):
    """The trained SARM, adapters merged.  ``settings`` go to `trl.RewardConfig`; ModelError when the SAE moved."""
    import trl
    from datasets import Dataset

    before = model.sae_hash()
    wrapped = with_adapters(model, rank)
    trainer = trl.RewardTrainer(
        model=wrapped, processing_class=tokenizer, train_dataset=Dataset.from_list(as_conversations(pairs)),
        args=trl.RewardConfig(output_dir=output, report_to="none", **settings))
    trainer.train()
    merged = wrapped.merge_and_unload()
    if merged.sae_hash() != before:
        raise ModelError("the SAE changed while the adapters were trained")
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a SARM")
    parser.add_argument("--data", required=True, help="preference pairs, as `sarmlib train --data` reads them")
    parser.add_argument("--output", required=True, help="folder of the trained SARM")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens per conversation")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    pairs = load_pairs(arguments.data)
    print("\n".join(pairs.report.lines()))
    model = train(SarmForSequenceClassification.from_pretrained(arguments.model), tokenizer, pairs, arguments.output,
                  rank=arguments.rank, learning_rate=arguments.lr, num_train_epochs=arguments.epochs,
                  per_device_train_batch_size=arguments.batch_size, max_length=arguments.max_length)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"reward model: {arguments.output}")


if __name__ == "__main__":
    main()
