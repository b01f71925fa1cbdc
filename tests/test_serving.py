"""The HTTP endpoint: the same rewards as the library, and clear refusals within its bounds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sarmlib.__main__ import main
from sarmlib.chat import render
from sarmlib.errors import ConfigError, DataError
from sarmlib.evaluation.scoring import score_conversations
from sarmlib.sarm import serving
from tests.tiny import tiny_sarm, tiny_tokenizer

TALKS = [[{"role": "user", "content": f"w{i} w7"}, {"role": "assistant", "content": " ".join(["w9"] * (i + 1))}]
         for i in range(5)]


@pytest.fixture(scope="module")
def pair():
    return tiny_sarm(), tiny_tokenizer()


def test_texts_and_conversations_get_the_librarys_rewards_in_any_company(pair):
    model, tokenizer = pair
    wanted = score_conversations(model, tokenizer, TALKS).rewards
    texts = [render(tokenizer, talk) for talk in TALKS]
    for queries in (TALKS, texts, [TALKS[0], *texts[1:]], [t.replace("<bos>", "") for t in texts],
                    ["<bos>" + t for t in texts], [t.removesuffix("<eot>") for t in texts]):
        np.testing.assert_allclose(serving.score_queries(model, tokenizer, queries), wanted, atol=1e-5)
    one_by_one = [serving.score_queries(model, tokenizer, [t])[0] for t in texts]
    np.testing.assert_allclose(one_by_one, wanted, atol=1e-5)
    order = [3, 1, 4, 0, 2]
    np.testing.assert_allclose(serving.score_queries(model, tokenizer, [texts[i] for i in order], batch_tokens=9),
                               wanted[order], atol=1e-5)


@pytest.mark.parametrize("query, message", [
    ("", "query 1 is ''"), (7, "query 1 is 7"), (None, "query 1 is None"), ([], "query 1: "),
    ([{"role": "user", "content": "w1"}], "query 1: "), ([{"role": "assistant"}], "query 1: ")])
def test_an_item_that_cannot_be_scored_is_named(pair, query, message):
    with pytest.raises(DataError, match=message.replace("[", "\\[")):
        serving.score_queries(*pair, [TALKS[0], query])


@pytest.fixture
def client(pair):
    pytest.importorskip("fastapi", reason="the serving extra is not installed")
    testclient = pytest.importorskip("starlette.testclient", reason="httpx is not installed")
    return testclient.TestClient(serving.create_app(*pair, max_bytes=5000, max_items=8))


def test_the_endpoint_answers_as_openrlhf_expects(pair, client):
    answer = client.post("/get_reward", json={"query": TALKS, "prompts": ["x"] * 5})
    assert answer.status_code == 200 and set(answer.json()) == {"rewards", "scores", "extra_logs"}
    np.testing.assert_allclose(answer.json()["rewards"], score_conversations(*pair, TALKS).rewards, atol=1e-5)
    assert client.get("/health").json()["model"] == "SarmForSequenceClassification"


@pytest.mark.parametrize("body, status", [
    (b"", 400), (b"{", 400), (b"[1]", 400), (b'{"prompts": []}', 400), (b"\xff\xfe", 400), (b"[" * 4000, 400),
    (b'{"query": "one text"}', 422), (b'{"query": []}', 422), (b'{"query": [3]}', 422), (b'{"query": [[]]}', 422),
    (json.dumps({"query": ["w1"] * 9}).encode(), 413), (b"x" * 6000, 413)])
def test_bad_requests_get_a_sentence_and_a_4xx(client, body, status):
    answer = client.post("/get_reward", content=body)
    assert answer.status_code == status and answer.json()["error"]


def test_serve_refuses_bad_settings_and_says_what_is_missing(tmp_path, pair, capsys, monkeypatch):
    assert main(["serve", "--model", str(tmp_path), "--port", "0"]) == 1
    assert "--port 0: out of range" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "fastapi", None)
    with pytest.raises(ConfigError, match=r"sarmlib\[serving\]"):
        serving.create_app(*pair)


def test_the_default_address_is_loopback():
    import argparse

    from sarmlib.commands import serve
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert parser.parse_args(["--model", "x"]).host == "127.0.0.1"
