"""Passages of a corpus as distractors: every format of file, cut at the ends of paragraphs and sentences."""

import gzip
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.assembly.corpus import Corpus, cut, load_corpus
from streamsyn.assembly.resources import AssemblyResources, ResourceMissing
from streamsyn.config.sections import AssemblySection
from streamsyn.errors import ConfigError


def loaded(*paths: object, **section: Any) -> Corpus:
    return load_corpus(AssemblySection(distractors="corpus", corpus=tuple(map(str, paths)), **section))


def texts(corpus: Corpus) -> list[str]:
    return [corpus[index].text for index in range(len(corpus))]


def lines(*rows: Any) -> bytes:
    return b"\n".join(map(orjson.dumps, rows))


@given(
    st.lists(st.text(" \n.ab!é\u2029", max_size=30), max_size=20),
    st.integers(1, 12),
)
def test_cutting_loses_no_word(chunks: list[str], words: int) -> None:
    """However a document comes in chunks: all words in order, in passages that are full but not overfull."""
    whole = "".join(chunks)
    passages = list(cut(chunks, words))

    assert whole.split() == [word for text in passages for word in text.split()]
    assert all(1 <= len(text.split()) <= words for text in passages)
    assert all(len(text.split()) >= words - words // 5 for text in passages[:-1])
    assert passages == list(cut([whole], words))


def test_cuts_are_at_ends_when_near() -> None:
    """A paragraph's end goes before a sentence's, that before any word's."""
    paragraph = "a b c d e f g h. i\n\nj k l"

    assert ["a b c d e f g h. i", "j k l"] == list(cut([paragraph], 10))
    assert ["a b c d e f g h.", "i j k l"] == list(cut([paragraph.replace("\n\n", " ")], 10))
    assert ["a b c d e f g h i j", "k l"] == list(cut(["a b c d e f g h i j k l"], 10))


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    """Text, JSON lines and Parquet, compressed ones too; directories and globs in order of names."""
    rows = lines({"text": "two lines\nof text"}, {"text": " "}, {"text": "three"})
    (tmp_path / "a.txt").write_text("\ufeffone é\n", "utf-8")
    (tmp_path / "b.jsonl").write_bytes(rows)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(rows[:30]) + zstandard.compress(rows[30:]))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"four"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["five", "six"], "n": [1, 2]}), tmp_path / "f.parquet")
    (tmp_path / "README.md").write_text("not read")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "g.txt").write_text("seven")
    both = ["two lines\nof text", "three"]
    everything = ["one é", *both, *both, *both, "four", "five", "six", "seven"]

    assert everything == texts(loaded(tmp_path))
    assert both * 2 == texts(loaded(tmp_path / "*.jsonl*"))[:4]
    assert ["four", "seven"] == texts(loaded(tmp_path / "e.txt.gz", tmp_path / "**/g.txt"))
    assert loaded(tmp_path).digest == loaded(tmp_path).digest != loaded(tmp_path / "*.txt").digest


def test_a_field_may_have_another_name(tmp_path: Path) -> None:
    """As `assembly.corpus_field` says; tokens are estimated by words."""
    (tmp_path / "a.jsonl").write_bytes(lines({"body": "ten words " * 5}))
    corpus = loaded(tmp_path, corpus_field="body", corpus_words=8)

    assert [8, 2] == [len(text.split()) for text in texts(corpus)]
    assert [10, 3] == [corpus[index].tokens for index in range(2)]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b'{"text": 1}', "a.jsonl:1 has no text in 'text'; assembly.corpus_field names the field"),
        ("a.jsonl", b'{"text": "x"}\n{"no"', "a.jsonl:2 is not valid JSON"),
        ("a.jsonl", b"[]", "there is no text in"),
        ("a.txt", b"\xff", "a.txt is not valid UTF-8"),
        ("a.txt", b" \n", "there is no text in"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read"),
        ("a.txt.zst", zstandard.compress(b"x" * 999)[:-3], "a.txt.zst cannot be read"),
        ("a.txt.zst", b"no zstd at all", "a.txt.zst cannot be read"),
        ("a.pdf", b"%PDF", "a.pdf is of no known format; there are .jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    """With the key, the file and the line."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path / name)

    assert what in str(raised.value)
    assert str(raised.value).startswith("assembly.corpus: ")


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    """A missing path, a glob without a match, an empty `assembly.corpus`, a missing column."""
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "f.parquet")
    for paths, what in [
        ([tmp_path / "none"], f"assembly.corpus: {tmp_path}/none does not exist"),
        ([tmp_path / "*.txt"], "*.txt does not exist"),
        ([], "assembly.corpus is empty"),
        ([tmp_path], "has no column 'text'"),
    ]:
        with pytest.raises(ConfigError) as raised:
            loaded(*paths)
        assert what in str(raised.value)


def test_passages_are_drawn_once_each() -> None:
    """In an order that the random numbers decide; any number of readers at a time."""
    corpus = Corpus(([f"document {n}"] for n in range(50)), 10, 10**6)
    drawn = [passage.index for passage in corpus.shuffled(Random(1))]
    first, second = corpus.shuffled(Random(1)), corpus.shuffled(Random(2))

    assert list(range(50)) == sorted(drawn)
    assert drawn == [next(first).index for _ in range(50)]
    assert drawn != [passage.index for passage in second]


def test_the_fingerprint_has_what_shapes_samples(tmp_path: Path) -> None:
    """The content of the corpus, not its path, is in the fingerprint; a missing corpus has its own error."""
    path = tmp_path / "a.txt"
    path.write_text("one text")
    section = AssemblySection(distractors={"same_task": 1, "corpus": 1}, corpus=(str(path),))
    first = AssemblyResources(section).fingerprint()
    path.write_text("another text")
    second = AssemblyResources(section).fingerprint()
    path.unlink()

    assert ["assembly.corpus", "assembly.prompts"] == sorted(first)
    assert first["assembly.corpus"] != second["assembly.corpus"]
    with pytest.raises(ResourceMissing, match=r"a\.txt does not exist"):
        AssemblyResources(section)
    assert ["assembly.prompts"] == list(AssemblyResources(AssemblySection(corpus=(str(path),))).fingerprint())
