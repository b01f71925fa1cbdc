"""Any reward model on RewardBench 2 and RM-Bench, with the text that the official scripts build.

Text (allenai/reward-bench ``scripts/run_v2.py``, THU-KEG/RM-Bench ``scripts/run_rm.py``): the tokenizer's chat template
without a generation prompt, tokenized once more with special tokens; where that gives two BOS, the first is kept but
masked; at most 2048 tokens, cut on the tokenizer's own side (RewardBench 2) or on the left (RM-Bench).

In float32 the answers to one prompt go through the decoder in one row (`prefix`), where that gives the same rewards.
Every score is appended to ``scores.jsonl`` as soon as its batch is done; a killed run goes on where it stopped, and a
last line torn by the kill is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sarmlib.artifacts import hash_file, hash_json, write_atomic, write_json
from sarmlib.backbone import _from_hub, _quiet_loading, load_tokenizer
from sarmlib.chat import fit_length, render
from sarmlib.data.files import Rows
from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.evaluation import rewardbench2, rm_bench
from sarmlib.evaluation.adapters import own_code, reward_of
from sarmlib.evaluation.prefix import Pack, packed_rewards, packs
from sarmlib.evaluation.scoring import token_batches
from sarmlib.evaluation.statistics import bootstrap_ci

MAX_LENGTH = 2048
SIDES = {"rewardbench2": None, "rm_bench": "left"}
"""Truncation side of the official scripts; None: what the tokenizer's files say."""


@dataclass(frozen=True)
class Scorer:
    """A loaded reward model: ``model``, its ``tokenizer``, and how it was loaded (for the report)."""

    model: torch.nn.Module
    tokenizer: Any
    name: str
    fingerprint: str


def hub_folder(source: str | Path) -> str:
    """A folder of the hub's cache layout (``refs/main``, ``snapshots/<commit>``) as its snapshot; else unchanged."""
    folder = Path(source).expanduser()
    if not (folder / "snapshots").is_dir() or (folder / "config.json").exists():
        return str(source)
    found = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file():
        found = [path for path in found if path.name == main.read_text().strip()]
    if len(found) != 1:
        raise ModelError(f"{folder} holds {len(found)} snapshots that could be meant; pass the folder of one of them")
    return str(found[0])


def load_scorer(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False,
                dtype: str = "auto", device: str = "cpu") -> Scorer:
    """A sequence-classification model and its tokenizer from a folder or a hub id, ready to score.

    ``dtype``: float32, bfloat16, float16, or "auto" (as stored).  Raises OfflineError in seconds when a hub id cannot
    be reached, ConfigError when the model brings its own code and ``trust_remote_code`` is off, and ModelError when
    weights are missing (they would be random) or the model has more than one output.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification
    source = hub_folder(source)
    plain = _from_hub(_RawConfig, source, revision=revision)
    own_code(plain, source, trust_remote_code)
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _from_hub(AutoConfig, source, **common)
    if config.num_labels != 1 and not plain.get("auto_map"):
        raise ModelError(f"{source!r} has {config.num_labels} outputs per text; a reward model has one (num_labels 1)")
    with _quiet_loading():
        model, info = _from_hub(AutoModelForSequenceClassification, source, config=config, output_loading_info=True,
                                dtype=dtype if dtype == "auto" else getattr(torch, dtype), **common)
    if missing := sorted(map(str, info.get("missing_keys", ()))):
        raise ModelError(f"{source!r} lacks {', '.join(missing[:4])}: it is no reward model, and its head would be "
                         "random numbers; pass a trained sequence classifier")
    return prepared(model.to(device), tokenizer, source)


def prepared(model, tokenizer, source: str | Path) -> Scorer:
    """A `Scorer` of a loaded model: in evaluation mode, with a pad token that the model and tokenizer agree on."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    for config in (model.config, getattr(model.config, "backbone_config", None), model.config.get_text_config()):
        if config is not None and tokenizer.pad_token_id is not None:
            config.pad_token_id = tokenizer.pad_token_id
    return Scorer(model.eval(), tokenizer, str(source), _fingerprint(source))


class _RawConfig:
    """config.json as written, read before any code of the model can run."""

    @staticmethod
    def from_pretrained(source: str, **kwargs) -> dict:
        from transformers import PretrainedConfig
        return PretrainedConfig.get_config_dict(source, **kwargs)[0]


def _fingerprint(source: str | Path) -> str:
    """Of a folder: hash of its JSON files and of the names and sizes of its weights.  Of a hub id: the id."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return str(source)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return hash_json({path.name: hash_file(path) if path.suffix in (".json", ".jinja") else path.stat().st_size
                      for path in files})[:16]


# -- text ------------------------------------------------------------------------------------------------------------

def encode(tokenizer, conversations: Sequence[Sequence[dict]], max_length: int, side: str | None) -> tuple[
        list[list[int]], list[bool], int]:
    """Token ids as the official pipelines make them; which texts start with a doubled BOS (its first is masked); and
    how many texts were cut to ``max_length`` on ``side`` ("left", "right", None: the tokenizer's own)."""
    texts = [render(tokenizer, talk) for talk in conversations]
    ids = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    long = [i for i, one in enumerate(ids) if len(one) > max_length]
    before, tokenizer.truncation_side = tokenizer.truncation_side, side or tokenizer.truncation_side
    try:
        for i in long:
            ids[i] = tokenizer(texts[i], truncation=True, max_length=max_length)["input_ids"]
    finally:
        tokenizer.truncation_side = before
    bos = tokenizer.bos_token_id
    return ids, [bos is not None and one[:2] == [bos, bos] for one in ids], len(long)


def answers(row: dict) -> list[str]:
    """The completions of a benchmark row in scoring order: chosen, then rejected."""
    return [*row["chosen"], *row["rejected"]]


def _rewards(scorer: Scorer, ids: list[list[int]], doubled: list[bool]) -> np.ndarray:
    rows = _rows(scorer.model, ids)
    if len(rows) < len(ids):
        return packed_rewards(scorer.model, [ids[row.start:row.stop] for row in rows], [row.prefix for row in rows],
                              [doubled[row.start] for row in rows])[0]
    device, width = next(scorer.model.parameters()).device, max(map(len, ids))
    pad = scorer.tokenizer.pad_token_id if scorer.tokenizer.pad_token_id is not None else 0
    tokens = torch.full((len(ids), width), pad)
    mask = torch.zeros_like(tokens)
    for i, (one, double) in enumerate(zip(ids, doubled, strict=True)):
        tokens[i, :len(one)] = torch.tensor(one)
        mask[i, int(double):len(one)] = 1
    return reward_of(scorer.model, tokens.to(device), mask.to(device))


def _rows(model, ids: list[list[int]]) -> list[Pack]:
    """Texts that share a row; in half precision none, because there other shapes give visibly other rewards."""
    single = next(model.parameters()).dtype != torch.float32
    return [Pack(i, i + 1, len(one), len(one)) for i, one in enumerate(ids)] if single else packs(model, ids)


def rewards_of_ids(scorer: Scorer, ids: list[list[int]], *, batch_tokens: int | None = None, progress: bool = False
                   ) -> np.ndarray:
    """float64 [n]: rewards of token id sequences by any reward model; ModelError for one that is not finite."""
    found = np.zeros(len(ids))
    batches = list(token_batches([len(one) for one in ids], batch_tokens or _fitting_batch(scorer.model)))
    for batch in tqdm(batches, desc="scoring", unit="batch", disable=not progress):
        found[batch] = _rewards(scorer, [ids[i] for i in batch], [False] * len(batch))
    if not np.isfinite(found).all():
        raise ModelError(f"the reward of text {int((~np.isfinite(found)).argmax()) + 1} is not a finite number; try "
                         "dtype float32 or bfloat16")
    return found


# -- scoring -----------------------------------------------------------------------------------------------------------

def evaluate(scorer: Scorer, rows: dict[str, Rows], output: str | Path, *, batch_tokens: int | None = None,
             max_length: int = MAX_LENGTH, progress: bool = False) -> dict:
    """Score benchmark rows ``{"rewardbench2": rows, "rm_bench": rows}`` and write ``scores.jsonl`` and
    ``results.json`` into ``output``; returns what results.json holds (`summary`).

    ``batch_tokens``: padded tokens a batch (None: on a CPU what its caches hold, 32768 else).  Run again after an
    interruption it scores only what is missing; ConfigError when the folder holds another model, text rule or data.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    length, rules, jobs = fit_length(scorer.model, max_length), {}, []
    for name, part in rows.items():
        talks = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
                 for row in part for answer in answers(row)]
        ids, doubled, cut = encode(scorer.tokenizer, talks, length, SIDES[name])
        keys = [(name, number, slot) for number, row in enumerate(part) for slot in range(len(answers(row)))]
        jobs += zip(keys, ids, doubled, strict=True)
        rules[name] = {
            "chat_template": "the tokenizer's" if scorer.tokenizer.chat_template else "fallback of sarmlib.chat",
            "max_length": length, "truncation_side": SIDES[name] or scorer.tokenizer.truncation_side,
            "truncated": cut, "double_bos_masked": sum(doubled), "texts": len(ids),
            "end_like_padding": sum(one[-1] == scorer.tokenizer.pad_token_id for one in ids)}
    head = {"model": scorer.name, "fingerprint": scorer.fingerprint, "max_length": length,
            "dtype": str(next(scorer.model.parameters()).dtype).removeprefix("torch."),
            "data": {name: hash_json([[row["prompt"], *answers(row)] for row in part])[:16]
                     for name, part in rows.items()}}
    done = resume(output / "scores.jsonl", head)
    todo = [job for job in jobs if job[0] not in done]
    size = batch_tokens if batch_tokens is not None else _fitting_batch(scorer.model)
    if size < 1:
        raise ConfigError(f"batch_tokens must be positive, got {size}")
    units = _rows(scorer.model, [ids for _, ids, _ in todo])
    batches = list(token_batches([unit.length for unit in units], size))
    with open(output / "scores.jsonl", "a", encoding="utf-8") as file:
        for batch in tqdm(batches, desc="scoring", unit="batch", disable=not progress):
            part = [job for i in batch for job in todo[units[i].start:units[i].stop]]
            values = _rewards(scorer, [ids for _, ids, _ in part], [double for _, _, double in part])
            if not np.isfinite(values).all():
                where = part[int((~np.isfinite(values)).argmax())][0]
                raise ModelError(f"the reward of {where[0]} row {where[1]}, answer {where[2]}, is not a finite number; "
                                 "try --dtype float32 or bfloat16")
            for (key, ids, _), value in zip(part, values.tolist(), strict=True):
                done[key] = value
                file.write(json.dumps({"benchmark": key[0], "row": key[1], "slot": key[2], "score": value,
                                       "tokens": len(ids)}) + "\n")
            file.flush()
            os.fsync(file.fileno())
    size = sum(weight.numel() for weight in scorer.model.parameters())
    found = {**head, "parameters": size, "text": rules, "benchmarks": {
        name: summary(name, join(name, part, done), getattr(getattr(part, "report", None), "notes", []))
        for name, part in rows.items()}}
    write_json(output / "results.json", found)
    return found


def _fitting_batch(model) -> int:
    """Padded tokens a batch: on a CPU the activations of one layer should stay in its second-level cache."""
    if next(model.parameters()).device.type != "cpu":
        return 32_768
    return max(256, 2**16 // model.config.get_text_config().hidden_size)


def resume(path: Path, head: dict) -> dict[tuple[str, int, int], float]:
    """Scores that an earlier run with the same ``head`` left in ``path``; a torn last line is cut off the file."""
    if not path.exists() or not path.read_bytes().strip():
        write_atomic(path, json.dumps(head) + "\n")
        return {}
    raw = path.read_bytes()
    whole = raw[:raw.rfind(b"\n") + 1]
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise DataError(f"{path}, line {number} is not JSON; delete the file to score again") from None
    if not lines:  # killed while writing the first line
        path.unlink()
        return resume(path, head)
    if wrong := [name for name in head if lines[0].get(name) != head[name]]:
        raise ConfigError(f"{path} holds scores with another {', '.join(wrong)}; choose another --output folder")
    if len(whole) < len(raw):
        write_atomic(path, whole.decode())
    return {(line["benchmark"], line["row"], line["slot"]): line["score"] for line in lines[1:]}


def join(name: str, rows: Sequence[dict], scores: dict[tuple[str, int, int], float]) -> list[dict]:
    """Benchmark rows with ``scores`` (RewardBench 2) or ``score_chosen`` and ``score_rejected`` (RM-Bench)."""
    out = []
    for number, row in enumerate(rows):
        values, chosen = [scores[name, number, slot] for slot in range(len(answers(row)))], len(row["chosen"])
        out.append({**row, "scores": values} if name == "rewardbench2" else
                   {**row, "score_chosen": values[:chosen], "score_rejected": values[chosen:]})
    return out


def summary(name: str, scored: list[dict], notes: Sequence[str] = ()) -> dict:
    """``score`` (None while a subset is missing), ``missing``, ``parts``, ``interval`` (95 %, bootstrap over prompts,
    for a complete benchmark), ``n_rows``, ``equal_scores`` (`equal_scores`) and the loader's ``notes``."""
    if name == "rewardbench2":
        result = rewardbench2.score(scored)
        value, missing, parts = result["overall"], result["missing_subsets"], result["subsets"]
        extra = {"ties_components": {part: None if np.isnan(one) else one
                                     for part, one in (result["ties_components"] or {}).items()}}
    else:
        result = rm_bench.score_present(scored)
        value, missing = result["total_avg_acc"], result["missing"]
        parts = {part: result[part] for part in rm_bench.DOMAINS if result[part] is not None}
        extra = {level: result[level] for level in rm_bench.LEVELS} | {"unknown_domains": result["unknown"]}
    parts = {part: None if np.isnan(one) else one for part, one in parts.items()}  # Ties without a complete pair
    interval, value = None, None if None in parts.values() else value
    if value is not None:
        units = (rewardbench2 if name == "rewardbench2" else rm_bench).units(scored)
        strata = [part for part, _, _ in units]
        if min(map(strata.count, set(strata))) > 1:
            found = bootstrap_ci([v for _, _, v in units], strata=strata, n=2000)
            interval = [found.low, found.high]
    return {"score": value, "interval": interval, "missing": missing, "parts": parts, **extra,
            "n_rows": result["n_rows"], "equal_scores": equal_scores(name, scored), "notes": list(notes)}


def equal_scores(name: str, scored: Sequence[dict]) -> dict[str, int]:
    """``{"decisions", "equal"}``: comparisons that decide a score, and those whose two sides are exactly equal.

    RewardBench 2: chosen against the best rejected (in Ties: worst correct against best incorrect), one a row.
    RM-Bench: the nine pairs of a row.  Half precision makes equal scores common.
    """
    if name == "rewardbench2":
        pairs = []
        for row in scored:
            n = row["num_correct"] if rewardbench2.is_ties(row) else 1
            pairs.append((min(row["scores"][:n]), max(row["scores"][n:], default=float("nan"))))
    else:
        pairs = [(c, r) for row in scored for c in row["score_chosen"] for r in row["score_rejected"]]
    return {"decisions": len(pairs), "equal": sum(a == b for a, b in pairs)}


def lines(found: dict) -> list[str]:
    """What `evaluate` found, as sentences for a terminal; a benchmark with missing parts shows no overall score."""
    out = [f"model {found['model']} ({found['parameters']:,} parameters, {found['dtype']})"]
    for name, result in found["benchmarks"].items():
        text, equal = found["text"][name], result["equal_scores"]
        parts = ", ".join(f"{part} {'–' if value is None else f'{100 * value:.1f}'} ({result['n_rows'][part]} rows)"
                          for part, value in result["parts"].items())
        low, high = result["interval"] or (None, None)
        interval = "" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
        whole = (f"{100 * result['score']:.1f}{interval}" if result["score"] is not None
                 else f"no overall score, missing: {', '.join(result['missing']) or 'complete pairs of Ties'}")
        out += [f"{name}: {whole}", f"  {parts}",
                f"  text: {text['chat_template']} chat template; at most {text['max_length']} tokens, cut on the "
                f"{text['truncation_side']} ({text['truncated']} of {text['texts']} texts); first of two BOS masked in "
                f"{text['double_bos_masked']}",
                f"  {equal['equal']} of {equal['decisions']} decisions hang on exactly equal scores"]
        if text["end_like_padding"]:
            out.append(f"  {text['end_like_padding']} texts end with the token that also pads: models that find the "
                       "end by that token read the one before it")
        out += [f"  note: {note}" for note in result["notes"]]
    return out
