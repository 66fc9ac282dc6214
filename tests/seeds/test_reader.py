"""All sources of a run as one stream: their order, what is kept of a pipe, and files of every format."""

import gzip
import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamsyn.config.sections import SeedsSection, SourceSection
from streamsyn.errors import ConfigError
from streamsyn.records import BadSeed, Entry, RejectReason, Seed
from streamsyn.seeds.reader import FileSource, SeedReader

pytestmark = pytest.mark.timeout(20)


def jsonl(*names: str) -> bytes:
    return b"".join(
        orjson.dumps({"instruction": f"What is {name}?", "answer": name, "id": name}) + b"\n"
        for name in names
    )


def write(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl(*names))
    return path


def reader_of(
    *sources: str | dict[str, Any],
    interleave: bool = False,
    run_seed: int = 0,
    spool: Path | None = None,
) -> SeedReader:
    given_sources = [{"path": source} if isinstance(source, str) else source for source in sources]
    section = SeedsSection(
        sources=tuple(SourceSection(**source) for source in given_sources), interleave=interleave
    )
    return SeedReader(section, run_seed, spool)


def ids(batches: Iterator[list[Entry]]) -> list[str]:
    return [entry.id if isinstance(entry, Seed) else entry.origin for batch in batches for entry in batch]


def nothing_known(_: Entry) -> bool:
    return False


def read(reader: SeedReader) -> list[str]:
    return ids(reader.batches(nothing_known))


# The order of sources


def test_sources_are_read_in_turn(tmp_path: Path) -> None:
    """In the order in which they are given, each under its own task."""
    first, second = write(tmp_path / "b.jsonl", "b1", "b2"), write(tmp_path / "a.jsonl", "a1")
    reader = reader_of(str(first), {"path": str(second), "task": "given"})

    entries = [entry for batch in reader.batches(nothing_known) for entry in batch]

    assert [("b1", "b"), ("b2", "b"), ("a1", "given")] == [
        (entry.id, entry.task) for entry in entries if isinstance(entry, Seed)
    ]
    assert 1.0 == reader.fraction()


def test_the_fraction_grows_to_one(tmp_path: Path) -> None:
    """Before anything is read it is zero; progress bars rely on it."""
    reader = reader_of(str(write(tmp_path / "a.jsonl", "a1")), str(write(tmp_path / "b.jsonl", "b1")))

    before = reader.fraction()
    fractions = [reader.fraction() for _ in reader.batches(nothing_known)]

    assert 0.0 == before
    assert [0.5, 1.0] == fractions


def test_without_sources_nothing_is_read() -> None:
    """Its share is unknown."""
    reader = reader_of()

    assert ([], None) == (read(reader), reader.fraction())


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two sources of 3,000 seeds each, one with three times the weight of the other."""
    folder = tmp_path_factory.mktemp("weighted")
    heavy = write(folder / "heavy.jsonl", *(f"heavy-{number}" for number in range(3000)))
    light = write(folder / "light.jsonl", *(f"light-{number}" for number in range(3000)))
    return [{"path": str(heavy), "weight": 3}, {"path": str(light), "weight": 1}]


def test_interleaved_sources_come_by_weight(weighted: list[dict[str, Any]]) -> None:
    """As long as both last, three of four come from the heavy one."""
    mixed = read(reader_of(*weighted, interleave=True))

    heavy = Counter(name.split("-")[0] for name in mixed[:2000])["heavy"]
    assert 0.72 < heavy / 2000 < 0.78


def test_interleaving_loses_nothing(weighted: list[dict[str, Any]]) -> None:
    """Each source comes whole and in its own order."""
    mixed = read(reader_of(*weighted, interleave=True))

    for name in ("heavy", "light"):
        expected = [f"{name}-{number}" for number in range(3000)]
        assert expected == [found for found in mixed if found.startswith(name)]
    assert 6000 == len(mixed)


def test_the_order_of_interleaving_is_drawn_from_the_run_seed(weighted: list[dict[str, Any]]) -> None:
    """The same random seed gives the same order, a different one a different order."""
    orders = [read(reader_of(*weighted, interleave=True, run_seed=seed)) for seed in (1, 1, 2)]

    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), run_seed=st.integers(0, 100))
def test_interleaving_sources_of_any_size_loses_nothing(
    tmp_path: Path, sizes: list[int], run_seed: int
) -> None:
    """Empty ones, short ones, and whatever the last batch holds."""
    names = [[f"{source}-{number}" for number in range(size)] for source, size in enumerate(sizes)]
    paths = [str(write(tmp_path / f"{source}.jsonl", *ours)) for source, ours in enumerate(names)]

    batches = list(reader_of(*paths, interleave=True, run_seed=run_seed).batches(nothing_known))

    assert sorted(name for ours in names for name in ours) == sorted(ids(iter(batches)))
    assert all(1 <= len(batch) <= 16 for batch in batches) or len(paths) == 1


# Stdin


@contextmanager
def stdin() -> Iterator[FileIO]:
    """Put a pipe in the place of stdin; gives its writer's end."""
    kept = os.dup(0)
    read_fd, write_fd = os.pipe()
    os.dup2(read_fd, 0)
    os.close(read_fd)
    try:
        with FileIO(write_fd, "wb") as writer:
            yield writer
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def read_piped(data: bytes, spool: Path | None) -> list[str]:
    """What is read when `data` is piped, after what the spool holds."""
    with stdin() as writer:
        writer.write(data)
        writer.close()
        return read(reader_of("-", spool=spool))


def test_stdin_can_be_given_once() -> None:
    """It cannot be read twice."""
    with pytest.raises(ConfigError, match=r"stdin .* is given twice"):
        reader_of("-", "-")


def test_stdin_is_spooled_and_files_are_not(tmp_path: Path) -> None:
    """A file can be read again, a pipe cannot."""
    path = write(tmp_path / "a.jsonl", "file")
    with stdin() as writer:
        writer.write(jsonl("pipe") + b"nix\n")
        writer.close()
        both = read(reader_of(str(path), "-", spool=tmp_path / "spool"))

    assert ["file", "pipe", "-:2"] == both
    assert ["pipe", "-:2"] == read(reader_of(spool=tmp_path / "spool"))


def test_preview_spools_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder for it nothing is written."""
    monkeypatch.chdir(tmp_path)

    assert ["pipe"] == read_piped(jsonl("pipe"), spool=None)
    assert [] == list(tmp_path.iterdir())


def test_what_was_spooled_comes_before_the_sources(tmp_path: Path) -> None:
    """A run that goes on begins with what an earlier one had read and perhaps not finished."""
    read_piped(jsonl("earlier"), spool=tmp_path / "spool")
    path = write(tmp_path / "a.jsonl", "file")

    assert ["earlier", "file"] == read(reader_of(str(path), spool=tmp_path / "spool"))


def test_piping_the_same_seeds_again_changes_nothing(tmp_path: Path) -> None:
    """They come under the same ids and keys as before, so that only what is new is spooled."""
    read_piped(jsonl("a", "b") + b"nix\n", spool=tmp_path)
    known: set[str | bytes] = set()
    seen = []

    with stdin() as writer:
        writer.write(jsonl("a", "b") + b"nix\n" + jsonl("c"))
        writer.close()
        for batch in reader_of("-", spool=tmp_path).batches(lambda entry: key(entry) in known):
            seen += [key(entry) for entry in batch]
            known.update(seen)

    assert seen == [*seen[:3], *seen[:3], "c"]
    assert ["a", "b", "-:3", "c"] == read(reader_of(spool=tmp_path))


def key(entry: Entry) -> str | bytes:
    return entry.key if isinstance(entry, BadSeed) else entry.id


def test_stop_ends_the_reading_of_stdin(tmp_path: Path) -> None:
    """What was read before stays in the spool; half a line is neither passed on nor spooled."""
    with stdin() as writer:
        writer.write(jsonl("a") + b"half a li")
        reader = reader_of("-", spool=tmp_path)
        batches = reader.batches(nothing_known)
        read_first = ids(iter([next(batches)]))
        reader.stop()
        rest = ids(batches)

    assert (["a"], []) == (read_first, rest)
    assert ["a"] == read(reader_of(spool=tmp_path))


def test_stop_without_stdin_is_harmless(tmp_path: Path) -> None:
    """Files are read batch by batch; there is nothing to wake."""
    reader = reader_of(str(write(tmp_path / "a.jsonl", "a")))
    reader.stop()

    assert ["a"] == read(reader)


MIB = 2**20
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.compress,
}


def row(number: int) -> dict[str, Any]:
    noise = random.Random(number).randbytes(30).hex()  # so that it does not compress to nothing
    return {"instruction": f"What is {number}?", "answer": f"It is {noise}.", "n": number}


def numbered(numbers: Iterable[int]) -> bytes:
    return b"".join(orjson.dumps(row(number)) + b"\n" for number in numbers)


def entries(source: FileSource) -> list[Entry]:
    return [entry for batch in source.batches() for entry in batch]


def source_at(path: Path, task: str | None = None, max_line_bytes: int = MIB) -> FileSource:
    return FileSource(path, task, SeedsSection(max_line_bytes=max_line_bytes))


def numbers_in(read: Iterable[Entry]) -> list[int]:
    return [entry.metadata["n"] for entry in read if isinstance(entry, Seed)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_are_read_as_they_stand(tmp_path: Path, suffix: str) -> None:
    """The origin of each seed is its file and line, and its task the file's stem, compressed or not."""
    path = tmp_path / f"trivia{suffix}"
    path.write_bytes(COMPRESS[suffix](numbered(range(3000))))
    source = source_at(path)

    read = entries(source)

    assert list(range(3000)) == numbers_in(read)
    assert [f"{path}:{line}" for line in range(1, 3001)] == [entry.origin for entry in read]
    assert {"trivia"} == {entry.task for entry in read if isinstance(entry, Seed)}
    assert 1.0 == source.fraction()


def test_a_task_may_be_given(tmp_path: Path) -> None:
    """The task of the source replaces the file's stem; a line's own task wins over both."""
    path = tmp_path / "trivia.jsonl"
    own = orjson.dumps({**row(1), "task": "own"})
    path.write_bytes(numbered([0]) + own)

    tasks = [entry.task for entry in entries(source_at(path, task="given")) if isinstance(entry, Seed)]

    assert ["given", "own"] == tasks


def test_bad_lines_stand_between_seeds(tmp_path: Path) -> None:
    """A bad line is named by file and line, and the lines after it are read."""
    path = tmp_path / "seeds.jsonl"
    long = b'{"instruction":"' + b"x" * 200 + b'"}\n'
    path.write_bytes(
        b"\xef\xbb\xbf" + numbered([0]) + b"nix\n\n" + b"\xff\n" + long + b"{}\r\n" + numbered([1])[:-1]
    )

    read = entries(source_at(path, max_line_bytes=150))

    bad = [(entry.origin, entry.reason) for entry in read if isinstance(entry, BadSeed)]
    assert [
        (f"{path}:2", RejectReason.INVALID_JSON),
        (f"{path}:4", RejectReason.INVALID_UTF8),
        (f"{path}:5", RejectReason.LINE_TOO_LONG),
        (f"{path}:6", RejectReason.NOT_A_SEED),
    ] == bad
    assert [0, 1] == numbers_in(read)


def test_a_line_above_the_limit_is_a_bad_seed(tmp_path: Path) -> None:
    """With its length and the key of the limit."""
    path = tmp_path / "huge.jsonl"
    path.write_bytes(numbered([0]) + b"x" * 5000 + b"\n" + numbered([1]))

    read = entries(source_at(path, max_line_bytes=1000))

    assert [Seed, BadSeed, Seed] == [type(entry) for entry in read]
    assert isinstance(read[1], BadSeed)
    assert "5000 bytes, more than seeds.max_line_bytes = 1000" == read[1].detail


def test_a_broken_file_is_refused_after_its_good_seeds(tmp_path: Path) -> None:
    """The message names it."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(numbered(range(100))) + b"garbage")
    read: list[Entry] = []

    with pytest.raises(ConfigError) as raised:
        read.extend(entry for batch in source_at(path).batches() for entry in batch)

    assert list(range(100)) == numbers_in(read)
    assert str(raised.value).startswith(f"{path} cannot be read to its end: ")


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_rows_are_numbered_like_lines(tmp_path: Path) -> None:
    """Every row is an entry; a row without an answer is named by file and row."""
    rows = [row(number) for number in range(1000)]
    columns = {name: [line[name] for line in rows] for name in rows[0]}
    columns["answer"][700] = None
    path = write_parquet(tmp_path / "trivia.parquet", columns)
    source = source_at(path)

    read = entries(source)

    assert [number for number in range(1000) if number != 700] == numbers_in(read)
    assert [f"{path}:{number}" for number in range(1, 1001)] == [entry.origin for entry in read]
    assert isinstance(read[700], BadSeed)
    assert {"trivia"} == {entry.task for entry in read if isinstance(entry, Seed)}
    assert 1.0 == source.fraction()


def test_parquet_holds_what_json_does_not(tmp_path: Path) -> None:
    """Times, bytes, decimals and nested values travel along in a form that can be written."""
    import datetime
    import decimal

    columns = {
        "instruction": ["Who?"],
        "answer": ["Ada."],
        "at": [datetime.date(1843, 9, 1)],
        "price": [decimal.Decimal("1.50")],
        "share": [float("nan")],
        "raw": [b"\xff"],
        "tags": [["a", "b"]],
        "more": [{"pages": 3}],
    }
    path = write_parquet(tmp_path / "a.parquet", columns)

    metadata = [entry.metadata for entry in entries(source_at(path)) if isinstance(entry, Seed)]

    expected = {
        "at": "1843-09-01",
        "price": "1.50",
        "share": "NaN",
        "raw": "b'\\xff'",
        "tags": ["a", "b"],
        "more": {"pages": 3},
    }
    assert [expected] == metadata


def test_a_value_that_python_cannot_hold_costs_no_pair(tmp_path: Path) -> None:
    """A date beyond the year 9999 becomes text; an instruction that is not UTF-8 is a bad seed."""
    import pyarrow

    offsets, data = struct.pack("<4i", 0, 4, 6, 10), b"Who?\xff\xfeWhy?"
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(data)]
    )
    times = pyarrow.array([0, 0, 2**62], pyarrow.timestamp("us"))
    columns = {"instruction": texts, "answer": ["a", "b", "c"], "at": times}
    path = write_parquet(tmp_path / "a.parquet", columns)

    read = entries(source_at(path))

    bad = [(entry.origin, entry.reason) for entry in read if isinstance(entry, BadSeed)]
    assert [(f"{path}:2", RejectReason.INVALID_UTF8)] == bad
    assert ["Who?", "Why?"] == [entry.instruction for entry in read if isinstance(entry, Seed)]
    assert isinstance(read[2], Seed)
    assert isinstance(read[2].metadata["at"], str)


@pytest.fixture
def datasets() -> Any:
    """The package, without its progress bars."""
    import datasets

    datasets.disable_progress_bars()
    return datasets


def test_a_saved_dataset_is_read_row_by_row(tmp_path: Path, datasets: Any) -> None:
    """The folder's name is the task; a selection of rows and a saved format make no difference."""
    path = tmp_path / "trivia"
    dataset = datasets.Dataset.from_list([row(number) for number in range(1000)])
    dataset.select(range(999, -1, -1)).with_format("numpy").save_to_disk(path)
    source = source_at(path)

    read = entries(source)

    assert list(range(999, -1, -1)) == numbers_in(read)
    assert [f"{path}:{number}" for number in range(1, 1001)] == [entry.origin for entry in read]
    assert {"trivia"} == {entry.task for entry in read if isinstance(entry, Seed)}
    assert 1.0 == source.fraction()


def test_a_saved_dataset_is_read_split_by_split(tmp_path: Path, datasets: Any) -> None:
    """The origin of each row names its split."""
    path = tmp_path / "trivia"
    train, test = datasets.Dataset.from_list([row(0), row(1)]), datasets.Dataset.from_list([row(2)])
    datasets.DatasetDict(train=train, test=test).save_to_disk(path)

    read = entries(source_at(path))

    assert [0, 1, 2] == numbers_in(read)
    assert [f"{path}[train]:1", f"{path}[train]:2", f"{path}[test]:1"] == [entry.origin for entry in read]


def test_a_name_that_is_not_utf8_is_written_with_escapes(tmp_path: Path) -> None:
    """So that the log can hold the origin and the task of its seeds, and of its bad lines."""
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_bytes(orjson.dumps(row(0)) + b"\n{broken\n")

    seed, bad = entries(source_at(path))

    assert isinstance(seed, Seed)
    assert "caf\\udce9" == seed.task
    assert [f"{tmp_path}/caf\\udce9.jsonl:{number}" for number in (1, 2)] == [seed.origin, bad.origin]
    assert orjson.dumps([seed, bad], default=bytes.hex)


def test_seeds_are_read_again_under_new_ids(tmp_path: Path) -> None:
    """For a benchmark that goes on longer than its seeds; an invalid line comes once."""
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(jsonl("a", "b") + b"{}\n")
    section = SeedsSection(sources=(SourceSection(path=str(path)),))

    def first(number: int, skip: int = 0) -> list[str]:
        reader = SeedReader(section, 0, None, repeats=True, skip=skip)
        entries = (entry for batch in reader.batches(nothing_known) for entry in batch)
        return [
            entry.id if isinstance(entry, Seed) else entry.origin.rpartition(":")[2]
            for entry in islice(entries, number)
        ]

    assert ["a", "b", "3", "a~again-1", "b~again-1", "a~again-2"] == first(6)
    assert ["b~again-1", "a~again-2"] == first(2, skip=4)


def test_seeds_without_a_valid_line_are_not_read_forever(tmp_path: Path) -> None:
    """There is nothing to repeat."""
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(b"{}\n")
    section = SeedsSection(sources=(SourceSection(path=str(path)),))
    reader = SeedReader(section, 0, None, repeats=True)

    assert 1 == len(ids(reader.batches(nothing_known)))
