"""The feature browser: static pages that run no script and ask no server for anything.

Every string of a corpus, a label or a model is hostile here: jinja2 escapes all of it, invisible and reordering
characters are shown as codes, file names are made of numbers, and the pages' policy allows one inline style sheet,
named by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from tqdm.auto import tqdm

from sarmlib.errors import ConfigError, DataError
from sarmlib.interpretation.contexts import Contexts
from sarmlib.interpretation.explainers import Label
from sarmlib.interpretation.judges import Judge, best_threshold, held_out_sample

MARK = "browser.json"
"""A folder that holds this file was written here and may be replaced."""
TEXT, PROMPT = 400, 160
"""Most characters of a response and of a prompt on a feature's page."""
ORDERS = {"contribution": ("sd", "index.html"), "weight": ("w", "by-weight.html"),
          "preference": ("preference", "by-preference.html"), "active": ("rate", "by-rate.html"),
          "held-out AUROC": ("auroc", "by-auroc.html"), "feature": ("id", "by-number.html")}
_BLANK = {"\u115f", "\u1160", "\u3164", "\uffa0", "\u2800"}
"""Letters and symbols that look like nothing."""
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text, most: int = 0) -> str:
    """Text in which every invisible, control or reordering character is a code such as ⟨U+202E⟩; new lines and tabs
    stay.  ``most`` cuts it and says how much is missing."""
    text = str(text).replace("\r\n", "\n")
    cut = f" … ({len(text) - most:,} more characters)" if most and len(text) > most else ""
    text = text[:most] if cut else text
    return "".join(c if c in "\n\t" or c not in _BLANK and unicodedata.category(c) not in _HIDDEN
                   else f"⟨U+{ord(c):04X}⟩" for c in text) + cut


def _num(value, sign: str = "") -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:{sign}.4g}"


@lru_cache
def environment() -> Environment:
    """The templates, with autoescape on for every one of them."""
    env = Environment(loader=PackageLoader("sarmlib"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                      lstrip_blocks=True)
    css = env.get_template("style.css").render()
    env.filters |= {"show": visible, "num": _num, "pct": lambda value: f"{100 * value:.1f}\u202f%"}
    env.globals |= {"css_hash": base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()}
    return env


class Browser:
    """What the pages say about a scored set (`Contexts` with head weights) and its labels.

    judged: `judge_labels`' table; judge: marks on the held-out sample where a label is wrong; decoder: W_dec [M, d]
    for the nearest features; redact: no text of prompts, responses or labels at all, only numbers and hashes.
    Responses of domains that start with "safety" are blurred until revealed.
    """

    def __init__(self, contexts: Contexts, labels: Sequence[Label] = (), judged: pd.DataFrame | None = None,
                 judge: Judge | None = None, *, decoder: np.ndarray | None = None, redact: bool = False,
                 n_features: int = 500, seed: int = 0):
        if contexts.w is None:
            raise DataError("the browser shows contributions w z; make Contexts with the head weights w")
        if n_features < 1:
            raise ConfigError(f"n_features={n_features}: at least 1 page is needed")
        self.contexts, self.judge, self.redact, self.seed = contexts, judge, redact, seed
        self.labels = {label.feature: label for label in labels}
        self.judged = {} if judged is None else {row["feature"]: row for row in judged.to_dict("records")}
        self.table = contexts.features().set_index("feature")
        ranked = self.table[self.table.kind != "dead"].sort_values("contribution_sd", ascending=False, kind="stable")
        first = [f for f in ranked.index if f in self.labels]
        shown = [*first, *(f for f in ranked.index if f not in self.labels)][:n_features]
        self.shown = [int(f) for f in ranked.index if f in set(shown)]
        if not self.shown:
            raise DataError("every feature is dead on these responses; there is nothing to show")
        self._rank = {int(f): i for i, f in enumerate(ranked.index, 1)}
        self._nearest = {} if decoder is None else _nearest(np.asarray(decoder, float), self.shown)
        index = contexts.index
        self._sha = [hashlib.sha256(str(text).encode("utf-8", "surrogatepass")).hexdigest()[:12]
                     for text in index["text"]]

    # -- one feature -------------------------------------------------------------------------------------------

    def text_of(self, feature: int) -> str:
        """The label, or why there is none."""
        label = self.labels.get(int(feature))
        if label is None:
            return "not labelled"
        return "label withheld" if self.redact and not label.abstained else label.text

    def summary(self, feature: int) -> dict:
        """What the index shows."""
        row, judged = self.table.loc[feature], self.judged.get(feature, {})
        label, auroc = self.labels.get(feature), judged.get("auroc")
        auroc = float(auroc) if auroc is not None and auroc == auroc else None
        if label is None:
            badge, words = "", "not labelled"
        elif label.abstained:
            badge, words = "bad", "✗ abstained"
        elif auroc is None:
            badge, words = "", "○ not scored"
        else:
            badge, words = ("good", "✓ reliable") if judged["reliable"] else ("bad", "✗ not reliable")
        return {"id": feature, "rank": self._rank[feature], "text": self.text_of(feature), "badge": badge,
                "badge_text": words, "kind": row.kind, "w": row.w, "sd": row.contribution_sd, "rate": row.rate,
                "preference": row.preference_corr, "auroc": auroc}

    def feature(self, feature: int, per_decile: int = 2) -> dict:
        """Everything on a feature's page."""
        row, judged, label = self.table.loc[feature], self.judged.get(feature, {}), self.labels.get(feature)
        z = self.contexts.activation(feature)
        examples = self.contexts.examples(feature, per_decile, seed=self.seed)
        units = [self.unit(feature, r.row, z[r.row], decile=r.decile, of=r.n_in_decile) for r in examples.itertuples()]
        active = np.flatnonzero(z)
        near = active[np.argsort(np.abs(z[active]), kind="stable")][:4]
        false_positives, false_negatives, why = self._errors(feature, z)
        source = {"keyword": "keyword label", "llm": "label of a chat model"}.get(label.kind if label else "", "")
        grade = f"; self-grade {label.self_grade} of 5" if label and label.self_grade else ""
        return {**self.summary(feature), "verdict": _verdict(judged, label), "source": (source or "no label") + grade,
                "facts": self._facts(feature, row, z), "scores": _scores(judged),
                "evidence": [] if label is None or self.redact else label.evidence,
                "histogram": histogram(z, (self.contexts.index["label"] == "chosen").to_numpy()), "examples": units,
                "near": [self.unit(feature, i, z[i]) for i in near],
                "false_positives": false_positives, "false_negatives": false_negatives, "no_errors": why,
                "together": self._neighbours(self.contexts.neighbours(feature, 8)[["feature", "jaccard"]]),
                "nearest": self._neighbours(self._nearest.get(feature))}

    def unit(self, feature: int | None, row: int, z: float | None = None, *, decile=None, of=None, score=None,
             most=(TEXT, PROMPT)) -> dict:
        """One response as the pages show it."""
        row, one = int(row), self.contexts.index.iloc[int(row)]
        prompt = one.get("prompt_text")
        return {"z": z, "contribution": None if z is None else float(self.contexts.w[feature] * z),
                "decile": decile, "n_in_decile": of, "score": score, "label": one["label"], "domain": one["domain"],
                "length": int(one["length"]), "reward": float(one["reward"]), "split": self.contexts.split[row],
                "sha": self._sha[row], "harmful": str(one["domain"]).lower().startswith("safety"),
                "text": None if self.redact else visible(one["text"], most[0]),
                "prompt": None if self.redact or prompt is None else visible(prompt, most[1])}

    def _facts(self, feature: int, row, z) -> list[tuple[str, str]]:
        active = z != 0
        domains = pd.Series(active).groupby(self.contexts.index["domain"].to_numpy()).mean()
        domains = domains.sort_values(ascending=False, kind="stable").head(4)
        place = int((self.table.w.abs() > abs(row.w)).sum()) + 1
        return [("head weight w", _num(row.w, "+")), ("place of |w|", f"{place} of {len(self.table)}"),
                ("fires on", f"{row.n_active:,} responses, {100 * row.rate:.1f}\u202f%"),
                ("mean z where it fires", _num(row.mean_active)),
                ("contribution w z: mean", _num(row.contribution_mean, "+")),
                ("contribution w z: sd", _num(row.contribution_sd)),
                ("correlation with chosen, within the prompt", _num(row.preference_corr, "+")),
                ("correlation with the reward", _num(row.reward_corr, "+")),
                ("correlation with length", _num(row.length_corr, "+")),
                ("fires most in", ", ".join(f"{visible(name, 40)} {100 * v:.0f}\u202f%"
                                            for name, v in domains.items()))]

    def _errors(self, feature: int, z, most: int = 4) -> tuple[list, list, str]:
        """(false positives, false negatives, why there are none) of the label on the held-out sample."""
        label = self.labels.get(feature)
        if label is None or label.abstained or self.judge is None:
            return [], [], "no label to be wrong" if label is None or label.abstained else "no judge given"
        rows, positive = held_out_sample(self.contexts, feature, seed=self.seed)
        tune, tune_positive = held_out_sample(self.contexts, feature, split="tune", seed=self.seed)
        frame = self.contexts.index
        cut = best_threshold(self.judge.score(label, frame.iloc[tune]), tune_positive) if len(tune) else float("nan")
        if not (math.isfinite(cut) and len(rows)):
            return [], [], "too few responses to find a threshold"
        score = np.asarray(self.judge.score(label, frame.iloc[rows]), float)
        order = np.argsort(-score, kind="stable")
        wrong = [i for i in order if score[i] >= cut and not positive[i]][:most]
        missed = [i for i in order[::-1] if score[i] < cut and positive[i]][:most]

        def shown(part) -> list[dict]:
            return [self.unit(feature, rows[i], z[rows[i]], score=float(score[i])) for i in part]

        return shown(wrong), shown(missed), "none in the held-out sample"

    def _neighbours(self, frame) -> list[dict]:
        if frame is None:
            return []
        known = set(self.shown)
        return [{"id": int(f), "value": float(v), "text": self.text_of(f), "page": int(f) in known}
                for f, v in frame.itertuples(index=False)]

    # -- one pair ----------------------------------------------------------------------------------------------

    def pairs(self, n: int = 20) -> list[tuple[int, int]]:
        """Rows (chosen, rejected) of one prompt each: half of them, where there are so many, decided wrongly."""
        index = self.contexts.index
        sides = {name: part.index.to_numpy() for name, part in index.groupby(["prompt_id", "label"], sort=False)}
        prompts = [p for p in dict.fromkeys(index["prompt_id"]) if (p, "chosen") in sides and (p, "rejected") in sides]
        found = [(sides[p, "chosen"][i], sides[p, "rejected"][i]) for p in prompts
                 for i in range(min(len(sides[p, "chosen"]), len(sides[p, "rejected"])))]
        order = np.random.default_rng(self.seed).permutation(len(found))
        reward = index["reward"].to_numpy(float)
        wrong = [found[i] for i in order if reward[found[i][0]] <= reward[found[i][1]]]
        right = [found[i] for i in order if reward[found[i][0]] > reward[found[i][1]]]
        few = min(len(wrong), max(n // 2, n - len(right)))
        return [(int(a), int(b)) for a, b in [*wrong[:few], *right[:n - few]]]

    def pair(self, number: int, chosen: int, rejected: int, most: int = 12) -> dict:
        """Everything on a pair's page: margin = sum_i w_i (z_i^chosen - z_i^rejected), checked."""
        from sarmlib.sarm.attribution import TOLERANCE
        z, w, reward = self.contexts.z, self.contexts.w, self.contexts.index["reward"].to_numpy(float)
        zc, zr = (z[[row]].toarray().ravel().astype(float) for row in (chosen, rejected))
        features = np.flatnonzero((zc != 0) | (zr != 0))
        values = w[features] * (zc - zr)[features]
        order = np.argsort(-np.abs(values), kind="stable")
        features, values = features[order], values[order]
        margin, total = reward[chosen] - reward[rejected], float(values.sum())
        size = 1 + np.abs(w * zc).sum() + np.abs(w * zr).sum()
        exact = bool(abs(total - margin) <= TOLERANCE * size)
        steps = [(f"feature {f}", v) for f, v in zip(features[:most], values[:most], strict=True)]
        if len(features) > most:
            steps.append((f"{len(features) - most} more features", values[most:].sum()))
        ends = np.cumsum([0.0, *(v for _, v in steps)])
        low, high = min(ends.min(), 0.0), max(ends.max(), 0.0)
        scale = 400 / max(high - low, 1e-12)
        x = [150 + (end - low) * scale for end in ends]
        bars = [{"y": 20 * i, "name": name, "value": v, "kind": "c" if v >= 0 else "r",
                 "x": round(min(x[i], x[i + 1]), 1), "w": round(max(abs(x[i + 1] - x[i]), 0.5), 1)}
                for i, (name, v) in enumerate(steps)]
        zero = round(150 - low * scale, 1)
        bars.append({"y": 20 * len(steps), "name": "margin", "value": total, "kind": "sum",
                     "x": min(zero, round(x[-1], 1)), "w": round(max(abs(x[-1] - zero), 0.5), 1)})
        known, gap = set(self.shown), f"{abs(total - margin):.1e}"
        table = [{"id": int(f), "page": int(f) in known, "text": self.text_of(f), "zc": zc[f], "zr": zr[f], "w": w[f],
                  "value": v} for f, v in zip(features, values, strict=True)]
        return {"id": number, "domain": self.contexts.index["domain"].iloc[chosen], "margin": margin, "bars": bars,
                "verdict": "decided rightly" if margin > 0 else "decided wrongly" if margin < 0 else "a tie",
                "height": 20 * len(bars) + 6, "zero": zero, "exact": exact, "table": table,
                "check": "exact" if exact else "does not add up",
                "check_text": (f"Exact: the contributions of {len(features)} features sum to {total:+.6g}, the margin "
                               f"to within {gap}." if exact else
                               f"The contributions sum to {total:+.6g}, which is not the margin (gap {gap})."),
                **{name: self.unit(None, row, most=(2000, 600)) for name, row in
                   (("chosen", chosen), ("rejected", rejected))}}

    def skipped(self) -> list[tuple[str, str, int, str]]:
        """(name, why, count, ids) of the groups of features that are not usual or have no page."""
        kinds, known = self.table.kind, set(self.shown)
        usual = [f for f in self.table.index if kinds[f] != "dead" and f not in known]
        groups = [("Dead", "They fire on none of these responses.", kinds[kinds == "dead"].index, False),
                  ("No page", "They move the reward least; ask for more pages to see them.", usual, True),
                  ("Rare", "They fire on fewer than 50 responses: no label can be tested.",
                   kinds[kinds == "rare"].index, True),
                  ("Dense", "They fire on more than 90 % of the responses: hardly a feature.",
                   kinds[kinds == "dense"].index, True),
                  ("Abstained", "The explainer found no label that it could stand for.",
                   [f for f, one in self.labels.items() if one.abstained], True)]
        return [(name, why, len(ids), ", ".join(map(str, ids)) if listed else "") for name, why, ids, listed in groups]

    # -- pages -------------------------------------------------------------------------------------------------

    def write(self, folder: str | Path, provenance: Mapping[str, str] | None = None, n_pairs: int = 20,
              progress: bool = True) -> dict:
        """Write all pages to ``folder``; returns features, pairs, files, bytes.

        The folder is complete or absent: pages go to a temporary name first.  Raises ConfigError when ``folder``
        holds something that this did not write.
        """
        folder, env = Path(folder), environment()
        if folder.exists() and not (folder / MARK).exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists and holds no feature browser; name another folder, or remove it")
        provenance = dict(provenance or {})
        footer = " · ".join(f"{name} {value}" for name, value in provenance.items())
        fresh = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)

        def save(name: str, template: str, **values) -> None:
            (fresh / name).write_text(env.get_template(template).render(footer=footer, **values), encoding="utf-8")

        rows = [self.summary(f) for f in self.shown]
        for order, (key, name) in ORDERS.items():
            values = [row[key] if row[key] is not None and row[key] == row[key] else -math.inf for row in rows]
            place = np.argsort(values if key == "id" else np.negative(values), kind="stable")
            save(name, "index.html", rows=[rows[i] for i in place], order=order, columns=self._columns(),
                 summary=f"{len(rows):,} of {len(self.table):,} features, on {len(self.contexts.index):,} responses.")
        for i, feature in enumerate(tqdm(self.shown, desc="feature pages", unit="page", disable=not progress)):
            save(f"feature-{feature}.html", "feature.html", f=self.feature(feature),
                 previous=self.shown[i - 1] if i else None,
                 following=self.shown[i + 1] if i + 1 < len(self.shown) else None)
        pairs = [self.pair(i, a, b) for i, (a, b) in enumerate(self.pairs(n_pairs), 1)]
        for one in pairs:
            save(f"pair-{one['id']}.html", "pair.html", p=one)
        save("pairs.html", "pairs.html", pairs=pairs)
        save("skipped.html", "skipped.html", groups=self.skipped(), total=len(self.table), shown=len(self.shown))
        save("about.html", "about.html", provenance=list(provenance.items()))
        (fresh / MARK).write_text(json.dumps({"features": self.shown, "provenance": provenance}) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
        files = list(folder.iterdir())
        return {"features": len(self.shown), "pairs": len(pairs), "files": len(files),
                "bytes": sum(file.stat().st_size for file in files)}

    @staticmethod
    def _columns() -> list[dict]:
        names = ["feature", "label", "verdict", "contribution", "weight", "preference", "active", "held-out AUROC"]
        return [{"name": name, "href": ORDERS[name][1] if name in ORDERS else None} for name in names]

    def card(self, feature: int) -> Card:
        """A feature in a few lines, for a notebook."""
        if int(feature) not in self._rank:
            raise DataError(f"feature {feature} is dead on these responses, or there is none; nothing to show")
        found = self.feature(int(feature), per_decile=1)
        for unit in found["examples"]:
            if unit["harmful"]:
                unit["text"] = unit["prompt"] = None  # a notebook's output is committed and mailed around
        return Card(environment().get_template("card.html").render(f=found, footer=""))


class Card:
    """A page inside a notebook, in a frame that may run nothing."""

    def __init__(self, page: str):
        self.page = page

    def __repr__(self) -> str:
        return f"Card({len(self.page)} characters of HTML, shown in a notebook)"

    def _repr_html_(self) -> str:
        return (f'<iframe sandbox title="feature" width="100%" height="620" style="border:0" '
                f'srcdoc="{html.escape(self.page, quote=True)}"></iframe>')


def _verdict(judged: dict, label: Label | None) -> str:
    if judged.get("verdict"):
        return str(judged["verdict"])
    return label.reason if label is not None else ""


def _scores(row: dict) -> list[tuple[str, str]]:
    """`judge_labels`' columns in words; nothing when there is no score."""
    if row.get("auroc") is None or row["auroc"] != row["auroc"]:
        return []
    words = {"balanced_accuracy": "balanced accuracy", "auprc": "average precision at natural prevalence",
             "prevalence": "prevalence (what knowing nothing gets)", "correlation_z": "correlation with z",
             "auroc_matched": "AUROC, other answers to the same prompts",
             "auroc_neighbour": "AUROC, where a neighbour fires", "null_95": "95 % of shuffles stay below",
             "q_value": "q (Benjamini-Hochberg)", "auroc_other_label": "another feature's label here",
             "lift": "above the best trivial judge"}
    found = [("AUROC [95 %]", f"{row['auroc']:.3f} [{row['auroc_lo']:.3f}, {row['auroc_hi']:.3f}]"),
             ("held-out responses", f"{row['n_pos']:.0f} active, {row['n_neg']:.0f} not")]
    found += [(text, _num(row[name])) for name, text in words.items() if name in row]
    return [*found, ("best trivial judge", f"{row['best_trivial']}: {row['auroc_' + str(row['best_trivial'])]:.3f}")]


def _nearest(decoder: np.ndarray, features: list[int], n: int = 8) -> dict[int, pd.DataFrame]:
    unit = decoder / np.maximum(np.linalg.norm(decoder, axis=1, keepdims=True), 1e-12)
    found = {}
    for feature in features:
        cosine = unit @ unit[feature]
        cosine[feature] = -2
        best = np.argpartition(-cosine, min(n, len(cosine) - 1))[:n]
        best = best[np.argsort(-cosine[best], kind="stable")]
        found[feature] = pd.DataFrame({"feature": best, "value": cosine[best]})
    return found


def histogram(z: np.ndarray, chosen: np.ndarray, bins: int = 24) -> dict:
    """Shares of chosen and of rejected responses per logarithmic bin of |z|, zero apart, as an SVG needs them."""
    size = np.abs(z)
    top = size.max()
    low = max(size[size > 0].min(), top / 1e3) * 0.999 if top > 0 else 0.5
    edges = np.geomspace(low, max(top, low) * 1.001, bins + 1)
    n = {True: max(chosen.sum(), 1), False: max((~chosen).sum(), 1)}
    counts = {side: np.histogram(np.maximum(size[(chosen == side) & (size > 0)], low), edges)[0] for side in n}
    zeros = {side: int(((chosen == side) & (size == 0)).sum()) for side in n}
    tallest = max(*(counts[s].max() / n[s] for s in n), 1e-12)
    bars = [{"x": round(96 + i * 540 / bins, 1), "w": round(540 / bins - 1.5, 1),
             **{name: round(100 * counts[side][i] / n[side] / tallest, 1)
                for name, side in (("c", True), ("r", False))}} for i in range(bins)]
    places = np.linspace(0, bins, 5).astype(int)
    return {"zero_c": round(100 * zeros[True] / n[True], 1), "zero_r": round(100 * zeros[False] / n[False], 1),
            "bars": bars,
            "ticks": [{"x": min(round(96 + i * 540 / bins, 1), 616), "text": f"{edges[i]:.3g}"} for i in places],
            "caption": f"Chosen responses above the line, rejected below, as shares of {n[True]:,} and {n[False]:,}. "
                       "Zero is a bar of its own (full height: all of them); the others have a scale of their own "
                       f"(full height: {100 * tallest:.2g} %).",
            "rows": [("0", zeros[True], zeros[False]),
                     *((f"{edges[i]:.3g} to {edges[i + 1]:.3g}", int(counts[True][i]), int(counts[False][i]))
                       for i in range(bins) if counts[True][i] or counts[False][i])]}
