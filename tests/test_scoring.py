"""Batch scoring: input order, invariance, features, and the benchmark unrolling."""

import random

import numpy as np
import pytest
import torch

from sarmlib.chat import encode_conversation
from sarmlib.errors import DataError, ModelError
from sarmlib.evaluation import rewardbench2, rm_bench
from sarmlib.evaluation.scoring import score_conversations, score_rewardbench2, score_rm_bench, token_batches
from tests.tiny import conversation, tiny_sarm, tiny_tokenizer, words


@pytest.fixture(scope="module")
def setup():
    rng = random.Random(0)
    return tiny_sarm(), tiny_tokenizer(), [conversation(words(rng, 1, 9), words(rng, 1, 20)) for _ in range(23)]


def test_rewards_and_features_come_back_in_input_order(setup):
    model, tokenizer, talks = setup
    scores = score_conversations(model, tokenizer, talks, features=True, batch_tokens=60)
    for row, talk in enumerate(talks):
        with torch.inference_mode():
            output = model(torch.tensor([encode_conversation(tokenizer, talk)]))
        assert scores.rewards[row] == pytest.approx(output.logits.item(), abs=1e-5)
        np.testing.assert_allclose(scores.features[[row]].toarray()[0], output.code.dense()[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(scores.features @ model.score.weight[0].detach().numpy(), scores.rewards, atol=1e-4)
    assert scores.n_truncated == scores.not_end_of_turn == 0 and scores.features.dtype == np.float32


def test_rewards_do_not_depend_on_batching_or_order(setup):
    model, tokenizer, talks = setup
    whole = score_conversations(model, tokenizer, talks).rewards
    for batch_tokens in (1, 37, 100, 10**6):
        rewards = score_conversations(model, tokenizer, talks, batch_tokens=batch_tokens).rewards
        np.testing.assert_allclose(rewards, whole, atol=1e-5)
    np.testing.assert_allclose(score_conversations(model, tokenizer, talks[::-1]).rewards[::-1], whole, atol=1e-5)


def test_token_batches_cover_everything_within_the_budget():
    lengths = [5, 1, 9, 9, 2, 3, 30]
    batches = list(token_batches(lengths, 18))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 18 for batch in batches)
    assert len(batches) < 7


def test_long_conversations_keep_their_end_and_are_counted(setup):
    model, tokenizer, talks = setup
    scores = score_conversations(model, tokenizer, talks, max_length=10)
    assert scores.lengths.max() == 10 and scores.not_end_of_turn == 0
    assert scores.n_truncated == sum(len(encode_conversation(tokenizer, talk)) > 10 for talk in talks) > 0


def test_the_context_length_of_the_model_is_never_exceeded():
    talk = conversation("w3", " ".join(["w4"] * 400))
    scores = score_conversations(tiny_sarm(), tiny_tokenizer(), [talk])
    assert scores.lengths.tolist() == [256] and scores.n_truncated == 1 and scores.not_end_of_turn == 0


def test_training_mode_is_restored_and_nothing_to_score_is_fine(setup):
    model, tokenizer, talks = setup
    model.train()
    empty = score_conversations(model, tokenizer, [], features=True)
    assert model.training and empty.rewards.shape == (0,) and empty.features.shape == (0, 64)
    model.eval()


def test_rewards_that_are_not_finite_are_refused(setup):
    _, tokenizer, talks = setup
    model = tiny_sarm()
    model.score.weight.data[:] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        score_conversations(model, tokenizer, talks)


def test_rewardbench2_rows_are_unrolled_chosen_first(setup):
    model, tokenizer, _ = setup
    rows = [{"id": "7", "prompt": "w3", "chosen": ["w4"], "rejected": ["w5", "w6 w7", "w8"], "num_correct": 1,
             "num_incorrect": 3, "total_completions": 4, "subset": "Math"},
            {"id": "ref:1", "prompt": "w9", "chosen": ["w10", "w11"], "rejected": ["w12"], "num_correct": 2,
             "num_incorrect": 1, "total_completions": 3, "subset": "Focus"}]
    scored, scores = score_rewardbench2(model, tokenizer, rows, features=True)
    direct = score_conversations(model, tokenizer, [conversation("w9", "w11"), conversation("w3", "w6 w7")]).rewards
    assert scored[1]["scores"][1] == pytest.approx(direct[0], abs=1e-6)
    assert scored[0]["scores"][2] == pytest.approx(direct[1], abs=1e-6)
    assert [len(row["scores"]) for row in scored] == [4, 3] and "scores" not in rows[0]
    assert scores.index.iloc[5].to_dict() == {"row": 1, "id": "ref:1", "slot": 1, "label": "chosen"}
    assert scores.features.shape == (7, 64) and set(rewardbench2.score(scored)["subsets"]) == {"Math", "Focus"}
    with pytest.raises(DataError, match="'chosen'"):
        score_rewardbench2(model, tokenizer, [{"id": "1", "prompt": "w3", "rejected": []}])


def test_rm_bench_rows_keep_the_order_of_styles(setup):
    model, tokenizer, _ = setup
    rows = [{"id": i, "prompt": f"w{i}", "chosen": ["w4", "w5", "w6"], "rejected": ["w7", "w8", "w9"], "domain": domain}
            for i, domain in enumerate(["chat", "math", "code", "safety-refuse", "safety-response"])]
    scored, scores = score_rm_bench(model, tokenizer, rows)
    direct = score_conversations(model, tokenizer, [conversation("w2", "w8")]).rewards[0]
    assert scored[2]["score_rejected"][1] == pytest.approx(direct, abs=1e-6)
    where = scores.index.query("row == 2 and slot == 4").iloc[0]
    assert (where["label"], where["style"]) == ("rejected", "detailed plain")
    assert 0 <= rm_bench.score(scored)["total_avg_acc"] <= 1
    with pytest.raises(DataError, match="3 chosen"):
        score_rm_bench(model, tokenizer, [{**rows[0], "chosen": ["w1"]}])
