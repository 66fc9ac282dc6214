"""How a training is told to stop: by signals, and by the end of the run that started it.

The first signal finishes the step, saves and ends; a later SIGTERM or SIGINT ends at once.

A trainer that was started by `run --train` also ends with its run. Its stdin is one end of a socket pair: end
of file means that the run has ended or died, so the trainer saves and exits. The exit code goes back over the
same socket if the training ends by its own decision. Signals cannot do this. Launchers hand stdin down to
every rank, but torchrun puts its workers into sessions of their own, passes a SIGTERM on and kills workers
that take more than 30 s to save; `accelerate launch` of one process passes nothing on; and both turn every
exit code except 0 into 1.
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
from streamsyn.stop_signals import GENTLE

EXIT_STOPPED = 75
END_OF_RUN = signal.SIGUSR1
"""Sent by `ParentLiveness`. It never ends a training at once: whoever ends a run has often signalled its
trainer too, which is saving by the time the run has drained."""
_SAME_SIGNAL_S = 1.0
"""A signal within this time after the first one is the same one: launchers and service managers forward
signals that all processes have received already."""


@contextmanager
def stop_on_signals(stop: Callable[[], None], now: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """A context in which the first signal calls `stop`, and a later one exits at once.

    A signal that is ignored stays ignored.

    Args:
        stop: Called in the signal handler.
        now: A clock, in seconds.
    """
    first: float | None = None

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = now()
            stop()
        elif number not in GENTLE and now() - first > _SAME_SIGNAL_S:
            os._exit(EXIT_STOPPED)

    numbers = (signal.SIGTERM, signal.SIGINT, *GENTLE)
    found = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ParentLiveness:
    """The trainer's end of the socket to the run that started it.

    When the run ends or dies, END_OF_RUN is sent to this process. SIGINT and SIGHUP are ignored from now on:
    they come from the terminal and are meant for the run, which then stops its trainer.

    Raises:
        ConfigError: Stdin is not a socket.
    """

    def __init__(self) -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        try:
            self._socket = socket.socket(fileno=os.dup(0))
        except OSError as error:
            raise ConfigError(
                f"--tethered is for `run --train`, whose launcher must pass stdin on: {error}"
            ) from error

    @classmethod
    def of_this_rank(cls, *, wanted: bool) -> Self | None:
        """Start to watch the run; None if not `wanted`, and on all ranks but rank 0, which acts for all."""
        if not wanted:
            return None
        parent = cls()
        if os.environ.get("RANK", "0") != "0":
            return None
        threading.Thread(target=parent._watch, name="parent", daemon=True).start()
        return parent

    def send_exit_code(self, code: int) -> None:
        """Tell the run with which code this training ends."""
        try:
            self._socket.send(b"%d" % code)
        except OSError:
            return  # the run has ended

    def _watch(self) -> None:
        while self._socket.recv(16):
            continue
        os.kill(os.getpid(), END_OF_RUN)
