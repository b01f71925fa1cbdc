"""Hidden states after layer l at chosen token positions (paper eq. 6 and "sequence-level SAE pretraining").

Documents share rows, and every state equals the one that its document alone would give: positions restart
at each document.  A model that does not honour that (probed on a few tokens) gets one piece a row.
"""

import re
import warnings
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from sarmlib.backbone import check_cut
from sarmlib.chat import end_of_turn_id, fit_length, reward_position
from sarmlib.errors import ConfigError, DataError

PositionRule = Callable[[Tensor, Tensor], Tensor]
Piece = tuple[Tensor, Tensor]  # ids [T] of (a part of) a document, bool [T]: the states to take
SHORT_ROW = 128  # tokens; shorter rows make small products, longer ones waste attention on masked pairs
POOL_BATCHES = 8  # batches' worth of tokens packed together
_SENTENCE_TAIL = re.compile(r"[.?!…。？！]+[\"'”’»›)\]}」』）]*$")


def position_rule(tokenizer, rule: str | PositionRule = "sentence_end") -> PositionRule:
    """Rule -> function (input_ids [B, T], attention_mask [B, T]) -> bool [B, T], True where a state is taken.

    ``sentence_end``: tokens whose text ends in . ? ! … or a CJK full stop (then perhaps quotes, brackets or
    white space), end of turn and end of text.  ``every``: all attended tokens.  ``last``: the last of them.
    A function is returned as it is.  Raises ConfigError for an unknown name.
    """
    if callable(rule):
        return rule
    if rule == "every":
        return lambda ids, mask: mask.bool()
    if rule == "last":
        return lambda ids, mask: one_hot(reward_position(mask), ids.shape[1]).bool()
    if rule != "sentence_end":
        raise ConfigError(f"unknown position rule {rule!r}; use sentence_end, every, last or a function")
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    table, bos = torch.tensor([bool(_SENTENCE_TAIL.search(text.strip())) for text in texts]), tokenizer.bos_token_id
    table[tokenizer.all_special_ids] = False
    table[list({end_of_turn_id(tokenizer), tokenizer.eos_token_id} - {None})] = True

    def select(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        attended = attention_mask.bool()
        chosen = attended & table.to(input_ids.device)[input_ids]
        if bos is not None:  # where it equals the end of text, the opening one still ends no sentence
            chosen &= ~((input_ids == bos) & (attended.cumsum(-1) == 1))
        return chosen

    return select


def token_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices by length, longest first, in batches of at most `batch_tokens` padded tokens (or one row)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start:start + rows]
        start += rows


class ExtractionStats(Counter):
    """Totals: documents and tokens read, padding computed with them, vectors given out."""

    def summary(self) -> dict:
        """The totals and their shares of the computed tokens: padding_share, used_share."""
        computed = max(self["tokens"] + self["padding"], 1)
        return {**self, "padding_share": self["padding"] / computed, "used_share": self["vectors"] / computed}


class ActivationExtractor:
    """Streams states [n, d] of a cut backbone at the positions a rule selects: float32, in packing order.

    A forward pass computes at most batch_size * window tokens.  ``window`` is the longest row (at most the
    model's context); longer documents are cut, and a piece after the first starts with the document's BOS
    again, if it had one.  ``positions``: see ``position_rule``; the rule sees whole documents.
    """

    def __init__(self, backbone, tokenizer, positions: str | PositionRule = "sentence_end",
                 window: int = 512, batch_size: int = 4, device: str | torch.device | None = None):
        if window < 2 or batch_size < 1:
            raise ConfigError(f"window={window} must be 2 or more, batch_size={batch_size} 1 or more")
        check_cut(backbone)
        window = fit_length(backbone, window)
        self.backbone = (backbone if device is None else backbone.to(device)).eval()
        self.tokenizer, self.window, self.budget = tokenizer, window, batch_size * window
        self.rule = position_rule(tokenizer, positions)
        self.stats = ExtractionStats(documents=0, tokens=0, padding=0, vectors=0)
        self.packed = self._keeps_documents_apart()

    @torch.no_grad()
    def iter_activations(self, texts: Iterable[str | list[int]], max_vectors: int | None = None, skip: int = 0
                         ) -> Iterator[Tensor]:
        """States of documents (texts or ids) as [n, d] tensors, one per forward pass, ``max_vectors`` in all.

        The first ``skip`` are neither computed nor counted.  Raises DataError for a corpus without text or selected
        tokens, and for a state that is not finite.
        """
        given, left = 0, skip
        for rows in self._batches(texts):
            if left:
                left -= any(chosen.any() for row in rows for _, chosen in row)
                continue
            states = self._forward(rows)
            states = states if max_vectors is None else states[:max_vectors - given]
            given += len(states)
            self.stats["vectors"] += len(states)
            if len(states):
                yield states
            if given == max_vectors:
                return
        if given == 0 and not skip:
            raise DataError("the corpus holds no text, or the position rule selects none of its tokens; try "
                            "the rule 'every'")

    def collect(self, texts: Iterable[str | list[int]], n: int | None = None) -> Tensor:
        """The first ``n`` states (None: all) as one float32 CPU tensor [n, d]; warns when there are fewer."""
        states = torch.cat([part.cpu() for part in self.iter_activations(texts, n)])
        if n is not None and len(states) < n:
            warnings.warn(f"asked for {n} states, the corpus gave {len(states)}", stacklevel=2)
        return states

    def _documents(self, texts: Iterable[str | list[int]]) -> Iterator[list[int]]:
        if isinstance(texts, str):
            raise ConfigError("texts is one string; pass an iterable of documents, such as [text]")
        texts = iter(texts)
        while group := list(islice(texts, 64)):
            strings = [text for text in group if isinstance(text, str)]
            encoded = iter(self.tokenizer(strings, verbose=False)["input_ids"] if strings else ())
            for text in group:
                ids = next(encoded) if isinstance(text, str) else text
                if len(text) and len(ids):
                    self.stats["documents"] += 1
                    yield ids

    def _pieces(self, ids: list[int]) -> Iterator[Piece]:
        """Pieces of at most one window; the rule sees the whole document."""
        document = torch.tensor(ids)
        chosen = self.rule(document[None], torch.ones(1, len(ids), dtype=torch.long))[0].bool()
        yield document[: self.window], chosen[: self.window]
        bos = document[:1] if ids[0] == self.tokenizer.bos_token_id else document[:0]
        step = self.window - len(bos)
        for start in range(self.window, len(ids), step):
            part = slice(start, start + step)
            yield torch.cat([bos, document[part]]), torch.cat([torch.zeros_like(bos).bool(), chosen[part]])

    def _batches(self, texts) -> Iterator[list[list[Piece]]]:
        pool, tokens = [], 0
        for ids in self._documents(texts):
            pieces = list(self._pieces(ids))
            pool += pieces
            tokens += _length(pieces)
            if tokens >= POOL_BATCHES * self.budget:
                *full, last = self._batched(pool)
                pool = [piece for row in last for piece in row]  # not full: packed again
                tokens = _length(pool)
                yield from full
        yield from self._batched(pool)

    def _batched(self, pool: list[Piece]) -> list[list[list[Piece]]]:
        rows = self._rows(pool)
        return [[rows[i] for i in batch] for batch in token_batches(list(map(_length, rows)), self.budget)]

    def _rows(self, pool: list[Piece]) -> list[list[Piece]]:
        """Best-fit decreasing: a piece joins the fullest row that can hold it, or starts one."""
        pieces = sorted(pool, key=lambda piece: -len(piece[0]))
        if not self.packed:
            return [[piece] for piece in pieces]
        rows, rooms = [], []  # rooms: sorted (room, row number)
        for piece in pieces:
            length = len(piece[0])
            place = bisect_left(rooms, (length, -1))
            if place == len(rooms):
                rooms.append((max(length, min(SHORT_ROW, self.window)), len(rows)))
                rows.append([])
            room, number = rooms.pop(place)
            rows[number].append(piece)
            insort(rooms, (room - length, number))
        return rows

    def _forward(self, rows: list[list[Piece]]) -> Tensor:
        """States [n, d] of the chosen tokens of rows; padding stands on the right, where nothing sees it."""
        input_ids, chosen = (_rectangle([[piece[i] for piece in row] for row in rows]) for i in (0, 1))
        positions = _rectangle([[torch.arange(len(ids)) for ids, _ in row] for row in rows])
        tokens = sum(map(_length, rows))
        self.stats.update(tokens=tokens, padding=input_ids.numel() - tokens)
        states = self._states(input_ids=input_ids, **({"position_ids": positions} if self.packed else {}))
        states = states[chosen.to(states.device)].float()
        if not torch.isfinite(states).all():
            raise DataError("a hidden state is NaN or infinite; load the backbone in float32 or bfloat16")
        return states

    def _states(self, **kwargs: Tensor) -> Tensor:
        inputs = {name: tensor.to(self.backbone.device) for name, tensor in kwargs.items()}
        return self.backbone(use_cache=False, **inputs).last_hidden_state

    @torch.no_grad()
    def _keeps_documents_apart(self) -> bool:
        """Whether the second document of each of two packed rows gets the states that it has alone.

        Two rows, because some attention kernels look for packed documents in batches of one row only.
        """
        ids = torch.arange(16).remainder(self.backbone.get_input_embeddings().weight.shape[0]).view(2, 8)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 3, 4]])
        try:
            packed = self._states(input_ids=ids, position_ids=positions)
        except TypeError:  # no position_ids: recurrent or ALiBi families
            return False
        tolerance = 1e-4 if self.backbone.dtype == torch.float32 else 3e-2
        alone = torch.cat([self._states(input_ids=second[None])[0] for second in (ids[0, 4:], ids[1, 3:])]).float()
        gap = torch.cat([packed[0, 4:], packed[1, 3:]]).float() - alone
        return bool(gap.abs().max() <= tolerance * alone.abs().max())


def _rectangle(rows: list[list[Tensor]]) -> Tensor:
    """[B, T] of rows of parts, padded with zeros on the right."""
    return pad_sequence([torch.cat(row) for row in rows], batch_first=True)


def _length(pieces: list[Piece]) -> int:
    return sum(len(ids) for ids, _ in pieces)
