"""Our stdout as a stream of samples that somebody reads, more or less quickly, or no longer; and stderr."""

import io
import os
import select
import stat
import sys
from collections.abc import Iterable
from typing import Any

from streamsyn.errors import ConfigError, ReaderGone, SinkError

_PIPE_CHUNK = 4096
"""A pipe that polls as writable takes this much without blocking (POSIX: PIPE_BUF)."""


class SampleStream:
    """Takes stdout over: from now on nothing else gets there; what others print goes to stderr.

    `write` blocks while the reader is slow: call it in a thread. `stop` ends a write that waits.

    Raises:
        ConfigError: Stdout is closed.
    """

    def __init__(self) -> None:
        if sys.stdout is None:  # Python found it closed; by now its number may be another file's
            raise ConfigError("--stdout prints samples, and stdout is closed")
        self._fd = os.dup(1)
        os.dup2(2, 1)
        is_file = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._chunk = 1 << 20 if is_file else _PIPE_CHUNK
        self._wake_read, self._wake_write = os.pipe()

    def write(self, lines: Iterable[bytes]) -> None:
        """Write whole lines.

        Raises:
            ReaderGone: The reader has closed its end, or `stop` was called.
            SinkError: Stdout is a file that cannot be written.
        """
        for line in lines:
            data = memoryview(line)
            while data:
                stopped, _, _ = select.select([self._wake_read], [self._fd], [])
                if stopped:
                    raise ReaderGone("stopped while the reader of stdout was not reading")
                try:
                    data = data[os.write(self._fd, data[: self._chunk]) :]
                except ConnectionError:  # EPIPE of a pipe, ECONNRESET of a socket
                    raise ReaderGone("the reader of stdout has gone away") from None
                except OSError as error:
                    raise SinkError(f"cannot write samples to stdout: {error.strerror}") from error

    def stop(self) -> None:
        """End a write that waits for the reader, from any thread."""
        os.write(self._wake_write, b"x")

    def close(self) -> None:
        """Close our end: the reader sees the end of the stream."""
        for fd in (self._fd, self._wake_read, self._wake_write):
            os.close(fd)


def secure_stdio() -> None:
    """Make stderr one that cannot fail, and keep files of ours from taking the place of a closed stream."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    raw = _LossyFile(2, "wb", closefd=False)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )


class _LossyFile(io.FileIO):
    """Takes whatever is written, also when nobody reads it any more.

    The terminal or the log collector behind stderr may go away, or its disk may be full: what a run
    says is lost then, and that is no reason to lose the run. Whatever writes to stderr comes through
    here: logs, progress, the summary, and what Python or a library has to say.
    """

    def write(self, data: Any, /) -> int:
        """All of it, or as much as is taken."""
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written
