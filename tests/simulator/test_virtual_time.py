"""Virtual time: the clock jumps, and everything happens in the same order as in real time."""

import asyncio
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from streamsyn.background import background
from streamsyn.queues import BoundedQueue
from streamsyn.simulator.virtual_time import Deadlock, OutOfTime, run_virtually


def now() -> float:
    """Virtual time."""
    return asyncio.get_running_loop().time()


def test_an_hour_takes_no_time() -> None:
    """3,600 sleeps of a second pass at once, and the clock says so."""

    async def hour() -> float:
        for _ in range(3600):
            await asyncio.sleep(1)
        return now()

    began = time.monotonic()
    assert 3600 == pytest.approx(run_virtually(hour()))
    assert time.monotonic() - began < 5


def test_the_clock_starts_at_0_and_only_waiting_moves_it() -> None:
    """Running code takes no virtual time."""

    async def work() -> list[float]:
        seen = [now()]
        await asyncio.sleep(0)
        sum(range(100_000))
        seen.append(now())
        await asyncio.sleep(2.5)
        return [*seen, now()]

    assert [0, 0, 2.5] == run_virtually(work())


def test_timers_fire_in_order() -> None:
    """Shorter sleeps end first, whichever began first; none ends early."""

    async def main() -> list[tuple[float, int]]:
        woken: list[tuple[float, int]] = []

        async def sleep(seconds: int) -> None:
            await asyncio.sleep(seconds)
            woken.append((now(), seconds))

        async with asyncio.TaskGroup() as group:
            for seconds in (5, 1, 4, 2, 3, 86_400 * 3):
                group.create_task(sleep(seconds))
        return woken

    assert [(seconds, seconds) for seconds in (1, 2, 3, 4, 5, 259_200)] == run_virtually(main())


def test_timers_fire_at_very_late_times() -> None:
    """Time advances even where floating point has no small steps left."""

    async def main() -> float:
        for seconds in (1e9, 1e-7, 1e-9, 0.1):
            await asyncio.sleep(seconds)
        return now()

    assert 1e9 + 0.1 == pytest.approx(run_virtually(main()))


def test_timeouts_fire_on_time() -> None:
    """asyncio.timeout goes by the same clock."""

    async def main() -> float:
        with suppress(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.sleep(60)
        return now()

    assert 30 == run_virtually(main())


def test_executors_call_at_once_in_this_thread() -> None:
    """Any executor runs the call in this thread in no virtual time; contexts and results are as usual."""

    async def main() -> list[object]:
        loop = asyncio.get_running_loop()
        numbers = iter([1, 2])
        with ThreadPoolExecutor(1) as threads:
            read = [await loop.run_in_executor(threads, next, numbers, None) for _ in range(3)]
        here = await asyncio.to_thread(threading.get_ident) == threading.get_ident()
        return [*read, here, now(), threading.active_count()]

    before = threading.active_count()
    assert [1, 2, None, True, 0, before] == run_virtually(main())


def test_errors_in_executors_are_raised() -> None:
    """Also StopIteration, which a future cannot hold."""

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)
        empty: list[int] = []
        with pytest.raises(RuntimeError, match="StopIteration") as raised:
            await asyncio.to_thread(next, iter(empty))
        assert isinstance(raised.value.__cause__, StopIteration)

    run_virtually(main())


def test_an_executor_sees_no_loop(tmp_path: Path) -> None:
    """As in a thread, it may block and run its own loop; the outer loop is restored afterwards."""

    def call() -> str:
        with pytest.raises(RuntimeError, match="no running"):
            asyncio.get_running_loop()
        (tmp_path / "file").write_text("blocking", "utf-8")

        async def inner() -> str:
            return await asyncio.to_thread((tmp_path / "file").read_text, "utf-8")

        return run_virtually(inner())

    async def main() -> tuple[str, bool]:
        outer = asyncio.get_running_loop()
        return await asyncio.to_thread(call), asyncio.get_running_loop() is outer

    assert ("blocking", True) == run_virtually(main())


def test_a_deadlock_is_raised() -> None:
    """With nothing ready and no timer, the error names the waiting tasks, and all are cancelled."""
    cleaned_up: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up.append("waiter")

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(wait(), name="waiter")

    with pytest.raises(Deadlock, match=r"Task-\d+, waiter"):
        run_virtually(main())
    assert ["waiter"] == cleaned_up


def test_a_limit_ends_what_never_ends() -> None:
    """Periodic timers keep a loop from a deadlock; the limit ends it, and cleaning up may take time."""
    cleaned_up: list[float] = []

    async def main() -> None:
        try:
            while True:  # noqa: ASYNC110 - a periodic timer is what this is about
                await asyncio.sleep(7)
        finally:
            await asyncio.sleep(10)
            cleaned_up.append(now())

    with pytest.raises(OutOfTime, match="100 s"):
        run_virtually(main(), limit_s=100)
    assert [115] == cleaned_up


@pytest.mark.usefixtures("signals_are_caught")
def test_signals_are_seen() -> None:
    """A signal's callback is called while tasks run."""

    async def main() -> bool:
        seen = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, seen.set)
        signal.raise_signal(signal.SIGUSR1)
        await seen.wait()
        return seen.is_set()

    assert run_virtually(main())


def test_queues_and_background_tasks_run_the_same_way_twice() -> None:
    """The same program gives the same events at the same times."""

    async def main() -> list[tuple[float, int]]:
        rng = Random(1)
        queue: BoundedQueue[int] = BoundedQueue(3)
        seen: list[tuple[float, int]] = []

        async def put() -> None:
            for number in range(200):
                await asyncio.sleep(rng.expovariate(5))
                await queue.put(number)
            queue.close()

        async def take() -> None:
            async for number in queue:
                await asyncio.to_thread(seen.append, (now(), number))
                await asyncio.sleep(rng.expovariate(1))

        async with background() as tasks, asyncio.TaskGroup() as group:
            tasks.start(asyncio.Event().wait(), name="for-ever")  # type: ignore[arg-type]
            group.create_task(put())
            for _ in range(4):
                group.create_task(take())
        return seen

    assert run_virtually(main()) == run_virtually(main())
