"""Jobs side by side: each in a spawned process with one thread, and one line that says what they are doing."""

import io
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from statistics import fmean
from typing import Any

from tqdm import tqdm


def run_jobs(jobs: dict[tuple, list[tuple]], made: set[tuple], work: Callable[[tuple], None], workers: int,
             title: str | None) -> dict[tuple, float]:
    """``work(job)`` for every job that is not in ``made``, after those it waits for; returns the seconds of each.

    ``title`` starts the progress line; None shows none."""
    seconds, running, doing, began = {}, {}, {}, {}
    pending = [job for job in jobs if job not in made]
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch's threads may hang
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    news, width = context.Queue(), shutil.get_terminal_size().columns - 1 if sys.stderr.isatty() else None
    with tqdm(bar_format="{desc}", disable=title is None, leave=False) as bar, \
            ProcessPoolExecutor(workers, context, _start, (news,)) as pool:
        while pending or running:
            for job in [job for job in pending if all(one in made or one in seconds for one in jobs[job])]:
                pending.remove(job)
                running[pool.submit(_timed, work, job)] = job
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED)[0]:
                seconds[running.pop(future)] = future.result()
            while not news.empty():
                job, text = news.get()
                began.setdefault(job, time.perf_counter())
                doing[job] = text
            left = _left([*pending, *running.values()], seconds, began, workers)
            here = [" ".join(map(str, (*job, doing.get(job, "")))).rstrip() for job in [*running.values()][:workers]]
            line = f"{title}: {len(made) + len(seconds)} of {len(jobs)} jobs done{left}: {', '.join(here)}"
            bar.set_description_str(line[:width])
    return seconds


def _left(todo: list[tuple], seconds: dict[tuple, float], began: dict[tuple, float], workers: int) -> str:
    """The time to go, by the finished jobs of the same stages; no guess before each stage has one."""
    took = {job[0]: fmean(seconds[one] for one in seconds if one[0] == job[0]) for job in seconds}
    if not todo or any(job[0] not in took for job in todo):
        return ""
    now = time.perf_counter()
    left = sum(max(took[job[0]] - (now - began.get(job, now)), 0) for job in todo) / min(workers, len(todo))
    return f", about {tqdm.format_interval(left)} to go"


class _Reporter(io.TextIOBase):
    """Standard error of a worker: progress bars go to the parent, at most one line a second; the rest is shown."""

    def __init__(self, news):
        self.news, self.real, self.job, self.last = news, sys.stderr, (), 0.0

    def write(self, text: str) -> int:
        if "\r" not in text:
            return self.real.write(text) if text.strip() else len(text)
        line = "".join(re.findall(r"\d+%", text)[-1:])  # of the drawn bar, of which much would not fit
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
    reporter: Any = sys.stderr
    reporter.job = job
    reporter.news.put((job, ""))
    start = time.perf_counter()
    work(job)
    return time.perf_counter() - start
