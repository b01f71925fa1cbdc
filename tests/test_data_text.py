"""Corpora: kinds of file, encodings, WikiText, order, bounded memory, refusals."""

import gzip
import json
from collections import Counter

import pandas as pd
import pytest

from sarmlib.data import rows, text
from sarmlib.data.rows import data_files
from sarmlib.data.text import iter_texts
from sarmlib.errors import DataError
from tests.helpers import shared_path


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_every_kind_of_file_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("Plain café text.\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("Old café text.".encode("latin-1"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("\ufeffZipped text.".encode()))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress('{"text": "ü\u2028ne"}\n\n{"text": "2026-01-01"}\n'.encode()))
    (tmp_path / "e.json").write_text(json.dumps([{"text": "story 0"}, {"text": "story 1"}]))
    pd.DataFrame({"text": ["row 0", "row 1"], "n": [1, 2]}).to_parquet(tmp_path / "[f].parquet")
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "LICENSE").write_text("terms")
    assert sorted(iter_texts(str(tmp_path))) == sorted([
        "Plain café text.", "Old café text.", "Zipped text.", "ü\u2028ne", "2026-01-01", "story 0", "story 1", "row 0",
        "row 1"])


def test_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_CHARS", 500)
    paragraphs = [f"Paragraph {i}. " + "word " * 20 for i in range(50)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    documents = list(iter_texts(tmp_path / "a.txt"))
    assert len(documents) > 5 and max(map(len, documents)) < 1100
    assert all(d.startswith("Paragraph") for d in documents)
    assert "".join("".join(documents).split()) == "".join("".join(paragraphs).split())
    (tmp_path / "b.txt").write_text("x" * 5000)  # no line to cut at
    assert max(map(len, iter_texts(tmp_path / "b.txt"))) <= 1500


def test_wikitext_is_split_into_articles_and_detokenised(tmp_path):
    (tmp_path / "w.txt").write_text(
        " \n = First <unk> = \n \n A well @-@ known town had 1 @,@ 200 people ( in 1990 ) , and it 's old . \n"
        " \n = = History = = \n \n He said \" hello there \" and did n't stay . \n x \n = 3 = \n"
        " \n = Second = \n \n Text . \n")
    first, second = iter_texts(tmp_path / "w.txt")
    assert first.split("\n") == ["First [unk]", "A well-known town had 1,200 people (in 1990), and it's old.",
                                 "History", 'He said "hello there" and didn\'t stay.', "x", "3"]
    assert second == "Second\nText."


def test_the_next_document_comes_from_the_file_with_least_text(tmp_path, monkeypatch):
    jsonl(tmp_path / "long.jsonl", ["L" * 100] * 5)
    jsonl(tmp_path / "short.jsonl", ["s" * 20] * 12)
    assert "".join(d[0] for d in iter_texts(tmp_path)) == "LsssssL" + "sssssL" + "ss" + "LL"
    monkeypatch.setattr(text, "OPEN_FILES", 1)  # a bound on open files: then one after another
    assert "".join(d[0] for d in iter_texts(tmp_path)) == "L" * 5 + "s" * 12


def test_shuffle_is_seeded_complete_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BUFFER", 50)
    path = jsonl(tmp_path / "a.jsonl", plain := [str(i) for i in range(300)])
    first = list(iter_texts(path, seed=1))
    assert first == list(iter_texts(path, seed=1)) != list(iter_texts(path, seed=2))
    assert sorted(first, key=int) == plain != first
    assert int(first[0]) < 50  # only the buffer was read before the first document came out


@pytest.mark.parametrize(("line", "words"), [
    ("broken", "row 3: is damaged, not JSON"), ('{"body": "x"}', r"row 3: no text in field 'text' of ..body"),
    ('{"text": 3}', "row 3: no text"), (r'{"text": "half \ud83d"}', "row 3: holds a lone surrogate")])
def test_documents_are_streamed_and_a_bad_row_is_named(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n{"text": " "}\n' + line + "\n")
    stream = iter_texts(path)
    assert next(stream) == "good"
    with pytest.raises(DataError, match=r"a\.jsonl, " + words):
        next(stream)


@pytest.mark.parametrize("name, content, words", [
    ("image.txt", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)), "not text"),
    ("wide.txt.gz", gzip.compress("Text in UTF-16.".encode("utf-16"), mtime=0), "UTF-16"),
    ("cut.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:20], "damaged"), ("absent", None, "no such file"),
    ("rows.jsonl", bytes(range(128, 256)), "not UTF-8"), ("table.parquet", b"PAR1 and no more", "damaged"),
    ("blank.jsonl", b'{"text": " "}\n', "gave no document"),
    ("bomb.txt.gz", gzip.compress(b"a b.\n" + b" \n" * 5000 + b"c d.", mtime=0), "8,000 blank characters in a row"),
    ("bomb.json.gz", gzip.compress(b"[" + b" " * 9000 + b"]", mtime=0), "not JSON"),
    ("twice.jsonl", b'{"text": "a"}\n{"text": "a", "n": [{"k": 1, "k": 2}]}', "row 2: .*'k' stands twice")])
def test_what_is_not_text_bombs_and_double_keys_are_refused(tmp_path, monkeypatch, name, content, words):
    monkeypatch.setattr(rows, "MAX_CHARS", 8000)
    monkeypatch.setattr(rows, "MAX_READ", 8000)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{words}|{words}.*{name}"):
        list(iter_texts(tmp_path / name))


def test_real_corpora():
    wiki = list(iter_texts(shared_path("data/real/corpus_wikitext2")))
    assert 115 <= len(wiki) <= 130 and not any(" @-@ " in d or "<unk>" in d for d in wiki)
    folder = shared_path("data/real/corpus_gutenberg_nltk")
    first = Counter(document[:200] for document, _ in zip(iter_texts(folder), range(17), strict=False))
    assert len(first) == len(data_files(folder, (".txt",))) == 17  # one document of each book before a second of any
