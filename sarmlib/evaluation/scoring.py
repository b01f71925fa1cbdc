"""Rewards and features of many conversations: sorted by length, batched by token budget, returned in input order.

A reward depends only on its own conversation: not on the batch it came in, the order, or the padding (up to the last
bits of float32, because matrix products of different shapes round differently).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, vstack

from ..chat import (
    check_conversation,
    collate,
    count_not_end_of_turn,
    encode_conversations,
    fit_length,
    pad_id,
    truncate_left,
)
from ..errors import ConfigError, DataError, ModelError

RM_BENCH_STYLES = ("concise", "detailed plain", "detailed markdown")
"""Order of the three answers on each side of an RM-Bench row."""


@dataclass
class Scores:
    """Result of `score_conversations`, one entry per conversation in input order."""

    rewards: np.ndarray
    """float64 [n]."""
    features: csr_array | None
    """float32 [n, M]: the sparse codes z at the reward position, when asked for."""
    lengths: np.ndarray
    """int64 [n]: tokens that were fed to the model."""
    n_truncated: int
    """Conversations that lost tokens on the left to fit `max_length`."""
    not_end_of_turn: int
    """Conversations whose rewarded token is not the end-of-turn token."""
    index: Any = None
    """DataFrame [n] that names the benchmark row and slot of each entry (benchmark scorers only)."""


def token_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of indices of similar length, longest first, each at most `batch_tokens` padded tokens (or one row)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start:start + rows]
        start += rows


@torch.inference_mode()
def score_token_ids(model, sequences: Sequence[Sequence[int]], *, pad_id: int = 0, batch_tokens: int | None = None,
                    features: bool = False, progress: bool = False) -> tuple[np.ndarray, csr_array | None]:
    """Rewards float64 [n] (and features csr [n, M]) of token id sequences; raises `ModelError` for a NaN reward.

    `batch_tokens` is the size of a padded batch; None is 2048 on a CPU (fastest: it fits the caches) and 32768 else.
    """
    device, was_training = next(model.parameters()).device, model.training
    batch_tokens = (2048 if device.type == "cpu" else 32_768) if batch_tokens is None else batch_tokens
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens must be positive, got {batch_tokens}")
    rewards = np.zeros(len(sequences))
    codes, seen = [], []
    batches = list(token_batches([len(ids) for ids in sequences], batch_tokens))
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(batches, desc="scoring", unit="batch")
    model.eval()
    try:
        for rows in batches:
            batch = collate([sequences[i] for i in rows], pad_id)
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
            rewards[rows] = output.logits.float().squeeze(-1).cpu().numpy()
            if features:
                if getattr(output, "code", None) is None:
                    raise ModelError(f"{type(model).__name__} has no sparse features; call with features=False")
                codes.append(output.code.to_csr())
                seen.extend(rows)
    finally:
        model.train(was_training)
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise ModelError(f"{len(bad)} rewards are not finite (first: conversation {bad[0]}); the model's weights or "
                         "precision are broken, try dtype float32 or bfloat16 instead of float16")
    if not features:
        return rewards, None
    if not codes:
        return rewards, csr_array((0, getattr(model.config, "n_features", 0)), dtype=np.float32)
    inverse = np.empty(len(seen), dtype=np.int64)
    inverse[seen] = np.arange(len(seen))
    return rewards, csr_array(vstack(codes, format="csr")[inverse])


def score_conversations(model, tokenizer, conversations: Sequence[Sequence[dict]], *, max_length: int = 2048,
                        batch_tokens: int | None = None, features: bool = False, progress: bool = False) -> Scores:
    """Score conversations (lists of messages ending with the assistant) with a reward model.

    Truncation keeps the end of turn (left); `max_length` 2048 is that of both benchmarks' official code, and the
    model's own context length counts if it is shorter.  Raises
    `DataError` for a malformed conversation and `ModelError` for a reward that is not finite.
    """
    if isinstance(conversations, (str, dict)):
        raise DataError("conversations must be a list of conversations, each a list of messages")
    for number, messages in enumerate(conversations):
        try:
            check_conversation(messages)
        except DataError as error:
            raise DataError(f"conversation {number}: {error}") from None
    full = encode_conversations(tokenizer, conversations)
    sequences = truncate_left(tokenizer, full, fit_length(model, max_length))
    rewards, codes = score_token_ids(model, sequences, pad_id=pad_id(tokenizer), batch_tokens=batch_tokens,
                                     features=features, progress=progress)
    lengths = np.array([len(ids) for ids in sequences], dtype=np.int64)
    cut = sum(len(before) > len(after) for before, after in zip(full, sequences, strict=True))
    return Scores(rewards, codes, lengths, n_truncated=cut,
                  not_end_of_turn=count_not_end_of_turn(tokenizer, sequences))


def score_rewardbench2(model, tokenizer, rows: Sequence[dict], **kwargs) -> tuple[list[dict], Scores]:
    """Score RewardBench 2 rows: each scored row has ``scores`` (chosen completions first, then rejected).

    A completion is scored as ``[user: prompt, assistant: completion]`` under the tokenizer's chat template.  The
    returned `Scores.index` has columns row, id, slot, label (chosen/rejected).  `kwargs` go to `score_conversations`.
    """
    groups, scores = _score_rows(model, tokenizer, rows, kwargs)
    return [{**row, "scores": group} for row, group in zip(rows, groups, strict=True)], scores


def score_rm_bench(model, tokenizer, rows: Sequence[dict], **kwargs) -> tuple[list[dict], Scores]:
    """Score RM-Bench rows: each scored row has ``score_chosen`` and ``score_rejected`` (3 styles each).

    Styles in order: concise, detailed plain, detailed markdown.  The returned `Scores.index` has columns row, id, slot
    (0-2 chosen, 3-5 rejected), label, style.  `kwargs` go to `score_conversations`.
    """
    for row in rows:
        if len(row.get("chosen", ())) != 3 or len(row.get("rejected", ())) != 3:
            raise DataError(f"RM-Bench row {row.get('id')!r} needs 3 chosen and 3 rejected answers (three styles)")
    groups, scores = _score_rows(model, tokenizer, rows, kwargs)
    scores.index["style"] = np.array(RM_BENCH_STYLES)[scores.index["slot"].to_numpy() % 3]
    return [{**row, "score_chosen": group[:3], "score_rejected": group[3:]}
            for row, group in zip(rows, groups, strict=True)], scores


def _score_rows(model, tokenizer, rows: Sequence[dict], kwargs: dict) -> tuple[list[list[float]], Scores]:
    """Scores of every completion, grouped by row (chosen first), and the `Scores` with its index frame."""
    import pandas as pd

    conversations, index, sizes = [], [], []
    for number, row in enumerate(rows):
        missing = [field for field in ("prompt", "chosen", "rejected") if field not in row]
        if missing:
            raise DataError(f"row {number} (id {row.get('id')!r}) has no field {missing[0]!r}")
        answers = [("chosen", text) for text in row["chosen"]] + [("rejected", text) for text in row["rejected"]]
        sizes.append(len(answers))
        for slot, (label, answer) in enumerate(answers):
            conversations.append([{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}])
            index.append((number, row.get("id"), slot, label))
    scores = score_conversations(model, tokenizer, conversations, **kwargs)
    scores.index = pd.DataFrame(index, columns=["row", "id", "slot", "label"])
    ends = np.cumsum(sizes, dtype=np.int64)
    return [scores.rewards[end - size:end].tolist() for end, size in zip(ends, sizes, strict=True)], scores
