"""Virtual time: an event loop whose clock jumps to the next timer instead of waiting for it.

A day of a fleet takes as long as its Python code, and runs the same way each time. What the code costs takes
no virtual time at all. It is for programs that keep to the process: real I/O is served when it is ready, but
never waited for, so a timeout would strike before an answer that is on its way over a socket.
"""

import asyncio
import math
import selectors
from asyncio import _set_running_loop  # made for event loops, says its docstring
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_RESOLUTION_S: Final = 1e-6
"""Timers this close strike together. With the loop's own 1e-9 none would ever strike once the clock is past
1e7 s, where floating point knows no smaller step."""
_TIDYING_S: Final = 3600.0
"""Virtual time for what the tasks do when they are cancelled because the limit was reached."""


class Deadlock(RuntimeError):
    """Raised when every asyncio task waits and no timer is set: nothing can ever happen again."""


class OutOfTime(RuntimeError):
    """Raised when virtual time passes its limit."""


class _Clock(selectors.DefaultSelector):
    """Reports the I/O that is ready; where the loop would wait for more, the clock jumps."""

    def __init__(self, limit_s: float) -> None:
        super().__init__()
        self.now_s = 0.0
        self._limit_s = limit_s
        self.waiting: Callable[[], str] = str
        """Says who waits."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            raise Deadlock(f"no timer is set, and all wait: {self.waiting()}")
        self.now_s += timeout
        if self.now_s > self._limit_s:
            said = f"{self._limit_s:g} s of virtual time are over, and there wait: {self.waiting()}"
            self._limit_s = self.now_s + _TIDYING_S
            raise OutOfTime(said)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own, which starts at 0.

    What is given to an executor, any executor, is called at once and in this thread, as if it took no time;
    it sees no running loop, as in a thread of its own. Other threads are not waited for: what they send by
    `call_soon_threadsafe` may find the clock far ahead, or the loop ended by Deadlock. Signal handlers work
    while something goes on; waiting for nothing but a signal is a Deadlock.

    Args:
        limit_s: Virtual seconds after which the loop gives up; periodic timers never let it end by Deadlock.

    Raises (from whatever runs the loop):
        Deadlock: Nothing is ready and no timer is set.
        OutOfTime: The limit is passed.
    """

    def __init__(self, limit_s: float = math.inf) -> None:
        self._clock = _Clock(limit_s)
        super().__init__(self._clock)
        self._clock.waiting = self._who_waits
        self._clock_resolution = _RESOLUTION_S

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._clock.now_s

    def run_in_executor(
        self,
        executor: Executor | None,  # noqa: ARG002 - whichever it is
        func: Callable[[Unpack[Ts]], T],
        *args: *Ts,
    ) -> asyncio.Future[T]:
        """Call `func` now; the future is done when it is returned."""
        future: asyncio.Future[T] = self.create_future()
        _set_running_loop(None)
        try:
            future.set_result(func(*args))
        except StopIteration as error:  # which no future can hold
            future.set_exception(RuntimeError(f"{func!r} raised StopIteration"))
            future.exception().__cause__ = error  # type: ignore[union-attr]
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets it
            future.set_exception(error)
        finally:
            _set_running_loop(self)
        return future

    def _who_waits(self) -> str:
        return ", ".join(sorted(task.get_name() for task in asyncio.all_tasks(self))) or "nobody"


def run_virtually(main: Coroutine[Any, Any, T], *, limit_s: float = math.inf) -> T:
    """Run `main` in virtual time, as asyncio.run does in real time.

    Raises:
        Deadlock: All wait for each other.
        OutOfTime: It takes longer than `limit_s` of virtual time.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit_s)) as runner:
        return runner.run(main)
