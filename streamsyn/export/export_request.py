"""What to export, and the summary of an export."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamsyn.errors import ConfigError

COMPRESSIONS = {
    "jsonl": ("none", "zstd"),
    "parquet": ("zstd", "snappy", "gzip", "lz4", "brotli", "none"),
    "datasets": ("none",),
}
"""What each format may be compressed with; the first is what is used when nothing is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What is to be exported.

    Attributes:
        root: The run directory.
        to: A path or a URL of fsspec; a folder that is empty or not there.
        format: A key of COMPRESSIONS.
        compression: None is that of the format.
        splits: `task`, `NAME=SHARE,NAME=SHARE`, or both; none is a single split, `train`.
        split_seed: Another one splits otherwise.
        shard_bytes: A file ends when its rows have come to so many bytes, before compression.
        shard_rows: Or to so many rows.
        epochs: How often each context gets a sample, each time with other distractors.
        limit: No more samples than this: the first of them.
        settings: Keys of `assembly` to use in place of the run's, with their values.
        config: A configuration file; its section `assembly` is laid over the run's before `settings`.
        overwrite: Replace an earlier export.
        flush: Of a run that is not finished, also make samples of contexts that still wait for distractors.
        license: For the card.
        on_progress: Called now and then.
    """

    root: Path
    to: str
    format: str = "jsonl"
    compression: str | None = None
    splits: Sequence[str] = ()
    split_seed: int = 0
    shard_bytes: int = 500_000_000
    shard_rows: int | None = None
    epochs: int = 1
    limit: int | None = None
    settings: Sequence[tuple[str, Any]] = ()
    config: Path | None = None
    overwrite: bool = False
    flush: bool = False
    license: str | None = None
    on_progress: Callable[["ExportSummary"], None] = lambda _: None

    def check(self) -> None:
        """Refuse what can be known to be wrong before anything is touched.

        Raises:
            ConfigError: What stands in the message.
        """
        _ = self.codec
        if self.license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", self.license):
            raise ConfigError(f"--license: {self.license!r} is no identifier such as apache-2.0 or other")

    @property
    def codec(self) -> str:
        """What files are compressed with.

        Raises:
            ConfigError: The format is unknown, or cannot be compressed so.
        """
        if self.format not in COMPRESSIONS:
            raise ConfigError(f"--format: there is no {self.format!r}; there are {', '.join(COMPRESSIONS)}")
        known = COMPRESSIONS[self.format]
        codec = self.compression or known[0]
        if codec not in known:
            raise ConfigError(
                f"--compression: {self.format} cannot be {codec!r}; it can be {', '.join(known)}"
            )
        return codec


@dataclass(slots=True)
class ExportSummary:
    """What has been exported so far."""

    to: str
    contexts: int = 0
    """Contexts taken from the log, each as often as there are epochs."""
    all_contexts: int = 0
    """Of these, how many there are to take, as far as that is known."""
    samples: int = 0
    bytes: int = 0
    """Of rows, before compression."""
    written_bytes: int = 0
    files: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    """Contexts that were given no sample, by why."""
    waiting: int = 0
    """Contexts of an unfinished run that still wait for distractors."""
    is_final: bool = False
    """Whether the run had come to its end."""
    notes: list[str] = field(default_factory=list)
    """What is to be said besides."""
