"""From a conversation to token ids, and from an attention mask to the token whose hidden state is rewarded.

A conversation is a list of ``{"role", "content"}`` messages that ends with an assistant turn.  Its text is what the
tokenizer's own chat template renders; a tokenizer without one gets `FALLBACK_TEMPLATE`.  The reward position is the
last attended token, found by mask and never by comparing ids with the pad token (pad may equal end of text).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from .errors import ConfigError, DataError

FALLBACK_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}{{ eos_token or '' }}"
"""Used when the tokenizer has no chat template: each turn as ``<|role|>\\n...\\n``, then the end-of-text token."""

_FACTS: WeakKeyDictionary = WeakKeyDictionary()


def check_conversation(messages: Sequence[dict]) -> None:
    """Raise `DataError` unless `messages` is a non-empty list of role/content strings that ends with the assistant.

    An empty answer is allowed: the template still closes the turn, and that token is rewarded.
    """
    if isinstance(messages, (str, dict)) or len(messages) == 0:
        raise DataError(f"a conversation is a non-empty list of messages, got {messages!r:.80}; "
                        "wrap a single text as [{'role': 'user', ...}, {'role': 'assistant', ...}]")
    for number, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(field), str):
                raise DataError(f"message {number} has no text field {field!r}: {message!r:.120}")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"the last message has role {messages[-1]['role']!r}; a conversation to be rewarded ends with "
                        "role 'assistant'")


def render(tokenizer, messages: Sequence[dict]) -> str:
    """The text of a conversation under the tokenizer's chat template (or `FALLBACK_TEMPLATE`), turn closed."""
    check_conversation(messages)
    template = None if tokenizer.chat_template else FALLBACK_TEMPLATE
    try:
        return tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False)
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise DataError(f"the chat template refuses a conversation with roles {roles}: {error}") from error


def encode_conversation(tokenizer, messages: Sequence[dict], max_length: int | None = None) -> list[int]:
    """Token ids of one conversation: exactly one BOS, closed turn last, at most `max_length` ids.

    A BOS is present when the template writes one or the tokenizer adds one, and then once, first.  White space that a
    template puts after its end-of-turn token is dropped, so that the end of turn is rewarded.  A conversation that is
    too long loses tokens on the left, after the BOS; the end of turn is always kept.
    """
    return encode_conversations(tokenizer, [messages], max_length)[0]


def encode_conversations(tokenizer, conversations: Iterable[Sequence[dict]], max_length: int | None = None
                         ) -> list[list[int]]:
    """`encode_conversation` for many conversations with one tokenizer call."""
    texts = [render(tokenizer, messages) for messages in conversations]
    if not texts:
        return []
    facts, bos = _facts(tokenizer), tokenizer.bos_token_id
    sequences = [_tidy(ids, facts, bos) for ids in _ids(tokenizer, texts)]
    return sequences if max_length is None else truncate_left(tokenizer, sequences, max_length)


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # not verbose: we truncate ourselves


def fit_length(model, max_length: int) -> int:
    """`max_length`, or the model's context length (max_position_embeddings) if that is shorter."""
    config = getattr(model.config, "backbone_config", model.config)
    context = getattr(config, "max_position_embeddings", None)
    return min(max_length, context) if isinstance(context, int) and context > 0 else max_length


def truncate_left(tokenizer, sequences: Iterable[list[int]], max_length: int) -> list[list[int]]:
    """Cut each sequence to its BOS (if it starts with one) and its last tokens, `max_length` ids in all."""
    if max_length < 2:
        raise ConfigError(f"max_length must be at least 2 (BOS and end of turn), got {max_length}")
    bos = tokenizer.bos_token_id if _facts(tokenizer).one_bos else None
    return [ids if len(ids) <= max_length
            else [bos, *ids[1 - max_length:]] if ids[0] == bos else ids[-max_length:] for ids in sequences]


def _tidy(ids: list[int], facts: _TemplateFacts, bos: int | None) -> list[int]:
    while len(ids) > 1 and ids[-1] in facts.blank and ids[-1] != facts.end_of_turn:
        ids = ids[:-1]
    if facts.one_bos:
        # A true BOS stands only at the front; one that also closes turns (GPT-2 style) is removed from the front only.
        body = ids[ids[0] == bos :] if bos == facts.end_of_turn else [i for i in ids if i != bos]
        ids = [bos, *body]
    return ids


class _TemplateFacts:
    """What one rendered conversation tells about a tokenizer: its end-of-turn id, its BOS, its blank tokens."""

    def __init__(self, tokenizer):
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = tokenizer(render(tokenizer, probe), add_special_tokens=False)["input_ids"]
        special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        empty = tokenizer("")["input_ids"]
        self.one_bos = bos is not None and (ids[:1] == [bos] or (len(empty) > 0 and empty[0] == bos))
        tail = [i for i in ids if i not in special and not tokenizer.decode([i]).strip()]
        self.blank = set(tail)
        while len(ids) > 1 and ids[-1] in self.blank:
            ids = ids[:-1]
        self.end_of_turn = ids[-1] if ids[-1] in special and ids[-1] != tokenizer.unk_token_id else eos


def _facts(tokenizer) -> _TemplateFacts:
    known = _FACTS.get(tokenizer)
    if known is None or known[0] != tokenizer.chat_template:
        known = _FACTS[tokenizer] = (tokenizer.chat_template, _TemplateFacts(tokenizer))
    return known[1]


def end_of_turn_id(tokenizer) -> int | None:
    """The special token that closes an assistant turn in the chat template, else the end-of-text token, else None."""
    return _facts(tokenizer).end_of_turn


def count_not_end_of_turn(tokenizer, sequences: Iterable[Sequence[int]]) -> int:
    """How many sequences do not end with the end-of-turn token; warns once per call when there are any."""
    end = end_of_turn_id(tokenizer)
    count = sum(ids[-1] != end for ids in sequences)
    if count:
        warnings.warn(f"{count} conversations do not end with the end-of-turn token (id {end}): their last token is "
                      "rewarded. Give the tokenizer a chat template that closes the assistant turn.", stacklevel=3)
    return count


def pad_id(tokenizer) -> int:
    """An id to fill padding with; its value never matters because positions come from the mask."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return value
    return 0


def collate(sequences: Sequence[Sequence[int]], pad_id: int = 0) -> dict[str, Tensor]:
    """Right-padded batch ``{"input_ids": int64 [B, T], "attention_mask": int64 [B, T]}``."""
    lengths = [len(ids) for ids in sequences]
    if not lengths or min(lengths) == 0:
        raise DataError("a batch needs at least one sequence and no sequence may be empty")
    width = max(lengths)
    input_ids = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in sequences])
    attention_mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def reward_position(attention_mask: Tensor) -> Tensor:
    """Index of the last attended token of each row, int64 [B], for any padding side.

    `attention_mask` is [B, T] with nonzero where attended.  Raises `DataError` for a row without attended tokens.
    """
    attended = attention_mask != 0
    if not bool(attended.any(dim=-1).all()):
        raise DataError("attention_mask has a row without attended tokens; there is nothing to reward in it")
    return attended.shape[-1] - 1 - attended.flip(-1).int().argmax(dim=-1)
