"""Rows of a run directory as bytes, of every kind, from anywhere. What a run may do meanwhile is in
`tests/trainer/test_run_samples.py`.
"""

import os
from pathlib import Path
from typing import Any

import orjson
import pytest

from streamsyn.errors import RunReplaced, SinkError
from streamsyn.following.run_rows import RunRows
from streamsyn.following.shard_lines import Cursor, read_lines, seek, seq_of
from streamsyn.sink import shards
from streamsyn.sink.manifest import Retry
from streamsyn.sink.rundir import RunDirectory
from tests.builders import COMPRESSIONS, context, new_run, opened, outcome, rows, sample, sink


def all_lines(reader: RunRows, first: int = 0, **given: Any) -> list[bytes]:
    """The lines from `first` on, read in several calls."""
    found: list[bytes] = []
    while some := reader.lines(first + len(found), 7, **given):
        assert len(some) <= 7
        found += some
    return found


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_lines_are_the_bytes_of_the_shards(compression: str, tmp_path: Path) -> None:
    """Of each kind, sealed or open, from any row on; a line that is decoded is the row."""
    with opened(tmp_path, sink(compression=compression)) as log:
        for first in range(0, 60, 4):
            log.append([outcome(number) for number in range(first, first + 4)])
            log.sync()
            log.samples.append([sample(number) for number in range(first, first + 3)])
        for kind in shards.KINDS:
            written = rows(tmp_path, kind)
            for first in (0, 1, len(written) // 2, len(written) - 1):
                reader = RunRows(tmp_path, kind)
                lines = all_lines(reader, first)
                assert written[first:] == [orjson.loads(line) for line in lines]
                assert lines == [shards.line(row) for row in written[first:]]
                assert written[first:] == RunRows(tmp_path, kind).rows(first, 1000)
            assert [] == reader.lines(len(written), 5)


@pytest.fixture(scope="module", params=COMPRESSIONS)
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one large shard of contexts that do not compress, written in appends of 1 to 5 rows."""
    root = tmp_path_factory.mktemp("large")
    with opened(root, sink(compression=request.param, shard_bytes=10**9)) as log:
        for number in range(400):
            first = log.contexts.rows
            log.append([context(first + at, context=os.urandom(8000).hex()) for at in range(1 + number % 5)])
    return root


@pytest.fixture
def parts_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the size of each block or frame whose lines are read."""
    sizes: list[int] = []
    real = shards.split

    def counted(data: bytes) -> list[bytes]:
        sizes.append(len(data))
        return real(data)

    monkeypatch.setattr(shards, "split", counted)
    return sizes


def test_a_row_is_found_without_reading_the_shard(large: Path, parts_read: list[int]) -> None:
    """Wherever it is in a shard of 19 MB, a few megabytes are read at most."""
    for seq in (0, 1, 600, 601, 602, 1000, 1199):
        del parts_read[:]
        [row] = RunRows(large, "contexts").rows(seq, 1)
        assert (seq, f"seed-{seq}") == (row["seq"], row["seed_id"])
        assert 0 < sum(parts_read) < 5_000_000


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_search_finds_rows_longer_than_its_blocks(compression: str, tmp_path: Path) -> None:
    """It ends at most two rows before; also where the middle of the rest lies in the last row."""
    with opened(tmp_path, sink(compression=compression, shard_bytes=10**9)) as log:
        for number in range(8):
            log.append([context(number, context=os.urandom(1_500_000).hex())])
    [path] = (tmp_path / "contexts").glob("part-*")
    for seq in range(8):
        cursor = Cursor()
        seek(path, cursor, seq)
        assert seq - 2 <= cursor.seq <= seq
        lines, _ = read_lines(path, cursor, seq, 1, 1)
        assert [seq] == [seq_of(line) for line in lines]


def test_a_call_reads_a_bounded_number_of_bytes(large: Path, parts_read: list[int]) -> None:
    """The lines of one call exceed the bound by one line or one frame, and little is read twice."""
    reader = RunRows(large, "contexts")
    seq = size = 0
    while lines := reader.lines(seq, 10**6, max_bytes=100_000):
        seq += len(lines)
        size += sum(map(len, lines))
        assert sum(map(len, lines)) < 200_000
        assert sum(map(len, lines)) >= 100_000 or seq == 1200

    assert 1200 == seq
    assert size <= sum(parts_read) < 1.5 * size


def test_readers_that_share_an_object_have_cursors_of_their_own(large: Path, parts_read: list[int]) -> None:
    """Many readers of one run need one object, and none of them makes another one search."""
    shared = RunRows(large, "contexts")
    readers = {first: Cursor() for first in (0, 500, 900)}
    for step in range(20):
        for first, cursor in readers.items():
            [row] = shared.rows(first + step, 1, cursor=cursor)
            assert first + step == row["seq"]

    assert 0 < sum(parts_read) < 10_000_000


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_cursor_of_bytes_that_were_written_anew_is_not_trusted(compression: str, tmp_path: Path) -> None:
    """A loss of power takes back unsynced contexts; what is then written in their place may be longer."""
    reader = RunRows(tmp_path, "contexts")
    with opened(tmp_path, sink(compression=compression, shard_bytes=10**6)) as log:
        for number in range(12):
            log.append([context(number)])
        assert 12 == len(reader.rows(0, 100))
    [path] = (tmp_path / "contexts").glob("part-*")
    os.truncate(path, path.stat().st_size // 2)
    with opened(tmp_path, sink(compression=compression, shard_bytes=10**6)) as log:
        kept = log.contexts.rows
        assert kept < 12
        log.append([context(number, context="longer " * 900) for number in range(kept, 20)])

    assert list(range(12, 20)) == [row["seq"] for row in reader.rows(12, 100)]


@pytest.mark.parametrize("taken_up_by", ["context", "sample", "retry"])
def test_a_run_that_is_taken_up_again_has_not_ended(taken_up_by: str, tmp_path: Path) -> None:
    """`final` may still be the last line of the manifest when new rows are already in open shards."""
    reader = RunRows(tmp_path)
    totals = []
    with opened(tmp_path, sink()) as log:
        log.append([context(0), outcome(3)])
        log.samples.append([sample(0)])
        log.seal_outcomes()
        log.finish()
        totals.append(reader.total())
    with opened(tmp_path, sink()) as log:
        totals.append(reader.total())
        if taken_up_by == "context":
            log.append([context(1)])
        elif taken_up_by == "sample":
            log.samples.append([sample(1)])
        else:
            log.manifest.add_retry(Retry(reasons=[], contexts=1, rejects=1, seeds_read=True, at=0.0))
        totals.append(reader.total())
        log.seal_outcomes()
        log.finish()
        totals.append(reader.total())

    assert [1, 1, None, 1 + (taken_up_by == "sample")] == totals


def test_a_different_run_is_told_by_its_time_of_creation(tmp_path: Path) -> None:
    """`run` identifies it; a resume does not change it."""
    reader = RunRows(tmp_path)
    assert [] == reader.lines(0, 1)
    assert reader.run is None
    directory = RunDirectory(new_run(tmp_path))
    for _ in range(2):
        directory.save({}, {})
        assert [] == reader.lines(0, 1)
        assert directory.saved()["created_at"] == reader.run  # type: ignore[index]
    (tmp_path / "run.json").unlink()
    directory.save({}, {})
    directory.close()

    with pytest.raises(RunReplaced, match="now holds a different run"):
        reader.lines(0, 1)


def test_a_line_of_another_program_has_its_number_anywhere() -> None:
    """What this package writes begins with it."""
    assert 17 == seq_of(b'{"id": "a", "seq": 17}\n')


@pytest.mark.parametrize(
    "damaged", [b'{"seq":1}', b'{"seq":1,\0\0}\n', b'{"seq":"1"}\n', b"[1]\n", b'{"other":1}\n']
)
def test_a_damaged_line_of_the_open_shard_is_not_a_row_yet(damaged: bytes, tmp_path: Path) -> None:
    """A run that resumes cuts it off and writes it again. In a sealed shard it is an error."""
    with opened(tmp_path, sink(shard_bytes=10**6)) as log:
        log.samples.append([sample(0), sample(1), sample(2)])
    [path] = (tmp_path / "samples").glob("part-*")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damaged + (lines[2] if damaged.endswith(b"\n") else b""))
    reader = RunRows(tmp_path)

    assert [lines[0]] == reader.lines(0, 10)
    assert [] == reader.lines(1, 10)
    path.write_bytes(b"".join(lines))
    assert lines[1:] == reader.lines(1, 10)
    with opened(tmp_path, sink()) as log:
        log.samples.seal()
    [path] = (tmp_path / "samples").glob("part-*")
    path.write_bytes(lines[0] + damaged)
    with pytest.raises(SinkError, match=r"part-000000\.jsonl: row 1 is damaged or missing"):
        all_lines(RunRows(tmp_path))
