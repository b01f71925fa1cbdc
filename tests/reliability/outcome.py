"""A command in a forked child, bounded in CPU time and memory: what became of it."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import time
import traceback
import warnings

import pytest

from sarmlib.cli import main
from sarmlib.errors import SarmlibError


def outcome(call, seconds=20, memory=2 << 30):
    """("ok" | "refused" | "foreign" | "hang" | "killed", text) of ``call()``, seconds taken."""
    read, write = os.pipe()
    start, pid = time.monotonic(), os.fork()
    if pid == 0:
        os.close(read)
        with contextlib.suppress(BaseException):
            os.setpgid(0, 0)
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                status = call()
            found = ("ok" if not status else "refused", (out.getvalue() + err.getvalue())[-600:])
        except SarmlibError as error:
            found = ("refused", str(error)[:600])
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)
            ours = [f"{os.path.basename(f.filename)}:{f.name}" for f in last if "/sarmlib/" in f.filename]
            found = ("foreign", f"{type(error).__name__}: {str(error)[:200]} @ {' > '.join(ours[-3:])}")
        with contextlib.suppress(BaseException):
            os.write(write, json.dumps([found[0], found[1][:900]]).encode())
        os._exit(0)
    os.close(write)
    text, end = b"", start + 4 * seconds
    import select
    while True:
        ready = select.select([read], [], [], max(0, end - time.monotonic()))[0]
        if not ready:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(read)
            return "hang", f"more than {seconds} s"
        part = os.read(read, 65536)
        if not part:
            break
        text += part
    os.close(read)
    code = os.waitpid(pid, 0)[1]
    if not text and os.WIFSIGNALED(code) and os.WTERMSIG(code) in (signal.SIGXCPU, signal.SIGKILL):
        return "hang", f"more than {seconds} s of CPU"
    return tuple(json.loads(text)) if text else ("killed", f"status {code}")


def command(*words, **limits):
    return outcome(lambda: main([str(word) for word in words]), **limits)


def edit_json(path, **changes):
    config = json.loads(path.read_text())
    for name, value in changes.items():
        place = config
        *parents, last = name.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(config))


def copied(folder, target):
    shutil.copytree(folder, target)
    return target


def trains(base, output, *settings, backbone=None, data=None, sae=None, **limits):
    settings = ["device=cpu", "backbone.layer=2", "reward.batch_size=8", "reward.epochs=1", "reward.lr=3e-3",
                "preferences.eval_fraction=0.3", "preferences.max_length=64", *settings]
    return command("train", "--backbone", backbone or base / "backbone", "--data", data or base / "pairs.jsonl",
                   "--sae", sae or base / "sae", "--output", output,
                   *(w for one in settings for w in ("--set", one)), **limits)


def pretrains(base, output, backbone=None, corpus=None, **limits):
    settings = ["device=cpu", "sae.vectors=300", "sae.steps=10", "sae.batch_size=32", "sae.expansion=4",
                "corpus.window=64", "backbone.layer=2", "sae.positions=every"]
    return command("pretrain-sae", "--model", backbone or base / "backbone", "--corpus", corpus or base / "corpus.txt",
                   "--output", output, *(w for one in settings for w in ("--set", one)), **limits)


def refused(found, but=("refused",)):
    if found[0] not in but:
        pytest.fail(f"{found[0]}: {found[1][-250:]!r}", pytrace=False)


def no_crash(found):
    """Accepted or refused, but no foreign error and no hang."""
    refused(found, ("ok", "refused"))
