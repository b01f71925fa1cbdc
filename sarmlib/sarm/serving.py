"""A small HTTP endpoint for rewards, with the requests and answers of OpenRLHF's reward server.

    POST /get_reward  {"query": [...], "prompts": [...]}  ->  {"rewards": [...], "scores": [...], "extra_logs": {...}}

``query`` holds whole texts as the chat template writes them, or conversations (lists of messages); ``prompts`` is
accepted and not needed.  Loopback only unless told otherwise; bodies, items and lengths are bounded.
"""

from __future__ import annotations

import json
import threading

from sarmlib.chat import encode_conversations, end_of_turn_id, fit_length, pad_id, truncate_left
from sarmlib.errors import ConfigError, DataError, SarmlibError
from sarmlib.evaluation.scoring import score_token_ids

MAX_BYTES, MAX_ITEMS = 4 << 20, 512


def score_queries(model, tokenizer, queries: list, *, max_length: int = 2048, batch_tokens: int | None = None) -> list:
    """Rewards of texts and conversations (`encode_queries`)."""
    sequences = truncate_left(tokenizer, encode_queries(tokenizer, queries), fit_length(model, max_length))
    rewards, _ = score_token_ids(model, sequences, pad_id=pad_id(tokenizer), batch_tokens=batch_tokens)
    return rewards.tolist()


def encode_queries(tokenizer, queries: list) -> list[list[int]]:
    """Token ids of texts (already in the chat template; one BOS and the end of turn are put right) and conversations.

    Raises DataError naming the item that is neither a text nor a conversation ending with the assistant.
    """
    sequences, end, bos = [], end_of_turn_id(tokenizer), tokenizer.bos_token_id
    for number, query in enumerate(queries):
        if isinstance(query, str) and query.strip():
            ids = tokenizer(query, add_special_tokens=False, verbose=False)["input_ids"]
            while bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]
            ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
            sequences.append(ids if end is None or ids[-1] == end else [*ids, end])
        elif isinstance(query, list):
            try:
                sequences += encode_conversations(tokenizer, [query])
            except DataError as error:
                raise DataError(f"query {number}: {error}") from None
        else:
            raise DataError(f"query {number} is {repr(query)[:60]}; a text or a list of messages is needed")
    return sequences


def create_app(model, tokenizer, *, max_bytes: int = MAX_BYTES, max_items: int = MAX_ITEMS, max_length: int = 2048,
               batch_tokens: int | None = None):
    """FastAPI application with ``POST /get_reward`` and ``GET /health``; ConfigError when fastapi is not installed.

    400: not JSON; 413: body over ``max_bytes`` (never read to its end) or more than ``max_items``; 422: a query that
    cannot be scored.  Every refusal is ``{"error": sentence}``.  Requests are scored one after the other.
    """
    try:
        from fastapi import FastAPI
        from fastapi.concurrency import run_in_threadpool
        from fastapi.responses import JSONResponse
    except ImportError:
        raise ConfigError("serving needs fastapi and uvicorn: pip install 'sarmlib[serving]'") from None
    app, lock = FastAPI(title="sarmlib rewards", docs_url=None, redoc_url=None, openapi_url=None), threading.Lock()

    def score(queries):
        with lock:
            return score_queries(model, tokenizer, queries, max_length=max_length, batch_tokens=batch_tokens)

    def refuse(status: int, sentence: str):
        return JSONResponse({"error": sentence}, status)

    async def get_reward(request):
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                return refuse(413, f"the body is larger than {max_bytes} bytes; send fewer queries")
        try:
            queries = json.loads(body)["query"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return refuse(400, 'the body must be JSON {"query": [texts or conversations]}')
        if not isinstance(queries, list) or not queries:
            return refuse(422, "query must be a list with at least one item")
        if len(queries) > max_items:
            return refuse(413, f"{len(queries)} queries; at most {max_items} at once")
        try:
            rewards = await run_in_threadpool(score, queries)
        except SarmlibError as error:
            return refuse(422, str(error))
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": {}})

    async def health(request):
        return JSONResponse({"model": type(model).__name__, "max_length": fit_length(model, max_length)})

    app.add_route("/get_reward", get_reward, methods=["POST"])
    app.add_route("/health", health, methods=["GET"])
    return app
