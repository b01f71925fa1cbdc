"""Loss recovered in closed cases, and the decoder's cosines."""

import pytest
import torch
from transformers import LlamaForCausalLM

from sarmlib.errors import ConfigError, DataError
from sarmlib.sae.downstream import decoder_cosines, loss_recovered
from sarmlib.sae.model import TopKSAE
from tests.tiny import tiny_config, tiny_tokenizer, words

D = 32


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(initializer_range=0.3)).eval()


def documents():
    import random
    rng = random.Random(0)
    return ["", *(words(rng, 5, 20) for _ in range(6))]


def identity():
    """An SAE that reproduces every state: +-identity with ReLU."""
    sae = TopKSAE(D, 2 * D, 2 * D, normalize=True)
    with torch.no_grad():
        eye = torch.cat([torch.eye(D), -torch.eye(D)])
        sae.W_enc.copy_(eye), sae.W_dec.copy_(eye)
    return sae


def nothing():
    """An SAE whose output is zero everywhere."""
    sae = TopKSAE(D, 64, 2, normalize=False)
    with torch.no_grad():
        sae.W_dec.zero_()
    return sae


def test_identity_recovers_everything_and_zeros_nothing(model):
    full = loss_recovered(model, tiny_tokenizer(), identity(), 2, documents(), "every")
    assert full["loss_recovered"] == pytest.approx(1, abs=1e-4)
    assert full["ce_sae"] == pytest.approx(full["ce"], abs=1e-5)
    none = loss_recovered(model, tiny_tokenizer(), nothing(), 2, documents(), "every")
    assert none["ce_sae"] == none["ce_zero"] and none["loss_recovered"] == 0
    assert none["ce"] == full["ce"] != none["ce_zero"]


def test_loss_is_the_models_own_and_only_chosen_positions_are_replaced(model):
    tokenizer, docs = tiny_tokenizer(), documents()
    got = loss_recovered(model, tokenizer, identity(), 1, docs, "every")
    total = count = 0
    for text in docs[1:]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert got["ce"] == pytest.approx(total / count, rel=1e-5) and got["tokens"] == count

    def third(input_ids, mask):
        return torch.arange(input_ids.shape[1])[None] == 2

    assert loss_recovered(model, tokenizer, nothing(), 3, docs, third)["tokens"] == 6
    seen = []
    model.model.layers[2].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    loss_recovered(model, tokenizer, nothing(), 2, docs[:2], third)
    model.model.layers[2]._forward_pre_hooks.clear()
    clean, replaced = seen[0][0], seen[1][0]
    assert not replaced[2].any() and torch.equal(replaced[:2], clean[:2]) and torch.equal(replaced[3:], clean[3:])
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_refusals(model):
    with pytest.raises(ConfigError, match="layer=4 is out of range"):
        loss_recovered(model, tiny_tokenizer(), nothing(), 4, documents())
    with pytest.raises(DataError, match="no token follows"):
        loss_recovered(model, tiny_tokenizer(), nothing(), 2, ["w1 w2"])


def test_decoder_cosines():
    sae = TopKSAE(4, 6, 1)
    with torch.no_grad():
        sae.W_dec[:4] = torch.eye(4)
        sae.W_dec[4] = torch.tensor([3.0, 4, 0, 0])
        sae.W_dec[5] = torch.tensor([-1.0, 0, 0, 0])
    for chunk in (2, 100):
        torch.testing.assert_close(decoder_cosines(sae, chunk), torch.tensor([0.6, 0.8, 0, 0, 0.8, 0.0]))
    with pytest.raises(ConfigError):
        decoder_cosines(TopKSAE(4, 1, 1))
