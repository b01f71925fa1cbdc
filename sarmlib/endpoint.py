"""Any OpenAI-compatible chat endpoint (OpenAI, vLLM, Ollama, llama.cpp's server), with a cache and a budget.

The `openai` client speaks to the server; what is here counts the money, keeps the answers and tries again.
The key is read from the environment variable OPENAI_API_KEY and kept nowhere.
"""

import asyncio
import json
import logging
import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from sarmlib.errors import ConfigError, EndpointError
from sarmlib.store import hash_json

log = logging.getLogger(__name__)
LONGEST_WAIT = 60.0  # seconds, whatever the server's Retry-After says
HOPELESS = 20  # so many questions failing one after another mean that the server is gone
NEVER = float("inf")  # seconds to wait: this question will never be answered
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class ChatEndpoint:
    """Asks many questions of one model and remembers the answers.

    price: currency per million (input, output) tokens.  budget: the most to spend, in that currency or, without a
    price, in tokens, by all runs with one cache (what is under way in another process is not known).  cache:
    append-only JSON Lines of answers; several processes may share it.
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
        if not all(0 <= value < float("inf") for value in (budget or 0, *(price or ()))):
            raise ConfigError(f"budget {budget} and price {price} must be finite and not negative")
        if not find_spec("openai"):
            raise ConfigError("chat endpoints need the package openai: pip install 'sarmlib[llm]'")
        self.url = base_url.rstrip("/").removesuffix("/chat/completions")
        self.model, self.budget, self.price = model, budget, price
        self.cache = None if cache is None else Path(cache)
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
        Raises EndpointError before a request could exceed the budget, or when the server refuses or is gone.
        """
        secret = self._secret()
        keys = [self.key(messages) for messages in messages_list]
        # a thread of its own: the caller, such as a notebook, may have a running event loop
        with self._turn, closing(asyncio.new_event_loop()) as loop, ThreadPoolExecutor(1) as thread:
            self._load()
            todo = {key: m for key, m in zip(keys, messages_list, strict=True) if key not in self._answers}
            task = loop.create_task(self._ask_all(todo, secret))
            try:
                thread.submit(loop.run_until_complete, task).result()
            finally:
                loop.call_soon_threadsafe(task.cancel)  # an interrupt ends the requests too
        return [self._answers.get(key) for key in keys]

    async def _ask_all(self, todo: dict[str, list[dict]], secret: str) -> None:
        """One event loop runs all requests, so that what they share needs no lock."""
        import openai

        self._reserved: list[float] = []  # the worst price of each request under way
        self._problems: list[Exception] = []
        self._in_a_row, waiting = 0, iter(todo.items())

        async def worker() -> None:
            for key, messages in waiting:
                try:
                    await self._one(client, key, messages)
                except Exception as error:
                    self._problems.append(error)
                if self._problems:
                    return

        # a redirect would carry the key to whatever host it names
        http = openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=not self._local)
        async with openai.AsyncOpenAI(api_key=secret or "none", base_url=self.url, max_retries=0,
                                      timeout=self.timeout, http_client=http) as client:
            await asyncio.gather(*(worker() for _ in range(min(self.concurrency, len(todo)))))
        if self._problems:
            raise self._problems[0]

    async def _one(self, client, key: str, messages: list[dict]) -> None:
        """Ask one question until it is answered, or its retries are used up."""
        wait = 0.0
        for attempt in range(self.retries + 1):
            await asyncio.sleep(wait)
            why, after = await self._attempt(client, key, messages)
            if not why:
                self._in_a_row = 0
                return
            if after == NEVER or self._problems:
                break
            wait = self.backoff * 2**attempt * random.uniform(0.5, 1) if after is None else min(after, LONGEST_WAIT)
        self._in_a_row += 1
        if self._in_a_row >= HOPELESS:
            raise EndpointError(f"{self.url}: {HOPELESS} questions in a row were not answered (last: {why}); "
                                "see that the server runs, then run again: answers so far are kept")
        log.warning("no answer from %s: %s", self.url, why)

    async def _attempt(self, client, key: str, messages: list[dict]) -> tuple[str, float | None]:
        """One request, reserved before and paid after: why there is no answer ("": there is), and the seconds to
        wait before the next attempt (None: as long as we like)."""
        import openai

        size = sum(len(m["content"].encode("utf-8", "surrogatepass")) + 16 for m in messages) + 16
        worst, limit = [size, self.max_tokens], self._limit_name  # no tokenizer makes more tokens than bytes
        create = client.chat.completions.with_raw_response.create
        await self._reserve(self._cost(worst))
        record = {"key": key, "answer": None, "model": self.model, "usage": worst}  # also when it is cancelled
        try:
            async with asyncio.timeout(self.timeout):  # of the whole: a server may send a byte at a time
                raw = await create(model=self.model, messages=messages, temperature=self.temperature,
                                   **{limit: self.max_tokens})
            reply = json.loads(raw.content)
            choice = reply["choices"][0]
            text, record["usage"] = choice["message"].get("content"), _counts(reply.get("usage")) or worst
            if text and text.strip():
                record["answer"] = _masked(text, client.api_key)
                return "", None
            filtered = choice.get("finish_reason") == "content_filter"
            return ("the content filter", NEVER) if filtered else ("an empty answer", None)
        except openai.APIStatusError as error:
            record["usage"] = [0, 0]
            return self._refused(error.response, limit, client.api_key)
        except TimeoutError:
            return "no answer in time", None
        except (openai.OpenAIError, *UNREADABLE) as error:
            why = type(error.__cause__ or error).__name__
            record["usage"] = [0, 0] if why == "ConnectError" else worst  # without a connection nothing was asked
            return why, None
        finally:
            self._reserved.remove(self._cost(worst))
            self._store(record)

    def _refused(self, response, limit: str, secret: str) -> tuple[str, float | None]:
        """What an HTTP status other than success means: as `_attempt`, or EndpointError."""
        status, said = response.status_code, _masked(response.text, secret)
        if status == 400 and limit == "max_tokens" and "max_completion_tokens" in said:
            self._limit_name = "max_completion_tokens"  # what OpenAI's newer models call it
            return f"{limit} is refused", 0.0
        if status == 400 and "content_filter" in said:
            return "refused by the content filter", NEVER
        if (status in (408, 409, 425, 429) or status >= 500) and "insufficient_quota" not in said:
            after = response.headers.get("Retry-After", "")  # a date: our own backoff counts
            return f"status {status}", float(after) if after.isdecimal() else None
        if status in (401, 403):  # what a server says here may quote a part of the key
            raise EndpointError(f"{self.url} refuses the key (status {status}); put a valid one into the "
                                "environment variable OPENAI_API_KEY")
        raise EndpointError(f"{self.url} refuses the request (status {status}): {said[:300]!r}; check the address, "
                            f"the model {self.model!r} and the account")

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
        """The answer and the cost of an attempt; a line without an answer is a cost alone."""
        if line["answer"] is None and not any(line["usage"]):
            return
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
            except UNREADABLE:
                log.warning("%s: an unreadable line is passed over: %r", self.cache, line[:60])

    def _take(self, record: dict) -> None:
        cost = self._cost(record["usage"])
        if not cost >= 0:
            raise ValueError(f"no cost: {cost}")
        if record["answer"] is not None:
            self._answers[record["key"]] = record["answer"]
        if record["model"] == self.model:
            self.spent += cost

    def _cost(self, tokens: Sequence[int]) -> float:
        a, b = self.price or (1e6, 1e6)
        return (tokens[0] * a + tokens[1] * b) / 1e6

    def _secret(self) -> str:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):  # the HTTP library would quote it in its error
            raise ConfigError("the environment variable OPENAI_API_KEY holds no key: it has odd characters")
        if key and self.url.startswith("http:") and not self._local:
            raise ConfigError(f"{self.url} is not encrypted; use https, or unset OPENAI_API_KEY, which it would get")
        return key


def _masked(text: str, secret: str) -> str:
    """A shorter key ("none", "EMPTY") is a placeholder, and may stand in an answer by chance."""
    return text.replace(secret, "***") if len(secret) >= 16 else text


def _counts(usage) -> list[int] | None:
    """(Input, output) tokens that a server reports; None for what are no counts, which costs the worst."""
    usage = usage if isinstance(usage, dict) else {}
    found = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    return found if all(type(n) is int and n >= 0 for n in found) else None


def from_environment(cache: str | Path | None = None) -> ChatEndpoint:
    """The endpoint of ``SARMLIB_LLM_URL``, ``SARMLIB_LLM_MODEL`` and ``SARMLIB_LLM_BUDGET`` (tokens); ConfigError names
    what is not set."""
    names = ("SARMLIB_LLM_URL", "SARMLIB_LLM_MODEL", "SARMLIB_LLM_BUDGET")
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ConfigError(f"interpretation.explainer is llm, but {', '.join(missing)} is not set: name the "
                          "endpoint, the model and the most tokens it may cost, or use explainer: keywords")
    url, model, budget = (os.environ[name] for name in names)
    try:
        tokens = float(budget)
    except ValueError:
        raise ConfigError(f"SARMLIB_LLM_BUDGET={budget[:40]!r}: give a number of tokens") from None
    return ChatEndpoint(url, model, budget=tokens, cache=cache)
