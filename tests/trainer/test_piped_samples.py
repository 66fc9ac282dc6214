"""Samples from a pipe: each is on disk before it is trained on, and piping the same again changes nothing."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from streamsyn.errors import SinkError
from streamsyn.trainer.examples import BadRow, Row
from streamsyn.trainer.sources.pipe import PipedSamples
from tests.builders import disk_full_beyond
from tests.trainer.streams import row


class Pipe:
    """Both ends of a pipe."""

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()

    def write(self, data: bytes) -> None:
        """Put bytes in; a pipe takes 64 KiB without a reader."""
        os.write(self._write_end, data)

    def end(self) -> None:
        """Close the writer's end."""
        os.close(self._write_end)
        self._write_end = -1

    def close(self) -> None:
        """Close what is open."""
        os.close(self.read_end)
        if self._write_end >= 0:
            os.close(self._write_end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A pipe that is closed at the end."""
    made = Pipe()
    yield made
    made.close()


def lines(*numbers: int) -> bytes:
    """Samples as `streamsyn run --stdout` prints them."""
    return b"".join(orjson.dumps(row(number), option=orjson.OPT_APPEND_NEWLINE) for number in numbers)


def ids(rows: list[Row]) -> list[str | None]:
    """The ids of rows; None for bad ones."""
    return [None if isinstance(one, BadRow) else one["id"] for one in rows]


def spooled(folder: Path) -> int:
    """Rows on disk."""
    return len((folder / "samples.jsonl").read_bytes().splitlines())


def test_rows_come_as_they_are_piped_and_are_on_disk_before(pipe: Pipe, tmp_path: Path) -> None:
    """Each row that is fetched is in the spool file; the end of the pipe is the end of the stream."""
    source = PipedSamples(tmp_path, pipe.read_end)
    pipe.write(lines(0, 1) + lines(2)[:9])
    first = ids(source.fetch(0, 10))
    on_disk, early_total = spooled(tmp_path), source.total()
    pipe.write(lines(2)[9:] + lines(3))
    second = ids(source.fetch(2, 10))
    pipe.end()

    assert ["row-0", "row-1"] == first
    assert (2, None) == (on_disk, early_total)
    assert ["row-2", "row-3"] == second
    assert [] == source.fetch(4, 10)
    assert 4 == source.total() == spooled(tmp_path)
    source.close()


def test_the_pipe_is_read_only_when_the_spool_is_used_up(pipe: Pipe, tmp_path: Path) -> None:
    """A trainer that is behind leaves new rows in the pipe: its writer waits."""
    source = PipedSamples(tmp_path, pipe.read_end)
    pipe.write(lines(0, 1))
    source.fetch(0, 1)
    pipe.write(lines(2))
    source.fetch(1, 1)

    assert 2 == spooled(tmp_path)
    assert ["row-2"] == ids(source.fetch(2, 1))
    source.close()


def test_a_later_run_reads_the_spool_to_its_end(pipe: Pipe, tmp_path: Path) -> None:
    """Without stdin, what was spooled is all there is, from any row on."""
    first = PipedSamples(tmp_path, pipe.read_end)
    pipe.write(lines(*range(50)))
    first.fetch(0, 1)
    first.close()
    later = PipedSamples(tmp_path, None)

    assert 50 == later.total()
    assert [f"row-{number}" for number in range(20, 50)] == ids(later.fetch(20, 100))
    assert ["row-3", "row-40"] == ids(list(later.pick([3, 40])))
    assert ["row-0"] == ids(later.fetch(0, 1))
    later.close()


def test_piping_the_same_again_changes_nothing(tmp_path: Path) -> None:
    """Rows are identified by their content, bad lines by their line numbers: only new ones are added."""
    for numbers in ((0, 1, 0), (0, 1), (0, 1, 2)):
        pipe = Pipe()
        pipe.write(lines(numbers[0]) + b"no json\n" + lines(*numbers[1:]) + b'{"no": "id"}\n')
        pipe.end()
        source = PipedSamples(tmp_path, pipe.read_end)
        found = source.fetch(0, 10) + source.fetch(10, 10)
        source.fetch(len(found), 10)
        source.close()
        pipe.close()
    later = PipedSamples(tmp_path, None)
    values = [None if isinstance(one, BadRow) else one for one in later.fetch(0, 10)]
    later.close()

    assert [row(0), None, row(1), {"no": "id"}, row(2)] == values


def said(named: str, text: str, **more: Any) -> dict[str, Any]:
    """A conversation with an id."""
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]
    return {"id": named, "messages": messages, **more}


def piped(folder: Path, rows: list[dict[str, Any]], *more: dict[str, Any]) -> list[Any]:
    """All that is known after rows, and more of them, have come through a pipe."""
    pipe = Pipe()
    for one in (*rows, *more):
        pipe.write(orjson.dumps(one, option=orjson.OPT_APPEND_NEWLINE))
    pipe.end()
    source = PipedSamples(folder, pipe.read_end)
    while source.total() is None:
        source.fetch(spooled(folder), 1)
    found = source.fetch(0, 100)
    source.close()
    pipe.close()
    return found


def test_equal_ids_do_not_make_equal_samples(tmp_path: Path) -> None:
    """Other messages make a different sample, whatever its id; duplicates are skipped and counted."""
    first, second = [[said(str(n), f"{text} {n}") for n in range(20)] for text in ("first", "second")]
    found = piped(tmp_path, first, *second)
    again = {key: first[0][key] for key in reversed(first[0])}  # as another program would write it
    with capture_logs() as logged:
        later = piped(tmp_path, second, *first, again, first[0] | {"at": 7})

    assert [*first, *second] == found == later
    assert [42] == [one["rows"] for one in logged if one["event"] == "stdin.repeats_passed_over"]


def test_bad_lines_are_rows_with_a_problem(pipe: Pipe, tmp_path: Path) -> None:
    """A line that is not a JSON object is named by its number; blank lines are skipped; the rest is read."""
    pipe.write(lines(0) + b"\n" + b'{"cut": \n' + b"[1]\n" + lines(1) + b'{"id": "half')
    pipe.end()
    source = PipedSamples(tmp_path, pipe.read_end)
    found = source.fetch(0, 10)
    source.close()

    assert ["row-0", None, None, "row-1", None] == ids(found)
    problems = [one.problem.partition(":")[0] for one in found if isinstance(one, BadRow)]
    assert [
        "line 3 of stdin is not valid JSON",
        "line 4 of stdin is not a JSON object but list",
        "line 6 of stdin is not valid JSON",
    ] == problems


def test_a_torn_end_of_the_spool_is_cut_off(tmp_path: Path) -> None:
    """The part of a row that a kill left was not acted on: it is cut off, and the row may be piped again."""
    pipe = Pipe()
    pipe.write(lines(0, 1))
    pipe.end()
    source = PipedSamples(tmp_path, pipe.read_end)
    source.fetch(0, 5)
    source.close()
    path = tmp_path / "samples.jsonl"
    os.truncate(path, path.stat().st_size - 5)
    later = PipedSamples(tmp_path, None)
    found = ids(later.fetch(0, 5))
    later.close()
    pipe.close()

    assert ["row-0"] == found
    assert 1 == spooled(tmp_path)


def test_a_damaged_spool_is_not_cut(tmp_path: Path) -> None:
    """A bad line with others behind it stops the run and names its place: the pipe cannot be read again."""
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"key":"00","row":{}}\n#\n{"key":"01","row":{}}\n')

    with pytest.raises(SinkError, match=r"samples.jsonl:2 is damaged"):
        PipedSamples(tmp_path, None).total()
    assert 3 == spooled(tmp_path)


def test_a_full_disk_stops_the_run_and_loses_nothing(pipe: Pipe, tmp_path: Path) -> None:
    """Rows that could not be spooled were not fetched; piped again, each is there once."""
    source = PipedSamples(tmp_path, pipe.read_end)
    pipe.write(lines(*range(200)))
    with disk_full_beyond(16_384), pytest.raises(SinkError, match=r"cannot write .*samples.jsonl"):
        source.fetch(0, 10)
    source.close()
    again = Pipe()
    again.write(lines(*range(200)))
    again.end()
    later = PipedSamples(tmp_path, again.read_end)
    found: list[Row] = []
    while later.total() is None or len(found) < 200:
        found += later.fetch(len(found), 64)
    later.close()
    again.close()

    assert [f"row-{number}" for number in range(200)] == ids(found)


async def test_a_wait_ends_when_rows_arrive(pipe: Pipe, tmp_path: Path) -> None:
    """And when its time is over."""
    source = PipedSamples(tmp_path, pipe.read_end)
    loop = asyncio.get_running_loop()
    await source.changed(0.01)
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(source.changed(30.0), name="waiting")
        loop.call_soon(pipe.write, lines(0))
        await waiting

    assert loop.time() - began < 10


async def test_a_file_on_stdin_never_waits(tmp_path: Path) -> None:
    """A regular file has all its rows, and then its end."""
    path = tmp_path / "rows.jsonl"

    def read() -> list[str | None]:
        path.write_bytes(lines(0, 1))
        with path.open("rb") as file:
            source = PipedSamples(tmp_path, file.fileno())
            found = source.fetch(0, 5)
            asyncio.run(source.changed(30.0))
            assert 2 == source.total()
            source.close()
        return ids(found)

    assert ["row-0", "row-1"] == await asyncio.to_thread(read)
