"""The toy world: a generated English-like world whose truth is known."""

from pathlib import Path

BACKBONE_DIR = Path(__file__).parent / "backbone"
"""The shipped decoder, with its card, tokenizer, training log and probe report."""
