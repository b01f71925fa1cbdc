"""`evaluate`: official text, batches, resumption, missing subsets, equal scores, loading and own-code adapters."""

from __future__ import annotations

import importlib.util
import json
import random
import time

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, LlamaForSequenceClassification, dynamic_module_utils

from sarmlib.__main__ import main
from sarmlib.chat import FALLBACK_TEMPLATE
from sarmlib.commands.evaluate import benchmark_rows
from sarmlib.errors import ConfigError, ModelError, OfflineError
from sarmlib.evaluation import adapters, evaluate
from sarmlib.evaluation.published import count_parameters
from sarmlib.evaluation.scoring import score_rewardbench2

from .tiny import tiny_config, tiny_sarm, tiny_tokenizer, words


def rb2(n: int = 6, subset: str = "Math", seed: int = 0, longest: int = 30) -> list[dict]:
    rng = random.Random(seed)
    return [{"id": str(i), "subset": subset, "prompt": words(rng, 2, 9), "chosen": [words(rng, 1, longest)],
             "rejected": [words(rng, 1, longest) for _ in range(3)], "num_correct": 1, "num_incorrect": 3,
             "total_completions": 4} for i in range(n)]


def rm(n: int = 4, seed: int = 1) -> list[dict]:
    rng = random.Random(seed)
    return [{"id": i, "domain": ("chat", "math", "code", "safety-refuse")[i % 4], "prompt": words(rng, 2, 9),
             "chosen": [words(rng, 1, 20) for _ in range(3)], "rejected": [words(rng, 1, 20) for _ in range(3)]}
            for i in range(n)]


def bos_tokenizer(**kwargs):
    """A tokenizer that adds a BOS although its template writes one, as Llama's does."""
    tokenizer = tiny_tokenizer(**kwargs)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def classifier(seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(tiny_config(num_labels=1, **kwargs)).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


@pytest.fixture
def scorer():
    return evaluate.prepared(classifier(), bos_tokenizer(), "tiny")


@torch.no_grad()
def by_hand(model, tokenizer, prompt: str, answer: str, side: str, max_length: int) -> float:
    """One text at a time, as the official loop at batch size 1."""
    talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    tokenizer.truncation_side = side
    batch = tokenizer([text], return_tensors="pt", truncation=True, max_length=max_length)
    if batch["input_ids"][0, :2].tolist() == [2, 2]:
        batch["attention_mask"][0, 0] = 0
    return float(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


@pytest.mark.parametrize("own_side", ["left", "right"])
def test_scores_are_those_of_the_official_loop(tmp_path, scorer, own_side):
    scorer.tokenizer.truncation_side = own_side
    rows = {"rewardbench2": rb2(), "rm_bench": rm()}
    found = evaluate.evaluate(scorer, rows, tmp_path, batch_tokens=200, max_length=24)
    stored = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()[1:]]
    assert len(stored) == 6 * 4 + 4 * 6 == len({(s["benchmark"], s["row"], s["slot"]) for s in stored})
    for line in stored:
        row = rows[line["benchmark"]][line["row"]]
        side = own_side if line["benchmark"] == "rewardbench2" else "left"
        expected = by_hand(scorer.model, scorer.tokenizer, row["prompt"], evaluate.answers(row)[line["slot"]], side, 24)
        assert line["score"] == pytest.approx(expected, abs=2e-5)
    text = found["text"]["rewardbench2"]
    assert text["truncation_side"] == own_side and text["max_length"] == 24 and text["texts"] == 24
    assert 0 < text["truncated"] < 24 and 0 < text["double_bos_masked"] <= 24
    assert found["text"]["rm_bench"]["truncation_side"] == "left"


def test_the_masked_bos_and_the_side_matter(tmp_path, scorer):
    """What the test above compares is not blind to either rule."""
    row = rb2(1, longest=40)[0]
    talk = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"][0]}]]
    ids, doubled, _ = evaluate.encode(scorer.tokenizer, talk, 512, None)
    assert doubled == [True]
    masked, seen = (evaluate._rewards(scorer, ids, [flag])[0] for flag in (True, False))
    assert abs(masked - seen) > 1e-4
    left, right = (evaluate.encode(scorer.tokenizer, talk, 12, side) for side in ("left", "right"))
    assert left[0] != right[0] and left[2] == right[2] == 1
    assert left[0][0][0] == 2 and left[0][0][-1] == ids[0][-1] and left[1] == [False] and right[1] == [True]


def test_a_killed_run_goes_on_and_a_torn_line_is_dropped(tmp_path, scorer, monkeypatch):
    rows = {"rewardbench2": rb2(8)}
    whole = evaluate.evaluate(scorer, rows, tmp_path / "whole", batch_tokens=100)
    calls, real = [], evaluate._rewards

    def dies(scorer, ids, doubled):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(ids))
        return real(scorer, ids, doubled)
    monkeypatch.setattr(evaluate, "_rewards", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(scorer, rows, tmp_path / "cut", batch_tokens=100)
    file = tmp_path / "cut" / "scores.jsonl"
    assert len(file.read_text().splitlines()) == 1 + sum(calls)
    file.write_bytes(file.read_bytes()[:-9])  # the last line is torn
    again = []
    monkeypatch.setattr(evaluate, "_rewards", lambda *args: (again.append(len(args[1])), real(*args))[1])
    resumed = evaluate.evaluate(scorer, rows, tmp_path / "cut", batch_tokens=100)
    assert sum(again) == 32 - sum(calls) + 1
    assert resumed == whole and len(file.read_text().splitlines()) == 33
    monkeypatch.setattr(evaluate, "_rewards", lambda *args: pytest.fail("nothing is left to score"))
    assert evaluate.evaluate(scorer, rows, tmp_path / "cut") == whole


def test_a_header_that_was_torn_starts_anew(tmp_path):
    file = tmp_path / "scores.jsonl"
    file.write_text('{"model": "ti')
    assert evaluate.resume(file, {"model": "tiny"}) == {}
    assert json.loads(file.read_text()) == {"model": "tiny"}


def test_other_data_or_another_model_never_mix(tmp_path, scorer):
    evaluate.evaluate(scorer, {"rewardbench2": rb2(2)}, tmp_path)
    with pytest.raises(ConfigError, match="another data"):
        evaluate.evaluate(scorer, {"rewardbench2": rb2(2, seed=9)}, tmp_path)
    other = evaluate.prepared(classifier(1), scorer.tokenizer, "other")
    with pytest.raises(ConfigError, match="another model"):
        evaluate.evaluate(other, {"rewardbench2": rb2(2)}, tmp_path)


def test_a_missing_subset_is_reported_and_never_averaged_away(tmp_path, scorer):
    found = evaluate.evaluate(scorer, {"rewardbench2": rb2(3), "rm_bench": rm(3)}, tmp_path)
    first, second = found["benchmarks"]["rewardbench2"], found["benchmarks"]["rm_bench"]
    assert first["score"] is None and first["interval"] is None and set(first["parts"]) == {"Math"}
    assert first["missing"] == ["Factuality", "Precise IF", "Safety", "Focus", "Ties"]
    assert second["score"] is None and second["missing"] == ["safety"] and second["hard_acc"] is None
    text = "\n".join(evaluate.lines(found))
    assert "no overall score, missing: Factuality" in text and "no overall score, missing: safety" in text


def test_ties_without_a_couple_have_no_score():
    rows = [{**row, "scores": [3.0, 2.0, 1.0, 0.0]} for row in rb2(2)]
    tied = {"id": "tied:1", "subset": "Ties", "num_correct": 2, "scores": [2.0, 1.0, 0.0]}
    found = evaluate.summary("rewardbench2", [*rows, tied])
    assert found["parts"] == {"Math": 1.0, "Ties": None} and found["score"] is None
    json.dumps(found, allow_nan=False)


def test_decisions_on_equal_scores_are_counted():
    rows = [{"subset": "Math", "scores": s} for s in ([1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0])]
    rows.append({"subset": "Ties", "num_correct": 2, "scores": [3, 1, 1, 0]})
    assert evaluate.equal_scores("rewardbench2", rows) == {"decisions": 4, "equal": 2}
    one = {"score_chosen": [1, 2, 3], "score_rejected": [1, 1, 0]}
    assert evaluate.equal_scores("rm_bench", [one]) == {"decisions": 9, "equal": 2}


def test_rewards_that_are_not_finite_are_refused(tmp_path, scorer):
    scorer.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not a finite number"):
        evaluate.evaluate(scorer, {"rewardbench2": rb2(1)}, tmp_path)


# -- loading -----------------------------------------------------------------------------------------------------------

def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_sizes_are_counted_from_the_files(tmp_path):
    model = classifier()
    save(model, tiny_tokenizer(), tmp_path / "one")
    assert count_parameters(tmp_path / "one") == sum(p.numel() for p in model.parameters())
    with pytest.raises(ModelError, match="no .*safetensors"):
        count_parameters(tmp_path)


def test_a_hub_id_offline_fails_soon_with_one_sentence(monkeypatch):
    monkeypatch.setattr("sarmlib.backbone._hub_reachable", lambda timeout=3.0: False)
    start = time.perf_counter()
    with pytest.raises(OfflineError, match="neither a local folder nor reachable.*download it once"):
        evaluate.load_scorer("nobody/no-such-reward-model")
    assert time.perf_counter() - start < 10


def test_the_hubs_cache_layout_is_a_folder_too(tmp_path):
    cache = tmp_path / "models--owner--tiny"
    save(classifier(), tiny_tokenizer(), cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "old").mkdir()
    loaded = evaluate.load_scorer(cache)
    assert loaded.name.endswith("abc") and type(loaded.model).__name__ == "LlamaForSequenceClassification"
    (cache / "refs" / "main").unlink()
    with pytest.raises(ModelError, match="2 snapshots"):
        evaluate.load_scorer(cache)


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    save(classifier().model, tiny_tokenizer(), tmp_path / "decoder")
    with pytest.raises(ModelError, match="outputs per text|lacks score.weight"):
        evaluate.load_scorer(tmp_path / "decoder")
    config = json.loads((tmp_path / "decoder" / "config.json").read_text())
    (tmp_path / "decoder" / "config.json").write_text(json.dumps({**config, "num_labels": 1,
                                                                  "id2label": {"0": "a"}, "label2id": {"a": 0}}))
    with pytest.raises(ModelError, match="lacks score.weight"):
        evaluate.load_scorer(tmp_path / "decoder")


def test_a_tokenizer_without_template_or_padding_works(tmp_path):
    tokenizer = tiny_tokenizer(template=None)
    tokenizer.pad_token = None
    found = evaluate.evaluate(evaluate.prepared(classifier(), tokenizer, "tiny"), {"rewardbench2": rb2(2)}, tmp_path)
    text = found["text"]["rewardbench2"]
    assert "fallback" in text["chat_template"] and FALLBACK_TEMPLATE
    assert text["end_like_padding"] == 8  # pad became end of text: said, because some models then read one token early


def write(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_command_scores_a_sarm_from_a_local_folder(tmp_path, capsys):
    sarm = tiny_sarm()
    save(sarm, tiny_tokenizer(), tmp_path / "sarm")
    rows = rb2(5) + rb2(4, "Focus", 3)
    write(tmp_path / "data", "rewardbench2.jsonl", rows)
    arguments = ["evaluate", "--model", str(tmp_path / "sarm"), "--data", str(tmp_path / "data"),
                 "--benchmark", "rewardbench2", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "missing: Factuality" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    scored, _ = score_rewardbench2(sarm, tiny_tokenizer(), rows)
    ours = {(s["row"], s["slot"]): s["score"] for s in
            map(json.loads, (tmp_path / "out" / "scores.jsonl").read_text().splitlines()[1:])}
    for i, row in enumerate(scored):
        np.testing.assert_allclose([ours[i, slot] for slot in range(4)], row["scores"], atol=1e-5)
    assert result["benchmarks"]["rewardbench2"]["n_rows"] == {"Math": 5, "Focus": 4}
    assert main([*arguments[:-1], str(tmp_path / "few"), "--limit", "2"]) == 0
    few = json.loads((tmp_path / "few" / "results.json").read_text())
    assert few["benchmarks"]["rewardbench2"]["n_rows"] == {"Math": 2, "Focus": 2}


def test_data_folders_laid_out_as_on_the_hub(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet
    (tmp_path / "reward-bench-2" / "data").mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rb2(5)),
                        tmp_path / "reward-bench-2" / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "RM-Bench").mkdir()
    (tmp_path / "RM-Bench" / "total_dataset.json").write_text(json.dumps(rm(4)))
    found = benchmark_rows(["rewardbench2", "rm_bench"], str(tmp_path))
    assert {name: len(rows) for name, rows in found.items()} == {"rewardbench2": 5, "rm_bench": 4}
    assert found["rewardbench2"].report.notes[0].startswith("subset missing")


def test_the_command_says_one_sentence_when_a_hub_id_is_out_of_reach(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sarmlib.backbone._hub_reachable", lambda timeout=3.0: False)
    assert main(["evaluate", "--model", "nobody/none", "--data", "toy", "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: model 'nobody/none' is neither") and "\n" not in error


@pytest.mark.parametrize(("change", "message"), [
    (["--benchmark", "mt-bench"], "unknown mt-bench"), (["--limit", "0"], "positive"),
    (["--benchmark", "rm-bench"], "holds no rm_bench")])
def test_the_command_refuses_with_one_sentence(tmp_path, capsys, change, message):
    save(classifier(), tiny_tokenizer(), tmp_path / "model")
    write(tmp_path / "data", "rewardbench2.jsonl", rb2(2))
    capsys.readouterr()
    assert main(["evaluate", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"),
                 "--output", str(tmp_path / "out"), *change]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and "Traceback" not in error


# -- models with code of their own -------------------------------------------------------------------------------------

CODE = '''
from dataclasses import dataclass
from typing import Optional
import torch
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput

@dataclass
class CustomOutput(ModelOutput):
    rewards: Optional[torch.Tensor] = None
    score: Optional[torch.Tensor] = None
    logits: Optional[torch.Tensor] = None

class {name}(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.heads = torch.nn.Linear(config.hidden_size, {heads}, bias=False)
        self.gate = torch.nn.Linear(config.hidden_size, {heads}, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        last = (attention_mask * torch.arange(input_ids.shape[1])).argmax(-1)
        state = states[torch.arange(len(input_ids)), last]
        rewards = self.heads(state){shape}
        score = (self.gate(state).softmax(-1) * rewards.flatten(1)[:, :{heads}]).sum(-1{keep})
        return CustomOutput(rewards=rewards, score=score, logits={logits})
'''
OWN = {  # class: heads, shape of the heads' output, score [B] or [B, 1], and what the class puts into logits
    "LlamaForRewardModelWithGating": dict(heads=19, shape="", keep="", logits="score"),
    "LlamaForRewardModelWithGating31": dict(heads=12, shape=".reshape(-1, 3, 4)", keep=", keepdim=True",
                                            logits="score"),
    "LDLRewardModel27B": dict(heads=20, shape=".reshape(-1, 2, 10)", keep="", logits="rewards"),
}


@pytest.mark.parametrize("name", OWN)
def test_models_with_their_own_code_need_consent_and_give_their_combined_score(tmp_path, monkeypatch, name):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / f"own_{name.lower()}"
    folder.mkdir()
    (folder / "modeling_custom.py").write_text(CODE.format(name=name, **OWN[name]))
    spec = importlib.util.spec_from_file_location(f"own_{name}", folder / "modeling_custom.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    config = tiny_config(layers=2, num_labels=1)
    config.auto_map = {"AutoModelForSequenceClassification": f"modeling_custom.{name}"}
    model = getattr(module, name)(config).eval()
    save(model, tiny_tokenizer(), folder)
    assert AutoConfig.from_pretrained(folder).architectures == [name]
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        evaluate.load_scorer(folder)
    loaded = evaluate.load_scorer(folder, trust_remote_code=True)
    ids, mask = torch.randint(6, 100, (5, 9)), torch.ones(5, 9, dtype=torch.long)
    rewards = adapters.reward_of(loaded.model, ids, mask)
    with torch.no_grad():
        expected = model(ids, mask).score.reshape(-1).numpy()
    assert rewards.shape == (5,) and rewards.dtype == np.float64
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    found = evaluate.evaluate(loaded, {"rewardbench2": rb2(3)}, tmp_path / "out")
    assert found["benchmarks"]["rewardbench2"]["n_rows"] == {"Math": 3}


def test_several_outputs_without_a_rule_are_refused():
    model = LlamaForSequenceClassification(tiny_config(num_labels=3))
    with pytest.raises(ModelError, match=r"shape \(2, 3\) for 2 texts"):
        adapters.reward_of(model, torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.long))
