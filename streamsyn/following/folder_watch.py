"""Waits for changes in folders, with inotify where the kernel has it."""

import asyncio
import ctypes
import os
import select
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

_LOOK_EVERY_S: Final = 0.5
"""Maximum time between two looks, with or without a notification."""
_MODIFY, _MOVED_TO, _CREATE = 0x2, 0x80, 0x100  # inotify(7)


class FolderWatch:
    """Waits for changes in folders. Only a hint: NFS sends no notifications, and the kernel limits their
    number, so that a wait ends after half a second at the latest.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = -1
        if hasattr(self._libc, "inotify_init1"):
            self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def add(self, folders: Iterable[Path]) -> None:
        """Watch those of the folders that exist by now; call it again before each look. May block."""
        if self._fd < 0:
            return
        for folder in folders:
            self._libc.inotify_add_watch(self._fd, os.fsencode(folder), _MODIFY | _MOVED_TO | _CREATE)

    async def changed(self, timeout_s: float) -> None:
        """Return when something has changed since the last call, and after half a second at the latest."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        if self._fd >= 0:
            loop.add_reader(self._fd, changed.set)
        try:
            async with asyncio.timeout(min(timeout_s, _LOOK_EVERY_S)):
                await changed.wait()
            self._forget()
        except TimeoutError:
            return
        finally:
            if self._fd >= 0:
                loop.remove_reader(self._fd)

    def wait(self, timeout_s: float) -> None:
        """As `changed`, blocking."""
        files = [self._fd] if self._fd >= 0 else []
        ready, _, _ = select.select(files, [], [], min(timeout_s, _LOOK_EVERY_S))
        if ready:
            self._forget()

    def close(self) -> None:
        """Stop watching. May be called more than once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _forget(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._fd, 1 << 16)
