"""Kill ``make reproduce`` at random moments, run it again, and compare with a run that was left alone.

    python -m tests.reliability.kill --kills 50 --jobs 2 --work /tmp/kills

One line of JSON per kill goes to ``<work>/kills.jsonl``; the exit status is 1 if a single result differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from tqdm import tqdm

from tests.reliability.world import fingerprint, start, write_profile


def kill(process, everything: bool) -> int:
    """SIGKILL for the process group, or (``everything``) for each descendant as well; returns how many were alive.

    Notebook kernels live in groups of their own, so the first kind leaves them running as orphans for a moment: the
    next run then meets their locks and their last writes.
    """
    victims = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for victim in victims if everything else ():
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()
    return len(victims) + 1


def one(number: int, work: Path, profile: Path, whole: float, reference: dict[str, str]) -> dict:
    """Run, kill after a random share of the undisturbed time, run to the end, compare."""
    rng = random.Random(number)
    runs, log = work / f"runs-{number}", work / f"{number}.log"
    shutil.rmtree(runs, ignore_errors=True)
    moment = rng.uniform(0.02, 0.98) * whole
    process = start(profile, runs, log)
    try:
        process.wait(timeout=moment)
        killed = 0
    except Exception:
        killed = kill(process, everything=number % 2 == 0)
    stage = sorted({p.parent.name for p in runs.glob("mini/*/.partial-*")})
    done = len(list(runs.glob("mini/*/*/manifest.json")))
    code = start(profile, runs, log).wait()
    found = fingerprint(runs)
    differing = sorted(name for name in reference.keys() | found if reference.get(name) != found.get(name))
    if not differing and code == 0:
        shutil.rmtree(runs)
    return {"number": number, "moment_s": round(moment, 1), "processes_killed": killed, "artifacts_done": done,
            "stages_in_the_making": stage, "exit": code, "identical": not differing, "differing": differing[:10]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first kill, which seeds its moment")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    profile, began = write_profile(work), time.perf_counter()
    if start(profile, work / "reference", work / "reference.log").wait():
        sys.exit(f"the undisturbed run failed; see {work / 'reference.log'}")
    whole, reference = time.perf_counter() - began, fingerprint(work / "reference")
    numbers, good, landed = range(arguments.first, arguments.first + arguments.kills), 0, 0
    with ThreadPoolExecutor(arguments.jobs) as pool, open(work / "kills.jsonl", "a") as out:
        for result in tqdm(pool.map(lambda n: one(n, work, profile, whole, reference), numbers),
                           total=arguments.kills, unit="kill"):
            out.write(json.dumps(result) + "\n")
            out.flush()
            good += result["identical"] and result["exit"] == 0
            landed += result["processes_killed"] > 0
    print(f"{landed} kills within {whole:.0f} s, {len(reference)} files compared each time: {good} of "
          f"{arguments.kills} results identical")
    return int(good != arguments.kills)


if __name__ == "__main__":
    sys.exit(main())
