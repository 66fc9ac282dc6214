"""The tail of a run: each reader sees each row once and in order, reads are shared, memory is bounded."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.daemon import tail as module
from streamsyn.daemon.tail import Position, RowForm, RunTails, Streams, Tail
from streamsyn.errors import SinkError
from streamsyn.following.run_rows import RunRows
from streamsyn.following.shard_lines import Cursor
from streamsyn.sink.log import RunLog
from tests.builders import COMPRESSIONS, context, new_run, sample, sink
from tests.examples import examples

PLAIN = RowForm()


class Rows:
    """Rows in memory as a source; counts what is read."""

    def __init__(self) -> None:
        self.lines_there: list[bytes] = []
        self.reads: list[int] = []
        self.may_read = threading.Event()
        self.may_read.set()

    def add(self, *sizes: int) -> None:
        for size in sizes:
            self.lines_there.append(b'{"seq":%d,"x":"%s"}\n' % (len(self.lines_there), b"x" * size))

    def lines(self, first: int, limit: int, max_bytes: int, cursor: Cursor) -> list[bytes]:
        assert self.may_read.wait(10)
        self.reads.append(first)
        assert cursor.seq <= first
        found: list[bytes] = []
        for line in self.lines_there[first : first + limit]:
            found.append(line)
            if sum(map(len, found)) >= max_bytes:
                break
        cursor.seq = first + len(found)
        return found


@contextmanager
def tail_of(source: Rows, cache_bytes: int = 2**20) -> Iterator[tuple[Tail, Streams]]:
    streams = Streams(cache_bytes)
    tail = Tail(source, streams, lambda: len(source.lines_there))
    streams.tails.add(tail)
    try:
        yield tail, streams
    finally:
        streams.close()


async def read(tail: Tail, first: int, total: int, form: RowForm = PLAIN, stops: Any = ()) -> bytes:
    """All rows from `first` to `total`, waiting for those that are not there yet."""
    tail.readers += 1
    at, found, stops = Position(first), [], list(stops)
    while at.seq < total:
        news = tail.news
        if (piece := await tail.piece(at, form)) is None:
            await news.wait()
            continue
        found.append(piece.encoded.plain)
        at = piece.next
        for _ in range(stops.pop(0) if stops else 0):
            await asyncio.sleep(0)
    tail.readers -= 1
    return b"".join(found)


@given(
    batches=st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=8), min_size=1, max_size=8),
    starts=st.lists(st.integers(0, 10), min_size=1, max_size=6),
    stops=st.lists(st.integers(0, 6), max_size=6),
    cache_bytes=st.integers(0, 2000),
)
@examples(60)
def test_each_reader_sees_each_row_once_and_in_order(
    batches: list[list[int]], starts: list[int], stops: list[int], cache_bytes: int
) -> None:
    async def run() -> None:
        source = Rows()
        total = sum(map(len, batches))
        with tail_of(source, cache_bytes) as (tail, streams):
            async with asyncio.TaskGroup() as group:
                reading = [
                    group.create_task(read(tail, min(first, total), total, stops=stops[at:]), name="reader")
                    for at, first in enumerate(starts)
                ]
                for batch in batches:
                    source.add(*batch)
                    tail.wake()
                    await asyncio.sleep(0)
            for first, task in zip(starts, reading, strict=True):
                assert task.result() == b"".join(source.lines_there[first:])
            assert streams.cache.bytes <= cache_bytes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_BYTES", 300)
        asyncio.run(run())


async def test_a_thousand_readers_at_the_tail_cost_one_read() -> None:
    source = Rows()
    source.add(*[10] * 50)
    with tail_of(source) as (tail, _):
        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(read(tail, 50, 60), name="reader") for _ in range(1000)]
            await asyncio.sleep(0)
            source.add(*[10] * 10)
            tail.wake()
        assert source.reads == [50]
        assert {task.result() for task in readers} == {b"".join(source.lines_there[50:])}


async def test_readers_behind_share_what_is_read_from_disk() -> None:
    source = Rows()
    source.add(*[1000] * 1000)
    with tail_of(source) as (tail, _):
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(read(tail, 0, 1000), name="reader")
        assert len(source.reads) == len(set(source.reads))
        assert len(source.reads) <= 1000 * 1020 // module.PIECE_BYTES + 1


async def test_a_reader_that_goes_away_does_not_take_the_read_from_the_others() -> None:
    source = Rows()
    source.add(10)
    source.may_read.clear()
    with tail_of(source) as (tail, _):
        async with asyncio.TaskGroup() as group:
            first = group.create_task(read(tail, 0, 1), name="first")
            second = group.create_task(read(tail, 0, 1), name="second")
            await asyncio.sleep(0)
            first.cancel()
            source.may_read.set()
        assert second.result() == source.lines_there[0]
        assert source.reads == [0]


async def test_an_error_reaches_every_reader_and_the_next_one_tries_again() -> None:
    class Failing(Rows):
        fails = True

        def lines(self, first: int, limit: int, max_bytes: int, cursor: Cursor) -> list[bytes]:
            if self.fails:
                raise SinkError("the disk failed")
            return super().lines(first, limit, max_bytes, cursor)

    source = Failing()
    source.add(10)
    with tail_of(source) as (tail, _):
        results = []
        for _ in range(2):
            with pytest.raises(SinkError, match="the disk failed"):
                await tail.piece(Position(0), PLAIN)
        source.fails = False
        results.append(await tail.piece(Position(0), PLAIN))
        assert results[0] is not None


async def test_a_limit_cuts_a_piece_that_others_share() -> None:
    source = Rows()
    source.add(*[10] * 10)
    with tail_of(source) as (tail, _):
        tail.readers += 1
        whole = await tail.piece(Position(0), PLAIN)
        some = await tail.piece(Position(0), PLAIN, limit=3)
        assert whole is not None
        assert some is not None
        assert (whole.rows, some.rows, some.next.seq) == (10, 3, 3)
        assert some.encoded.body == b"".join(source.lines_there[:3])


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_rows_of_a_run_are_shown_once_they_are_safe(tmp_path: Path, compression: str) -> None:
    """Contexts once they are synced, samples once they are written; nothing is held without readers."""
    streams = Streams()
    tails = RunTails(tmp_path, streams)
    section = sink(compression=compression)
    log = await asyncio.to_thread(lambda: RunLog(new_run(tmp_path), section, tails.on_rows))
    await asyncio.to_thread(log.append, [context(number) for number in range(3)])
    async with tails.reading("contexts") as contexts, tails.reading("samples") as samples:
        assert await contexts.piece(Position(0), PLAIN) is None
        news = contexts.news
        await asyncio.to_thread(log.sync)
        await news.wait()
        piece = await contexts.piece(Position(0), PLAIN)
        assert piece is not None
        assert piece.rows == 3
        await asyncio.to_thread(log.append, [context(number) for number in range(3, 20)])
        await asyncio.to_thread(log.sync)  # seals shards
        rest = await contexts.piece(piece.next, PLAIN)
        assert rest is not None
        assert rest.next.seq == 20
        assert await samples.piece(Position(0), PLAIN) is None
        await asyncio.to_thread(log.samples.append, [sample(0)])
        assert await samples.piece(Position(0), PLAIN) is not None
        assert streams.readers == 2
    await asyncio.to_thread(log.close)
    assert (streams.readers, streams.cache.bytes, streams.tails) == (0, 0, set())
    assert [await tails.rows(kind) for kind in ("contexts", "samples", "rejects")] == [20, 1, 0]
    assert [await RunTails(tmp_path, streams).rows(kind) for kind in ("contexts", "samples")] == [20, 1]
    streams.close()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_rows_can_be_read_as_soon_as_they_are_shown(tmp_path: Path, compression: str) -> None:
    """Also while shards fill faster than they are sealed."""
    source: dict[str, RunRows] = {}

    def read_last(kind: str, rows: int) -> None:
        source.setdefault(kind, RunRows(tmp_path, kind))
        assert len(source[kind].lines(max(0, rows - 1), 1)) == min(rows, 1)

    log = RunLog(new_run(tmp_path), sink(compression=compression, shard_bytes=500), read_last)
    for number in range(0, 60, 6):
        log.append([context(n) for n in range(number, number + 6)])
        log.samples.append([sample(n) for n in range(number, number + 6)])
        log.sync()
    log.close()
