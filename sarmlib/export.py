"""Features, labels and examples as files for other programs: JSON Lines with a schema, and Neuronpedia's layout."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd

from sarmlib.artifacts import write_atomic
from sarmlib.browser import Browser
from sarmlib.chat import encode_conversation

_NUMBER, _TEXT, _WHOLE = {"type": ["number", "null"]}, {"type": ["string", "null"]}, {"type": "integer"}
_EXAMPLE = {"response_id": _TEXT, "prompt_id": _TEXT, "z": _NUMBER, "contribution": _NUMBER, "decile": _WHOLE,
            "n_in_decile": _WHOLE, "side": {"enum": ["chosen", "rejected"]}, "domain": _TEXT, "length": _WHOLE,
            "reward": _NUMBER, "split": {"enum": ["explain", "tune", "test"]}, "sha256": _TEXT, "text": _TEXT}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "One feature of a SARM at the reward position",
    "type": "object",
    "required": ["feature", "kind", "n_active", "rate", "w", "label", "examples"],
    "properties": {
        "feature": {**_WHOLE, "description": "index i of z_i and w_i"},
        "kind": {"enum": ["dead", "rare", "dense", "usual"]},
        "n_active": _WHOLE, "rate": _NUMBER, "mean_active": _NUMBER, "w": _NUMBER,
        "contribution_mean": {**_NUMBER, "description": "mean of w z over all responses"},
        "contribution_sd": _NUMBER, "preference_corr": _NUMBER, "reward_corr": _NUMBER, "length_corr": _NUMBER,
        "label": {"type": ["object", "null"], "description": "null: not labelled", "properties": {
            "text": _TEXT, "made_by": {"enum": ["keyword", "llm", "human"]}, "abstained": {"type": "boolean"},
            "reason": _TEXT, "weights": {"type": "object"}, "self_grade": {"type": ["integer", "null"]}}},
        "scores": {"type": ["object", "null"], "description": "judge_labels' row: on prompts the explainer has not "
                                                              "seen; null: not judged"},
        "examples": {"type": "array", "items": {"type": "object", "required": ["z", "decile", "side"],
                                                "properties": _EXAMPLE}}}}


def _plain(value):
    """NumPy to JSON; NaN and infinity have no place in JSON."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def feature_row(browser: Browser, feature: int, per_decile: int = 2) -> dict:
    """A feature as `SCHEMA` has it; a redacted browser gives no text and no label words."""
    row, label, index = browser.table.loc[feature], browser.labels.get(feature), browser.contexts.index
    table = browser.contexts.examples(feature, per_decile, seed=browser.seed)
    examples = []
    for one in table.itertuples():
        unit, ids = browser.unit(feature, one.row, one.z), index.iloc[one.row]
        examples.append({"response_id": ids.get("response_id"), "prompt_id": str(ids["prompt_id"]), "z": unit["z"],
                         "contribution": unit["contribution"], "decile": one.decile, "n_in_decile": one.n_in_decile,
                         "side": unit["label"], "domain": unit["domain"], "length": unit["length"],
                         "reward": unit["reward"], "split": unit["split"], "sha256": unit["sha"],
                         "text": None if browser.redact else str(ids["text"])})
    scores = {name: value for name, value in browser.judged.get(feature, {}).items() if name not in browser.table
              and name not in ("feature", "label")}
    made = None if label is None else {
        "text": browser.text_of(feature), "made_by": label.kind, "abstained": label.abstained, "reason": label.reason,
        "weights": {} if browser.redact else label.weights, "self_grade": label.self_grade}
    return _plain({"feature": int(feature), **row.to_dict(), "label": made, "scores": scores or None,
                   "examples": examples})


def write_jsonl(browser: Browser, folder: str | Path, per_decile: int = 2) -> int:
    """``features.jsonl`` (one live feature per line, dead ones counted in ``summary.json``) and ``schema.json``."""
    folder = Path(folder)
    lines = [json.dumps(feature_row(browser, f, per_decile), ensure_ascii=True) + "\n" for f in browser.shown]
    write_atomic(folder / "schema.json", json.dumps(SCHEMA, indent=2) + "\n")
    kinds = browser.table.kind.value_counts().to_dict()
    write_atomic(folder / "summary.json", json.dumps(_plain({"features": kinds, "written": len(lines),
                                                            "responses": len(browser.contexts.index)})) + "\n")
    write_atomic(folder / "features.jsonl", "".join(lines))
    return len(lines)


def write_neuronpedia(browser: Browser, folder: str | Path, *, model: str, source: str, tokenizer=None,
                      max_tokens: int = 128, max_length: int = 2048) -> int:
    """Neuronpedia's import layout under ``folder/model/source``; returns the number of features.

    A reward model has no logits, so those fields stay empty; every activation is at the reward position, so a
    record's values are 0 but for its last token.  With a tokenizer the tokens are the scored ones (the last
    ``max_tokens``), otherwise words.  Labels that abstained are not written; a verdict goes to ``notes``.
    """
    root, contexts = Path(folder) / model / source, browser.contexts
    features, activations, explanations = [], [], []
    for feature in browser.shown:
        row, z = browser.table.loc[feature], contexts.activation(feature)
        live = np.sort(z[z != 0])
        deciles = np.array_split(live, 10)
        heights, edges = np.histogram(live, 50)
        near = contexts.neighbours(feature, 8)
        features.append({
            "modelId": model, "layer": source, "index": str(feature), "maxActApprox": live.max(),
            "frac_nonzero": row.rate, "freq_hist_data_bar_heights": heights, "freq_hist_data_bar_values": edges[:-1],
            "pos_str": [], "pos_values": [], "neg_str": [], "neg_values": [],
            "correlated_neurons_indices": near.feature.tolist(), "correlated_neurons_pearson": [],
            "correlated_neurons_l1": near.jaccard.tolist()})
        for one in contexts.examples(feature, 2, seed=browser.seed).itertuples():
            tokens = _tokens(browser, one.row, tokenizer, max_length)[-max_tokens:]
            inside = deciles[one.decile - 1]
            activations.append({
                "id": f"{feature}-{one.row}", "modelId": model, "layer": source, "index": str(feature),
                "tokens": tokens, "values": [0.0] * (len(tokens) - 1) + [one.z], "maxValue": one.z,
                "maxValueTokenIndex": len(tokens) - 1, "minValue": 0.0, "binMin": inside[0], "binMax": inside[-1],
                "binContains": one.n_in_decile / len(live), "qualifyingTokenIndex": len(tokens) - 1})
        label = browser.labels.get(feature)
        if label is not None and not label.abstained and not browser.redact:
            found = browser.judged.get(feature, {})
            explanations.append({
                "id": f"{source}-{feature}", "modelId": model, "layer": source, "index": str(feature),
                "description": label.text, "authorId": "sarmlib", "typeName": f"sarmlib-{label.kind}",
                "explanationModelName": label.kind,
                "notes": f"head weight {row.w:+.6g}; sd of w z {row.contribution_sd:.6g}; "
                         f"{found.get('verdict') or 'not judged'}"})
    head = {"release": {"name": model, "description": "Sparse features of a reward model at the reward position."},
            "model": {"id": model, "displayName": model}, "sourceset": {"modelId": model, "name": source},
            "source": {"id": source, "modelId": model, "setName": source, "hasDashboards": True}}
    for name, value in head.items():
        write_atomic(root / f"{name}.jsonl", json.dumps(value) + "\n")
    for name, rows in (("features", features), ("activations", activations), ("explanations", explanations)):
        text = "".join(json.dumps(_plain(_lists(row))) + "\n" for row in rows)
        write_atomic(root / name / "batch-0.jsonl.gz", gzip.compress(text.encode(), mtime=0))
    return len(features)


def _lists(row: dict) -> dict:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}


def _tokens(browser: Browser, row: int, tokenizer, max_length: int) -> list[str]:
    one: pd.Series = browser.contexts.index.iloc[row]
    if browser.redact:
        return ["(withheld)"]
    if tokenizer is None:
        return str(one["text"]).split() or [""]
    talk = [{"role": "user", "content": str(one.get("prompt_text", ""))},
            {"role": "assistant", "content": str(one["text"])}]
    return [tokenizer.decode([i]) for i in encode_conversation(tokenizer, talk, max_length)]
