"""Small sound folders, which the tests damage."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from sarmlib.sae.topk import TopKSAE
from tests.tiny import tiny_config, tiny_pairs, tiny_sarm, tiny_tokenizer


@pytest.fixture(scope="session")
def sarm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sarm")
    tiny_sarm().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """backbone/, sae/, pairs.jsonl, corpus.txt"""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(folder / "backbone")
    tiny_tokenizer().save_pretrained(folder / "backbone")
    TopKSAE(32, 64, 4, generator=torch.Generator().manual_seed(0)).save(folder / "sae")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in tiny_pairs(40)))
    (folder / "corpus.txt").write_text("w1 w2 w3. w4 w5 w6! w7 w8.\n\n" * 400)
    return folder
