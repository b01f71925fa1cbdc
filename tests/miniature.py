"""The whole pipeline in miniature: a tiny random decoder that speaks the toy world's words, and a profile for it."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sarmlib.backbone import load_tokenizer
from sarmlib.data.toyworld import BACKBONE_DIR
from sarmlib.profiles import Profile, load_profile

SMALL = {
    "seeds": [0], "sae.steps": 20, "sae.vectors": 600, "sae.batch_size": 64, "sae.k_ratio": 0.5, "sae.expansion": 4,
    "preferences.train_pairs": 24, "preferences.eval_pairs": 24, "reward.epochs": 1, "interpretation.permutations": 20,
    "interpretation.features": 6, "steering.bootstrap": 50, "benchmarks.items_per_subset": 8,
}


def save_backbone(folder: Path, seed: int = 0) -> Path:
    """A random Llama (3 layers, d = 16) with the toy world's tokenizer, as save_pretrained writes them."""
    tokenizer = load_tokenizer(BACKBONE_DIR)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def miniature(backbone: Path, **overrides) -> Profile:
    """The toy profile with this backbone and very small sizes (d = 16, M = 64, k = 8)."""
    settings = {**SMALL, "backbone.source": str(backbone),
                **{name.replace("__", "."): value for name, value in overrides.items()}}
    return load_profile("toy", **settings)
