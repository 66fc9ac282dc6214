"""SIGTERM and SIGINT: the first finishes the step, saves and ends; a later one ends at once.

The line between a run and the trainer that it started: `run --train`.

It is the trainer's stdin, one end of a pair of sockets. Its end says that the run is over or dead: save and
exit. Back over it goes the exit code, if the training ends by its own decision.

Why not signals: launchers hand stdin down to every rank, but torchrun puts its workers into sessions of
their own, passes a SIGTERM on and kills whoever takes more than 30 s to save; `accelerate launch` of one
process passes on nothing at all; and both turn every exit code but 0 into 1.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from streamsyn.errors import ConfigError

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


class ParentLiveness:
    """The trainer's end. The end of the line comes as END_OF_RUN to this process; SIGINT is ignored: whoever
    presses Ctrl-C means the run, which will tell us.

    Raises:
        ConfigError: Stdin is no such line.
    """

    def __init__(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._line = socket.socket(fileno=os.dup(0))
        except OSError as error:
            raise ConfigError(
                f"--tethered is for `run --train`, whose launcher must hand stdin on: {error}"
            ) from error

    @classmethod
    def of_this_rank(cls, *, wanted: bool) -> Self | None:
        """That of rank 0, which speaks for all of them, watched."""
        if not wanted:
            return None
        tether = cls()
        if os.environ.get("RANK", "0") != "0":
            return None
        threading.Thread(target=tether._watch, name="tether", daemon=True).start()
        return tether

    def say(self, code: int) -> None:
        """Tell with what this training ends."""
        try:
            self._line.send(b"%d" % code)
        except OSError:
            return  # nobody is there any more

    def _watch(self) -> None:
        while self._line.recv(16):
            continue
        os.kill(os.getpid(), END_OF_RUN)
