"""Plans are arithmetic on shapes: the paper's sizes come out, and costs move as they must."""

import pytest
import torch
from transformers import AutoModel, LlamaConfig, Qwen2Config

from sarmlib.backbone import cut_config
from sarmlib.data.toyworld import BACKBONE_DIR
from sarmlib.errors import ConfigError
from sarmlib.plan import SHAPES, backbone_path, lines, plan, sizes
from sarmlib.profiles import load_profile
from sarmlib.sarm.model import SarmConfig, SarmForSequenceClassification
from tests.helpers import ROOT


@pytest.mark.parametrize("name, billions, other", [("paper-2b", 2.0, 12), ("paper-3b", 2.7, 19), ("paper-4b", 4.3, 18)])
def test_the_papers_sizes_are_counted_and_other_depths_would_not_give_them(name, billions, other):
    assert round(sizes(load_profile(name)).total / 1e9, 1) == billions  # Table 1
    deeper = sizes(load_profile(name, **{"backbone.layer": other}))
    assert round(deeper.total / 1e9, 1) not in (2.0, 2.7, 4.3)


@pytest.mark.parametrize("name", ["toy", "gpu", "paper-3b", "paper-4b"])
def test_a_known_shape_is_counted_as_the_decoder_that_is_built(name):
    profile = load_profile(name)
    shape, kind = SHAPES.get(backbone_path(profile)), Qwen2Config if name == "gpu" else LlamaConfig
    config = cut_config(kind(**shape) if shape else kind.from_pretrained(BACKBONE_DIR), profile.backbone.layer)
    with torch.device("meta"):
        decoder = AutoModel.from_config(config)
    assert decoder.num_parameters() == sizes(profile).embeddings + sizes(profile).layers
    with pytest.raises(ConfigError, match="layer=99 is not in"):
        sizes(load_profile(name, **{"backbone.layer": 99}))


def test_costs_scale_as_they_must():
    profile = load_profile("paper-4b")
    one, eight = (plan(profile, "h100", n).set_index("stage") for n in (1, 8))
    assert one.hours.sum() == pytest.approx(8 * eight.hours.sum())
    assert one.device_gb["reward models"] > 80 > eight.device_gb["reward models"]
    assert one.host_gb["reward models"] < eight.host_gb["reward models"]
    twice = profile.model_copy(update={"seeds": (0, 1)})
    assert plan(twice).set_index("stage").hours["reward models"] == pytest.approx(2 * one.hours["reward models"])
    assert "needs about" in lines(profile) and "needs about" not in lines(profile, devices=8)
    assert "fsdp.yaml -m sarmlib run reward --profile paper-4b" in lines(profile, devices=8)
    kept = plan(load_profile("paper-4b", **{"corpus.budget_gb": 1000})).set_index("stage")
    assert "activations" not in one.index and kept.disk_gb["activations"] == pytest.approx(2 * 819.2)
    assert kept.tokens["activations"] == one.tokens["SAE"] == 2e9  # "approximately 1B tokens" per position rule


@pytest.mark.parametrize("name, variants, stages", [
    ("released", [], ["download", "scores"]),
    ("toy", ["scalar_half"], ["download", "reward models", "scores"]),
    ("toy", ["sarm"], ["download", "activations", "SAE", "reward models", "scores"]),
])
def test_a_profile_plans_its_own_variants_only(name, variants, stages):
    assert list(plan(load_profile(name, variants=variants)).stage) == stages


def test_a_decoder_that_is_not_made_is_named_with_the_command_that_makes_it():
    assert backbone_path(load_profile("toy", **{"backbone.source": "a/b"})) == "a/b"
    with pytest.raises(ConfigError, match="make it with `make nosuch`"):
        backbone_path(load_profile("toy", **{"backbone.source": "models/nosuch"}))
    source = load_profile("smollm2", data=ROOT).backbone.source
    assert f"\n{source.removeprefix('models/')}: " in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", ["paper-2b", "paper-3b", "paper-4b"])
def test_the_papers_models_are_built_and_their_decoders_run_without_memory(name):
    planned = sizes(profile := load_profile(name))
    decoder = cut_config(LlamaConfig(**SHAPES[profile.backbone.source]), profile.backbone.layer)
    shape = {"n_features": planned.n_features, "k": profile.sae.k(planned.d)}
    with torch.device("meta"):
        model = SarmForSequenceClassification(SarmConfig(backbone_config=decoder, layer=planned.layer, **shape))
        states = model.model(input_ids=torch.zeros(2, 8, dtype=torch.long)).last_hidden_state
    assert states.shape == (2, 8, planned.d) and (states @ model.sae.W_enc.t()).shape == (2, 8, 16 * planned.d)
    assert model.sae.k == 3 * planned.d // 64
    used = {part: weight.numel() for part, weight in model.named_parameters() if part not in ("sae.W_dec", "sae.b_pre")}
    assert sum(used.values()) == planned.total - planned.d  # the plan counts the decoder's final norm
