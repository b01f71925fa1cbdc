"""Pretraining of the toy backbone in miniature: which layers run and learn, and going on after a stop."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from sarmlib.data.toyworld import pretrain as pt
from sarmlib.data.toyworld import probe
from sarmlib.data.toyworld.datasets import corpus
from sarmlib.data.toyworld.grammar import TASKS
from sarmlib.data.toyworld.tokenizer import build_tokenizer
from sarmlib.errors import ConfigError

TINY = pt.PretrainConfig(d_model=16, n_layers=2, n_heads=2, d_ff=32, layer=1, rows=4, lesson_steps=4, widen=(1, 3),
                         corpus_steps=4, warmup=2)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(4000)


def tiny_model(tokenizer, config=TINY):
    return pt.build_model(config, len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id,
                          tokenizer.eos_token_id)


def some_ids(tokenizer, n=6):
    return tokenizer(list(corpus(n, 0)), return_tensors="pt", padding=True, add_special_tokens=False)["input_ids"]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def is_upper(name):
    return name.startswith("model.layers.") and int(name.split(".")[2]) >= TINY.layer


# -- the model and its loss ------------------------------------------------------------------------------------------

@torch.no_grad()
def test_upper_layers_start_as_the_identity(tokenizer):
    model, ids = tiny_model(tokenizer).eval(), some_ids(tokenizer)
    full = model(ids).logits
    model.config.num_hidden_layers = TINY.layer
    assert torch.equal(model(ids).logits, full)
    model.config.num_hidden_layers = TINY.n_layers
    torch.nn.init.normal_(model.model.layers[TINY.layer].mlp.down_proj.weight)
    assert not torch.allclose(model(ids).logits, full)


def test_lower_layers_look_for_equal_tokens_from_the_start(tokenizer):
    first, second = (layer.self_attn for layer in tiny_model(tokenizer).model.layers)
    for attention in (first, second):
        assert torch.equal(attention.q_proj.weight, attention.k_proj.weight)
    assert torch.allclose(first.o_proj.weight, 0.5 * first.v_proj.weight.T) and not second.o_proj.weight.any()


def test_the_model_depends_on_its_seed_alone(tokenizer):
    one, two, other = (weights(tiny_model(tokenizer, replace(TINY, seed=s))) for s in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_lessons_run_and_train_the_lower_layers_only(tokenizer):
    model, runs = tiny_model(tokenizer), []
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, number=number: runs.append(number))
    batch, weight = next(pt.batches(tokenizer, TINY))
    loss, last, early = pt.training_loss(model, batch, weight, TINY, lessons=True)
    loss.backward()
    assert runs == [0] and loss is last is early and model.config.num_hidden_layers == TINY.n_layers
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == is_upper(name), name
    runs.clear()
    model.zero_grad()
    loss, last, early = pt.training_loss(model, batch, weight, TINY)
    loss.backward()
    assert runs == [0, 1] and all(p.grad is not None for p in model.parameters())
    assert torch.isclose(loss, last + TINY.early_exit_weight * early)
    assert torch.isclose(last, early)  # the layers above l are still the identity


def test_loss_is_the_weighted_next_token_cross_entropy(tokenizer):
    model = tiny_model(tokenizer).eval()
    batch, weight = next(pt.batches(tokenizer, TINY, start=5))
    with torch.no_grad():
        log_p = model(batch).logits.log_softmax(-1)
        total = count = 0.0
        for row, t in itertools.product(range(len(batch)), range(1, batch.shape[1])):
            total -= weight[row, t] * log_p[row, t - 1, batch[row, t]]
            count += weight[row, t]
        _, last, _ = pt.training_loss(model, batch, weight, TINY)
    assert float(last) == pytest.approx(float(total / count), rel=1e-5)


def test_remarks_weigh_more_and_padding_nothing(tokenizer):
    remarked = 0
    for batch, weight in pt.batches(tokenizer, replace(TINY, rows=16), start=3):
        for ids, w in zip(batch.tolist(), weight.tolist(), strict=True):
            ends, wanted = 0, []
            for token in ids:
                wanted.append(0.0 if token == tokenizer.pad_token_id else TINY.remark_weight if ends >= 2 else 1.0)
                ends += token == tokenizer.eos_token_id
            assert w == wanted
            remarked += TINY.remark_weight in w
    assert remarked > 20


def test_a_steps_batch_depends_on_seed_and_step_alone(tokenizer):
    whole, later = list(pt.batches(tokenizer, TINY)), list(pt.batches(tokenizer, TINY, start=3))
    assert len(whole) == TINY.steps == 8 and len(later) == 5
    for (a, u), (b, v) in zip(whole[3:], later, strict=True):
        assert torch.equal(a, b) and torch.equal(u, v)
    other, _ = next(pt.batches(tokenizer, replace(TINY, seed=1)))
    assert other.shape != whole[0][0].shape or not torch.equal(other, whole[0][0])
    assert all((batch != tokenizer.unk_token_id).all() for batch, _ in whole)


def test_learning_rate_warms_up_twice_and_ends_at_a_twentieth():
    config = replace(TINY, lesson_steps=100, corpus_steps=200, warmup=10, lr=1.0)
    rates = [pt.learning_rate(step, config) for step in range(config.steps)]
    assert rates[0] == pytest.approx(0.1) and set(rates[9:100]) == {1.0}
    assert rates[100] == pytest.approx(0.1) and max(rates[100:]) > 0.98
    assert rates[-1] == pytest.approx(0.05, abs=0.01) and min(rates) > 0


# -- stopping and going on -------------------------------------------------------------------------------------------

class Stop(Exception):
    pass


def train(tokenizer, folder, config=TINY, *, stop_at=None, monkeypatch=None, **kwargs):
    if stop_at is not None:
        calls, real = itertools.count(), pt.training_loss

        def loss(*args, **keywords):
            if next(calls) == stop_at:
                raise Stop
            return real(*args, **keywords)

        monkeypatch.setattr(pt, "training_loss", loss)
    try:
        return pt.pretrain(tokenizer, config, folder, progress=False, **kwargs)
    finally:
        if stop_at is not None:
            monkeypatch.undo()


def told(log):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in log]


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    return train(tokenizer, tmp_path_factory.mktemp("whole"), log_every=3, save_every=2)


def test_training_changes_the_weights_and_logs_what_it_did(tokenizer, whole, tmp_path):
    model, log = whole
    before = weights(tiny_model(tokenizer))
    assert all(not torch.equal(before[name], value) for name, value in weights(model).items())
    assert [entry["step"] for entry in log] == [3, 6, 8] and all(np.isfinite(e["loss"]) for e in log)
    assert set(log[0]["verdicts"]) == set(TASKS) and all(0 <= v <= 1 for v in log[0]["verdicts"].values())
    batches = [int((weight > 0).sum()) for _, weight in pt.batches(tokenizer, TINY)]
    assert [entry["tokens"] for entry in log] == [sum(batches[:n]) for n in (3, 6, 8)]


def test_lessons_leave_the_upper_layers_alone(tokenizer, tmp_path):
    model, log = train(tokenizer, tmp_path, replace(TINY, corpus_steps=0), log_every=4)
    before = weights(tiny_model(tokenizer))
    changed = {name for name, value in weights(model).items() if not torch.equal(before[name], value)}
    assert changed == {name for name in before if not is_upper(name)}
    assert log[-1]["loss"] == log[-1]["loss_layer_l"]


@pytest.mark.parametrize("stop_at", [3, 4, 5, 7])
def test_an_interrupted_run_goes_on_to_the_same_weights_and_log(tokenizer, whole, tmp_path, monkeypatch, stop_at):
    with pytest.raises(Stop):
        train(tokenizer, tmp_path, stop_at=stop_at, monkeypatch=monkeypatch, log_every=3, save_every=2)
    assert (tmp_path / "state.safetensors").exists()
    model, log = train(tokenizer, tmp_path, log_every=3, save_every=2)
    for name, value in weights(whole[0]).items():
        assert torch.equal(value, weights(model)[name]), name
    assert told(log) == told(whole[1])
    seconds = [entry["seconds"] for entry in log]
    assert seconds == sorted(seconds)


def test_going_on_really_goes_on(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        train(tokenizer, tmp_path, stop_at=7, monkeypatch=monkeypatch, log_every=2, save_every=2)
    with pytest.raises(Stop):  # two steps are left, of which the first stops here
        train(tokenizer, tmp_path, stop_at=0, monkeypatch=monkeypatch, log_every=2, save_every=2)
    model, _ = train(tokenizer, tmp_path, stop_at=2, monkeypatch=monkeypatch, log_every=2, save_every=2)
    assert model is not None


def test_a_checkpoint_of_other_settings_is_refused(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        train(tokenizer, tmp_path, stop_at=3, monkeypatch=monkeypatch, log_every=2, save_every=2)
    with pytest.raises(ConfigError, match="other settings.*move it away"):
        train(tokenizer, tmp_path, replace(TINY, seed=1))
    with pytest.raises(ConfigError, match="state.safetensors"):
        train(tokenizer, tmp_path, replace(TINY, lr=1e-3))


# -- probes ----------------------------------------------------------------------------------------------------------

def planted(n, seed, strength):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    x = rng.normal(size=(n, 12)).astype(np.float32) * np.logspace(-3, 3, 12)
    return x + strength * np.outer(y, np.r_[0, 1, np.zeros(10)]), y


def test_probe_reads_what_is_planted_and_nothing_in_noise():
    (x, y), (u, v) = planted(400, 0, 1.0), planted(400, 1, 1.0)
    assert probe.probe_auroc(x, y, u, v) == 1.0
    assert probe.probe_auroc(x, y, u, ~v) == 0.0
    (x, y), (u, v) = planted(800, 2, 0.0), planted(800, 3, 0.0)
    assert abs(probe.probe_auroc(x, y, u, v) - 0.5) < 0.07


def test_probe_auroc_counts_ties_half():
    x = np.array([[0.0], [0], [1], [1]])
    y = np.array([True, False, True, False])
    assert probe.probe_auroc(x, np.array([False, False, True, True]), x, y) == 0.5


def test_probe_conversations_are_balanced_and_drawn_from_their_side():
    for side in ("pairs", "benchmark"):
        answers, texts = probe.conversations(("fact",), 60, side, 0)
        assert sum(a.good for a in answers) == 30 and len(texts) == 60
    words = [{word for text in probe.conversations(("fact",), 200, side, 0)[1] for word in text.split()}
             for side in ("pairs", "benchmark")]
    assert {"Varn", "Varn?<eot><assistant>", "Varn."} & words[0] and not {"Varn", "Varn."} & words[1]


def test_states_are_those_of_the_last_token_whatever_the_padding(tokenizer):
    torch.manual_seed(0)
    model = tiny_model(tokenizer).eval()
    texts = [text for text in corpus(9, 3)]
    states = probe.last_token_states(model, tokenizer, texts, batch_size=4)
    assert states.shape == (TINY.n_layers + 1, 9, TINY.d_model)
    for n, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            alone = model(ids, output_hidden_states=True).hidden_states
        np.testing.assert_allclose(states[:, n], torch.stack([h[0, -1] for h in alone]).numpy(), atol=1e-5)


def test_report_has_every_attribute_and_layer(tokenizer):
    report = probe.probe_report(tiny_model(tokenizer), tokenizer, n=24)
    assert set(report.attribute) == set(probe.ATTRIBUTES) and set(report.layer) == {1, 2}
    assert len(report) == 2 * len(probe.ATTRIBUTES) and report.auroc.between(0, 1).all()
    again = probe.probe_report(tiny_model(tokenizer), tokenizer, n=24)
    assert report.equals(again)
