"""A chat server on this machine that behaves as badly as real ones do, and remembers what it was asked."""

import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KINDS = ("slow", "429", "500", "malformed", "empty", "cut", "drip")


class FakeLLM:
    """``with FakeLLM(...) as server: server.url``.

    trouble: kinds of failure, each met by the first attempt at some questions (which, depends on the question alone);
    answer: messages -> text; always: a status that every request gets; usage: what every reply says of its tokens;
    new: refuse ``max_tokens``, as newer models do.  ``asked`` counts attempts and ``answered`` successful answers per
    question; ``keys`` are the credentials that came in.
    """

    def __init__(self, trouble=(), answer=None, always: int | None = None, delay: float = 0.0, new: bool = False,
                 usage={"prompt_tokens": 10, "completion_tokens": 5}):  # noqa: B006
        self.trouble, self.always, self.delay, self.new, self.usage = tuple(trouble), always, delay, new, usage
        self.answer = answer or (lambda messages: f"answer to {messages[-1]['content'][:40]}")
        self.asked, self.answered, self.keys, self.lock = Counter(), Counter(), set(), threading.Lock()
        self.active = self.most = 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.active += 1
                    owner.most = max(owner.most, owner.active)
                try:
                    owner.handle(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with owner.lock:
                        owner.active -= 1

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def handle(self, request, body: dict) -> None:
        question = json.dumps(body["messages"])
        number = int(hashlib.sha256(question.encode()).hexdigest(), 16)
        with self.lock:
            self.keys.add(request.headers.get("Authorization"))
            self.asked[question] += 1
            first = self.asked[question] == 1
        time.sleep(self.delay)
        if self.always:
            said = f"no, {request.headers.get('Authorization')}"
            return self.send(request, self.always, {"error": {"message": said}})
        if self.new and "max_tokens" in body:
            return self.send(request, 400, {"error": {"message": "use max_completion_tokens"}})
        kinds = [*self.trouble, *[None] * max(1, len(self.trouble))]  # half of the questions meet none
        kind = kinds[number % len(kinds)] if first else None
        if kind == "slow":
            time.sleep(2.5)
        elif kind in ("429", "500"):
            return self.send(request, int(kind), {"error": "busy"}, {"Retry-After": "0"} if kind == "429" else {})
        elif kind == "malformed":
            return self.send(request, 200, b'{"choices": [{"mess')
        elif kind == "empty":
            return self.send(request, 200, {"choices": []})
        elif kind == "cut":
            return request.connection.close()
        elif kind == "drip":  # a byte now and then
            return self.drip(request)
        text = self.answer(body["messages"])
        reply = {"choices": [{"message": {"content": text}}], "usage": self.usage}
        with self.lock:
            self.answered[question] += 1
        self.send(request, 200, reply)

    @staticmethod
    def send(request, status: int, body, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)

    @staticmethod
    def drip(request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        for _ in range(40):
            request.wfile.write(b" ")
            request.wfile.flush()
            time.sleep(0.1)
