"""Rewards over HTTP, with the requests and answers of OpenRLHF's reward server.

    python examples/serve.py --model FOLDER [--host 127.0.0.1] [--port 5000]

    POST /get_reward  {"query": [...], "prompts": [...]}  ->  {"rewards": [...], "scores": [...], "extra_logs": {}}
    GET  /health                                          ->  {"model": ..., "max_length": ...}

``query`` holds whole texts as the chat template writes them, or conversations (lists of messages); other fields are
accepted and not needed.  What comes while a batch is being scored is scored together in the next one, and what nobody
waits for any more is not scored.  Every refusal of a whole request is ``{"error": sentence}``.  Loopback only unless
told otherwise: there is no password, and requests must name a host that this server was started for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tornado import web
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

sys.path.insert(0, str(Path(__file__).parent))
from reward_function import encode_queries  # noqa: E402

from sarmlib.chat import fit_length, pad_id, truncate_left  # noqa: E402
from sarmlib.errors import SarmlibError  # noqa: E402
from sarmlib.evaluation.scorer import load_scorer, score_ids  # noqa: E402

MAX_CONNECTIONS, MAX_BYTES, MAX_ITEMS, SECONDS = 128, 1 << 20, 512, 30
"""Open connections (more are closed unheard), bytes of a body, queries of a batch, and the time to send one request:
slow senders hold at most 128 MiB, for half a minute."""


@dataclass
class Waiting:
    """The queries of one request, and where its answer goes; cancelled when the client has gone."""

    queries: list
    answer: asyncio.Future


class Batches:
    """One thread that scores; what arrives meanwhile makes up the next batch."""

    def __init__(self, model, tokenizer, max_length: int):
        self.model, self.tokenizer, self.max_length = model, tokenizer, fit_length(model, max_length)
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()

    async def run(self) -> None:
        """Score for ever."""
        while True:
            batch = [await self.queue.get()]
            while not self.queue.empty() and sum(len(one.queries) for one in batch) < MAX_ITEMS:
                batch.append(self.queue.get_nowait())
            batch = [one for one in batch if not one.answer.done()]
            found = await asyncio.to_thread(self.score, [one.queries for one in batch])
            for one, answer in zip(batch, found, strict=True):
                if not one.answer.done():
                    one.answer.set_result(answer)

    def score(self, requests: list[list]) -> list[list[float] | Exception]:
        """Rewards of each request, or what is wrong with it; its neighbours are scored all the same."""
        found: list = [[] for _ in requests]
        ids: list[list[int]] = []
        for number, queries in enumerate(requests):
            try:
                found[number] = encode_queries(self.tokenizer, queries)
                ids += found[number]
            except Exception as error:  # of one request: the server goes on
                found[number] = error
        try:
            cut = truncate_left(self.tokenizer, ids, self.max_length)
            rewards = iter(score_ids(self.model, cut, pad_id=pad_id(self.tokenizer))[0].tolist())
        except Exception as error:
            return [error if one else one for one in found]
        return [one if isinstance(one, Exception) else [next(rewards) for _ in one] for one in found]


def score_queries(model, tokenizer, queries: list, *, max_length: int = 2048) -> list[float]:
    """Rewards of texts and conversations; raises what the first wrong one raises."""
    found = Batches(model, tokenizer, max_length).score([queries])[0]
    if isinstance(found, Exception):
        raise found
    return found


class Answering(web.RequestHandler):
    """JSON out, hosts checked, nothing logged."""

    def initialize(self, batches: Batches, hosts: set[str]) -> None:
        self.batches, self.hosts = batches, hosts

    def prepare(self) -> None:
        if self.request.host_name.lower() not in self.hosts:  # a page of another site, by a name that it controls
            raise web.HTTPError(421, reason="this server does not go by that host name; start it with --name NAME")

    def write_error(self, status_code: int, **_) -> None:
        self.finish({"error": self._reason})


class Health(Answering):
    """What is served."""

    def get(self) -> None:
        self.write({"model": type(self.batches.model).__name__, "max_length": self.batches.max_length})


class GetReward(Answering):
    """Rewards of a request's queries."""

    waiting: Waiting | None = None

    async def post(self) -> None:
        if self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise web.HTTPError(415, reason="the content type must be application/json")
        self.waiting = Waiting(queries_of(self.request.body), asyncio.get_running_loop().create_future())
        self.batches.queue.put_nowait(self.waiting)
        await asyncio.wait([self.waiting.answer])
        if self.waiting.answer.cancelled():
            return
        rewards = self.waiting.answer.result()
        if isinstance(rewards, SarmlibError):
            self.set_status(422)
            self.write({"error": str(rewards)})
        elif isinstance(rewards, Exception):
            print(f"error: {rewards!r}", file=sys.stderr)
            raise web.HTTPError(500, reason="the model failed on this batch")
        else:
            self.write({"rewards": rewards, "scores": rewards, "extra_logs": {}})

    def on_connection_close(self) -> None:
        if self.waiting:
            self.waiting.answer.cancel()


class NotFound(Answering):
    """Any other path."""

    def prepare(self) -> None:
        raise web.HTTPError(404, reason="nothing here but /get_reward and /health")


def queries_of(body: bytes) -> list:
    """The queries of a request's body; HTTPError when it has none."""
    try:
        queries = json.loads(body)["query"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise web.HTTPError(400, reason='the body must be JSON {"query": [texts or conversations]}') from None
    if not isinstance(queries, list):
        raise web.HTTPError(422, reason="query must be a list")
    if len(queries) > MAX_ITEMS:
        raise web.HTTPError(413, reason=f"{len(queries)} queries; at most {MAX_ITEMS} at once")
    return queries


class BoundedServer(HTTPServer):
    """Closes connections above MAX_CONNECTIONS unheard."""

    def handle_stream(self, stream, address) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            stream.close()
        else:
            super().handle_stream(stream, address)


async def serve(model, tokenizer, *, host: str = "127.0.0.1", port: int = 5000, max_length: int = 2048, names=(),
                ready=print) -> None:
    """Answer until cancelled; ``ready`` gets the port (0 takes a free one), ``names`` are further host names."""
    batches = Batches(model, tokenizer, max_length)
    given = {"batches": batches, "hosts": {"localhost", "127.0.0.1", "[::1]", host.lower(), *map(str.lower, names)}}
    app = web.Application([("/get_reward", GetReward, given), ("/health", Health, given)],
                          default_handler_class=NotFound, default_handler_args=given, log_function=lambda _: None)
    server = BoundedServer(app, max_header_size=16_384, max_body_size=MAX_BYTES, max_buffer_size=MAX_BYTES,
                           body_timeout=SECONDS, idle_connection_timeout=SECONDS)
    sockets = bind_sockets(port, host)
    server.add_sockets(sockets)
    try:
        ready(sockets[0].getsockname()[1])
        await batches.run()
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved reward model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--name", action="append", default=[], help="a host name that clients call this server by")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--max-length", type=int, default=2048, help="tokens per query; longer ones lose their front")
    given = parser.parse_args()
    try:
        scorer = load_scorer(given.model, device="cuda" if torch.cuda.is_available() else "cpu")
    except SarmlibError as error:
        sys.exit(f"error: {error}")
    asyncio.run(serve(scorer.model, scorer.tokenizer, host=given.host, port=given.port, names=given.name,
                      max_length=given.max_length, ready=lambda port: print(
                          f"rewards of {given.model} at http://{given.host}:{port}/get_reward", flush=True)))


if __name__ == "__main__":
    main()
