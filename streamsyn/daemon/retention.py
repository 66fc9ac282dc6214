"""Retention: old samples of a run are removed once its mirror has them and all named consumers read them.

Only sealed shards of samples are removed, whole and the oldest first. Contexts and rejects stay: a run
resumes from them, and samples can be made of them again.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import structlog

from streamsyn.sink.manifest import Manifest, SealedShard
from streamsyn.sink.mirror_plan import MirrorTarget, mirrored_shards
from streamsyn.sink.removed import remove_samples, removed_rows

log = structlog.get_logger()


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
