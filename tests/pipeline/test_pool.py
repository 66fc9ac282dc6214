"""The pool of workers: it grows with the fleet, and reports when work runs out."""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar

import pytest

from streamsyn.pipeline.workers import Results, Worker, WorkerPool
from streamsyn.queues import Backlog, BoundedQueue
from streamsyn.records import BadSeed, RejectReason, Work


class Idle(Worker):
    """Takes one item and holds it until it is let go."""

    gate: asyncio.Event
    at_work = 0

    def __init__(self) -> None:
        """Needs nothing."""

    async def run(self, work: BoundedQueue[Work], results: Results, goes_on: Callable[[], bool]) -> bool:
        """Count those at work."""
        async for _ in work:
            Idle.at_work += 1
            await self.gate.wait()
            goes_on()
        return True


class Paced(Worker):
    """Works on an item until there is a turn."""

    turns: asyncio.Semaphore
    at_work = 0

    def __init__(self) -> None:
        """Needs nothing."""

    async def run(self, work: BoundedQueue[Work], results: Results, goes_on: Callable[[], bool]) -> bool:
        """Count those at work."""
        async for _ in work:
            Paced.at_work += 1
            await self.turns.acquire()
            Paced.at_work -= 1
            if not goes_on():
                return False
        return True


async def queue_of(number: int) -> BoundedQueue[Work]:
    """So many items, and then no more."""
    work = BoundedQueue[Work](number + 1)
    for index in range(number):
        await work.put(BadSeed(f"f:{index}", RejectReason.NOT_A_SEED, "", b"%16d" % index))
    work.close()
    return work


async def settle() -> None:
    """Let every asyncio task run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def gate() -> asyncio.Event:
    """Holds workers back."""
    Idle.gate, Idle.at_work = asyncio.Event(), 0
    return Idle.gate


async def test_it_grows_while_there_is_work(gate: asyncio.Event) -> None:
    """Up to the present size; when the size shrinks, the workers stay."""
    size, left = [2], []
    pool = WorkerPool(Idle, lambda: size[0], 3, on_idle=lambda at_work, of: left.append((at_work, of)))
    async with asyncio.TaskGroup() as group:
        group.create_task(pool.run(await queue_of(10), Backlog(1)))
        await settle()
        assert 2 == Idle.at_work
        size[0] = 6
        pool.grow()
        await settle()
        assert 6 == Idle.at_work
        size[0] = 1
        pool.grow()
        await settle()
        assert 6 == Idle.at_work
        gate.set()
    assert [(number, 6) for number in (5, 4, 3, 2, 1, 0)] == left


async def test_it_does_not_grow_without_work(gate: asyncio.Event) -> None:
    """Nor after the pool has ended."""
    size = [2]
    pool = WorkerPool(Idle, lambda: size[0], 3)
    gate.set()
    await pool.run(await queue_of(1), Backlog(1))
    size[0] = 9
    pool.grow()
    await settle()
    assert 1 == Idle.at_work


async def test_a_pool_that_shares_its_servers_shrinks() -> None:
    """Workers end after their item while there are clearly too many, and come back; all items are taken."""
    size, Paced.turns = [8], asyncio.Semaphore(0)
    pool = WorkerPool(Paced, lambda: size[0], 3, shrinks=True)
    work = await queue_of(40)

    async def at_work_after(turns: int) -> int:
        for _ in range(turns):
            Paced.turns.release()
        await settle()
        return Paced.at_work

    async with asyncio.TaskGroup() as group:
        group.create_task(pool.run(work, Backlog(1)))
        assert 8 == await at_work_after(0)
        size[0] = 4
        assert 5 == await at_work_after(4)  # a quarter more than wanted may stay
        size[0] = 6
        pool.grow()
        assert 6 == await at_work_after(6)
        await at_work_after(40)
    assert 0 == Paced.at_work == len(work)


async def test_workers_belong_to_their_run_whoever_has_room_for_them() -> None:
    """All runs at shared servers are told of room: a worker has the context variables of its own run."""
    run: ContextVar[str] = ContextVar("run", default="none")
    seen: list[str] = []

    class Noting(Worker):
        def __init__(self) -> None:
            """Needs nothing."""

        async def run(self, work: BoundedQueue[Work], results: Results, goes_on: Callable[[], bool]) -> bool:
            seen.append(run.get())
            async for _ in work:
                goes_on()
            return True

    size = [1]
    pool, work = WorkerPool(Noting, lambda: size[0], 3), BoundedQueue[Work](1)

    async def own() -> None:
        run.set("own")
        await pool.run(work, Backlog(1))

    async with asyncio.TaskGroup() as group:
        group.create_task(own())
        await settle()
        size[0] = 2
        run.set("other")
        pool.grow()
        await settle()
        work.close()
    assert ["own", "own"] == seen
