"""Any OpenAI-compatible chat endpoint (OpenAI, vLLM, Ollama, llama.cpp's server), with a cache and a budget.

The `openai` client speaks to the server; what is here counts the money, keeps the answers and tries again.
The key is read from the environment variable OPENAI_API_KEY and kept nowhere.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from sarmlib.errors import ConfigError, EndpointError
from sarmlib.store import hash_json

log = logging.getLogger(__name__)
LONGEST_WAIT = 60.0  # seconds, whatever the server's Retry-After says
HOPELESS = 20  # so many questions failing one after another mean that the server is gone


class _NoAnswer(Exception):
    """An attempt failed; ``after``: seconds the server asks to wait; ``charged``: the server may have worked;
    ``final``: this question will never be answered (content filter)."""

    def __init__(self, why: str, after: float | None = None, charged: bool = True, final: bool = False):
        super().__init__(why)
        self.after, self.charged, self.final = after, charged, final


class ChatEndpoint:
    """Asks many questions of one model and remembers the answers.

    price: currency per million (input, output) tokens.  budget: the most that may be spent, in that currency, or
    in tokens without a price; it counts all that this model has cost according to the cache, so it holds over
    several runs (requests under way when a run was killed, or in another process, are not known).  cache:
    append-only JSON Lines of answers, keyed by model, parameters and messages; several processes may share it.
    Raises ConfigError for unusable settings and without openai.
    """

    max_tokens, temperature, concurrency = 512, 0.0, 8
    timeout, retries, backoff = 60.0, 5, 1.0  # seconds of a whole request; attempts; first wait in seconds

    def __init__(self, base_url: str, model: str, *, budget: float | None = None,
                 price: tuple[float, float] | None = None, cache: str | Path | None = None):
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ConfigError("the endpoint's address must be http(s)://host/path without user and password, "
                              "such as https://api.openai.com/v1 or http://127.0.0.1:11434/v1")
        for value in (0 if budget is None else budget, *(price or ())):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"budget {budget} and price {price} must be finite and not negative")
        try:
            import openai  # noqa: F401
        except ImportError:
            raise ConfigError("chat endpoints need the package openai: pip install 'sarmlib[llm]'") from None
        self.url = base_url.rstrip("/").removesuffix("/chat/completions")
        self.model, self.budget, self.price = model, budget, price
        self.cache = None if cache is None else Path(cache)
        self.failures = 0  # questions that stayed without an answer after all retries
        self.spent = 0.0  # on this model, in the unit of ``budget``
        self._local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._limit_name = "max_tokens"
        self._answers: dict[str, str] = {}
        self._read = 0  # bytes of the cache that are known
        self._turn = threading.Lock()

    def key(self, messages: list[dict]) -> str:
        """SHA-256 that names a question: model, parameters and messages; not the host, which may move."""
        return hash_json([self.model, self.max_tokens, self.temperature, messages])

    def estimate(self, messages_list: Sequence[list[dict]]) -> dict:
        """What `ask` would send: ``requests`` not in the cache, ``cached``, ``tokens_in`` (characters / 4),
        ``tokens_out`` (at most), ``cost`` (at most, in the unit of ``budget``; None without a price)."""
        with self._turn:
            self._load()
        todo = {key: m for m in messages_list if (key := self.key(m)) not in self._answers}
        tokens_in = sum(sum(len(m["content"]) for m in messages) // 4 + 1 for messages in todo.values())
        tokens_out = len(todo) * self.max_tokens
        return {"requests": len(todo), "cached": len(messages_list) - len(todo), "tokens_in": tokens_in,
                "tokens_out": tokens_out, "cost": self.price and self._cost([tokens_in, tokens_out])}

    def ask(self, messages_list: Sequence[list[dict]]) -> list[str | None]:
        """The answer to each conversation, in order; None where none came after all retries.

        What is in the cache is not asked, equal questions are asked once; each answer is on disk at once.
        Raises EndpointError before the request that could exceed the budget, when the server refuses the request
        (400, 401, 403, 404 and the like), or when nothing is answered any more.
        """
        secret, stop = self._secret(), threading.Event()
        keys = [self.key(messages) for messages in messages_list]
        with self._turn, ThreadPoolExecutor(1) as other:  # of its own: it works inside a running event loop
            self._load()
            todo = {key: m for key, m in zip(keys, messages_list, strict=True) if key not in self._answers}
            try:
                other.submit(asyncio.run, self._ask_all(todo, secret, stop)).result()
            finally:
                stop.set()  # an interrupt ends the requests too
        return [self._answers.get(key) for key in keys]

    async def _ask_all(self, todo: dict[str, list[dict]], secret: str, stop: threading.Event) -> None:
        """One event loop runs all requests, so that what they share needs no lock."""
        import openai

        self._reserved: list[float] = []  # the worst price of each request under way
        self._problems: list[Exception] = []
        self._in_a_row, waiting = 0, iter(todo.items())

        async def worker() -> None:
            for key, messages in waiting:
                try:
                    await self._one(client, key, messages, secret)
                except Exception as error:
                    self._problems.append(error)
                if self._problems:
                    return

        # a redirect would carry the key to whatever host it names
        http = openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=not self._local)
        async with openai.AsyncOpenAI(api_key=secret or "none", base_url=self.url, max_retries=0,
                                      timeout=self.timeout, http_client=http) as client:
            pending = {asyncio.ensure_future(worker()) for _ in range(min(self.concurrency, len(todo)))}
            while pending:
                _, pending = await asyncio.wait(pending, timeout=0.2)
                if stop.is_set():
                    for task in pending:
                        task.cancel()
        if self._problems:
            raise self._problems[0]

    async def _one(self, client, key: str, messages: list[dict], secret: str) -> None:
        """Ask one question with retries; its answer into the cache, or one more failure."""
        size = sum(len(m["content"].encode("utf-8", "surrogatepass")) + 16 for m in messages) + 16
        worst = [size, self.max_tokens]  # no tokenizer makes more tokens than bytes
        for attempt in range(self.retries + 1):
            await self._reserve(self._cost(worst))
            text, usage = None, worst  # what a request that is cancelled has cost is not known
            try:
                text, usage = await self._post(client, messages, secret)
                self._in_a_row = 0
                return
            except _NoAnswer as error:
                why, usage = error, worst if error.charged else None
            except EndpointError:
                usage = None
                raise
            finally:
                self._reserved.remove(self._cost(worst))
                if usage or text is not None:  # a line without an answer is a cost alone
                    self._store({"key": key, "answer": text, "model": self.model, "usage": usage or worst})
            if why.final or self._problems or attempt == self.retries:
                break
            wait = self.backoff * 2**attempt * random.uniform(0.5, 1) if why.after is None else why.after
            await asyncio.sleep(min(wait, LONGEST_WAIT))
        self.failures += 1
        self._in_a_row += 1
        if self._in_a_row >= HOPELESS:
            raise EndpointError(f"{self.url}: {HOPELESS} questions in a row were not answered (last: {why}); "
                                "see that the server runs, then run again: answers so far are kept")
        log.warning("no answer from %s after %d attempts: %s", self.url, attempt + 1, why)

    async def _post(self, client, messages, secret: str) -> tuple[str, list[int] | None]:
        """One attempt: (answer, (input, output) tokens or None).  Raises _NoAnswer or EndpointError."""
        import openai

        limit, create = self._limit_name, client.chat.completions.with_raw_response.create
        try:
            async with asyncio.timeout(self.timeout):  # of the whole: a server may send a byte at a time
                raw = await create(model=self.model, messages=messages, temperature=self.temperature,
                                   **{limit: self.max_tokens})
        except openai.APIStatusError as error:
            status, response = error.status_code, error.response
            if status == 400 and limit == "max_tokens" and "max_completion_tokens" in response.text:
                self._limit_name = "max_completion_tokens"  # what OpenAI's newer models call it
                return await self._post(client, messages, secret)
            raise self._failure(status, response, secret) from None
        except (TimeoutError, openai.APITimeoutError):
            raise _NoAnswer("no answer in time") from None
        except openai.OpenAIError as error:  # without a connection nothing was asked
            cause = type(error.__cause__).__name__
            raise _NoAnswer(cause, charged=cause != "ConnectError") from None
        try:
            reply = json.loads(raw.content)
            choice, usage = reply["choices"][0], reply.get("usage")
            text, filtered = choice["message"].get("content"), choice.get("finish_reason") == "content_filter"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _NoAnswer("a reply that is no chat completion") from None
        if not isinstance(text, str) or not text.strip():
            raise _NoAnswer("the content filter" if filtered else "an empty answer", final=filtered)
        usage = usage if isinstance(usage, dict) else {}
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        return _masked(text, secret), counts if _are_counts(counts) else None

    def _failure(self, status: int, response, secret: str) -> Exception:
        """What an HTTP status other than success means."""
        said = _masked(response.text, secret)
        if status == 400 and "content_filter" in said:
            return _NoAnswer("refused by the content filter", charged=False, final=True)
        if (status in (408, 409, 425, 429) or status >= 500) and "insufficient_quota" not in said:
            after = response.headers.get("Retry-After", "")  # a date: our own backoff counts
            return _NoAnswer(f"status {status}", float(after) if after.isdecimal() else None, charged=False)
        if status in (401, 403):  # what a server says here may quote a part of the key
            return EndpointError(f"{self.url} refuses the key (status {status}); put a valid one into the "
                                 "environment variable OPENAI_API_KEY")
        said = " ".join("".join(c if c.isprintable() else " " for c in said).split())[:300]
        return EndpointError(f"{self.url} refuses the request (status {status}): {said}; check the address, the "
                             f"model {self.model!r} and the account")

    async def _reserve(self, worst: float) -> None:
        """Set the worst price of a request aside; waits for requests under way before it gives up."""
        self._load()  # what other processes have spent
        while self.budget is not None and self.spent + sum(self._reserved) + worst > self.budget:
            if not self._reserved:
                unit = "of the price's currency" if self.price else "tokens"
                raise EndpointError(
                    f"the budget of {self.budget:g} {unit} is reached: {self.spent:.6g} spent on {self.model}, "
                    f"and the next request may take {worst:.6g}; give a larger budget to go on: answers are kept")
            await asyncio.sleep(0.01)
        self._reserved.append(worst)

    def _store(self, line: dict) -> None:
        if self.cache is None:
            self._take(line)
            return
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.cache.with_name(f".{self.cache.name}.lock")), open(self.cache, "ab+") as file:
            self._load()
            torn = file.tell() > self._read  # by a kill: this line must not join it
            file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._load()

    def _load(self) -> None:
        """Take what the cache holds beyond what is known; lines that a kill has torn are passed over."""
        if self.cache is None or not self.cache.exists():
            return
        with open(self.cache, "rb") as file:
            file.seek(self._read)
            raw = file.read()
        whole = raw[:raw.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in filter(None, whole.split(b"\n")):
            try:
                self._take(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                log.warning("%s: an unreadable line is passed over: %r", self.cache, line[:60])

    def _take(self, record: dict) -> None:
        if not _are_counts(record["usage"]):
            raise ValueError("no counts of tokens")
        if record["answer"] is not None:
            self._answers[record["key"]] = record["answer"]
        if record["model"] == self.model:
            self.spent += self._cost(record["usage"])

    def _cost(self, tokens: Sequence[int]) -> float:
        a, b = self.price or (1e6, 1e6)
        return (tokens[0] * a + tokens[1] * b) / 1e6

    def _secret(self) -> str:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):  # the HTTP library would quote it in its error
            raise ConfigError("the environment variable OPENAI_API_KEY holds no key: it has odd characters")
        if key and self.url.startswith("http:") and not self._local:
            raise ConfigError(f"{self.url} is not encrypted, and OPENAI_API_KEY would be sent to it; use https, "
                              "or unset the variable")
        return key


def _masked(text: str, secret: str) -> str:
    """A shorter key ("none", "EMPTY") is a placeholder, and may stand in an answer by chance."""
    return text.replace(secret, "***") if len(secret) >= 16 else text


def _are_counts(numbers) -> bool:
    """Whether these are two numbers of tokens; what else a server sends costs the worst."""
    return isinstance(numbers, list) and len(numbers) == 2 and all(type(n) is int and n >= 0 for n in numbers)


def from_environment(cache: str | Path | None = None) -> ChatEndpoint:
    """The endpoint of ``SARMLIB_LLM_URL``, ``SARMLIB_LLM_MODEL`` and ``SARMLIB_LLM_BUDGET`` (tokens).

    Raises ConfigError naming what is not set."""
    names = ("SARMLIB_LLM_URL", "SARMLIB_LLM_MODEL", "SARMLIB_LLM_BUDGET")
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ConfigError(f"interpretation.explainer is llm, but {', '.join(missing)} is not set: name the "
                          "endpoint, the model and the most tokens it may cost, or use explainer: keywords")
    url, model, budget = (os.environ[name] for name in names)
    try:
        return ChatEndpoint(url, model, budget=float(budget), cache=cache)
    except ValueError:
        raise ConfigError(f"SARMLIB_LLM_BUDGET={budget[:40]!r}: give a number of tokens") from None
