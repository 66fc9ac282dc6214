"""Assembly as a stage: what a kill leaves unfinished is made again, and each sample is delivered once."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.assembly.assembler import Assembler
from streamsyn.assembly.sample_prompts import SamplePrompts
from streamsyn.assembly.window import Passage
from streamsyn.config.sections import AssemblySection
from streamsyn.errors import StoppedEarly
from streamsyn.pipeline.delivery import AssemblyStage, NoAssembly
from streamsyn.queues import BoundedQueue
from streamsyn.records import Context, DurableContext, Sample
from tests.builders import as_rows, context, samples_of
from tests.examples import examples

SECTION = AssemblySection(contexts_per_sample=4, window_bytes=40_000)
PROMPTS = SamplePrompts(SECTION)


class Killed(Exception):
    """Raised in place of a SIGKILL."""


class Disk:
    """A log, a state and samples that outlive the stage; it is killed after `deliveries` deliveries."""

    def __init__(self, contexts: Sequence[Context], flushes: Sequence[int] = ()) -> None:
        self.rows = as_rows(contexts)
        self.flushes = list(flushes)
        self.state: bytes | None = None
        self.samples: list[Sample] = []
        self.deliveries = 10**9
        self.read_from: list[int] = []

    def read_contexts(self, first_seq: int, end_seq: int) -> Iterator[dict[str, Any]]:
        self.read_from.append(first_seq)
        yield from self.rows[first_seq:end_seq]

    def load_state(self) -> dict[str, Any] | None:
        return None if self.state is None else orjson.loads(self.state)

    def save_state(self, state: dict[str, Any]) -> None:
        self.state = orjson.dumps(state)

    def deliver(self, samples: Sequence[Sample]) -> None:
        if self.deliveries == 0:
            raise Killed
        self.deliveries -= 1
        self.samples += samples

    def stop(self) -> None:
        pass

    def stage(self, logged: int) -> AssemblyStage:
        return AssemblyStage(
            lambda: Assembler(SECTION, 0, PROMPTS),
            self,
            self,
            logged=logged,
            delivered=len(self.samples),
            flushes=self.flushes,
        )


def contexts_of(count: int) -> list[Context]:
    return [
        context(n, task="qa" if n % 3 else "sum", context=f"[{n}] " + "x" * (n % 7) * 300)
        for n in range(count)
    ]


def expected_samples(contexts: Sequence[Context], flushes: Sequence[int]) -> list[Sample]:
    """The samples that an undisturbed assembler makes of the whole log."""
    assembler = Assembler(SECTION, 0, PROMPTS)
    made = []
    for seq, one in enumerate(contexts):
        if seq in flushes:
            made += samples_of(assembler.flush())
        made += samples_of(assembler.add(Passage.of_context(seq, one)))
    return made + samples_of(assembler.flush())


async def run(stage: AssemblyStage, contexts: Sequence[DurableContext]) -> None:
    """Run a stage on contexts that are new to the log."""
    queue: BoundedQueue[DurableContext] = BoundedQueue(max(1, len(contexts)))
    for one in contexts:
        await queue.put(one)
    queue.close()
    async with asyncio.timeout(10):
        await stage.run(queue)


async def run_and_finish(disk: Disk, contexts: Sequence[Context], logged: int) -> None:
    stage = disk.stage(logged)
    await run(stage, list(enumerate(contexts))[logged:])
    await asyncio.to_thread(stage.finish)


@examples(60)
@given(
    count=st.integers(0, 60),
    kills=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12), st.booleans()), max_size=4),
    flushes=st.lists(st.integers(0, 60), max_size=2),
)
async def test_a_kill_anywhere_neither_loses_nor_repeats_a_sample(
    count: int, kills: list[tuple[int, int, bool]], flushes: list[int]
) -> None:
    """Whatever the log held, after any delivery, with or without a saved state: each sample once."""
    contexts = contexts_of(count)
    disk = Disk(contexts, flushes)
    logged = 0
    for grown, deliveries, save in kills:
        before, logged = logged, min(count, logged + grown)
        stage, disk.deliveries = disk.stage(before), deliveries
        try:
            await run(stage, list(enumerate(contexts))[before:logged])
            if save:
                await asyncio.to_thread(stage.save)
        except Killed:
            pass
    disk.deliveries = 10**9
    await run_and_finish(disk, contexts, logged)

    assert expected_samples(contexts, flushes) == disk.samples


async def test_a_resume_reads_the_log_from_the_window_on() -> None:
    """A saved state means that the log is not read from its start."""
    contexts = contexts_of(200)
    disk = Disk(contexts)
    stage = disk.stage(0)
    await run(stage, list(enumerate(contexts))[:150])
    await asyncio.to_thread(stage.save)
    await run_and_finish(disk, contexts, 160)
    window_start, caught_up_from = disk.read_from[1:]

    assert expected_samples(contexts, []) == disk.samples
    assert 100 < window_start < 150
    assert 150 == caught_up_from


@pytest.mark.parametrize("lost", ["contexts", "samples"])
async def test_a_state_ahead_of_the_log_is_not_used(lost: str) -> None:
    """If the log has lost its end, samples are made from its start, and none is delivered twice."""
    contexts = contexts_of(40)
    disk = Disk(contexts)
    await run_and_finish(disk, contexts, 0)
    if lost == "contexts":
        del disk.rows[30:]
        contexts = contexts[:30]
        expected = expected_samples(contexts, [])[:20]
        del disk.samples[20:]
    else:
        expected = disk.samples[:]
        del disk.samples[-5:]
    before = len(disk.samples)
    await run_and_finish(disk, contexts, len(contexts))

    assert expected[:before] == disk.samples[:before]
    assert expected_samples(contexts, []) == disk.samples


async def test_a_resumed_stream_keeps_the_samples_of_its_flush() -> None:
    """A finished run that gets more seeds makes the samples of a log with a flush in it."""
    contexts = contexts_of(30)
    disk = Disk(contexts)
    await run_and_finish(disk, contexts[:5], 0)
    disk.flushes.append(5)
    await run_and_finish(disk, contexts, 5)

    assert expected_samples(contexts, [5]) == disk.samples
    assert expected_samples(contexts, []) != disk.samples


class SlowReader(Disk):
    """Its second `deliver` waits until it is stopped."""

    def __init__(self, contexts: Sequence[Context]) -> None:
        super().__init__(contexts)
        self.waiting = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._stopped = threading.Event()

    def deliver(self, samples: Sequence[Sample]) -> None:
        if self.samples:
            self._loop.call_soon_threadsafe(self.waiting.set)
            assert self._stopped.wait(10)
            raise StoppedEarly("stopped")
        super().deliver(samples)

    def stop(self) -> None:
        self._stopped.set()


async def test_stop_ends_a_delivery_that_waits() -> None:
    """A stuck reader does not keep a run from ending; a later run delivers the rest."""
    contexts = contexts_of(150)
    slow = SlowReader(contexts)
    stage = slow.stage(0)

    async def stop_while_it_waits() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(run(stage, list(enumerate(contexts))))
            await slow.waiting.wait()
            stage.stop()

    with pytest.raises(ExceptionGroup) as raised:
        await stop_while_it_waits()
    later = Disk(contexts)
    later.samples = slow.samples
    await run_and_finish(later, contexts, 150)

    assert [StoppedEarly] == [type(error) for error in raised.value.exceptions]
    assert expected_samples(contexts, []) == later.samples


@pytest.mark.parametrize("logged", [0, 30])
async def test_after_stop_a_later_run_makes_the_rest(logged: int) -> None:
    """The queue is still consumed, but no sample is made, not even with too few contexts."""
    contexts = contexts_of(30)
    disk = Disk(contexts)
    stopped = disk.stage(logged)
    stopped.stop()
    await run(stopped, list(enumerate(contexts))[logged:])
    with pytest.raises(StoppedEarly, match="stopped before every sample was made"):
        await asyncio.to_thread(stopped.finish)
    made = disk.samples[:]
    await run_and_finish(disk, contexts, 30)

    assert [] == made
    assert expected_samples(contexts, []) == disk.samples


async def test_without_assembly_the_queue_is_consumed() -> None:
    """With `assembly.write = false` nothing else happens."""
    queue: BoundedQueue[DurableContext] = BoundedQueue(3)
    for one in enumerate(contexts_of(3)):
        await queue.put(one)
    queue.close()
    nothing = NoAssembly()
    await nothing.run(queue)
    nothing.stop()
    nothing.save()
    nothing.finish()

    assert 0 == len(queue)


def test_many_samples_due_at_once_are_delivered_a_little_at_a_time() -> None:
    """Many samples may be due at the end of a stream; they are rendered and recorded in small batches."""
    section = AssemblySection(contexts_per_sample=1000, window_bytes=10**9)
    disk = Disk([context(n, context=f"[{n}] " + "x" * 100_000) for n in range(40)])
    sizes: list[int] = []

    class Outlet:
        def deliver(self, samples: Sequence[Sample]) -> None:
            sizes.append(sum(len(sample.messages[0]["content"]) for sample in samples))

        def stop(self) -> None:
            pass

    stage = AssemblyStage(
        lambda: Assembler(section, 0, SamplePrompts(section)),
        disk,
        Outlet(),
        logged=40,
        delivered=0,
        flushes=(),
    )
    asyncio.run(run(stage, []))
    stage.finish()

    assert len(sizes) == 40
    assert max(sizes) < 6_000_000
