"""The sections of what lies at both ends: the run, its seeds, its log."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from streamsyn.sections.base import Count, Seconds, Section, operational


class RunSection(Section):
    """The run as a whole."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds everything drawn at random: the order of interleaved sources, distractors, positions."""
    max_reject_fraction: Annotated[float, Field(ge=0, le=1), operational] = 1.0
    """Exit with 3 when more than this share of the outcomes are rejects."""
    drain_timeout_s: Annotated[Seconds, operational] = 60.0
    """After the first SIGTERM or SIGINT, how long requests in flight may take to finish."""
    max_consecutive_bugs: Annotated[Count, operational] = 16
    """So many internal errors in a row, with nothing done in between, end the run."""
    metrics_listen: Annotated[str | None, operational] = None
    """`HOST:PORT` to serve Prometheus metrics at while the run goes on."""
    queue_size: Annotated[Count, operational] = 256
    """Items the queue between two stages holds at most."""


class SourceSection(Section):
    """One place that seeds come from."""

    path: str
    """A file, a directory, a glob, or `-` for NDJSON on stdin."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of this source when sources are interleaved."""
    task: str | None = None
    """The task of seeds that name none; by default the file's stem."""


class FieldsSection(Section):
    """Where a seed's parts stand in a line: the names of its fields."""

    instruction: str = "instruction"
    """Field that holds the instruction."""
    answer: str = "answer"
    """Field that holds the gold answer."""
    id: str = "id"
    """Optional field that holds the id."""
    task: str = "task"
    """Optional field that holds the task."""
    messages: str = "messages"
    """Field that holds a chat-format pair, used where instruction and answer are absent."""
    context: str = "context"
    """Field that holds the document, for recipes that start from one."""


class SeedsSection(Section):
    """Where seeds come from."""

    sources: Annotated[tuple[SourceSection, ...], operational] = ()
    """The sources; `--seeds PATH` on the command line replaces them."""
    interleave: Annotated[bool, operational] = False
    """Mix the sources by weight, instead of reading them in turn."""
    fields: FieldsSection = FieldsSection()
    """Names of the fields."""
    max_line_bytes: Annotated[Count, operational] = 8 * 2**20
    """A longer line is rejected without being held in memory."""
    limit: Annotated[Count | None, operational] = None
    """Read at most so many seeds (`--limit`)."""
    group_window: Annotated[int, Field(ge=0), operational] = 1024
    """Of so many seeds read ahead, those that share a long text (the template's block `group`) are worked
    on together; 0 keeps the order. No seed is passed over by more than this many."""
    task_losses: Annotated[Path | None, operational] = None
    """A trainer's OUT/task_losses.json, which need not be there yet: tasks that it finds hard come first. It
    is read again when it changes."""
    task_window: Annotated[Count, operational] = 4096
    """With losses: so many seeds are read ahead, out of which the next is drawn, by task and then the oldest;
    none lets more than four times as many others pass. `seeds.limit` counts what is read."""
    task_exponent: Annotated[float, Field(ge=0), operational] = 1.0
    """A task is drawn in proportion to its loss to this power; the least of them a tenth as often as the
    heaviest."""


class SinkSection(Section):
    """The log on disk. All of it is operational but the compression."""

    sync_interval_s: Annotated[Seconds, operational] = 1.0
    """Outcomes are on disk (fsync) at most this long after they were written."""
    sync_rows: Annotated[Count, operational] = 1024
    """So many unsynced rows are synced at once, however early."""
    shard_bytes: Annotated[Count, operational] = 128 * 2**20
    """A shard is sealed when it has grown to this."""
    compression: Literal["none", "zstd"] = "none"
    """`zstd` writes `.jsonl.zst`."""
    mirror: Annotated[str | None, operational] = None
    """A URL, such as s3://bucket/runs/first, that sealed shards are copied to while the run goes on."""
    mirror_timeout_s: Annotated[Seconds, operational] = 300.0
    """How long a run waits at its end for copies that are under way; what is missing then is copied by the
    next run."""
