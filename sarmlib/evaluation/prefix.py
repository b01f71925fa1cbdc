"""Several answers to one prompt, scored in one row: the prompt's tokens go through the decoder once.

    row:      p1 p2 .. pP | a1 .. aA | b1 .. bB          positions 0 .. P-1 | P .. P+A-1 | P .. P+B-1
    sees:     a token sees the prompt before it and its own answer before it, never another answer

This computes what scoring each text alone computes, because a causal decoder's states of a common prefix do not depend
on what follows, and positions and mask are those of the text alone.  Matrix products of another shape round
differently, so rewards agree to the last bits of float32 (1e-5 of their size in the tests), and in half precision to
its coarser bits.  The common prefix is that of the token ids, never of the texts: tokens merge across the border.

Not shared, but scored plainly: texts longer than a sliding window (the mask here is the full one), and models for which
a probe does not give the plain result (a decoder without such masks, recurrent layers, a head of its own kind).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from torch import Tensor, nn

from ..errors import ModelError
from .scoring import score_token_ids, token_batches

LONGEST_ROW = 4096
"""Tokens of a row with more than one text: its mask has the square of that."""

_KNOWN: WeakKeyDictionary = WeakKeyDictionary()


class Pack(NamedTuple):
    """Texts ``start .. stop - 1`` in one row of ``length`` tokens, their first ``prefix`` tokens once."""

    start: int
    stop: int
    prefix: int
    length: int


def packs(model, sequences: Sequence[Sequence[int]]) -> list[Pack]:
    """Neighbouring texts grouped while a common row costs less than rows of their own.

    A row of T tokens costs T (6 d + T): 24 d^2 FLOP a token and layer in the matrix products of a Llama, 4 d T in
    attention.  A model that cannot share (`can_share`), a text beyond its window, and a text that has only a BOS in
    common with its neighbour get rows of one text.
    """
    config, found = _backbone_config(model), []
    width, window = 6 * config.hidden_size, getattr(config, "sliding_window", None) or LONGEST_ROW
    able = len(sequences) > 1 and can_share(model)
    for number, ids in enumerate(sequences):
        n = len(ids)
        if able and found and n <= window >= len(sequences[found[-1].start]):
            start, stop, before, row = found[-1]
            prefix = min(before, _common(sequences[start], ids))
            length = row + (stop - start - 1) * (before - prefix) + n - prefix
            apart = row * (width + row) + n * (width + n)
            if prefix > 1 and length <= LONGEST_ROW and length * (width + length) < apart:
                found[-1] = Pack(start, number + 1, prefix, length)
                continue
        found.append(Pack(number, number + 1, n, n))
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading token ids that both have, leaving at least one token of each."""
    end = min(len(one), len(other)) - 1
    return next((i for i in range(end) if one[i] != other[i]), end)


def score_with_shared_prefix(model, sequences: Sequence[Sequence[int]], *, pad_id: int = 0,
                             batch_tokens: int | None = None, features: bool = False
                             ) -> tuple[np.ndarray, csr_array | None]:
    """Rewards float64 [n] (and features csr [n, M]) as `score_token_ids` gives them, for token id sequences in which
    the answers to one prompt stand next to each other.

    `score_token_ids` scores everything when nothing can be shared.  Raises `ModelError` for a reward that is not
    finite.
    """
    rows = packs(model, sequences)
    if len(rows) == len(sequences):
        return score_token_ids(model, sequences, pad_id=pad_id, batch_tokens=batch_tokens, features=features)
    if features and not hasattr(model, "encode"):
        raise ModelError(f"{type(model).__name__} has no sparse features; call with features=False")
    size = batch_tokens or (2048 if next(model.parameters()).device.type == "cpu" else 32_768)
    rewards, was_training = np.zeros(len(sequences)), model.training
    codes, seen = [], []
    model.eval()
    try:
        for batch in token_batches([row.length for row in rows], size):
            part = [rows[i] for i in batch]
            inside = [i for row in part for i in range(row.start, row.stop)]
            rewards[inside], code = packed_rewards(model, [list(sequences[row.start:row.stop]) for row in part],
                                                   [row.prefix for row in part])
            if features:
                codes.append(code.to_csr())
                seen += inside
    finally:
        model.train(was_training)
    if not np.isfinite(rewards).all():
        raise ModelError(f"the reward of text {int((~np.isfinite(rewards)).argmax())} is not finite; the model's "
                         "weights or precision are broken, try dtype float32 or bfloat16 instead of float16")
    return rewards, csr_array(vstack(codes, format="csr")[np.argsort(seen)]) if features else None


@torch.inference_mode()
def packed_rewards(model, groups: Sequence[Sequence[Sequence[int]]], prefixes: Sequence[int],
                   hide_first: Sequence[bool] | None = None) -> tuple[np.ndarray, Any]:
    """Rewards float64 (and a SARM's code), group after group, of one forward pass with a row for each group of texts.

    `hide_first`: groups whose first token is masked (one of two BOS).
    """
    states, code = packed_states(model, groups, prefixes, hide_first), None
    if hasattr(model, "encode"):
        code = model.encode(states)
        rewards = (code.values.float() * model.score.weight[0][code.indices].float()).sum(-1)
    else:
        rewards = model.score(states).float().squeeze(-1)
    return rewards.cpu().numpy().astype(np.float64), code


def packed_states(model, groups, prefixes, hide_first=None) -> Tensor:
    """The decoder's states [n, d] at the rewarded tokens of `packed_rewards`."""
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    skip = None if hasattr(model, "reward_state") else model.config.get_text_config().pad_token_id
    rows, width = [], 0
    where: tuple[list[int], list[int]] = ([], [])
    for number, (group, prefix) in enumerate(zip(groups, prefixes, strict=True)):
        ids, owner, position = list(group[0][:prefix]), [0] * prefix, list(range(prefix))
        for n, text in enumerate(group, 1):
            # Classifiers of transformers reward the last token that is not the pad token; ours the last one.
            last = next((i for i in reversed(range(len(text))) if text[i] != skip), len(text) - 1)
            where[0].append(number)
            where[1].append(last if last < prefix else len(ids) + last - prefix)
            ids += text[prefix:]
            owner += [n] * (len(text) - prefix)
            position += range(prefix, len(text))
        rows.append((ids, owner, position))
        width = max(width, len(ids))
    tokens, owners, positions = (torch.tensor([row[part] + [fill] * (width - len(row[part])) for row in rows],
                                              device=device) for part, fill in enumerate((0, -1, 0)))
    sees = (owners[:, :, None] == owners[:, None]) | (owners[:, None] == 0)
    sees &= torch.ones(width, width, dtype=torch.bool, device=device).tril()
    if hide_first is not None:
        sees[torch.tensor(hide_first, device=device), 1:, 0] = False
    # additive: what eager attention needs, and what spares the others a conversion in every layer
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)
    output = model.base_model(input_ids=tokens, attention_mask=mask[:, None], position_ids=positions, use_cache=False)
    return output.last_hidden_state[torch.tensor(where[0], device=device), torch.tensor(where[1], device=device)]


def can_share(model) -> bool:
    """Whether rows of several texts give this model's plain rewards: tried once a model, on three short texts."""
    if model not in _KNOWN:
        _KNOWN[model] = _probe(model)
    return _KNOWN[model]


def _backbone_config(model):
    return getattr(model.config, "backbone_config", None) or model.config.get_text_config()


@torch.inference_mode()
def _probe(model) -> bool:
    decoder, head = getattr(model, "base_model", model), getattr(model, "score", None)
    if decoder is model or not isinstance(head, nn.Linear) or head.out_features != 1 or (
            "position_ids" not in inspect.signature(decoder.forward).parameters):
        return False
    if _backbone_config(model)._attn_implementation not in ("sdpa", "eager"):
        return False
    pad, device = model.config.get_text_config().pad_token_id, head.weight.device
    words = [i for i in range(min(_backbone_config(model).vocab_size, 64)) if i != pad]
    texts = [[words[(5 * n + 3) % len(words)] for n in range(6)] + [words[(7 * n + j) % len(words)] for n in range(j)]
             for j in (1, 2, 4)]
    was_training = model.training
    model.eval()
    try:
        shared = packed_states(model, [texts], [6]), torch.tensor(packed_rewards(model, [texts], [6])[0])
        for i, text in enumerate(texts):
            ids = torch.tensor([text], device=device)
            alone = (decoder(input_ids=ids, use_cache=False).last_hidden_state[0, -1],
                     model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.reshape(()).double().cpu())
            near = 1e-4 if head.weight.dtype == torch.float32 else 0.05
            for one, other in zip(shared, alone, strict=True):
                if not bool((one[i] - other).abs().max() <= near * (1 + other.abs().max())):
                    return False
    except Exception:  # each model refuses such inputs in its own way, and then its texts are scored plainly
        return False
    finally:
        model.train(was_training)
    return True
