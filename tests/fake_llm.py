"""A chat server on this machine that behaves as badly as real ones do, and remembers what it was asked."""

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KINDS = ("slow", "429", "500", "malformed", "empty", "cut", "drip")


class FakeLLM(ThreadingHTTPServer):
    """``with FakeLLM(...) as server: server.url``.

    trouble: kinds of failure, each met by the first attempt at some questions (which, depends on the question alone);
    answer: messages -> text; always: a status that every request gets; usage: what every reply says of its tokens;
    new: refuse ``max_tokens``, as newer models do.  ``asked`` counts attempts and ``answered`` successful answers per
    question; ``keys`` are the credentials that came in.
    """

    def __init__(self, trouble=(), answer=None, always: int | None = None, delay: float = 0.0, new: bool = False,
                 usage={"prompt_tokens": 10, "completion_tokens": 5}):  # noqa: B006
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.always, self.delay, self.new, self.usage = tuple(trouble), always, delay, new, usage
        self.answer = answer or (lambda messages: f"answer to {messages[-1]['content'][:40]}")
        self.asked, self.answered, self.keys, self.lock = Counter(), Counter(), set(), threading.Lock()
        self.active = self.most = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        with self.server.lock:
            self.server.active += 1
            self.server.most = max(self.server.most, self.server.active)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.reply(self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        with self.server.lock:
            self.server.active -= 1

    def reply(self, server: FakeLLM, body: dict) -> None:
        question, key = json.dumps(body["messages"]), self.headers.get("Authorization")
        with server.lock:
            server.keys.add(key)
            server.asked[question] += 1
            first = server.asked[question] == 1
        time.sleep(server.delay)
        if server.always:
            return self.send(server.always, {"error": {"message": f"no, {key}"}})
        if server.new and "max_tokens" in body:
            return self.send(400, {"error": {"message": "use max_completion_tokens"}})
        kinds = [*server.trouble, *[None] * max(1, len(server.trouble))]  # half of the questions meet none
        kind = kinds[int(hashlib.sha256(question.encode()).hexdigest(), 16) % len(kinds)] if first else None
        bad = {"429": (429, {"error": "busy"}, {"Retry-After": "0"}), "500": (500, {"error": "busy"}),
               "malformed": (200, b'{"choices": [{"mess'), "empty": (200, {"choices": []})}
        if kind in bad:
            return self.send(*bad[kind])
        if kind == "cut":
            return self.connection.close()
        if kind == "drip":
            return self.drip()
        time.sleep(2.5 * (kind == "slow"))
        text = server.answer(body["messages"])
        with server.lock:
            server.answered[question] += 1
        self.send(200, {"choices": [{"message": {"content": text}}], "usage": server.usage})

    def send(self, status: int, body, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def drip(self) -> None:
        """A byte now and then."""
        self.send(200, b"", {"Content-Length": "1000"})
        for _ in range(40):
            self.wfile.write(b" ")
            time.sleep(0.1)
