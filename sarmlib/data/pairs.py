"""Preference pairs and rows to be scored, from the formats in use; decontaminated and split by prompt.

A pair is ``{"id": str, "prompt": messages ending with the user, "chosen": str, "rejected": str}``.  Read are also
message lists (Skywork, UltraFeedback), three texts, Human/Assistant dialogues (HH-RLHF), and RMB's fields.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from sarmlib.data.rows import Dropped, Report, Rows, load_rows
from sarmlib.errors import ConfigError, DataError

WINDOW, OVERLAP = 8, 0.5  # words per window and shared part that make a prompt nearly another (Tulu 3's numbers)
_TURN = re.compile(r"\n\n(Human|Assistant):")
SIDES = ("chosen", "rejected")


def load_pairs(source, *, revision: str | None = None) -> Rows:
    """Pairs from a file or folder (.jsonl/.json/.parquet, .gz), "hub:<owner>/<name>" or an iterable of rows.

    Pairs that teach nothing are left out and counted in ``.report``; DataError names file, row and field of a bad one.
    Ids are "<folder>/<file>:<row>" and so unique.
    """
    return load_rows(source, _pair, revision=revision)


def _pair(row: dict, number: int, source: str) -> dict:
    prompt = _messages(row.get("prompt", row.get("conversation_input", [])), "prompt")
    answers = [_answer(row.get("chosen"), prompt), _answer(row.get("rejected", row.get("reject")), prompt)]
    if not all(answers):
        raise DataError(f"is not a preference pair (fields: {', '.join(map(str, row))}); needed: chosen and rejected as"
                        " texts with a prompt, as message lists, as Human/Assistant dialogues, or RMB's fields")
    (*start, better), (*other, worse) = map(_messages, answers, SIDES)
    if better["role"] != "assistant" or worse["role"] != "assistant":
        raise Dropped("dialogue does not end with an answer")
    if start != other:
        raise Dropped("dialogues differ before the last answer")
    prompt = start or prompt  # a prompt beside message lists repeats their start
    if not prompt or prompt[-1]["role"] != "user":
        raise DataError("the prompt does not end with a user turn; put the question there")
    chosen, rejected = better["content"], worse["content"]
    if chosen.strip() == rejected.strip():
        raise Dropped("chosen equals rejected")
    if not all(text.strip() for text in (chosen, rejected, prompt[-1]["content"])):
        raise Dropped("empty answer or question")
    name = "/".join(Path(source).parts[-2:])
    return {"id": f"{name}:{number}", "prompt": prompt, "chosen": chosen, "rejected": rejected}


def _answer(value, prompt: list[dict]):
    """One side as messages, by its kind: RMB's fields, an answer to the prompt, a dialogue, or messages already."""
    if isinstance(value, dict):
        return _talk([], value.get("answer"))
    if isinstance(value, str):
        return _talk([], value) if prompt else _dialogue(value)
    return value


@dataclass(frozen=True)
class Item:
    """A row to be scored; its conversations are named response, or response_1, ..., or chosen and rejected."""

    row: int
    id: str | None
    conversations: dict[str, list[dict]]

    @property
    def is_pair(self) -> bool:
        return set(self.conversations) == set(SIDES)


def load_conversations(source) -> Rows:
    """`Item`s from a file, a folder or an iterable of rows; DataError names file, row and field of a bad one.

    A row has ``messages``, or ``prompt`` with ``response`` or ``responses``, or is a pair.
    """
    return load_rows(source, _item)


def _item(row: dict, number: int, source: str) -> Item:
    from sarmlib.chat import check_conversation  # here, because it imports torch
    answers = row.get("responses") or [row.get("response")]
    if "chosen" in row:
        talks = dict(zip(SIDES, conversations(_pair(row, number, source)), strict=True))
    elif "messages" in row:
        talks = {"response": _messages(row["messages"], "messages")}
    elif "prompt" in row and isinstance(answers, list) and answers != [None]:
        names = ["response"] if len(answers) == 1 else [f"response_{i}" for i in range(1, len(answers) + 1)]
        prompt = _messages(row["prompt"], "prompt")
        talks = {name: _talk(prompt, text) for name, text in zip(names, answers, strict=True)}
    else:
        raise DataError(f"has the fields {', '.join(map(str, row)) or 'none'}; needed: messages, or prompt and "
                        "response (or responses, a list), or a preference pair (prompt, chosen, rejected)")
    for talk in talks.values():
        check_conversation(talk)
    return Item(number, str(row["id"]) if "id" in row else None, talks)


def conversations(pair: dict) -> list[list[dict]]:
    """The two conversations of a pair, chosen first."""
    return [_talk(pair["prompt"], pair[side]) for side in SIDES]


def drop_contaminated(pairs: Sequence[dict], prompts: Iterable[str]) -> Rows:
    """Pairs none of whose user turns is one of the benchmark ``prompts``, exactly (normalised) or nearly.

    A turn t nearly is the prompt p when their 8-word windows overlap by |S(t) & S(p)| >= |S(p)| / 2 (Lambert et al.
    2024, Tulu 3).  Shorter texts are compared exactly only.
    """
    windows = {text: _windows(text) for text in map(normalise, prompts)}
    holders = defaultdict(list)
    for text, found in windows.items():
        for window in found:
            holders[window].append(text)

    def verdict(pair: dict) -> str | None:
        for turn in map(normalise, user_turns(pair)):
            if turn in windows:
                return "prompt in a benchmark"
            shared = Counter(text for window in _windows(turn) for text in holders.get(window, ()))
            if any(count >= OVERLAP * len(windows[text]) for text, count in shared.items()):
                return "prompt nearly in a benchmark"
        return None

    return _without(pairs, verdict)


def drop_identical(pairs: Sequence[dict], tokenizer, max_length: int, longest: int | None = None) -> Rows:
    """Pairs whose answers differ within ``max_length`` tokens, and with no conversation of more than ``longest``."""
    from sarmlib.chat import encode_conversations, truncate_left

    def verdict(pair: dict) -> str | None:
        full = encode_conversations(tokenizer, conversations(pair))
        if longest and max(map(len, full)) > longest:
            return f"longer than {longest} tokens"
        chosen, rejected = truncate_left(tokenizer, full, max_length)
        return f"chosen equals rejected within {max_length} tokens" if chosen == rejected else None

    return _without(pairs, verdict)


def split_by_prompt(pairs: Iterable[dict], fraction: float = 0.1, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """(training, held-out) pairs; about ``fraction`` of the prompts are held out, none is on both sides.

    The side is a hash of seed and the first user turn (normalised), whatever the order or number of pairs.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction is {fraction!r}; use a number between 0 and 1, such as 0.1")
    sides: tuple[list[dict], list[dict]] = ([], [])
    for pair in pairs:
        key = f"{seed}\0{normalise(user_turns(pair)[0])}".encode()
        draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
        sides[draw < fraction].append(pair)
    if not all(sides):
        raise DataError(f"splitting {len(sides[0]) + len(sides[1])} pairs at fraction {fraction} leaves a side empty; "
                        "give more distinct prompts, another fraction or another seed")
    return sides


def normalise(text: str) -> str:
    """Lower-case words and digits joined by single spaces (NFKC): how prompts are compared."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def user_turns(pair: dict) -> list[str]:
    """Contents of the user turns of the pair's prompt, first to last."""
    return [message["content"] for message in pair["prompt"] if message["role"] == "user"]


def _without(pairs: Sequence[dict], verdict: Callable[[dict], str | None]) -> Rows:
    """Pairs without a verdict; the report goes on from that of ``pairs``."""
    report, reasons = deepcopy(getattr(pairs, "report", Report(len(pairs)))), [verdict(pair) for pair in pairs]
    for reason in filter(None, reasons):
        report.drop(reason)
    return Rows([pair for pair, reason in zip(pairs, reasons, strict=True) if not reason], report)


def _windows(text: str) -> set[int]:
    words = text.split()
    return {hash(tuple(words[i:i + WINDOW])) for i in range(len(words) - WINDOW + 1)}


def _talk(prompt: list[dict], answer: str) -> list[dict]:
    return [*prompt, {"role": "assistant", "content": answer}]


def _messages(value, name: str) -> list[dict]:
    """[{role, content}] from a chat list, or from one question as text."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    turns = value if isinstance(value, (list, tuple)) else [value]
    for i, turn in enumerate(turns):
        known = isinstance(turn, dict) and turn.get("role") in ("system", "user", "assistant")
        if not known or not isinstance(turn.get("content"), str):
            raise DataError(f"field {name!r}, turn {i} is {repr(turn)[:80]}; role system, user or assistant and text "
                            "content are needed")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _dialogue(text: str) -> list[dict]:
    """Messages of an HH dialogue, neighbouring turns of one speaker joined; none for a text that starts otherwise."""
    first, *parts = _TURN.split("\n\n" + text.lstrip())
    messages: list[dict] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True) if not first else ():
        role = {"Human": "user", "Assistant": "assistant"}[speaker]
        if messages and messages[-1]["role"] == role:
            content = f"{messages.pop()['content']}\n\n{content.strip()}"
        messages.append({"role": role, "content": content.strip()})
    return messages
