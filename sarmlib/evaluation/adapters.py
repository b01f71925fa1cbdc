"""How to read one reward per text from a model's output, also from models that bring their own code.

Plain sequence classifiers return ``logits`` [B, 1].  Multi-objective reward models return many heads and one combined
score; which field that is stands in the table, by the class that config.json names.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sarmlib.errors import ConfigError, ModelError


class Adapter(NamedTuple):
    """Where the reward of a class with its own code is."""

    field: str
    """Output field with the combined reward, [B] or [B, 1]."""
    heads: str
    """Output field with one number per objective, [B, n] or more: never the reward."""
    models: str
    """Published models of this class."""


ADAPTERS = {
    "LlamaForRewardModelWithGating": Adapter("score", "rewards", "ArmoRM-Llama3-8B-v0.1"),
    "LlamaForRewardModelWithGating3": Adapter("score", "rewards", "QRM-Llama3-8B"),
    "LlamaForRewardModelWithGating31": Adapter("score", "rewards", "QRM-Llama3.1-8B-v2"),
    "LDLRewardModel27B": Adapter("score", "rewards", "LDL-Reward-Gemma-2-27B-v0.1"),
}


def own_code(config: dict, source: str, trusted: bool) -> None:
    """ConfigError when config.json names a class that only code of the model's own provides, and running that code was
    not allowed.  Classes of transformers, and those registered with it, need none."""
    from transformers import AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as known
    registered = {kind.__name__ for kind in AutoModelForSequenceClassification._model_mapping._extra_content.values()}
    names = config.get("architectures") or []
    foreign = not set(names) & (set(known.values()) | registered)
    if not trusted and foreign and (config.get("auto_map") or set(names) & set(ADAPTERS)):
        raise ConfigError(f"model {str(source)!r} ({', '.join(names) or 'class not named'}) runs code of its own; "
                          "read that code, then allow it with --trust-remote-code")


@torch.inference_mode()
def reward_of(model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> np.ndarray:
    """float64 [B]: one reward per text; ModelError when the output does not hold one number per text."""
    output = model(input_ids=input_ids, attention_mask=attention_mask)
    adapter = ADAPTERS.get(type(model).__name__)
    field = adapter.field if adapter else "logits"
    value = getattr(output, field, None)
    if value is None:
        has = ", ".join(output.keys()) if hasattr(output, "keys") else type(output).__name__
        raise ModelError(f"{type(model).__name__} returned no {field!r} (it has {has}); is it a reward model?")
    if value.shape not in ((len(input_ids),), (len(input_ids), 1)):
        raise ModelError(f"{type(model).__name__}.{field} has shape {tuple(value.shape)} for {len(input_ids)} texts; "
                         "one number per text is needed, and no rule is known that combines its outputs")
    return value.reshape(-1).float().cpu().numpy().astype(np.float64)
