"""One writer a directory: DIR/.lock is locked for as long as it has it open, and says who it is."""

import fcntl
import os
import platform
from collections.abc import Callable
from pathlib import Path

from streamsyn.errors import DirectoryInUse

_NAME = ".lock"


class DirectoryLock:
    """The lock of a directory, held until `close` or the end of the process.

    Raises:
        OSError: Its file cannot be opened.
        DirectoryInUse: Another process holds it; the message says which.
    """

    def __init__(self, root: Path) -> None:
        self._file = os.open(root / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self._file)
            os.close(self._file)
            raise DirectoryInUse(f"{root} is in use by another process ({holder})") from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"pid {os.getpid()} on {platform.node()}".encode(), 0)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._file)


def wait_until_free(root: Path, on_wait: Callable[[str], None]) -> None:
    """Return when nobody holds the lock of `root`; `on_wait` is told who does, if one has to wait."""
    try:
        file = os.open(root / _NAME, os.O_RDWR)
    except OSError:
        return  # nobody was here before, or locking it will say what is wrong
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait(_holder(file))
        fcntl.flock(file, fcntl.LOCK_EX)
    finally:
        os.close(file)


def _holder(file: int) -> str:
    return os.pread(file, 100, 0).decode(errors="replace").strip()
