"""Space on the disk of the daemon: old samples are removed, and runs wait before it is full.

Retention: old samples of a run are removed once its mirror has them and all named consumers read them. Only
sealed shards of samples are removed, whole and the oldest first. Contexts and rejects stay: a run resumes
from them, and samples can be made of them again. Low disk: runs are held, and go on by themselves when there
is room again.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Final

import structlog

from streamsyn.config.command_sections import ServeSection
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.run_record import ENDED
from streamsyn.daemon.runs import Runs
from streamsyn.io.places import reason
from streamsyn.sink.manifest import Manifest, SealedShard, remove_samples, removed_rows
from streamsyn.sink.mirror_plan import mirrored_shards
from streamsyn.sink.mirror_target import MirrorTarget

log = structlog.get_logger()

EVERY_S: Final = 60.0
"""Seconds between two looks at all runs."""
_INTERVAL_S: Final = 1.0
"""Seconds between two looks at the free space."""
_ENOUGH: Final = 2
"""Runs go on with this multiple of `serve.min_free_bytes`, so that they do not begin and wait in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What is kept of the samples of each run; whatever is beyond one of the limits may be removed.

    Attributes:
        seconds: Keep shards this long after they were sealed; None: without limit.
        bytes: Keep the latest shards of a run up to this size; None: without limit.
    """

    seconds: float | None = None
    bytes: int | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is a limit."""
        return self.seconds is not None or self.bytes is not None

    def exceeding(self, shards: Sequence[SealedShard], now: float) -> Iterator[SealedShard]:
        """The shards beyond a limit: the oldest ones, in order.

        Args:
            shards: The sealed shards that are left, in order.
            now: The present time, in Unix seconds.
        """
        size = sum(shard.bytes for shard in shards)
        for shard in shards:
            is_old = self.seconds is not None and now - shard.sealed_at > self.seconds
            if not is_old and (self.bytes is None or size <= self.bytes):
                return
            yield shard
            size -= shard.bytes


class RetentionTask:
    """Removes the old samples of all runs, again and again.

    Args:
        runs: The runs.
        section: Returns the present section [serve].
    """

    def __init__(self, runs: Runs, section: Callable[[], ServeSection]) -> None:
        self._runs = runs
        self._section = section
        self._done: set[str] = set()
        """Ended runs that have nothing more to remove."""

    async def run(self) -> None:
        """Look at all runs every minute, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(EVERY_S)

    async def look(self) -> None:
        """Look at all runs once. The trouble of one, or of its mirror, is logged and stops nothing."""
        section = self._section()
        retention = Retention(seconds=section.retain_s, bytes=section.retain_bytes)
        if not retention.is_on:
            return
        self._done.intersection_update(self._runs.ids)
        for run_id in self._runs.ids:
            if run_id in self._done:
                continue
            try:
                await self._look_at(run_id, retention)
            except Problem:
                continue  # deleted meanwhile
            except Exception as error:  # noqa: BLE001 - each file system has errors of its own
                log.warning("retention.failed", run=run_id, why=reason(error))

    async def _look_at(self, run_id: str, retention: Retention) -> None:
        run = await self._runs.get(run_id)
        is_done = run.state in ENDED
        if (mirror := (await run.config()).sink.mirror) is not None:
            acked = await run.consumers.slowest("samples")
            await asyncio.to_thread(remove_old, run.root, mirror, retention, acked)
            is_done = is_done and await asyncio.to_thread(_is_all_removed, run.root)
        if is_done:
            self._done.add(run_id)


def _is_all_removed(root: Path) -> bool:
    listed = Manifest(root / "manifest.jsonl").of_kind("samples")
    return not listed or listed[-1].last_seq < removed_rows(root)


def remove_old(root: Path, mirror: str, retention: Retention, acked: int | None) -> list[SealedShard]:
    """Remove the samples of a run that exceed its retention; returns the shards that were removed.

    Blocks on the disk and the mirror. The run may be going on.

    Args:
        root: The run directory.
        mirror: The URL of its mirror.
        retention: What is kept.
        acked: The last row that all named consumers of samples have acknowledged; None: there are none.

    Raises:
        SinkError: The directory cannot be read or written.
        Exception: Whatever the mirror's file system raises; nothing was removed.
    """
    first, copied = removed_rows(root), mirrored_shards(root, mirror)
    listed = Manifest(root / "manifest.jsonl").of_kind("samples")
    forgotten = [shard for shard in listed if shard.last_seq < first and (root / shard.path).exists()]
    if forgotten:  # a kill came between
        remove_samples(root, forgotten)
    left = [shard for shard in listed if shard.last_seq >= first]
    old = list(
        takewhile(
            lambda shard: (
                copied.get(shard.path) == shard.sha256 and (acked is None or shard.last_seq <= acked)
            ),
            retention.exceeding(left, time.time()),
        )
    )
    old = list(_still_mirrored(old, mirror))
    if old:
        remove_samples(root, old)
        log.info(
            "retention.removed",
            directory=str(root),
            shards=len(old),
            bytes=sum(shard.bytes for shard in old),
            first_left=old[-1].last_seq + 1,
        )
    return forgotten + old


def _still_mirrored(shards: Sequence[SealedShard], mirror: str) -> Iterator[SealedShard]:
    """Those that the mirror has at this moment: somebody may have deleted what was copied."""
    sizes: Mapping[str, int] = MirrorTarget(mirror).sizes("samples") if shards else {}
    return takewhile(lambda shard: sizes.get(shard.path) == shard.bytes, shards)


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
