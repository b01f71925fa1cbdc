"""Keyword explainer: what do responses that activate a feature contain more often than the others?

Weighted log-odds with an informative Dirichlet prior (Monroe, Colaresi & Quinn 2008), over document frequencies:
with ``y1`` of ``n1`` active and ``y0`` of ``n0`` inactive responses containing a term, background share ``p`` and
prior strength ``A`` (in documents), ``a = A p``, ``b = A (1-p)``,

    delta = log[(y1+a)/(n1-y1+b)] - log[(y0+a)/(n0-y0+b)],      score = delta / sqrt(var),
    var   = 1/(y1+a) + 1/(n1-y1+b) + 1/(y0+a) + 1/(n0-y0+b).

Only terms beyond the permutation null of ``max |score|`` enter a label, those that correlate best with activity first
(the score itself falls again for terms that separate perfectly); without one the explainer abstains.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy import sparse

from sarmlib.errors import ConfigError, DataError
from sarmlib.interpretation.contexts import Contexts

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_FORMAT = {  # non-lexical terms, written in words so that a label can name them
    "[list]": re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.M), "[code block]": re.compile(r"```"),
    "[header]": re.compile(r"^#{1,6}\s", re.M), "[bold]": re.compile(r"\*\*\S"),
    "[table]": re.compile(r"^\|.*\|\s*$", re.M), "[latex]": re.compile(r"\\[a-zA-Z(\[]|\$[^$\s][^$]*\$"),
    "[digits]": re.compile(r"\d"), "[ends with a question]": re.compile(r"\?\W*$"),
    "[non-latin letters]": re.compile(r"[\u0370-\u1fff\u3040-\u9fff\uac00-\ud7af]"),
    "[refusal opening]": re.compile(r"^\W*(?:I'm sorry|I’m sorry|I am sorry|Sorry|I can't|I can’t|I cannot|I won't|"
                                    r"I am unable|I'm unable|I am not able|As an AI)", re.I)}
LENGTH_TERMS = ("[shortest fifth]", "[second fifth]", "[middle fifth]", "[fourth fifth]", "[longest fifth]")


@dataclass(frozen=True)
class Label:
    """What an explainer says about one feature; a keyword judge adds up its ``weights`` (term -> log-odds delta)."""

    feature: int
    text: str
    weights: dict[str, float] = field(default_factory=dict)
    evidence: tuple[dict, ...] = ()
    """Per kept term: term, delta, score, active (y1), n_active (n1), inactive (y0), n_inactive (n0)."""
    p_value: float = 1.0
    """Permutation p of the strongest term, family-wise over all terms."""
    reason: str = ""
    """Why the explainer abstained; empty when it did not."""
    kind: str = "keyword"
    """What made it: keyword or llm."""
    self_grade: int | None = None
    """1 to 5 by the explainer itself (the paper's rating); no verdict uses it."""

    @property
    def abstained(self) -> bool:
        return bool(self.reason)


def _words(term: str) -> set[str]:
    return {term} if term.startswith("[") else set(term.split())


class Explainer(Protocol):
    """Anything that labels a feature from the explain split alone."""

    def explain(self, feature: int) -> Label: ...


def log_odds(y1, n1, y0, n0, background, prior: float | np.floating) -> tuple[np.ndarray, np.ndarray]:
    """(delta, score) of the module docstring; the counts broadcast, ``background`` is the share p in (0, 1)."""
    a, b = prior * background, prior * (1 - background)
    parts = (y1 + a, n1 - y1 + b, y0 + a, n0 - y0 + b)
    delta = np.log(parts[0] / parts[1] * (parts[3] / parts[2]))
    return delta, delta / np.sqrt(sum(1 / part for part in parts))


def shuffle_by_prompt(y: np.ndarray, prompt: np.ndarray, times: int, rng: np.random.Generator) -> np.ndarray:
    """``times`` shuffles [times, n] of ``y`` that keep its clustering: labels move within a prompt, prompts as blocks.

    Free shuffling would call every topic word significant, because the responses to one prompt share their words.
    """
    order = np.argsort(prompt, kind="stable")
    blocks = np.split(y[order], np.flatnonzero(np.diff(prompt[order])) + 1)
    out = np.empty((times, len(y)), y.dtype)
    for shuffled in out:
        shuffled[order] = np.concatenate([rng.permutation(blocks[i]) for i in rng.permutation(len(blocks))])
    return out


class Vocabulary:
    """Binary terms of a response: 1-2-grams in at least ``min_df`` responses, format flags, length fifth.

    min_df defaults to 0.5 % of the responses, at least 3: rarer terms cannot pass the family-wise test anyway.
    Learned from ``texts`` and ``lengths`` (the explain split); ``terms`` then applies it to any text.
    """

    def __init__(self, texts: list[str], lengths: np.ndarray, min_df: int | None = None):
        min_df = max(3, round(len(texts) / 200)) if min_df is None else min_df
        # cut-off responses share one length: then fifths do not exist, and no bin may be called one
        edges = np.unique(np.quantile(lengths, [0.2, 0.4, 0.6, 0.8]))
        self.edges = edges[edges < np.max(lengths)] if len(lengths) else edges
        few = ("[shorter responses]", *["[middling length]"] * (len(self.edges) - 1), "[longer responses]")
        self._lengths = LENGTH_TERMS if len(self.edges) == 4 else few
        self._memo: dict[tuple[str, float], frozenset[str]] = {}
        documents = [self._raw(text, length) for text, length in zip(texts, lengths, strict=True)]
        count = Counter(term for document in documents for term in document)
        self.names = sorted(term for term, n in count.items() if min_df <= n < len(documents))
        if not self.names:
            raise DataError(f"no term occurs in {min_df} of the {len(documents)} responses to explain; add responses")
        self.column = {term: i for i, term in enumerate(self.names)}
        self.background = np.array([(count[term] + 0.5) / (len(documents) + 1) for term in self.names])

    def _raw(self, text: str, length: float) -> set[str]:
        words = _WORD.findall(text.lower())
        flags = {name for name, pattern in _FORMAT.items() if pattern.search(text)}
        if len(self.edges):
            flags.add(self._lengths[int(np.searchsorted(self.edges, length, "left"))])
        return set(words) | {f"{a} {b}" for a, b in zip(words, words[1:], strict=False)} | flags

    def terms(self, text: str, length: float) -> frozenset[str]:
        """Known terms of one response."""
        if (text, length) not in self._memo:
            self._memo[text, length] = frozenset(self._raw(text, length) & self.column.keys())
        return self._memo[text, length]

    def matrix(self, texts, lengths) -> sparse.csr_array:
        """Binary document-term matrix [n, V] float32."""
        rows = [sorted(self.column[t] for t in self.terms(text, n)) for text, n in zip(texts, lengths, strict=True)]
        indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(int)
        columns = np.concatenate([np.array(row, int) for row in rows])
        return sparse.csr_array((np.ones(len(columns), np.float32), columns, indptr), (len(rows), len(self.names)))


class KeywordExplainer:
    """Offline explainer over ``contexts`` (explain split only).

    prior: strength of the Dirichlet prior in documents; permutations, alpha: of the family-wise test; top: terms named
    on each side; min_active: fewest active (and inactive) responses; max_units: responses used, by whole prompts.
    """

    def __init__(self, contexts: Contexts, *, min_df=None, prior=20.0, permutations=200, alpha=0.05, top=4,
                 min_active=15, max_units=4000, seed=0):
        if permutations < 1 / alpha:
            raise ConfigError(f"{permutations} permutations cannot resolve alpha={alpha}; use at least {1 / alpha:.0f}")
        self.contexts, self.prior, self.alpha, self.top, self.min_active = contexts, prior, alpha, top, min_active
        rows = contexts.rows("explain")
        rng = np.random.default_rng(seed)
        arrival = rng.permutation(contexts.prompt.max() + 1)[contexts.prompt[rows]]
        self.rows = np.sort(rows[np.argsort(arrival, kind="stable")][:max_units])
        index = contexts.index.iloc[self.rows]
        texts, lengths = index["text"].astype(str).tolist(), index["length"].to_numpy(float)
        self.vocabulary = Vocabulary(texts, lengths, min_df)
        self._matrix = self.vocabulary.matrix(texts, lengths)
        self._background = self.vocabulary.background.astype(np.float32)[:, None]
        self._total = self._matrix.sum(axis=0)[:, None]
        self._shuffles = shuffle_by_prompt(np.arange(len(self.rows)), contexts.prompt[self.rows], permutations, rng)

    def _log_odds(self, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(delta, score) [V, B] of boolean activity [n, B], in single precision: ample for counts, half the time."""
        y1, n1 = self._matrix.T @ active.astype(np.float32), active.sum(axis=0).astype(np.float32)
        return log_odds(y1, n1, self._total - y1, len(active) - n1, self._background, np.float32(self.prior))

    def explain(self, feature: int) -> Label:
        """Label one feature, or abstain and say why."""
        active = self.contexts.activation(feature)[self.rows] != 0
        n1, n0 = int(active.sum()), int((~active).sum())
        if min(n1, n0) < self.min_active:
            which = f"{n1} active" if n1 <= n0 else f"{n0} inactive"
            return Label(feature, "no label", reason=f"only {which} responses to learn from, {self.min_active} needed")
        delta, score = (values[:, 0] for values in self._log_odds(active[:, None]))
        null = np.abs(self._log_odds(active[self._shuffles].T)[1]).max(axis=0)
        bar, strongest = np.quantile(null, 1 - self.alpha), np.abs(score).max()
        p_value = float((1 + (null >= strongest).sum()) / (1 + len(null)))
        y1, total = self._matrix.T @ active.astype(np.float32), self._total[:, 0]
        spread = np.sqrt(total * (len(active) - total) * float(n1) * n0)
        phi = (len(active) * y1 - n1 * total) / np.maximum(spread, 1)
        kept = self._distinct(np.flatnonzero(np.abs(score) > bar), phi) if p_value <= self.alpha else []
        if not kept:
            return Label(feature, "no reliable lexical label", p_value=p_value,
                         reason=f"no term beyond the shuffled null (strongest {strongest:.1f}, bar {bar:.1f})")
        evidence = tuple({"term": self.vocabulary.names[j], "delta": float(delta[j]), "score": float(score[j]),
                          "active": int(y1[j]), "n_active": n1, "inactive": int(total[j] - y1[j]), "n_inactive": n0}
                         for j in kept)
        weights = {self.vocabulary.names[j]: float(delta[j]) for j in kept}
        return Label(feature, describe(weights), weights, evidence, p_value)

    def explain_all(self, features) -> list[Label]:
        """Labels in the order of ``features``."""
        return [self.explain(int(feature)) for feature in features]

    def _distinct(self, candidates: np.ndarray, strength: np.ndarray) -> list[int]:
        """Strongest terms, at most ``top`` per sign, without n-grams that nest in or co-occur with a kept one."""
        kept, room, names = [], {True: self.top, False: self.top}, self.vocabulary.names
        for j in candidates[np.argsort(-np.abs(strength[candidates]), kind="stable")]:
            mine = _words(names[j])
            nested = any(mine <= _words(names[i]) or _words(names[i]) <= mine for i in kept)
            if room[strength[j] > 0] and not nested and not any(self._phi(i, j) > 0.9 for i in kept):
                kept.append(int(j))
                room[strength[j] > 0] -= 1
        return kept

    def _phi(self, i: int, j: int) -> float:
        columns = self._matrix[:, [i, j]].toarray()
        return float(np.corrcoef(columns.T)[0, 1])


def describe(weights: dict[str, float]) -> str:
    """Template text of a label: never more than its terms."""
    more = [f"“{term}”" if term[0] != "[" else term[1:-1] for term, s in weights.items() if s > 0]
    less = [f"“{term}”" if term[0] != "[" else term[1:-1] for term, s in weights.items() if s < 0]
    parts = [f"{side} often: {', '.join(terms)}" for side, terms in (("more", more), ("less", less)) if terms]
    return "; ".join(parts)
