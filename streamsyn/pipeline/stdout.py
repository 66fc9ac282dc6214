"""Stdout as a stream of samples, and a stderr that cannot fail.

While samples go to stdout, everything else that is printed goes to stderr.
"""

import io
import os
import select
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamsyn.errors import ConfigError, ReaderGone, SinkError

_PIPE_CHUNK = 4096
"""Bytes that a pipe takes without blocking once it polls as writable (POSIX: PIPE_BUF)."""


class SampleStream:
    """Takes over stdout: from now on only samples go there; everything else that is printed goes to stderr.

    `write` blocks while the reader is slow: call it in a thread. `stop` ends a write that waits.

    Raises:
        ConfigError: Stdout is closed.
    """

    def __init__(self) -> None:
        if sys.stdout is None:  # Python found it closed; by now its number may belong to a different file
            raise ConfigError("--stdout prints samples, and stdout is closed")
        self._fd = os.dup(1)
        os.dup2(2, 1)
        is_file = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._chunk = 1 << 20 if is_file else _PIPE_CHUNK
        self._wake_read, self._wake_write = os.pipe()
        self._marker: Path | None = None
        self._is_whole = True
        """Whether no line is written in part."""

    def resume(self, marker: Path) -> None:
        """Begin a new line if an earlier run may have left part of one; called again, does nothing.

        Otherwise a reader would find the first sample of this run joined to the torn one, and skip both.

        Args:
            marker: A file that exists while a run writes, and after one that may have left a torn line.

        Raises:
            ReaderGone: As `write`.
            SinkError: As `write`, or the marker cannot be written.
        """
        if self._marker is not None:
            return
        if self._may_be_torn(marker):
            self.write([b"\n"])
        try:
            marker.touch()
        except OSError as error:
            raise SinkError(f"cannot write {marker}: {error.strerror}") from error
        self._marker = marker

    def leave(self) -> None:
        """Record that no line is torn, if that is so: a run that resumes need not begin a new line."""
        if self._marker is not None and self._is_whole:
            with suppress(OSError):  # then the next run begins with an empty line
                self._marker.unlink(missing_ok=True)

    def write(self, lines: Iterable[bytes]) -> None:
        """Write whole lines.

        Raises:
            ReaderGone: The reader has closed its end, or `stop` was called.
            SinkError: Stdout is a file that cannot be written.
        """
        for line in lines:
            data = memoryview(line)
            while data:
                self._is_whole = len(data) == len(line)
                stopped, _, _ = select.select([self._wake_read], [self._fd], [])
                if stopped:
                    raise ReaderGone("stopped while the reader of stdout was not reading")
                try:
                    data = data[os.write(self._fd, data[: self._chunk]) :]
                except ConnectionError:  # EPIPE of a pipe, ECONNRESET of a socket
                    self._is_whole = True  # nobody will read this pipe any more
                    raise ReaderGone("the reader of stdout has gone away") from None
                except OSError as error:
                    raise SinkError(f"cannot write samples to stdout: {error.strerror}") from error
            self._is_whole = True

    def stop(self) -> None:
        """End a write that waits for the reader, from any thread."""
        os.write(self._wake_write, b"x")

    def close(self) -> None:
        """Close stdout: the reader sees the end of the stream."""
        for fd in (self._fd, self._wake_read, self._wake_write):
            os.close(fd)

    def _may_be_torn(self, marker: Path) -> bool:
        """Whether stdout may end in part of a line. A file tells; a pipe does not, so its marker decides."""
        if stat.S_ISREG(os.fstat(self._fd).st_mode):
            with suppress(OSError), Path(f"/dev/fd/{self._fd}").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                return file.read(1) not in (b"", b"\n")
        return marker.exists()


def secure_stdio() -> None:
    """Make stderr a stream that cannot fail, and open closed standard streams on /dev/null."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    raw = _LossyFile(2, "wb", closefd=False)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )


class _LossyFile(io.FileIO):
    """A file that accepts every write, even when nobody reads it any more.

    The terminal or the log collector behind stderr may go away, or its disk may be full. What is written then
    is lost, but the run goes on. Logs, progress, the summary and Python's own messages all come through here.
    """

    def write(self, data: Any, /) -> int:
        """Write as much as the file takes; after an error, report that all was written."""
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written
