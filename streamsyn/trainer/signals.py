"""SIGTERM and SIGINT: the first finishes the step, saves and ends; a later one ends at once."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75
END_OF_RUN = signal.SIGUSR1
"""A tether's. It never ends at once: who ends a run has often told its trainer too, which is saving by the
time the run has drained."""
_SAME_S = 1.0
"""What comes so soon is the first one again: launchers and service managers pass on what all have got."""


@contextmanager
def stop_on_signals(stop: Callable[[], None], now: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Within, the first signal calls `stop`, a later one exits at once. One that is ignored stays so.

    Args:
        stop: Called in a signal's handler.
        now: A clock, in seconds.
    """
    first: float | None = None

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = now()
            stop()
        elif number != END_OF_RUN and now() - first > _SAME_S:
            os._exit(EXIT_STOPPED)

    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, END_OF_RUN)}
    before = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
