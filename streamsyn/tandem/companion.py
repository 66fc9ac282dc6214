"""The training that goes on beside a run: started with it, kept up, stopped behind it.

One Ctrl-C: the run drains and seals its log; then the trainer is told to save and exit. A second one ends
both at once. A run that comes to its end waits for the trainer to come to it, too.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

import orjson
import structlog

from streamsyn.tandem.process import TrainerProcess
from streamsyn.tandem.restarts import EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, Again, Ended, Over, Restarts

log = structlog.get_logger()

_PREFIX = "streamsyn: "
"""Of the line in which a command says why it failed."""


class Companion:
    """Keeps a trainer up in a thread of its own.

    Args:
        command: What starts the trainer, or its launcher.
        out: Where the training keeps its files.
        as_json: Whether lines on stderr are JSON objects.
        pause_s: Before a trainer that died is started again for the first time.
    """

    def __init__(self, command: Sequence[str], out: Path, *, as_json: bool, pause_s: float = 1.0) -> None:
        self._command = command
        self._out = out
        self._as_json = as_json
        self._restarts = Restarts(self._checkpoint(), pause_s=pause_s)
        self._thread = ThreadPoolExecutor(1, "trainer")
        self._code: Future[int] | None = None
        self._process: TrainerProcess | None = None
        self._stopping = self._ending = False
        self._woken: SimpleQueue[None] = SimpleQueue()  # an Event may not be set in a signal's handler
        self._last_line = self._error = ""

    @property
    def complaint(self) -> str:
        """Why the trainer has ended, in its own words, which a launcher may have added its own to."""
        return self._error or self._last_line

    def start(self, drain: Callable[[str], None]) -> None:
        """The run is up: start the trainer. `drain` ends the run early; it may be called in any thread."""
        if not self._stopping:
            self._code = self._thread.submit(self._keep_up, drain)

    def end(self) -> None:
        """End the trainer at once. Safe in a signal's handler."""
        self._ending = True
        self.stop()
        if self._process is not None:
            self._process.end()

    def stop(self) -> None:
        """Have the trainer save and exit. Safe in a signal's handler."""
        self._stopping = True
        self._woken.put(None)
        if self._process is not None:
            self._process.stop()

    def finish(self, *, stopped: bool) -> int:
        """Wait for the trainer, once the run is over; with what it ended: see `Over`.

        Args:
            stopped: The run has stopped early, and so is the trainer to.
        """
        if self._code is None:
            return EXIT_STOPPED if stopped else 0
        if stopped:
            self.stop()
        elif not self._code.done():
            log.info("run.waits_for_training", out=str(self._out))
        return _awaited(self._code)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """For the time in which a run has no handlers of its own: signals, and errors of the run."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, self._on_signal)
        try:
            yield
        except BaseException:
            self.finish(stopped=True)
            raise
        finally:
            for number, earlier in before.items():
                signal.signal(number, earlier)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._code is None:
            os._exit(EXIT_STOPPED)  # there is nothing yet
        elif self._stopping:
            self.end()
        else:
            self.stop()

    def _keep_up(self, drain: Callable[[str], None]) -> int:
        while True:
            ended = self._run_once()
            match self._restarts.after(ended, self._checkpoint(), stopping=self._stopping):
                case Over(code):
                    self._say_over(code, ended, drain)
                    return code
                case Again(after_s, number):
                    log.warning("trainer.restarts", because=ended.in_words, in_s=after_s, number=number)
            if self._is_woken_within(after_s):
                return EXIT_STOPPED

    def _run_once(self) -> Ended:
        self._error = ""
        try:
            process = self._process = TrainerProcess(self._command, self._hear)
        except OSError as error:  # the system has no process to give just now
            self._error = f"it cannot be started: {error}"
            return Ended(EXIT_FAILED)
        log.info("trainer.started", pid=process.pid, out=str(self._out))
        if self._ending:  # the signal came while it was being started
            process.end()
        elif self._stopping:
            process.stop()
        return process.wait()

    def _say_over(self, code: int, ended: Ended, drain: Callable[[str], None]) -> None:
        if self._stopping or code == 0:
            log.info("trainer.ended", exit_code=code)
        elif code == EXIT_USAGE:
            log.error("trainer.refuses", why=self.complaint)
            drain("the training cannot go on as it is configured")
        elif code == EXIT_FAILED:
            log.error("trainer.gone", because=ended.in_words, why=self.complaint, run="goes on without it")
        else:
            log.warning("trainer.stopped", because=ended.in_words, run="goes on without it")

    def _is_woken_within(self, seconds: float) -> bool:
        try:
            self._woken.get(timeout=seconds)
        except Empty:
            return self._stopping
        return True

    def _checkpoint(self) -> str | None:
        """The name of the newest one."""
        try:
            return (self._out / "LATEST").read_text("utf-8").strip()
        except OSError:
            return None

    def _hear(self, line: bytes) -> None:
        """Pass on what the trainer says, so that it can be told from what the run says.

        `sys.stderr` is looked up each time: while progress is drawn, it is what keeps lines off it.
        """
        text = line.decode(errors="replace").rstrip("\n")
        said = _as_object(text) if self._as_json else {}
        self._last_line = text or self._last_line
        if text.startswith(_PREFIX) or said.get("event") == "run.failed":
            self._error = str(said.get("error", text.removeprefix(_PREFIX)))
        shown = orjson.dumps({**said, "of": "trainer"}).decode() if self._as_json else f"trainer| {text}"
        sys.stderr.write(shown + "\n")


def _awaited(code: Future[int]) -> int:
    """Its result; while it is waited for in the main thread, no signal is overlooked.

    Of two signals that come together, the system may give the second to another thread. A lock that the main
    thread waits for does not wake then, and the handler would not run; a socket that is written to does wake.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            code.add_done_callback(lambda _code: _wake(theirs))
            _wake(theirs)  # for a signal that came to another thread just before
            while not code.done():
                ours.recv(64)
        finally:
            signal.set_wakeup_fd(before)
    return code.result()


def _wake(line: socket.socket) -> None:
    with suppress(OSError):  # nobody waits any more, or is woken already
        line.send(b"\0")


def _as_object(text: str) -> dict[str, Any]:
    """A line of the trainer as an object."""
    try:
        said = orjson.loads(text)
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {"event": "trainer.said", "text": text}
