"""From a conversation to token ids, and from an attention mask to the token whose hidden state is rewarded.

A conversation is a list of ``{"role", "content"}`` messages that ends with an assistant turn.  The reward
position is found by mask and never by comparing ids with the pad token (pad may equal end of text).
"""

import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from sarmlib.errors import ConfigError, DataError, ModelError

SECONDS, MAX_TEXT = 5.0, 1_000_000  # of rendering one conversation; characters that a template may add
FALLBACK_TEMPLATE = "{% for m in messages %}<|{{m.role}}|>\n{{m.content}}\n{% endfor %}{{eos_token or ''}}"


def check_conversation(messages: Sequence[dict]) -> None:
    """Raise `DataError` unless `messages` are role/content strings, the assistant's last (perhaps empty)."""
    if isinstance(messages, (str, dict)) or len(messages) == 0:
        raise DataError(f"a conversation is a non-empty list of messages, got {messages!r:.80}; wrap a text "
                        "as [{'role': 'user', ...}, {'role': 'assistant', ...}]")
    for number, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(field), str):
                raise DataError(f"message {number} has no text field {field!r}: {message!r:.120}")
    if (role := messages[-1]["role"]) != "assistant":
        raise DataError(f"the last message has role {role!r}; it must be the 'assistant', which is rewarded")


def render(tokenizer, messages: Sequence[dict]) -> str:
    """The text of a conversation under the tokenizer's chat template (else a plain one), turn closed."""
    check_conversation(messages)
    template = None if tokenizer.chat_template else FALLBACK_TEMPLATE
    try:
        _bound_arithmetic()
        with _within(SECONDS):
            text = tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False)
        text.encode()
    except Exception as error:  # a template is a program: whatever it raises is a fault of the model's folder
        roles = [message["role"] for message in messages]
        raise DataError(f"the chat template refuses a conversation with roles {roles}: {error!r}") from error
    if not text.strip() or len(text) > MAX_TEXT + 2 * sum(len(message["content"]) for message in messages):
        raise DataError(f"the chat template makes {len(text)} characters of a conversation; the model needs another")
    return text


@lru_cache(1)
def _bound_arithmetic() -> None:
    """No chat template multiplies or raises to more than MAX_TEXT from now on: no timer interrupts an operation."""
    from transformers.utils import chat_template_utils as templates

    class Bounded(templates.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context, operator, left, right):
            a, b = (len(one) if hasattr(one, "__len__") else abs(one) for one in (left, right))
            if a * b > MAX_TEXT or operator == "**" and (a > 1000 or b > 6):
                raise OverflowError(f"it computes {left!r:.20} {operator} {right!r:.20}; at most {MAX_TEXT:,} may be")
            return super().call_binop(context, operator, left, right)

    templates.ImmutableSandboxedEnvironment = Bounded


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds; only the main thread can be interrupted."""
    def stop(*_):
        raise TimeoutError(f"it runs longer than {seconds} s")
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def encode_conversations(tokenizer, conversations: Iterable[Sequence[dict]],
                         max_length: int | None = None) -> list[list[int]]:
    """Token ids of each conversation, cut by `truncate_left` if `max_length` is given.

    Where the template or the tokenizer writes a BOS there is one, first; white space after the last end of
    turn is dropped, so that the end of turn is rewarded.
    """
    texts = [render(tokenizer, messages) for messages in conversations]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    sequences = [_tidy(tokenizer, ids) for ids in encoded]
    return sequences if max_length is None else truncate_left(tokenizer, sequences, max_length)


def truncate_left(tokenizer, sequences: Iterable[list[int]], max_length: int) -> list[list[int]]:
    """Cut each sequence to its BOS (if it starts with one) and its last tokens, `max_length` ids in all."""
    if max_length < 2:
        raise ConfigError(f"max_length must be at least 2 (BOS and end of turn), got {max_length}")
    bos = _facts(tokenizer, tokenizer.chat_template)[0]
    cut = ((ids, ids[:1] if ids[0] == bos else []) for ids in sequences)
    return [ids if len(ids) <= max_length else head + ids[len(head) - max_length:] for ids, head in cut]


def check_vocabulary(config, tokenizer) -> None:
    """ModelError for a tokenizer with ids that the model's embedding does not have."""
    size = getattr(config.get_text_config(), "vocab_size", None) or getattr(config, "vocab_size", None)
    most = max(tokenizer.get_vocab().values(), default=-1)
    if size is not None and most >= size:
        raise ModelError(f"the tokenizer has ids up to {most}, the model's embedding {size} rows; the folder's files "
                         "belong to different models")


def fit_length(model, max_length: int) -> int:
    """`max_length`, or the model's context length (max_position_embeddings) if that is shorter."""
    config = getattr(model.config, "backbone_config", model.config)
    return min(max_length, getattr(config, "max_position_embeddings", None) or max_length)


def end_of_turn_id(tokenizer) -> int | None:
    """The special token that closes an assistant turn in the chat template, else end of text, else None."""
    return _facts(tokenizer, tokenizer.chat_template)[2]


def warn_of_open_turns(tokenizer, sequences: Iterable[Sequence[int]]) -> None:
    """Warn when sequences do not end with the end-of-turn token, and say how many."""
    end = end_of_turn_id(tokenizer)
    if count := sum(ids[-1] != end for ids in sequences):
        warnings.warn(f"{count} conversations do not end with the end-of-turn token (id {end}); their last "
                      "token is rewarded. Give the tokenizer a template that closes the turn", stacklevel=3)


def pad_id(tokenizer) -> int:
    """An id to fill padding with; its value never matters because positions come from the mask."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def collate(sequences: Sequence[Sequence[int]], pad_id: int = 0) -> dict[str, Tensor]:
    """Right-padded batch ``{"input_ids": int64 [B, T], "attention_mask": int64 [B, T]}``."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    width = int(lengths.max())
    input_ids = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in sequences])
    return {"input_ids": input_ids, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def reward_position(attention_mask: Tensor) -> Tensor:
    """Index of the last attended token (nonzero in [B, T]) of each row, int64 [B], for any padding side."""
    attended = attention_mask != 0
    if not torch.compiler.is_exporting() and not bool(attended.any(dim=-1).all()):
        raise DataError("attention_mask has a row without attended tokens; there is nothing to reward in it")
    return attended.shape[-1] - 1 - attended.flip(-1).int().argmax(dim=-1)


@lru_cache(8)
def _facts(tokenizer, template: str | None) -> tuple[int | None, set[int], int | None]:
    """(BOS id if texts start with it, white space ids after the end of turn, end-of-turn id)."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer(render(tokenizer, probe), add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    bos, empty = tokenizer.bos_token_id, tokenizer("")["input_ids"]
    blank = {i for i in ids if i not in special and not tokenizer.decode([i]).strip()}
    while len(ids) > 1 and ids[-1] in blank:
        ids = ids[:-1]
    end = ids[-1] if ids[-1] in special - {tokenizer.unk_token_id} else tokenizer.eos_token_id
    return bos if bos in (*ids[:1], *empty[:1]) else None, blank, end


def _tidy(tokenizer, ids: list[int]) -> list[int]:
    bos, blank, end = _facts(tokenizer, tokenizer.chat_template)
    while len(ids) > 1 and ids[-1] in blank:
        ids = ids[:-1]
    if bos == end and bos is not None:  # (GPT-2 style) only the one at the front opens the text
        return [bos, *ids[ids[0] == bos:]]
    return ids if bos is None else [bos, *(i for i in ids if i != bos)]
