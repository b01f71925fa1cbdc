"""Questions to a chat model: retried, paid once, never beyond the budget, and the key goes nowhere."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sarmlib.endpoint import ChatEndpoint, from_environment
from sarmlib.errors import ConfigError, EndpointError
from tests.fake_llm import KINDS, FakeLLM

pytest.importorskip("openai")
KEY = "sk-test-0123456789-secret"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def questions(n: int, prefix: str = "q") -> list[list[dict]]:
    return [[{"role": "user", "content": f"{prefix}{i}"}] for i in range(n)]


def endpoint(server, budget=None, price=None, cache=None, **constants) -> ChatEndpoint:
    one = ChatEndpoint(server.url, "fake", budget=budget, price=price, cache=cache)
    vars(one).update({"backoff": 0.01, "timeout": 20, **constants})
    return one


def test_every_trouble_is_survived_and_nothing_is_paid_twice(tmp_path):
    with FakeLLM(KINDS) as server:
        one = endpoint(server, cache=tmp_path / "cache.jsonl", timeout=1.5)
        answers = one.ask(questions(60))
        assert answers == [f"answer to q{i}" for i in range(60)]
        assert max(server.asked.values()) == 2 and min(server.asked.values()) == 1
        before = sum(server.asked.values())
        again = endpoint(server, cache=tmp_path / "cache.jsonl")
        assert again.ask(questions(60)) == answers and again.spent == one.spent
        assert sum(server.asked.values()) == before, "the cache was asked, not the server"
        assert one.estimate(questions(61)) | {"tokens_in": 0} == {
            "requests": 1, "cached": 60, "tokens_in": 0, "tokens_out": 512, "cost": None}


def test_a_dripping_server_is_left_at_the_deadline_inside_a_running_event_loop():
    async def inside(one):
        return one.ask(questions(6))

    with FakeLLM(("drip",)) as server:
        one, start = endpoint(server, timeout=0.5, retries=0), time.monotonic()
        answers = asyncio.run(inside(one))
        assert answers.count(None) > 0 and any(answers)
        assert time.monotonic() - start < 3, "each read was in time, the whole was not"


def test_money_is_counted_and_equal_questions_are_asked_once():
    with FakeLLM(delay=0.02) as server:
        one = endpoint(server, price=(2.0, 10.0), max_tokens=100, concurrency=3)
        assert one.estimate(questions(10))["cost"] == pytest.approx((10 * 1 * 2 + 10 * 100 * 10) / 1e6)
        assert len(set(one.ask([*questions(10), *questions(10)]))) == 10
        assert sum(server.asked.values()) == 10 and 1 < server.most <= 3
        assert one.spent == pytest.approx(10 * (10 * 2 + 5 * 10) / 1e6)


def test_threads_share_an_endpoint_and_the_name_of_the_limit_is_learnt_once():
    with FakeLLM(new=True) as server:
        one = endpoint(server, concurrency=6)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda i: one.ask(questions(8, f"t{i % 2}-")), range(4)))
        assert found[0] == found[2] == [f"answer to t0-{i}" for i in range(8)] and None not in found[1]
        assert len(server.answered) == 16 == sum(server.answered.values()) and one.spent == 15 * 16


def test_the_budget_stops_before_it_is_passed(tmp_path):
    with FakeLLM() as server:
        one = endpoint(server, cache=tmp_path / "c.jsonl", budget=300, max_tokens=20, concurrency=2)
        with pytest.raises(EndpointError, match="budget of 300 tokens is reached.*larger budget"):
            one.ask(questions(100))
        done = sum(server.answered.values())
        assert 0 < done < 100 and one.spent == 15 * done <= 300
        again = endpoint(server, cache=tmp_path / "c.jsonl", budget=300, max_tokens=20)
        with pytest.raises(EndpointError, match="budget"):
            again.ask(questions(100))
        assert sum(server.answered.values()) <= 300 / 15, "the budget holds over runs"
        assert None not in endpoint(server, cache=tmp_path / "c.jsonl", max_tokens=20).ask(questions(100))
        assert max(server.answered.values()) == 1


@pytest.mark.parametrize("usage", [
    None, [], "many", {"prompt_tokens": -5, "completion_tokens": 1}, {"prompt_tokens": float("nan")},
    {"prompt_tokens": True, "completion_tokens": 1}, {"prompt_tokens": "10", "completion_tokens": "5"}])
def test_a_reply_that_hides_its_cost_costs_the_worst(tmp_path, usage):
    with FakeLLM(usage=usage) as server:
        one = endpoint(server, cache=tmp_path / "c.jsonl", budget=140, max_tokens=30, concurrency=1)
        with pytest.raises(EndpointError, match="budget"):
            one.ask(questions(9))
    assert sum(server.answered.values()) == 2 and one.spent == 2 * (2 + 32 + 30)


def test_an_impossible_line_of_the_cache_opens_no_budget(tmp_path):
    line = {"key": "k", "answer": "x", "model": "fake", "usage": [-1000, 0]}
    (tmp_path / "c.jsonl").write_text(json.dumps(line) + "\n[]\n")
    with FakeLLM() as server:
        one = endpoint(server, cache=tmp_path / "c.jsonl", budget=40, max_tokens=20)
        with pytest.raises(EndpointError, match="budget"):
            one.ask(questions(3))
    assert not server.asked and one.spent == 0


@pytest.mark.parametrize("status, message", [(401, "refuses the key"), (404, "status 404"), (400, "status 400")])
def test_a_refusal_ends_it_at_once_and_hides_the_key(status, message, capsys, caplog):
    with FakeLLM(always=status) as server:
        one = endpoint(server, concurrency=1)
        with pytest.raises(EndpointError, match=message) as error:
            one.ask(questions(30))
        assert sum(server.asked.values()) == 1 and server.keys == {f"Bearer {KEY}"}
    assert KEY not in str(error.value) + caplog.text + "".join(capsys.readouterr()) + repr(vars(one))


def test_a_dead_server_is_given_up(tmp_path):
    with FakeLLM(always=500) as server:
        one = endpoint(server, retries=1, cache=tmp_path / "c.jsonl", concurrency=4)
        with pytest.raises(EndpointError, match="in a row were not answered"):
            one.ask(questions(200))
        assert sum(server.asked.values()) < 120


def test_the_key_is_in_no_file_and_a_placeholder_changes_no_answer(tmp_path, monkeypatch):
    with FakeLLM(answer=lambda m: f"your key is {KEY}") as server:
        assert endpoint(server, cache=tmp_path / "c.jsonl").ask(questions(1)) == ["your key is ***"]
        assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())
        monkeypatch.setenv("OPENAI_API_KEY", "key")
        assert endpoint(server).ask(questions(1)) == [f"your key is {KEY}"]
        assert server.keys == {f"Bearer {KEY}", "Bearer key"}


def test_a_torn_cache_line_costs_one_question(tmp_path):
    cache = tmp_path / "c.jsonl"
    with FakeLLM() as server:
        endpoint(server, cache=cache).ask(questions(5))
        cache.write_bytes(cache.read_bytes()[:-30])
        assert None not in endpoint(server, cache=cache).ask(questions(5))
        assert sum(server.answered.values()) == 6
        assert len([json.loads(line) for line in cache.read_text().splitlines() if line.endswith("}")]) == 5


@pytest.mark.parametrize("settings, message", [
    ({"base_url": "ftp://x/v1"}, "http"), ({"base_url": "http://user:pass@x/v1"}, "without user"),
    ({"budget": float("nan")}, "budget"), ({"price": (1.0, -1.0)}, "price"),
    ({"base_url": "http://example.org/v1"}, "not encrypted")])
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        ChatEndpoint(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **settings}).ask(questions(1))
    assert "pass@" not in str(error.value)


def test_from_the_environment(monkeypatch):
    with pytest.raises(ConfigError, match="SARMLIB_LLM_URL, SARMLIB_LLM_MODEL, SARMLIB_LLM_BUDGET is not set"):
        from_environment()
    for name, value in (("URL", "http://127.0.0.1:1/v1"), ("MODEL", "m"), ("BUDGET", "1000")):
        monkeypatch.setenv(f"SARMLIB_LLM_{name}", value)
    assert from_environment().budget == 1000
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'sarmlib\[llm\]'"):
        from_environment()
    monkeypatch.setenv("SARMLIB_LLM_BUDGET", "lots")
    with pytest.raises(ConfigError, match="'lots': give a number"):
        from_environment()


RUN = """
import sys
from sarmlib.endpoint import ChatEndpoint
one = ChatEndpoint(sys.argv[1], "fake", cache=sys.argv[2])
one.concurrency, one.backoff = 4, 0.01
answers = one.ask([[{"role": "user", "content": f"feature {i}"}] for i in range(150)])
assert answers == [f"answer to feature {i}" for i in range(150)]
"""


def test_a_killed_run_asks_nothing_answered_again_and_two_share_a_cache(tmp_path):
    cache = tmp_path / "cache.jsonl"
    with FakeLLM(("429", "500", "malformed"), delay=0.004) as server:
        command = [sys.executable, "-c", RUN, server.url, str(cache)]
        process = subprocess.Popen(command, cwd=ROOT)
        deadline = time.monotonic() + 120
        while (cache.read_bytes().count(b"\n") if cache.exists() else 0) < 60:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        lines = [json.loads(line) for line in cache.read_bytes().split(b"\n")[:-1]]  # the last one may be torn
        stored = {line["key"] for line in lines if line["answer"]}  # a line without one is a cost alone
        answered = dict(server.answered)
        assert 40 <= len(stored) < 150
        both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
        assert [one.wait(120) for one in both] == [0, 0]
    key = ChatEndpoint("http://127.0.0.1/v1", "fake").key
    kept = {question for question in answered if key(json.loads(question)) in stored}
    assert len(server.answered) == 150 and len(kept) == len(stored)
    assert all(server.answered[question] == answered[question] for question in kept)
    assert all(line.endswith(b"}") for line in cache.read_bytes().splitlines()[len(lines) + 1:])
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_an_interrupt_ends_requests_under_way():
    with FakeLLM(delay=20) as server:
        one, start = endpoint(server), time.monotonic()
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            one.ask(questions(4))
        assert time.monotonic() - start < 8
