"""The sink as a stage: nothing is handed on before it is on disk, nothing waits longer than it must."""

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from streamsyn.config.sections import SinkSection
from streamsyn.errors import SinkError, root_cause
from streamsyn.queues import Backlog, BoundedQueue
from streamsyn.records import Context, DurableContext, Outcome
from streamsyn.sink.log import RunLog
from streamsyn.sink.writer import OutcomeWriter
from streamsyn.telemetry import Counters
from tests.builders import as_rows, context, disk_full_beyond, new_run, outcome, rows, sink

NEVER_S = 3600.0


class WatchedLog(RunLog):
    """Notes how many outcomes are on disk, and tells of each sync."""

    def __init__(self, root: Path, section: SinkSection, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(new_run(root), section)
        self.durable = 0
        self.syncs = 0
        self.syncing = False
        self.gate: threading.Event | None = None
        """A sync waits for it, as for a slow disk."""
        self.append_gate: threading.Event | None = None
        """A write waits for it before it returns."""
        self.appended = threading.Event()
        self._loop = loop
        self.changed = asyncio.Event()

    def append(self, outcomes: list[Outcome]) -> list[tuple[int, Outcome]]:  # type: ignore[override]
        written = super().append(outcomes)
        self.appended.set()
        self._loop.call_soon_threadsafe(self.changed.set)
        if self.append_gate is not None:
            assert self.append_gate.wait(20)
        return written

    def sync(self) -> None:
        syncing, self.syncing = self.outcomes, True
        self._loop.call_soon_threadsafe(self.changed.set)
        if self.gate is not None:
            assert self.gate.wait(20)
        super().sync()
        self.durable, self.syncing = syncing, False
        self.syncs += 1
        self._loop.call_soon_threadsafe(self.changed.set)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of the log."""
        while not holds():
            self.changed.clear()
            await self.changed.wait()


class Stage:
    """A writer between its queues, with a log of its own."""

    def __init__(self, root: Path, *, durable: int = 10_000, results: int = 1, **section: object) -> None:
        self.section = sink(**{"sync_interval_s": NEVER_S, "shard_bytes": 10**6, **section})
        self.log: WatchedLog
        self._root = root
        self.counters = Counters()
        self.results: Backlog[Outcome] = Backlog(results)
        self.durable: BoundedQueue[DurableContext] = BoundedQueue(durable)

    async def run(self, play: Callable[[], Awaitable[None]]) -> None:
        """Run the writer while `play` uses its queues; the results end when it does."""
        loop = asyncio.get_running_loop()
        self.log = await asyncio.to_thread(WatchedLog, self._root, self.section, loop)
        writer = OutcomeWriter(self.log, self.section, self.counters)
        try:
            async with asyncio.timeout(20), asyncio.TaskGroup() as group:
                writing = group.create_task(writer.run(self.results, self.durable))
                writing.add_done_callback(lambda _: self.durable.close())
                await play()
                self.results.close()
        finally:
            await asyncio.to_thread(self.log.close)


async def test_the_end_flushes_everything(tmp_path: Path) -> None:
    """When the results end, all are synced and counted, and contexts are passed on in log order."""
    stage = Stage(tmp_path)
    given = [outcome(number) for number in range(50)]

    async def play() -> None:
        for one in given:
            stage.results.put(one)

    await stage.run(play)
    contexts = [one for one in given if isinstance(one, Context)]

    assert list(enumerate(contexts)) == [one async for one in stage.durable]
    assert as_rows(contexts) == await asyncio.to_thread(rows, tmp_path, "contexts")
    assert (len(contexts), 12) == (stage.counters.contexts, stage.counters.rejects.total())
    assert 50 == stage.log.durable


async def test_no_results_end_at_once(tmp_path: Path) -> None:
    """A run that has nothing to write ends."""
    stage = Stage(tmp_path)

    async def play() -> None:
        pass

    await stage.run(play)
    assert [] == [one async for one in stage.durable]


async def test_a_context_is_passed_on_only_after_a_sync(tmp_path: Path) -> None:
    """Every context that reaches assembly is on disk."""
    stage = Stage(tmp_path, sync_rows=3, durable=1, results=100)
    on_disk = []

    async def play() -> None:
        for number in range(40):
            stage.results.put(context(number))
        stage.results.close()
        async for seq, _ in stage.durable:
            on_disk.append(seq < stage.log.durable)

    await stage.run(play)
    assert [True] * 40 == on_disk


async def test_nothing_is_passed_on_before_a_sync(tmp_path: Path) -> None:
    """Fewer rows than `sync_rows` wait for `sync_interval_s`, here for the end."""
    stage = Stage(tmp_path, sync_rows=4)
    before_the_end = []

    async def play() -> None:
        for number in range(3):
            stage.results.put(context(number))
            await stage.log.until(lambda: stage.log.outcomes > number)  # noqa: B023 - awaited at once
        before_the_end.append((stage.log.syncs, len(stage.durable)))

    await stage.run(play)
    assert [(0, 0)] == before_the_end
    assert 3 == len(stage.durable)


@pytest.mark.parametrize("sync_rows", [1, 2, 3, 10])
async def test_sync_rows_are_synced_at_once(tmp_path: Path, sync_rows: int) -> None:
    """`sync_rows` unsynced rows never wait for the interval, however they arrive."""
    stage = Stage(tmp_path, sync_rows=sync_rows)

    async def play() -> None:
        for number in range(4 * sync_rows):
            stage.results.put(context(number))
            if number % sync_rows == sync_rows - 1:
                await stage.log.until(lambda: stage.log.durable == number + 1)  # noqa: B023 - awaited at once
        for number in range(4 * sync_rows, 8 * sync_rows):  # with no wait between them
            stage.results.put(context(number))
        await stage.log.until(lambda: stage.log.durable == 8 * sync_rows)

    await stage.run(play)
    assert 8 * sync_rows == len(stage.durable)


async def test_rows_are_synced_after_the_interval(tmp_path: Path) -> None:
    """One row alone is on disk when `sync_interval_s` is over, without more rows or the end."""
    stage = Stage(tmp_path, sync_interval_s=0.01)

    async def play() -> None:
        for number in range(3):
            stage.results.put(context(number))
            assert number == (await anext(stage.durable))[0]

    await stage.run(play)
    assert 3 == stage.log.durable


async def test_a_slow_assembly_leaves_no_room_to_begin_more(tmp_path: Path) -> None:
    """When nobody takes contexts, memory is bounded: who looks for room waits. All that is put is written."""
    stage = Stage(tmp_path, durable=1, results=5, sync_rows=4)
    put = []

    async def feed() -> None:
        for number in range(100):
            await stage.results.room()
            stage.results.put(context(number))
            put.append(number)

    async def play() -> None:
        async with asyncio.TaskGroup() as group:
            feeding = group.create_task(feed())
            await stage.log.until(lambda: stage.log.outcomes == 6)  # 5 in the backlog, and one passed on
            for _ in range(500):
                await asyncio.sleep(0)
            assert 6 == len(put)
            assert not feeding.done()
            seqs = [(await anext(stage.durable))[0] for _ in range(100)]
        assert list(range(100)) == seqs

    await stage.run(play)


async def test_a_slow_sync_does_not_delay_a_write(tmp_path: Path) -> None:
    """While one sync runs, what is answered is written, a full shard included; room ends at the bound."""
    stage = Stage(tmp_path, sync_rows=2, shard_bytes=1500, results=20)
    synced = threading.Event()

    async def play() -> None:
        stage.log.gate = synced
        stage.results.put(context(0))
        stage.results.put(context(1))
        await stage.log.until(lambda: stage.log.syncing)
        for number in range(2, 20):
            await stage.results.room()
            stage.results.put(context(number))
        await stage.log.until(lambda: stage.log.outcomes == 20)
        assert 0 == stage.log.durable
        assert len(await asyncio.to_thread(rows, stage.log.root, "contexts")) == 20
        waiting = asyncio.create_task(stage.results.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        synced.set()
        await waiting

    await stage.run(play)
    assert 20 == stage.log.durable
    assert list(range(20)) == [seq async for seq, _ in stage.durable]


async def test_a_busy_event_loop_does_not_delay_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outcome is written while the event loop has other things to do, so that a kill does not lose it."""
    monkeypatch.setattr("streamsyn.sink.writer._GATHER_S", 0.0)
    stage = Stage(tmp_path, results=3)

    async def play() -> None:
        stage.results.put(context(0))
        await stage.log.until(lambda: stage.log.outcomes == 1)
        stage.log.appended.clear()
        stage.results.put(context(1))
        assert stage.log.appended.wait(20)  # blocks the event loop

    await stage.run(play)
    assert 2 == stage.log.durable


async def test_an_outcome_put_during_a_write_is_written_by_a_busy_event_loop_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is put while the thread writes is written after it, without the event loop."""
    monkeypatch.setattr("streamsyn.sink.writer._GATHER_S", 0.0)
    stage = Stage(tmp_path, results=3)
    written = threading.Event()

    async def play() -> None:
        stage.log.append_gate = written
        stage.results.put(context(0))
        await stage.log.until(lambda: stage.log.outcomes == 1)
        stage.log.appended.clear()
        stage.results.put(context(1))
        written.set()
        assert stage.log.appended.wait(20)  # blocks the event loop

    await stage.run(play)
    assert 2 == stage.log.durable


async def test_a_slow_assembly_does_not_delay_the_sync(tmp_path: Path) -> None:
    """What has been written is on disk after `sync_interval_s`, though nobody takes contexts."""
    stage = Stage(tmp_path, durable=1, sync_interval_s=0.01)

    async def play() -> None:
        for number in range(20):
            stage.results.put(context(number))
            await stage.log.until(lambda: stage.log.durable == number + 1)  # noqa: B023 - awaited at once
        assert 1 == len(stage.durable)
        assert list(range(20)) == [(await anext(stage.durable))[0] for _ in range(20)]

    await stage.run(play)


async def test_a_full_disk_comes_out(tmp_path: Path) -> None:
    """The stage ends with the SinkError; what it wrote before can be resumed."""
    stage = Stage(tmp_path, sync_rows=2)

    async def play() -> None:
        with disk_full_beyond(5000):
            for number in range(100):
                stage.results.put(context(number))
            await stage.log.until(lambda: stage.log.outcomes == 100)  # it never is

    with pytest.raises(ExceptionGroup) as raised:
        await stage.run(play)
    cause = root_cause(raised.value)
    handed_on = [one async for one in stage.durable]
    again = await asyncio.to_thread(RunLog, tmp_path, stage.section)
    kept = again.contexts.rows
    await asyncio.to_thread(again.close)

    assert isinstance(cause, SinkError)
    assert re.fullmatch(
        "cannot write contexts to .*: File too large; what is on disk stays valid: .*", str(cause)
    )
    assert len(handed_on) <= kept < 100


async def test_a_thread_that_is_stuck_does_not_keep_outcomes_from_the_disk(tmp_path: Path) -> None:
    """The sink has a thread of its own: that of assembly may wait for a slow reader."""
    stage, released = Stage(tmp_path, sync_interval_s=0.01), threading.Event()
    others = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(others)

    async def play() -> None:
        stuck = asyncio.create_task(asyncio.to_thread(released.wait, 20))
        try:
            stage.results.put(outcome(0))
            async with asyncio.timeout(5):
                await stage.log.until(lambda: stage.log.durable == 1)
        finally:
            released.set()
            await stuck

    await stage.run(play)
