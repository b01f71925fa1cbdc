"""Damaged copies of good files for every entry point that reads one: each must be accepted, or refused with an error
of the library.  ``feed(300)`` draws many; a finding can be drawn again."""

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from sarmlib.errors import SarmlibError

GARBAGE = [b"", b"\xff\xfe\x00", b"[", b"{}", b"null", b"\x1f\x8b\x08", b"PAR1", b"[" * 100_000,
           b'{"a":' * 50_000, b"\xef\xbb\xbf", b'"text"', b"NaN", b"<html></html>", b"a: &x [*x]"]


def damaged_bytes(good: bytes, rng: random.Random) -> bytes:
    """Other bytes altogether, cut, one bit flipped, a slice removed, or overwritten."""
    a = rng.randrange(len(good))
    b = min(len(good), a + rng.choice((1, 8, 64, 1024)))
    flipped = bytes([good[a] ^ 1 << rng.randrange(8)])
    return rng.choice([rng.choice(GARBAGE), good[:a], good[:a] + flipped + good[a + 1:], good[:a] + good[b:],
                       good[:a] + rng.randbytes(b - a) + good[b:]])


def entry_points(work: Path) -> Iterator[tuple[str, Path, Callable]]:
    """(name, sound file or folder in ``work``, what reads it)."""
    from sarmlib import claims, profiles
    from sarmlib.cli import _labels
    from sarmlib.data import benchmarks, pairs, text
    from sarmlib.data.toyworld import datasets as toy
    from sarmlib.sae.formats import load_sae
    from sarmlib.sarm.model import SarmForSequenceClassification
    from tools.fuzz import sound

    def table(name: str, rows: list[dict]) -> Path:
        (path := work / name).write_bytes("\n".join(map(json.dumps, rows)).encode())
        return path

    yield "pairs", table("pairs.jsonl", toy.preference_pairs(6, 0)), pairs.load_pairs
    yield "RewardBench 2", table("rb2.jsonl", toy.rewardbench2(2, 0)), benchmarks.load_rewardbench2
    yield "RM-Bench", table("rm.jsonl", toy.rm_bench(2, 0)), benchmarks.load_rm_bench
    yield "rows to score", table("rows.jsonl", [{"prompt": "x", "responses": ["y", "z"]}]), pairs.load_conversations
    (work / "c.txt").write_text("A sentence. Another one!\n\nA paragraph?\n" * 5)
    yield "corpus", work / "c.txt", lambda p: list(text.iter_texts(p))
    yield "corpus, rows", table("c.jsonl", [{"text": "A sentence."}] * 3), lambda p: list(text.iter_texts(p))
    yield "labels", table("labels.json", [{"3": "words"}]), _labels
    yield "profile", Path(shutil.copy(profiles.FOLDER / "toy.yaml", work)), profiles.load_profile
    yield "claims", Path(shutil.copy(claims.FILE, work)), claims.load_claims
    sound(work)
    yield "SAE", work / "sae", load_sae
    yield "SARM", work / "sarm", lambda p: SarmForSequenceClassification.from_pretrained(str(p))


def feed(each: int, seed: int = 0) -> dict[str, Counter]:
    """``each`` damaged copies for every entry point: how often "accepted", "refused", or which foreign error."""
    found: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as folder:
        (work := Path(folder) / "sound").mkdir()
        for name, good, read in entry_points(work):
            rng, found[name] = random.Random(f"{name}-{seed}"), Counter()
            for number in range(each):
                bad = Path(folder) / f"{number}" / good.name
                bad.parent.mkdir(exist_ok=True)
                shutil.copytree(good, bad) if good.is_dir() else shutil.copy(good, bad)
                files = [p for p in (bad, *bad.rglob("*")) if p.is_file() and p.stat().st_size]
                one = rng.choice(sorted(files))
                one.write_bytes(damaged_bytes(one.read_bytes(), rng))
                found[name][attempt(read, bad)] += 1
                shutil.rmtree(bad.parent)
    return found


def attempt(read: Callable, path: Path) -> str:
    """accepted, refused, or the name and text of an error that is not the library's."""
    try:
        read(path)
        return "accepted"
    except SarmlibError as error:
        return "refused" if str(error).strip() else "an empty message"
    except (Exception, RecursionError) as error:
        return f"{type(error).__name__}: {str(error)[:90]}"
