"""The log of a run directory as of one moment, assembled again, with the run's settings or others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from streamsyn.assembly.assembler import Assembler
from streamsyn.assembly.resources import AssemblyResources, with_templates
from streamsyn.assembly.window import Passage
from streamsyn.config.loading import Config, load
from streamsyn.config.sections import AssemblySection
from streamsyn.errors import ConfigError, SinkError
from streamsyn.export.export_request import ExportRequest, ExportSummary
from streamsyn.export.rows import Row, measured, row_of
from streamsyn.records import Sample
from streamsyn.sink.rundir import read_run_json, saved_config
from streamsyn.sink.snapshot import Part, Snapshot

_PRUNED_EVERY = 1024


@contextmanager
def open_source(request: ExportRequest, summary: ExportSummary) -> Iterator["Source"]:
    """A Source, which has its templates in files while the block runs."""
    with TemporaryDirectory() as folder:
        yield Source(request, summary, Path(folder))


class Source:
    """What there is to export.

    Args:
        request: Says of which run, and how.
        summary: Told what was read.
        folder: For templates, which must be there as long as this is used.

    Raises:
        ConfigError: It is no run directory, or settings cannot be used.
        SinkError: The manifest is broken.
    """

    def __init__(self, request: ExportRequest, summary: ExportSummary, folder: Path) -> None:
        self._request = request
        self._summary = summary
        saved, run = saved_config(request.root), read_run_json(request.root)
        if saved is None or run is None:
            raise ConfigError(f"{request.root} is no run directory: it has no run.json")
        self.run = run
        self.saved = saved
        self.config = _overlaid(saved, with_templates(saved.assembly, run["fingerprint"], folder), request)
        self.materials = AssemblyResources(self.config.assembly)
        self._snapshot = Snapshot(request.root)
        self.manifest = self._snapshot.manifest
        self.is_final = self.manifest.final is not None and not any(
            part.sealed is None for part in self._snapshot.parts["contexts"]
        )
        self.contexts_by_model: dict[str, int] = {}
        self._figures: dict[str, tuple[int, Row]] = {}

    @property
    def changed(self) -> list[str]:
        """What shapes samples, has not been set for this export, and is not what the run used."""
        then, now = self.run["fingerprint"], self.materials.fingerprint()
        is_as_the_run = not self._request.settings and self._request.config is None
        keys = now if is_as_the_run else {"assembly.prompts"} & now.keys()
        changed = sorted(key for key in keys if key in then and then[key] != now[key])
        if is_as_the_run and "assembly.max_similarity" not in then:
            changed.append("the version of streamsyn, which chooses otherwise")
        return changed

    @property
    def sealed_contexts(self) -> int:
        """Contexts in sealed shards: about as many as there are."""
        return sum(shard.rows for shard in self.manifest.of_kind("contexts"))

    def rows(self) -> Iterator[Row]:
        """The rows of all epochs, in the order of the log."""
        first = self.config.assembly.epoch
        for epoch in range(first, first + self._request.epochs):
            materials = self.materials
            if epoch != first:
                materials = AssemblyResources(self.config.assembly.model_copy(update={"epoch": epoch}))
            assembler = materials.assembler(self.config.run.seed)
            for sample in self._samples(assembler, is_first=epoch == first):
                _, figures = self._figures.pop(sample.id)
                yield row_of(sample, epoch, figures)
            self._figures.clear()
            self._summary.left_out.update(assembler.left_out)

    def rejects(self) -> Iterator[Row]:
        """Rows of rejects."""
        for part in self._snapshot.parts["rejects"]:
            yield from part.rows()

    def _samples(self, assembler: Assembler, *, is_first: bool) -> Iterator[Sample]:
        flushes = set(self.manifest.flushes)
        for row in self._contexts():
            if assembler.consumed in flushes:
                yield from (one.sample() for one in assembler.flush())
            if is_first:
                model = str(row.get("model"))
                self.contexts_by_model[model] = self.contexts_by_model.get(model, 0) + 1
            self._summary.contexts += 1
            self._figures[row["id"]] = row["seq"], measured(row)
            yield from (one.sample() for one in assembler.add(Passage.of_row(row)))
            if assembler.consumed % _PRUNED_EVERY == 0:
                self._prune(assembler.state().window_start)
        if assembler.consumed in flushes or self._request.flush:
            yield from (one.sample() for one in assembler.flush())
        state = assembler.state()
        self._summary.waiting = len(dict([*state.pending, *state.pending_any]))

    def _prune(self, window_start: int) -> None:
        """Forget contexts that get no sample: those that have left the window."""
        for context, (seq, _) in list(self._figures.items()):
            if seq >= window_start:
                return
            del self._figures[context]

    def _contexts(self) -> Iterator[Row]:
        next_seq = 0
        for part in self._snapshot.parts["contexts"]:
            for row in part.rows():
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


def _overlaid(saved: Config, assembly: AssemblySection, request: ExportRequest) -> Config:
    """The run's configuration, with what was asked for in its section `assembly`."""
    sections = saved.model_copy(update={"assembly": assembly}).model_dump(exclude_none=True)
    overrides = list(sections.items())
    if request.config is not None:
        given = load(request.config).assembly.model_dump(exclude_unset=True)
        overrides += [(f"assembly.{key}", value) for key, value in given.items()]
    for key, value in request.settings:
        if not key.startswith("assembly."):
            raise ConfigError(f"--set {key}: an export can only set keys of assembly; the rest has happened")
        overrides.append((key, value))
    return load(None, overrides)
