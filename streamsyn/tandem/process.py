"""One trainer's process: started, tethered, heard, ended."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from streamsyn.tandem.restarts import Ended

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

    def wait(self) -> Ended:
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
        return Ended(int(said), said=True) if said else Ended(status)

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
