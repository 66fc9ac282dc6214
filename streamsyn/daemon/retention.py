"""Retention: old samples of a run are removed once its mirror has them and all named consumers read them.

Only sealed shards of samples are removed, whole and the oldest first. Contexts and rejects stay: a run
resumes from them, and samples can be made of them again.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import structlog

from streamsyn.config.command_sections import ServeSection
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.run_record import ENDED
from streamsyn.daemon.runs import Runs
from streamsyn.io.places import reason
from streamsyn.sink.manifest import Manifest, SealedShard, remove_samples, removed_rows
from streamsyn.sink.mirror_plan import MirrorTarget, mirrored_shards

log = structlog.get_logger()

EVERY_S = 60.0
"""Seconds between two looks at all runs."""


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
