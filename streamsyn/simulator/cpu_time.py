"""The CPU time that simulated servers take in the process of their client.

A benchmark of simulated servers reports what the client's own code takes, and must leave theirs out.
"""

import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class CpuTime:
    """A sum of CPU seconds.

    Attributes:
        seconds: CPU seconds so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def of_call(self, call: Callable[..., T], *given: Any) -> T:
        """Call, and add its CPU time."""
        began = time.thread_time()
        try:
            return call(*given)
        finally:
            self.seconds += time.thread_time() - began

    def of(self, steps: Coroutine[Any, Any, T]) -> Awaitable[T]:
        """Return an awaitable for a coroutine that adds the CPU time of its steps, without the waits."""
        return _Counted(self, steps)


SPENT = CpuTime()
"""Of all simulated servers in this process."""


class _Counted(Generic[T]):
    def __init__(self, cpu: CpuTime, steps: Coroutine[Any, Any, T]) -> None:
        self._cpu = cpu
        self._steps = steps

    def __await__(self) -> Generator[Any, Any, T]:
        steps = self._steps.__await__()
        step: Callable[[Any], Any] = steps.send
        given: Any = None
        while True:
            try:
                waits_for = self._cpu.of_call(step, given)
            except StopIteration as done:
                result: T = done.value
                return result
            try:
                step, given = steps.send, (yield waits_for)
            except BaseException as error:  # noqa: BLE001 - passed on to the coroutine, which raises it
                step, given = steps.throw, error
