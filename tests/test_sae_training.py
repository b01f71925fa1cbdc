"""SAE training: gradients of the real step, AuxK, exact resume, mixing, refusals; FVU and loss recovered."""

import errno
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from sarmlib.errors import ArtifactError, ConfigError, DataError
from sarmlib.sae import quality, training
from sarmlib.sae.quality import evaluate_sae, loss_recovered
from sarmlib.sae.topk import TopKSAE
from sarmlib.sae.training import CHECKPOINT, SAETrainConfig, ShuffleBuffer, auxk_loss, geometric_median, train_sae
from tests.tiny import tiny_config, tiny_tokenizer, words

D, M, K = 16, 64, 4
SIZES = dict(d_model=D, n_features=M, k=K)
FAST = SAETrainConfig(lr=3e-3, batch_size=64, log_every=5, steps=20)


def planted(n=512, seed=0):
    """Sparse sums of 24 planted directions: what a TopK SAE can find."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(24, D, generator=torch.Generator().manual_seed(99))
    active = torch.rand(n, 24, generator=generator) < 3 / 24
    clean = (active * (1 + torch.rand(n, 24, generator=generator))) @ directions
    return clean + 0.05 * torch.randn(n, D, generator=generator)


def train(x, config=FAST, **kwargs):
    return train_sae(x, config, **SIZES, progress=False, **kwargs)


def bits(*args, **kwargs):
    """Hash of the SAE of a training."""
    return train(*args, **kwargs)[0].content_hash()


def untrained():
    return TopKSAE(**SIZES, generator=torch.Generator().manual_seed(0))


def test_training_explains_planted_directions_on_held_out_data():
    config = SAETrainConfig(lr=3e-3, batch_size=256, steps=400, log_every=100)
    sae, log = train(planted(4096), config)
    held_out = evaluate_sae(sae, planted(1024, seed=1))
    assert held_out["fvu"] < 0.2 < evaluate_sae(untrained(), planted(1024, seed=1))["fvu"]
    assert held_out["l0"] <= K and log[-1]["step"] == 400
    assert log[-1]["loss"] < log[0]["loss"]
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(M))
    loose = train(planted(640), replace(FAST, steps=9, renorm_every=0))[0]
    assert 0 < (loose.W_dec.norm(dim=-1) - 1).abs().max() < 0.02


def test_first_step_is_adam_on_the_dense_gradient():
    """One whole training step from the geometric median, written with dense autograd and torch.optim.Adam."""
    x = planted(64)
    config = replace(FAST, steps=1, renorm_every=0)
    sae, _ = train(x, config)
    reference = untrained()
    h = reference.normalize(x)[0]
    with torch.no_grad():
        reference.b_pre.copy_(geometric_median(h))
    pre = (h - reference.b_pre) @ reference.W_enc.T
    values, indices = pre.topk(K)
    z = torch.zeros_like(pre).scatter(-1, indices, values).relu()
    ((z @ reference.W_dec + reference.b_pre - h).square().sum(-1) / h.square().sum(-1)).mean().backward()
    rows, grad = reference.W_dec.detach(), reference.W_dec.grad
    grad -= (grad * rows).sum(-1, keepdim=True) * rows  # the part that only changes a column's length
    torch.optim.Adam(reference.parameters(), lr=config.lr).step()
    for name, parameter in reference.named_parameters():
        # Adam's first step is lr * sign(gradient): entries with a gradient near 0 may differ, few of them
        close = torch.isclose(sae.get_parameter(name), parameter, atol=1e-5, rtol=0)
        assert close.float().mean() > 0.99, name


@pytest.mark.parametrize("k_aux", [3, 100])
def test_auxk_gradient_equals_dense_autograd_and_reaches_dead_encoder_rows(k_aux):
    sae = TopKSAE(**SIZES, encoder_bias=True, generator=torch.Generator().manual_seed(0)).double()
    x = sae.normalize(planted(10).double())[0]
    x_hat = sae.decode(sae.encode(planted(10).double())).detach()
    dead = torch.tensor([1, 5, 17, 40, 63])
    auxk_loss(sae, x, x_hat, dead, k_aux).backward()
    got = {name: parameter.grad for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    pre = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    masked = torch.full_like(pre, -torch.inf)
    masked[:, dead] = pre[:, dead]
    values, indices = masked.topk(min(k_aux, len(dead)))
    dense = torch.zeros_like(pre).scatter(-1, indices, values)
    error = x - x_hat
    ((dense @ sae.W_dec - error).square().sum(-1) / error.square().sum(-1)).mean().backward()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)
    assert (got["W_enc"][dead].norm(dim=-1) > 0).all() and (got["W_dec"][dead].norm(dim=-1) > 0).all()
    got["W_enc"][dead] = 0
    assert not got["W_enc"].any()  # of the others


def test_auxk_trains_features_that_never_fire():
    """Plain training leaves the rows of silent features as they are, AuxK trains them."""
    x = planted(2048)
    config = SAETrainConfig(lr=1e-3, batch_size=256, steps=40, log_every=1000, dead_after=512)
    sizes = SIZES | {"n_features": 1024, "k": 1}
    start = TopKSAE(**sizes, generator=torch.Generator().manual_seed(0))
    plain, log = train_sae(x, config, **sizes, progress=False)
    helped, _ = train_sae(x, replace(config, auxk_coef=1 / 32), **sizes, progress=False)
    untouched = (plain.W_enc == start.W_enc).all(-1)
    assert untouched.sum() > 1024 / 8 and log[-1]["dead_fraction"] > 1 / 8
    assert (helped.W_enc == start.W_enc).all(-1).sum() < untouched.sum() / 2


ASKED = []


def rest_of_stream(tensors=0, vectors=0):
    """planted() after so many tensors of 37 vectors."""
    assert vectors == 37 * tensors
    ASKED.append(tensors)
    return iter(planted().split(37)[tensors:])


@pytest.mark.parametrize("kind", ["tensor", "stream", "skipping"])
@pytest.mark.parametrize("auxk", [0.0, 1 / 32])
def test_a_run_that_dies_goes_on_from_its_last_checkpoint_to_the_same_bits(kind, auxk, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "BUFFER", 200)
    data = {"tensor": planted(), "stream": lambda: iter(planted().split(50)), "skipping": rest_of_stream}[kind]
    config = replace(FAST, auxk_coef=auxk, dead_after=128, checkpoint_every=3)
    whole, log = train(data, config)
    ASKED.clear()
    saves, real = [], training.save_file

    def full(tensors, path, **kwargs):
        real(tensors, path, **kwargs)
        saves.append(path)
        if len(saves) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk, pytest.raises(ArtifactError, match="No space left on device.*free some disk"):
        disk.setattr(training, "save_file", full)
        train(data, config, resume_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    resumed, resumed_log = train(data, config, resume_dir=tmp_path)
    assert resumed.content_hash() == whole.content_hash()
    assert kind != "skipping" or max(ASKED) > 5  # what was read is not made again
    assert resumed_log[-2:] == log[-2:] and log[-1]["step"] == 20
    assert bits(data, config, resume_dir=tmp_path) == whole.content_hash()  # finished: nothing is trained again


def test_checkpoint_of_another_run_or_other_data_or_damaged_is_refused(tmp_path):
    x = planted()
    train(x, replace(FAST, steps=5), resume_dir=tmp_path)
    with pytest.raises(ConfigError, match="another run.*'lr': 0.003.*'lr': 0.1"):
        train(x, replace(FAST, lr=0.1), resume_dir=tmp_path)
    with pytest.raises(ConfigError, match="another run.*'n_features': 64.*'n_features': 128"):
        train_sae(x, FAST, **SIZES | {"n_features": 128}, progress=False, resume_dir=tmp_path)
    with pytest.raises(DataError, match="differ"):
        train(x + 1, FAST, resume_dir=tmp_path)
    path = tmp_path / CHECKPOINT
    whole = bytearray(path.read_bytes())
    flipped = whole.copy()
    flipped[-3] ^= 1  # one bit of a weight
    for damaged in (flipped, whole[:-100], b""):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="no readable checkpoint .remove it to start again"):
            train(x, FAST, resume_dir=tmp_path)


def test_same_bits_from_a_memory_map_and_from_halves(tmp_path):
    x = planted()
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="r+"))
    assert bits(mapped) == bits(x) != bits(x, replace(FAST, seed=1))
    assert bits(x.half()) == bits(x.half().float())


def test_shuffle_buffer_keeps_every_vector_and_mixes():
    x, generator = torch.arange(1000.0)[:, None], torch.Generator().manual_seed(0)
    batches = list(ShuffleBuffer(20, 200, generator).mix(x.split(37)))
    assert all(len(batch) == 20 for batch in batches)
    out = torch.cat(batches)[:, 0]
    assert sorted(out.tolist()) == x[:, 0].tolist()
    assert (out[1:] - out[:-1]).abs().mean() > 30  # neighbours in time are no neighbours any more
    for n, sizes in ((50, [20, 20]), (7, [7])):  # an incomplete last batch is dropped, unless it is the only one
        assert [len(batch) for batch in ShuffleBuffer(20, 200, generator).mix(x[:n].split(7))] == sizes


def test_steps_of_tensor_and_stream_and_single_vectors():
    x = planted(300)
    one, nine = (replace(FAST, steps=steps, log_every=1) for steps in (None, 9))
    for data, config, steps in (([x[:150], x[150:]], one, 4), (x[:10], one, 1), (lambda: iter(x.split(50)), nine, 9),
                                (lambda: iter([x[:1]]), nine, 9), (x[:1].repeat(64, 1), nine, 9)):
        sae, log = train(data, config)
        assert len(log) == steps and all(torch.isfinite(parameter).all() for parameter in sae.parameters())
        json.dumps(log, allow_nan=False)


def test_the_geometric_median_ignores_an_outlier():
    x = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0] = 1e4
    median = geometric_median(x)
    assert median.norm() < 0.5 < x.mean(0).norm()
    away = torch.nn.functional.normalize(x - median, dim=-1)
    assert away.sum(0).norm() < 1e-3  # the gradient of the sum of distances is zero


def test_bad_settings_and_activations(tmp_path):
    for bad in (dict(steps=0), dict(auxk_coef=-1), dict(matmul_dtype="float16"), dict(lr=float("nan")), dict(seed=-1),
                dict(lr=float("inf")), dict(auxk_coef=float("inf")), dict(betas=(0.9, 2.0)), dict(betas=(-1.0, 0.9))):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            SAETrainConfig(**bad)
    x = planted()
    x[37, 3] = float("nan")
    with pytest.raises(DataError, match="NaN or infinite"):
        train(x, replace(FAST, batch_size=512), resume_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    for wrong in (torch.zeros(0, D), torch.zeros(5, D + 1), [torch.zeros(100, D + 1)]):
        with pytest.raises(DataError, match="shape|last dimension"):
            train(wrong)
    with pytest.raises(DataError, match="empty"):
        train([])
    with pytest.raises(DataError, match="empty in pass 2.*fresh stream"):
        train(iter([planted(100)]))


# Quality

def identity(d):
    """An SAE that reproduces every state: +-identity with ReLU."""
    sae = TopKSAE(d, 2 * d, 2 * d, normalize=False)
    with torch.no_grad():
        eye = torch.cat([torch.eye(d), -torch.eye(d)])
        sae.W_enc.copy_(eye), sae.W_dec.copy_(eye)
    return sae


def test_fvu_sparsity_and_dead_features_in_closed_form(monkeypatch):
    monkeypatch.setattr(quality, "CHUNK", 33)
    x = planted(1000)
    sae = TopKSAE(**SIZES)
    h = sae.normalize(x)[0].double()
    sae.W_dec.data.zero_()
    sae.b_pre.data.copy_(h.mean(0))
    assert evaluate_sae(sae, x)["fvu"] == pytest.approx(1, abs=1e-6)  # predicts the mean
    sae.b_pre.data.zero_()
    wanted = h.square().sum() / (h - h.mean(0)).square().sum()
    assert evaluate_sae(sae, x)["fvu"] == pytest.approx(wanted.item()) and wanted > 1
    exact = evaluate_sae(identity(16), x)
    assert exact["fvu"] < 1e-12 and exact["l0"] == pytest.approx(16) and exact["dead_fraction"] == 0
    found, active = evaluate_sae(untrained(), x[:20]), untrained().encode(x[:20]).dense() != 0
    dead = (~active.any(0)).double().mean().item()
    assert found["l0"] == pytest.approx(active.sum().item() / 20) and found["dead_fraction"] == pytest.approx(dead)
    assert 0 < dead < 1
    with pytest.raises(DataError, match="two different"):
        evaluate_sae(sae, x[:1].repeat(3, 1))


def test_loss_recovered_of_an_exact_and_of_an_empty_sae():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(initializer_range=0.3)).eval()
    tokenizer, rng = tiny_tokenizer(), random.Random(0)
    documents = ["", *(words(rng, 5, 20) for _ in range(6))]
    total = tokens = 0
    for text in documents[1:]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        total += float(model(ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    full = loss_recovered(model, tokenizer, identity(32), 2, documents, "every")
    assert full["ce"] == pytest.approx(total / tokens, rel=1e-5) and full["tokens"] == tokens
    assert full["ce_sae"] == pytest.approx(full["ce"], abs=1e-5)
    assert full["loss_recovered"] == pytest.approx(1, abs=1e-4)
    nothing = TopKSAE(32, 64, 2, normalize=False)
    with torch.no_grad():
        nothing.W_dec.zero_()
    none = loss_recovered(model, tokenizer, nothing, 2, documents, "every")
    assert none["ce_sae"] == none["ce_zero"] and none["loss_recovered"] == 0
    assert none["ce"] == full["ce"] != none["ce_zero"]
    assert not any(layer._forward_hooks for layer in model.model.layers)
    with pytest.raises(DataError, match="no token follows"):
        loss_recovered(model, tokenizer, nothing, 2, ["w1 w2"])
