"""Jobs side by side: each in a spawned process with one thread, and one line that says what they are doing."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

from tqdm import tqdm


def run_jobs(jobs: dict[tuple, list[tuple]], made: set[tuple], work: Callable[[tuple], None], workers: int,
             title: str | None) -> dict[tuple, float]:
    """``work(job)`` for every job that is not in ``made``, after those it waits for; returns the seconds of each.

    ``title`` starts the progress line; None shows none."""
    seconds, running, doing = {}, {}, {}
    pending = [job for job in jobs if job not in made]
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch's threads may hang
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    news = context.Queue()
    with tqdm(total=len(jobs), initial=len(made), desc=title, unit="job", disable=title is None) as bar, \
            ProcessPoolExecutor(workers, context, _start, (news,)) as pool:
        while pending or running:
            for job in [job for job in pending if all(one in made or one in seconds for one in jobs[job])]:
                pending.remove(job)
                running[pool.submit(_timed, work, job)] = job
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED)[0]:
                seconds[running.pop(future)] = future.result()
                bar.update()
            while not news.empty():
                job, text = news.get()
                doing[job] = f"{' '.join(map(str, job))}: {text}"
            bar.set_postfix_str("; ".join(text for job, text in doing.items() if job not in seconds))
    return seconds


class _Reporter(io.TextIOBase):
    """Standard error of a worker: progress bars go to the parent, at most one line a second; the rest is shown."""

    def __init__(self, news):
        self.news, self.real, self.job, self.last = news, sys.stderr, (), 0.0

    def write(self, text: str) -> int:
        if "\r" not in text:
            return self.real.write(text) if text.strip() else len(text)
        line = re.sub(r"\|.*\|", "", text.rpartition("\r")[2]).partition("[")[0].strip()  # without the drawn bar
        if line and time.monotonic() - self.last > 1:
            self.news.put((self.job, line))
            self.last = time.monotonic()
        return len(text)


def _start(news) -> None:
    import torch
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = open(os.devnull, "w"), _Reporter(news)  # what a trainer prints belongs to no reader
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers; they would go on, unseen, and hold their locks."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _timed(work: Callable[[tuple], None], job: tuple) -> float:
    setattr(sys.stderr, "job", job)  # noqa: B010
    start = time.perf_counter()
    work(job)
    return time.perf_counter() - start
