"""Any OpenAI-compatible chat endpoint (OpenAI, Azure, vLLM, Ollama, llama.cpp's server), with a cache and a budget.

Only the standard library, and threads rather than an event loop: at most ``concurrency`` requests are under way, and
it works as it is inside Jupyter.  The key is read from the named environment variable for each request and kept
nowhere; what the server writes back is searched for it before anything is stored or shown.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock, Timeout

from .artifacts import hash_json
from .errors import ArtifactError, ConfigError, EndpointError

log = logging.getLogger(__name__)
LONGEST_WAIT = 60.0
"""Seconds: neither backoff nor a server's Retry-After makes a request wait longer."""
MAX_REPLY = 4 << 20
HOPELESS = 20
"""So many questions failing one after another mean that the server is gone, not that a question is odd."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to whatever host it names."""

    def redirect_request(self, *args):
        return None


class _Retry(Exception):
    """This attempt failed; ``after``: seconds the server asks to wait; ``charged``: the server may have worked."""

    def __init__(self, why: str, after: float | None = None, charged: bool = False):
        super().__init__(why)
        self.after, self.charged = after, charged


class _Refused(Exception):
    """This one question will never be answered (content filter)."""


class ChatEndpoint:
    """Asks many questions of one model and remembers the answers.

    base_url: up to, without, ``/chat/completions``; a query (Azure's ``?api-version=...``) is kept.  key_env: name of
    the environment variable with the key, sent as a bearer token (Azure: ``api-key``); None or unset sends none.
    price: currency per million (input, output) tokens.  budget: the most that may be spent, in that currency, or in
    tokens without a price; it counts everything this model has cost according to the cache, so it holds over several
    runs (requests that were under way when a run was killed are not known).  cache: append-only JSON Lines of answers,
    keyed by model, parameters and messages.  temperature None leaves the model's own.  retries: attempts after the
    first; backoff: seconds before the first of them, doubled each time.  Raises ConfigError for unusable settings.
    """

    def __init__(self, base_url: str, model: str, *, key_env: str | None = "OPENAI_API_KEY",
                 budget: float | None = None, price: tuple[float, float] | None = None, max_tokens: int = 512,
                 temperature: float | None = 0.0, cache: str | Path | None = None, concurrency: int = 8,
                 timeout: float = 60.0, retries: int = 5, backoff: float = 1.0):
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ConfigError("the endpoint's address must be http(s)://host/path without user and password, such as "
                              "https://api.openai.com/v1 or http://127.0.0.1:11434/v1")
        for name, value, low in (("concurrency", concurrency, 1), ("max_tokens", max_tokens, 1),
                                 ("retries", retries, 0), ("timeout", timeout, 1e-3), ("budget", budget, 0),
                                 ("backoff", backoff, 0),
                                 *(("price", value, 0) for value in price or ())):
            if value is not None and not low <= value < float("inf"):
                raise ConfigError(f"endpoint: {name}={value!r}; give a finite number of at least {low}")
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self.model, self.key_env, self.budget, self.price = model, key_env, budget, price
        self.max_tokens, self.temperature, self.concurrency = max_tokens, temperature, concurrency
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.cache = None if cache is None else Path(cache)
        self.failures = 0
        """Questions that stayed without an answer after all retries, since this object was made."""
        self.spent = 0.0
        """Spent so far on this model, in the unit of ``budget``."""
        self.shown = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self._url = urlunsplit((parts.scheme, parts.netloc, f"{path}/chat/completions", parts.query, ""))
        self._azure = parts.hostname.endswith(".azure.com") or "api-version=" in parts.query
        self._local = parts.hostname in _LOOPBACK
        self._plain = parts.scheme == "http" and not self._local
        self._limit_name = "max_tokens"
        self._answers: dict[str, str] = {}
        self._reserved, self._in_a_row, self._size, self._money = 0.0, 0, -1, threading.Condition()
        proxies = [urllib.request.ProxyHandler({})] if self._local else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def __repr__(self) -> str:
        return f"ChatEndpoint({self.shown!r}, {self.model!r}, key_env={self.key_env!r}, budget={self.budget})"

    def key(self, messages: list[dict]) -> str:
        """SHA-256 that names a question: model, parameters and messages; not the host, so that a server may move."""
        return hash_json([self.model, self.max_tokens, self.temperature, messages])

    def estimate(self, messages_list: Sequence[list[dict]]) -> dict:
        """What `ask` would send: ``requests`` not in the cache, ``cached``, ``tokens_in`` (characters / 4),
        ``tokens_out`` (at most), ``cost`` (at most, in the unit of ``budget``; None without a price), ``spent``."""
        self._load()
        todo = {key: m for m in messages_list if (key := self.key(m)) not in self._answers}
        tokens_in = sum(sum(len(m["content"]) for m in messages) // 4 + 1 for messages in todo.values())
        tokens_out = len(todo) * self.max_tokens
        return {"requests": len(todo), "cached": len(messages_list) - len(todo), "tokens_in": tokens_in,
                "tokens_out": tokens_out, "spent": self.spent,
                "cost": None if self.price is None else self._cost(tokens_in, tokens_out)}

    def ask(self, messages_list: Sequence[list[dict]]) -> list[str | None]:
        """The answer to each conversation, in order; None where none came after all retries (``failures`` counts).

        What is in the cache is not asked, and equal questions are asked once.  Every answer is on disk before the next
        question of its thread.  Raises EndpointError before the request that could exceed the budget, when the server
        refuses the request (400, 401, 403, 404 and the like), or when nothing is answered any more; answers so far
        stay cached.  Raises ArtifactError when another process writes this cache.
        """
        keys = [self.key(messages) for messages in messages_list]
        self._key()
        with self._writer() as file:
            todo = {key: m for key, m in zip(keys, messages_list, strict=True) if key not in self._answers}
            stop, problems, self._in_a_row = threading.Event(), [], 0

            def work(item) -> None:
                if not stop.is_set():
                    try:
                        self._one(item[0], item[1], file, stop)
                    except Exception as error:
                        problems.append(error)
                        stop.set()

            with ThreadPoolExecutor(self.concurrency) as pool:
                try:
                    list(pool.map(work, todo.items()))
                finally:
                    stop.set()  # an interrupt ends the waiting threads too
        if problems:
            raise problems[0]
        return [self._answers.get(key) for key in keys]

    def _one(self, key: str, messages: list[dict], file, stop: threading.Event) -> None:
        """Ask one question with retries; its answer into the cache, or one more failure."""
        worst = self._cost(sum(len(m["content"].encode("utf-8", "surrogatepass")) + 16 for m in messages) + 16,
                           self.max_tokens)  # no tokenizer makes more tokens than bytes
        why = "no attempt"
        for attempt in range(self.retries + 1):
            self._reserve(worst)
            cost, record = 0.0, None
            try:
                text, usage = self._post(messages)
                cost = worst if usage is None else self._cost(*usage)
                record = {"key": key, "answer": text, "usage": usage}
            except _Refused as error:
                why = str(error)
                break
            except _Retry as error:
                why = str(error)
                cost = worst if error.charged else 0.0
                asked = error.after if error.after is not None else self.backoff * 2**attempt * random.uniform(0.5, 1)
                wait = min(asked, LONGEST_WAIT)
            finally:
                self._settle(worst, cost, file, record)
            if record is not None:
                return
            if attempt < self.retries and stop.wait(wait):
                return
        with self._money:
            self.failures += 1
            self._in_a_row += 1
            if self._in_a_row >= HOPELESS:
                raise EndpointError(f"{self.shown}: {HOPELESS} questions in a row were not answered (the last: {why}); "
                                    "see that the server runs, then run again: answers so far are kept")
        log.warning("no answer from %s after %d attempts: %s", self.shown, attempt + 1, why)

    def _reserve(self, worst: float) -> None:
        """Set the worst price of a request aside; waits for requests under way before it gives up."""
        with self._money:
            while self.budget is not None and self.spent + self._reserved + worst > self.budget:
                if not self._reserved:
                    unit = "tokens" if self.price is None else "of the price's currency"
                    raise EndpointError(
                        f"the budget of {self.budget:g} {unit} is reached: {self.spent:.6g} spent on {self.model}, and "
                        f"the next request may take {worst:.6g}; give a larger budget to go on: answers are kept")
                self._money.wait()
            self._reserved += worst

    def _settle(self, worst: float, cost: float, file, record: dict | None) -> None:
        with self._money:
            self._reserved = max(0.0, self._reserved - worst)
            self.spent += cost
            if record is not None or cost:  # a line without an answer is a cost alone
                if file is not None:
                    line = {**(record or {"key": None}), "model": self.model, "cost": cost,
                            "unit": "tokens" if self.price is None else "money"}
                    file.write(json.dumps(line).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                    self._size = file.tell()
                if record is not None:
                    self._answers[record["key"]], self._in_a_row = record["answer"], 0
            self._money.notify_all()

    def _cost(self, tokens_in: float, tokens_out: float) -> float:
        a, b = self.price or (1e6, 1e6)
        return (tokens_in * a + tokens_out * b) / 1e6

    def _key(self) -> str:
        key = (os.environ.get(self.key_env, "") if self.key_env else "").strip()
        if not (key.isascii() and key.isprintable()):  # the HTTP library would quote it in its error
            raise ConfigError(f"the environment variable {self.key_env} does not hold a key: it has odd characters")
        if key and self._plain and self.key_env == "OPENAI_API_KEY":
            raise ConfigError(f"{self.shown} is not encrypted, and OPENAI_API_KEY would be sent to it; use https, or "
                              "name that server's own variable (none: an unset one)")
        return key

    def _post(self, messages: list[dict]) -> tuple[str, tuple[int, int] | None]:
        """One attempt: (answer, (input, output) tokens).  Raises _Retry, _Refused or EndpointError."""
        body = {"model": self.model, "messages": messages, self._limit_name: self.max_tokens}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        request = urllib.request.Request(self._url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        key = self._key()
        if key:
            name, value = ("api-key", key) if self._azure else ("Authorization", f"Bearer {key}")
            request.add_unredirected_header(name, value)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                raw = self._read(response)
        except urllib.error.HTTPError as error:
            with error, contextlib.suppress(OSError, http.client.HTTPException):
                said = error.read(10_000).decode("utf-8", "replace")
                return self._failed(error.code, said.replace(key, "***") if key else said, error.headers, messages)
            raise _Retry(f"status {error.code} and no body") from None
        except urllib.error.URLError as error:  # no connection: nothing was asked
            raise _Retry(f"{type(error.reason).__name__} on connecting",
                         charged=isinstance(error.reason, TimeoutError)) from None
        except (OSError, http.client.HTTPException) as error:  # timeouts among them
            raise _Retry(type(error).__name__, charged=True) from None
        try:
            reply = json.loads(raw)
            choice = reply["choices"][0]
            text, usage = choice["message"].get("content"), reply.get("usage") or {}
            counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
            filtered = choice.get("finish_reason") == "content_filter"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Retry("a reply that is no chat completion", charged=True) from None
        if not isinstance(text, str) or not text.strip():
            raise _Refused("stopped by the content filter") if filtered else _Retry("an empty answer", charged=True)
        known = all(isinstance(n, int) and n >= 0 for n in counts)
        return (text.replace(key, "***") if key else text), (counts if known else None)

    def _read(self, response) -> bytes:
        """The whole body, within the time limit and size limit (a server may send a byte at a time)."""
        deadline, raw = time.monotonic() + self.timeout, b""
        while chunk := response.read1(1 << 16):
            raw += chunk
            if time.monotonic() > deadline or len(raw) > MAX_REPLY:
                raise TimeoutError
        return raw

    def _failed(self, status: int, said: str, headers, messages):
        """Sort an HTTP status other than success."""
        if status == 400 and ("content_filter" in said or "content management policy" in said):
            raise _Refused("refused by the content filter")
        if status == 400 and "max_completion_tokens" in said and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"  # what OpenAI's newer models call it
            return self._post(messages)
        if status in (408, 409, 425, 429) or status >= 500:
            if "insufficient_quota" not in said:
                raise _Retry(f"status {status}", after=_retry_after(headers.get("Retry-After")))
        elif status in (401, 403):  # what a server says here may quote a part of the key
            raise EndpointError(f"{self.shown} refuses the key (status {status}); put a valid one into the environment "
                                f"variable {self.key_env}")
        said = " ".join("".join(c if c.isprintable() else " " for c in said).split())[:300]
        raise EndpointError(f"{self.shown} refuses the request (status {status}): {said or 'no reason given'}; check "
                            f"the address, the model {self.model!r} and the account") from None

    @contextlib.contextmanager
    def _writer(self):
        """The cache, open for appending and held by this process; None without one."""
        if self.cache is None:
            yield None
            return
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.cache.with_name(f".{self.cache.name}.lock"), timeout=0):
                self._load()
                with open(self.cache, "ab+") as file:
                    if file.tell():
                        file.seek(-1, os.SEEK_END)
                        if file.read(1) != b"\n":  # torn by a kill: the next line must not join it
                            file.write(b"\n")
                    yield file
        except Timeout:
            raise ArtifactError(f"{self.cache} is written by another process; wait for it or name another cache"
                                ) from None

    def _load(self) -> None:
        """Answers and costs from the cache, again when it has changed; lines that a kill has torn are passed over."""
        if self.cache is None or not self.cache.exists() or self.cache.stat().st_size == self._size:
            return
        raw, unit = self.cache.read_bytes(), "tokens" if self.price is None else "money"
        answers, spent, torn = {}, 0.0, 0
        for line in filter(None, raw.split(b"\n")):
            try:
                record = json.loads(line)
                key, answer, cost = record["key"], record.get("answer"), float(record["cost"])
                usage, mine = record.get("usage"), record["model"] == self.model
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                torn += 1
                continue
            if isinstance(key, str) and isinstance(answer, str):
                answers[key] = answer
            if mine:  # a price that came later applies to the tokens that are known
                spent += self._cost(*usage) if usage else cost if record.get("unit") == unit else 0.0
        if torn:
            log.warning("%s: %d unreadable lines passed over", self.cache, torn)
        self._answers, self.spent, self._size = answers, spent, len(raw)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None when absent or odd."""
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def from_environment(cache: str | Path | None = None) -> ChatEndpoint:
    """The endpoint of ``SARMLIB_LLM_URL``, ``SARMLIB_LLM_MODEL`` and ``SARMLIB_LLM_BUDGET`` (tokens); the key, if it
    needs one, from ``OPENAI_API_KEY``.  Raises ConfigError naming what is not set."""
    names = ("SARMLIB_LLM_URL", "SARMLIB_LLM_MODEL", "SARMLIB_LLM_BUDGET")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"interpretation.explainer is llm, but {', '.join(missing)} is not set: name the endpoint, "
                          "the model and the most tokens it may cost, or set explainer: keywords in a copy of the "
                          "profile")
    url, model, budget = (os.environ[name] for name in names)
    try:
        return ChatEndpoint(url, model, budget=float(budget), cache=cache)
    except ValueError:
        raise ConfigError(f"SARMLIB_LLM_BUDGET={budget[:40]!r}: give a number of tokens") from None
