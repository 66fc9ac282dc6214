"""SIGTERM and SIGINT: the first finishes the step, saves and ends; the second ends at once."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75


@contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Within, the first signal calls `stop`, the second exits at once. One that is ignored stays so."""
    came = 0

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came += 1
        if came > 1:
            os._exit(EXIT_STOPPED)
        stop()

    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
