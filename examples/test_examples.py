"""The examples run: HTTP endpoint, reward function for GRPO and RLOO, LoRA, and accelerate's configs."""

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import queue
import random
import socket
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import GPT2Config

from sarmlib.chat import render
from sarmlib.evaluation.scorer import score
from tests.helpers import ROOT
from tests.tiny import VOCAB, conversation, tiny_config, tiny_pairs, tiny_sarm, tiny_tokenizer, words

TALKS = [conversation(f"w{i} w4", " ".join(["w9"] * (i + 1))) for i in range(5)]
GOOD = json.dumps({"query": TALKS}).encode()


def load(name: str):
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reward_function, serve, lora = (load(name) for name in ("reward_function", "serve", "lora"))
Reward = reward_function.SarmRewardFunction


@pytest.fixture(scope="module")
def pair():
    return tiny_sarm(), tiny_tokenizer()


def test_texts_and_conversations_get_the_librarys_rewards_in_any_company(pair):
    wanted = score(*pair, TALKS).rewards
    texts = [render(pair[1], talk) for talk in TALKS]
    for queries in (TALKS, texts, [TALKS[0], *texts[1:]], [t.replace("<bos>", "") for t in texts],
                    ["<bos>" + t for t in texts], [t.removesuffix("<eot>") for t in texts]):
        np.testing.assert_allclose(serve.score_queries(*pair, queries), wanted, atol=1e-5)
    np.testing.assert_allclose([serve.score_queries(*pair, [t])[0] for t in texts], wanted, atol=1e-5)


@pytest.fixture(scope="module")
def port(pair):
    found = queue.Queue()
    threading.Thread(target=lambda: asyncio.run(serve.serve(*pair, port=0, ready=found.put)), daemon=True).start()
    return found.get(timeout=30)


@pytest.fixture(scope="module")
def ask(port):
    """Call the running server: (status, answer)."""
    def call(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or "null")

    return call


def test_the_endpoint_answers_as_openrlhf_expects(pair, ask):
    status, answer = ask("POST", "/get_reward", json.dumps({"query": TALKS, "prompts": ["x"] * 5}))
    assert status == 200 and set(answer) == {"rewards", "scores", "extra_logs"}
    np.testing.assert_allclose(answer["rewards"], score(*pair, TALKS).rewards, atol=1e-5)
    assert ask("POST", "/get_reward", '{"query": []}') == (200, {"rewards": [], "scores": [], "extra_logs": {}})
    assert ask("GET", "/health")[1]["model"] == "SarmForSequenceClassification"
    assert ask("GET", "/x")[0] == ask("POST", "/x", "{}")[0] == 404


def test_fifty_clients_get_their_own_rewards_from_shared_batches(pair, ask, monkeypatch):
    sizes, work = [], serve.Batches.score
    monkeypatch.setattr(serve.Batches, "score", lambda *one: sizes.append(len(one[1])) or work(*one))
    wanted = score(*pair, TALKS).rewards
    asked = [i % 5 for i in range(500)]
    with ThreadPoolExecutor(50) as clients:
        found = list(clients.map(lambda i: ask("POST", "/get_reward", json.dumps({"query": [TALKS[i]]})), asked))
    for talk, (status, answer) in zip(asked, found, strict=True):
        assert status == 200 and answer["rewards"] == pytest.approx([wanted[talk]], abs=1e-5)
    assert sum(sizes) == 500 and max(sizes) > 5  # what came together was scored together


def test_fifty_clients_of_openrlhf_itself_get_their_rewards(pair, port, monkeypatch):
    if not (folder := os.environ.get("SARMLIB_OPENRLHF")):
        pytest.skip("SARMLIB_OPENRLHF names no folder with OpenRLHF's source")
    pytest.importorskip("aiohttp")
    for name in ("openrlhf", "openrlhf.utils"):  # its package as a whole needs deepspeed and ray
        package = types.ModuleType(name)
        package.__path__ = [str(Path(folder, *name.split(".")))]
        monkeypatch.setitem(sys.modules, name, package)
    client = importlib.import_module("openrlhf.utils.agent").SingleTurnAgentExecutor(
        f"http://127.0.0.1:{port}/get_reward")
    texts, wanted = [render(pair[1], talk) for talk in TALKS], score(*pair, TALKS).rewards

    async def run():
        for _ in range(10):
            found = await asyncio.gather(*(
                client._fetch_rewards_via_http([texts[i % 5]], ["prompt"], ["label"]) for i in range(50)))
            assert [one["rewards"] for [one] in found] == [pytest.approx([wanted[i % 5]], abs=1e-5) for i in range(50)]

    asyncio.run(run())


def comes_to_be_served(ask, wanted: bool) -> bool:
    """Whether connections are soon taken, or soon refused, as wanted."""
    for _ in range(400):
        try:
            served = ask("GET", "/health")[0] == 200
        except (OSError, http.client.HTTPException):
            served = False
        if served == wanted:
            return True
        time.sleep(0.05)
    return False


def test_the_endpoint_bounds_connections_bodies_and_slow_senders(port, ask, monkeypatch, capfd, caplog):
    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 20)
    head = b"POST /get_reward HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    for number, one in enumerate(slow):  # some never end their head, some their body
        with contextlib.suppress(OSError):
            one.sendall(head if number % 2 else head + b"Content-Length: 900000\r\n\r\n{")
    assert comes_to_be_served(ask, False)
    for one in slow:
        one.close()
    assert comes_to_be_served(ask, True)
    with socket.create_connection(("127.0.0.1", port)) as one:  # leaves without waiting
        one.sendall(head + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD)
    assert ask("GET", "/health")[0] == 200
    assert ask("POST", "/get_reward", b"", **{"Content-Length": str(10**9)})[0] == 400  # and is never read
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err + caplog.text


def test_what_nobody_waits_for_is_not_scored(pair, monkeypatch):
    scored = []

    async def run():
        batches = serve.Batches(*pair, 64)
        monkeypatch.setattr(batches, "score", lambda requests: scored.extend(requests) or requests)
        one, other = (serve.Waiting([name], asyncio.get_running_loop().create_future()) for name in "ab")
        for waiting in (one, other):
            batches.queue.put_nowait(waiting)
        one.answer.cancel()
        task = asyncio.create_task(batches.run())
        assert await asyncio.wait_for(other.answer, 10) == ["b"]
        task.cancel()

    asyncio.run(run())
    assert scored == [["b"]]


@pytest.mark.parametrize("body, headers, status", [
    (GOOD, {"Host": "evil.example"}, 421), (GOOD, {"Content-Type": "text/plain"}, 415),
    (GOOD, {"Content-Type": ""}, 415), (json.dumps({"query": ["w1"] * 513}).encode(), {}, 413),
    *((body, {}, 400) for body in (b"", b"{", b"[1]", b'{"prompts": []}', b"\xff\xfe", b"[" * 4000)),
    *((b'{"query": %b}' % query, {}, 422) for query in (b'"one text"', b"[3]", b"[[]]", b'[""]'))])
def test_bad_requests_and_pages_of_other_sites_get_a_sentence_and_a_4xx(ask, body, headers, status):
    found, answer = ask("POST", "/get_reward", body, **headers)
    assert found == status and answer["error"]


def test_conversations_and_their_text_get_the_reward_of_plain_scoring_and_the_features_that_paid_are_logged(pair):
    rng, metrics, columns = random.Random(0), {}, {}
    talks = [conversation(prompt, words(rng, 1, 6)) for prompt in [words(rng, 8, 14) for _ in range(3)] * 4]
    expected = score(*pair, talks).rewards
    reward = Reward(*pair, log_features=3, labels={i: f"word {i}" for i in range(64)})
    found = reward(prompts=[talk[:1] for talk in talks], completions=[talk[1:] for talk in talks],
                   completion_ids=[[1]] * 12, trainer_state=object(), answer=["x"] * 12,
                   log_metric=metrics.__setitem__, log_extra=columns.__setitem__)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    entry = reward.history[-1]
    assert entry["reward"] == pytest.approx(np.mean(found)) and len(entry["features"]) == 3
    assert sum(entry["features"].values()) + entry["rest"] == pytest.approx(np.mean(found), abs=1e-5)
    first = next(iter(entry["features"]))
    assert metrics[f"sarm/feature {first} (word {first})"] == entry["features"][first]
    assert len(columns["sarm_features"]) == 12
    parts = [render(pair[1], talk).partition("<assistant>") for talk in talks]
    found = reward([a + b for a, b, _ in parts], [c.replace("<eot>", "") for _, _, c in parts])
    np.testing.assert_allclose(found, expected, atol=1e-4)  # the turn is closed here
    assert reward.__name__ == "sarm" and all(type(value) is float for value in found)


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_grpo_and_rloo_log_which_features_paid(tmp_path, pair, method):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import LlamaForCausalLM
    reward = Reward(*pair, log_features=2)
    prompts = Dataset.from_list([{"prompt": conversation(f"w{i}", "")[:1]} for i in range(4)])
    trainer = getattr(trl, f"{method}Trainer")(
        model=LlamaForCausalLM(tiny_config(2)), reward_funcs=reward, train_dataset=prompts, processing_class=pair[1],
        args=getattr(trl, f"{method}Config")(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4, logging_steps=1,
            max_completion_length=5, beta=0.0, report_to="none", use_cpu=True, save_strategy="no"))
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert len(reward.history) == 2 and any("sarm/feature" in key for key in logged)


@pytest.mark.parametrize("config", [None, GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4)])
def test_adapters_train_on_the_backbone_only_and_merge_into_it(tmp_path, config):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("trl", reason="trl is not installed")
    model = tiny_sarm(config, head=0.1)
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = lora.train(model, tiny_tokenizer(), tiny_pairs(16), str(tmp_path), rank=2, max_steps=3, use_cpu=True,
                        learning_rate=1e-2, per_device_train_batch_size=4, save_strategy="no")
    after = merged.state_dict()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert after.keys() == before.keys() and "score.weight" in moved
    assert all(name.startswith("model.") and "proj.weight" in name or "c_" in name for name in moved - {"score.weight"})


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed_zero2"])
def test_shipped_configs_are_what_accelerate_reads(name):
    path = ROOT / "examples" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp": "FSDP"}.get(name, "DEEPSPEED")
    known = {action.dest for action in launch_command_parser()._actions}
    raw = yaml.safe_load(path.read_text())
    assert set(raw.get("fsdp_config", {})) | set(raw.get("deepspeed_config", {})) <= known
