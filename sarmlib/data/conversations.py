"""Rows to be scored, whatever they are called: a conversation, a prompt with one or several responses, a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sarmlib.chat import check_conversation
from sarmlib.data.files import Rows, load_rows
from sarmlib.data.preferences import check_pair, pair_format
from sarmlib.errors import DataError


@dataclass(frozen=True)
class Item:
    """One row: its number in the file (from 1), its id if it has one, and its conversations by name."""

    row: int
    id: str | None
    conversations: dict[str, list[dict]]
    """``{"response": ...}``, ``{"response_1": ..., ...}`` or ``{"chosen": ..., "rejected": ...}``."""

    @property
    def is_pair(self) -> bool:
        return set(self.conversations) == {"chosen", "rejected"}


def check_item(row: dict, number: int = 0) -> Item:
    """A row as an `Item`; DataError naming the field that is missing or of the wrong type.

    Understood: ``messages`` (or ``conversation``): a list that ends with the assistant; ``prompt`` (text or messages)
    with ``response`` (text) or ``responses`` (texts); any preference pair that training understands.
    """
    own = row.get("id")
    if pair_format(row) is not None:
        pair = check_pair(row, number)
        talks = {side: _answer(pair["prompt"], pair[side]) for side in ("chosen", "rejected")}
    elif messages := row.get("messages") or row.get("conversation"):
        talks = {"response": messages}
    elif "prompt" in row and ("response" in row or "responses" in row):
        texts = row.get("responses", [row.get("response")])
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"its responses are {repr(texts)[:60]}; a text, or a list of texts, is needed")
        names = ["response"] if len(texts) == 1 else [f"response_{i}" for i in range(1, len(texts) + 1)]
        talks = {name: _answer(row["prompt"], text) for name, text in zip(names, texts, strict=True)}
    else:
        raise DataError(f"has the fields {', '.join(map(str, row)) or 'none'}; needed: messages, or prompt and "
                        "response (or responses), or a preference pair (prompt, chosen, rejected)")
    for talk in talks.values():
        check_conversation(talk)
    return Item(number, None if own is None else str(own), talks)


def _answer(prompt: str | Sequence[dict], text: str) -> list[dict]:
    if not isinstance(prompt, (str, list, tuple)) or not prompt:
        raise DataError(f"its prompt is {repr(prompt)[:60]}; a text or a list of messages is needed")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*before, {"role": "assistant", "content": text}]


def load_items(source, on_bad: str = "refuse") -> Rows:
    """`check_item` for every row of a .jsonl, .json or .parquet file (or an iterable of rows); see `load_rows`."""
    return load_rows(source, check_item, on_bad)  # type: ignore[arg-type]  # rows become items
