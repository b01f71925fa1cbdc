"""The one scoring loop: order, invariance, shared prefixes on every family, official texts, resumption, loading."""

import importlib.util
import json
import random

import numpy as np
import pytest
import torch
from filelock import FileLock
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, dynamic_module_utils

from sarmlib.chat import encode_conversations
from sarmlib.errors import ArtifactError, ConfigError, DataError, ModelError
from sarmlib.evaluation import scorer as S
from sarmlib.evaluation.scorer import answers, can_share, evaluate, pack, prepared, score, score_ids, score_rows
from sarmlib.sarm.model import ScalarRewardConfig, ScalarRewardModel
from tests.test_sarm_model import GROUPED, config_of
from tests.tiny import VOCAB, conversation, tiny_config, tiny_sarm, tiny_tokenizer, words


def bos_tokenizer(**kwargs):
    """A tokenizer that adds a BOS although its template writes one, as Llama's does."""
    tokenizer = tiny_tokenizer(**kwargs)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def classifier(config=None, seed: int = 0, num_labels: int = 1):
    torch.manual_seed(seed)
    config = config or tiny_config()
    config.num_labels = num_labels
    model = AutoModelForSequenceClassification.from_config(config).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


def scalar():
    torch.manual_seed(0)
    model = ScalarRewardModel(ScalarRewardConfig(backbone_config=tiny_config())).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


def best_of(n: int = 4, prompts: int = 5, seed: int = 0) -> list[list[int]]:
    """Sequences of `prompts` prompts with `n` answers each, ending in <eot>; one answer is empty, two are equal."""
    rng, out = random.Random(seed), []
    for _ in range(prompts):
        prompt = [2, 3, *(rng.randrange(9, VOCAB) for _ in range(rng.randint(12, 20))), 5, 4]
        out += [[*prompt, *(rng.randrange(9, VOCAB) for _ in range(rng.randint(0, 9))), 5] for _ in range(n)]
    out[1], out[-2] = [*out[0][:-1], 5], [*prompt, 5]
    return out


def close(one, other):
    np.testing.assert_allclose(one, other, atol=1e-5 * (1 + np.abs(other).max()), rtol=0)


@torch.no_grad()
def alone(model, texts) -> np.ndarray:
    """Rewards of one text after the other."""
    return np.array([model(ids, attention_mask=torch.ones_like(ids)).logits.item()
                     for ids in (torch.tensor([text]) for text in texts)])


# -- rewards, features, states -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def setup():
    rng = random.Random(0)
    return tiny_sarm(), tiny_tokenizer(), [conversation(words(rng, 1, 9), words(rng, 1, 20)) for _ in range(23)]


@pytest.mark.parametrize("batch_tokens", [1, 37, None])
def test_rewards_features_and_states_come_back_in_input_order(setup, batch_tokens):
    model, tokenizer, talks = setup
    found = score(model, tokenizer, talks, features=True, states=True, batch_tokens=batch_tokens)
    for row, ids in enumerate(encode_conversations(tokenizer, talks)):
        with torch.inference_mode():
            output = model(torch.tensor([ids]))
        assert found.rewards[row] == pytest.approx(output.logits.item(), abs=1e-5)
        np.testing.assert_allclose(found.features[[row]].toarray()[0], output.code.dense()[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(found.states[row], output.hidden[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(found.features @ model.score.weight[0].detach().numpy(), found.rewards, atol=1e-4)
    assert found.features.dtype == found.states.dtype == np.float32 and found.rewards.dtype == np.float64
    close(score(model, tokenizer, talks[::-1]).rewards[::-1], found.rewards)


def test_long_conversations_keep_their_end_and_nothing_to_score_is_fine(setup):
    model, tokenizer, talks = setup
    assert score(model, tokenizer, talks, max_length=10).lengths.max() == 10
    whole = score(model, tokenizer, [conversation("w3", " ".join(["w4"] * 400))])
    assert whole.lengths.tolist() == [256], "the model's context is never exceeded"
    model.train()
    empty = score(model, tokenizer, [], features=True, states=True)
    assert model.training and empty.rewards.shape == (0,) and empty.features.shape == (0, 64)
    assert empty.states.shape == (0, 32) and score_rows(model, tokenizer, [])[0] == []
    model.eval()
    rows = [{"prompt": "w3", "chosen": ["w4"], "rejected": ["w5", "w6 w7"]},
            {"prompt": "w9", "chosen": ["w10", "w11"], "rejected": ["w12"]}]
    groups, scores = score_rows(model, tokenizer, rows)
    assert groups == [scores.rewards[:3].tolist(), scores.rewards[3:].tolist()]


def test_what_cannot_be_scored_is_refused(setup):
    model, tokenizer, talks = setup
    for bad, message in ((talks[0], "list of messages"), ([*talks[:3], talks[0][:1]], "last message has role")):
        with pytest.raises(DataError, match=message):
            score(model, tokenizer, bad)
    for wanted in ({"features": True}, {"states": True}):
        with pytest.raises(ModelError, match="no sparse features or states"):
            score(classifier(), tokenizer, talks, **wanted)
    with pytest.raises(ModelError, match=r"gives \(23, 3\) numbers"):
        score(classifier(num_labels=3), tokenizer, talks)
    broken = tiny_sarm()
    broken.score.weight.data[:] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        score(broken, tokenizer, talks)


def test_codes_at_sentence_ends_are_in_reading_order(setup):
    model, tokenizer, talks = setup
    _, owner, place = S.codes_at(model, tokenizer, talks)
    read = list(zip(owner, place, strict=True))
    assert read == sorted(read) and set(owner) == set(range(len(talks)))
    last, z = S.codes_at(model, tokenizer, talks, "last")[0], score(model, tokenizer, talks, features=True).features
    np.testing.assert_allclose(last.toarray(), z.toarray(), atol=1e-4)


@pytest.mark.parametrize("size", [1, 4000])  # squares of the larger states are beyond float16
def test_float16_gives_near_rewards_and_never_zeros(size):
    model, half, texts = tiny_sarm(), tiny_sarm(), best_of()
    model.model.embed_tokens.weight.data *= size
    half.load_state_dict(model.state_dict())
    exact, found = (score_ids(one, texts)[0] for one in (model, half.half()))
    assert np.abs(found).min() > 0 and np.median(np.abs(found - exact)) < 0.05 * np.abs(exact).mean()


# -- shared prefixes ---------------------------------------------------------------------------------------------------

@pytest.fixture
def forwards(monkeypatch):
    calls, real = [], S._shared
    monkeypatch.setattr(S, "_shared", lambda *args: (calls.append(args), real(*args))[1])
    return calls


@pytest.mark.parametrize("family", ["Llama", *GROUPED, "GPTNeoX", "GPT2"])
@pytest.mark.parametrize("kind", ["sarm", "classifier"])
def test_every_family_gives_the_plain_rewards(family, kind, forwards):
    model = (tiny_sarm if kind == "sarm" else classifier)(config_of(family))
    texts = best_of()
    random.Random(1).shuffle(texts)  # the answers to a prompt need not be neighbours
    assert can_share(model) and [len(row.members) for row in pack(model, texts)] == [4] * 5
    forwards.clear()
    close(score_ids(model, texts, batch_tokens=120)[0], alone(model, texts))
    assert len(forwards) > 1 and not model.training
    # the first of two BOS is seen by none: with the mask, and where the prefix is shared
    doubled, rows = [[2, *text] for text in texts[:1] * 2], [S.Row([0, 1], 10, 2 * len(texts[0]) + 2 - 10)]
    shared, plain, seen = (S._shared(model, doubled, [1, 1], rows)[0], S._plain(model, doubled, [1, 1], 0)[0],
                           S._plain(model, doubled, [0, 0], 0)[0])
    close(shared, plain)
    assert np.abs(seen - plain).max() > 1e-4
    if kind == "classifier":  # transformers reward the last token that is not the pad token
        model.config.pad_token_id = 5
        close(score_ids(model, texts, pad_id=5)[0], alone(model, texts))


@pytest.mark.parametrize(("common", "rows"), [(1, 2), (12, 2), (13, 1), (30, 1)])
def test_a_text_joins_a_row_if_that_saves_a_tenth_of_its_cost(common, rows):
    start = list(range(5, 5 + common))  # d = 32: 40 tokens cost 9,280; joined they cost 8,400 more, or 8,073
    assert len(pack(tiny_sarm(), [start + [end] * (40 - common) for end in (3, 4)])) == rows


@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "Gemma3Text"])
def test_texts_beyond_a_window_are_scored_plainly(family):
    model, texts = tiny_sarm(config_of(family, window=8)), best_of()
    assert len(pack(model, texts)) == len(texts)
    close(score_ids(model, texts)[0], alone(model, texts))
    shared = S._shared(model, texts, [0] * 4, [S.Row([0, 1, 2, 3], 12, sum(map(len, texts[:4])) - 36)])[0]
    assert np.abs(shared - alone(model, texts[:4])).max() > 1e-3, "and this is why"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [scalar, lambda: classifier(tiny_config(4)), tiny_sarm],
                         ids=["scalar", "classifier", "sarm"])
def test_rows_are_shared_in_bfloat16_and_are_as_near_to_float32_as_plain_ones(make, autocast, forwards):
    """Within a factor of 1.1 of the rms error of plain rows, over 320 texts."""
    exact, model = make(), make() if autocast else make().bfloat16()
    texts = best_of(4, 80)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        shared = score_ids(model, texts)[0]
        assert len(forwards) > 1 and can_share(model)
        S._SHARES[model] = False
        plain = score_ids(model, texts)[0]
    right = score_ids(exact, texts)[0]
    rms = [np.sqrt(np.mean((found - right) ** 2)) for found in (shared, plain)]
    assert 0 < rms[0] <= 1.1 * rms[1] and not np.array_equal(shared, plain)


def test_models_that_compute_something_else_are_found_by_the_probe():
    odd = tiny_sarm()
    forward = odd.forward
    odd.forward = lambda *args, **kwargs: type(out := forward(*args, **kwargs))(logits=out.logits + 1)
    assert not can_share(odd)
    close(score_ids(odd, best_of())[0], alone(tiny_sarm(), best_of()) + 1)
    assert not can_share(classifier(num_labels=2)) and not can_share(odd.model)


# -- evaluate ----------------------------------------------------------------------------------------------------------

def rb2(n: int = 6, subset: str = "Math", seed: int = 0, longest: int = 30) -> list[dict]:
    rng = random.Random(seed)
    return [{"id": str(i), "subset": subset, "prompt": words(rng, 2, 9), "chosen": [words(rng, 1, longest)],
             "rejected": [words(rng, 1, longest) for _ in range(3)], "num_correct": 1, "num_incorrect": 3,
             "total_completions": 4} for i in range(n)]


def ties(kind: str, number: int, correct: int, wrong: int = 2) -> dict:
    rng = random.Random(f"{kind}{number}")
    return {"id": f"{kind}:{number}", "subset": "Ties", "prompt": words(rng, 2, 5), "num_correct": correct,
            "chosen": [words(rng, 1, 4) for _ in range(correct)], "rejected": [words(rng, 1, 4) for _ in range(wrong)]}


def rm(n: int = 4, seed: int = 1) -> list[dict]:
    rng = random.Random(seed)
    return [{"id": i, "domain": ("chat", "math", "code", "safety-refuse")[i % 4], "prompt": words(rng, 2, 9),
             "chosen": [words(rng, 1, 20) for _ in range(3)], "rejected": [words(rng, 1, 20) for _ in range(3)]}
            for i in range(n)]


@pytest.fixture
def tiny():
    return prepared(classifier(), bos_tokenizer(), "tiny")


def stored(folder) -> dict:
    _, *found = map(json.loads, (folder / "scores.jsonl").read_text().splitlines())
    return {(line["benchmark"], line["row"], line["slot"]): line["score"] for line in found}


@torch.no_grad()
def by_hand(model, tokenizer, prompt: str, answer: str, side: str, max_length: int) -> float:
    """One text at a time, as the official loop at batch size 1."""
    text = tokenizer.apply_chat_template(conversation(prompt, answer), tokenize=False)
    tokenizer.truncation_side = side
    batch = tokenizer([text], return_tensors="pt", truncation=True, max_length=max_length)
    if batch["input_ids"][0, :2].tolist() == [2, 2]:
        batch["attention_mask"][0, 0] = 0
    return float(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


@pytest.mark.parametrize("own_side", ["left", "right"])
@pytest.mark.parametrize("make", [classifier, tiny_sarm])
def test_scores_are_those_of_the_official_loop(tmp_path, own_side, make, forwards, monkeypatch):
    monkeypatch.setattr(S, "ON_CPU", 200)
    tiny = prepared(make(), bos_tokenizer(), "tiny")
    tiny.tokenizer.truncation_side = own_side
    rows = {"rewardbench2": rb2(), "rm_bench": rm()}
    found = evaluate(tiny, rows, tmp_path, max_length=24)
    scores = stored(tmp_path)
    assert len(scores) == 6 * 4 + 4 * 6 and len(forwards) > 1
    for (name, number, slot), value in scores.items():
        row, side = rows[name][number], own_side if name == "rewardbench2" else "left"
        expected = by_hand(tiny.model, tiny.tokenizer, row["prompt"], answers(row)[slot], side, 24)
        assert value == pytest.approx(expected, abs=2e-5)
    text = found["text"]["rewardbench2"]
    assert 0 < text["truncated"] < text["texts"] == 24 and 0 < text["double_bos_masked"] <= 24


def test_a_killed_run_goes_on_and_a_torn_line_is_dropped(tmp_path, tiny, monkeypatch):
    rows = {"rewardbench2": rb2(8)}
    monkeypatch.setattr(S, "ON_CPU", 100)
    whole = evaluate(tiny, rows, tmp_path / "whole")
    calls, real = [], S._shared

    def dies(model, ids, masked, part):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(sum(len(row.members) for row in part))
        return real(model, ids, masked, part)
    monkeypatch.setattr(S, "_shared", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny, rows, tmp_path / "cut")
    monkeypatch.setattr(S, "_shared", real)
    file = tmp_path / "cut" / "scores.jsonl"
    kept = file.read_bytes()[:-9]  # the last line is torn
    file.write_bytes(kept)
    assert kept.count(b"\n") >= sum(calls[1:])  # the first call is the probe's
    evaluate(tiny, rows, tmp_path / "cut")
    assert file.read_bytes().startswith(kept[:kept.rfind(b"\n") + 1]), "what was scored is not scored again"
    undisturbed = (tmp_path / "whole" / "scores.jsonl").read_bytes()
    assert file.read_bytes() == undisturbed
    for lines in range(2, undisturbed.count(b"\n"), 3):  # a batch that is written in part is computed whole again
        file.write_bytes(b"".join(undisturbed.splitlines(keepends=True)[:lines]))
        evaluate(tiny, rows, tmp_path / "cut")
        assert file.read_bytes() == undisturbed
    for name in ("_shared", "_plain"):
        monkeypatch.setattr(S, name, lambda *args: pytest.fail("nothing is left to score"))
    assert evaluate(tiny, rows, tmp_path / "whole") == whole


def test_bad_rows_show_at_once_and_what_does_not_belong_together_never_mixes(tmp_path, tiny):
    with pytest.raises(DataError, match="num_correct"):
        evaluate(tiny, {"rewardbench2": [ties("ref", 1, 2, 0)]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    evaluate(tiny, {"rewardbench2": rb2(2)}, tmp_path / "out")
    with pytest.raises(ConfigError, match="another text"):
        evaluate(tiny, {"rewardbench2": rb2(2, seed=9)}, tmp_path / "out")
    with pytest.raises(ConfigError, match="another fingerprint"):  # the same sizes, other numbers
        evaluate(prepared(classifier(seed=1), tiny.tokenizer, "tiny"), {"rewardbench2": rb2(2)}, tmp_path / "out")
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ArtifactError, match="another process scores into"):
        evaluate(tiny, {"rewardbench2": rb2(2)}, tmp_path / "out")


def test_a_missing_subset_is_reported_and_never_averaged_away(tmp_path, tiny):
    found = evaluate(tiny, {"rewardbench2": rb2(3), "rm_bench": rm(3)}, tmp_path)
    first, second = found["benchmarks"]["rewardbench2"], found["benchmarks"]["rm_bench"]
    assert first["score"] is first["interval"] is second["score"] is second["hard_acc"] is None
    assert set(first["parts"]) == {"Math"} and second["missing"] == ["safety"]
    text = "\n".join(S.lines(found))
    assert "no overall score, missing: Factuality" in text and "no overall score, missing: safety" in text


def test_a_ties_prompt_without_its_partner_leaves_the_score_and_no_nan(tmp_path, tiny):
    rows = [row for name in ("Factuality", "Precise IF", "Math", "Safety", "Focus") for row in rb2(2, name, longest=3)]
    rows += [ties(kind, i, correct) for i in (1, 2) for kind, correct in (("ref", 1), ("tied", 2))]
    found = evaluate(tiny, {"rewardbench2": [*rows, ties("tied", 3, 2)]}, tmp_path)["benchmarks"]["rewardbench2"]
    assert found["score"] is not None and len(found["interval"]) == 2
    alone = S.summary("rewardbench2", [*rows[:2], ties("tied", 3, 2)], [[1.0, 0, 0, 0]] * 3)
    assert alone["parts"] == {"Factuality": 1.0, "Ties": None} and alone["score"] is None
    json.dumps(alone, allow_nan=False)


@pytest.mark.parametrize(("name", "rows", "scores", "equal"), [
    ("rewardbench2", rb2(3), [[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]], (3, 1)),
    ("rewardbench2", [ties("ref", 1, 2)], [[3, 1, 1, 0]], (1, 1)), ("rm_bench", rm(1), [[1, 2, 3, 1, 1, 0]], (9, 2))])
def test_decisions_on_equal_scores_are_counted(name, rows, scores, equal):
    found = S.summary(name, rows, scores)
    assert (found["decisions"], found["equal_scores"]) == equal


# -- loading -----------------------------------------------------------------------------------------------------------

def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_saved_sarm_and_the_hubs_cache_layout_are_loaded(tmp_path):
    sarm, cache = tiny_sarm(), tmp_path / "models--owner--tiny"
    save(sarm, tiny_tokenizer(), cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    loaded = S.load_scorer(cache)
    assert loaded.name.endswith("abc") and type(loaded.model) is type(sarm)
    assert loaded.fingerprint == prepared(sarm, tiny_tokenizer(), "other").fingerprint
    close(score_ids(loaded.model, best_of())[0], score_ids(sarm, best_of())[0])


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    save(classifier().model, tiny_tokenizer(), tmp_path / "decoder")
    file = tmp_path / "decoder" / "config.json"
    for change in ({}, {"num_labels": 1, "id2label": {"0": "a"}, "label2id": {"a": 0}}):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(ModelError, match="missing keys .*score.weight"):
            S.load_scorer(tmp_path / "decoder")


def test_a_plain_classifier_and_a_tokenizer_without_template_or_padding_work(tmp_path):
    tokenizer = tiny_tokenizer(template=None)
    tokenizer.pad_token = None
    loaded = S.load_scorer(save(classifier(), tokenizer, tmp_path / "plain"))
    assert evaluate(loaded, {"rewardbench2": rb2(2)}, tmp_path / "out")["benchmarks"]


CODE = '''
from types import SimpleNamespace
import torch
from transformers import LlamaModel, LlamaPreTrainedModel

class Gated(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.heads = torch.nn.Linear(config.hidden_size, 20, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        last = (attention_mask * torch.arange(input_ids.shape[1])).argmax(-1)
        rewards = self.heads(states[torch.arange(len(input_ids)), last])
        return SimpleNamespace(score=rewards.softmax(-1).square().sum(-1), logits=rewards)
'''


def test_models_with_their_own_code_need_consent_and_give_their_combined_score(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "modeling_custom.py").write_text(CODE)
    spec = importlib.util.spec_from_file_location("own_gated", folder / "modeling_custom.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    config = tiny_config(layers=2, num_labels=1)
    config.auto_map = {"AutoModelForSequenceClassification": "modeling_custom.Gated"}
    model = module.Gated(config).eval()
    save(model, tiny_tokenizer(), folder)
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        S.load_scorer(folder)
    loaded = S.load_scorer(folder, trust_remote_code=True)
    texts = best_of(2, 3)
    with torch.no_grad():
        expected = [model(torch.tensor([t]), torch.ones(1, len(t), dtype=torch.long)).score.item() for t in texts]
    close(score_ids(loaded.model, texts)[0], np.array(expected))
