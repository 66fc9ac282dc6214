"""Virtual time: an event loop whose clock jumps to the next timer instead of waiting for it.

A day of a fleet takes as long as its Python code, and runs the same way each time. Running code takes no
virtual time. Use it for programs without real I/O: the loop serves I/O that is ready, but never waits for it,
so a timeout fires before an answer arrives over a socket.
"""

import asyncio
import math
import selectors
from asyncio import _set_running_loop  # meant for event loops, by its docstring
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_RESOLUTION_S: Final = 1e-6
"""Timers this close fire together. With the loop's own 1e-9 none would fire after 1e7 s, where floating point
has no step that small."""
_CLEANUP_S: Final = 3600.0
"""Virtual time for the cleanup of tasks that are cancelled at the limit."""


class Deadlock(RuntimeError):
    """Raised when every asyncio task waits and no timer is set."""


class OutOfTime(RuntimeError):
    """Raised when virtual time passes its limit."""


class _Clock(selectors.DefaultSelector):
    """Returns the I/O that is ready; instead of waiting for more, the clock jumps."""

    def __init__(self, limit_s: float) -> None:
        super().__init__()
        self.now_s = 0.0
        self._limit_s = limit_s
        self.waiting: Callable[[], str] = str
        """Returns the names of the waiting tasks."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            raise Deadlock(f"no timer is set, and all tasks wait: {self.waiting()}")
        self.now_s += timeout
        if self.now_s > self._limit_s:
            message = f"{self._limit_s:g} s of virtual time have passed; waiting tasks: {self.waiting()}"
            self._limit_s = self.now_s + _CLEANUP_S
            raise OutOfTime(message)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with its own clock, which starts at 0.

    Calls in an executor, whichever it is, run at once in this thread and take no virtual time; they see no
    running loop, as in a thread of their own. The loop does not wait for other threads: their
    `call_soon_threadsafe` may come when the clock is far ahead, or after a Deadlock. Signal handlers work,
    but waiting only for a signal is a Deadlock.

    Args:
        limit_s: Virtual seconds after which the loop gives up; periodic timers prevent a Deadlock.

    Raises (from whatever runs the loop):
        Deadlock: Nothing is ready and no timer is set.
        OutOfTime: The limit has passed.
    """

    def __init__(self, limit_s: float = math.inf) -> None:
        self._clock = _Clock(limit_s)
        super().__init__(self._clock)
        self._clock.waiting = self._waiting_tasks
        self._clock_resolution = _RESOLUTION_S

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._clock.now_s

    def run_in_executor(
        self,
        executor: Executor | None,  # noqa: ARG002 - any executor
        func: Callable[[Unpack[Ts]], T],
        *args: *Ts,
    ) -> asyncio.Future[T]:
        """Call `func` now, and return a future that is done."""
        future: asyncio.Future[T] = self.create_future()
        _set_running_loop(None)
        try:
            future.set_result(func(*args))
        except StopIteration as error:  # a future cannot hold it
            future.set_exception(RuntimeError(f"{func!r} raised StopIteration"))
            future.exception().__cause__ = error  # type: ignore[union-attr]
        except Exception as error:  # noqa: BLE001 - the caller gets it
            future.set_exception(error)
        finally:
            _set_running_loop(self)
        return future

    def _waiting_tasks(self) -> str:
        return ", ".join(sorted(task.get_name() for task in asyncio.all_tasks(self))) or "none"


def run_virtually(main: Coroutine[Any, Any, T], *, limit_s: float = math.inf) -> T:
    """Run `main` in virtual time, as asyncio.run does in real time.

    Raises:
        Deadlock: All tasks wait and no timer is set.
        OutOfTime: It takes longer than `limit_s` virtual seconds.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit_s)) as runner:
        return runner.run(main)
