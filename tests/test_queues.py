"""The queue between two stages loses and duplicates nothing, stays bounded, and leaves no task waiting."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import StoppedEarly
from streamsyn.queues import Backlog, BoundedQueue
from tests.examples import examples

STEPS = st.sampled_from(["put", "get"]) | st.sampled_from(
    ["cancel_writer", "cancel_reader", "step", "settle", "get_nowait", "discard"]
)


async def settle() -> None:
    """Let every asyncio task run until it waits or is done."""
    for _ in range(60):
        await asyncio.sleep(0)


class Traffic:
    """Writers and readers of one queue, and the items that were put and taken, in order."""

    def __init__(self, maxsize: int, stages: asyncio.TaskGroup) -> None:
        self.queue: BoundedQueue[int] = BoundedQueue(maxsize)
        self.accepted: list[int] = []
        self.taken: list[int] = []
        self.writers: list[asyncio.Task[None]] = []
        self.readers: list[asyncio.Task[None]] = []
        self._stages = stages

    async def step(self, name: str, number: int) -> None:
        """Do one step; `number` chooses the task to cancel, or how many items to take."""
        match name:
            case "put":
                self.writers.append(self._stages.create_task(self._put(len(self.writers))))
            case "get":
                self.readers.append(self._stages.create_task(self._get()))
            case "cancel_writer" if self.writers:
                self.writers[number % len(self.writers)].cancel()
            case "cancel_reader" if self.readers:
                self.readers[number % len(self.readers)].cancel()
            case "get_nowait":
                self.taken += self.queue.get_nowait(number % 3)
            case "discard":
                at = len(self.taken)
                self.taken += self.accepted[at : at + self.queue.discard()]
            case "step":
                await asyncio.sleep(0)
            case "settle":
                await settle()
                self.check_waiting()

    def check_waiting(self) -> None:
        """Assert that readers wait only if the queue is empty, and writers only if it is full."""
        if any(not reader.done() for reader in self.readers):
            assert len(self.queue) == 0
        if any(not writer.done() for writer in self.writers):
            assert len(self.queue) == self.queue.maxsize

    async def _put(self, item: int) -> None:
        try:
            await self.queue.put(item)
        except RuntimeError:
            assert self.queue.closed
        else:
            self.accepted.append(item)

    async def _get(self) -> None:
        async for item in self.queue:
            self.taken.append(item)
            return


@examples(300)
@given(
    maxsize=st.integers(1, 3),
    steps=st.lists(st.tuples(STEPS, st.integers(0, 50)), max_size=50),
    close_at=st.integers(0, 60),
)
async def test_nothing_is_lost_or_duplicated(
    maxsize: int, steps: list[tuple[str, int]], close_at: int
) -> None:
    """Whichever task is cancelled at any time, each item put comes out once, in order, and no task hangs."""
    async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
        traffic = Traffic(maxsize, stages)
        for index, (name, number) in enumerate(steps):
            if index == close_at:
                traffic.queue.close()
            await traffic.step(name, number)
            assert len(traffic.queue) <= maxsize
        traffic.queue.close()
    rest = [item async for item in traffic.queue]

    assert traffic.accepted == traffic.taken + rest


async def test_items_come_out_in_order() -> None:
    """Readers get the items in the order of the puts, then the end."""
    queue: BoundedQueue[int] = BoundedQueue(2)

    async def put_all() -> None:
        for number in range(100):
            await queue.put(number)

    async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
        stages.create_task(put_all()).add_done_callback(lambda _: queue.close())
        items = [item async for item in queue]

    assert list(range(100)) == items


async def test_a_full_queue_makes_the_writer_wait() -> None:
    """A put beyond `maxsize` waits until an item is taken."""
    queue: BoundedQueue[str] = BoundedQueue(1)
    await queue.put("first")

    async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
        writing = stages.create_task(queue.put("second"))
        await settle()
        waited = not writing.done()
        first = await anext(queue)
    second = await anext(queue)

    assert (True, "first", "second") == (waited, first, second)


@pytest.mark.parametrize("maxsize", [0, -1])
def test_maxsize_below_one_is_refused(maxsize: int) -> None:
    """A queue must have room for at least one item."""
    with pytest.raises(ValueError, match="at least 1"):
        BoundedQueue(maxsize)


async def test_close_wakes_every_reader() -> None:
    """All readers that wait on an empty queue see its end."""
    queue: BoundedQueue[int] = BoundedQueue(1)

    async def read() -> list[int]:
        return [item async for item in queue]

    async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
        readers = [stages.create_task(read()) for _ in range(5)]
        await settle()
        queue.close()

    assert [[]] * 5 == [reader.result() for reader in readers]


async def test_close_wakes_every_writer() -> None:
    """`put` raises RuntimeError in all waiting writers, and their items are not added."""
    queue: BoundedQueue[int] = BoundedQueue(1)
    await queue.put(0)

    async def write(item: int) -> str:
        with pytest.raises(RuntimeError) as raised:
            await queue.put(item)
        return str(raised.value)

    async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
        writers = [stages.create_task(write(item)) for item in range(1, 6)]
        await settle()
        queue.close()

    assert ["put on a closed queue"] * 5 == [writer.result() for writer in writers]
    assert [0] == [item async for item in queue]


async def test_readers_get_the_remaining_items_after_close() -> None:
    """A closed queue refuses new items and returns the remaining ones; it can be closed twice."""
    queue: BoundedQueue[int] = BoundedQueue(3)
    await queue.put(1)
    await queue.put(2)

    queue.close()
    queue.close()
    with pytest.raises(RuntimeError, match="put on a closed queue"):
        await queue.put(3)

    assert queue.closed
    assert [1, 2] == [item async for item in queue]


@pytest.mark.parametrize(
    "free",
    [
        pytest.param(lambda queue: queue.discard(), id="discard"),
        pytest.param(lambda queue: len(queue.get_nowait(3)), id="get_nowait"),
    ],
)
async def test_taking_n_items_wakes_n_writers(free: Callable[[BoundedQueue[int]], int]) -> None:
    """Discarding or taking all items wakes every waiting writer."""
    queue: BoundedQueue[int] = BoundedQueue(3)
    for item in range(3):
        await queue.put(item)

    async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
        for item in range(3, 6):
            stages.create_task(queue.put(item))
        await settle()
        freed = free(queue)

    assert 3 == freed
    assert [3, 4, 5] == queue.get_nowait(10)


async def test_get_nowait_takes_at_most_the_limit() -> None:
    """`get_nowait` returns at most `limit` items, and none from an empty queue."""
    queue: BoundedQueue[int] = BoundedQueue(3)
    for item in range(3):
        await queue.put(item)

    assert [[0, 1], [2], []] == [queue.get_nowait(2) for _ in range(3)]


async def test_a_stage_cancelled_before_its_first_step_closes_the_queue() -> None:
    """`close` as a done-callback works where a `finally` in the stage would not run."""
    queue: BoundedQueue[int] = BoundedQueue(1)

    async def produce() -> None:
        try:
            await queue.put(1)
        finally:
            queue.close()

    async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
        producing = stages.create_task(produce())
        producing.add_done_callback(lambda _: queue.close())
        producing.cancel()
        items = [item async for item in queue]

    assert [] == items


async def test_a_bug_in_a_reader_does_not_leave_writers_hanging() -> None:
    """A task group can cancel the writers of a full queue and end."""
    queue: BoundedQueue[int] = BoundedQueue(1)

    async def produce() -> None:
        for number in range(10):
            await queue.put(number)

    async def consume() -> None:
        raise KeyError(await anext(queue))

    async def both() -> None:
        async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
            stages.create_task(produce()).add_done_callback(lambda _: queue.close())
            stages.create_task(consume())

    with pytest.raises(ExceptionGroup) as raised:
        await both()

    assert [KeyError] == [type(error) for error in raised.value.exceptions]
    assert queue.closed


async def test_a_reader_cancelled_after_its_wake_up_wakes_the_next() -> None:
    """The item that woke a cancelled reader goes to the next reader."""
    queue: BoundedQueue[str] = BoundedQueue(1)

    async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
        first = stages.create_task(anext(queue))
        second = stages.create_task(anext(queue))
        await settle()
        await queue.put("item")  # wakes the first one, which has not run yet
        first.cancel()

    assert first.cancelled()
    assert "item" == second.result()


async def test_a_reader_cancelled_before_the_put_is_skipped() -> None:
    """A put skips a cancelled reader that has not run since."""
    queue: BoundedQueue[str] = BoundedQueue(1)

    async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
        first = stages.create_task(anext(queue))
        second = stages.create_task(anext(queue))
        await settle()
        first.cancel()
        await queue.put("item")

    assert first.cancelled()
    assert "item" == second.result()


async def test_cancelled_readers_are_removed_from_the_queue() -> None:
    """Cancelled readers, as after timeouts, do not accumulate in the queue."""
    queue: BoundedQueue[str] = BoundedQueue(1)

    async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
        readers = [stages.create_task(anext(queue)) for _ in range(10)]
        await settle()
        for reader in readers:
            reader.cancel()

    assert 0 == len(queue._readers)


async def test_a_writer_cancelled_after_its_wake_up_wakes_the_next() -> None:
    """The free place that woke a cancelled writer goes to the next writer."""
    queue: BoundedQueue[str] = BoundedQueue(1)
    await queue.put("there")

    async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
        first = stages.create_task(queue.put("first"))
        stages.create_task(queue.put("second"))
        await settle()
        taken = queue.get_nowait(1)  # wakes the first writer, which has not run yet
        first.cancel()

    assert ["there"] == taken
    assert ["second"] == queue.get_nowait(1)


async def test_repr_shows_how_full_it_is() -> None:
    """`repr` shows the number of items, the maximum and the state."""
    queue: BoundedQueue[int] = BoundedQueue(2)
    await queue.put(1)
    is_open = repr(queue)
    queue.close()

    assert "<BoundedQueue 1/2 open>" == is_open
    assert "<BoundedQueue 1/2 closed>" == repr(queue)


async def test_a_full_backlog_takes_items_and_leaves_no_room() -> None:
    """A put never waits. Whoever begins something new waits until fewer than `maxsize` items are not done."""
    backlog: Backlog[int] = Backlog(2)
    await backlog.room()
    for number in range(3):
        backlog.put(number)

    async with asyncio.timeout(5), asyncio.TaskGroup() as stages:
        beginning = stages.create_task(backlog.room())
        assert [0, 1, 2] == backlog.get_nowait(5)  # taken is not done
        backlog.done()
        await settle()
        waited = not beginning.done()
        backlog.done()

    assert (True, 1) == (waited, backlog.not_done)


async def test_a_draining_backlog_lets_nothing_begin_when_it_is_full() -> None:
    """Who waits for room is told that the run drains, now and later; items still go through."""
    backlog: Backlog[int] = Backlog(1)
    backlog.put(0)
    async with asyncio.timeout(5):
        beginning = asyncio.create_task(backlog.room())
        await settle()
        backlog.drain()
        with pytest.raises(StoppedEarly):
            await beginning
        backlog.put(1)
        with pytest.raises(StoppedEarly):
            await backlog.room()
        backlog.close()

        assert [0, 1] == [item async for item in backlog]
