"""``python -m sarmlib score``: rewards of conversations, from a file or from the command line."""

from __future__ import annotations

import json
from pathlib import Path

HELP = "reward every conversation of a file (JSONL, JSON, Parquet), or one prompt with its responses"
CHUNK = 2000
"""Rows scored between two appends to the unfinished output."""


def add_model(parser) -> None:
    """Options that `score` and `explain` share."""
    parser.add_argument("--model", required=True, help="folder or hub id of a SARM, a scalar or any other reward model")
    parser.add_argument("--revision", help="commit of a model on the hub")
    parser.add_argument("--input", help="file of rows: messages; prompt and response(s); or prompt, chosen, rejected")
    parser.add_argument("--prompt", help="instead of --input: one user turn")
    parser.add_argument("--response", action="append", default=[], help="an answer to --prompt; may be repeated")
    parser.add_argument("--output", help="JSONL to write, one line per row of --input (default: print)")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens per conversation; longer ones are cut in "
                                                                     "front, their end is always kept")
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be read, and count them")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def add_arguments(parser) -> None:
    add_model(parser)
    parser.add_argument("--batch-tokens", type=int, help="padded tokens a batch (default: fitting the machine)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code that the model brings")


def read_items(arguments):
    """The rows that the arguments name; ConfigError unless it is either a file or a prompt with responses."""
    from ..data.conversations import load_items
    from ..errors import ConfigError
    single = arguments.prompt is not None or bool(arguments.response)
    if bool(arguments.input) == single or (single and not (arguments.prompt and arguments.response)):
        raise ConfigError("give --input FILE, or --prompt TEXT with one or more --response TEXT")
    if arguments.max_length < 2:
        raise ConfigError(f"--max-length {arguments.max_length}: at least 2 tokens are needed")
    if single:
        return load_items([{"prompt": arguments.prompt, "responses": arguments.response}])
    return load_items(arguments.input, on_bad="skip" if arguments.skip_bad else "refuse")


def load(arguments):
    """The model and its tokenizer as a `Scorer`."""
    import torch

    from ..sarm.released import load_any
    device = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return load_any(arguments.model, revision=arguments.revision, dtype=arguments.dtype, device=device,
                    trust_remote_code=getattr(arguments, "trust_remote_code", False))


def run(arguments) -> None:
    from ..artifacts import hash_file, hash_json
    from ..errors import ConfigError
    items = read_items(arguments)
    if arguments.batch_tokens is not None and arguments.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens {arguments.batch_tokens}: a positive number is needed")
    scorer = load(arguments)
    if not arguments.output:
        for line in lines(scorer, items, arguments):
            print(json.dumps(line, ensure_ascii=True))
        return
    # What is done is kept beside the output, under a name that only the same work has.
    head = {"model": scorer.fingerprint, "max_length": arguments.max_length,
            "input": hash_file(Path(arguments.input)) if arguments.input else hash_json([items[0].conversations])}
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.{hash_json(head)[:12]}.partial")
    done = partial.read_bytes() if partial.exists() else b""
    whole = done[:done.rfind(b"\n") + 1]
    with open(partial, "wb") as file:
        file.write(whole)
        for start in range(whole.count(b"\n"), len(items), CHUNK):
            for line in lines(scorer, items[start:start + CHUNK], arguments):
                file.write(json.dumps(line).encode() + b"\n")
            file.flush()
    partial.replace(output)
    report = items.report
    print(f"{len(items)} rows scored into {output}" + (f"; left out: {report.dropped}" if report.dropped else ""))


def lines(scorer, items, arguments):
    """One dict per item: row, id, rewards {name: r}, margin (pairs), tokens {name: n} and truncated {name: bool}."""
    from ..chat import encode_conversations, fit_length, truncate_left
    from ..evaluation.evaluate import rewards_of_ids
    names = [(number, name) for number, item in enumerate(items) for name in item.conversations]
    full = encode_conversations(scorer.tokenizer, [items[i].conversations[name] for i, name in names])
    ids = truncate_left(scorer.tokenizer, full, fit_length(scorer.model, arguments.max_length))
    rewards = rewards_of_ids(scorer, ids, batch_tokens=arguments.batch_tokens, progress=len(ids) > 200)
    found: list[dict] = [{"row": item.row, "id": item.id, "rewards": {}, "tokens": {}, "truncated": {}}
                         for item in items]
    for (number, name), before, after, reward in zip(names, full, ids, rewards, strict=True):
        found[number]["rewards"][name] = float(reward)
        found[number]["tokens"][name] = len(after)
        found[number]["truncated"][name] = len(after) < len(before)
    for line, item in zip(found, items, strict=True):
        if item.is_pair:
            line["margin"] = line["rewards"]["chosen"] - line["rewards"]["rejected"]
    return found
