"""Model folders and data files that an enemy wrote: refused in words, without a hang, a crash or a file left behind."""

import gzip
import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from sarmlib.sae.topk import TopKSAE
from tests.reliability.outcome import command, copied, edit_json, no_crash, outcome, pretrains, refused, trains
from tests.tiny import TEMPLATE, tiny_sarm, tiny_tokenizer

pytestmark = pytest.mark.slow


def score(folder, prompt="w1 w2", **limits):
    return command("score", "--model", folder, "--prompt", prompt, "--response", "w3 w4", **limits)


def evaluates(folder, output, **limits):
    return command("evaluate", "--model", folder, "--data", "toy", "--limit", "2", "--output", output, **limits)


def left(out):
    """Files of a refused run; its record of settings must not block the next one, which part 6 tests."""
    return [p.name for p in out.rglob("*") if p.is_file() and p.name != "settings.json" and p.suffix != ".lock"]


def test_the_sound_folders_are_accepted(sarm, base, tmp_path):
    assert score(sarm)[0] == "ok"
    for found in (trains(base, tmp_path / "t"), pretrains(base, tmp_path / "p")):
        assert found[0] == "ok", found


CONFIGS = {"heads0": {"num_attention_heads": 0}, "heads7": {"num_attention_heads": 7},
           "positions": {"max_position_embeddings": "many"}, "hidden_size": {"hidden_size": "32"},
           "vocab": {"vocab_size": -1}, "act": {"hidden_act": "nonsense"}, "rope": {"rope_parameters": 5},
           "eps": {"rms_norm_eps": "x"}, "kv0": {"num_key_value_heads": 0}, "type": {"model_type": 5},
           "type2": {"model_type": "nonsense"}, "pad": {"pad_token_id": 10**6}, "pad2": {"pad_token_id": "x"}}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("where", ["sarm", "backbone"])
def test_config_of_a_decoder(name, where, sarm, base, tmp_path):
    if where == "sarm":
        folder = copied(sarm, tmp_path / "m")
        edit_json(folder / "config.json", **{f"backbone_config__{k}": v for k, v in CONFIGS[name].items()})
        found = score(folder)
    else:
        folder = copied(base / "backbone", tmp_path / "m")
        edit_json(folder / "config.json", **CONFIGS[name])
        found = trains(base, tmp_path / "out", backbone=folder)
        assert not (tmp_path / "out").exists() or found[0] == "ok", ("left files", found)
    no_crash(found) if name.startswith("pad") else refused(found)


TOP = {"architectures5": {"architectures": 5}, "architectures[[]]": {"architectures": [[]]},
       "architectures-str": {"architectures": "LlamaSARM"}, "dtype": {"dtype": "nonsense"},
       "torch_dtype": {"torch_dtype": "nonsense"}, "dtype5": {"dtype": 5}, "type5": {"model_type": 5},
       "auto_map5": {"auto_map": 5}, "labels": {"id2label": 5}, "backbone5": {"backbone_config": 5},
       "backbone{}": {"backbone_config": {}}, "n": {"n_features": "64"}, "quant": {"quantization_config": 5},
       "code[[]]": {"architectures": [[]], "auto_map": {"AutoConfig": "a.B"}}, "sarm_edits": {"sarm_edits": 5},
       "layer": {"layer": "3"}}


@pytest.mark.parametrize("name", TOP)
def test_config_of_a_sarm(name, sarm, tmp_path):
    folder = copied(sarm, tmp_path / "m")
    edit_json(folder / "config.json", **TOP[name])
    found = score(folder)
    no_crash(found) if name in ("sarm_edits", "architectures[[]]", "code[[]]", "torch_dtype") else refused(found)


@pytest.mark.parametrize("text", ["{}", "[]", "null", "5", '{"model": 5}'])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_json_of_another_kind(text, file, sarm, tmp_path):
    folder = copied(sarm, tmp_path / "m")
    (folder / file).write_text(text)
    found = score(folder)
    no_crash(found) if file == "tokenizer_config.json" else refused(found)


@pytest.mark.parametrize("job", ["score", "evaluate", "pretrain", "train"])
def test_tokenizer_ids_beyond_the_embedding(job, sarm, base, tmp_path):
    source = sarm if job in ("score", "evaluate") else base / "backbone"
    folder, out = copied(source, tmp_path / "m"), tmp_path / "out"
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"x{i}" for i in range(50)])
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = text["model"]["vocab"]
    for i in range(3, 30):  # w3.. get ids that the embedding lacks
        vocabulary[f"w{i}"] += 1000
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(text))
    run = {"score": lambda: score(folder), "evaluate": lambda: evaluates(folder, out),
           "pretrain": lambda: pretrains(base, out, folder), "train": lambda: trains(base, out, backbone=folder)}[job]
    found = run()
    if job == "evaluate" and found[0] == "ok":
        pytest.skip("the toy rows hold no such word")
    refused(found)
    assert not left(out), left(out)


@pytest.mark.parametrize("how", ["truncated", "garbage", "empty", "huge-header"])
@pytest.mark.parametrize("job", ["pretrain", "train"])
def test_damaged_weights_of_a_backbone(how, job, base, tmp_path):
    folder = copied(base / "backbone", tmp_path / "m")
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes({"truncated": raw[:len(raw) // 2], "garbage": b"\xff" * 500, "empty": b"",
                      "huge-header": (2**62).to_bytes(8, "little") + raw[8:]}[how])
    refused(pretrains(base, tmp_path / "o", folder) if job == "pretrain" else
            trains(base, tmp_path / "o", backbone=folder))
    assert not left(tmp_path / "o"), left(tmp_path / "o")


TEMPLATES = {"zero": "{{ 1 / 0 }}", "type": "{{ 1 + 'a' }}", "range": "{% for i in range(10**12) %}x{% endfor %}",
             "nothing": "", "blank": "{{ '' }}", "undefined": "{{ messages[0].x.y.z }}",
             "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "index": "{{ messages[99]['role'] }}",
             "nested": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}"
                       "{% endfor %}{% endfor %}x",
             "repeat": "{{ 'x' * 10**10 }}", "syntax": "{% for %}", "format":
             "{{ '%099999999999d' % 1 }}", "power": "{{ 9**9**9 }}", "power2": "{% set x = 10**100000000 %}",
             "much": "{% for a in range(9999) %}{% for b in range(9999) %}xxxxxxxxxx{% endfor %}{% endfor %}"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(name, sarm, tmp_path):
    folder = copied(sarm, tmp_path / "m")
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    found = score(folder, memory=3 << 30)
    no_crash(found) if name == "nothing" else refused(found)


@pytest.mark.parametrize("change", [{"sae_k": "4"}, {"sae_k": True}, {"sarm_use_topk": "false"},
                                    {"sae_source_layer": "2"}, {"sae_source_layer": True}])
def test_text_is_no_truth_in_the_authors_layout(change, tmp_path):
    from sarmlib.sarm.released import load_released, save_official
    save_official(tiny_sarm(relu=False, encoder_bias=True), tmp_path / "m")
    edit_json(tmp_path / "m/config.json", **{f"sarm_param__{k}": v for k, v in change.items()})
    refused(outcome(lambda: load_released(tmp_path / "m") and None))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["score.weight", "sae.W_enc", "model.layers.0.mlp.up_proj.weight"])
def test_weights_of_another_kind_of_number(dtype, name, sarm, tmp_path):
    folder = copied(sarm, tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    state[name] = (state[name] * 10).to(dtype)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    refused(score(folder))


@pytest.mark.parametrize("name", ["W_enc", "b_pre"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_sae_weights_of_another_kind_of_number(dtype, name, base, tmp_path):
    folder = copied(base / "sae", tmp_path / "sae")
    state = load_file(folder / "sae.safetensors")
    state[name] = (state[name] * 10).to(dtype)
    save_file(state, folder / "sae.safetensors", {"format": "pt"})
    refused(outcome(lambda: TopKSAE.load(folder) and None))


@pytest.mark.parametrize("field", ["text", "role", "id", "key"])
@pytest.mark.parametrize("job", ["score", "explain", "train", "pretrain"])
def test_lone_surrogates(field, job, sarm, base, tmp_path):
    bad, file = "w1 \ud800", tmp_path / "rows.jsonl"
    row = {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4"}
    row |= {"text": {"prompt": bad}, "id": {"id": bad}, "key": {bad: "x"},
            "role": {"prompt": [{"role": bad, "content": "w1"}]}}[field]
    if job == "pretrain":
        row["text"] = bad if field == "text" else "w1. w2."
    file.write_text(json.dumps(row) + "\n")
    refused({"score": lambda: command("score", "--model", sarm, "--input", file),
             "explain": lambda: command("explain", "--model", sarm, "--input", file),
             "train": lambda: trains(base, tmp_path / "o", data=file),
             "pretrain": lambda: pretrains(base, tmp_path / "o", corpus=file)}[job]())
    assert job != "train" or not (tmp_path / "o").exists()


@pytest.mark.parametrize("option", ["--prompt", "--response"])
def test_lone_surrogates_on_the_command_line(option, sarm):
    words = {"--prompt": "w1", "--response": "w2"} | {option: "w1 \udcff"}
    refused(command("score", "--model", sarm, *(w for pair in words.items() for w in pair)))


def test_lone_surrogate_in_a_template(sarm, tmp_path):
    folder = copied(sarm, tmp_path / "m")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE + "\ud800")
    refused(score(folder))


@pytest.mark.parametrize("kind", ["timestamp", "date"])
def test_parquet_dates_out_of_range(kind, sarm, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    values = pa.array([2**62], pa.timestamp("us")) if kind == "timestamp" else pa.array([2**30], pa.date32())
    pq.write_table(pa.table({"prompt": ["w1"], "response": ["w2"], "when": values}), tmp_path / "r.parquet")
    no_crash(command("score", "--model", sarm, "--input", tmp_path / "r.parquet"))


def bomb(path, megabytes=300, line=b"\0"):
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(megabytes):
            file.write(line * (1 << 20))


@pytest.mark.parametrize("name", ["r.jsonl.gz", "r.json.gz", "c.txt.gz", "c.jsonl.gz"])
@pytest.mark.parametrize("of", ["nothing", "spaces", "lines"])
def test_gz_bombs(name, of, sarm, base, tmp_path):
    bomb(tmp_path / name, 300, {"nothing": b"\0", "spaces": b" ", "lines": b"\n"}[of])
    limits = {"memory": 3 << 30}
    found = (command("score", "--model", sarm, "--input", tmp_path / name, **limits) if name[0] == "r"
             else pretrains(base, tmp_path / "o", corpus=tmp_path / name, **limits))
    refused(found)


def test_zstd_bomb_in_parquet(sarm, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    big = pa.array(["\0" * (100 << 20)] * 3)
    pq.write_table(pa.table({"prompt": big, "response": big}), tmp_path / "r.parquet", compression="zstd",
                   use_dictionary=False)
    assert (tmp_path / "r.parquet").stat().st_size < 1 << 20
    refused(command("score", "--model", sarm, "--input", tmp_path / "r.parquet", memory=4 << 30))


@pytest.mark.parametrize("use", ["name: x\ndescription: *a9", "description: d\nhardware: h\ncost: c\nseeds: *a9"])
def test_yaml_alias_bomb(use, tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "p.yaml").write_text("\n".join([*lines, use]))
    refused(command("reproduce", "--profile", tmp_path / "p.yaml", "--dry-run", memory=2 << 30, seconds=10))


def test_yaml_alias_bomb_of_set(base, tmp_path):
    text = "[&a [x,x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b], " \
           "&d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d], " \
           "&f [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e], &g [*f,*f,*f,*f,*f,*f,*f,*f,*f,*f], &h [*g,*g,*g,*g,*g,*g,*g,*g,*g,*g]]"
    refused(command("train", "--backbone", base / "backbone", "--data", base / "pairs.jsonl", "--output",
                    tmp_path / "o", "--set", f"seeds={text}", seconds=15))


@pytest.mark.parametrize("setting", ["seed", "sae.steps", "sae.lr", "steering.factor", "sae.expansion", "seeds"])
@pytest.mark.parametrize("number", ["1" + "0" * 400, "'1" + "0" * 400 + "'", "1" * 5000, "0x" + "f" * 5000])
def test_400_digits_in_a_profile(setting, number, tmp_path):
    section, _, name = setting.rpartition(".")
    value = f"[{number}]" if setting == "seeds" else number
    text = "description: d\nhardware: h\ncost: c\nbackbone: {source: toy}\n"
    (tmp_path / "p.yaml").write_text(text + (f"{section}: {{{name}: {value}}}" if section else f"{name}: {value}"))
    refused(command("reproduce", "--profile", tmp_path / "p.yaml", "--dry-run", "--runs", tmp_path / "runs"))


def test_400_digits_in_rows(sarm, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"prompt": "w1", "response": "w2", "id": ' + "1" * 5000 + "}\n")
    no_crash(command("score", "--model", sarm, "--input", tmp_path / "r.jsonl"))


@pytest.mark.parametrize("kind", ["sarm", "backbone"])
def test_pickled_weights_are_not_loaded(kind, sarm, base, tmp_path):
    folder = copied(sarm if kind == "sarm" else base / "backbone", tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(score(folder) if kind == "sarm" else trains(base, tmp_path / "o", backbone=folder))


@pytest.mark.parametrize("kind", ["sarm", "released"])
@pytest.mark.parametrize("place", ["../outside.safetensors", "absolute"])
def test_an_index_names_no_file_outside(kind, place, sarm, tmp_path):
    folder = tmp_path / "m"
    if kind == "sarm":
        copied(sarm, folder)
    else:
        from sarmlib.sarm.released import save_official
        save_official(tiny_sarm(relu=False, encoder_bias=True), folder)
        tiny_tokenizer().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    name = str(tmp_path / "outside.safetensors") if place == "absolute" else place
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, name)}))
    refused(score(folder))


@pytest.fixture
def full(tmp_path, request):
    mount = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '200k')}", "tmpfs", tmp_path]
    if not shutil.which("mount") or subprocess.run(mount).returncode:
        pytest.skip("no tmpfs")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_in_train(full, base):
    found = trains(base, full / "out")
    refused(found)
    assert "disk space" in found[1]


def test_a_full_disk_in_pretrain(full, base):
    refused(pretrains(base, full / "out"))


def test_a_full_disk_in_steer(full, sarm):
    (full / "filler").write_bytes(b"0" * 150_000)
    found = command("steer", "--model", sarm, "--feature", "1=2", "--output", full / "out")
    refused(found)
    assert [p.name for p in full.rglob("*") if p.is_file()] == ["filler"]


@pytest.mark.parametrize("full", ["4k"], indirect=True)
def test_a_full_disk_in_evaluate(full, sarm):
    refused(evaluates(sarm, full / "out"))
