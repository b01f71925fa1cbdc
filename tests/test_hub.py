"""The hub is asked once, within seconds, and what is missing is named with a way out."""

import socket
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from sarmlib import hub
from sarmlib.errors import ConfigError, DataError, ModelError, OfflineError
from tests.helpers import ROOT
from tests.tiny import tiny_config, tiny_sarm

COMMIT = "7" * 40


def test_access_is_granted_refused_or_out_of_reach(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", answer := Mock())
    assert hub.check_access("a/b") is None and hub.check_access("a/b", COMMIT, "dataset") is None
    answer.side_effect = OSError()
    answer.side_effect.response = SimpleNamespace(status_code=404)
    with pytest.raises(DataError, match="refuses model 'a/b'.*404"):
        hub.check_access("a/b", COMMIT)
    answer.side_effect = None
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(OfflineError, match="dataset 'a/b'.*local folder"):
        hub.check_access("a/b", COMMIT, "dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.check_access("a/b", COMMIT, "dataset")  # the local cache is trusted
    for loose in (None, "main", "7" * 39):
        with pytest.raises(ConfigError, match="40-digit commit"):
            hub.check_access("a/b", loose, "dataset")


def test_reachable_asks_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.reachable()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.reachable()
    assert not hub.reachable()


def test_a_cache_folder_stands_for_its_snapshot_and_a_gguf_file_is_opened_by_its_name(tmp_path):
    for name in ("one", "two"):
        tiny_config(3 if name == "one" else 4).save_pretrained(tmp_path / "snapshots" / name)
    with pytest.raises(ModelError, match="cannot be loaded"):
        hub.from_hub(AutoConfig, tmp_path)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("two\n")
    assert hub.hub_folder(tmp_path) == str(tmp_path / "snapshots" / "two")
    assert hub.from_hub(AutoConfig, tmp_path).num_hidden_layers == 4
    assert hub.hub_folder("owner/name") == "owner/name"
    recorder = SimpleNamespace(from_pretrained=lambda name, **kwargs: (name, kwargs))
    assert hub.from_hub(recorder, tmp_path / "m.gguf", dtype=1) == (str(tmp_path), {"dtype": 1, "gguf_file": "m.gguf"})


def test_what_is_absent_or_damaged_is_named(tmp_path, monkeypatch):
    for absent in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(ModelError, match="does not exist"):
            hub.from_hub(AutoConfig, absent)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        hub.from_hub(AutoConfig, tmp_path)
    for name in ("config.json", "tokenizer_config.json"):
        tiny_sarm().save_pretrained(tmp_path)
        (tmp_path / name).write_text('{"model_type": "llama", "k": 1, "k": 2}')
        with pytest.raises(ModelError, match="'k' stands twice"):
            hub.from_hub(AutoConfig, tmp_path)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(OfflineError, match="some-owner/some-model"):
        hub.from_hub(AutoConfig, "some-owner/some-model")


@pytest.mark.parametrize("first", [
    "import sys, sarmlib; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)",
    "import sarmlib.backbone, sarmlib.sarm.released",
    "from transformers import AutoConfig, AutoModelForSequenceClassification\nimport sarmlib"])
def test_auto_classes_know_our_models_after_import_sarmlib(tmp_path, first):
    tiny_sarm().save_pretrained(tmp_path)
    code = (f"{first}\nfrom transformers import AutoModelForSequenceClassification as Auto\n"
            f"print(type(Auto.from_pretrained({str(tmp_path)!r})))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "sarmlib.sarm.model.SarmForSequenceClassification" in done.stdout
