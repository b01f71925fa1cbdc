"""kill -9 at random moments: is what a restarted command leaves the same, to the last bit, as an undisturbed one's?

    OMP_NUM_THREADS=1 python -m tools.kills [--kills 50] [--only train]

A command runs once undisturbed, which also says how long it takes. Then it is started, killed at a random moment, and
started again on the same folder, until it ends (after a kill one start in four is let go on); its files are compared
and its folder is removed; and so on until ``--kills`` kills are done. Everything is compared but what holds seconds
or dates.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sarmlib.data.toyworld import datasets as toy
from sarmlib.store import hash_file
from tests.helpers import ROOT
from tests.reliability.world import write_profile
from tests.tiny import tiny_pairs
from tools.fuzz import sound

TIMES = re.compile(r"seconds|runtime|per_second|wall_s|peak_rss|log\.json")
"""Keys whose values differ from run to run; ``log.json``: its checksum in a manifest (it is itself compared)."""


def timeless(value):
    """A JSON value without times."""
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if not TIMES.search(name)}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def read(path: Path) -> str:
    """What is compared of a file: its JSON without times, or its checksum."""
    if path.suffix == ".json":
        return json.dumps(timeless(json.loads(path.read_text())), sort_keys=True)
    if path.suffix == ".jsonl":
        return "\n".join(json.dumps(timeless(json.loads(line))) for line in path.read_text().splitlines())
    return hash_file(path)


def prepare(work: Path) -> dict[str, list]:
    """Sound inputs below ``work``, and each command on them; ``OUT`` stands for its folder."""
    sound(work)
    rows = {"corpus": [{"text": f"w{i % 40} w2 w3. w4 w5 w{i % 30}! w7 w8. " * 20} for i in range(400)],
            "pairs": tiny_pairs(300), "rewardbench2": toy.rewardbench2(200, 0), "rm_bench": toy.rm_bench(200, 0)}
    for name, part in rows.items():
        (work / "data" / name).mkdir(parents=True)
        (work / "data" / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (work / "mini").mkdir()
    small = ["device=cpu", "preferences.max_length=64", "reward.batch_size=4", "reward.micro_batch_size=4",
             "reward.epochs=8", "sae.vectors=8000", "sae.batch_size=64", "sae.steps=2500", "sae.expansion=8",
             "corpus.window=64", "reward.lr=1e-3", "sae.lr=1e-3", "sae.positions=every"]
    sets = [part for one in small for part in ("--set", one)]
    return {"pretrain-sae": ["pretrain-sae", "--model", work / "backbone", "--corpus", work / "data/corpus/rows.jsonl",
                             "--output", "OUT", *sets],
            "train": ["train", "--backbone", work / "backbone", "--sae", work / "sae", "--data",
                      work / "data/pairs/rows.jsonl", "--output", "OUT", *sets],
            "evaluate": ["evaluate", "--model", work / "sarm", "--data", work / "data", "--output", "OUT"],
            "reproduce": ["reproduce", "--profile", write_profile(work / "mini"), "--runs", "OUT", "--notebook",
                          "02_reward_model"]}  # it makes every model and score


def start(arguments: list, out: Path) -> subprocess.Popen:
    """The command as a group of its own, so that a kill takes its workers too."""
    words = [str(out) if word == "OUT" else str(word) for word in arguments]
    return subprocess.Popen([sys.executable, "-m", "sarmlib", *words], cwd=ROOT, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def result(name: str, out: Path) -> dict[str, str]:
    """Every file that is there; of ``reproduce``, whose notebooks hold times, those of artifacts and stray ones."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    if name == "reproduce":
        files = [path for path in files if not {"notebooks", "figures"} & set(path.relative_to(out).parts)]
    return {str(path.relative_to(out)): read(path) for path in files}


def killed(name: str, arguments: list, out: Path, seconds: float, rng: random.Random, most: int) -> tuple[int, str]:
    """(kills, trouble) of one run that is killed until it ends or ``most`` kills are done; then it is let go on."""
    kills = 0
    while True:
        process = start(arguments, out)
        try:
            let_go = kills == most or (kills > 0 and rng.random() < 0.25)
            _, said = process.communicate(timeout=None if let_go else rng.uniform(0.25, 0.85) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        return kills, said[-600:] if process.returncode else ""


def compare(wanted: dict, found: dict) -> list[str]:
    """What differs, in words."""
    return ([f"lacks {name}" for name in wanted.keys() - found.keys()]
            + [f"has {name} too" for name in found.keys() - wanted.keys()]
            + [f"{name} differs" for name in wanted.keys() & found.keys() if wanted[name] != found[name]])


def trial(name: str, arguments: list, work: Path, kills: int, seed: int) -> dict:
    """All kills of one command."""
    began, rng, done, runs, troubles = time.monotonic(), random.Random(f"{name}-{seed}"), 0, 0, []
    whole, out = work / f"{name}-whole", work / f"{name}-killed"
    process = start(arguments, whole)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} fails undisturbed: {said}")
    seconds, wanted = time.monotonic() - began, result(name, whole)
    while done < kills:
        more, trouble = killed(name, arguments, out, seconds, rng, kills - done)
        done, runs = done + more, runs + 1
        troubles += [trouble] if trouble else compare(wanted, result(name, out))
        shutil.rmtree(out)
        print(f"{name}: {done} kills, {runs} runs completed, {len(troubles)} differences", flush=True)
    return {"command": name, "kills": done, "runs": runs, "seconds": round(seconds, 1), "files": len(wanted),
            "troubles": troubles}


def main() -> None:
    """Prints one line of JSON a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["pretrain-sae", "train", "evaluate", "reproduce"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in prepare(Path(folder)).items():
            if given.only in (None, name):
                print(json.dumps(trial(name, arguments, Path(folder), given.kills, given.seed)), flush=True)


if __name__ == "__main__":
    main()
