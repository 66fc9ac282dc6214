"""The log of a run directory as of one moment, assembled again with the run's settings or with others, as
rows of an export: a sample, and the scores of its relevant context.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import pyarrow

from streamsyn.assembly.assembler import Assembler, AssemblyResources, with_templates
from streamsyn.assembly.window import Passage
from streamsyn.config.loading import Config, load
from streamsyn.config.sections import AssemblySection
from streamsyn.errors import ConfigError, SinkError
from streamsyn.export.export_request import ExportRequest, ExportSummary
from streamsyn.records import Sample
from streamsyn.scoring.sidecar import with_scores
from streamsyn.sink.rundir import read_run_json, saved_config
from streamsyn.sink.snapshot import Part, Snapshot, holding_rejects

Row: TypeAlias = dict[str, Any]

SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("seed_id", pyarrow.string()),
        ("task", pyarrow.string()),
        ("instruction", pyarrow.string()),
        (
            "messages",
            pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])),
        ),
        ("n_tokens", pyarrow.int64()),
        ("target_tokens", pyarrow.int64()),
        ("context_seqs", pyarrow.list_(pyarrow.int64())),
        ("relevant_index", pyarrow.int64()),
        ("epoch", pyarrow.int64()),
        ("model", pyarrow.string()),
        ("context_gain", pyarrow.float64()),
        ("answer_score", pyarrow.float64()),
        ("closed_book_score", pyarrow.float64()),
        ("flags", pyarrow.list_(pyarrow.string())),
    ]
)
"""The columns, in this order in every format."""

SCORES = ("context_gain", "answer_score", "closed_book_score")
"""Columns with scores of the relevant context; null where they were not measured."""


def context_fields(context: Row) -> Row:
    """Return the fields that a sample's row takes from the log row of its relevant context."""
    checks = context.get("checks") or {}
    fields: Row = {"model": context.get("model")}
    fields.update({name: checks.get(name) for name in SCORES})
    fields["flags"] = list(checks.get("flags") or ())
    return fields


def row_of(sample: Sample, epoch: int, fields: Row) -> Row:
    """Return the row of a sample; `fields` are the `context_fields` of its relevant context."""
    more = {"epoch": epoch, **fields}
    # Not `asdict`, which copies the lists.
    return {name: more[name] if name in more else getattr(sample, name) for name in SCHEMA.names}


def row_bytes(row: Row) -> int:
    """Return the approximate size of a row: the bytes of its texts, and a constant for the rest."""
    return 256 + sum(_bytes(message["content"]) for message in row["messages"]) + 8 * len(row["context_seqs"])


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


_BATCH = 64
"""Contexts read at a time."""
_PRUNE_INTERVAL = 1024
"""Contexts after which the fields of those that left the window are dropped."""


@contextmanager
def open_log(request: ExportRequest, summary: ExportSummary) -> Iterator["LogReader"]:
    """Open the log of a run; its templates are in temporary files until the block ends."""
    with TemporaryDirectory() as folder:
        yield LogReader(request, summary, Path(folder))


class LogReader:
    """Reads contexts and yields rows of samples.

    Args:
        request: The run, and how to assemble it.
        summary: Updated while the log is read.
        folder: Where the run's templates are saved; needed as long as the reader is used.

    Raises:
        ConfigError: The directory is not a run directory, or a setting cannot be used.
        SinkError: The manifest is damaged.
    """

    def __init__(self, request: ExportRequest, summary: ExportSummary, folder: Path) -> None:
        self._request = request
        self._summary = summary
        run_config, run = saved_config(request.root), read_run_json(request.root)
        if run_config is None or run is None:
            raise ConfigError(f"{request.root} is not a run directory: it has no run.json")
        self.run = run
        """The content of run.json."""
        self.run_config = run_config
        """The configuration of the run."""
        self.config = _overridden(
            run_config, with_templates(run_config.assembly, "assembly", run["fingerprint"], folder), request
        )
        """The same with the settings of this export."""
        self._resources = AssemblyResources(self.config.assembly)
        self._snapshot = Snapshot(request.root)
        self._manifest = self._snapshot.manifest
        self.is_final = self._manifest.final is not None and not any(
            part.sealed is None for part in self._snapshot.parts["contexts"]
        )
        """Whether the run was finished."""
        self.contexts_by_model: dict[str, int] = {}
        self._fields: dict[str, tuple[int, Row]] = {}
        """Seq and row fields of the contexts that have no sample yet, by id."""

    @property
    def changed(self) -> list[str]:
        """What shapes samples and differs from the run, other than the settings of this export."""
        then, now = self.run["fingerprint"], self._resources.fingerprint()
        has_run_settings = not self._request.settings and self._request.config is None
        keys = now if has_run_settings else {"assembly.prompts"} & now.keys()
        changed = sorted(key for key in keys if key in then and then[key] != now[key])
        if has_run_settings and "assembly.max_similarity" not in then:
            changed.append("the version of streamsyn, which chooses distractors differently")
        return changed

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all epochs in the order of the log."""
        first = self.config.assembly.epoch
        for epoch in range(first, first + self._request.epochs):
            resources = self._resources
            if epoch != first:
                resources = AssemblyResources(self.config.assembly.model_copy(update={"epoch": epoch}))
            assembler = resources.assembler(self.config.run.seed)
            for sample in self._samples(assembler, is_first=epoch == first):
                _, fields = self._fields.pop(sample.id)
                yield row_of(sample, epoch, fields)
            self._fields.clear()
            self._summary.left_out.update(assembler.left_out)

    def rejects(self) -> Iterator[Row]:
        """Yield the rows of rejects that hold."""
        return holding_rejects(self._snapshot)

    def _samples(self, assembler: Assembler, *, is_first: bool) -> Iterator[Sample]:
        flushes = set(self._manifest.flushes)
        contexts = self._contexts()
        while rows := list(islice(contexts, _BATCH)):
            passages = [*map(Passage.of_row, rows)]
            assembler.prepare(passages)
            for row, passage in zip(rows, passages, strict=True):
                if assembler.consumed in flushes:
                    yield from (one.sample() for one in assembler.flush())
                if is_first:
                    model = str(row.get("model"))
                    self.contexts_by_model[model] = self.contexts_by_model.get(model, 0) + 1
                self._summary.contexts += 1
                self._fields[row["id"]] = row["seq"], context_fields(row)
                yield from (one.sample() for one in assembler.add(passage))
                if assembler.consumed % _PRUNE_INTERVAL == 0:
                    self._prune(assembler.state().window_start)
        if assembler.consumed in flushes or self._request.flush:
            yield from (one.sample() for one in assembler.flush())
        state = assembler.state()
        self._summary.waiting = len(dict([*state.pending, *state.pending_any]))

    def _prune(self, window_start: int) -> None:
        """Drop the fields of contexts that get no sample: those that have left the window."""
        for context, (seq, _) in list(self._fields.items()):
            if seq >= window_start:
                return
            del self._fields[context]

    def _contexts(self) -> Iterator[Row]:
        next_seq = 0
        for part in self._snapshot.parts["contexts"]:
            for row in with_scores(self._request.root, part.rows()):
                if row.get("seq") != next_seq:
                    raise self._unreadable(part, next_seq)
                yield row
                next_seq += 1
            if part.sealed is not None and next_seq != part.sealed.last_seq + 1:
                raise self._unreadable(part, next_seq)

    def _unreadable(self, part: Part, seq: int) -> SinkError:
        return SinkError(
            f"{self._request.root / part.name}: row {seq} cannot be read; `streamsyn verify` says why"
        )


def _overridden(saved: Config, assembly: AssemblySection, request: ExportRequest) -> Config:
    """Return the run's configuration with the export's settings in its section `assembly`."""
    sections = saved.model_copy(update={"assembly": assembly}).model_dump(exclude_none=True)
    overrides = list(sections.items())
    if request.config is not None:
        given = load(request.config).assembly.model_dump(exclude_unset=True)
        overrides += [(f"assembly.{key}", value) for key, value in given.items()]
    for key, value in request.settings:
        if not key.startswith("assembly."):
            raise ConfigError(
                f"--set {key}: an export can only set keys of assembly; the run has fixed the other sections"
            )
        overrides.append((key, value))
    return load(None, overrides)
