"""How good an SAE is: variance unexplained, sparsity, dead features, and what it costs the model it was trained on."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sarmlib.backbone import n_layers
from sarmlib.errors import DataError
from sarmlib.extractor import position_rule
from sarmlib.sae.topk import TopKSAE

CHUNK = 4096  # vectors in memory at once


@torch.no_grad()
def evaluate_sae(sae: TopKSAE, x: Tensor) -> dict[str, float]:
    """Quality of an SAE on activations x [N, d], sums in float64; DataError without two different vectors.

    fvu: sum |x - x_hat|^2 / sum |x - mean(x)|^2 in the SAE's (normalised) space, so predicting the mean gives 1;
    l0: non-zero features per vector; dead_fraction: share of features that fire on no vector of x.
    """
    centre = sum(sae.normalize(part.to(sae.W_enc))[0].double().sum(0) for part in x.split(CHUNK)) / len(x)
    error, variance, fired = 0.0, 0.0, torch.zeros(sae.n_features, dtype=torch.float64)
    for part in x.split(CHUNK):
        part = part.to(sae.W_enc)
        normal, code = sae.normalize(part)[0].double(), sae.encode(part)
        fired += torch.bincount(code.indices[code.values != 0].cpu(), minlength=sae.n_features)
        error += float((sae.decode(code).double() - normal).square().sum())
        variance += float((normal - centre).square().sum())
    if not variance:
        raise DataError(f"at least two different activations are needed, got shape {tuple(x.shape)}")
    return {"fvu": error / variance, "l0": float(fired.sum()) / len(x),
            "dead_fraction": float((fired == 0).double().mean())}


@torch.no_grad()
def loss_recovered(model, tokenizer, sae: TopKSAE, layer: int, texts: Iterable[str],
                   positions: str = "sentence_end") -> dict[str, float]:
    """(CE_zero - CE_sae) / (CE_zero - CE) over the documents; 1: the SAE loses nothing, 0: no better than zeros.

    CE is the mean next-token cross-entropy (nats) of a causal language model at the tokens that follow a replaced
    position; CE_sae puts the SAE's output x_hat in place of the state after ``layer`` (from 1) at ``positions``,
    CE_zero puts zeros there.  Documents are cut at 512 tokens.  DataError when no token follows a chosen position.
    """
    depth = n_layers(model.config)
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    block, rule = next(lists)[layer - 1], position_rule(tokenizer, positions)
    replacements = {"ce": lambda h: h, "ce_sae": lambda h: sae(h.to(sae.W_enc.device)).x_hat.to(h),
                    "ce_zero": torch.zeros_like}
    sums, tokens = dict.fromkeys(replacements, 0.0), 0
    for text in filter(None, texts):
        ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:512]])
        chosen = rule(ids, torch.ones_like(ids)).bool()
        tokens += int(chosen[0, :-1].sum())
        for name, replace in replacements.items():
            sums[name] += _cross_entropy(model, block, ids.to(model.device), chosen, replace)
    if not tokens:
        raise DataError("no token follows a chosen position in any document; pass more text or another position rule")
    means = {name: total / tokens for name, total in sums.items()}
    recovered = (means["ce_zero"] - means["ce_sae"]) / (means["ce_zero"] - means["ce"])
    return means | {"loss_recovered": recovered, "tokens": tokens}


def _cross_entropy(model, block: nn.Module, ids: Tensor, chosen: Tensor, replace) -> float:
    """Summed cross-entropy at the tokens after the chosen ones, the block's states there replaced."""

    def hook(module, arguments, output):
        states = output[0] if isinstance(output, tuple) else output
        states[chosen] = replace(states[chosen])

    with block.register_forward_hook(hook):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1][chosen[0, :-1]]
    return float(F.cross_entropy(logits.double(), ids[0, 1:][chosen[0, :-1]], reduction="sum"))
