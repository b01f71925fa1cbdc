"""SAE training: gradients of the real step, AuxK, exact resume, mixing, metrics, refusals."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import types
from dataclasses import replace

import pytest
import torch

from sarmlib.errors import ArtifactError, ConfigError, DataError
from sarmlib.sae import training
from sarmlib.sae.model import TopKSAE, normalized_mse
from sarmlib.sae.training import (
    CHECKPOINT,
    METRICS,
    SAETrainConfig,
    auxk_loss,
    evaluate_sae,
    feature_density,
    geometric_median,
    shuffle_buffer,
    train_sae,
)
from tests.helpers import ROOT

D, M, K = 16, 64, 4
SIZES = dict(d_model=D, n_features=M, k=K)
FAST = SAETrainConfig(lr=3e-3, batch_size=64, log_every=5, steps=20)


def planted(n=512, seed=0):
    """Sparse sums of 24 planted directions: what a TopK SAE can find."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(24, D, generator=torch.Generator().manual_seed(99))
    active = torch.rand(n, 24, generator=generator) < 3 / 24
    return (active * (1 + torch.rand(n, 24, generator=generator))) @ directions + 0.05 * torch.randn(
        n, D, generator=generator
    )


def train(x, config=FAST, **kwargs):
    return train_sae(x, config, **SIZES, progress=False, **kwargs)


def bits(sae):
    return sae.content_hash()


def test_training_explains_planted_directions_on_held_out_data():
    x = planted(4096)
    config = SAETrainConfig(lr=3e-3, batch_size=256, epochs=25, log_every=100)
    sae, log = train(x, config)
    held_out = evaluate_sae(sae, planted(1024, seed=1))
    untrained = evaluate_sae(TopKSAE(**SIZES, generator=torch.Generator().manual_seed(0)), planted(1024, seed=1))
    assert held_out["fvu"] < 0.2 < untrained["fvu"]
    assert held_out["l0"] <= K and log[-1]["step"] == 400 and log[-1]["samples"] == 102_400
    assert log[-1]["loss"] < log[0]["loss"]
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(M))


def test_first_step_is_adam_on_the_dense_gradient():
    """One whole training step, written with dense autograd and torch.optim.Adam."""
    x = planted(64)
    config = replace(FAST, steps=1, tangent=False, b_pre_init="mean", renorm_every=0)
    sae, _ = train(x, config)
    reference = TopKSAE(**SIZES, generator=torch.Generator().manual_seed(0))
    h = reference.normalize(x)[0]
    with torch.no_grad():
        reference.b_pre.copy_(h.mean(0))
    pre = (h - reference.b_pre) @ reference.W_enc.T
    values, indices = pre.topk(K)
    z = torch.zeros_like(pre).scatter(-1, indices, values).relu()
    ((z @ reference.W_dec + reference.b_pre - h).square().sum(-1) / h.square().sum(-1)).mean().backward()
    torch.optim.Adam(reference.parameters(), lr=config.lr).step()
    for name, parameter in reference.named_parameters():
        # Adam's first step is lr * sign(gradient): entries with a gradient near 0 may differ, few of them
        close = torch.isclose(sae.get_parameter(name), parameter, atol=1e-5, rtol=0)
        assert close.float().mean() > 0.999, name


@pytest.mark.parametrize("k_aux", [3, 100])
def test_auxk_gradient_equals_dense_autograd_and_reaches_dead_encoder_rows(k_aux):
    sae = TopKSAE(**SIZES, encoder_bias=True, generator=torch.Generator().manual_seed(0)).double()
    x = sae.normalize(planted(10).double())[0]
    x_hat = sae.decode(sae._encode_normalized(x)).detach()
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
    alive = torch.ones(M, dtype=torch.bool)
    alive[dead] = False
    assert got["W_enc"][alive].abs().sum() == 0


def test_auxk_gradcheck():
    sae = TopKSAE(6, 16, 2, generator=torch.Generator().manual_seed(0)).double()
    x = sae.normalize(torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    dead, x_hat = torch.tensor([2, 3, 9]), torch.zeros(4, 6, dtype=torch.float64)

    def loss(W_enc, b_pre, W_dec):
        return torch.func.functional_call(_Aux(sae), {"sae.W_enc": W_enc, "sae.b_pre": b_pre, "sae.W_dec": W_dec},
                                          (x, x_hat, dead))

    assert torch.autograd.gradcheck(loss, (sae.W_enc, sae.b_pre, sae.W_dec))


class _Aux(torch.nn.Module):
    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x, x_hat, dead):
        return auxk_loss(self.sae, x, x_hat, dead, 2)


def test_auxk_trains_features_that_never_fire():
    """A common offset silences many features: plain training leaves their rows as they are, AuxK trains them."""
    x = planted(2048)
    x = x + 30 * torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(5)), dim=0)
    config = SAETrainConfig(lr=1e-3, batch_size=256, epochs=5, log_every=1000, dead_after=512, b_pre_init="zeros")
    start = TopKSAE(**SIZES, generator=torch.Generator().manual_seed(0))
    plain, log = train(x, config)
    helped, aux_log = train(x, replace(config, auxk_coef=1 / 32))
    untouched = (plain.W_enc == start.W_enc).all(-1)
    assert untouched.sum() > M / 8 and log[-1]["dead_fraction"] > 1 / 8
    assert (helped.W_enc == start.W_enc).all(-1).sum() < untouched.sum() / 2
    assert log[-1]["aux_loss"] == 0 < aux_log[-1]["aux_loss"] < 1  # 1 would be rebuilding nothing


def test_dead_fraction_counts_samples():
    x = planted(640)
    _, log = train(x, replace(FAST, steps=10, log_every=1, dead_after=3 * 64))
    assert [entry["dead_fraction"] for entry in log[:3]] == [0, 0, 0] and log[0]["samples"] == 64
    _, never = train(x, replace(FAST, steps=10, log_every=1))
    assert all(entry["dead_fraction"] == 0 for entry in never)
    wide, log = train_sae(x, replace(FAST, steps=10, log_every=1, dead_after=3 * 64), d_model=D, n_features=2048, k=1,
                          progress=False)
    fired = [entry["dead_fraction"] for entry in log]
    assert fired[2] == 0 and fired[3] > 0.5


def test_renorm_and_tangent_keep_columns_at_unit_length():
    x = planted(640)
    drift = []
    for tangent in (True, False):
        sae, _ = train(x, replace(FAST, steps=9, renorm_every=0, tangent=tangent))
        drift.append((sae.W_dec.norm(dim=-1) - 1).abs().mean().item())
    assert drift[0] < 0.5 * drift[1]
    sae, _ = train(x, replace(FAST, steps=13))
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(M))


def test_same_seed_same_bits_other_seed_other_bits():
    x = planted()
    first = bits(train(x)[0])
    assert bits(train(x.clone())[0]) == first
    assert bits(train(x, replace(FAST, seed=1))[0]) != first
    assert bits(train(x, replace(FAST, log_every=7))[0]) == first


def stream_of(x):
    def stream():
        yield from x.split(50)

    return stream


@pytest.mark.parametrize("kind", ["tensor", "stream"])
@pytest.mark.parametrize("auxk", [0.0, 1 / 32])
def test_resume_is_bit_exact(kind, auxk, tmp_path):
    x = planted()
    data = x if kind == "tensor" else stream_of(x)
    config = replace(FAST, auxk_coef=auxk, dead_after=128, shuffle_buffer=200, warmup_steps=4)
    whole, log = train(data, config)
    part, _ = train(data, replace(config, steps=11), resume_dir=tmp_path)
    resumed, resumed_log = train(data, config, resume_dir=tmp_path)
    assert bits(resumed) == bits(whole) != bits(part)
    strip = [{k: v for k, v in entry.items() if k != "seconds"} for entry in log if entry["step"] > 11]
    assert [{k: v for k, v in e.items() if k != "seconds"} for e in resumed_log if e["step"] > 11] == strip
    again, _ = train(data, config, resume_dir=tmp_path)  # finished: nothing is trained again
    assert bits(again) == bits(whole)


def test_signal_leaves_a_checkpoint_and_restores_the_handler(tmp_path):
    x = planted()
    config = replace(FAST, shuffle_buffer=128)
    whole, _ = train(stream_of(x), config)
    for number, raised in ((signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)):
        folder = tmp_path / number.name

        def stopping(number=number):
            for count, part in enumerate(x.split(50)):
                if count == 7:
                    os.kill(os.getpid(), number)
                yield part

        before = signal.getsignal(number)
        with pytest.raises(raised):
            train(stopping, config, resume_dir=folder)
        assert signal.getsignal(number) is before
        assert [path.name for path in folder.iterdir()] == [CHECKPOINT]
        resumed, _ = train(stream_of(x), config, resume_dir=folder)
        assert bits(resumed) == bits(whole)


def test_resume_after_a_real_kill(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys, torch
        from dataclasses import replace
        from tests.test_sae_training import FAST, planted, train
        def stream():
            for count, part in enumerate(planted().split(50)):
                if count == 9:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield part
        torch.set_num_threads(1)
        train(stream, replace(FAST, shuffle_buffer=128, checkpoint_every=2), resume_dir=sys.argv[1])
    """)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / CHECKPOINT).exists()
    config = replace(FAST, shuffle_buffer=128)
    resumed, log = train(stream_of(planted()), config, resume_dir=tmp_path)
    assert bits(resumed) == bits(train(stream_of(planted()), config)[0])


def test_checkpoint_of_another_run_or_other_data_or_damaged_is_refused(tmp_path):
    x = planted()
    train(x, replace(FAST, steps=5), resume_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"lr=0\.003 \(now 0\.1\)"):
        train(x, replace(FAST, lr=0.1), resume_dir=tmp_path)
    with pytest.raises(ConfigError, match="n_features=64"):
        train_sae(x, FAST, d_model=D, n_features=128, k=K, progress=False, resume_dir=tmp_path)
    with pytest.raises(DataError, match="differ"):
        train(x + 1, FAST, resume_dir=tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="damaged"):
        train(x, FAST, resume_dir=tmp_path)


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    x, config = planted(), replace(FAST, checkpoint_every=5)
    whole, _ = train(x, config)
    saves, real = [], training.save_file

    def full(tensors, path, **kwargs):
        real(tensors, path, **kwargs)
        saves.append(path)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(ArtifactError, match="No space left on device.*check space"):
        train(x, config, resume_dir=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert bits(train(x, config, resume_dir=tmp_path)[0]) == bits(whole)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=METRICS):
        train(x, config, log_dir=tmp_path / "file")


def test_metrics_go_to_a_file_of_json_lines_that_a_resumed_run_goes_on_with(tmp_path):
    x = planted()
    train(x, replace(FAST, steps=10), resume_dir=tmp_path, log_dir=tmp_path / "log")
    with open(tmp_path / "log" / METRICS, "a") as file:
        file.write('{"step": 11, "half-writ')  # as a kill leaves it
    _, log = train(x, FAST, resume_dir=tmp_path, log_dir=tmp_path / "log")
    lines = (tmp_path / "log" / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == log and [entry["step"] for entry in log] == [5, 10, 15, 20]


def test_tensorboard_gets_the_metrics_where_it_is_installed(tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            self.folder = folder

        def add_scalar(self, name, value, step):
            seen.append((name, step))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    train(planted(), FAST, log_dir=tmp_path)
    assert ("sae/fvu", 20) in seen and ("sae/dead_fraction", 5) in seen and seen[-1] == "closed"


def test_shuffle_buffer_keeps_every_vector_and_mixes():
    x = torch.arange(1000.0)[:, None]
    generator = torch.Generator().manual_seed(0)
    batches = list(shuffle_buffer(x.split(37), 20, 200, generator))
    assert all(len(batch) == 20 for batch in batches)
    out = torch.cat(batches)[:, 0]
    assert sorted(out.tolist()) == x[:, 0].tolist()
    assert (out[1:] - out[:-1]).abs().mean() > 30  # neighbours in time are no neighbours any more
    delay = torch.arange(1000.0)[out.argsort()] - torch.arange(1000.0)  # emission place minus arrival place
    assert delay.min() >= -240  # nothing is given out before it arrived
    last = list(shuffle_buffer(torch.arange(50.0)[:, None].split(7), 20, 200, generator))
    assert [len(batch) for batch in last] == [20, 20]  # incomplete last batch dropped
    assert [len(batch) for batch in shuffle_buffer([x[:7]], 20, 200, generator)] == [7]  # unless it is the only one
    assert list(shuffle_buffer([], 20, 200, generator)) == []


def test_first_half_leaves_uniformly():
    """Each vector of the first full buffer leaves in the first round with probability 1/2, wherever it stood."""
    counts = torch.zeros(100)
    for seed in range(400):
        stream = shuffle_buffer(torch.arange(100.0)[:, None].split(10), 10, 100, torch.Generator().manual_seed(seed))
        first = torch.cat([next(stream) for _ in range(5)])[:, 0].long()
        counts[first] += 1
    assert abs(counts.mean() - 200) < 1e-6
    assert counts.min() > 150 and counts.max() < 250


def test_epochs_and_steps_for_tensor_and_stream():
    x = planted(300)
    two = replace(FAST, steps=None, epochs=2, log_every=1)
    assert len(train(x, two)[1]) == 8
    assert len(train(stream_of(x), two)[1]) == 8
    assert len(train([x[:150], x[150:]], replace(two, epochs=1))[1]) == 4
    assert len(train(x[:10], replace(two, epochs=3))[1]) == 3  # fewer vectors than a batch
    assert len(train(stream_of(x), replace(FAST, steps=9, log_every=1))[1]) == 9


def test_b_pre_starts_at_the_data():
    x = planted() + 5
    config = replace(FAST, steps=1, lr=1e-12, batch_size=512)
    h = TopKSAE(**SIZES).normalize(x)[0]
    torch.testing.assert_close(train(x, replace(config, b_pre_init="mean"))[0].b_pre, h.mean(0), atol=1e-5, rtol=0)
    assert train(x, replace(config, b_pre_init="zeros"))[0].b_pre.abs().max() < 1e-6
    torch.testing.assert_close(train(x, config)[0].b_pre, geometric_median(h), atol=1e-4, rtol=0)


def test_geometric_median_is_the_minimiser_and_ignores_an_outlier():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, dtype=torch.float64, generator=generator)
    x[0] = 1e4
    median = geometric_median(x)

    def cost(point):
        return (x - point).norm(dim=-1).sum()

    assert median.norm() < 0.5 < x.mean(0).norm()
    steps = 1e-3 * torch.randn(50, 3, dtype=torch.float64, generator=generator)
    assert all(cost(median) <= cost(median + step) + 1e-9 for step in steps)


def test_learning_rate_schedule():
    _, log = train(planted(), replace(FAST, steps=10, log_every=1, warmup_steps=4, decay_fraction=0.5))
    wanted = [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert [entry["lr"] / FAST.lr for entry in log] == pytest.approx(wanted)


def test_fvu_in_closed_form():
    x = planted(1000)
    sae = TopKSAE(**SIZES)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_pre.copy_(sae.normalize(x)[0].mean(0))
    assert evaluate_sae(sae, x, batch_size=300)["fvu"] == pytest.approx(1, abs=1e-6)  # predicts the mean
    with torch.no_grad():
        sae.b_pre.zero_()
    h = sae.normalize(x)[0].double()
    wanted = h.square().sum() / (h - h.mean(0)).square().sum()
    result = evaluate_sae(sae, x)
    assert result["fvu"] == pytest.approx(wanted.item()) and wanted > 1
    assert result["loss"] == pytest.approx(1, abs=1e-6)
    perfect = TopKSAE(D, 2 * D, 2 * D, normalize=False)  # +-identity with ReLU
    with torch.no_grad():
        eye = torch.cat([torch.eye(D), -torch.eye(D)])
        perfect.W_enc.copy_(eye), perfect.W_dec.copy_(eye)
    exact = evaluate_sae(perfect, x)
    assert exact["fvu"] < 1e-12 and exact["l0"] == pytest.approx(D) and exact["dead_fraction"] == 0
    assert exact["fvu"] == exact["fvu_raw"]


def test_evaluation_does_not_depend_on_batches_and_density_adds_up():
    x, sae = planted(1000), TopKSAE(**SIZES, generator=torch.Generator().manual_seed(0))
    whole, parts = evaluate_sae(sae, x), evaluate_sae(sae, x, batch_size=33)
    assert whole == pytest.approx(parts, rel=1e-6)
    density = feature_density(sae, x)
    assert density.sum().item() == pytest.approx(whole["l0"])
    assert (density == 0).double().mean().item() == pytest.approx(whole["dead_fraction"])
    far = evaluate_sae(sae, x + 1e4)  # a large common offset does not spoil the float64 sums
    assert far["fvu_raw"] == pytest.approx(whole["fvu_raw"], rel=0.05)


def test_progress_bar_can_be_switched_off(capsys):
    x = planted()
    train(x, replace(FAST, steps=2))
    assert capsys.readouterr() == ("", "")
    train_sae(x, replace(FAST, steps=2), **SIZES)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [
    dict(lr=0), dict(batch_size=0), dict(epochs=0), dict(steps=0), dict(auxk_coef=-1), dict(dead_after=0),
    dict(decay_fraction=1.5), dict(b_pre_init="median"), dict(matmul_dtype="float16"), dict(lr=float("nan")),
])
def test_bad_settings(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SAETrainConfig(**bad)


def test_bad_activations(tmp_path):
    x = planted()
    x[37, 3] = float("nan")
    with pytest.raises(DataError, match="NaN or infinite"):
        train(x, replace(FAST, batch_size=512), resume_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    for wrong in (torch.zeros(0, D), torch.zeros(5, D + 1), torch.zeros(D)):
        with pytest.raises(DataError, match="shape"):
            train(wrong)
    with pytest.raises(DataError, match="shape"):
        train([torch.zeros(100, D + 1)])
    with pytest.raises(DataError, match="empty"):
        train([])
    used_up = iter([planted(100)])
    with pytest.raises(DataError, match="fresh stream"):
        train(used_up)
    with pytest.raises(ConfigError, match="steps"):
        train(stream_of(planted()), replace(FAST, steps=None, decay_fraction=0.5))
    with pytest.raises(DataError, match="two vectors"):
        evaluate_sae(TopKSAE(**SIZES), torch.zeros(1, D))


def test_config_is_json_and_holds_the_papers_numbers():
    config = SAETrainConfig()
    assert (config.lr, config.betas, config.renorm_every, config.auxk_coef) == (5e-4, (0.9, 0.999), 10, 0)
    from dataclasses import asdict

    assert SAETrainConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_normalized_mse_ignores_vectors_without_energy():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    x_hat = torch.tensor([[1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    loss = normalized_mse(x_hat, x)
    loss.backward()
    assert loss.item() == 0.5 and torch.isfinite(x_hat.grad).all() and x_hat.grad[0].abs().sum() == 0
