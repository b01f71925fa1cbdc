"""Damage stored files, fill the disk, take the right to write, run twice at once: is it noticed, is it put right?

    python -m tests.reliability.damage --work /tmp/damage        (the disk cases mount a small tmpfs and need root)

One line per case; the exit status is 1 if damage went unnoticed or a result differs from the undisturbed run's.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sarmlib.artifacts import Store
from sarmlib.profiles import load_profile
from sarmlib.stages import Run
from tests.reliability.world import fingerprint, start, write_profile


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def link(path: Path, rng: random.Random) -> None:
    moved = path.with_name(path.name + ".moved")
    path.rename(moved)
    path.symlink_to(moved)


def intruder(path: Path, rng: random.Random) -> None:
    path.with_name("intruder.bin").write_bytes(b"not made by us")


WAYS: list[Callable] = [truncate, flip, delete, empty, link, intruder]


def harm(root: Path, number: int) -> tuple[str, str]:
    """Damage one file of one artifact below ``root``; returns ``("stage/key", what was done)``."""
    rng, artifacts = random.Random(number), Store(root).artifacts()
    artifact = artifacts[number % len(artifacts)]
    path = rng.choice(sorted(p for p in artifact.rglob("*") if p.is_file() and p.stat().st_size))
    way = WAYS[number % len(WAYS)]
    way(path, rng)
    return f"{artifact.parent.name}/{artifact.name}", f"{way.__name__} {path.name}"


def artifact_cases(work: Path, profile: Path, reference: dict, count: int) -> Iterator[tuple[str, bool]]:
    """Damaged artifacts: named by ``verify``, then made again to the same bytes."""
    for number in range(count):
        runs = work / "damaged"
        shutil.rmtree(runs, ignore_errors=True)
        shutil.copytree(work / "reference", runs)
        name, what = harm(runs / "mini", number)
        noticed = [n for n, problems in Store(runs / "mini").verify().items() if problems] == [name]
        Run(load_profile(profile), root=runs / "mini", progress=False).ensure("labels")
        yield f"{what} of {name}", noticed and fingerprint(runs) == reference


def result_cases(work: Path, profile: Path, reference: dict) -> Iterator[tuple[str, bool]]:
    """Damaged files beside the artifacts: executed notebook, its record, claims, a figure's numbers."""
    names = ("notebooks/02_reward_model.ipynb", "notebooks/03_auto_interpretation.run.json",
             "results/05_benchmarks.json", "results/04_safety_steering.json")
    runs = work / "damaged"
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(work / "reference", runs, symlinks=True)
    for number, name in enumerate(names):
        WAYS[number % 4](runs / "mini" / name, random.Random(number))
        code = start(profile, runs, work / "results.log").wait()
        yield f"{WAYS[number % 4].__name__} {name}", code == 0 and fingerprint(runs) == reference


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def disk_cases(work: Path, profile: Path, reference: dict) -> Iterator[tuple[str, bool]]:
    """A disk that fills up at different moments, and one that becomes read-only: one sentence, then the same result."""
    disk = work / "disk"
    for size in ("64k", "600k", "2m"):
        with small_disk(disk, size):
            log = work / f"disk-{size}.log"
            log.unlink(missing_ok=True)
            code = start(profile, disk, log).wait()
            said = "free some disk space" in log.read_text()
            subprocess.run(["mount", "-o", "remount,size=500m", str(disk)], check=True)
            again = start(profile, disk, log).wait()
            yield f"disk of {size} full", code == 1 and said and again == 0 and fingerprint(disk) == reference
    with small_disk(disk, "500m"):
        log = work / "read-only.log"
        log.unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code = start(profile, disk, log).wait()
        said = "read-only file system" in log.read_text().lower() and "--runs" in log.read_text()
        yield "read-only disk", code == 1 and said and "Traceback" not in log.read_text()


def twin_case(work: Path, profile: Path, reference: dict) -> Iterator[tuple[str, bool]]:
    """Two ``make reproduce`` at once on one runs folder."""
    runs = work / "twins"
    shutil.rmtree(runs, ignore_errors=True)
    both = [start(profile, runs, work / f"twin-{name}.log") for name in "ab"]
    codes = [one.wait() for one in both]
    yield "two at once", codes == [0, 0] and fingerprint(runs) == reference


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--artifacts", type=int, default=30, help="damaged artifacts")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    profile = write_profile(work)
    if start(profile, work / "reference", work / "reference.log").wait():
        sys.exit(f"the undisturbed run failed; see {work / 'reference.log'}")
    reference, failed, total = fingerprint(work / "reference"), 0, 0
    cases = [artifact_cases(work, profile, reference, arguments.artifacts), result_cases(work, profile, reference),
             twin_case(work, profile, reference), disk_cases(work, profile, reference)]
    for group in cases:
        for what, good in group:
            print("ok  " if good else "FAIL", what, flush=True)
            total, failed = total + 1, failed + (not good)
    print(f"{total - failed} of {total} cases noticed and put right")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
