"""What to do when a trainer has ended: a decision without a clock or a process.

One trainer's process: started, tethered, heard, ended.

The training that goes on beside a run: started with it, kept up, stopped behind it.

One Ctrl-C: the run drains and seals its log; then the trainer is told to save and exit. A second one ends
both at once. A run that comes to its end waits for the trainer to come to it, too.

From `run --train CONFIG` to what keeps the training up. What can be wrong with it is found here, as far
as that takes neither torch nor the model.
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
from streamsyn.trainer.training_request import check, check_launcher, resolve

log = structlog.get_logger()

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
_FINAL = (0, EXIT_USAGE, EXIT_STOPPED)


@dataclass(frozen=True, slots=True)
class TrainerExit:
    """How a trainer ended.

    Attributes:
        code: What it said that it ends with, else its exit status: negative for a signal.
        said: Whether it said so: then it ended by its own decision.
    """

    code: int
    said: bool = False

    @property
    def in_words(self) -> str:
        """For a log line."""
        return f"it exited with {self.code}" if self.code >= 0 else f"it was ended by signal {-self.code}"


@dataclass(frozen=True, slots=True)
class Restart:
    """Start it once more, after a pause; the `number`-th time in a row that brought no checkpoint."""

    after_s: float
    number: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Leave it at that: 0 trained to the end, 75 stopped, 2 the user's to mend, 1 it cannot be kept up."""

    code: int


class RestartPolicy:
    """Decides. A trainer that ended by its own decision is not started again; one that died is.

    Args:
        checkpoint: The newest checkpoint before the first start.
        most: So many times in a row without a new checkpoint.
        pause_s: Before the first of them; twice as long before each further one.
    """

    def __init__(self, checkpoint: str | None, *, most: int = 3, pause_s: float = 1.0) -> None:
        self._checkpoint = checkpoint
        self._most = most
        self._pause_s = pause_s
        self._in_a_row = 0

    def after(self, ended: TrainerExit, checkpoint: str | None, *, stopping: bool) -> Restart | GiveUp:
        """What comes next.

        Args:
            ended: How it ended.
            checkpoint: The newest checkpoint now.
            stopping: Whether it had been told to stop.
        """
        if ended.code in _FINAL:
            return GiveUp(ended.code)
        if stopping:
            return GiveUp(EXIT_STOPPED)
        if ended.said:
            return GiveUp(EXIT_FAILED)
        if checkpoint != self._checkpoint:
            self._checkpoint, self._in_a_row = checkpoint, 0
        if self._in_a_row == self._most:
            return GiveUp(EXIT_FAILED)
        self._in_a_row += 1
        return Restart(self._pause_s * 2.0 ** (self._in_a_row - 1), self._in_a_row)


_GONE_S = 60.0
"""After its head has died, what is left of a launcher's ranks may take so long to save and go."""

# Runs in the child before it becomes the trainer, or its launcher: a Ctrl-C at the terminal is for the run.
_DEAF_TO_SIGINT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.execvp(sys.argv[1], sys.argv[1:])
"""
# torchrun would set a handler nevertheless; newer ones ask this environment which signals it is to handle.
_ENVIRONMENT = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGHUP,SIGQUIT"}


class TrainerProcess:
    """A trainer, or a launcher with several, in our process group.

    Should we be killed outright, the tether's end is closed with us: the trainer saves and exits.

    Args:
        command: What is started.
        hear: Called in a thread with each line that it says, on stdout or stderr.

    Raises:
        OSError: The system has no process to give.
    """

    def __init__(self, command: Sequence[str], hear: Callable[[bytes], None]) -> None:
        self._hear = hear
        self._ended_by_us = False
        self._tether, theirs = socket.socketpair()
        with theirs, ExitStack() as on_failure:
            on_failure.callback(self._tether.close)
            self._process = subprocess.Popen(  # noqa: S603 - what the user has configured
                [sys.executable, "-I", "-S", "-c", _DEAF_TO_SIGINT, *command],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**_ENVIRONMENT, **os.environ},
            )
            on_failure.pop_all()
        self._hearing = threading.Thread(target=self._listen, name="trainer's output", daemon=True)
        self._hearing.start()

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def wait(self) -> TrainerExit:
        """Return when it has ended, and all that it started; how it ended."""
        status = self._process.wait()
        self._tether.setblocking(False)
        try:
            said = self._tether.recv(16)
        except OSError:
            said = b""
        self._tether.close()
        # The pipe ends when nobody holds it any more. Only then is the training's directory free.
        self._hearing.join(0.5 if self._ended_by_us else _GONE_S)
        return TrainerExit(int(said), said=True) if said else TrainerExit(status)

    def stop(self) -> None:
        """Have it save and exit. Safe in a signal's handler."""
        with suppress(OSError):  # it is over
            self._tether.shutdown(socket.SHUT_WR)

    def end(self) -> None:
        """End it at once. Ranks below a launcher are left to what `stop` does. Safe in a signal's handler."""
        self._ended_by_us = True
        self.stop()
        self._process.kill()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as said:
            for line in said:
                self._hear(line)


_PREFIX = "streamsyn: "
"""Of the line in which a command says why it failed."""


class TrainerSupervisor:
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
        self._restarts = RestartPolicy(self._checkpoint(), pause_s=pause_s)
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
                case GiveUp(code):
                    self._say_over(code, ended, drain)
                    return code
                case Restart(after_s, number):
                    log.warning("trainer.restarts", because=ended.in_words, in_s=after_s, number=number)
            if self._is_woken_within(after_s):
                return EXIT_STOPPED

    def _run_once(self) -> TrainerExit:
        self._error = ""
        try:
            process = self._process = TrainerProcess(self._command, self._hear)
        except OSError as error:  # the system has no process to give just now
            self._error = f"it cannot be started: {error}"
            return TrainerExit(EXIT_FAILED)
        log.info("trainer.started", pid=process.pid, out=str(self._out))
        if self._ending:  # the signal came while it was being started
            process.end()
        elif self._stopping:
            process.stop()
        return process.wait()

    def _say_over(self, code: int, ended: TrainerExit, drain: Callable[[str], None]) -> None:
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


FOLDER = "training"
"""Where in the run directory the training keeps its files, if nothing else is said."""


def training_beside(path: Path, run_out: Path, *, as_json: bool) -> TrainerSupervisor:
    """The training that follows a run into `run_out`, as the file says.

    Raises:
        ConfigError: The file or what it names cannot be used.
    """
    try:
        request = resolve(path, str(run_out), None, None, default_out=run_out / FOLDER)
        check(request)
        check_launcher(request.config.train)
    except ConfigError as error:
        raise ConfigError(f"--train {path}: {str(error).removeprefix(f'{path}: ')}") from error
    launcher = request.config.train.launcher or (sys.executable,)
    given = ["train", str(path), "--from", str(run_out), "--out", str(request.out), "--tethered"]
    command = [*launcher, "-m", "streamsyn", *given, *(["--log-json"] if as_json else [])]
    return TrainerSupervisor(command, request.out, as_json=as_json)
