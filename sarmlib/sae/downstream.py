"""What an SAE costs the model it was trained on: next-token loss when its output replaces the state after layer l."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sarmlib.backbone import n_layers
from sarmlib.errors import ConfigError, DataError, ModelError
from sarmlib.extractor import PositionRule, position_rule
from sarmlib.sae.model import TopKSAE


@torch.no_grad()
def loss_recovered(
    model,
    tokenizer,
    sae: TopKSAE,
    layer: int,
    texts: Iterable[str | list[int]],
    positions: str | PositionRule = "sentence_end",
    *,
    max_tokens: int = 512,
) -> dict[str, float]:
    """(CE_zero - CE_sae) / (CE_zero - CE) over the documents; 1: the SAE loses nothing, 0: no better than zeros.

    CE is the mean next-token cross-entropy (nats) of a causal language model at the tokens that follow a replaced
    position; CE_sae puts the SAE's output x_hat (normalisation undone) in place of the state after ``layer`` (from 1)
    at ``positions``, CE_zero puts zeros there.  The replaced token itself stays; later layers see the new state.
    Returns ce, ce_sae, ce_zero, loss_recovered and tokens.  Documents are cut at ``max_tokens``.
    Raises ConfigError for a layer out of range, DataError when no token follows a chosen position.
    """
    depth = n_layers(model.config)
    if not 1 <= layer <= depth:
        raise ConfigError(f"layer={layer} is out of range for a {depth}-layer {model.config.model_type}; "
                          f"use 1..{depth}")
    block, rule, device = _layers(model, depth)[layer - 1], position_rule(tokenizer, positions), model.device
    sums, tokens = {"ce": 0.0, "ce_sae": 0.0, "ce_zero": 0.0}, 0
    for text in texts:
        ids = (tokenizer(text, verbose=False)["input_ids"] if isinstance(text, str) else list(text))[:max_tokens]
        if len(ids) < 2:
            continue
        input_ids = torch.tensor([ids], device=device)
        chosen = rule(input_ids, torch.ones_like(input_ids)).bool()
        after = chosen[0, :-1]
        if not after.any():
            continue
        tokens += int(after.sum())
        for name, replace in (("ce", None), ("ce_sae", _through(sae)), ("ce_zero", torch.zeros_like)):
            hook = block.register_forward_hook(_replacing(chosen, replace)) if replace else None
            try:
                logits = model(input_ids=input_ids, use_cache=False).logits[0, :-1]
            finally:
                if hook:
                    hook.remove()
            sums[name] += float(F.cross_entropy(logits[after].double(), input_ids[0, 1:][after], reduction="sum"))
    if not tokens:
        raise DataError("no token follows a chosen position in any document; pass more text or another position rule")
    means = {name: total / tokens for name, total in sums.items()}
    gap = means["ce_zero"] - means["ce"]
    recovered = (means["ce_zero"] - means["ce_sae"]) / gap if gap else float("nan")
    return means | {"loss_recovered": recovered, "tokens": tokens}


@torch.no_grad()
def decoder_cosines(sae: TopKSAE, chunk: int = 1024) -> Tensor:
    """Largest cosine of each feature's decoder column with that of another feature: float32 [M] on the CPU."""
    if sae.n_features < 2:
        raise ConfigError("n_features=1: a feature needs another to be compared with")
    rows = F.normalize(sae.W_dec.float(), dim=-1)
    nearest = []
    for start in range(0, len(rows), chunk):
        cosines = rows[start : start + chunk] @ rows.t()
        own = torch.arange(start, start + len(cosines), device=rows.device)
        nearest.append(cosines.scatter_(1, own[:, None], -2.0).amax(1).cpu())
    return torch.cat(nearest)


def _layers(model, depth: int) -> nn.ModuleList:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError(f"{type(model).__name__} has no list of {depth} layers to replace a state in")


def _through(sae: TopKSAE):
    return lambda states: sae(states.to(sae.W_enc.device, sae.W_enc.dtype)).x_hat.to(states)


def _replacing(chosen: Tensor, replace):
    def hook(module, arguments, output):
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[chosen] = replace(states[chosen])
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return hook
