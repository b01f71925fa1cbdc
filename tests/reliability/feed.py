"""Bad input for every entry point that reads a file or a value: thousands of damaged copies of good ones.

    python -m tests.reliability.feed --each 300

Each copy must either be accepted or be refused with an error of the library; anything else is listed, and the exit
status is 1.  The copies are drawn from a seed, so a finding can be drawn again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import hashlib
import io
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sarmlib.errors import SarmlibError

ODD = [None, True, False, 0, -1, 3, 1e308, float("inf"), float("nan"), 10**30, "", " ", "\x00", "\ud800", "nan",
       "🜲" * 9, "<script>alert(1)</script>", "../../x", [], {}, [[]], [None], {"a": 1}, ["a", 1], [0.5, float("nan")],
       "x" * 5000]
GARBAGE = [b"", b"\x00", b"\xff\xfe\x00", b"[", b"{}", b"[]", b"null", b"\x1f\x8b\x08", b"PAR1", b"[" * 100_000,
           b'{"a":' * 50_000, b"\xef\xbb\xbf", b"\n" * 10, b"1", b'"text"', b"NaN", b"<html></html>", b"a: &x [*x]"]


def damaged_bytes(good: bytes, rng: random.Random) -> bytes:
    """One of: other bytes altogether, cut, bits flipped, a slice removed, repeated or overwritten."""
    way = rng.randrange(6)
    if way == 0 or not good:
        return rng.choice(GARBAGE)
    a = rng.randrange(len(good))
    b = min(len(good), a + rng.choice((1, 2, 8, 64, 1024)))
    if way == 1:
        return good[:a]
    if way == 2:
        out = bytearray(good)
        for _ in range(rng.choice((1, 3, 20))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        return bytes(out)
    if way == 3:
        return good[:a] + good[b:]
    if way == 4:
        return good[:b] + good[a:]
    return good[:a] + rng.randbytes(b - a) + good[b:]


def damaged_value(good, rng: random.Random):
    """A deep copy with one node replaced, removed, renamed or wrapped."""
    value = copy.deepcopy(good)
    spots: list[tuple] = []

    def walk(node):
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            spots.append((node, key))
            walk(node[key])

    walk(value)
    if not spots or rng.random() < 0.03:
        return rng.choice(ODD)
    node, key = rng.choice(spots)
    way = rng.randrange(5)
    if way == 0:
        del node[key]
    elif way == 1 and isinstance(node, dict):
        node[rng.choice(("", "Prompt", "x", key + " "))] = node.pop(key)
    elif way == 2:
        node[key] = [node[key]]
    else:
        node[key] = rng.choice(ODD)
    return value


@dataclass
class Outcome:
    """What became of the inputs of one entry point."""

    accepted: int = 0
    refused: int = 0
    foreign: Counter = field(default_factory=Counter)
    """``exception at place -> count`` of errors that are not the library's."""
    littered: int = 0
    """Inputs after which a file lay in the output folder although the call failed."""
    seen: set = field(default_factory=set)

    def __str__(self) -> str:
        return (f"{len(self.seen):6} distinct {self.accepted:6} accepted {self.refused:6} refused "
                f"{sum(self.foreign.values()):4} foreign {self.littered:3} partial")


def attempt(outcome: Outcome, identity: bytes, call: Callable[[], object], output: Path | None = None) -> None:
    """Run ``call``; count how it ended."""
    outcome.seen.add(hashlib.sha256(identity).hexdigest())
    failed = True
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            call()
        outcome.accepted += 1
        failed = False
    except SarmlibError as error:
        if str(error).strip():
            outcome.refused += 1
        else:
            outcome.foreign["an empty message"] += 1
    except SystemExit as error:
        if error.code in (1, 2):  # the command line's own refusals
            outcome.refused += 1
        else:
            failed = False
            outcome.accepted += 1
    except (Exception, RecursionError) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/sarmlib/" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "?"
        outcome.foreign[f"{type(error).__name__} at {place}: {str(error)[:90]}"] += 1
    if output is not None and output.exists():
        if failed and any(p.is_file() for p in output.rglob("*")):
            outcome.littered += 1
        shutil.rmtree(output)


def files(good: dict[str, bytes], load: Callable[[Path], object]) -> Callable:
    """An entry point that reads a file: ``good`` holds sound contents by file name."""

    def run(outcome: Outcome, rng: random.Random, folder: Path) -> None:
        name = rng.choice(sorted(good))
        data = damaged_bytes(good[name], rng)
        if name.endswith((".json", ".jsonl")) and rng.random() < 0.6:
            rows = [json.loads(line) for line in good[name].decode().splitlines()]
            if name.endswith(".json"):
                data = json.dumps(damaged_value(json.loads(good[name]), rng)).encode("utf-8", "surrogatepass")
            else:
                number = rng.randrange(len(rows))
                rows[number] = damaged_value(rows[number], rng)
                data = "\n".join(map(json.dumps, rows)).encode("utf-8", "surrogatepass")
        path = folder / name
        path.write_bytes(data)
        attempt(outcome, name.encode() + data, lambda: load(path))
        path.unlink()

    return run


def folders(good: Path, load: Callable[[Path], object]) -> Callable:
    """An entry point that reads a folder: one file of a copy is damaged or missing."""

    def run(outcome: Outcome, rng: random.Random, folder: Path) -> None:
        work = folder / good.name
        shutil.copytree(good, work)
        names = sorted(p for p in work.rglob("*") if p.is_file())
        path = rng.choice(names)
        data = path.read_bytes()
        if rng.random() < 0.1:
            path.unlink()
            new = b"(missing)"
        else:
            new = damaged_bytes(data, rng)
            if path.suffix == ".json" and rng.random() < 0.7:
                new = json.dumps(damaged_value(json.loads(data), rng)).encode("utf-8", "surrogatepass")
            path.write_bytes(new)
        attempt(outcome, path.name.encode() + new, lambda: load(work))
        shutil.rmtree(work)

    return run


def values(good, call: Callable[[object], object]) -> Callable:
    """An entry point that takes a value."""

    def run(outcome: Outcome, rng: random.Random, folder: Path) -> None:
        while type(value := damaged_value(good, rng)) is not type(good):
            pass  # a text where Python code passes a list is a TypeError, as anywhere
        attempt(outcome, repr(value).encode("utf-8", "surrogatepass"), lambda: call(value))

    return run


def command_line(outcome: Outcome, rng: random.Random, folder: Path) -> None:
    """``python -m sarmlib`` with odd words, after which the output folder must be empty."""
    from sarmlib.__main__ import main
    commands = ["verify", "report", "figures", "doctor", "badges", "nonsense", "", "--help", "steer", "steering-scores",
                "evaluate", "serve", "pretrain-sae", "score", "explain", "judge", "label", "train", "browse", "export"]
    words = ["--profile", "--runs", "--data", "--repo", "toy", "local", "nowhere", "/", "..", "", "--force", "a/b",
             "x.yaml", "\x00", "-1", "🜲", "--", "gpu", "--model", "--feature", "3=2", "--benchmark", "rm-bench",
             "--port", "--k", "--corpus", "--layer", "0", "--target", "--undo", "--limit", "--prompt",
             "--response", "--input", "--endpoint", "http://127.0.0.1:9/v1", "--budget", "--pairs", "--filled",
             "--redact", "--seed", "--features", "--dry-run"]
    command = rng.choice(commands)
    old = command in ("verify", "report", "figures", "doctor")
    argv = [command, *rng.choices(words, k=rng.randrange(7)), "--runs" if old else "--output", str(folder / "runs")]

    def call():
        if argv[0] == "badges" and "a/b" in argv:
            return  # would edit the checkout
        if status := main(argv):
            raise SystemExit(status)

    attempt(outcome, repr(argv).encode(), call, folder / "runs")


def entry_points(work: Path) -> Iterator[tuple[str, Callable]]:
    """``(name, run)`` of every entry point, with sound input made in ``work``."""
    import pandas as pd

    from sarmlib import claims, profiles
    from sarmlib.artifacts import Store
    from sarmlib.data import benchmarks, corpora, local, preferences
    from sarmlib.data.toyworld import datasets as toy
    from sarmlib.evaluation import rewardbench2, rm_bench
    from sarmlib.sae import formats
    from sarmlib.sae.model import TopKSAE
    from sarmlib.sarm.model import SarmForSequenceClassification
    from sarmlib.sarm.released import load_released, merge_official, save_official
    from sarmlib.sarm.steering import steer, table_from_scores, unsteer
    from tests.miniature import save_backbone

    def tables(name, rows):
        lines = "\n".join(map(json.dumps, rows)).encode()
        pd.DataFrame(rows).to_parquet(work / "t.parquet")
        return {f"{name}.jsonl": lines, f"{name}.json": json.dumps(rows).encode(),
                f"{name}.jsonl.gz": gzip.compress(lines, mtime=0), f"{name}.parquet": (work / "t.parquet").read_bytes()}

    pairs, rb2, rmb = list(toy.preference_pairs(6, 0)), toy.rewardbench2(2, 0), toy.rm_bench(2, 0)
    rb2, rmb = ([{k: v for k, v in row.items() if k != "additional_metadata"} for row in rows] for rows in (rb2, rmb))
    yield "preference pairs, file", files(tables("pairs", pairs), preferences.load_pairs)
    yield "preference pair, row", values(pairs[0], lambda row: preferences.load_pairs([row]))
    yield "preference pairs, skip", files(tables("pairs", pairs), lambda p: preferences.load_pairs(p, on_bad="skip"))
    yield "RewardBench 2, file", files(tables("rb2", rb2), benchmarks.load_rewardbench2)
    yield "RM-Bench, file", files(tables("rm_bench", rmb), benchmarks.load_rm_bench)
    scored = [{**row, "scores": [float(i) for i in range(len(row["chosen"]) + len(row["rejected"]))]} for row in rb2]
    yield "RewardBench 2, scores", values(scored, rewardbench2.score)
    yield "RM-Bench, scores", values(
        [{**row, "score_chosen": [1., 2., 3.], "score_rejected": [0., 1., 2.]} for row in rmb], rm_bench.score)
    text = "A sentence. Another one!\n\nA paragraph?\n" * 5
    corpus = {"c.txt": text.encode(), "c.txt.gz": gzip.compress(text.encode(), mtime=0),
              **tables("c", [{"text": text, "meta": {"a": 1}}] * 3)}
    yield "corpus, file", files(corpus, lambda p: list(corpora.iter_corpus(p)))
    yield "folder of data", files({**corpus, **tables("pairs", pairs)}, lambda p: local.discover(p.parent))
    toy_yaml = (profiles.FOLDER / "toy.yaml").read_bytes()
    yield "profile, file", files({"p.yaml": toy_yaml}, profiles.load_profile)
    settings = {"seeds": [0], "sae.k_ratio": 0.1, "sae.lr": 1e-3, "reward.epochs": 1, "variants": ["sarm"]}
    yield "profile, settings", values(settings, lambda v: profiles.load_profile("toy", **dict(v)))
    yield "claims, file", files({"claims.toml": claims.FILE.read_bytes()}, claims.load_claims)

    sae = TopKSAE(d_model=16, n_features=64, k=8)
    sae.save(work / "sae")
    formats.save_official(sae, work / "official.pt")
    yield "SAE, folder", folders(work / "sae", TopKSAE.load)
    yield "SAE, official file", files({"sae_k8.pt": (work / "official.pt").read_bytes()},
                                      lambda p: formats.load_official(p, k=8))
    backbone = save_backbone(work / "backbone")
    sarm = SarmForSequenceClassification.from_backbone_with_random_encoder(str(backbone), n_features=64, k=8)
    sarm.save_pretrained(work / "sarm")
    yield "SARM, folder", folders(work / "sarm", lambda p: SarmForSequenceClassification.from_pretrained(str(p)))
    yield "released checkpoint", folders(save_official(sarm, work / "released"), load_released)
    yield "base + official SAE", files({"sae_k8.pt": (work / "official.pt").read_bytes()},
                                       lambda p: merge_official(str(backbone), p, layer=1, k=8))
    yield "steering", values({"factors": [[3, 2.0], [5, -1.0]]},
                             lambda v: (steer(sarm, {a: b for a, b in v["factors"]}), unsteer(sarm))
                             if _is_factors(v) else None)
    columns = {"reward": [1., 2., 0.], "steered": [2., 2., 0.], "active": [True, False, False],
               "target": [True, True, False]}
    yield "steering scores", values(columns, lambda v: table_from_scores(v["reward"], v["steered"], v["active"],
                                                                         v["target"]) if _has(v, columns) else None)

    store = Store(work / "store")
    store.get_or_make("stage", {"a": 1}, {}, lambda f: (f / "x.bin").write_bytes(b"1" * 100) and None)
    from sarmlib.evaluation.generative import parse_choice, parse_rating
    yield "judge's answer", values(["[[A]]", "I rate it [[7]] of 10, not [[11]]"], lambda v: [
        (parse_choice(one), parse_rating(one)) for one in v if one is None or isinstance(one, str)])
    from sarmlib.commands.explain import read_labels
    from sarmlib.data.conversations import load_items
    from sarmlib.interpretation.human import HumanJudge
    from sarmlib.interpretation.llm import LLMExplainer
    rows = [{"prompt": "Name one.", "response": "One is Ardu.", "id": "a"}, {"prompt": "x", "responses": ["y", "z"]},
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            {"prompt": "x", "chosen": "y", "rejected": "z"}]
    yield "rows to score", files(tables("rows", rows), lambda p: list(load_items(p)))
    labels = {"labels.json": b'{"3": "words", "5": "more"}', "labels.jsonl": b'{"feature": 3, "label": "words"}\n'}
    yield "labels, file", files(labels, lambda p: read_labels(str(p)))
    sheet = "item,label,response,matches\n00aa,words,An answer,yes\n00bb,words,\"Two\nlines\",7\n00cc,words,x,\n"
    yield "filled sheet", files({"sheet.csv": sheet.encode()}, HumanJudge)
    explainer = LLMExplainer(None, None)
    replies = ['{"pattern": "x", "found": true, "consistency": 4}', '```json\n{"match": 3}\n```']
    yield "explainer's answer", values(replies, lambda v: [explainer._label(1, True, one) for one in v
                                                           if one is None or isinstance(one, str)])
    yield "artifacts", folders(work / "store", lambda p: Store(p).verify())
    yield "command line", command_line


def _is_factors(value) -> bool:
    return (isinstance(value, dict) and isinstance(value.get("factors"), list)
            and all(isinstance(x, list) and len(x) == 2 and x[0].__hash__ for x in value["factors"]))


def _has(value, columns) -> bool:
    return isinstance(value, dict) and columns.keys() <= value.keys()


def feed(each: int, seed: int = 0) -> dict[str, Outcome]:
    """``each`` inputs for every entry point."""
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        (work := Path(folder) / "sound").mkdir()
        (inputs := Path(folder) / "inputs").mkdir()
        for name, run in entry_points(work):
            outcomes[name] = Outcome()
            rng = random.Random(f"{name}-{seed}")
            for _ in range(each):
                run(outcomes[name], rng, inputs)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=300, help="inputs per entry point")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes = feed(arguments.each, arguments.seed)
    for name, outcome in outcomes.items():
        print(f"{name:<26} {outcome}")
        for error, count in outcome.foreign.most_common():
            print(f"      {count} x {error}")
    bad = sum(sum(o.foreign.values()) + o.littered for o in outcomes.values())
    print(f"{sum(len(o.seen) for o in outcomes.values())} distinct inputs, {bad} findings")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
