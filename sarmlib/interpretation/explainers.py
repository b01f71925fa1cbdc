"""Keyword explainer: what do responses that activate a feature contain more often than the others?

Weighted log-odds with an informative Dirichlet prior (Monroe, Colaresi & Quinn 2008) over documents: ``y1`` of
``n1`` active and ``y0`` of ``n0`` inactive responses contain a term of background share ``p``; with the prior
strength ``A`` (in documents), ``a = A p`` and ``b = A (1-p)``,

    delta = log[(y1+a)/(n1-y1+b)] - log[(y0+a)/(n0-y0+b)],      score = delta / sqrt(var),
    var   = 1/(y1+a) + 1/(n1-y1+b) + 1/(y0+a) + 1/(n0-y0+b).

Only terms beyond the permutation null of ``max |score|`` enter a label, best correlated with activity first.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
from scipy import sparse

from sarmlib.errors import ConfigError, DataError
from sarmlib.interpretation.contexts import Contexts

ALPHA = 0.05  # family-wise level of the permutation test
PRIOR = 20.0  # strength of the Dirichlet prior, in documents
MIN_ACTIVE = 15  # fewest active, and fewest inactive, responses to learn a label from
MAX_UNITS = 4000  # most responses that are read, by whole prompts
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_FORMAT = {  # non-lexical terms, written in words so that a label can name them
    "[list]": re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.M),
    "[code block]": re.compile(r"```"),
    "[header]": re.compile(r"^#{1,6}\s", re.M),
    "[bold]": re.compile(r"\*\*\S"),
    "[table]": re.compile(r"^\|.*\|\s*$", re.M),
    "[latex]": re.compile(r"\\[a-zA-Z(\[]|\$[^$\s][^$]*\$"),
    "[digits]": re.compile(r"\d"),
    "[ends with a question]": re.compile(r"\?\W*$"),
    "[non-latin letters]": re.compile(r"[\u0370-\u1fff\u3040-\u9fff\uac00-\ud7af]"),
    "[refusal opening]": re.compile(r"^\W*(?:I'm sorry|I’m sorry|I am sorry|Sorry|I can't|I can’t|I cannot|"
                                    r"I won't|I am unable|I'm unable|I am not able|As an AI)", re.I)}
_FIFTHS = ("[shortest fifth]", "[second fifth]", "[middle fifth]", "[fourth fifth]", "[longest fifth]")


@dataclass(frozen=True)
class Label:
    """What an explainer says about one feature."""

    feature: int
    text: str
    weights: dict[str, float] = field(default_factory=dict)  # term -> delta; the keyword judge adds up these
    evidence: tuple[dict, ...] = ()  # per term: term, delta, score, active, n_active, inactive, n_inactive
    p_value: float = 1.0  # permutation p of the strongest term, family-wise over all terms
    reason: str = ""  # why the explainer abstained; empty when it did not
    kind: str = "keyword"  # or llm

    @property
    def abstained(self) -> bool:
        return bool(self.reason)


def log_odds(y1, n1, y0, n0, background) -> tuple[np.ndarray, np.ndarray]:
    """(delta, score) of the module docstring; counts broadcast, ``background`` is the share p in (0, 1)."""
    prior = np.float32(PRIOR)
    a, b = prior * background, prior * (1 - background)
    parts = (y1 + a, n1 - y1 + b, y0 + a, n0 - y0 + b)
    delta = np.log(parts[0] / parts[1] * (parts[3] / parts[2]))
    return delta, delta / np.sqrt(sum(1 / part for part in parts))


def shuffle_by_prompt(y: np.ndarray, prompt: np.ndarray, times: int, rng: np.random.Generator) -> np.ndarray:
    """``times`` shuffles [times, n] of ``y`` [n]: within a prompt, and prompts as blocks.

    Free shuffling would call every topic word significant: the responses to one prompt share their words.
    """
    order = np.argsort(prompt, kind="stable")
    blocks = np.split(y[order], np.flatnonzero(np.diff(prompt[order])) + 1)
    out = np.empty((times, len(y)), y.dtype)
    for shuffled in out:
        shuffled[order] = np.concatenate([rng.permutation(blocks[i]) for i in rng.permutation(len(blocks))])
    return out


class Vocabulary:
    """Binary terms of a response: words and pairs of words, format flags, fifth of the length.

    ``terms(text, length)``: the known ones of a response.  Terms in under 0.5 % of the responses (at least 3)
    could not pass the test and are left out.  Raises DataError when none is left.
    """

    def __init__(self, texts: Sequence[str], lengths: np.ndarray):
        fewest, n = max(3, round(len(texts) / 200)), len(texts)
        self._edges = np.quantile(lengths, [0.2, 0.4, 0.6, 0.8, 1])
        count = Counter(term for one in zip(texts, lengths, strict=True) for term in self._all_terms(*one))
        self.names = sorted(term for term, times in count.items() if fewest <= times < n)
        if not self.names:
            raise DataError(f"no term occurs in {fewest} of {n} responses; add responses")
        self.column = {term: i for i, term in enumerate(self.names)}
        self.terms = cache(lambda text, length: self._all_terms(text, length) & self.column.keys())
        share = [(count[term] + 0.5) / (n + 1) for term in self.names]
        self.background = np.array(share, np.float32)[:, None]

    def _all_terms(self, text: str, length: float) -> set[str]:
        words = _WORD.findall(text.lower())
        terms = {name for name, pattern in _FORMAT.items() if pattern.search(text)}
        if (np.diff(self._edges) > 0).all():  # responses that were cut off share one length: no fifths
            terms.add(_FIFTHS[np.searchsorted(self._edges[:4], length)])
        return terms | set(words) | {f"{a} {b}" for a, b in pairwise(words)}

    def matrix(self, texts: Sequence[str], lengths: np.ndarray) -> sparse.csr_array:
        """Binary document-term matrix [n, V] float32."""
        rows = [sorted(self.column[t] for t in self.terms(*one)) for one in zip(texts, lengths, strict=True)]
        indptr = np.cumsum([0, *map(len, rows)])
        return sparse.csr_array((np.ones(indptr[-1], np.float32), np.concatenate(rows).astype(int), indptr),
                                (len(rows), len(self.names)))


class KeywordExplainer:
    """Offline explainer: reads the explain split of ``contexts`` and nothing else; ``top`` terms a side."""

    def __init__(self, contexts: Contexts, *, permutations: int = 200, top: int = 4, seed: int = 0):
        if permutations < 1 / ALPHA:
            raise ConfigError(f"{permutations} permutations cannot show {ALPHA}; use at least {1 / ALPHA:.0f}")
        self.contexts, self.top = contexts, top
        rows, rng = contexts.rows("explain"), np.random.default_rng(seed)
        arrival = rng.permutation(contexts.prompt.max() + 1)[contexts.prompt[rows]]
        self.rows = np.sort(rows[np.argsort(arrival, kind="stable")][:MAX_UNITS])
        index = contexts.index.iloc[self.rows]
        texts, lengths = index["text"].tolist(), index["length"].to_numpy(float)
        self.vocabulary = Vocabulary(texts, lengths)
        self._matrix = self.vocabulary.matrix(texts, lengths)
        self._total = self._matrix.sum(axis=0)
        places = np.arange(len(self.rows))
        self._shuffles = shuffle_by_prompt(places, contexts.prompt[self.rows], permutations, rng)

    def explain_all(self, features: Iterable[int]) -> list[Label]:
        """Labels in the order of ``features``."""
        return [self.explain(int(feature)) for feature in features]

    def explain(self, feature: int) -> Label:
        """Label one feature, or abstain and say why."""
        active = self.contexts.activation(feature)[self.rows] != 0
        n1, n0 = int(active.sum()), int((~active).sum())
        if min(n1, n0) < MIN_ACTIVE:
            which = f"{n1} active" if n1 <= n0 else f"{n0} inactive"
            reason = f"only {which} responses to learn from, {MIN_ACTIVE} needed"
            return Label(feature, "no label", reason=reason)
        delta, score = (values[:, 0] for values in self._log_odds(active[:, None]))
        null = np.abs(self._log_odds(active[self._shuffles].T)[1]).max(axis=0)
        bar, strongest = np.quantile(null, 1 - ALPHA), np.abs(score).max()
        p_value = float((1 + (null >= strongest).sum()) / (1 + len(null)))
        y1 = self._matrix.T @ active.astype(np.float32)
        kept = self._distinct(np.flatnonzero(np.abs(score) > bar), y1, n1) if p_value <= ALPHA else []
        if not kept:
            reason = f"no term beyond the shuffled null (strongest {strongest:.1f}, bar {bar:.1f})"
            return Label(feature, "no reliable lexical label", p_value=p_value, reason=reason)
        names, y0 = self.vocabulary.names, self._total - y1
        weights = {names[j]: float(delta[j]) for j in kept}
        evidence = tuple({"term": names[j], "delta": float(delta[j]), "score": float(score[j]), "active": int(y1[j]),
                          "n_active": n1, "inactive": int(y0[j]), "n_inactive": n0} for j in kept)
        return Label(feature, describe(weights), weights, evidence, p_value)

    def _log_odds(self, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(delta, score) [V, B] of boolean activity [n, B], in single precision: ample for counts."""
        y1, n1 = self._matrix.T @ active.astype(np.float32), active.sum(axis=0).astype(np.float32)
        return log_odds(y1, n1, self._total[:, None] - y1, len(active) - n1, self.vocabulary.background)

    def _distinct(self, candidates: np.ndarray, y1: np.ndarray, n1: int) -> list[int]:
        """Terms by correlation with activity, ``top`` per sign; none nests in or goes with a kept one."""
        n, total, names = len(self.rows), self._total, self.vocabulary.names
        spread = np.sqrt(total * (n - total) * float(n1) * (n - n1))
        phi = (n * y1 - n1 * total) / np.maximum(spread, 1)
        kept: list[int] = []
        for j in candidates[np.argsort(-np.abs(phi[candidates]), kind="stable")].tolist():
            mine = _words(names[j])
            nested = any(mine <= _words(names[i]) or _words(names[i]) <= mine for i in kept)
            together = any(np.corrcoef(self._matrix[:, [i, j]].toarray().T)[0, 1] > 0.9 for i in kept)
            full = sum((phi[i] > 0) == (phi[j] > 0) for i in kept) == self.top
            if not (full or nested or together):
                kept.append(j)
        return kept


def _words(term: str) -> set[str]:
    return {term} if term.startswith("[") else set(term.split())


def describe(weights: dict[str, float]) -> str:
    """The words of a label: never more than its terms."""
    parts = []
    for side, sign in (("more", 1), ("less", -1)):
        terms = [term[1:-1] if term.startswith("[") else f"“{term}”" for term in weights if sign * weights[term] > 0]
        if terms:
            parts.append(f"{side} often: {', '.join(terms)}")
    return "; ".join(parts)
