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
"""The compressions of each format; the first one is its default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to export.

    Attributes:
        root: The run directory.
        to: A path or an fsspec URL of a folder that is new or empty.
        format: A key of COMPRESSIONS.
        compression: One of the format's compressions; None for its default.
        splits: `task`, `NAME=SHARE,NAME=SHARE`, or both; empty for a single split `train`.
        split_seed: Seed of the random split.
        shard_bytes: Size at which a new file begins, in bytes before compression.
        shard_rows: Maximum rows per file.
        epochs: Samples per context, each with different distractors.
        limit: Maximum number of samples: the first ones are exported.
        settings: Keys of `assembly` with values that override those of the run.
        config: A configuration file whose section `assembly` overrides the run's; `settings` come after it.
        overwrite: Replace an earlier export.
        flush: Of an unfinished run, also make samples of the contexts that still wait for distractors.
        workers: Processes that choose samples and sign contexts, besides this one; 1: this one does it. The
            rows are the same. They import the main module: a script needs `if __name__ == "__main__"`.
        ray: Address of a Ray cluster whose nodes sign contexts, in place of `workers`; the rows are the same.
        license: Licence identifier for the card.
        on_progress: Called every few seconds.
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
    workers: int = 1
    ray: str | None = None
    on_progress: Callable[["ExportSummary"], None] = lambda _: None

    def check(self) -> None:
        """Check format, compression and licence, before anything is read or written.

        Raises:
            ConfigError: One of them is invalid.
        """
        _ = self.codec
        if self.license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", self.license):
            raise ConfigError(
                f"--license: {self.license!r} is not an identifier; give one such as apache-2.0, or other"
            )

    @property
    def codec(self) -> str:
        """The compression of files.

        Raises:
            ConfigError: The format is unknown, or does not have this compression.
        """
        if self.format not in COMPRESSIONS:
            raise ConfigError(
                f"--format: unknown format {self.format!r}; the formats are {', '.join(COMPRESSIONS)}"
            )
        known = COMPRESSIONS[self.format]
        codec = self.compression or known[0]
        if codec not in known:
            raise ConfigError(
                f"--compression: {self.format} cannot be compressed with {codec!r}; use {' or '.join(known)}"
            )
        return codec


@dataclass(slots=True)
class ExportSummary:
    """What has been exported so far."""

    to: str
    contexts: int = 0
    """Contexts read from the log, counted once per epoch."""
    samples: int = 0
    bytes: int = 0
    """Size of the rows before compression."""
    written_bytes: int = 0
    files: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    """Contexts without a sample, by reason."""
    waiting: int = 0
    """Contexts of an unfinished run that still wait for distractors."""
    is_final: bool = False
    """Whether the run was finished."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user."""
