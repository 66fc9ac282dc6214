"""To be told when a folder changes, where the kernel can tell (inotify). Only a hint: NFS tells nothing."""

import asyncio
import ctypes
import os
from pathlib import Path

LOOK_AGAIN_S = 0.5
"""After so long it is time to look, hint or not."""

_MODIFY, _MOVED_TO, _CREATE = 0x2, 0x80, 0x100  # inotify(7)


class FolderWatch:
    """Waits for something to change in the folders that were added."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = -1
        if hasattr(self._libc, "inotify_init1"):
            self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._folders: set[Path] = set()

    def add(self, folder: Path) -> None:
        """Watch a folder too, if it is there by now. May block."""
        if self._fd < 0 or folder in self._folders:
            return
        events = _MODIFY | _MOVED_TO | _CREATE
        if self._libc.inotify_add_watch(self._fd, os.fsencode(folder), events) >= 0:
            self._folders.add(folder)

    async def changed(self, timeout_s: float) -> None:
        """Return when something has changed since the last call, and soon anyway."""
        loop = asyncio.get_running_loop()
        told = asyncio.Event()
        if self._fd >= 0:
            loop.add_reader(self._fd, told.set)
        try:
            async with asyncio.timeout(min(timeout_s, LOOK_AGAIN_S)):
                await told.wait()
            os.read(self._fd, 1 << 16)
        except TimeoutError:
            return
        finally:
            if self._fd >= 0:
                loop.remove_reader(self._fd)

    def close(self) -> None:
        """Watch no longer."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
