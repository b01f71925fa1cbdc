"""The one loop that runs a reward model over conversations, and the two benchmarks.

Texts that begin alike (the answers to one prompt) go through the decoder in one row, what they share only once:

    row:      p1 p2 .. pP | a1 .. aA | b1 .. bB          positions 0 .. P-1 | P .. P+A-1 | P .. P+B-1
    sees:     a token sees the prefix before it and its own answer before it, never another answer

A causal decoder's states do not depend on what follows: each text gets its reward alone, up to rounding.  In
bfloat16 the rms error against float32, shared over plain, was 0.91 to 1.05 in 8 runs of 300 to 400 texts.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from filelock import FileLock, Timeout
from scipy.sparse import csr_array, vstack
from torch import Tensor, nn
from tqdm import tqdm

from sarmlib.backbone import load_tokenizer
from sarmlib.chat import check_vocabulary, collate, encode_conversations, fit_length, pad_id, render, warn_of_open_turns
from sarmlib.errors import ArtifactError, ConfigError, DataError, ModelError
from sarmlib.evaluation import rewardbench2, rm_bench
from sarmlib.evaluation.statistics import bootstrap_ci
from sarmlib.extractor import position_rule, token_batches
from sarmlib.hub import from_hub, hub_folder, weights_from_hub
from sarmlib.sae.topk import hash_tensors
from sarmlib.store import hash_json, write_atomic, write_json, writing

MAX_LENGTH = 2048  # tokens of a text in both benchmarks' official scripts
LONGEST_ROW = 4096  # tokens of a row with more than one text: its mask has the square of that
ON_CPU, ON_GPU = 1024, 32_768  # padded tokens a batch; 1024: near the fastest on one CPU (benchmarks/RESULTS.md)


class Scores(NamedTuple):
    """What `score` found, one entry per conversation in input order."""

    rewards: np.ndarray  # float64 [n]
    features: csr_array | None  # float32 [n, M]: the sparse codes z at the reward position
    states: np.ndarray | None  # float32 [n, d]: x_last before eq. 7
    lengths: np.ndarray  # int64 [n]: tokens that were fed to the model


def score(model, tokenizer, conversations: Sequence[Sequence[dict]], *, max_length: int = MAX_LENGTH,
          **options) -> Scores:
    """Score conversations (lists of messages that end with the assistant) with a reward model.

    A text longer than ``max_length`` or the model's context loses tokens after its BOS; its end is kept.
    ``options`` are those of `score_ids`.  Raises `DataError` for a malformed conversation.
    """
    ids = encode_conversations(tokenizer, conversations, fit_length(model, max_length))
    found = score_ids(model, ids, pad_id=pad_id(tokenizer), **options)
    warn_of_open_turns(tokenizer, ids)
    return Scores(*found, np.array([len(one) for one in ids], np.int64))


def score_rows(model, tokenizer, rows: Sequence[dict], **options) -> tuple[list[list[float]], Scores]:
    """Scores of the answers to benchmark rows {prompt, chosen, rejected}, a list a row, chosen first, and the
    `Scores` of all.  ``options`` are those of `score`."""
    scores = score(model, tokenizer, _talks(rows), **options)
    values = iter(scores.rewards.tolist())
    return [[next(values) for _ in answers(row)] for row in rows], scores


def score_ids(model, ids: Sequence[list[int]], *, pad_id: int = 0, batch_tokens: int | None = None,
              features: bool = False, states: bool = False, progress: bool = False
              ) -> tuple[np.ndarray, csr_array | None, np.ndarray | None]:
    """(rewards float64 [n], features csr [n, M] or None, states float32 [n, d] or None) of token ids.

    ``batch_tokens``: padded tokens a batch; None: 1024 on a CPU, 32,768 elsewhere.  Raises `ModelError` for a reward
    that is not finite.
    """
    if (features and not hasattr(model, "encode")) or (states and not hasattr(model, "reward_state")):
        raise ModelError(f"{type(model).__name__} has no sparse features or states; ask for rewards alone")
    rewards, order = np.zeros(len(ids)), []
    codes = [csr_array((0, model.config.n_features), dtype=np.float32)] if features else []
    hidden = np.zeros((len(ids), model.config.hidden_size), np.float32) if states else None
    for members, values, code, state in _run(model, ids, [0] * len(ids), pad_id, batch_tokens, progress):
        rewards[members] = values
        order += members
        if features:
            codes.append(code.to_csr())
        if states:
            hidden[members] = state.float().cpu().numpy()
    found = csr_array(vstack(codes, format="csr")[np.argsort(order)]) if features else None
    return rewards, found, hidden


@torch.inference_mode()
def codes_at(model, tokenizer, conversations: Sequence[Sequence[dict]], positions="sentence_end"
             ) -> tuple[csr_array, np.ndarray, np.ndarray]:
    """Features at every position that a `position_rule` selects (the paper's view of sentences).

    Returns codes csr [N, M], and for each its conversation and its token there, int [N], in reading order.
    """
    rule = position_rule(tokenizer, positions)
    ids = encode_conversations(tokenizer, conversations, fit_length(model, MAX_LENGTH))
    codes, places = [csr_array((0, model.config.n_features), dtype=np.float32)], [np.zeros((0, 2), np.int64)]
    for members in token_batches([len(one) for one in ids], _batch_tokens(model, None)):
        batch = collate([ids[i] for i in members], pad_id(tokenizer))
        batch = {name: one.to(model.device) for name, one in batch.items()}
        chosen = rule(batch["input_ids"], batch["attention_mask"])
        states = model.model(**batch, use_cache=False).last_hidden_state[chosen]
        codes.append(model.encode(states).to_csr())
        row, token = (one.cpu().numpy() for one in chosen.nonzero(as_tuple=True))
        places.append(np.column_stack([np.array(members)[row], token]))
    owner, place = np.concatenate(places).T
    order = np.lexsort((place, owner))
    return csr_array(vstack(codes, format="csr")[order]), owner[order], place[order]


def answers(row: dict) -> list[str]:
    """The completions of a benchmark row in scoring order: chosen, then rejected."""
    return [*row["chosen"], *row["rejected"]]


def _talks(rows: Sequence[dict]) -> list[list[dict]]:
    return [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
            for row in rows for answer in answers(row)]


class Row(NamedTuple):
    """Texts ``members`` in one row of ``length`` tokens, their first ``prefix`` tokens once."""

    members: list[int]
    prefix: int
    length: int


def pack(model, ids: Sequence[list[int]]) -> list[Row]:
    """Texts in rows: those that begin alike together, as long as a text saves a tenth of what it costs alone.

    A row of T tokens costs T (6 d + T): 24 d^2 FLOP a token and layer in a Llama's matrix products, 4 d T in
    attention.  A text beyond a sliding window gets a row of its own: the mask here is the full one.
    """
    config, rows = _decoder_config(model), []
    window = getattr(config, "sliding_window", None) or LONGEST_ROW
    able = len(ids) > 1 and can_share(model)

    def cost(length: int) -> int:
        return length * (6 * config.hidden_size + length)

    for i in sorted(range(len(ids)), key=ids.__getitem__):  # so that what begins alike is neighbours
        n, first = len(ids[i]), ids[rows[-1].members[0]] if rows else []
        if able and rows and max(n, len(first)) <= window:
            members, before, row = rows[-1]
            common = len(os.path.commonprefix([first, ids[i]]))
            prefix = min(before, common, len(first) - 1, n - 1)  # each keeps a token of its own
            length = row + (len(members) - 1) * (before - prefix) + n - prefix
            if prefix > 1 and length <= LONGEST_ROW and cost(length) - cost(row) < 0.9 * cost(n):
                rows[-1] = Row([*members, i], prefix, length)
                continue
        rows.append(Row([i], n, n))
    return rows


def _batch_tokens(model, given: int | None) -> int:
    return given or (ON_CPU if model.device.type == "cpu" else ON_GPU)


def _run(model, ids, masked, pad: int, batch_tokens: int | None, progress: bool, done=frozenset()) -> Iterator[tuple]:
    """(numbers of the texts, rewards, SparseCode or None, states or None) of one batch after the other.

    Batches are those of all texts, so that a reward is the same to the last bit when some are ``done`` before; only
    batches that are done whole are left out.
    """
    was_training = model.training
    model.eval()
    try:
        # up to the token that is rewarded: transformers' classifiers pass over pad tokens at the end
        fill = None if hasattr(model, "reward_state") else model.config.get_text_config().pad_token_id
        ends = [next((n for n in range(len(text), 1, -1) if text[n - 1] != fill), 1) for text in ids]
        texts = [text[:end] for text, end in zip(ids, ends, strict=True)]
        rows = pack(model, texts)
        batches = [[rows[i] for i in batch] for batch in
                   token_batches([row.length for row in rows], _batch_tokens(model, batch_tokens))]
        batches = [part for part in batches if not done.issuperset(i for row in part for i in row.members)]
        for part in tqdm(batches, desc="scoring", unit="batch", disable=not progress):
            members = [i for row in part for i in row.members]
            if len(members) > len(part):
                found = _shared(model, texts, masked, part)
            else:
                found = _plain(model, [ids[i] for i in members], [masked[i] for i in members], pad)
            if len(broken := np.flatnonzero(~np.isfinite(found[0]))):
                raise ModelError(f"the reward of text {members[broken[0]]} is not finite; the weights or the "
                                 "precision are broken, try dtype float32 or bfloat16")
            yield members, *found
    finally:
        model.train(was_training)


@torch.inference_mode()
def _plain(model, ids: list[list[int]], masked: list[int], pad: int) -> tuple[np.ndarray, Any, Any]:
    """One row a text, padded on the right; ModelError when the output does not hold one number per text."""
    batch = collate(ids, pad)
    for i, n in enumerate(masked):
        batch["attention_mask"][i, :n] = 0
    output = model(**{name: one.to(model.device) for name, one in batch.items()})
    value = getattr(output, "score", getattr(output, "logits", None))  # ArmoRM, QRM, LDL: of many heads
    shape = tuple(getattr(value, "shape", ()))
    if shape not in ((len(ids),), (len(ids), 1)):
        raise ModelError(f"{type(model).__name__} gives {shape} numbers for {len(ids)} texts, not one each")
    rewards = value.reshape(-1).double().cpu().numpy()
    return rewards, getattr(output, "code", None), getattr(output, "hidden", None)


@torch.inference_mode()
def _shared(model, ids, masked, rows: Sequence[Row]) -> tuple[np.ndarray, Any, Tensor]:
    """Rows of several texts through the decoder, then the head on the states at their last tokens."""
    own, tokens, positions, owners, last = hasattr(model, "reward_state"), [], [], [], []
    for number, row in enumerate(rows):
        skip, line, places, texts = masked[row.members[0]], [], [], []
        parts = [(skip, ids[row.members[0]][:row.prefix]), *((row.prefix, ids[i]) for i in row.members)]
        for owner, (start, text) in enumerate(parts):
            line += text[start:]
            places += range(start, len(text))
            texts += [owner] * (len(text) - start)
            if owner:
                last.append((number, len(line) - 1))
        tokens.append(line)
        positions.append([place - skip * own for place in places])  # only our models leave masked tokens out
        owners.append(texts)
    tokens, positions, owners = (collate(lists, fill)["input_ids"].to(model.device)
                                 for lists, fill in ((tokens, 0), (positions, 0), (owners, -1)))
    # each token sees its own text (owner) and the prefix (owner 0) before it; additive, as eager attention needs it
    sees, dtype = (owners[:, None, :, None] == owners[:, None, None]) | (owners[:, None, None] == 0), _precision(model)
    mask = torch.zeros(sees.shape, dtype=dtype, device=model.device).masked_fill_(~sees.tril(), torch.finfo(dtype).min)
    output = model.base_model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    numbers, columns = torch.tensor(last, device=model.device).T
    states = output.last_hidden_state[numbers, columns]
    rewards, code = model.reward(states) if own else (model.score(states), None)
    return rewards.reshape(-1).double().cpu().numpy(), code, states


_SHARES: WeakKeyDictionary = WeakKeyDictionary()


def can_share(model) -> bool:
    """Whether rows of several texts give this model's plain rewards: tried once, on two short rows."""
    if model not in _SHARES:
        try:
            _SHARES[model] = _probe(model)
        except Exception:  # each model refuses such inputs in its own way; then its texts are scored plainly
            _SHARES[model] = False
    return _SHARES[model]


@torch.inference_mode()
def _probe(model) -> bool:
    config, pad = _decoder_config(model), model.config.get_text_config().pad_token_id
    sharded = torch.distributed.is_available() and torch.distributed.is_initialized()  # whole calls only
    if sharded or config._attn_implementation not in ("sdpa", "eager"):  # flash kernels crash on such masks
        return False
    words = [i for i in range(min(config.vocab_size, 32)) if i != pad]
    ends = ((0, words[12:13]), (0, words[14:16]), (0, words[17:21]), (6, words[22:23]), (6, words[24:28]))
    texts = [words[start:start + 6] + end for start, end in ends]
    rows = [Row([0, 1, 2], 6, 13), Row([3, 4], 6, 11)]  # two: some models look at a single row more closely
    rewards, _, states = _shared(model, texts, [0] * 5, rows)
    plain = np.concatenate([_plain(model, [text], [0], 0)[0] for text in texts])
    inputs = [torch.tensor([text], device=model.device) for text in texts]
    alone = torch.stack([model.base_model(one, use_cache=False).last_hidden_state[0, -1] for one in inputs])
    gap = float((states - alone).abs().max() / (1 + alone.abs().max()))
    off = np.median(np.abs(rewards - plain) / (1 + np.abs(plain)))  # one TopK may swap two features
    return max(gap, off) <= max(1e-4, 8 * torch.finfo(_precision(model)).eps)


def _precision(model) -> torch.dtype:  # of the decoder
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.base_model.dtype


def _decoder_config(model):
    return getattr(model.config, "backbone_config", None) or model.config.get_text_config()


@dataclass(frozen=True)
class Scorer:
    """A loaded reward model and its tokenizer, with a name for the report."""

    model: nn.Module
    tokenizer: Any
    name: str

    @property
    def fingerprint(self) -> str:
        """Hash of all weights, and of the commit of a model on the hub."""
        weights = hash_tensors(self.model.state_dict(), "")
        return hash_json([weights, getattr(self.model.config, "_commit_hash", None)])[:16]


def load_scorer(source: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False,
                device: str = "cpu") -> Scorer:
    """Any reward model from a folder or a hub id, in the precision of its file: SARM, scalar, the authors'
    layout (their code is not run), any sequence classifier with one output.

    Raises OfflineError in seconds without the hub, ConfigError when the model brings its own code and
    ``trust_remote_code`` is off, and ModelError for missing weights.
    """
    from transformers import AutoModelForSequenceClassification, PretrainedConfig

    from sarmlib.sarm import model as own  # registers SARM and the scalar model

    # before any code of the model can run
    reader = SimpleNamespace(from_pretrained=PretrainedConfig.get_config_dict)
    written, _ = from_hub(reader, source, revision=revision)
    names = written.get("architectures") or [] if isinstance(written, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"config.json of {str(source)!r} is no model's: architectures must be a list of names")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    foreign = written.get("auto_map") and not any(hasattr(own, name) for name in names)
    if "LlamaSARM" in names:
        from sarmlib.sarm.released import load_released

        options["trust_remote_code"] = False
        model = load_released(hub_folder(source))
    elif foreign and not trust_remote_code:
        raise ConfigError(f"model {str(source)!r} ({', '.join(names)}) runs code of its own; read that code, "
                          "then allow it with --trust-remote-code")
    else:
        model, _ = weights_from_hub(AutoModelForSequenceClassification, source, dtype="auto", **options)
    return prepared(model.to(device), load_tokenizer(source, **options), hub_folder(source))


def prepared(model, tokenizer, name: str | os.PathLike) -> Scorer:
    """A `Scorer` of a loaded model: in evaluation mode, with one pad token for model and tokenizer."""
    check_vocabulary(model.config, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    for config in (model.config, _decoder_config(model), model.config.get_text_config()):
        if tokenizer.pad_token_id is not None:
            config.pad_token_id = tokenizer.pad_token_id
    return Scorer(model.eval(), tokenizer, str(name))


def encode_official(tokenizer, rows: Sequence[dict], limit: int, benchmark: str
                    ) -> tuple[list[list[int]], list[int], dict]:
    """(token ids of all answers to benchmark rows, how many leading ones of each are masked, a report of both).

    The rules of allenai/reward-bench ``scripts/run_v2.py`` and THU-KEG/RM-Bench ``scripts/run_rm.py``: the
    rendered template is tokenized with special tokens; of two BOS the first is masked; cut to ``limit`` tokens
    on the left (RM-Bench), or on the side that the tokenizer's files say (RewardBench 2).
    """
    texts = [render(tokenizer, talk) for talk in _talks(rows)]
    ids = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    long = [i for i, one in enumerate(ids) if len(one) > limit]
    before = tokenizer.truncation_side
    tokenizer.truncation_side = side = "left" if benchmark == "rm_bench" else before
    for i in long:
        ids[i] = tokenizer(texts[i], truncation=True, max_length=limit)["input_ids"]
    tokenizer.truncation_side = before
    bos = tokenizer.bos_token_id
    masked = [int(bos is not None and one[:2] == [bos, bos]) for one in ids]
    return ids, masked, {"truncation_side": side, "truncated": len(long), "texts": len(ids),
                         "double_bos_masked": sum(masked), "data": hash_json(ids)[:16]}


def evaluate(scorer: Scorer, rows: dict[str, Sequence[dict]], output: str | os.PathLike, *,
             max_length: int = MAX_LENGTH, progress: bool = False) -> dict:
    """Score benchmark rows ``{"rewardbench2": rows, "rm_bench": rows}`` into ``output``: ``scores.jsonl``
    and ``results.json``, whose contents are returned (`lines` words them).

    Run again after an interruption, it scores only what is missing.  Raises ConfigError when the folder holds
    scores of another model, text rule or data, ArtifactError while another process works there, and
    DataError, before anything is scored, for rows that the benchmark cannot use.
    """
    output = Path(output)
    for name, part in rows.items():
        summary(name, part, [[0.0] * len(answers(row)) for row in part])  # so that bad rows show now
    output.mkdir(parents=True, exist_ok=True)
    try:
        with writing(output), FileLock(output / ".lock", timeout=0):
            found = _evaluate(scorer, rows, output / "scores.jsonl", max_length, progress)
            write_json(output / "results.json", found)
            return found
    except Timeout:
        raise ArtifactError(f"another process scores into {str(output)!r}; name another folder") from None


def _evaluate(scorer: Scorer, rows: dict, path: Path, max_length: int, progress: bool) -> dict:
    model, tokenizer, limit = scorer.model, scorer.tokenizer, fit_length(scorer.model, max_length)
    head: dict[str, Any] = {"model": scorer.name, "fingerprint": scorer.fingerprint, "max_length": limit,
                            "dtype": str(model.dtype).removeprefix("torch."), "text": {}}
    keys, ids, masked = [], [], []
    for name, part in rows.items():
        encoded, skip, head["text"][name] = encode_official(tokenizer, part, limit, name)
        keys += [(name, number, slot) for number, row in enumerate(part) for slot in range(len(answers(row)))]
        ids, masked = ids + encoded, masked + skip
    done = _resume(path, head)
    before = {i for i, key in enumerate(keys) if key in done}
    with open(path, "a", encoding="utf-8") as file:
        for members, values, *_ in _run(model, ids, masked, pad_id(tokenizer), None, progress, before):
            for number, value in zip(members, values.tolist(), strict=True):
                if number not in before:
                    name, row, slot = key = keys[number]
                    done[key] = value
                    file.write(json.dumps({"benchmark": name, "row": row, "slot": slot, "score": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())
    found = {**head, "parameters": model.num_parameters(), "benchmarks": {}}
    scores = iter([done[key] for key in keys])
    for name, part in rows.items():
        groups = [[next(scores) for _ in answers(row)] for row in part]
        found["benchmarks"][name] = summary(name, part, groups)
    return found


def _resume(path: Path, head: dict) -> dict[tuple[str, int, int], float]:
    """Scores that a run with the same ``head`` left in ``path``; a torn last line is cut off the file."""
    raw = path.read_bytes() if path.exists() else b""
    whole = raw[:raw.rfind(b"\n") + 1] or json.dumps(head).encode() + b"\n"
    try:
        first, *found = map(json.loads, whole.splitlines())
    except ValueError:
        raise DataError(f"a line of {path} is not JSON; delete the file to score again") from None
    if wrong := [name for name in head if first.get(name) != head[name]]:
        raise ConfigError(f"{path} holds scores with another {', '.join(wrong)}; name another folder")
    write_atomic(path, whole)
    return {(line["benchmark"], line["row"], line["slot"]): line["score"] for line in found}


def summary(name: str, rows: Sequence[dict], scores: Sequence[list[float]]) -> dict:
    """A benchmark's result for the scores of every answer (chosen first), one list a row.

    ``score`` (None while a part is missing), ``missing``, ``parts``, ``interval`` (95 %, over prompts),
    ``n_rows``, and ``equal_scores`` (of how many "decisions": those whose two sides are exactly equal).
    """
    both = zip(rows, scores, strict=True)
    if name == "rewardbench2":
        scored = [{**row, "scores": one} for row, one in both]
        result, units = rewardbench2.score(scored), rewardbench2.units(scored)
        value, missing, parts = result["overall"], result["missing_subsets"], result["subsets"]
        extra, pairs = {}, [rewardbench2.decision(row) for row in scored]
    else:
        scored = [{**row, "score_chosen": one[:3], "score_rejected": one[3:]} for row, one in both]
        result, units = rm_bench.score_present(scored), rm_bench.units(scored)
        value, missing = result["total_avg_acc"], result["missing"]
        parts = {part: result[part] for part in rm_bench.DOMAINS if part not in missing}
        extra = {level: result[level] for level in rm_bench.LEVELS}
        pairs = [(c, r) for row in scored for c in row["score_chosen"] for r in row["score_rejected"]]
    parts = {part: None if np.isnan(one) else one for part, one in parts.items()}  # Ties without a whole pair
    value, interval, strata = None if None in parts.values() else value, None, [part for part, _, _ in units]
    if value is not None and min(map(strata.count, set(strata))) > 1:
        ends = bootstrap_ci([one for _, _, one in units], strata=strata, n=2000)[1:3]
        interval = list(ends) if np.isfinite(ends).all() else None  # of equal values
    return {"score": value, "interval": interval, "missing": missing, "parts": parts, **extra,
            "n_rows": result["n_rows"], "decisions": len(pairs),
            "equal_scores": sum(a == b for a, b in pairs)}


def lines(found: dict) -> list[str]:
    """What `evaluate` found, as sentences for a terminal."""
    out = [f"model {found['model']} ({found['parameters']:,} parameters, {found['dtype']})"]
    for name, result in found["benchmarks"].items():
        text = found["text"][name]
        out += benchmark_lines(name, result)
        out.append(f"  at most {found['max_length']} tokens, cut on the {text['truncation_side']} "
                   f"({text['truncated']} of {text['texts']} texts); first of two BOS masked in "
                   f"{text['double_bos_masked']}")
    return out


def benchmark_lines(name: str, result: dict) -> list[str]:
    """A `summary` as sentences."""
    whole = f"no overall score, missing: {', '.join(result['missing']) or 'complete pairs of Ties'}"
    if result["score"] is not None:
        ends = [f"{100 * end:.1f}" for end in result["interval"] or ()]
        whole = f"{100 * result['score']:.1f}" + (f" [{', '.join(ends)}]" if ends else "")
    parts = [f"{part} {'–' if value is None else f'{100 * value:.1f}'} ({result['n_rows'][part]} rows)"
             for part, value in result["parts"].items()]
    return [f"{name}: {whole}", f"  {', '.join(parts)}",
            f"  {result['equal_scores']} of {result['decisions']} decisions hang on exactly equal scores"]
