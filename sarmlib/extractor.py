"""Hidden states after layer l at chosen token positions (paper eq. 6 and "sequence-level SAE pretraining").

Whole documents are packed into windows, so that almost no computed token is padding, and every state equals the one a
forward pass over its document alone would give: positions restart at each document and attention never crosses from
one into another.  Whether the model's attention honours that is measured once on eight tokens; a model that does not
(old or recurrent families) gets right-padded rows of similar length instead, which is exact too but wastes more.
"""

from __future__ import annotations

import re
import time
import warnings
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

from sarmlib.chat import end_of_turn_id
from sarmlib.errors import ConfigError, DataError, ModelError

PositionRule = Callable[[Tensor, Tensor], Tensor]
RULES = ("sentence_end", "official", "every", "last")
DEFAULT_WINDOW = 512
SHORT_ROW = 128  # tokens; shorter rows make small matrix products, longer ones waste attention on masked pairs
POOL_BATCHES = 8  # batches' worth of tokens packed together
_SENTENCE_TAIL = re.compile(r"[.?!…。？！]+[\"'”’»›)\]}」』）]*$")
_OFFICIAL = frozenset(mark for char in ".;!?" for mark in (char, " " + char))


def position_rule(tokenizer, rule: str | PositionRule = "sentence_end") -> PositionRule:
    """Rule name -> function (input_ids [B,T], attention_mask [B,T]) -> bool [B,T], True where a state is taken.

    ``sentence_end``: every vocabulary item is decoded and its stripped tail tested for . ? ! … (and CJK full stops)
    with closing quotes or brackets after them, so merged tokens such as ``.\\n\\n`` and ``."`` count; end-of-turn and
    end-of-text tokens count too.  ``official``: the released code's nine literal tokens (``. ; ! ?``, each also with a
    leading space, and the end of turn).  ``every``: all attended tokens.  ``last``: the last attended token of each
    row.  A callable is returned as it is.  Raises ConfigError for an unknown name.
    """
    if callable(rule):
        return rule
    if rule == "every":
        return lambda input_ids, attention_mask: attention_mask.bool()
    if rule == "last":
        return _last
    if rule not in RULES:
        raise ConfigError(f"unknown position rule {rule!r}; use one of {', '.join(RULES)} or a function")
    ids = range(len(tokenizer))
    if rule == "official":
        texts = (str(token or "").replace("▁", " ").replace("Ġ", " ") for token in tokenizer.convert_ids_to_tokens(ids))
        chosen = {i for i, text in zip(ids, texts, strict=True) if text in _OFFICIAL}
        chosen |= {end_of_turn_id(tokenizer)}
    else:
        special = set(tokenizer.all_special_ids)
        decoded = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        chosen = {i for i in ids if i not in special and _SENTENCE_TAIL.search(decoded[i].strip())}
        chosen |= {end_of_turn_id(tokenizer), tokenizer.eos_token_id}
    table = torch.zeros(len(tokenizer), dtype=torch.bool)
    table[sorted(chosen - {None})] = True
    bos = tokenizer.bos_token_id
    bos = bos if bos is not None and bool(table[bos]) else None  # bos = eos: the opening one ends no sentence

    def select(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        attended = attention_mask.bool()
        inside = attended & (input_ids < len(table))
        chosen_here = table.to(input_ids.device)[torch.where(inside, input_ids, 0)] & inside
        if bos is not None:
            chosen_here &= ~((input_ids == bos) & (attended.cumsum(-1) == 1))
        return chosen_here

    return select


def _last(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    attended = attention_mask.bool()
    after = attended.flip(-1).cumsum(-1).flip(-1)  # attended tokens from here on
    return attended & (after == 1)


@dataclass
class ExtractionStats:
    """Running totals of an extractor."""

    documents: int = 0
    tokens: int = 0
    """Document tokens passed through the model."""
    padding: int = 0
    """Padding tokens passed through the model."""
    vectors: int = 0
    """States given out."""
    seconds: float = 0.0
    """Wall time in tokenizing, packing and the model."""

    def summary(self) -> dict:
        """All totals with tokens_per_second, padding_share (of computed tokens) and used_share (states per token)."""
        computed = max(self.tokens + self.padding, 1)
        return asdict(self) | {
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "padding_share": self.padding / computed,
            "used_share": self.vectors / computed,
        }


class ActivationExtractor:
    """Streams hidden states [n, d] of a cut backbone at the positions a rule selects.

    Args:
        backbone: model from ``load_backbone``; its last_hidden_state is what is returned.
        tokenizer: turns texts into ids (with its own special tokens); token-id lists are used as they are.
        positions: rule name or function, see ``position_rule``; it sees one whole document at a time.
        window: longest row in tokens; None = 512 or the model's context, if that is shorter.  Longer documents are
            cut into pieces of one window; a piece after the first starts with the document's BOS again, if it had one.
        batch_size: a forward pass computes at most batch_size * window tokens.
        device: moves the backbone there when given.

    Vectors come in packing order, not in document order (the SAE trainer shuffles anyway), float32, on the backbone's
    device.  ``stats`` holds totals, ``packed`` tells whether windows are packed (see the module docstring).
    """

    def __init__(
        self,
        backbone,
        tokenizer,
        positions: str | PositionRule = "sentence_end",
        window: int | None = None,
        batch_size: int = 4,
        device: str | torch.device | None = None,
    ):
        limit = getattr(backbone.config, "max_position_embeddings", None) or window or DEFAULT_WINDOW
        window = min(DEFAULT_WINDOW, limit) if window is None else window
        for name, value, low in (("window", window, 2), ("batch_size", batch_size, 1)):
            if not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}={value!r} must be an integer of at least {low}")
        if window > limit:
            raise ConfigError(f"window={window} exceeds the model's context of {limit} tokens; lower window")
        self.backbone = (backbone if device is None else backbone.to(device)).eval()
        self.tokenizer, self.window, self.batch_size = tokenizer, window, batch_size
        self.rule = position_rule(tokenizer, positions)
        self.stats = ExtractionStats()
        self.packed = self._keeps_documents_apart()

    @torch.no_grad()
    def iter_activations(
        self, texts: Iterable[str | list[int]], max_vectors: int | None = None, *, allow_empty: bool = False
    ) -> Iterator[Tensor]:
        """Yield states as [n, d] tensors, one per forward pass, until ``texts`` or ``max_vectors`` is used up.

        Raises DataError for an empty corpus or a rule that selects nothing (not with ``allow_empty``, for parts of a
        corpus), and for a state that is not finite.
        """
        given, documents, clock = 0, 0, time.perf_counter()
        for batch, n_documents in self._batches(texts):
            states = self._forward(batch)
            documents += n_documents
            if max_vectors is not None:
                states = states[: max_vectors - given]
            given += len(states)
            self.stats.documents += n_documents
            self.stats.vectors += len(states)
            self.stats.seconds += time.perf_counter() - clock
            if len(states):
                yield states
            clock = time.perf_counter()
            if max_vectors is not None and given >= max_vectors:
                return
        if allow_empty:
            return
        if documents == 0:
            raise DataError("the corpus holds no text; pass at least one non-empty document")
        if given == 0:
            raise DataError(f"the position rule selected none of the tokens of {documents} documents; try 'every'")

    def collect(self, texts: Iterable[str | list[int]], n: int | None = None, *, progress: bool = False) -> Tensor:
        """The first ``n`` states (all when None) as one float32 CPU tensor [n, d]; warns when there are fewer."""
        parts, count = [], 0
        with tqdm(total=n, disable=not progress, unit="state", desc="activations", leave=False) as bar:
            for states in self.iter_activations(texts, n):
                parts.append(states.cpu())
                count += len(states)
                bar.update(len(states))
                bar.set_postfix(tokens_per_s=f"{self.stats.summary()['tokens_per_second']:,.0f}", refresh=False)
        if n is not None and count < n:
            warnings.warn(f"asked for {n} states, the corpus gave {count}", stacklevel=2)
        return torch.cat(parts)

    # -- documents -> pieces -> rows -> batches -------------------------------------------------------------------

    def _documents(self, texts: Iterable[str | list[int]]) -> Iterator[list[int]]:
        if isinstance(texts, (str, bytes)):
            raise ConfigError("texts is one string; pass an iterable of documents, such as [text]")
        texts = iter(texts)
        while group := list(islice(texts, 64)):
            strings = [text for text in group if isinstance(text, str)]
            encoded = iter(self.tokenizer(strings, verbose=False)["input_ids"] if strings else ())
            for text in group:
                ids = next(encoded) if isinstance(text, str) else list(text)
                if len(text) and len(ids):
                    yield ids

    def _pieces(self, ids: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids [T], bool [T]) of at most one window each; the rule sees the whole document."""
        document = torch.tensor(ids)
        chosen = self.rule(document[None], torch.ones(1, len(ids), dtype=torch.long))[0].bool()
        if len(ids) <= self.window:
            yield document, chosen
            return
        has_bos = self.tokenizer.bos_token_id is not None and ids[0] == self.tokenizer.bos_token_id
        yield document[: self.window], chosen[: self.window]
        step = self.window - has_bos
        for start in range(self.window, len(ids), step):
            part, part_chosen = document[start : start + step], chosen[start : start + step]
            if has_bos:
                part = torch.cat([document[:1], part])
                part_chosen = torch.cat([chosen.new_zeros(1), part_chosen])
            yield part, part_chosen

    def _batches(self, texts) -> Iterator[tuple[list[list[tuple[Tensor, Tensor]]], int]]:
        """Batches of rows, each row a list of pieces, with the number of documents read since the last batch."""
        budget, pool, pool_tokens, n_documents = self.batch_size * self.window, [], 0, 0
        for ids in self._documents(texts):
            n_documents += 1
            for piece in self._pieces(ids):
                pool.append(piece)
                pool_tokens += len(piece[0])
            if pool_tokens < POOL_BATCHES * budget:
                continue
            batches = list(_split_rows(self._rows(pool), budget))
            pool = [piece for row in batches.pop() for piece in row]  # the last one is not full: packed again
            pool_tokens = sum(len(piece[0]) for piece in pool)
            for rows in batches:
                yield rows, n_documents
                n_documents = 0
        for rows in _split_rows(self._rows(pool), budget):
            yield rows, n_documents
            n_documents = 0

    def _rows(self, pool: list) -> list[list]:
        """Best-fit decreasing: a piece joins the fullest row that can hold it; a new row is as long as its first piece,
        but at least SHORT_ROW tokens (short documents share a row, and no row is longer than it has to be)."""
        pieces = sorted(pool, key=lambda piece: -len(piece[0]))
        if not self.packed:
            return [[piece] for piece in pieces]
        rows, open_rows = [], []  # open_rows: sorted (room, row number)
        for piece in pieces:
            length = len(piece[0])
            place = bisect_left(open_rows, (length, -1))
            if place < len(open_rows):
                room, number = open_rows.pop(place)
                rows[number].append(piece)
            else:
                room, number = max(length, min(SHORT_ROW, self.window)), len(rows)
                rows.append([piece])
            if room > length:
                insort(open_rows, (room - length, number))
        return rows

    def _forward(self, rows: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
        lengths = [sum(len(ids) for ids, _ in row) for row in rows]
        shape = (len(rows), max(lengths))
        input_ids, chosen = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        positions = torch.arange(shape[1]).repeat(len(rows), 1)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            input_ids[number, :length] = torch.cat([ids for ids, _ in row])
            chosen[number, :length] = torch.cat([mask for _, mask in row])
            starts = torch.tensor([0] + [len(ids) for ids, _ in row]).cumsum(0)  # the last one starts the padding
            owner = torch.searchsorted(starts, positions[number], right=True) - 1
            positions[number] -= starts[owner]
        self.stats.tokens += sum(lengths)
        self.stats.padding += input_ids.numel() - sum(lengths)
        if self.packed:
            states = self._states(input_ids, position_ids=positions)
        else:
            mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
            states = self._states(input_ids, attention_mask=mask.long())
        states = states[chosen.to(states.device)].float()
        if not torch.isfinite(states).all():
            raise DataError("a hidden state is NaN or infinite; load the backbone in float32 or bfloat16")
        return states

    def _states(self, input_ids: Tensor, **kwargs) -> Tensor:
        device = self.backbone.device
        kwargs = {name: tensor.to(device) for name, tensor in kwargs.items()}
        return self.backbone(input_ids=input_ids.to(device), use_cache=False, **kwargs).last_hidden_state

    @torch.no_grad()
    def _keeps_documents_apart(self) -> bool:
        """Compare [a a a a b b b b] with restarting positions to [b b b b] alone; True when b's states agree."""
        vocab = self.backbone.get_input_embeddings().weight.shape[0]
        ids = torch.arange(8).remainder(vocab)[None]
        positions = torch.arange(4).repeat(2)[None]
        try:
            packed = self._states(ids, position_ids=positions)[0, 4:].float()
            alone = self._states(ids[:, 4:], position_ids=positions[:, :4])[0].float()
        except TypeError:  # no position_ids: recurrent or ALiBi families
            return False
        except IndexError as error:
            raise ModelError(f"{type(self.backbone).__name__} cannot run a forward pass: {error}") from error
        tolerance = 1e-4 if self.backbone.dtype == torch.float32 else 3e-2
        return bool((packed - alone).abs().max() <= tolerance * alone.abs().max().clamp(min=1e-6))


def _split_rows(rows: list[list], budget: int) -> Iterator[list[list]]:
    """Rows of similar length in batches of at most ``budget`` tokens, padding included."""
    sized = sorted(((sum(len(ids) for ids, _ in row), row) for row in rows), key=lambda pair: -pair[0])
    batch, longest = [], 0
    for length, row in sized:
        longest = longest or length
        if batch and (len(batch) + 1) * longest > budget:
            yield batch
            batch, longest = [], length
        batch.append(row)
    if batch:
        yield batch
