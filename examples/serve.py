"""Rewards over HTTP, with the requests and answers of OpenRLHF's reward server; needs nothing but the library.

    python examples/serve.py --model FOLDER [--host 127.0.0.1] [--port 5000]

    POST /get_reward  {"query": [...], "prompts": [...]}  ->  {"rewards": [...], "scores": [...], "extra_logs": {}}
    GET  /health                                          ->  {"model": ..., "max_length": ...}

``query`` holds whole texts as the chat template writes them, or conversations (lists of messages); ``prompts`` is
accepted and not needed.  Every refusal is ``{"error": sentence}``: 400 not JSON, 413 too much, 422 cannot be scored.
Loopback only unless told otherwise: there is no password.  Requests are scored one after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from reward_function import encode_queries  # noqa: E402

from sarmlib.chat import fit_length, pad_id, truncate_left  # noqa: E402
from sarmlib.errors import SarmlibError  # noqa: E402
from sarmlib.evaluation.scorer import load_scorer, score_ids  # noqa: E402

MAX_BYTES, MAX_ITEMS = 4 << 20, 512


class Refusal(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status: int, sentence: str):
        self.status, self.sentence = status, sentence


def score_queries(model, tokenizer, queries: list, *, max_length: int = 2048) -> list[float]:
    """Rewards of texts and conversations."""
    ids = truncate_left(tokenizer, encode_queries(tokenizer, queries), fit_length(model, max_length))
    rewards, _, _ = score_ids(model, ids, pad_id=pad_id(tokenizer))
    return rewards.tolist()


def queries_of(body: bytes) -> list:
    """The queries of a request's body; Refusal when it has none."""
    try:
        queries = json.loads(body)["query"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refusal(400, 'the body must be JSON {"query": [texts or conversations]}') from None
    if not isinstance(queries, list) or not queries:
        raise Refusal(422, "query must be a list with at least one item")
    if len(queries) > MAX_ITEMS:
        raise Refusal(413, f"{len(queries)} queries; at most {MAX_ITEMS} at once")
    return queries


def make_server(model, tokenizer, host: str = "127.0.0.1", port: int = 5000, max_length: int = 2048
                ) -> ThreadingHTTPServer:
    """The server; ``serve_forever()`` starts it, port 0 takes a free one."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # a client that sends nothing more does not hold its thread for ever

        def do_GET(self):
            known = self.path == "/health"
            health = {"model": type(model).__name__, "max_length": fit_length(model, max_length)}
            self.answer(200, health) if known else self.answer(404, {"error": f"nothing at {self.path}"})

        def do_POST(self):
            try:
                rewards = self.rewards()
                self.answer(200, {"rewards": rewards, "scores": rewards, "extra_logs": {}})
            except Refusal as refusal:
                self.answer(refusal.status, {"error": refusal.sentence})
            except SarmlibError as error:
                self.answer(422, {"error": str(error)})

        def rewards(self) -> list[float]:
            if self.path != "/get_reward":
                raise Refusal(404, f"nothing at {self.path}")
            length = self.headers.get("Content-Length", "")
            if not length.isdigit():
                raise Refusal(411, "Content-Length is missing")
            if int(length) > MAX_BYTES:
                raise Refusal(413, f"the body is larger than {MAX_BYTES} bytes; send fewer queries")
            queries = queries_of(self.rfile.read(int(length)))
            with lock:
                return score_queries(model, tokenizer, queries, max_length=max_length)

        def answer(self, status: int, value: dict) -> None:
            body = json.dumps(value).encode()
            self.close_connection = True
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Quiet."""

    return ThreadingHTTPServer((host, port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved reward model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--max-length", type=int, default=2048, help="tokens per query; longer ones lose their front")
    arguments = parser.parse_args()
    try:
        scorer = load_scorer(arguments.model)
    except SarmlibError as error:
        sys.exit(f"error: {error}")
    server = make_server(scorer.model, scorer.tokenizer, arguments.host, arguments.port, arguments.max_length)
    print(f"rewards of {arguments.model} at http://{arguments.host}:{server.server_port}/get_reward")
    server.serve_forever()


if __name__ == "__main__":
    main()
