"""FVU and loss recovered in closed cases, and what does not change them."""

import random

import pytest
import torch
from transformers import LlamaForCausalLM

from sarmlib.errors import DataError
from sarmlib.sae import quality
from sarmlib.sae.quality import evaluate_sae, loss_recovered
from sarmlib.sae.topk import TopKSAE
from tests.test_sae_training import SIZES, planted, untrained
from tests.tiny import tiny_config, tiny_tokenizer, words


def identity(d):
    """An SAE that reproduces every state: +-identity with ReLU."""
    sae = TopKSAE(d, 2 * d, 2 * d, normalize=False)
    with torch.no_grad():
        eye = torch.cat([torch.eye(d), -torch.eye(d)])
        sae.W_enc.copy_(eye), sae.W_dec.copy_(eye)
    return sae


def test_fvu_in_closed_form():
    x = planted(1000)
    sae = TopKSAE(**SIZES)
    h = sae.normalize(x)[0].double()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_pre.copy_(h.mean(0))
    assert evaluate_sae(sae, x)["fvu"] == pytest.approx(1, abs=1e-6)  # predicts the mean
    with torch.no_grad():
        sae.b_pre.zero_()
    wanted = h.square().sum() / (h - h.mean(0)).square().sum()
    assert evaluate_sae(sae, x)["fvu"] == pytest.approx(wanted.item()) and wanted > 1
    exact = evaluate_sae(identity(16), x)
    assert exact["fvu"] < 1e-12 and exact["l0"] == pytest.approx(16) and exact["dead_fraction"] == 0
    for bad in (torch.zeros(0, 16), torch.ones(1, 16), x[:1].repeat(3, 1)):
        with pytest.raises(DataError, match="two different"):
            evaluate_sae(sae, bad)


def test_evaluation_does_not_depend_on_chunks_and_counts_features(monkeypatch):
    x, sae = planted(1000), untrained()
    whole = evaluate_sae(sae, x)
    monkeypatch.setattr(quality, "CHUNK", 33)
    assert whole == pytest.approx(evaluate_sae(sae, x), rel=1e-6)
    active = sae.encode(x).dense() != 0
    assert whole["l0"] == pytest.approx(active.sum().item() / 1000)
    assert whole["dead_fraction"] == pytest.approx((~active.any(0)).double().mean().item())


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
