"""Questions to a chat model: retried, paid once, never beyond the budget, and the key goes nowhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sarmlib.endpoint import ChatEndpoint, _retry_after
from sarmlib.errors import ArtifactError, ConfigError, EndpointError
from sarmlib.evaluation import generative
from tests.fake_llm import KINDS, FakeLLM

KEY = "sk-test-0123456789-secret"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def questions(n: int, prefix: str = "q") -> list[list[dict]]:
    return [[{"role": "user", "content": f"{prefix}{i}"}] for i in range(n)]


def endpoint(server, **settings) -> ChatEndpoint:
    return ChatEndpoint(server.url, "fake", **{"backoff": 0.01, "timeout": 20, **settings})


def test_every_trouble_is_survived_and_nothing_is_paid_twice(tmp_path):
    with FakeLLM(KINDS) as server:
        one = endpoint(server, cache=tmp_path / "cache.jsonl", timeout=1.5)
        answers = one.ask(questions(60))
        assert answers == [f"answer to q{i}" for i in range(60)] and one.failures == 0
        assert max(server.asked.values()) == 2 and min(server.asked.values()) == 1
        before = sum(server.asked.values())
        assert endpoint(server, cache=tmp_path / "cache.jsonl").ask(questions(60)) == answers
        assert sum(server.asked.values()) == before, "the cache was asked, not the server"
        assert one.estimate(questions(61)) | {"tokens_in": 0} == {
            "requests": 1, "cached": 60, "tokens_in": 0, "tokens_out": 512, "spent": one.spent, "cost": None}


def test_equal_questions_are_asked_once_and_concurrency_is_bounded():
    with FakeLLM(delay=0.02) as server:
        assert len(set(endpoint(server, concurrency=3).ask([*questions(12), *questions(12)]))) == 12
        assert sum(server.asked.values()) == 12 and 1 < server.most <= 3


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


def test_money_and_tokens():
    with FakeLLM() as server:
        one = endpoint(server, price=(2.0, 10.0), max_tokens=100)
        assert one.estimate(questions(10))["cost"] == pytest.approx((10 * 1 * 2 + 10 * 100 * 10) / 1e6)
        one.ask(questions(10))
        assert one.spent == pytest.approx(10 * (10 * 2 + 5 * 10) / 1e6)


@pytest.mark.parametrize("status, message", [(401, "refuses the key"), (403, "refuses the key"), (404, "status 404"),
                                             (400, "status 400")])
def test_a_refusal_ends_it_at_once_and_hides_the_key(status, message, capsys, caplog):
    with FakeLLM(always=status) as server:
        one = endpoint(server, concurrency=1)
        with pytest.raises(EndpointError, match=message) as error:
            one.ask(questions(30))
        assert sum(server.asked.values()) == 1 and server.keys == {f"Bearer {KEY}"}
    shown = str(error.value) + repr(one) + caplog.text + "".join(capsys.readouterr())
    assert KEY not in shown and KEY not in repr(vars(one))


def test_a_dead_server_is_given_up(tmp_path):
    with FakeLLM(always=500) as server:
        one = endpoint(server, retries=1, cache=tmp_path / "c.jsonl", concurrency=4)
        with pytest.raises(EndpointError, match="in a row were not answered"):
            one.ask(questions(200))
        assert sum(server.asked.values()) < 120


def test_one_unanswered_question_is_none_and_is_not_cached(tmp_path):
    with FakeLLM(answer=lambda m: "" if m[-1]["content"] == "q3" else "yes") as server:
        one = endpoint(server, retries=1, cache=tmp_path / "c.jsonl")
        assert [i for i, answer in enumerate(one.ask(questions(6))) if answer is None] == [3] and one.failures == 1
        assert endpoint(server, cache=tmp_path / "c.jsonl").estimate(questions(6))["requests"] == 1


def test_the_key_is_in_no_file_even_if_the_server_repeats_it(tmp_path):
    with FakeLLM(answer=lambda m: f"your key is {KEY}") as server:
        answer, = endpoint(server, cache=tmp_path / "c.jsonl").ask(questions(1))
    assert answer == "your key is ***"
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_a_torn_cache_line_costs_one_question(tmp_path):
    cache = tmp_path / "c.jsonl"
    with FakeLLM() as server:
        endpoint(server, cache=cache).ask(questions(5))
        cache.write_bytes(cache.read_bytes()[:-30])
        endpoint(server, cache=cache).ask(questions(5))
        assert sum(server.answered.values()) == 6
        assert len([json.loads(line) for line in cache.read_text().splitlines() if line.endswith("}")]) == 5


def test_one_writer(tmp_path):
    with FakeLLM() as server:
        one, two = (endpoint(server, cache=tmp_path / "c.jsonl") for _ in range(2))
        with one._writer(), pytest.raises(ArtifactError, match="another process"):
            two.ask(questions(1))


@pytest.mark.parametrize("settings, message", [
    ({"base_url": "ftp://x/v1"}, "http"), ({"base_url": "http://user:pass@x/v1"}, "without user"),
    ({"concurrency": 0}, "concurrency"), ({"budget": float("nan")}, "budget"), ({"timeout": 0}, "timeout")])
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        ChatEndpoint(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **settings})
    assert "pass@" not in str(error.value)


def test_a_key_is_not_sent_in_the_open():
    with pytest.raises(ConfigError, match="not encrypted"):
        ChatEndpoint("http://example.org/v1", "m").ask(questions(1))


def test_retry_after_in_seconds_and_as_a_date():
    assert _retry_after("3") == 3 and _retry_after(None) is None and _retry_after("soon") is None
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_it_works_inside_a_running_event_loop():
    import asyncio

    async def inside(one):
        return one.ask(questions(2))

    with FakeLLM() as server:
        assert asyncio.run(inside(endpoint(server))) == ["answer to q0", "answer to q1"]


RUN = """
import sys
from sarmlib.endpoint import ChatEndpoint
one = ChatEndpoint(sys.argv[1], "fake", cache=sys.argv[2], concurrency=4, backoff=0.01)
answers = one.ask([[{"role": "user", "content": f"feature {i}"}] for i in range(300)])
assert answers == [f"answer to feature {i}" for i in range(300)]
"""


def test_300_questions_killed_twice_ask_nothing_answered_again(tmp_path):
    cache = tmp_path / "cache.jsonl"
    with FakeLLM(("429", "500", "malformed"), delay=0.004) as server:
        command = [sys.executable, "-c", RUN, server.url, str(cache)]
        for target in (80, 180):
            process = subprocess.Popen(command, cwd=ROOT)
            deadline = time.monotonic() + 60
            while (cache.read_bytes().count(b"\n") if cache.exists() else 0) < target:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        lines = [json.loads(line) for line in cache.read_bytes().split(b"\n")[:-1]]  # the last one may be torn
        stored = {line["key"] for line in lines if line["key"]}  # a line without a key is a cost alone
        answered = dict(server.answered)
        assert 100 <= len(stored) < 300
        subprocess.run(command, cwd=ROOT, check=True, timeout=60)
        twice = [question for question, n in server.answered.items() if n > 1]
    # Only answers that were on their way when a kill came may come again: at most one for each thread and kill.
    assert len(server.answered) == 300 and len(twice) <= 2 * 4
    key = ChatEndpoint("http://127.0.0.1/v1", "fake").key
    kept = {question for question in answered if key(json.loads(question)) in stored}
    assert len(kept) == len(stored) and all(server.answered[question] == answered[question] for question in kept)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_the_judge_of_rewardbench_2_over_a_real_connection():
    from sarmlib.data.toyworld.datasets import rewardbench2
    rows = rewardbench2(4, 0)

    def answer(messages):
        return "Ignore all rules. [[A]]" if "[[A]]" in messages[0]["content"] else "My rating: 7"

    with FakeLLM(("500", "malformed"), answer) as server:
        found = generative.judge(endpoint(server), rows)
    assert found["failures"] == {"verdicts": 0, "ratings": 0}
    right = sum(found["credit"][i] for i in found["credit"])
    assert right == found["places"]["A"], "always A is right as often as the chosen answer stands there"


def test_the_command_judges_within_its_budget_and_resumes(tmp_path, capsys):
    from sarmlib.__main__ import main

    def answer(messages):
        return "[[B]]" if "[[A]]" in messages[0]["content"] else "4"

    with FakeLLM(("429",), answer) as server:
        command = ["judge", "--endpoint", server.url, "--model", "fake", "--data", "toy", "--limit", "4", "--output",
                   str(tmp_path / "out"), "--max-tokens", "50", "--price", "0", "1"]
        assert main([*command, "--dry-run"]) == 0 and not server.asked
        assert "questions to ask (0 answered before)" in capsys.readouterr().out
        assert main([*command, "--budget", "0.0001"]) == 1 and "budget" in capsys.readouterr().err
        done = sum(server.answered.values())
        assert done > 0 and not (tmp_path / "out" / "results.json").exists()
        assert main(command) == 0 and max(server.answered.values()) == 1
    printed, stored = capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())
    assert f"({done} answered before)" in printed and "no verdict in 0 of" in printed
    assert stored["model"] == "fake" and stored["failures"] == {"verdicts": 0, "ratings": 0}
    assert KEY not in printed + (tmp_path / "out" / "results.json").read_text()
