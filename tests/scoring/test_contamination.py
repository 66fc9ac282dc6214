"""Overlap with evaluation sets: every shared run of words is found, and nothing else."""

import gzip
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import ConfigError
from streamsyn.scoring import contamination
from streamsyn.scoring.contamination import SHOWN_WORDS, EvalSets, Overlap
from tests.examples import examples

RUN = "the quick brown fox jumps over the lazy dog while seven otters sleep"
ROW: dict[str, Any] = {
    "input": "Who jumps?",
    "context": f"Once upon a time {RUN} in the sun",
    "answers": ["the fox", "a quick brown fox that lived in a house by the river and jumped all day long"],
    "all_classes": None,
    "more": {"notes": [{"text": "one two three four five six seven eight nine ten eleven twelve thirteen"}]},
    "length": 13,
}
WORDS = [*"abcdefgh", "\u00e9t\u00e9", "don't"]


def written(path: Path, *rows: Any) -> str:
    """A file of JSON lines; its path."""
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return str(path)


def naive(texts: list[str], words: int) -> set[tuple[str, ...]]:
    """Runs of words as sets of tuples."""
    split = [text.casefold().split() for text in texts]
    return {tuple(text[at : at + words]) for text in split for at in range(len(text) - words + 1)}


@pytest.fixture
def longbench(tmp_path: Path) -> EvalSets:
    return EvalSets([written(tmp_path / "qa.jsonl", ROW)], 13)


def test_a_shared_run_is_found_with_its_file_and_words(tmp_path: Path, longbench: EvalSets) -> None:
    """How many runs there are, where the first is from, and what it says."""
    found = longbench.overlap(f"A story. TIME: {RUN.title()}, in the rain; and on {RUN}!")

    # The first stretch has 16 words: 4 runs of 13. The second has no more than the run itself.
    assert Overlap(5, str(tmp_path / "qa.jsonl"), f"time {RUN} in the") == found
    assert longbench.overlap("A story of a fox. " + RUN.removesuffix("sleep") + "swim") is None
    assert longbench.overlap("") is None


@pytest.mark.parametrize(
    "text",
    [ROW["context"], ROW["answers"][1], ROW["more"]["notes"][0]["text"]],
)
def test_every_string_in_a_row_counts(longbench: EvalSets, text: str) -> None:
    """Those in lists and in nested objects too."""
    assert longbench.overlap(f"And so: {text}") is not None


def test_what_is_shown_is_bounded(tmp_path: Path) -> None:
    """Of a whole document in common only the beginning is shown."""
    text = " ".join(f"word{number}" for number in range(500))
    found = EvalSets([written(tmp_path / "a.jsonl", text)], 13).overlap(f"Here: {text}")

    assert found is not None
    assert 488 == found.ngrams
    assert text.split()[:SHOWN_WORDS] == found.words.split()


def test_all_kinds_of_files_are_read(tmp_path: Path) -> None:
    """JSON lines, a JSON document, text and Parquet, compressed or not, below a directory."""

    def passage(number: int) -> str:
        return " ".join(f"p{number}w{at}" for at in range(20))

    lines = [b'\n{"t": "%s"}\n' % passage(number).encode() for number in range(6)]
    (tmp_path / "deep").mkdir()
    files = {
        "a.jsonl": lines[0],
        "deep/b.ndjson.gz": gzip.compress(lines[1]),
        "deep/c.json.zst": zstandard.compress(lines[2]),
        "d.json": orjson.dumps([{"t": passage(3)}], option=orjson.OPT_INDENT_2),
        "e.txt": "\ufeff".encode() + passage(4).replace(" ", "\n").encode(),
        "f.txt.gz": gzip.compress(passage(5).encode()),
        "readme.md": passage(7).encode(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    table = pyarrow.table({"n": [1], "rows": [[{"text": passage(6)}]]})
    pyarrow.parquet.write_table(table, tmp_path / "g.parquet")

    sets = EvalSets([str(tmp_path)], 13)

    names = [*itertools.islice(files, 6), "g.parquet"]
    for number, name in enumerate(names):
        found = sets.overlap(f"x {passage(number)} y")
        assert Overlap(8, str(tmp_path / name), passage(number)) == found
    assert sets.overlap(passage(7)) is None


def test_globs_name_files(tmp_path: Path) -> None:
    """A wildcard takes what matches; a file that two patterns name is read once."""
    written(tmp_path / "one.jsonl", ROW)
    written(tmp_path / "two.jsonl", "x y z")

    sets = EvalSets([str(tmp_path / "o*.jsonl"), str(tmp_path / "one.jsonl")], 13)

    assert sets.digest == EvalSets([str(tmp_path / "one.jsonl")], 13).digest


def test_the_digest_identifies_the_content(tmp_path: Path) -> None:
    """The same texts in other files have the same digest; other texts and other lengths of runs do not."""
    (tmp_path / "other").mkdir()
    whole = EvalSets([written(tmp_path / "a.jsonl", ROW, RUN + " again and again")], 13)
    parts = [
        written(tmp_path / "other" / "b.jsonl", RUN + " AGAIN, and again"),
        written(tmp_path / "c.json", ROW),
    ]

    assert whole.digest == EvalSets(parts, 13).digest
    assert len(whole) == len(EvalSets(parts, 13))
    assert whole.digest != EvalSets(parts[1:], 13).digest
    assert whole.digest != EvalSets(parts, 12).digest


@examples(60)
@given(
    files=st.lists(
        st.lists(st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join), max_size=6),
        min_size=1,
        max_size=4,
    ),
    text=st.lists(st.sampled_from(WORDS), max_size=40),
    length=st.integers(4, 6),
    chunk=st.integers(1, 40),
)
def test_it_agrees_with_sets_of_tuples(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], text: list[str], length: int, chunk: int
) -> None:
    """Count, file and words are those of a naive implementation, in whatever chunks it is built."""
    root = tmp_path_factory.mktemp("sets")
    longest = " ".join(f"other{number}" for number in range(length))
    paths = [written(root / f"{number}.jsonl", *rows, longest) for number, rows in enumerate(files)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "CHUNK_RUNS", chunk)
        sets = EvalSets(paths, length)
    known = [naive(rows, length) for rows in files]
    words = " ".join(text).casefold().split()
    runs = [tuple(words[at : at + length]) for at in range(len(words) - length + 1)]
    hits = [any(run in one for one in known) for run in runs]

    found = sets.overlap(" ".join(text))

    assert len(set().union(*known)) + 1 == len(sets)
    if not any(hits):
        assert found is None
        return
    first = hits.index(True)
    stretch = len(list(itertools.takewhile(bool, hits[first:])))
    owner = next(path for path, one in zip(paths, known, strict=True) if runs[first] in one)
    shown = " ".join(words[first : first + stretch - 1 + length]).replace("'", "")
    assert Overlap(sum(hits), owner, shown) == found


@examples(60)
@given(data=st.data())
def test_a_planted_run_is_always_found(longbench_sets: EvalSets, data: st.DataObject) -> None:
    """In any case, with anything between and around its words."""
    filler = st.lists(st.sampled_from(["alpha", "beta", "gamma"]), max_size=30).map(" ".join)
    gap = st.sampled_from([" ", "  ", ", ", "\n", " -- ", "; \u201c", "\u2014", ".\u00a0"])
    words = [data.draw(st.sampled_from([word, word.upper(), word.title()])) for word in RUN.split()]
    planted = "".join(data.draw(gap) + word for word in words)
    before, after = data.draw(filler), data.draw(filler)

    found = longbench_sets.overlap(f"{before}{planted}{data.draw(gap)}{after}")

    assert found is not None
    assert (1, RUN) == (found.ngrams, found.words)
    assert longbench_sets.overlap(f"{before} {after}") is None
    without_one = " ".join(word for at, word in enumerate(RUN.split()) if at != 6)
    assert longbench_sets.overlap(f"{before} {without_one} {after}") is None


@pytest.fixture(scope="module")
def longbench_sets(tmp_path_factory: pytest.TempPathFactory) -> EvalSets:
    return EvalSets([written(tmp_path_factory.mktemp("sets") / "qa.jsonl", ROW)], 13)


def test_a_text_without_spaces_is_compared_by_its_characters(tmp_path: Path) -> None:
    """Thirteen Chinese characters in common are found, twelve are not."""
    text = "".join(chr(0x4E00 + 7 * number) for number in range(40))
    sets = EvalSets([written(tmp_path / "zh.jsonl", {"context": text})], 13)

    found = sets.overlap(f"\u3000{text[5:11]}\uff0c{text[11:18]}\u3002")
    assert found is not None
    assert " ".join(text[5:18]) == found.words
    assert sets.overlap(text[5:17]) is None


def test_a_long_text_is_read_in_pieces_that_lose_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of any size takes bounded memory, and its runs are those of the whole."""
    words = [f"w{number * number % 7919}" for number in range(5000)]
    (tmp_path / "long.txt").write_text("\n".join(words))
    whole = EvalSets([str(tmp_path / "long.txt")], 13)
    monkeypatch.setattr(contamination, "PIECE_CHARS", 3000)
    monkeypatch.setattr(contamination, "OVERLAP_CHARS", 200)

    assert max(map(len, contamination.texts(tmp_path / "long.txt"))) <= 6200
    assert len(list(contamination.texts(tmp_path / "long.txt"))) > 5
    assert whole.digest == EvalSets([str(tmp_path / "long.txt")], 13).digest
    assert whole.digest == EvalSets([written(tmp_path / "long.jsonl", " ".join(words))], 13).digest


def test_the_digest_does_not_depend_on_the_process(longbench_sets: EvalSets) -> None:
    """The digest is the same under any hash seed."""
    (path,) = longbench_sets.files
    code = (
        "import sys; from streamsyn.scoring.contamination import EvalSets; "
        f"print(EvalSets([{str(path)!r}], 13).digest, file=sys.stderr)"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stderr.decode()
        for seed in ("1", "2")
    }

    assert {f"{longbench_sets.digest}\n"} == said


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("none.jsonl", None, "does not exist"),
        ("a.pdf", b"a,b", "is of no known format"),
        ("empty.jsonl", b"", "there is no text in"),
        ("numbers.jsonl", b'{"a": [1, 2]}\n', "there is no text in"),
        ("short.jsonl", b'{"a": "too short"}\n', "eval_ngram_words = 13"),
        ("bad.jsonl", b'{"a": "x"}\n{"a": \n', "bad.jsonl:2 is not valid JSON"),
        ("bad.json", b'[\n{"a": \n', "bad.json:1 is not valid JSON"),
        ("bad.txt", b"a b c \xff\xfe d e", "bad.txt is not valid UTF-8"),
        # Without the time: these bytes are part of the test's name, and pytest's workers must agree on names.
        (
            "bad.jsonl.gz",
            gzip.compress(b'{"a": "x"}\n' * 9, mtime=0)[:-9],
            "bad.jsonl.gz cannot be read to its end",
        ),
        ("bad.jsonl.zst", b"no zstd", "bad.jsonl.zst cannot be read to its end"),
        ("bad.parquet", b"no parquet", "bad.parquet cannot be read to its end as Parquet"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, name: str, data: bytes | None, says: str) -> None:
    """One line that names the key and the path."""
    good = written(tmp_path / "good.jsonl", ROW)
    if data is not None:
        (tmp_path / name).write_bytes(data)

    with pytest.raises(ConfigError) as error:
        EvalSets([good, str(tmp_path / name)], 13)

    assert "checks.eval_sets: " in str(error.value)
    assert name in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
