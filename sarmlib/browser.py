"""The feature browser: static pages that run no script and ask no server for anything.

Every string of a corpus, label or model is hostile here: jinja2 escapes all of it, invisible characters are shown
as codes, files are named by numbers, and the pages' policy allows one style sheet, named by its hash.
"""

import base64
import hashlib
import json
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from tqdm import tqdm

from sarmlib.errors import ConfigError, DataError
from sarmlib.interpretation.contexts import Contexts
from sarmlib.interpretation.explainers import Label, Vocabulary
from sarmlib.interpretation.judges import KeywordJudge, held_out_sample

MARK = "browser.json"  # a folder that holds this file was written here and may be replaced
BARS = 12  # features in the waterfall of a pair; those without a label, and the smaller ones, are a bar each
ERRORS = 2  # responses of each kind that a label gets wrong
# letters and symbols that look like nothing
_BLANK = {*"\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4\u17b5\u180b\u180c\u180d\u180f",
          *map(chr, range(0xfe00, 0xfe10)), *map(chr, range(0xe0100, 0xe01f0))}
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def write_browser(output: str | Path, contexts: Contexts, labels: Sequence[Label] = (),
                  judged: pd.DataFrame | None = None, *, n_pairs: int = 20,
                  provenance: Mapping[str, str] | None = None) -> Path:
    """Write index, reliable index, a page per live feature, ``n_pairs`` pairs, and labels.json (feature -> words).

    judged: `judge_labels`' table; provenance: name -> value for the footer, for example the artifacts' keys.
    Returns the path of index.html.  ``output`` is complete or untouched.  Raises ConfigError when it holds
    anything that this did not write, DataError when nothing fires.
    """
    output = Path(output)
    if output.exists() and not (output / MARK).exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and holds no feature browser; name another folder, or remove it")
    pages, provenance = _Pages(contexts, labels, judged), dict(provenance or {})
    env = Environment(loader=PackageLoader("sarmlib"), autoescape=True, undefined=StrictUndefined,
                      trim_blocks=True, lstrip_blocks=True)
    css = hashlib.sha256(env.get_template("style.css").render().encode()).digest()
    env.filters |= {"show": visible, "num": _number, "pct": lambda value: f"{100 * value:.1f}\u202f%"}
    env.globals |= {"css_hash": base64.b64encode(css).decode(),
                    "footer": " · ".join(f"{name} {value}" for name, value in provenance.items())}
    fresh = output.with_name(f".{output.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)

    def save(name: str, template: str, **values) -> None:
        page = env.get_template(template).render(values)
        (fresh / f"{name}.html").write_text(page, encoding="utf-8")

    rows = list(pages.rows.values())
    reliable = [row for row in rows if row.get("reliable") is True]
    for name, part in (("index", rows), ("reliable", reliable)):
        save(name, "index.html", rows=part, n_live=len(rows), n_reliable=len(reliable), shape=contexts.z.shape)
    for feature in tqdm(pages.rows, desc="feature pages", unit="page", disable=None):
        save(f"feature-{feature}", "feature.html", **pages.feature(feature))
    pairs = [pages.pair(i, *sides) for i, sides in enumerate(pages.pairs(n_pairs), 1)]
    save("pairs", "pair.html", pairs=pairs)
    for pair in pairs:
        save(f"pair-{pair['id']}", "pair.html", pairs=None, p=pair)
    words = {feature: label.text for feature, label in pages.labels.items()}
    for name, value in (("labels.json", words), (MARK, provenance)):
        (fresh / name).write_text(json.dumps(value), encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)
    return output / "index.html"


def visible(text, most: int = 0) -> str:
    """Text, cut to ``most`` characters, with codes such as ⟨U+202E⟩ for invisible and reordering ones."""
    text = str(text).replace("\r\n", "\n")
    cut = f" … ({len(text) - most:,} more characters)" if most and len(text) > most else ""
    shown = text[:most] if cut else text
    return "".join(c if c in "\n\t" or c not in _BLANK and unicodedata.category(c) not in _HIDDEN
                   else f"⟨U+{ord(c):04X}⟩" for c in shown) + cut


def _number(value, sign: str = "") -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:{sign}.3g}"


class _Pages:
    """What the pages say, as plain values for the templates."""

    def __init__(self, contexts: Contexts, labels: Sequence[Label], judged: pd.DataFrame | None):
        self.contexts, self.w = contexts, contexts.w
        self.units = [{"prompt_text": "", **unit} for unit in contexts.index.to_dict("records")]
        self.labels = {label.feature: label for label in labels if not label.abstained}
        table = contexts.features()
        live = table[table["kind"] != "dead"].sort_values("contribution_sd", ascending=False, kind="stable")
        if not len(live):
            raise DataError("no feature fires on these responses; there is nothing to show")
        if judged is not None:
            live = live.merge(judged[[c for c in judged if c == "feature" or c not in live]], "left", "feature")
        said = live["feature"].map(lambda f: self.labels[f].text if f in self.labels else f"feature {f}")
        self.rows = {row["feature"]: row for row in live.assign(label=said).to_dict("records")}
        if any(label.weights for label in self.labels.values()):  # by the responses that labels are learned from
            read = contexts.index.iloc[contexts.rows("explain")]
            self.judge = KeywordJudge(Vocabulary(read["text"].tolist(), read["length"].to_numpy(float)))

    def errors(self, feature: int) -> list[tuple[str, list[dict]]]:
        """Held-out responses that the label ranks wrongly: the worst misses and false alarms."""
        label = self.labels.get(feature)
        if not label or not label.weights:
            return []
        rows, active = held_out_sample(self.contexts, feature)
        if active.all() or not active.any():
            return []
        score = self.judge.score(label, self.contexts.index.iloc[rows])
        middle = (score[active].mean() + score[~active].mean()) / 2
        low, z = np.argsort(score, kind="stable"), self.contexts.activation(feature)
        found = (("Fires, though the label’s words say no", low[(active & (score < middle))[low]]),
                 ("Silent, though the label’s words say yes", low[(~active & (score > middle))[low]][::-1]))
        return [(words, [self._unit(rows[i], z, feature) for i in worst[:ERRORS]]) for words, worst in found]

    def _unit(self, row: int, z: np.ndarray, feature: int) -> dict:
        return {**self.units[row], "z": z[row], "paid": self.w[feature] * z[row]}

    def feature(self, feature: int) -> dict:
        """Everything on a feature's page."""
        contexts, z, order = self.contexts, self.contexts.activation(feature), [None, *self.rows, None]
        rank, chosen = order.index(feature), (contexts.index["label"] == "chosen").to_numpy()
        domains = pd.Series(z != 0).groupby(contexts.index["domain"].to_numpy()).mean().nlargest(4)
        examples = [{**self._unit(one.row, z, feature), "decile": one.decile}
                    for one in contexts.examples(feature).itertuples()]
        near = contexts.neighbours(feature, 8)
        return {"f": self.rows[feature], "label": self.labels.get(feature), "rank": rank, "n_live": len(self.rows),
                "previous": order[rank - 1], "following": order[rank + 1],
                "on_chosen": (z[chosen] != 0).mean(), "on_rejected": (z[~chosen] != 0).mean(),
                "domains": domains.items(), "mean_active": z[z != 0].mean(), "histogram": histogram(z, chosen),
                "examples": examples[:3], "more": examples[3:], "errors": self.errors(feature),
                "together": [(self.rows[one.feature], one.jaccard) for one in near.itertuples()]}

    def pairs(self, n: int) -> list[tuple[int, int]]:
        """Rows (chosen, rejected), one pair per prompt; half of them decided wrongly, if so many are."""
        index = self.contexts.index
        first = pd.Series(np.arange(len(index))).groupby([self.contexts.prompt, index["label"]]).first()
        both = first.unstack().reindex(columns=["chosen", "rejected"]).dropna().astype(int)
        both = both.sample(frac=1, random_state=0).to_numpy()
        reward = index["reward"].to_numpy()
        right = reward[both[:, 0]] > reward[both[:, 1]]
        few = min((~right).sum(), max(n // 2, n - right.sum()))
        return np.concatenate([both[~right][:few], both[right][:n - few]]).tolist()

    def pair(self, number: int, chosen: int, rejected: int) -> dict:
        """Everything on a pair's page: margin = sum_i w_i (z_i^chosen - z_i^rejected), checked."""
        z = self.contexts.z[[chosen, rejected]].toarray().astype(float)
        paid = self.w * (z[0] - z[1])
        order = np.argsort(-np.abs(paid), kind="stable")
        order = order[(z[:, order] != 0).any(axis=0)]
        named = [f for f in order if f in self.labels] or order.tolist()
        unnamed = [f for f in order if f not in named]
        bars = [{"f": self.rows[f], "value": paid[f], "z": z[:, f]} for f in named[:BARS]]
        for words, others in ((" without a label", unnamed), (" that pay less", named[BARS:])):
            if others:
                text = f"{len(others)} feature{'s' * (len(others) > 1)}{words}"
                bars.append({"f": None, "text": text, "links": others, "value": paid[others].sum()})
        sides = [self.units[chosen], self.units[rejected]]
        margin, total = sides[0]["reward"] - sides[1]["reward"], float(paid.sum())
        exact = abs(total - margin) <= 1e-5 * (1 + np.abs(self.w * z).sum())
        return {"id": number, "sides": sides, "margin": margin, "total": total, "exact": exact,
                "gap": f"{abs(total - margin):.1e}", "n_active": len(order), "bars": _waterfall(bars, total)}


def _waterfall(bars: list[dict], total: float) -> list[dict]:
    """Where each bar stands on an axis 100 wide: where the one above ends; the last is the margin."""
    ends = np.cumsum([0.0, *(bar["value"] for bar in bars)])
    scale = 100 / max(np.ptp(ends), 1e-12)
    bars = [*bars, {"f": None, "text": "margin", "links": [], "value": total}]
    for bar, start, stop in zip(bars, [*ends[:-1], 0.0], [*ends[1:], total], strict=True):
        left, width = (min(start, stop) - ends.min()) * scale, abs(stop - start) * scale
        bar |= {"x": round(left, 2), "width": round(max(width, 0.4), 2), "zero": round(-ends.min() * scale, 2)}
    return bars


def histogram(z: np.ndarray, chosen: np.ndarray, bins: int = 24) -> dict:
    """Activations ``z`` [n] for an SVG 360 wide: chosen responses upwards (c), rejected ones downwards (r), as
    shares of each side, 0 to 60 high; |z| on a logarithmic axis, zero apart."""
    size, totals = np.abs(z), np.maximum([chosen.sum(), (~chosen).sum()], 1)
    low = max(size[size > 0].min(), size.max() / 1e3) * 0.999
    edges = np.geomspace(low, size.max() * 1.001, bins + 1)
    active = [np.maximum(size[side & (size > 0)], low) for side in (chosen, ~chosen)]
    counts = np.array([np.histogram(values, edges)[0] for values in active])
    share, silent = counts / totals[:, None], 1 - counts.sum(axis=1) / totals
    c, r = (60 * share / share.max()).round(1)
    step = 312 / bins
    places = (44 + step * np.arange(bins + 1)).round(1)
    return {"bars": [{"x": 2, "width": 26, "c": 60 * silent[0], "r": 60 * silent[1]},
                     *({"x": places[i], "width": step - 1.5, "c": c[i], "r": r[i]} for i in range(bins))],
            "counts": counts.sum(axis=1), "totals": totals, "tallest": share.max(),
            "ticks": list({f"{edges[i]:.2g}": places[i] for i in range(0, bins + 1, bins // 4)}.items())}
