"""Reward view of a scored set: unit = response, activation = z at the reward position.

The reward ``r = sum_i w_i z_i`` reads that one position, so this is the only view in which a statement about a
feature is also a statement about a reward.  Prompts, never responses, are split into explain / tune / test.
"""

from __future__ import annotations

import hashlib
import re
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import sparse

from sarmlib.errors import DataError

SPLITS = {"explain": 0.5, "tune": 0.2, "test": 0.3}
REQUIRED = ("prompt_id", "domain", "label", "length", "reward", "text")


def check(z, index: pd.DataFrame, required=REQUIRED) -> tuple[sparse.csr_array, pd.DataFrame]:
    """Validate ``z [n, M]`` against its index frame; returns canonical CSR without stored zeros, and a reset index.

    Raises DataError for unequal lengths, missing columns, non-finite activations or rewards, unknown labels.
    """
    z = sparse.csr_array(z).copy()
    z.sum_duplicates()
    z.eliminate_zeros()
    missing = [name for name in required if name not in index.columns]
    if missing:
        raise DataError(f"the index frame lacks {missing}; it has {list(index.columns)}")
    if z.shape[0] != len(index):
        raise DataError(f"z has {z.shape[0]} rows but the index frame has {len(index)}; score both from one list")
    if not np.isfinite(z.data).all():
        raise DataError("z holds NaN or infinite activations; score again in float32")
    if "reward" in index and not np.isfinite(index["reward"].to_numpy(float)).all():
        raise DataError("the index frame holds a NaN or infinite reward; drop or rescore those rows")
    unknown = set(index["label"]) - {"chosen", "rejected"} if "label" in index else set()
    if unknown:
        raise DataError(f"label must be 'chosen' or 'rejected', found {sorted(map(str, unknown))[:3]}")
    return z, index.reset_index(drop=True)


def _fingerprint(text: str) -> str:
    """Prompt text without case, spacing and punctuation: trivial copies share it (digits stay: 2+2 is not 3+5)."""
    return " ".join(re.findall(r"\w+", text.lower())) or f"raw:{text}"


def prompt_split(index: pd.DataFrame, fractions: dict[str, float] = SPLITS, seed: int = 0) -> np.ndarray:
    """Split name of every row, by hash of the prompt: adding rows never moves an old prompt.

    With a ``prompt_text`` column, prompts equal up to case, spacing and punctuation go together; prompt ids that
    share such a text are joined first, so neither an id nor a text is ever on two sides.
    """
    if abs(sum(fractions.values()) - 1) > 1e-9:
        raise DataError(f"split fractions must sum to 1, got {fractions}")
    ids = index["prompt_id"].astype(str)
    key = ids
    if "prompt_text" in index:
        # An id and its texts are one component: key = the smallest fingerprint reachable from the id.
        prints = index["prompt_text"].map(lambda text: _fingerprint(str(text)))
        nodes, _ = pd.factorize(pd.concat(["id " + ids, "text " + prints], ignore_index=True))
        n = len(ids)
        edges = sparse.coo_array((np.ones(n), (nodes[:n], nodes[n:])), shape=(nodes.max() + 1,) * 2)
        component = sparse.csgraph.connected_components(edges, directed=False)[1][nodes[:n]]
        key = prints.groupby(component).transform("min")
    position = key.map({k: int(hashlib.sha256(f"{seed}|{k}".encode()).hexdigest()[:13], 16) / 16**13 for k in set(key)})
    edges = np.cumsum(list(fractions.values()))
    return np.array(list(fractions))[np.minimum(np.searchsorted(edges, position.to_numpy(), "right"), len(edges) - 1)]


def assert_disjoint(index: pd.DataFrame, split: np.ndarray) -> None:
    """Raise DataError when a prompt id, or a prompt text up to case, spacing and punctuation, is on two sides."""
    for column, normal in (("prompt_id", str), ("prompt_text", lambda text: _fingerprint(str(text)))):
        if column in index:
            sides = pd.Series(split).groupby(index[column].map(normal).to_numpy()).nunique()
            if (sides > 1).any():
                raise DataError(f"{column} {sides.index[sides > 1][0]!r} is in {sides.max()} splits; split by prompt")


class Contexts:
    """A scored set: ``z`` csr [n, M], index frame [n], head weights ``w`` [M], and the split of each row.

    Index columns: prompt_id, domain, label, length (tokens), reward, text; optional response_id, style, prompt_text.
    """

    def __init__(self, z, index: pd.DataFrame, w: np.ndarray | None = None, split: np.ndarray | None = None, seed=0):
        self.z, self.index = check(z, index)
        self.w = None if w is None else np.asarray(w, float).ravel()
        if self.w is not None and len(self.w) != self.z.shape[1]:
            raise DataError(f"w has {len(self.w)} entries but z has {self.z.shape[1]} features")
        self.split = prompt_split(self.index, seed=seed) if split is None else np.asarray(split)
        assert_disjoint(self.index, self.split)
        self.prompt = pd.factorize(self.index["prompt_id"].astype(str))[0]

    @cached_property
    def _columns(self) -> sparse.csc_array:
        return self.z.tocsc()

    def activation(self, feature: int) -> np.ndarray:
        """``z_i`` of every unit, [n] dense."""
        if not 0 <= feature < self.z.shape[1]:
            raise DataError(f"feature {feature} is outside 0..{self.z.shape[1] - 1}")
        return self._columns[:, [feature]].toarray().ravel()

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of one split."""
        return np.flatnonzero(self.split == split)

    def features(self, rare: int = 50, dense: float = 0.9) -> pd.DataFrame:
        """One row per feature, dead ones too, so that nothing is dropped silently.

        kind: dead (never fires), rare (< ``rare`` units), dense (> ``dense`` of the units) or usual.
        contribution_mean and contribution_sd are of ``w_i z_i`` in reward points: rank by the sd, because |w| sits at
        the optimiser's step bound.  preference_corr is the correlation of z_i with chosen (1) / rejected (0), both
        centred within the prompt; reward_corr and length_corr are plain Pearson correlations over units.
        """
        z, (n, m) = self.z.astype(float), self.z.shape
        count = np.bincount(z.indices, minlength=m)
        total, square = z.sum(axis=0), z.power(2).sum(axis=0)
        sd = np.sqrt(np.maximum(square / n - (total / n) ** 2, 0))
        membership = sparse.csr_array((np.ones(n), (self.prompt, np.arange(n))))
        size = membership.sum(axis=1)
        chosen = (self.index["label"] == "chosen").to_numpy(float)
        centred = chosen - (membership @ chosen / size)[self.prompt]
        per_prompt = membership @ z
        within = np.maximum(square - sparse.diags_array(1 / size).dot(per_prompt.power(2)).sum(axis=0), 0)
        within[within < 1e-9 * square] = 0  # rounding, not variation

        def corr(values, spread):
            values = values - values.mean()
            with np.errstate(invalid="ignore", divide="ignore"):
                r = (z.T @ values) / (spread * np.sqrt((values**2).sum()))
            return np.where(np.isfinite(r), r, np.nan)

        kind = np.select([count == 0, count < rare, count > dense * n], ["dead", "rare", "dense"], "usual")
        table = pd.DataFrame({"feature": np.arange(m), "kind": kind, "n_active": count, "rate": count / n,
                              "mean_active": total / np.maximum(count, 1),
                              "preference_corr": corr(centred, within**0.5),
                              "reward_corr": corr(self.index["reward"].to_numpy(float), sd * n**0.5),
                              "length_corr": corr(self.index["length"].to_numpy(float), sd * n**0.5)})
        if self.w is not None:
            table = table.assign(w=self.w, contribution_mean=self.w * total / n, contribution_sd=np.abs(self.w) * sd)
        return table

    def neighbours(self, feature: int, n: int = 5) -> pd.DataFrame:
        """The ``n`` features that fire most with this one on the explain split: feature, jaccard, both (responses).

        jaccard = responses with both / responses with either.
        """
        fires = self._fires
        both = np.asarray(fires.T @ (self.activation(feature)[self.rows("explain")] != 0).astype(np.float32)).ravel()
        count = self._fire_counts
        jaccard = np.where(both > 0, both / np.maximum(count + count[feature] - both, 1), 0)
        jaccard[feature] = 0
        best = np.argsort(-jaccard, kind="stable")[:n]
        best = best[jaccard[best] > 0]
        return pd.DataFrame({"feature": best, "jaccard": jaccard[best], "both": both[best].astype(int)})

    @cached_property
    def _fires(self) -> sparse.csr_array:
        part = sparse.csr_array(self.z[self.rows("explain")] != 0)
        return part.astype(np.float32)

    @cached_property
    def _fire_counts(self) -> np.ndarray:
        return np.asarray(self._fires.sum(axis=0)).ravel()

    def examples(self, feature: int, per_decile: int = 2, split: str | None = None, seed: int = 0) -> pd.DataFrame:
        """Index rows for display: ``per_decile`` units from each activation decile (10 = strongest), with its size.

        Columns added: row, z, decile, n_in_decile.  The choice depends on the seed and the feature alone.
        """
        z = self.activation(feature)
        rows = np.flatnonzero((z != 0) & (True if split is None else self.split == split))
        rows = rows[np.argsort(z[rows], kind="stable")]
        rng = np.random.default_rng([seed, feature])
        parts = [(d, part) for d, part in enumerate(np.array_split(rows, 10), 1) if len(part)]
        picks = [(row, d, len(part)) for d, part in reversed(parts)
                 for row in rng.choice(part, min(per_decile, len(part)), replace=False)]
        frame = pd.DataFrame(picks, columns=["row", "decile", "n_in_decile"]).astype(int)
        shown = self.index.iloc[frame["row"]].reset_index(drop=True)
        return pd.concat([frame.assign(z=z[frame["row"]]), shown], axis=1)
