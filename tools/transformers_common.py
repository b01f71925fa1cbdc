"""transformers' own common tests of models and configs, run on ours, and on a SARM that was exported with its code.

    pip download transformers==VERSION --no-binary :all: --no-deps  # the installed version; unpack it
    SARMLIB_TRANSFORMERS_TESTS=transformers-VERSION/tests python tools/transformers_common.py [-v] [-k save_load]

Their tests are no part of the wheel.  They need ``parameterized``.  `LEFT_OUT` says why a test is not ours.
"""

import importlib
import json
import os
import sys
import tempfile
import unittest
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from transformers import LlamaConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from sarmlib.sarm.model import (
    EXPORTED,
    SarmConfig,
    SarmForSequenceClassification,
    ScalarRewardModel,
    export_with_code,
)

FOLDER = Path(os.environ.get("SARMLIB_TRANSFORMERS_TESTS", "/nowhere"))
ABSENT = {"exporters.test_export": {"ExportTesterMixin": object}, "generation.test_utils":
          {"GenerationTesterMixin": type("Generation", (), {})}, "utils.test_configuration_utils":
          {"config_common_kwargs": {}}}
"""What a source distribution leaves out; our models do not generate, and export is tested in tests/."""
LEFT_OUT = {
    "test_correct_missing_keys": "a reward model with missing weights is refused, not made up",
    "test_model_weights_reload_no_missing_tied_weights": "a reward model with missing weights is refused, not made up",
    "test_cannot_load_with_meta_device_context_manager": "refused too, as a ModelError"}


def theirs(name: str) -> ModuleType:
    """A module of their folder ``tests``, in a package that is not called like ours."""
    if "theirs" not in sys.modules:
        sys.modules["theirs"] = package = ModuleType("theirs")
        package.__path__ = [str(FOLDER)]
        FOLDER.joinpath("__init__.py").touch()  # they read it, and it too is left out
        for absent, names in ABSENT.items():
            if not FOLDER.joinpath(*absent.split(".")).with_suffix(".py").is_file():
                for module in (absent.partition(".")[0], absent):
                    sys.modules[f"theirs.{module}"] = ModuleType(f"theirs.{module}")
                vars(sys.modules[f"theirs.{absent}"]).update(names)
    return importlib.import_module(f"theirs.{name}")


class Tester:
    """Sizes that their tests ask for, a config and a batch."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads, is_training = 4, 7, 32, 2, 4, True

    def __init__(self, config_class):
        self.config_class = config_class
        self.settings = {"n_features": 64, "k": 4} if config_class.model_type == "sarm" else {}

    def get_config(self):
        decoder = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2,
                              num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        return self.config_class(decoder, **self.settings)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cases(model_class) -> type[unittest.TestCase]:
    """Their tests of a model class and its config."""
    common, configuration = theirs("test_modeling_common"), theirs("test_configuration_common")

    class Case(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes, _is_composite = (model_class,), True

        def setUp(self):
            if reason := LEFT_OUT.get(self._testMethodName):
                self.skipTest(reason)
            self.model_tester = Tester(model_class.config_class)

        def _prepare_for_class(self, inputs, model_class, return_labels=False):
            return inputs | ({"labels": torch.zeros(len(inputs["input_ids"]))} if return_labels else {})

        def test_config(self):
            decoder = json.loads(self.model_tester.get_config().to_json_string())["backbone_config"]
            tester = configuration.ConfigTester(self, model_class.config_class, **self.model_tester.settings,
                                                backbone_config=decoder)
            # ours drops a path of this machine and adds the names of transformers 4
            tester.create_and_test_config_from_and_save_pretrained_composite = lambda: None
            tester.run_common_tests()

    Case.__name__ = Case.__qualname__ = model_class.__name__
    return Case


if not FOLDER.joinpath("test_modeling_common.py").is_file() or not find_spec("parameterized"):
    raise SystemExit(f"SARMLIB_TRANSFORMERS_TESTS={FOLDER} has no test_modeling_common.py, or parameterized is absent")
with tempfile.TemporaryDirectory() as exported:
    config = Tester(SarmConfig).get_config()
    export_with_code(SarmForSequenceClassification(config), exported)
    remote = get_class_from_dynamic_module(f"{EXPORTED}.SarmForSequenceClassification", exported)
Sarm, Scalar, Exported = cases(SarmForSequenceClassification), cases(ScalarRewardModel), cases(remote)

if __name__ == "__main__":
    unittest.main()
