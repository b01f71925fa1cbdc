"""A command in a forked child, bounded in CPU time and memory: what became of it."""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import traceback
import warnings

import pytest

from sarmlib.cli import main
from sarmlib.errors import SarmlibError


def outcome(call, seconds=20, memory=2 << 30):
    """("ok" | "refused" | "foreign" | "hang" | "killed", text) of ``call()``."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=bounded, args=(call, there, seconds, memory))
    child.start()
    there.close()
    try:
        if here.poll(4 * seconds):
            return here.recv()
        os.killpg(child.pid, signal.SIGKILL)
        return "hang", f"more than {seconds} s"
    except (EOFError, OSError):
        child.join()
        died = -child.exitcode in (signal.SIGXCPU, signal.SIGKILL)
        return ("hang", f"more than {seconds} s of CPU") if died else ("killed", f"status {child.exitcode}")
    finally:
        child.join()
        here.close()


def bounded(call, there, seconds, memory):
    """The child's part; it leads a group of its own, so that a kill takes its workers too."""
    with contextlib.suppress(OSError, ValueError):
        os.setpgid(0, 0)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = "refused" if call() else "ok", said.getvalue()[-600:]
    except SarmlibError as error:
        found = "refused", str(error)[:600]
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{os.path.basename(f.filename)}:{f.name}" for f in frames if "/sarmlib/" in f.filename]
        found = "foreign", f"{type(error).__name__}: {str(error)[:200]} @ {' > '.join(ours[-3:])}"
    there.send(found)
    os._exit(0)


def command(*words, **limits):
    return outcome(lambda: main([str(word) for word in words]), **limits)


def run(job, base, output=None, *settings, model=None, data=None, **limits):
    """A command on the sound inputs of ``base``, but for what is named."""
    backbone, sarm = model or base / "backbone", model or base / "sarm"
    ask = ["--input", data] if data else ["--prompt", "w1 w2", "--response", "w3 w4"]
    words = {"score": ["--model", sarm, *ask], "explain": ["--model", sarm, *ask],
             "steer": ["--model", sarm, "--feature", "1=2"],
             "evaluate": ["--model", sarm, "--data", "toy", "--limit", 2],
             "train": ["--backbone", backbone, "--sae", base / "sae", "--data", data or base / "pairs.jsonl"],
             "pretrain-sae": ["--model", backbone, "--corpus", data or base / "corpus.txt"]}[job]
    own = {"train": ["reward.batch_size=8", "reward.epochs=1", "reward.lr=3e-3", "preferences.eval_fraction=0.3",
                     "preferences.max_length=64"],
           "pretrain-sae": ["sae.vectors=300", "sae.steps=10", "sae.batch_size=32", "sae.expansion=4",
                            "corpus.window=64", "sae.positions=every"]}.get(job, [])
    for one in ["device=cpu", "backbone.layer=2", *own, *settings] if own else []:
        words += ["--set", one]
    return command(job, *words, *(["--output", output] if output else []), **limits)


def edit_json(path, part=None, **changes):
    """Other values at the top of a file, or in one part of it."""
    found = json.loads(path.read_text())
    (found[part] if part else found).update(changes)
    path.write_text(json.dumps(found))


def refused(found, but=("refused",)):
    if found[0] not in but:
        pytest.fail(f"{found[0]}: {found[1][-250:]!r}", pytrace=False)


def no_crash(found):
    """Accepted or refused, but no foreign error and no hang."""
    refused(found, ("ok", "refused"))
