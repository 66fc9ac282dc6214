"""Low disk: runs wait before the disk is full, and go on by themselves when there is room again."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger()

_INTERVAL_S: Final = 1.0
_ENOUGH: Final = 2
"""Runs go on with this multiple of `serve.min_free_bytes`, so that they do not begin and wait in turn."""


class FreeSpace:
    """Decides whether work has to wait for free disk space.

    Attributes:
        is_low: Whether it has to wait now.
    """

    def __init__(self) -> None:
        self.is_low = False

    def note(self, free_bytes: int, min_free_bytes: int) -> bool:
        """Take the free bytes as they are now; returns whether `is_low` has changed."""
        before = self.is_low
        self.is_low = free_bytes < (_ENOUGH * min_free_bytes if before else min_free_bytes)
        return self.is_low != before


class DiskWatch:
    """Watches the disk of a directory.

    Args:
        root: The directory.
        least: Returns `serve.min_free_bytes`.
        hold: Called with the reason when space becomes low, and with "" when there is enough again.
    """

    def __init__(self, root: Path, least: Callable[[], int], hold: Callable[[str], None]) -> None:
        self._root = root
        self._least = least
        self._hold = hold
        self._space = FreeSpace()

    async def watch(self) -> None:
        """Check in regular intervals, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await self.check()

    async def check(self) -> None:
        """Look at the free space now."""
        try:
            free = await asyncio.to_thread(free_on_disk, self._root)
        except OSError as error:
            log.warning("disk.unknown", root=str(self._root), error=error.strerror or str(error))
            return
        least = self._least()
        if not self._space.note(free, least):
            return
        figures = {"free_bytes": free, "min_free_bytes": least}
        if self._space.is_low:
            why = (
                f"low disk: {free:,} bytes are free, less than serve.min_free_bytes = {least:,}; runs go on "
                f"by themselves when {_ENOUGH * least:,} are"
            )
            log.warning("disk.low", plain=why, root=str(self._root), **figures)
            self._hold(why)
        else:
            log.info("disk.enough", root=str(self._root), **figures)
            self._hold("")


def free_on_disk(root: Path) -> int:
    """Bytes that are free for this process on the disk of a directory.

    Raises:
        OSError: The directory is not there.
    """
    found = os.statvfs(root)
    return found.f_bavail * found.f_frsize
