"""``python -m sarmlib judge``: a chat model as a judge of RewardBench 2, over any OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from pathlib import Path

HELP = "let a chat model judge RewardBench 2 (best of 4, ratings for Ties), with a budget and a resumable cache"


def add_endpoint(parser) -> None:
    """Options that name an endpoint and what it may cost."""
    parser.add_argument("--endpoint", required=True, help="address without /chat/completions, for example "
                                                          "http://127.0.0.1:11434/v1")
    parser.add_argument("--model", required=True, help="the model's name at that endpoint")
    parser.add_argument("--key-env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    parser.add_argument("--budget", type=float, help="most that may be spent: currency with --price, else tokens")
    parser.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="currency per million tokens")
    parser.add_argument("--concurrency", type=int, default=8, help="requests under way at once")
    parser.add_argument("--max-tokens", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--output", required=True, help="folder of the results and the cache of answers")
    parser.add_argument("--dry-run", action="store_true", help="print what would be asked and its price; ask nothing")


def make_endpoint(arguments):
    """The `ChatEndpoint` of the arguments, its cache in the output folder."""
    from ..endpoint import ChatEndpoint
    return ChatEndpoint(arguments.endpoint, arguments.model, key_env=arguments.key_env, budget=arguments.budget,
                        price=tuple(arguments.price) if arguments.price else None, max_tokens=arguments.max_tokens,
                        concurrency=arguments.concurrency, cache=Path(arguments.output) / "answers.jsonl")


def print_estimate(found: dict) -> None:
    money = "" if found["cost"] is None else f", at most {found['cost']:.2f} of the price's currency"
    print(f"{found['requests']} questions to ask ({found['cached']} answered before): about {found['tokens_in']:,} "
          f"tokens to send, at most {found['tokens_out']:,} to receive{money}", flush=True)


def add_arguments(parser) -> None:
    add_endpoint(parser)
    parser.add_argument("--data", default="hub", help="folder with RewardBench 2; hub (pinned commit); or toy")
    parser.add_argument("--limit", type=int, help="at most this many rows per subset")
    parser.add_argument("--seed", type=int, default=0, help="order of the answers that the judge sees")


def run(arguments) -> None:
    from ..artifacts import write_atomic
    from ..errors import ConfigError
    from ..evaluation import generative
    from .evaluate import benchmark_rows
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit}: give a positive number of rows")
    endpoint = make_endpoint(arguments)
    rows = benchmark_rows(["rewardbench2"], arguments.data, arguments.limit)["rewardbench2"]
    print_estimate(endpoint.estimate([one.messages for one in generative.requests(rows, arguments.seed)]))
    if arguments.dry_run:
        return
    found = generative.judge(endpoint, rows, arguments.seed)
    kept = {name: value for name, value in found.items() if name not in ("credit", "ratings")}
    kept |= {"model": arguments.model, "seed": arguments.seed, "data": arguments.data, "spent": endpoint.spent}
    write_atomic(Path(arguments.output) / "results.json", json.dumps(kept, indent=2) + "\n")
    for name, value in found["subsets"].items():
        print(f"{name:<14} {'-' if value is None else f'{100 * value:.1f}':>6}   {found['n_rows'][name]} rows")
    overall, failures = found["overall"], found["failures"]
    missing = ", ".join(found["missing_subsets"])
    print(f"overall {f'not given ({missing} missing)' if overall is None else f'{100 * overall:.1f}'}")
    print(f"no verdict in {failures['verdicts']} of {found['asked']['verdicts']} choices, no rating in "
          f"{failures['ratings']} of {found['asked']['ratings']}; spent {endpoint.spent:.6g}")
