"""Bad input for every command: what becomes of it, and what it leaves behind.

    OMP_NUM_THREADS=1 python -m tools.fuzz [--every 1] [--show accepted]

Each input is given to one command in a child process bounded in time and memory.  It must be accepted, or refused in
words (an error of the library or of the command line); a refused command must leave no file but its record of settings.
Rows stand among sound ones, so an accepted file must come out with every sound row, at the reward that it has alone.
Prints counts by command, each finding, and with ``--show accepted`` what was accepted.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from sarmlib.data.toyworld import datasets as toy
from sarmlib.sae.topk import TopKSAE
from tests.reliability.test_folders import left
from tests.tiny import tiny_config, tiny_pairs, tiny_sarm, tiny_tokenizer
from tools.outcome import command

Case = tuple[str, str, list]  # command, name, arguments
VALUES = [None, 5, -1.5, True, [], {}, "", " \n", "\ud800", "\0", "w1 " * 400_000, [None], [[]], {"a": 1}, ["w1", 5],
          float("nan"), 10**400, "\u202ew1", [{"role": "user"}], [{"role": 5, "content": "w1"}],
          [{"role": "assistant", "content": None}]]
SMALL = ["device=cpu", "preferences.max_length=64", "reward.batch_size=4", "reward.micro_batch_size=4",
         "reward.epochs=1", "sae.vectors=400", "sae.batch_size=32", "sae.steps=4", "sae.expansion=2",
         "corpus.window=64", "reward.lr=1e-3", "sae.positions=every"]
SETS = [part for one in SMALL for part in ("--set", one)]


def sound(work: Path) -> None:
    """sarm/, backbone/, sae/: what the commands need beside the bad input."""
    tiny_sarm().save_pretrained(work / "sarm")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(work / "backbone")
    for name in ("sarm", "backbone"):
        tiny_tokenizer().save_pretrained(work / name)
    TopKSAE(32, 64, 4, generator=torch.Generator().manual_seed(0)).save(work / "sae")


def doors(work: Path, file: Path, out: Path) -> dict[str, list]:
    """The command that reads ``file`` in each role."""
    sarm, backbone, folder = work / "sarm", work / "backbone", file.parent
    ask = ["--prompt", "w1", "--response", "w2"]
    return {"score": ["score", "--model", sarm, "--input", file, "--output", out / "rows.jsonl"],
            "explain": ["explain", "--model", sarm, "--input", file, "--output", out / "rows.jsonl"],
            "train": ["train", "--backbone", backbone, "--sae", work / "sae", "--data", file, "--output", out / "t",
                      *SETS],
            "pretrain-sae": ["pretrain-sae", "--model", backbone, "--corpus", file, "--output", out / "p", *SETS],
            "evaluate, RewardBench 2": ["evaluate", "--model", sarm, "--data", folder.parent, "--output", out / "e"],
            "evaluate, RM-Bench": ["evaluate", "--model", sarm, "--data", folder.parent, "--output", out / "e"],
            "labels": ["explain", "--model", sarm, "--labels", file, *ask],
            "profile": ["reproduce", "--profile", file, "--dry-run"],
            "verify": ["verify", "--profile", file, "--runs", out]}


FOLDER_OF = {"evaluate, RewardBench 2": "rewardbench2", "evaluate, RM-Bench": "rm_bench"}
ROWS = {"score": [{"prompt": "w1 w2", "response": "w3"}, {"prompt": "w1", "responses": ["w2", "w3"]},
                  {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}],
        "explain": [{"prompt": "w1 w2", "chosen": "w3", "rejected": "w4 w5"}],
        "train": tiny_pairs(20), "pretrain-sae": [{"text": "w1 w2 w3. w4 w5 w6! w7 w8. " * 20}] * 40,
        "evaluate, RewardBench 2": toy.rewardbench2(2, 0), "evaluate, RM-Bench": toy.rm_bench(2, 0)}


def spoiled_rows(rows: list[dict]) -> Iterator[tuple[str, list]]:
    """Sound rows and one that has a wrong value in one field, or lacks or misnames it, or is no object."""
    for field in rows[0]:
        for number, value in enumerate(VALUES):
            bad = copy.deepcopy(rows[0])
            bad[field] = value
            yield f"{field} = value {number}", [*rows, bad]
        lacking = {name: value for name, value in rows[0].items() if name != field}
        yield f"{field} absent", [*rows, lacking]
        yield f"{field} in capitals", [*rows, {**lacking, field.upper(): rows[0][field]}]
    for number, row in enumerate((None, 5, "text", [], [1], {})):
        yield f"row {number} is no row", [*rows, row]


def written(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def files(rows: list[dict]) -> Iterator[tuple[str, bytes]]:
    """(name with suffix, bytes) of damaged files."""
    good = written(rows)
    text = good.decode()
    yield from {
        "bom.jsonl": b"\xef\xbb\xbf" + good, "utf16le.jsonl": text.encode("utf-16"), "empty.jsonl": b"",
        "utf16be.jsonl": text.encode("utf-16-be"), "latin.jsonl": text.replace("w1", "\xe9").encode("latin-1"),
        "blank.jsonl": b"\n \n\t\n", "nul.jsonl": good + b"\0\0\0\n", "crlf.jsonl": good.replace(b"\n", b"\r\n"),
        "cut.jsonl": good[:-len(good) // 3], "cr.jsonl": good.replace(b"\n", b"\r"), "list.json": f"[{text}]".encode(),
        "deep.jsonl": b"[" * 200_000 + b"\n", "deep object.jsonl": b'{"a":' * 100_000, "nan.jsonl": b"NaN\nInfinity\n",
        "twice.jsonl": good + good[:-2] + b', "prompt": "w9"}\n', "long line.jsonl": good + b'{"x": "' + b"a" * 10**7,
        "huge number.jsonl": good + b'{"prompt": ' + b"9" * 10**5 + b"}\n", "comment.jsonl": b"// rows\n" + good,
        "html.jsonl": b"<html><body>Sign in</body></html>", "pointer.jsonl":
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "random.jsonl": bytes(range(256)) * 64,
        "gz cut.jsonl.gz": gzip.compress(good)[:-9], "gz no.jsonl.gz": good, "gz flip.jsonl.gz": flipped(good),
        "gz bomb.jsonl.gz": gzip.compress(b" " * (64 << 20)), "gz twice.jsonl.gz": gzip.compress(gzip.compress(good)),
        "parquet no.parquet": good, "parquet cut.parquet": b"PAR1" + good, "csv.csv": b"prompt,chosen\nw1,w2\n",
        "pickle.pkl": b"\x80\x04N.", "rows.txt": b"\xff\xfe\0", "quoted.json": json.dumps(text).encode(),
        "number.json": b"5", "null.json": b"null", "object.json": json.dumps({"rows": rows}).encode(),
        "columns.json": json.dumps({name: [row.get(name) for row in rows] for name in rows[0]}).encode(),
        "half.json": b'[{"prompt": "w1"', "trailing.json": b"[1, 2,]", "new\nline.jsonl": b"[", "-dash.jsonl": b"{",
        "a b \u202e.jsonl": b"{", "no suffix": good, ".hidden.jsonl": good}.items()


OTHER_ROWS = ("latin.jsonl", "twice.jsonl", "cut.jsonl", "csv.csv", "columns.json")
"""Damaged files whose rows are others, or fewer."""


def flipped(good: bytes) -> bytes:
    packed = bytearray(gzip.compress(good))
    packed[len(packed) // 2] ^= 8
    return bytes(packed)


def special(folder: Path, rows: list[dict]) -> Iterator[tuple[str, Path]]:
    """Paths that are no plain file, or a container of another kind."""
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling.jsonl").symlink_to(folder / "nowhere")
    (folder / "empty folder").mkdir()
    (folder / "nested" / "deeper").mkdir(parents=True)
    (folder / "nested" / "deeper" / "README.md").write_text("no data")
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.jsonl").write_bytes(written(rows))
    (folder / "mixed" / "b.parquet").write_bytes(b"PAR1PAR1")
    with zipfile.ZipFile(folder / "rows.zip", "w") as archive:
        archive.writestr("rows.jsonl", written(rows))
    for name, column in {"ints": [1, 2], "dates": pd.to_datetime(["2020-01-01", "2021-01-01"]), "bytes": [b"\xff", b""],
                         "lists": [[1], None]}.items():
        pd.DataFrame({"prompt": column, "text": column, "chosen": column}).to_parquet(folder / f"{name}.parquet")
    for path in sorted(folder.iterdir()):
        yield path.name, path
    yield "/dev/null", Path("/dev/null")
    yield "nowhere", folder / "nowhere.jsonl"
    yield "a long name", folder / ("a" * 300 + ".jsonl")


PROFILES = ["", "[]", "5", "null", "name: toy", "a: &x [1]\nb: *x", "seed: [1]", "seeds: 5", "seeds: []",
            "seeds: [0, 0]", "sae: 5", "sae: {lr: x}", "sae: {lr: .inf}", "sae: {lr: .nan}", "sae: {k_ratio: 3/0}",
            "sae: {k_ratio: a/b}", "sae: {steps: -1}", "sae: {unknown: 1}", "sae: {lr: 1, lr: 2}", "variants: [x]",
            "variants: sarm", "dtype: float8", "device: tpu", "backbone: {source: ../..}", "backbone: {layer: 0}",
            "backbone: {layer: 999}", "backbone: {source: 5}", "corpus: {source: []}",
            "preferences: {eval_fraction: 2}", "reward: {epochs: 0}", "reward: {batch_size: 0}",
            "interpretation: {explainer: x}", "steering: {factor: .nan}", "name: ../../x", "name: /tmp/x",
            "!!python/object/apply:os.system ['true']", "a: !!binary x", "? {a: b}\n: c", "\t", "{", "- a\nb",
            "x: " + "[" * 5000, "seed: 1e400", "seed: " + "9" * 500, "description: \"\\ud800\"", "workers: 0",
            "workers: 1e9", "benchmarks: {max_length: 1}", "benchmarks: {items_per_subset: 0}", "data: /nowhere",
            "extends: toy", "\ufeffseed: 0"]
LABELS = ["", "5", "[]", "null", '{"a": "b"}', '{"1": 5}', '{"1": null}', '{"-1": "x"}', '{"1e3": "x"}',
          '{"1": "\\ud800"}', '{"1": "\\u001b[31mred"}', '{"1": {"a": 1}}', "[" * 100_000, '{"1": "x", "1": "y"}',
          '{"9999999999999999999999": "x"}', '{" 1 ": "x"}', '{"1": "' + "x" * 10**6 + '"}', "\ufeff{}", "NaN",
          '{"1": NaN}']


FEATURES = ["", "x", "1", "1=", "=2", "1=x", "1=nan", "1=inf", "-1=2", "64=2", "999999999999=2", "1=1e300", "1=1e400",
            "1.5=2", "1=2=3", "\ud800=2", "1=0x10"]
MODELS = ["", " ", "x", "a/b/c", "../x", "/", ".", "toy:x", "toy:-1", "a@b", "\0", "\ud800", "https://x.y/z", "-",
          "a/b@c", "/dev/null", "~nobody", "x" * 5000]
PATHS = ["/dev/full", "/dev/null", "/proc/x", "/", "", "\0", "a\nb/c.jsonl", "x" * 300]
SETTINGS = ["x", "=", "a=b", "sae=1", "sae.lr=", "sae.lr=x", "sae.lr=-1", "sae.lr=nan", "sae.k_ratio=9",
            "sae.steps=1e9", "seed=-1", "reward.lr=inf", "reward.batch_size=0", "backbone.layer=99", "sae.vectors=0",
            "sae.expansion=0", "corpus.window=1", "sae.lr=[1", "name=../x", "preferences.max_length=1",
            "reward.scheduler=x", "dtype=int8", "device=x"]


def options(work: Path, out: Path) -> Iterator[Case]:
    """Options with values that make no sense."""
    sarm, ask = ["--model", work / "sarm"], ["--prompt", "w1", "--response", "w2"]
    train = ["train", "--backbone", work / "backbone", "--data", work / "pairs.jsonl", "--output", out / "t", *SETS]
    for value in FEATURES:
        yield "steer", f"--feature {value!r}", ["steer", *sarm, "--feature", value, "--output", out / "s"]
    for model in [*MODELS, work / "sae", work / "backbone" / "config.json"]:
        for name in ("score", "evaluate"):
            rest = ask if name == "score" else ["--data", "toy", "--limit", "1", "--output", out / "e"]
            yield name, f"--model {str(model)[:30]!r}", [name, "--model", model, *rest]
        yield "train", f"--sae {str(model)[:30]!r}", [*train, "--sae", model]
    for length in ("0", "1", "-5", "x", "1e9", "9" * 30):
        yield "score", f"--max-length {length}", ["score", *sarm, *ask, "--max-length", length]
        yield "explain", f"--top {length}", ["explain", *sarm, *ask, "--top", length]
    for path in [*PATHS, work / "sarm" / "config.json" / "y"]:
        target = path if isinstance(path, Path) or path.startswith("/") or not path.strip("\0") else out / path
        yield "score", f"--output {str(path)[:30]!r}", ["score", *sarm, *ask, "--output", target]
        yield "steer", f"--output {str(path)[:30]!r}", ["steer", *sarm, "--feature", "1=2", "--output", target]
    for one in SETTINGS:
        yield "train", f"--set {one}", [*train, "--set", one]


def cases(work: Path, bad: Path, out: Path) -> Iterator[Case]:
    """Everything, in a fixed order; the file of a case is written when the case is drawn."""
    (work / "pairs.jsonl").write_bytes(written(tiny_pairs(20)))
    for door, rows in ROWS.items():
        folder = bad / FOLDER_OF.get(door, "input")

        def put(name: str, content: bytes, folder=folder, door=door) -> list:
            shutil.rmtree(bad, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / name).write_bytes(content)
            return doors(work, folder / name, out)[door]

        for name, content in ((name, written(made)) for name, made in spoiled_rows(rows)):
            yield door, name, put("rows.jsonl", content)
        for name, content in files(rows):
            yield door, name, put(name, content)
        shutil.rmtree(bad, ignore_errors=True)
        folder.mkdir(parents=True)
        for number, (name, path) in enumerate(special(folder, rows)):
            if number == 0 or door not in FOLDER_OF:  # evaluate reads the folder, not the file
                yield door, name, doors(work, path, out)[door]
    for door, texts in (("profile", PROFILES), ("verify", PROFILES), ("labels", LABELS)):
        suffix = "json" if door == "labels" else "yaml"
        for text in texts:
            shutil.rmtree(bad, ignore_errors=True)
            bad.mkdir(parents=True)
            (bad / f"bad.{suffix}").write_bytes(text.encode("utf-8", "surrogatepass"))
            yield door, repr(text[:40]), doors(work, bad / f"bad.{suffix}", out)[door]
    yield from options(work, out)


def rewards(out: Path) -> set[tuple]:
    """(row, of, reward) of the rows that a command wrote."""
    rows = out / "rows.jsonl"
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []
    return {(row["row"], row["of"], round(row["reward"], 4)) for row in found}


def judged(arguments: list, out: Path, wanted: set[tuple] = frozenset()) -> tuple[str, str]:
    """(accepted, refused, foreign, hang, killed, partial files, rows lost or misread; what was said)."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    what, said = command(*arguments)
    if what == "refused" and (files_left := [name for name in left(out) if name != "evaluation.log"]):
        return "partial files", f"{files_left}: {said}"
    if what == "ok" and (lost := wanted - rewards(out)):
        return "rows lost or misread", f"{sorted(lost)}: {said}"
    return "accepted" if what == "ok" else what, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only each n-th input")
    parser.add_argument("--show", choices=["accepted", "refused"], help="print these too")
    parser.add_argument("--only", help="one command")
    args = parser.parse_args()
    counts: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sound(work)
        alone = {}
        for door in ("score", "explain"):
            (work / "rows.jsonl").write_bytes(written(ROWS[door]))
            judged(doors(work, work / "rows.jsonl", work / "out")[door], work / "out")
            alone[door] = rewards(work / "out")
        for number, (door, name, arguments) in enumerate(cases(work, work / "bad", work / "out")):
            if number % args.every or args.only not in (None, door):
                continue
            among = "--input" in arguments and name not in OTHER_ROWS
            what, said = judged(arguments, work / "out", alone[door] if among else frozenset())
            counts.setdefault(door, Counter())[what] += 1
            if what not in ("accepted", "refused") or what == args.show:
                print(f"{what}: {door}, {name}: {' '.join(said.split())[-300:]!r}", flush=True)
    table = pd.DataFrame(counts).fillna(0).astype(int).T
    print(table.to_string(), f"\n{int(table.to_numpy().sum())} inputs", file=sys.stdout)


if __name__ == "__main__":
    main()
