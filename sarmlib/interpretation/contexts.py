"""Where features fire.  The unit is a response, the activation is z at its reward position, the only one that
the reward ``r = sum_i w_i z_i`` reads.  Prompts, never responses, are split into explain / tune / test.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from os.path import commonprefix

import numpy as np
import pandas as pd
from scipy import sparse

SPLITS = {"explain": 0.5, "tune": 0.2, "test": 0.3}
RARE, DENSE = 50, 0.9


def prompt_split(index: pd.DataFrame, fractions: dict[str, float] = SPLITS, seed: int = 0) -> np.ndarray:
    """Split name of every row, by a hash of its prompt: adding rows never moves an old prompt.

    With a column ``prompt_text``, prompts that are equal up to case, spacing and punctuation go together.
    """
    ids = index["prompt_id"].astype(str)
    key = _joined(ids, index["prompt_text"].map(_fingerprint)) if "prompt_text" in index else ids
    digests = {k: hashlib.sha256(f"{seed}|{k}".encode("utf-8", "surrogatepass")).hexdigest() for k in set(key)}
    place = key.map({k: int(digest[:13], 16) / 16**13 for k, digest in digests.items()}).to_numpy()
    edges = np.cumsum(list(fractions.values()))[:-1]
    return np.array(list(fractions))[np.searchsorted(edges, place, "right")]


def _fingerprint(text: str) -> str:
    """A prompt without case, spacing and punctuation (digits stay: 2+2 is not 3+5)."""
    return " ".join(re.findall(r"\w+", text.lower())) or f"raw:{text}"


def _joined(ids: pd.Series, prints: pd.Series) -> pd.Series:
    """One key per group of prompts that share an id or a fingerprint: the group's smallest fingerprint."""
    n, nodes = len(ids), pd.factorize(pd.concat(["id " + ids, "text " + prints]))[0]
    edges = sparse.coo_array((np.ones(n), (nodes[:n], nodes[n:])), shape=(nodes.max() + 1,) * 2)
    group = sparse.csgraph.connected_components(edges, directed=False)[1][nodes[:n]]
    return prints.groupby(group).transform("min")


class Contexts:
    """A scored set: ``z`` sparse [n, M], index frame [n], head weights ``w`` [M], and the split of each row.

    Index columns: prompt_id, domain, label (chosen or rejected), length (tokens), reward, text, prompt_text.
    """

    def __init__(self, z, index: pd.DataFrame, w: np.ndarray, seed: int = 0):
        self.z, self.w = sparse.csr_array(z).copy(), np.asarray(w, float)
        self.z.eliminate_zeros()
        self._columns = self.z.tocsc()
        self.index = index.reset_index(drop=True)
        self.split = prompt_split(self.index, seed=seed)
        self.prompt = pd.factorize(self.index["prompt_id"].astype(str))[0]

    def activation(self, feature: int) -> np.ndarray:
        """``z_i`` of every unit, dense [n]."""
        return self._columns[:, [feature]].toarray().ravel()

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of one split."""
        return np.flatnonzero(self.split == split)

    def features(self) -> pd.DataFrame:
        """One row per feature, dead ones too.

        kind: dead, rare (fires on under 50 units), dense (on over 90 %), usual; preference_corr: of z_i with
        chosen (1) / rejected (0), centred within the prompt; contributions: ``w_i z_i`` in reward points.
        """
        z, (n, m) = self.z.astype(float), self.z.shape
        count = np.bincount(z.indices, minlength=m)
        mean, square = z.sum(axis=0) / n, z.power(2).sum(axis=0)
        kind = np.select([count == 0, count < RARE, count > DENSE * n], ["dead", "rare", "dense"], "usual")
        sd = np.sqrt(np.maximum(square / n - mean**2, 0))
        return pd.DataFrame({"feature": np.arange(m), "kind": kind, "n_active": count, "rate": count / n,
                             "preference_corr": self._preference(z, square), "w": self.w,
                             "contribution_mean": self.w * mean, "contribution_sd": np.abs(self.w) * sd})

    def _preference(self, z: sparse.csr_array, square: np.ndarray) -> np.ndarray:
        n, size = len(self.index), np.bincount(self.prompt)
        member = sparse.csr_array((np.ones(n), (self.prompt, np.arange(n))))
        chosen = (self.index["label"] == "chosen").to_numpy(float)
        centred = chosen - (member @ chosen / size)[self.prompt]
        between = sparse.diags_array(1 / size).dot((member @ z).power(2)).sum(axis=0)
        within = np.maximum(square - between, 0)
        within[within < 1e-9 * square] = 0  # rounding, not variation
        spread = np.sqrt(within * (centred**2).sum())
        product = z.T @ (centred - centred.mean())
        return np.divide(product, spread, out=np.full(len(spread), np.nan), where=spread > 0)

    @cached_property
    def _fires(self) -> sparse.csc_array:
        return (self._columns[self.rows("explain")] != 0).astype(np.float32)

    def neighbours(self, feature: int, n: int = 5) -> pd.DataFrame:
        """The ``n`` features that fire most with this one on the explain split.

        jaccard = responses with both / responses with either.
        """
        fires, count = self._fires, self._fires.sum(axis=0)
        both = fires.T @ fires[:, [feature]].toarray().ravel()
        jaccard = both / np.maximum(count + count[feature] - both, 1)
        jaccard[feature] = 0
        best = np.argsort(-jaccard, kind="stable")[:n]
        best = best[jaccard[best] > 0]
        return pd.DataFrame({"feature": best, "jaccard": jaccard[best]})

    def examples(self, feature: int, per_decile: int = 2, split: str | None = None, seed: int = 0) -> pd.DataFrame:
        """row, decile (10 = strongest), z and index row of a few units of each decile, drawn by seed and feature."""
        z = self.activation(feature)
        frame = _deciles(z if split is None else z * (self.split == split), per_decile, [seed, feature])
        shown = self.index.iloc[frame["row"]].reset_index(drop=True)
        return pd.concat([frame.assign(z=z[frame["row"]]), shown], axis=1)


def _deciles(strength: np.ndarray, per_decile: int, seed) -> pd.DataFrame:
    """row, decile: a draw from each decile of what is not zero, strongest decile first."""
    rng, rows = np.random.default_rng(seed), np.flatnonzero(strength)
    parts = np.array_split(rows[np.argsort(strength[rows], kind="stable")], 10)
    picks = [(row, decile) for decile in range(10, 0, -1) if len(part := parts[decile - 1])
             for row in rng.choice(part, min(per_decile, len(part)), replace=False)]
    return pd.DataFrame(picks, columns=["row", "decile"]).astype(int)


def sentence_contexts(model, tokenizer, conversations: Sequence, features: Sequence[int], *,
                      per_decile: int = 2) -> pd.DataFrame:
    """The paper's view: sentences of the last turn at whose end a feature fires; the reward reads one end."""
    from sarmlib.chat import encode_conversations, fit_length, truncate_left
    from sarmlib.evaluation.scorer import MAX_LENGTH, codes_at
    silent = [[*talk[:-1], {**talk[-1], "content": ""}] for talk in conversations]
    whole, empty = (encode_conversations(tokenizer, talks) for talks in (conversations, silent))
    ids = truncate_left(tokenizer, whole, fit_length(model, MAX_LENGTH))
    starts = np.array([max(0, len(commonprefix([a, b])) - len(a) + len(kept))
                       for a, b, kept in zip(whole, empty, ids, strict=True)])
    z, owner, end = codes_at(model, tokenizer, conversations)
    begin = np.maximum(_sentence_begins(owner, end), starts[owner])
    found = []
    for feature in map(int, features):
        strength = z[:, [feature]].toarray().ravel() * (end >= starts[owner])
        for row, decile in _deciles(strength, per_decile, [0, feature]).to_numpy():
            tokens = ids[owner[row]]
            sentence = tokenizer.decode(tokens[begin[row]:end[row] + 1])
            found.append((feature, owner[row], sentence, strength[row], decile, end[row] == len(tokens) - 1))
    return pd.DataFrame(found, columns=["feature", "conversation", "sentence", "z", "decile", "at_reward"])


def _sentence_begins(owner: np.ndarray, end: np.ndarray) -> np.ndarray:
    """First token of each sentence; an end of turn right after a full stop belongs to the one before it."""
    ends = pd.Series(end).groupby(owner)
    previous, earlier = (ends.shift(n, fill_value=-1).to_numpy() for n in (1, 2))
    return np.where(previous == end - 1, earlier, previous) + 1
