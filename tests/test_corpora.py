"""Corpora: kinds of file, encodings, WikiText, order, bounded memory, refusals."""

import gzip
import json

import pytest

from sarmlib.data.corpora import corpus_files, detokenise_wikitext, iter_corpus
from sarmlib.data.files import Report
from sarmlib.errors import ConfigError, DataError
from tests.helpers import shared_path


@pytest.fixture
def folder(tmp_path):
    import pandas as pd
    (tmp_path / "a.txt").write_text("Plain café text.\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("Old café text.".encode("latin-1"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("\ufeffZipped text.".encode()))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"doc": 0, "text": "line 0"}\n{"text": "line 1"}\n'))
    (tmp_path / "e.json").write_text(json.dumps(["story 0", {"text": "story 1"}]))
    pd.DataFrame({"text": ["row 0", "row 1"], "n": [1, 2]}).to_parquet(tmp_path / "f.parquet")
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "LICENSE").write_text("terms")
    return tmp_path


def test_every_kind_of_file_in_name_order(folder):
    report = Report()
    assert list(iter_corpus(folder, report=report)) == [
        "Plain café text.", "Old café text.", "Zipped text.", "line 0", "line 1", "story 0", "story 1", "row 0",
        "row 1"]
    assert (report.read, report.kept) == (9, 9)
    assert [p.name for p in corpus_files(folder)] == [
        "a.txt", "b.txt", "c.txt.gz", "d.jsonl.gz", "e.json", "f.parquet"]


def test_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * 20 for i in range(50)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    documents = list(iter_corpus(tmp_path / "a.txt", max_chars=500))
    assert len(documents) > 5 and max(map(len, documents)) < 1100
    assert all(d.startswith("Paragraph") for d in documents)
    assert "".join("".join(documents).split()) == "".join("".join(paragraphs).split())
    (tmp_path / "b.txt").write_text("x" * 5000)  # no line to cut at
    assert max(map(len, iter_corpus(tmp_path / "b.txt", max_chars=500))) <= 1500


def test_wikitext_is_split_into_articles_and_detokenised(tmp_path):
    (tmp_path / "w.txt").write_text(
        " \n = First <unk> = \n \n A well @-@ known town had 1 @,@ 200 people ( in 1990 ) , and it 's old . \n"
        " \n = = History = = \n \n He said \" hello there \" and did n't stay . \n x \n = 3 = \n"
        " \n = Second = \n \n Text . \n")
    first, second = iter_corpus(tmp_path / "w.txt", unk="X")
    assert first.split("\n") == ["First X", "A well-known town had 1,200 people (in 1990), and it's old.", "History",
                                 'He said "hello there" and didn\'t stay.', "x", "3"]
    assert second == "Second\nText."
    assert detokenise_wikitext("a <unk> b") == "a [unk] b"
    plain = "A file that keeps its <unk> and ( spaces ) .\n"
    (tmp_path / "p.txt").write_text(plain)
    assert list(iter_corpus(tmp_path / "p.txt")) == [plain.strip()]


def test_balanced_order_takes_the_source_with_least_text(tmp_path):
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": "L" * 100}) + "\n" for _ in range(5)))
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": "s" * 20}) + "\n" for _ in range(12)))
    sources = [tmp_path / "long.jsonl", tmp_path / "short.jsonl"]
    sequence = "".join(d[0] for d in iter_corpus(sources, order="balanced"))
    assert sequence == "LsssssL" + "sssssL" + "ss" + "LL"
    assert "".join(d[0] for d in iter_corpus(sources)) == "L" * 5 + "s" * 12


def test_shuffle_is_seeded_complete_and_bounded(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(300)))
    plain = [str(i) for i in range(300)]
    first = list(iter_corpus(path, seed=1, buffer=50))
    assert first == list(iter_corpus(path, seed=1, buffer=50)) != list(iter_corpus(path, seed=2, buffer=50))
    assert sorted(first, key=int) == plain != first
    assert int(next(iter(first))) < 50  # only the buffer was read before the first document came out
    assert list(iter_corpus(path)) == plain


def test_documents_are_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nbroken\n')
    stream = iter_corpus(path)
    assert next(stream) == "good"
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: is not JSON"):
        next(stream)


def test_bad_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "other name"}\n{"body": null}\n{"body": " "}\n')
    with pytest.raises(DataError, match=r"row 1: no text in field 'text' \(fields: body\)"):
        list(iter_corpus(path))
    report = Report()
    assert list(iter_corpus(path, text_field="body", on_bad="skip", report=report)) == ["other name"]
    assert report.dropped == {"bad row": 1, "empty document": 1} and report.read == 3
    with pytest.raises(DataError, match="no document"):
        list(iter_corpus(path, on_bad="skip"))


def test_refusals_come_before_the_first_document(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text " * 999)[:20])
    for source, word in ((tmp_path / "absent", "no such corpus"), ([tmp_path / "a.txt", tmp_path / "b"], "no such"),
                         ([], "no corpus")):
        with pytest.raises(DataError, match=word):
            iter_corpus(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no text"):
        iter_corpus(tmp_path / "empty")
    with pytest.raises(ConfigError):
        iter_corpus(tmp_path / "a.txt", order="random")
    with pytest.raises(DataError, match="damaged"):
        list(iter_corpus(tmp_path / "cut.txt.gz"))


def test_files_that_are_not_text(tmp_path):
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)))
    (tmp_path / "wide.txt.gz").write_bytes(gzip.compress("Text in UTF-16.".encode("utf-16")))
    (tmp_path / "rows.jsonl").write_bytes(bytes(range(128, 256)))
    (tmp_path / "table.parquet").write_bytes(b"PAR1 and no more")
    for name, word in (("image.txt", "not text"), ("wide.txt.gz", "UTF-16"), ("rows.jsonl", "not UTF-8"),
                       ("table.parquet", "cannot be read")):
        with pytest.raises(DataError, match=word) as caught:
            list(iter_corpus(tmp_path / name))
        assert name in str(caught.value)
    (tmp_path / "weights.pt").write_bytes(b"PK")
    with pytest.raises(DataError, match="holds no text; supported"):
        iter_corpus(tmp_path / "weights.pt")


def test_real_corpora():
    wiki = list(iter_corpus(shared_path("data/real/corpus_wikitext2")))
    assert 115 <= len(wiki) <= 130 and not any(" @-@ " in d or "<unk>" in d for d in wiki)
    pages = list(iter_corpus(shared_path("data/real/corpus_openwebtext_1000")))
    assert len(pages) == 1000
    caesar = next(iter_corpus(shared_path("data/real/corpus_gutenberg_nltk/shakespeare-caesar.txt.gz")))
    assert "Julius Caesar" in caesar
