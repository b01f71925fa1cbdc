"""One row for the answers to one prompt: the same rewards as text by text, on every family, or plain scoring."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from sarmlib.errors import ModelError
from sarmlib.evaluation import evaluate, prefix
from sarmlib.evaluation.prefix import can_share, packed_rewards, packs, score_with_shared_prefix
from sarmlib.evaluation.scoring import score_token_ids
from sarmlib.sarm.model import ScalarRewardConfig, ScalarRewardModel
from tests.test_evaluate import bos_tokenizer, classifier, rb2, rm
from tests.tiny import VOCAB, tiny_config, tiny_sarm

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=VOCAB,
             pad_token_id=0, bos_token_id=2, eos_token_id=5, max_position_embeddings=256)
GROUPED = dict(**SIZES, num_key_value_heads=2, head_dim=8)
FAMILIES = {
    "llama": lambda **_: tiny_config(4),
    "qwen2": lambda **_: Qwen2Config(**{**GROUPED}),
    "qwen3": lambda **_: Qwen3Config(**GROUPED),
    "mistral": lambda window=64: MistralConfig(**GROUPED, sliding_window=window),
    "gemma2": lambda window=64: Gemma2Config(**GROUPED, sliding_window=window),
    "gemma3": lambda window=64: Gemma3TextConfig(**GROUPED, sliding_window=window),
    "gpt_neox": lambda **_: GPTNeoXConfig(**SIZES),
    "gpt2": lambda **_: GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=VOCAB, pad_token_id=0),
}


def best_of(n: int = 4, prompts: int = 5, seed: int = 0) -> list[list[int]]:
    """Sequences of `prompts` prompts with `n` answers each, ending in <eot>; one answer is empty, two are equal."""
    rng, out = random.Random(seed), []
    for _ in range(prompts):
        prompt = [2, 3, *(rng.randrange(9, VOCAB) for _ in range(rng.randint(12, 20))), 5, 4]
        out += [[*prompt, *(rng.randrange(9, VOCAB) for _ in range(rng.randint(0, 9))), 5] for _ in range(n)]
    out[1], out[-2] = [*out[0][:-1], 5], [*prompt, 5]
    return out


@pytest.fixture
def forwards(monkeypatch):
    calls, real = [], prefix.packed_states
    monkeypatch.setattr(prefix, "packed_states", lambda *args: (calls.append(args), real(*args))[1])
    return calls


def close(one, other):
    np.testing.assert_allclose(one, other, atol=1e-5 * (1 + np.abs(other).max()), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["sarm", "classifier"])
def test_every_family_gives_the_plain_rewards(family, kind, forwards):
    torch.manual_seed(0)
    if kind == "sarm":
        model = tiny_sarm(FAMILIES[family]())
    else:
        config = FAMILIES[family]()
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config).eval()
        model.score.weight.data.normal_()
    texts = best_of()
    assert can_share(model) and [row.stop - row.start for row in packs(model, texts)] == [4] * 5
    forwards.clear()
    close(score_with_shared_prefix(model, texts, batch_tokens=120)[0], score_token_ids(model, texts)[0])
    assert len(forwards) > 1 and not model.training


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_texts_beyond_a_window_are_scored_plainly(family, forwards):
    model, texts = tiny_sarm(FAMILIES[family](window=8)), best_of()
    forwards.clear()
    assert len(packs(model, texts)) == len(texts)
    assert np.array_equal(score_with_shared_prefix(model, texts)[0], score_token_ids(model, texts)[0])
    shared, _ = packed_rewards(model, [texts[:4]], [12])  # and this is why
    assert np.abs(shared - score_token_ids(model, texts[:4])[0]).max() > 1e-3


def test_no_topk_and_scalar_models_share_too():
    torch.manual_seed(0)
    scalar = ScalarRewardModel(ScalarRewardConfig(backbone_config=tiny_config())).eval()
    scalar.score.weight.data.normal_()
    for model in (tiny_sarm(topk=False), scalar):
        assert can_share(model)
        close(score_with_shared_prefix(model, best_of())[0], score_token_ids(model, best_of())[0])


def test_features_come_back_in_input_order():
    model, texts = tiny_sarm(), best_of()
    (_, shared), (_, plain) = (score(model, texts, batch_tokens=120, features=True)
                               for score in (score_with_shared_prefix, score_token_ids))
    np.testing.assert_allclose(shared.toarray(), plain.toarray(), atol=1e-5)
    scalar = ScalarRewardModel(ScalarRewardConfig(backbone_config=tiny_config())).eval()
    with pytest.raises(ModelError, match="no sparse features"):
        score_with_shared_prefix(scalar, texts, features=True)


def test_a_masked_first_token_is_seen_by_none():
    model, texts = tiny_sarm(), [text[:14] + text[16:] for text in best_of(3, 2)]
    hidden, _ = packed_rewards(model, [texts[:3], texts[3:]], [8, 8], [True, False])
    for i, text in enumerate(texts):
        mask = torch.ones(1, len(text), dtype=torch.int64)
        mask[0, 0] = int(i >= 3)
        with torch.no_grad():
            assert hidden[i] == pytest.approx(model(torch.tensor([text]), mask).logits.item(), abs=1e-4)


def test_rows_are_shared_only_where_it_costs_less():
    model = tiny_sarm()  # d = 32: attention weighs as much as the products at 192 tokens
    long = [[2, *range(10, 13), *([20 + i] * 60), 5] for i in range(3)]
    assert [row.stop - row.start for row in packs(model, long)] == [1, 1, 1]  # four common tokens of 65
    half = [[2, *[9] * 40, *([20 + i] * 5), 5] for i in range(3)]
    assert packs(model, half) == [(0, 3, 41, 59)]
    assert packs(model, []) == [] and packs(model, half[:1]) == [(0, 1, 47, 47)]
    many = packs(model, [[2, *[9] * 40, 20 + i % 60, 5] for i in range(3000)])
    assert len(many) > 2 and max(row.length for row in many) <= prefix.LONGEST_ROW
    assert score_with_shared_prefix(model, [])[0].shape == (0,)


def test_evaluate_shares_rows_in_float32_only_and_writes_the_same_scores(tmp_path, forwards):
    def scores(model, folder):
        scorer = evaluate.prepared(model, bos_tokenizer(), "tiny")
        evaluate.evaluate(scorer, {"rewardbench2": rb2(6, longest=6), "rm_bench": rm(4)}, tmp_path / folder)
        lines = map(json.loads, (tmp_path / folder / "scores.jsonl").read_text().splitlines()[1:])
        return {(line["benchmark"], line["row"], line["slot"]): line["score"] for line in lines}
    model = classifier()
    shared, used = scores(model, "shared"), len(forwards)
    prefix._KNOWN[model] = False
    plain = scores(model, "plain")
    assert used > 1 and len(forwards) == used and shared.keys() == plain.keys() and len(plain) == 48
    assert max(abs(shared[key] - plain[key]) for key in plain) < 1e-5
    scores(classifier().bfloat16(), "half")
    assert len(forwards) == used


def test_models_that_compute_something_else_are_found_by_the_probe():
    odd = tiny_sarm()
    forward = odd.forward
    odd.forward = lambda *args, **kwargs: type(out := forward(*args, **kwargs))(logits=out.logits + 1)
    assert not can_share(odd)
    close(score_with_shared_prefix(odd, best_of())[0], score_token_ids(tiny_sarm(), best_of())[0] + 1)
    torch.manual_seed(0)
    two_sided = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=2))
    assert not can_share(two_sided) and not can_share(odd.model)


def test_rewards_that_are_not_finite_are_refused():
    model = tiny_sarm()
    assert can_share(model)
    model.score.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        score_with_shared_prefix(model, best_of())
