"""Peak memory of SAE pretraining from a stream, when the corpus and the states grow tenfold.

    OMP_NUM_THREADS=1 python benchmarks/streaming_memory.py --model FOLDER --corpus FOLDER

``pretrain-sae`` with ``corpus.budget_gb`` so small that no state is kept, on the corpus and on ten copies of it, each
in a process of its own: the states of all tokens, once with the given number and once with ten times as many.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table2 import machine


def peak(arguments: argparse.Namespace, corpus: Path, vectors: int, output: Path) -> tuple[float, float]:
    """(MiB, seconds) of one run."""
    settings = {"corpus.budget_gb": 1e-6, "corpus.window": 256, "sae.positions": "every", "sae.vectors": vectors,
                "sae.batch_size": 512, "sae.dead_after": vectors}
    command = [sys.executable, "-m", "sarmlib", "pretrain-sae", "--model", arguments.model, "--corpus", str(corpus),
               "--output", str(output)]
    start = time.perf_counter()
    with subprocess.Popen(command + [part for name, value in settings.items() for part in ("--set", f"{name}={value}")],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss / 1024, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="a folder of text")
    parser.add_argument("--vectors", type=int, default=200_000)
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 10):
            corpus = Path(folder) / f"times{times}"
            for copy in range(times):
                shutil.copytree(arguments.corpus, corpus / str(copy))
            mib, seconds = peak(arguments, corpus, times * arguments.vectors, Path(folder) / f"sae{times}")
            size = sum(path.stat().st_size for path in corpus.rglob("*") if path.is_file()) / 2**20
            states = times * arguments.vectors
            print(f"{times:>3} x corpus ({size:.1f} MiB of files), {states:,} states: {mib:.0f} MiB, {seconds:.0f} s",
                  flush=True)


if __name__ == "__main__":
    main()
