"""Preference pairs from the formats in use, cleaned, decontaminated and split by prompt.

A pair is ``{"id": str, "prompt": messages ending with the user, "chosen": str, "rejected": str, "meta": dict}``.
Understood rows (fields other than these go to ``meta`` when they are numbers or short texts):

- chat lists: ``chosen``/``rejected`` are messages (Skywork, TRL), with the prompt shared or in ``prompt``;
- (prompt, chosen, rejected) texts;
- HH dialogues: ``chosen``/``rejected`` are "\\n\\nHuman: ...\\n\\nAssistant: ..." texts;
- RMB pairwise: ``conversation_input``, ``chosen.answer``, ``reject.answer``;
- pairs in the form above.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from sarmlib.data.files import Dropped, Report, Rows, load_rows, need
from sarmlib.errors import ConfigError, DataError

SKYWORK = "hub:Skywork/Skywork-Reward-Preference-80K-v0.2"
"""The paper's training set (section 4.1); pass ``revision=`` with the commit that was used."""
IDENTICAL, EMPTY = "chosen equals rejected", "empty answer or question"
DIVERGED, UNANSWERED = "dialogues differ before the last answer", "dialogue does not end with an answer"
CONTAMINATED, NEAR = "prompt in a benchmark", "prompt nearly in a benchmark"
_ROLES = {"human": "user", "gpt": "assistant", "prompter": "user"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def load_pairs(source, *, on_bad: str = "refuse", revision: str | None = None, split: str = "train",
               limit: int | None = None) -> Rows:
    """Pairs from a file (.jsonl/.json/.parquet, .gz), "hub:<owner>/<name>", an iterable of rows, or a list of these.

    Leaves out and counts pairs with equal or empty answers or an empty question, and dialogues that differ before
    the last answer or end without one; bad rows (wrong fields or types) are refused, naming file, row and field, or
    with ``on_bad="skip"`` counted and listed.  ``limit``: keep the
    first pairs only, per source.  The result is a list with a ``report``; ids are "<source>:<row>" and so unique.
    """
    if isinstance(source, (list, tuple)) and source and isinstance(source[0], (str, Path)):
        parts = [load_pairs(s, on_bad=on_bad, revision=revision, split=split, limit=limit) for s in source]
        return Rows((pair for part in parts for pair in part), sum((part.report for part in parts), Report()))
    name = re.sub(r"^hub:", "", str(source)) if isinstance(source, (str, Path)) else "rows"
    name = name if str(source).startswith("hub:") else "/".join(Path(name).parts[-2:])
    pairs = load_rows(source, lambda row, number: check_pair(row, number, name), on_bad, revision, split)
    if limit is not None and len(pairs) > limit:
        pairs.report.notes.append(f"{name}: the first {limit} of {len(pairs)} pairs were kept")
        pairs = Rows(pairs[:limit], pairs.report)
        pairs.report.kept = limit
    return pairs


def pair_format(row: object) -> str | None:
    """"rmb", "hh", "chat" or "text" for a row that looks like a preference pair, else None (content, not names)."""
    if not isinstance(row, dict) or "chosen" not in row:
        return None
    if "conversation_input" in row and "reject" in row:
        return "rmb"
    chosen, rejected = row["chosen"], row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return "text" if row.get("prompt") is not None else "hh" if _TURN.match("\n\n" + chosen.lstrip()) else None
    lists = all(isinstance(side, (list, tuple)) and side and isinstance(side[0], dict) for side in (chosen, rejected))
    return "chat" if lists else None


def check_pair(row: dict, number: int = 0, source: str = "rows") -> dict:
    """One row of any understood format as a pair; DataError for a bad row, `Dropped` for an unwanted pair."""
    kind = pair_format(row)
    if kind is None:
        raise DataError(f"is not a preference pair (fields: {', '.join(map(str, row))}); needed: chosen and rejected "
                        "as texts with a prompt, as message lists, as Human/Assistant dialogues, or RMB's fields")
    if kind == "rmb":
        prompt = _messages(row["conversation_input"], "conversation_input")
        answers = [need(need(row, side, dict, "an object with 'answer'"), "answer", object, "the answer's text")
                   for side in ("chosen", "reject")]
    elif kind == "text":
        value = need(row, "prompt", (str, list, tuple), "the prompt as text or messages")
        if isinstance(value, str):
            prompt = _dialogue(value, "prompt") if _TURN.match(value) else [{"role": "user", "content": value}]
            prompt = prompt[:-1] if not prompt[-1]["content"] else prompt  # "...\n\nAssistant:" waits for the answer
        else:
            prompt = _messages(value, "prompt")
        answers = [row["chosen"], row["rejected"]]
    else:
        read = _dialogue if kind == "hh" else _messages
        chosen, rejected = read(row["chosen"], "chosen"), read(row["rejected"], "rejected")
        before = row.get("prompt")
        before = [] if not before else _messages(before, "prompt") if not isinstance(before, str) else [
            {"role": "user", "content": before}]
        if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
            raise Dropped(UNANSWERED)
        if chosen[:-1] != rejected[:-1]:
            raise Dropped(DIVERGED)
        # TRL stores a prompt either apart from the answers or as their common beginning; accept both.
        prompt = chosen[:-1] if chosen[: len(before)] == before else before + chosen[:-1]
        answers = [chosen[-1]["content"], rejected[-1]["content"]]
    if not prompt or prompt[-1]["role"] != "user":
        raise DataError("the prompt does not end with a user turn; put the question there")
    for answer, name in zip(answers, ("chosen", "rejected"), strict=True):
        if not isinstance(answer, str):
            raise DataError(f"the {name} answer is {repr(answer)[:40]}; text is needed")
    if answers[0].strip() == answers[1].strip():
        raise Dropped(IDENTICAL)
    if not all(text.strip() for text in (*answers, prompt[-1]["content"])):
        raise Dropped(EMPTY)
    extra = row["meta"] if isinstance(row.get("meta"), dict) else {
        k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected", "id")
        and (isinstance(v, (int, float)) or (isinstance(v, str) and len(v) < 200))}
    if kind == "rmb":
        extra |= {f"{side}_model": row[side].get("llm_name") for side in ("chosen", "reject")}
    own = isinstance(row.get("meta"), dict) and isinstance(row.get("id"), str)  # already one of our pairs
    meta = dict(extra) if own else {"file": source, "row": number, "source_id": row.get("id"), **extra}
    return {"id": row["id"] if own else f"{source}:{number}", "prompt": prompt,
            "chosen": answers[0], "rejected": answers[1], "meta": meta}


def normalise(text: str) -> str:
    """Lower-case words and digits joined by single spaces (NFKC): how prompts are compared."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def drop_contaminated(pairs: Iterable[dict], benchmark_prompts: Iterable[str], *, shingle: int = 8,
                      threshold: float = 0.5) -> Rows:
    """Pairs none of whose user turns is a benchmark prompt, exactly (normalised) or nearly; the rest is counted.

    A user turn t nearly is the benchmark prompt p when their hashed ``shingle``-word windows overlap by
    |S(t) & S(p)| >= threshold * |S(p)|: t holds at least that share of p, wherever it stands in t (8 words and half,
    as Lambert et al. 2024, Tulu 3).  Texts of fewer words are compared exactly only.  One look-up per window, so the
    cost is linear in the training text.
    """
    if not 0 < threshold <= 1 or shingle < 1:
        raise ConfigError(f"threshold is {threshold} and shingle {shingle}; use 0 < threshold <= 1 and shingle >= 1")
    exact, holders, sizes = set(), {}, []
    for prompt in benchmark_prompts:
        exact.add(text := normalise(prompt))
        windows = _windows(text, shingle)
        for window in windows:
            holders.setdefault(window, []).append(len(sizes))
        sizes.append(len(windows))
    report, kept, verdicts = Report(), Rows(), {}

    def judge(text: str) -> str | None:
        if (text := normalise(text)) in exact:
            return CONTAMINATED
        overlap: dict[int, int] = {}
        for window in _windows(text, shingle):
            for i in holders.get(window, ()):
                overlap[i] = overlap.get(i, 0) + 1
        return NEAR if any(count >= threshold * sizes[i] for i, count in overlap.items()) else None

    for pair in pairs:
        report.read += 1
        for turn in user_turns(pair):
            if turn not in verdicts:
                verdicts[turn] = judge(turn)
            if verdicts[turn]:
                report.drop(verdicts[turn], f"{pair['id']}: {verdicts[turn]}: {turn[:80]!r}")
                break
        else:
            kept.append(pair)
    report.kept = len(kept)
    if before := getattr(pairs, "report", None):  # one report from file to training set
        report = before + report
        report.read, report.kept = before.read, len(kept)
    kept.report = report
    return kept


def split_by_prompt(pairs: Iterable[dict], fraction: float = 0.1, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """(training, held-out) pairs; about ``fraction`` of the prompts are held out, none is on both sides.

    The side is a hash of seed and the first user turn (normalised), so that it does not depend on the order or
    number of pairs, and so that two dialogues which grow from one opening stay together.
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


def user_turns(pair: dict) -> list[str]:
    """Contents of the user turns of the pair's prompt, first to last."""
    return [message["content"] for message in pair["prompt"] if message["role"] == "user"]


def _windows(text: str, n: int) -> set[int]:
    words = text.split()
    return {hash(tuple(words[i: i + n])) for i in range(len(words) - n + 1)}


def _messages(value, name: str) -> list[dict]:
    """[{role, content}] from a chat list; ShareGPT's from/value and human/gpt are translated."""
    if not isinstance(value, (list, tuple)):
        raise DataError(f"field {name!r} is {repr(value)[:60]}; a list of messages is needed")
    messages = []
    for i, item in enumerate(value):
        role, content = ((item.get("role", item.get("from")), item.get("content", item.get("value")))
                         if isinstance(item, dict) else (None, None))
        role = _ROLES.get(role, role) if isinstance(role, str) else None
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise DataError(f"field {name!r}, turn {i} is {repr(item)[:80]}; role system, user or assistant and text "
                            "content are needed")
        messages.append({"role": role, "content": content})
    return messages


def _dialogue(text: str, name: str) -> list[dict]:
    """Messages of an HH dialogue, stripped; neighbouring turns of one speaker are joined by a blank line."""
    parts = _TURN.split("\n\n" + text.lstrip())
    if parts[0].strip() or len(parts) < 3:
        raise DataError(f"field {name!r} does not start with 'Human:' or 'Assistant:'; it starts {text[:40]!r}")
    messages: list[dict] = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content.strip()}".strip()
        else:
            messages.append({"role": role, "content": content.strip()})
    return messages
