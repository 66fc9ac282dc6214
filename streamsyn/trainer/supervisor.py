"""The training beside a run, `run --train CONFIG`: starts, restarts and stops the trainer process.

One Ctrl-C: the run drains and seals its log; then the trainer is told to save and exit. A second one ends
both at once. A run that comes to its end waits until the trainer has come to it, too. Mistakes in the
training's configuration are found before the run starts, as far as that needs neither torch nor the model.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

import orjson
import structlog

from streamsyn.errors import ConfigError
from streamsyn.stop_signals import GENTLE, stop_signals
from streamsyn.trainer.signals import EXIT_STOPPED
from streamsyn.trainer.training_request import check, check_launcher, resolve

log = structlog.get_logger()

EXIT_FAILED = 1
EXIT_USAGE = 2
_FINAL = (0, EXIT_USAGE, EXIT_STOPPED)

_FOLDER = "training"
"""OUT of the training by default: this folder of the run directory."""
_PREFIX = "streamsyn: "
"""Begins the line in which a command reports why it failed."""
_GONE_S = 60.0
"""Time for the ranks of a launcher to save and end after the launcher has died."""

# Runs in the child before it becomes the trainer or its launcher: Ctrl-C at the terminal, and its end, are
# meant for the run.
_IGNORE_TERMINAL = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.execvp(sys.argv[1], sys.argv[1:])
"""
# torchrun would set a handler nevertheless; newer versions read from this variable which signals to handle.
_ENVIRONMENT = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGQUIT"}


def training_beside(
    path: Path, run_out: Path, *, as_json: bool, ray: str | None = None
) -> "TrainerSupervisor":
    """The supervisor of the training that follows a run.

    Args:
        path: The training's configuration file.
        run_out: The run directory.
        as_json: Whether log lines on stderr are JSON objects.
        ray: The cluster that trains, as many workers as `cluster.workers` in the training's file says.

    Raises:
        ConfigError: The file, or a path in it, cannot be used.
    """
    try:
        request = resolve(path, str(run_out), None, None, default_out=run_out / _FOLDER)
        check(request)
        check_launcher(request.config.train)
    except ConfigError as error:
        raise ConfigError(f"--train {path}: {str(error).removeprefix(f'{path}: ')}") from error
    launcher = request.config.train.launcher or (sys.executable,)
    given = ["train", str(path), "--from", str(run_out), "--out", str(request.out), "--tethered"]
    command = [*launcher, "-m", "streamsyn", *given, *(["--log-json"] if as_json else [])]
    command += [] if ray is None else ["--ray", ray]
    return TrainerSupervisor(command, request.out, as_json=as_json)


def latest_checkpoint(out: Path) -> str | None:
    """The name of the newest checkpoint of a training; None before the first."""
    try:
        return (out / "LATEST").read_text("utf-8").strip()
    except OSError:
        return None


class TrainerSupervisor:
    """Keeps a trainer process running, in a thread of its own.

    Args:
        command: Starts the trainer, or its launcher.
        out: OUT of the training.
        as_json: Whether log lines on stderr are JSON objects.
        pause_s: Seconds before a trainer that died is restarted for the first time.
    """

    def __init__(self, command: Sequence[str], out: Path, *, as_json: bool, pause_s: float = 1.0) -> None:
        self._command = command
        self._out = out
        self._as_json = as_json
        self._restarts = RestartPolicy(latest_checkpoint(self._out), pause_s=pause_s)
        self._thread = ThreadPoolExecutor(1, "trainer")
        self._code: Future[int] | None = None
        self._process: TrainerProcess | None = None
        self._stopping = self._ending = False
        self._woken: SimpleQueue[None] = SimpleQueue()  # an Event must not be set in a signal handler
        self._last_line = self._error = ""

    @property
    def error(self) -> str:
        """Why the trainer has ended: the error it reported, or else its last line."""
        return self._error or self._last_line

    @property
    def last_line(self) -> str:
        """The last line that the trainer wrote to its log; empty before the first."""
        return self._last_line

    def start(self, drain: Callable[[str], None]) -> None:
        """Start the trainer, once the run is up.

        Args:
            drain: Ends the run early, for a reason; may be called in any thread.
        """
        if not self._stopping:
            self._code = self._thread.submit(self._supervise, drain)

    def end(self) -> None:
        """End the trainer at once. Safe in a signal handler."""
        self._ending = True
        self.stop()
        if self._process is not None:
            self._process.end()

    def stop(self) -> None:
        """Tell the trainer to save and exit. Safe in a signal handler."""
        self._stopping = True
        self._woken.put(None)
        if self._process is not None:
            self._process.stop()

    def finish(self, *, stopped: bool) -> int:
        """Wait for the trainer after the end of the run.

        Args:
            stopped: Whether the run was stopped early; the trainer is stopped, too.

        Returns:
            The exit code: see `GiveUp`.
        """
        if self._code is None:
            return EXIT_STOPPED if stopped else 0
        if stopped:
            self.stop()
        elif not self._code.done():
            log.info("run.waits_for_training", out=str(self._out))
        return _wait_for(self._code)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """A context around the run: handles signals while the run has no handlers, and stops the trainer on
        errors.
        """
        before = {number: signal.getsignal(number) for number in stop_signals()}
        for number in before:
            signal.signal(number, self._on_signal)
        try:
            yield
        except BaseException:
            self.finish(stopped=True)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._code is None:
            os._exit(EXIT_STOPPED)  # nothing was started yet
        elif not self._stopping:
            self.stop()
        elif number not in GENTLE:
            self.end()

    def _supervise(self, drain: Callable[[str], None]) -> int:
        while True:
            ended = self._run_once()
            match self._restarts.after(ended, latest_checkpoint(self._out), stopping=self._stopping):
                case GiveUp(code):
                    self._report_end(code, ended, drain)
                    return code
                case Restart(after_s, number):
                    log.warning("trainer.restarts", because=ended.in_words, in_s=after_s, number=number)
            if self._is_woken_within(after_s):
                return EXIT_STOPPED

    def _run_once(self) -> "TrainerExit":
        self._error = ""
        try:
            process = self._process = TrainerProcess(self._command, self._forward)
        except OSError as error:  # no process can be started just now
            self._error = f"it cannot be started: {error}"
            return TrainerExit(EXIT_FAILED)
        log.info("trainer.started", pid=process.pid, out=str(self._out))
        if self._ending:  # the signal came while it was being started
            process.end()
        elif self._stopping:
            process.stop()
        return process.wait()

    def _report_end(self, code: int, ended: "TrainerExit", drain: Callable[[str], None]) -> None:
        if self._stopping or code == 0:
            log.info("trainer.ended", exit_code=code)
        elif code == EXIT_USAGE:
            log.error("trainer.refuses", why=self.error)
            drain("the training was refused as it is configured")
        elif code == EXIT_FAILED:
            log.error("trainer.gone", because=ended.in_words, why=self.error, run="goes on without it")
        else:
            log.warning("trainer.stopped", because=ended.in_words, run="goes on without it")

    def _is_woken_within(self, seconds: float) -> bool:
        try:
            self._woken.get(timeout=seconds)
        except Empty:
            return self._stopping
        return True

    def _forward(self, line: bytes) -> None:
        """Write a line of the trainer to stderr, marked as the trainer's.

        `sys.stderr` is looked up each time: while progress is drawn, it is replaced to keep lines off it.
        """
        text = line.decode(errors="replace").rstrip("\n")
        event = _as_object(text) if self._as_json else {}
        self._last_line = text or self._last_line
        if text.startswith(_PREFIX) or event.get("event") == "run.failed":
            self._error = str(event.get("error", text.removeprefix(_PREFIX)))
        marked = orjson.dumps({**event, "of": "trainer"}).decode() if self._as_json else f"trainer| {text}"
        sys.stderr.write(marked + "\n")


def _wait_for(code: Future[int]) -> int:
    """Wait for a result in the main thread without missing a signal.

    Of two signals that come together, the system may deliver the second one to a different thread. A lock
    that the main thread waits for does not wake up then, and the handler would not run; a socket that is
    written to does.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            code.add_done_callback(lambda _code: _wake(theirs))
            _wake(theirs)  # for a signal that a different thread received just before
            while not code.done():
                ours.recv(64)
        finally:
            signal.set_wakeup_fd(before)
    return code.result()


def _wake(sender: socket.socket) -> None:
    with suppress(OSError):  # nobody is waiting, or a wake-up is pending already
        sender.send(b"\0")


def _as_object(text: str) -> dict[str, Any]:
    """A log line of the trainer as an object; any other line becomes the event `trainer.said`."""
    try:
        event = orjson.loads(text)
    except ValueError:
        event = None
    return event if isinstance(event, dict) else {"event": "trainer.said", "text": text}


class TrainerProcess:
    """The process of a trainer, or of a launcher with several ranks, in the process group of the run.

    Its stdin is a socket to the run. If the run is killed, the socket is closed: the trainer saves and exits.

    Args:
        command: What to start.
        on_line: Called in a thread with each line of its stdout and stderr.

    Raises:
        OSError: The process cannot be started.
    """

    def __init__(self, command: Sequence[str], on_line: Callable[[bytes], None]) -> None:
        self._on_line = on_line
        self._ended_by_us = False
        self._socket, theirs = socket.socketpair()
        with theirs, ExitStack() as on_failure:
            on_failure.callback(self._socket.close)
            self._process = subprocess.Popen(  # noqa: S603 - what the user has configured
                [sys.executable, "-I", "-S", "-c", _IGNORE_TERMINAL, *command],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**_ENVIRONMENT, **os.environ},
            )
            on_failure.pop_all()
        self._reading = threading.Thread(target=self._read_output, name="trainer's output", daemon=True)
        self._reading.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait(self) -> "TrainerExit":
        """Wait until the process, and all processes that it started, have ended."""
        status = self._process.wait()
        self._socket.setblocking(False)
        try:
            code = self._socket.recv(16)
        except OSError:
            code = b""
        self._socket.close()
        # The pipe ends when no process has it open. Only then is OUT of the training free.
        self._reading.join(0.5 if self._ended_by_us else _GONE_S)
        return TrainerExit(int(code), decided=True) if code else TrainerExit(status)

    def stop(self) -> None:
        """Tell it to save and exit. Safe in a signal handler."""
        with suppress(OSError):  # it has ended
            self._socket.shutdown(socket.SHUT_WR)

    def end(self) -> None:
        """End it at once. Ranks of a launcher save and exit, as after `stop`. Safe in a signal handler."""
        self._ended_by_us = True
        self.stop()
        self._process.kill()

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self._on_line(line)


@dataclass(frozen=True, slots=True)
class TrainerExit:
    """How a trainer ended.

    Attributes:
        code: The exit code that it sent, or else its exit status, which is negative for a signal.
        decided: Whether it sent the code: then it ended by its own decision.
    """

    code: int
    decided: bool = False

    @property
    def in_words(self) -> str:
        """A sentence for the log."""
        return f"it exited with {self.code}" if self.code >= 0 else f"it was ended by signal {-self.code}"


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the trainer again after a pause. `number` counts starts in a row without a new checkpoint."""

    after_s: float
    number: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not start it again. Codes: 0 finished, 75 stopped, 2 configuration error, 1 failed."""

    code: int


class RestartPolicy:
    """Decides what happens when a trainer has ended. Has no clock and no process.

    A trainer that ended by its own decision is not restarted; a trainer that died is.

    Args:
        checkpoint: The newest checkpoint before the first start.
        max_restarts: Maximum restarts in a row without a new checkpoint.
        pause_s: Seconds before the first of these restarts; doubled for each further one.
    """

    def __init__(self, checkpoint: str | None, *, max_restarts: int = 3, pause_s: float = 1.0) -> None:
        self._checkpoint = checkpoint
        self._max_restarts = max_restarts
        self._pause_s = pause_s
        self._in_a_row = 0

    def after(self, ended: TrainerExit, checkpoint: str | None, *, stopping: bool) -> Restart | GiveUp:
        """Decide what comes next.

        Args:
            ended: How the trainer ended.
            checkpoint: The newest checkpoint now.
            stopping: Whether the trainer had been told to stop.
        """
        if ended.code in _FINAL:
            return GiveUp(ended.code)
        if stopping:
            return GiveUp(EXIT_STOPPED)
        if ended.decided:
            return GiveUp(EXIT_FAILED)
        if checkpoint != self._checkpoint:
            self._checkpoint, self._in_a_row = checkpoint, 0
        if self._in_a_row == self._max_restarts:
            return GiveUp(EXIT_FAILED)
        self._in_a_row += 1
        return Restart(self._pause_s * 2.0 ** (self._in_a_row - 1), self._in_a_row)
