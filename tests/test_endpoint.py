"""Questions to a chat model: retried, paid once, never beyond the budget, and the key goes nowhere."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sarmlib.endpoint import ChatEndpoint, from_environment
from sarmlib.errors import ConfigError, EndpointError
from tests.fake_llm import KINDS, FakeLLM
from tests.helpers import ROOT

pytest.importorskip("openai")
KEY = "sk-test-0123456789-secret"


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

        async def inside_an_event_loop():  # as in a notebook
            return one.ask(questions(60))

        answers = asyncio.run(inside_an_event_loop())
        assert answers == [f"answer to q{i}" for i in range(60)]
        assert max(server.asked.values()) == 2 and min(server.asked.values()) == 1
        before = sum(server.asked.values())
        again = endpoint(server, cache=tmp_path / "cache.jsonl")
        assert again.ask(questions(60)) == answers and again.spent == one.spent
        assert sum(server.asked.values()) == before, "the cache was asked, not the server"
        assert one.estimate(questions(61)) | {"tokens_in": 0} == {
            "requests": 1, "cached": 60, "tokens_in": 0, "tokens_out": 512, "cost": None}


def test_a_dripping_server_is_left_at_the_deadline():
    with FakeLLM(("drip",)) as server:
        one, start = endpoint(server, timeout=0.5, retries=0), time.monotonic()
        answers = one.ask(questions(6))
        assert answers.count(None) > 0 and any(answers)
        assert time.monotonic() - start < 3, "each read was in time, the whole was not"


def test_money_is_counted_and_equal_questions_are_asked_once():
    with FakeLLM(delay=0.02, new=True) as server:  # which refuses the older name of max_tokens
        one = endpoint(server, price=(2.0, 10.0), max_tokens=100, concurrency=3)
        assert one.estimate(questions(10))["cost"] == pytest.approx((10 * 1 * 2 + 10 * 100 * 10) / 1e6)
        assert len(set(one.ask([*questions(10), *questions(10)]))) == 10
        assert sum(server.asked.values()) == 10 + 3 and 1 < server.most <= 3, "the name is learnt once"
        assert sum(server.answered.values()) == 10 and one.spent == pytest.approx(10 * (10 * 2 + 5 * 10) / 1e6)


def test_lines_of_the_cache_that_are_torn_or_impossible_cost_one_question_and_open_no_budget(tmp_path):
    cache, line = tmp_path / "c.jsonl", {"key": "k", "answer": "x", "model": "fake", "usage": [-1000, 0]}
    with FakeLLM() as server:
        endpoint(server, cache=cache).ask(questions(5))
        cache.write_text(json.dumps(line) + "\n[]\n" + cache.read_text()[:-30])
        with pytest.raises(EndpointError, match="budget"):
            endpoint(server, cache=cache, budget=80, max_tokens=20).ask(questions(5))
        again = endpoint(server, cache=cache)
        assert None not in again.ask(questions(5)) and again.spent == 5 * 15
        assert sum(server.answered.values()) == 6


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
    None, "many", {"prompt_tokens": -5, "completion_tokens": 1}, {"prompt_tokens": True, "completion_tokens": 1}])
def test_a_reply_that_hides_its_cost_costs_the_worst(tmp_path, usage):
    with FakeLLM(usage=usage) as server:
        one = endpoint(server, cache=tmp_path / "c.jsonl", budget=140, max_tokens=30, concurrency=1)
        with pytest.raises(EndpointError, match="budget"):
            one.ask(questions(9))
    assert sum(server.answered.values()) == 2 and one.spent == 2 * (2 + 32 + 30)


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


@pytest.mark.parametrize("settings, message", [
    ({"base_url": "http://user:pass@x/v1"}, "without user"), ({"budget": float("nan")}, "budget"),
    ({"price": (1.0, -1.0)}, "price"), ({"base_url": "http://example.org/v1"}, "not encrypted")])
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        ChatEndpoint(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **settings}).ask(questions(1))
    assert "pass@" not in str(error.value)


def test_from_the_environment(monkeypatch):
    with pytest.raises(ConfigError, match="SARMLIB_LLM_URL, SARMLIB_LLM_MODEL, SARMLIB_LLM_BUDGET is not set"):
        from_environment()
    for name, value in (("URL", "http://127.0.0.1:1/v1"), ("MODEL", "m"), ("BUDGET", "lots")):
        monkeypatch.setenv(f"SARMLIB_LLM_{name}", value)
    with pytest.raises(ConfigError, match="'lots': give a number"):
        from_environment()
    monkeypatch.setenv("SARMLIB_LLM_BUDGET", "1000")
    assert from_environment().budget == 1000


RUN = """
import sys
from sarmlib.endpoint import ChatEndpoint
one = ChatEndpoint(sys.argv[1], "fake", cache=sys.argv[2])
one.concurrency, one.backoff = 4, 0.01
one.ask([[{"role": "user", "content": f"q{i}"}] for i in range(150)])
"""


def test_a_killed_run_asks_nothing_answered_again_and_two_share_a_cache(tmp_path):
    cache = tmp_path / "cache.jsonl"
    with FakeLLM(("429", "500", "malformed"), delay=0.004) as server:
        process = subprocess.Popen([sys.executable, "-c", RUN, server.url, str(cache)], cwd=ROOT)
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
        one, other = endpoint(server, cache=cache), endpoint(server, cache=cache)
        assert one.ask(questions(150)) == other.ask(questions(150)) == [f"answer to q{i}" for i in range(150)]
    kept = {question for question in answered if one.key(json.loads(question)) in stored}
    assert len(server.answered) == 150 and len(kept) == len(stored)
    assert all(server.answered[question] == answered[question] for question in kept)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_an_interrupt_ends_requests_under_way():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    with FakeLLM(delay=20) as server:
        one, start = endpoint(server), time.monotonic()
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            one.ask(questions(4))
        assert time.monotonic() - start < 8
