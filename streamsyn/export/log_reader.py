"""The log of a run directory as of one moment, assembled again with the run's settings or with others, as
rows of an export: a sample, and the scores of its relevant context.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain, islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import pyarrow

from streamsyn.assembly.assembler import Arrangement
from streamsyn.assembly.resources import AssemblyResources, with_templates
from streamsyn.assembly.window import Passage, give_signatures
from streamsyn.cluster import joined
from streamsyn.config.loading import Config, load
from streamsyn.config.sections import AssemblySection
from streamsyn.errors import ConfigError
from streamsyn.export.choosing import BATCH, Choosing, ContextLog, Ended, chosen_elsewhere, waiting
from streamsyn.export.export_request import ExportRequest, ExportSummary
from streamsyn.records import Sample
from streamsyn.shingles import Signature, signature
from streamsyn.sink.partitions import begun_directories, in_turn, read_partitions, run_directories
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


SMALL_BYTES = 64 * 2**20
"""Size of the contexts below which an export uses one process."""


@contextmanager
def open_log(request: ExportRequest, summary: ExportSummary) -> Iterator["LogReader"]:
    """Open the log of a run; its templates are in temporary files until the block ends.

    Raises:
        ConfigError: As LogReader; or Ray is not installed, or no cluster is at the address.
    """
    with TemporaryDirectory() as folder, joined(request.ray):
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
        roots, [begun, *_] = run_directories(request.root), begun_directories(request.root)
        run_config, run = saved_config(begun), read_run_json(begun)
        if run_config is None or run is None:
            raise ConfigError(f"{begun} is not a run directory: it has no run.json")
        self.run = run
        """The content of run.json; with partitions, that of the first that has begun."""
        self.run_config = run_config
        """The configuration of the run."""
        self.config = _overridden(
            run_config, with_templates(run_config.assembly, "assembly", run["fingerprint"], folder), request
        )
        """The same with the settings of this export."""
        self._resources = AssemblyResources(self.config.assembly)
        self._snapshots = [Snapshot(root) for root in roots]
        self.is_final = all(map(_is_final, self._snapshots))
        """Whether the run was finished."""
        self.partitions = read_partitions(request.root)
        self._log = self._contexts()
        self.contexts_by_model: Counter[str] = Counter()
        self._is_first_epoch = True
        self._fields: dict[int, Row] = {}
        """The row fields of contexts that may have a sample yet, by seq."""

    @property
    def changed(self) -> list[str]:
        """What shapes samples and differs from the run, other than the settings of this export."""
        then, now = self.run["fingerprint"], self._resources.fingerprint()
        has_run_settings = not self._request.settings and self._request.config is None
        keys = now if has_run_settings else {"assembly.prompts"} & now.keys()
        changed = sorted(key for key in keys if key in then and then[key] != now[key])
        if self.partitions is not None:
            changed.append("distractors are of all partitions, not of the sample's own")
        if has_run_settings and "assembly.max_similarity" not in then:
            changed.append("the version of streamsyn, which chooses distractors differently")
        return changed

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all epochs in the order of the log."""
        first = self.config.assembly.epoch
        # Starting processes takes longer than assembling a small log.
        is_small = self._log.bytes < SMALL_BYTES
        for epoch in range(first, first + self._request.epochs):
            section = self.config.assembly.model_copy(update={"epoch": epoch})
            resources = self._resources if epoch == first else AssemblyResources(section)
            self._is_first_epoch = epoch == first
            if self._request.ray is not None:
                chosen = self._chosen_here(resources, self._signed_on_cluster)
            elif self._request.workers == 1 or is_small:
                chosen = self._chosen_here(resources)
            else:
                chosen = self._chosen_elsewhere(resources, section)
            for one in chosen:
                yield row_of(one.sample(), epoch, self._fields[one.relevant.seq])
            self._fields.clear()

    def rejects(self) -> Iterator[Row]:
        """Yield the rows of rejects that hold."""
        return chain.from_iterable(map(holding_rejects, self._snapshots))

    def _contexts(self) -> ContextLog:
        parts = [snapshot.parts["contexts"] for snapshot in self._snapshots]
        if self.partitions is None:
            flushes = frozenset(self._snapshots[0].manifest.flushes)
            return ContextLog(parts, (), flushes, is_flushed=self._request.flush)
        ends = self.partitions.ends("contexts")
        # All partitions had ended at the end of a round: there, as in one run, its last samples were made.
        flushes = frozenset(map(sum, ends))
        return ContextLog(parts, ends, flushes, is_flushed=self._request.flush or self.is_final)

    def _take(self, row: Row) -> None:
        """Count a context, and keep the fields of its sample's row."""
        self._summary.contexts += 1
        if self._is_first_epoch:
            self.contexts_by_model[str(row.get("model"))] += 1
        self._fields[row["seq"]] = context_fields(row)

    def _signed_on_cluster(self) -> Iterator[Signature]:
        """Yield the signatures of all contexts, in the order of the log."""
        from streamsyn.cluster.spread import sign_shards

        def signed(parts: Sequence[Part]) -> Iterator[Signature]:
            yield from sign_shards([part.root / part.path for part in parts if part.sealed is not None])
            for part in parts:
                if part.sealed is None:  # a node may see it without its last rows, or with more
                    yield from (signature(row["context"]) for row in part.rows())

        return (one for _, one in in_turn([*map(signed, self._log.partitions)], self._log.ends))

    def _chosen_here(
        self, resources: AssemblyResources, signed: Callable[[], Iterator[Signature]] | None = None
    ) -> Iterator[Arrangement]:
        """Yield the samples, chosen in this process; `signed` yields the signatures of all contexts."""
        assembler = resources.assembler(self.config.run.seed)
        signatures = signed() if signed is not None and assembler.needs_signatures else None

        def passages() -> Iterator[Passage]:
            rows = self._log.rows()
            while batch := list(islice(rows, BATCH)):
                prepared = [*map(Passage.of_row, batch)]
                if signatures is not None:
                    give_signatures(prepared, list(islice(signatures, len(prepared))))
                assembler.prepare(prepared)
                _drop_below(assembler.window_start, self._fields)
                for row, passage in zip(batch, prepared, strict=True):
                    self._take(row)
                    yield passage

        yield from self._log.arrangements(assembler, passages())
        self._summary.left_out.update(assembler.left_out)
        self._summary.waiting = waiting(assembler)

    def _chosen_elsewhere(
        self, resources: AssemblyResources, section: AssemblySection
    ) -> Iterator[Arrangement]:
        """Yield the same; other processes choose the samples."""
        choosing = Choosing(self._log, section, self.config.run.seed, self._request.workers - 1)
        rows = self._log.rows()
        held: dict[int, Passage] = {}
        read = 0
        with closing(chosen_elsewhere(choosing)) as messages:
            for one in messages:
                for row in islice(rows, one.read - read):
                    self._take(row)
                    held[row["seq"]] = Passage.of_row(row)
                    if len(held) % BATCH == 0:
                        _drop_below(one.window_start, held, self._fields)
                read = one.read
                if isinstance(one, Ended):
                    self._summary.left_out.update(one.left_out)
                    self._summary.waiting = one.waiting
                    return
                pieces = [held[number] if number >= 0 else -1 - number for number in one.pieces]
                yield resources.arrangement(pieces, one.relevant_index, one.target_tokens, one.n_tokens)


def _is_final(snapshot: Snapshot) -> bool:
    return snapshot.manifest.final is not None and not any(
        part.sealed is None for part in snapshot.parts["contexts"]
    )


def _drop_below(first_seq: int, *held: dict[int, Any]) -> None:
    """Delete what belongs to contexts below a seq. The keys are seqs in ascending order."""
    for one in held:
        for seq in list(takewhile(lambda seq: seq < first_seq, one)):
            del one[seq]


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
