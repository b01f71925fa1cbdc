"""sarmlib: train, explain, steer and benchmark interpretable reward models (SARM).

Text becomes tokens, tokens become hidden states at layer *l*, a TopK sparse autoencoder turns the
state at the reward position into *k* features ``z``, and a linear head turns them into a reward
``r = sum_i w_i z_i``.  Names are imported on first use, so ``import sarmlib`` stays light.
"""

from importlib import import_module

from sarmlib.registration import register as _register

__version__ = "0.1.0"

_PUBLIC = {
    "TopKSAE": "sarmlib.sae.topk",
    "train_sae": "sarmlib.sae.training",
    "SAETrainConfig": "sarmlib.sae.training",
    "ActivationExtractor": "sarmlib.extractor",
    "load_backbone": "sarmlib.backbone",
    "load_tokenizer": "sarmlib.backbone",
    "SarmConfig": "sarmlib.sarm.model",
    "SarmForSequenceClassification": "sarmlib.sarm.model",
    "ScalarRewardModel": "sarmlib.sarm.model",
    "RewardTrainer": "sarmlib.sarm.training",
    "RewardTrainConfig": "sarmlib.sarm.training",
    "explain": "sarmlib.sarm.attribution",
    "explain_pair": "sarmlib.sarm.attribution",
    "steer": "sarmlib.sarm.steering",
    "load_released": "sarmlib.sarm.released",
}
_register()
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sarmlib' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")


def __dir__():
    return sorted(__all__)
