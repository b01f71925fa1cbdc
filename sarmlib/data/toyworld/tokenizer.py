"""The toy world's tokenizer: whole words with their leading space, so that decoding gives the text back."""

import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .datasets import ASSISTANT, BOS, CHAT_TEMPLATE, EOT, USER, corpus

SPECIALS = ["<pad>", "<unk>", BOS, USER, ASSISTANT, EOT]
PATTERN = r" ?[A-Za-z]+| ?[0-9]+|\n| ?[^\sA-Za-z0-9]|\s"


def build_tokenizer(documents: int = 30_000) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over every word of the world (about 600 items), with the chat template."""
    pieces = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    words: set[str] = {f" {number}" for number in range(22)}
    for text in corpus(documents, seed=0):
        for part in filter(None, re.split("|".join(SPECIALS), text)):
            words.update(word for word, _ in pieces.pre_tokenizer.pre_tokenize_str(part))
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # Every stretch of text starts with one space, so that a word is the same item with or without a template.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(left=True, right=False), normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pieces.pre_tokenizer
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token=BOS, eos_token=EOT,
        extra_special_tokens=[USER, ASSISTANT], clean_up_tokenization_spaces=False,
        model_max_length=256, truncation_side="left", padding_side="right")
    fast.chat_template = CHAT_TEMPLATE
    return fast
