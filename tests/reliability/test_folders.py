"""Model folders and data files that an enemy wrote: refused in words, without a hang, a crash or a file left behind."""

import gzip
import json
import shutil
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from sarmlib.sarm.released import load_released, save_official
from tests.tiny import TEMPLATE, tiny_sarm
from tools.outcome import command, edit_json, no_crash, outcome, refused, run

pytestmark = pytest.mark.slow


def left(out):
    """Files of a refused run; its record of settings must not block the next one, which part 6 tests."""
    return [p.name for p in out.rglob("*") if p.is_file() and p.name != "settings.json" and p.suffix != ".lock"]


@pytest.mark.parametrize("job", ["score", "explain", "steer", "evaluate", "train", "pretrain-sae"])
def test_the_sound_folders_are_accepted(job, base, tmp_path):
    assert run(job, base, tmp_path / "out")[0] == "ok"


DECODER = [{"num_attention_heads": 0}, {"num_attention_heads": 7}, {"max_position_embeddings": "many"},
           {"hidden_size": "32"}, {"vocab_size": -1}, {"hidden_act": "nonsense"}, {"rope_parameters": 5},
           {"rms_norm_eps": "x"}, {"num_key_value_heads": 0}, {"model_type": 5}, {"model_type": "nonsense"}]
SARM = [{"architectures": 5}, {"architectures": "LlamaSARM"}, {"dtype": "nonsense"}, {"dtype": 5}, {"model_type": 5},
        {"auto_map": 5}, {"id2label": 5}, {"backbone_config": 5}, {"backbone_config": {}}, {"n_features": "64"},
        {"quantization_config": 5}, {"layer": "3"}]
PADS = [{"pad_token_id": 10**6}, {"pad_token_id": "x"}]
HARMLESS = [*PADS, {"architectures": [[]]}, {"torch_dtype": "nonsense"}, {"sarm_edits": 5},
            {"architectures": [[]], "auto_map": {"AutoConfig": "a.B"}}]


@pytest.mark.parametrize("job, part, change", [
    *(("score", None, one) for one in [*SARM, *HARMLESS]), *(("train", None, one) for one in [*DECODER, *PADS]),
    *(("score", "backbone_config", one) for one in [*DECODER, *PADS])])
def test_configs(job, part, change, model, base, tmp_path):
    edit_json(model / "config.json", part, **change)
    found = run(job, base, tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists() or found[0] == "ok", ("left files", found)
    no_crash(found) if change in HARMLESS else refused(found)


@pytest.mark.parametrize("text", ["{}", "[]", "null", "5", '{"model": 5}'])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_json_of_another_kind(text, file, model, base):
    (model / file).write_text(text)
    found = run("score", base, model=model)
    no_crash(found) if file == "tokenizer_config.json" else refused(found)


@pytest.mark.parametrize("job", ["score", "evaluate", "pretrain-sae", "train"])
def test_tokenizer_ids_beyond_the_embedding(job, model, base, tmp_path):
    words = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    edit_json(model / "tokenizer.json", "model", vocab=words | {f"w{i}": 1000 + i for i in range(3, 30)})
    refused(run(job, base, tmp_path / "out", model=model))
    assert not left(tmp_path / "out"), left(tmp_path / "out")


@pytest.mark.parametrize("how", ["truncated", "garbage", "empty", "huge-header", "a pickle instead"])
@pytest.mark.parametrize("job", ["score", "pretrain-sae", "train"])
def test_damaged_weights(how, job, model, base, tmp_path):
    file = model / "model.safetensors"
    raw = file.read_bytes()
    if how == "a pickle instead":
        torch.save(load_file(file), model / "pytorch_model.bin")
        file.unlink()
    else:
        file.write_bytes({"truncated": raw[:len(raw) // 2], "garbage": b"\xff" * 500, "empty": b"",
                          "huge-header": (2**62).to_bytes(8, "little") + raw[8:]}[how])
    refused(run(job, base, tmp_path / "out", model=model))
    assert not left(tmp_path / "out"), left(tmp_path / "out")


LONG = "{{% for a in range(9999) %}}{{% for b in range(9999) %}}{}{{% endfor %}}{{% endfor %}}"


@pytest.mark.parametrize("template", [
    "{{ 1 / 0 }}", "{{ 1 + 'a' }}", "{% for i in range(10**12) %}x{% endfor %}", "", "{{ '' }}", "{% for %}",
    "{{ messages[0].x.y.z }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[99]['role'] }}",
    LONG.format("{% for c in range(9999) %}{% endfor %}") + "x", LONG.format("xxxxxxxxxx"),
    "{{ '%099999999999d' % 1 }}", TEMPLATE + "\ud800"])
def test_chat_templates(template, model, base):
    (model / "chat_template.jinja").unlink()
    edit_json(model / "tokenizer_config.json", chat_template=template)
    found = run("score", base, model=model, memory=3 << 30)
    refused(found) if template else no_crash(found)
    assert not template or "chat template" in found[1]


@pytest.mark.parametrize("change", [{"sae_k": "4"}, {"sae_k": True}, {"sarm_use_topk": "false"},
                                    {"sae_source_layer": "2"}, {"sae_source_layer": True}])
def test_text_is_no_truth_in_the_authors_layout(change, tmp_path):
    save_official(tiny_sarm(relu=False, encoder_bias=True), tmp_path)
    edit_json(tmp_path / "config.json", "sarm_param", **change)
    refused(outcome(lambda: load_released(tmp_path) and None))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("job, file, name", [
    ("score", "sarm/model", "score.weight"), ("score", "sarm/model", "sae.W_enc"), ("train", "sae/sae", "W_enc"),
    ("score", "sarm/model", "model.layers.0.mlp.up_proj.weight"), ("train", "sae/sae", "b_pre")])
def test_weights_of_another_kind_of_number(dtype, job, file, name, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "base")
    state = load_file(copy / f"{file}.safetensors")
    state[name] = (state[name] * 10).to(dtype)
    save_file(state, copy / f"{file}.safetensors", {"format": "pt"})
    refused(run(job, copy, tmp_path / "out"))


@pytest.mark.parametrize("field", ["text", "role", "id", "key"])
@pytest.mark.parametrize("job", ["score", "explain", "train", "pretrain-sae"])
def test_lone_surrogates(field, job, base, tmp_path):
    bad, file = "w1 \ud800", tmp_path / "rows.jsonl"
    row = {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4"}
    row |= {"text": {"prompt": bad}, "id": {"id": bad}, "key": {bad: "x"},
            "role": {"prompt": [{"role": bad, "content": "w1"}]}}[field]
    if job == "pretrain-sae":
        row["text"] = bad if field == "text" else "w1. w2."
    file.write_text(json.dumps(row) + "\n")
    refused(run(job, base, tmp_path / "out", data=file))
    assert job == "pretrain-sae" or not (tmp_path / "out").exists()


@pytest.mark.parametrize("prompt, response", [("w1 \udcff", "w2"), ("w1", "w2 \udcff")])
def test_lone_surrogates_on_the_command_line(prompt, response, base):
    refused(command("score", "--model", base / "sarm", "--prompt", prompt, "--response", response))


@pytest.mark.parametrize("kind", ["timestamp", "date"])
def test_parquet_dates_out_of_range(kind, base, tmp_path):
    values = pa.array([2**62], pa.timestamp("us")) if kind == "timestamp" else pa.array([2**30], pa.date32())
    pq.write_table(pa.table({"prompt": ["w1"], "response": ["w2"], "when": values}), tmp_path / "r.parquet")
    no_crash(run("score", base, data=tmp_path / "r.parquet"))


@pytest.mark.parametrize("job, name", [("score", "r.jsonl.gz"), ("score", "r.json.gz"), ("pretrain-sae", "c.txt.gz"),
                                       ("pretrain-sae", "c.jsonl.gz")])
@pytest.mark.parametrize("fill", [b"\0", b" ", b"\n"])
def test_gz_bombs(job, name, fill, base, tmp_path):
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(fill * (1 << 20))
    refused(run(job, base, tmp_path / "out", data=tmp_path / name, memory=3 << 30))


def test_zstd_bomb_in_parquet(base, tmp_path):
    big = pa.array(["\0" * (100 << 20)] * 3)
    pq.write_table(pa.table({"prompt": big, "response": big}), tmp_path / "r.parquet", compression="zstd",
                   use_dictionary=False)
    assert (tmp_path / "r.parquet").stat().st_size < 1 << 20
    refused(run("score", base, data=tmp_path / "r.parquet", memory=4 << 30))


NESTED = [f"&a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(10)]


@pytest.mark.parametrize("use", ["name: x\ndescription: *a9", "description: d\nhardware: h\ncost: c\nseeds: *a9"])
def test_yaml_alias_bomb(use, tmp_path):
    (tmp_path / "p.yaml").write_text("\n".join([*(f"a{i}: {one}" for i, one in enumerate(NESTED)), use]))
    refused(command("reproduce", "--profile", tmp_path / "p.yaml", "--dry-run", seconds=10))


def test_yaml_alias_bomb_of_set(base, tmp_path):
    refused(run("train", base, tmp_path / "out", f"seeds=[{', '.join(NESTED)}]", seconds=15))


@pytest.mark.parametrize("setting", ["seed", "sae.steps", "sae.lr", "steering.factor", "sae.expansion", "seeds"])
@pytest.mark.parametrize("number", ["1" + "0" * 400, "'1" + "0" * 400 + "'", "1" * 5000, "0x" + "f" * 5000])
def test_400_digits_in_a_profile(setting, number, tmp_path):
    section, _, name = setting.rpartition(".")
    value = f"[{number}]" if setting == "seeds" else number
    text = "description: d\nhardware: h\ncost: c\nbackbone: {source: toy}\n"
    (tmp_path / "p.yaml").write_text(text + (f"{section}: {{{name}: {value}}}" if section else f"{name}: {value}"))
    refused(command("reproduce", "--profile", tmp_path / "p.yaml", "--dry-run", "--runs", tmp_path / "runs"))


def test_400_digits_in_rows(base, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"prompt": "w1", "response": "w2", "id": ' + "1" * 5000 + "}\n")
    no_crash(run("score", base, data=tmp_path / "r.jsonl"))


@pytest.mark.parametrize("kind", ["sarm", "released"])
@pytest.mark.parametrize("place", ["../outside.safetensors", "absolute"])
def test_an_index_names_no_file_outside(kind, place, model, base, tmp_path):
    if kind == "released":
        save_official(tiny_sarm(relu=False, encoder_bias=True), model)
    state, outside = load_file(model / "model.safetensors"), tmp_path / "outside.safetensors"
    shutil.move(model / "model.safetensors", outside)
    name = str(outside) if place == "absolute" else place
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, name)}))
    refused(run("score", base, model=model))


@pytest.mark.parametrize("job, size", [
    ("train", "200k"), ("pretrain-sae", "200k"), ("steer", "50k"), ("evaluate", "4k")])
def test_a_full_disk(job, size, base, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path]
    if not shutil.which("mount") or subprocess.run(mount).returncode:
        pytest.skip("no tmpfs")
    try:
        found = run(job, base, tmp_path / "out")
        assert job != "steer" or not left(tmp_path)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    refused(found)
    assert job != "train" or "disk space" in found[1]
