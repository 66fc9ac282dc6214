"""From the configuration and an open directory to the stages of a run."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from streamsyn.assembly.resources import AssemblyResources
from streamsyn.assembly.stage import AssemblyStage, NoAssembly
from streamsyn.config.fingerprint import fingerprint, lasting
from streamsyn.config.loading import Config
from streamsyn.config.sections import ChecksSection, ServerSection
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.pipeline.delivery import SampleStream
from streamsyn.pipeline.request import RunRequest, RunSummary
from streamsyn.pipeline.stages import Stopper
from streamsyn.pipeline.workers import Worker, WorkerPool
from streamsyn.recipes.recipe import Recipe
from streamsyn.records import Sample
from streamsyn.seeds.reader import SeedReader
from streamsyn.sink import shards
from streamsyn.sink.log import RunLog, encode_row
from streamsyn.sink.rundir import RunDirectory
from streamsyn.telemetry import Counters

if TYPE_CHECKING:
    from streamsyn.scoring.examination import Examination

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is made of, once its directory is open."""

    request: RunRequest
    directory: RunDirectory
    log: RunLog
    reader: SeedReader
    recipe: Recipe
    materials: AssemblyResources
    shaping: dict[str, Any]
    summary: RunSummary

    @property
    def counters(self) -> Counters:
        """What this process has done."""
        return self.summary.counters


@asynccontextmanager
async def fleet_of(
    parts: Parts, servers: Sequence[str | ServerSection], stopper: Stopper
) -> AsyncIterator[Fleet]:
    """The fleet, once it is known which models it serves."""
    request = parts.request
    section = request.config.fleet.model_copy(update={"servers": tuple(servers)})
    if request.launch is not None:
        section = section.model_copy(update={"servers_file": None, "servers_dns": None})
    gone = f"no server was usable for fleet.give_up_s = {section.give_up_s:g} s"
    async with open_fleet(
        section, lambda: stopper.cancel(gone), request.environ, request.connect, request.rng
    ) as fleet:
        parts.summary.servers = fleet.figures
        await fleet.ask_models()
        yield fleet


@asynccontextmanager
async def examination_of(parts: Parts, fleet: Fleet, stopper: Stopper) -> AsyncIterator["Examination | None"]:
    """What looks at contexts, where that is wanted; only then is any of its code imported."""
    config = parts.request.config
    if not is_examined(config.checks):
        yield None
        return
    from streamsyn.scoring.examination import open_examination

    request = parts.request
    opening = partial(open_fleet, environ=request.environ, connect=request.connect, rng=request.rng)
    gone = f"no server that scores was usable for fleet.give_up_s = {config.fleet.give_up_s:g} s"
    run_log = parts.log
    async with open_examination(
        config,
        request.out,
        lambda first: run_log.read_contexts(first, run_log.contexts.rows),
        fleet,
        lambda section: opening(section, lambda: stopper.cancel(gone)),
        parts.counters,
    ) as examination:
        if examination.fleet is not None and examination.fleet is not fleet:
            parts.summary.servers = partial(_figures, fleet, examination.fleet)
        yield examination


def _figures(writing: Fleet, scoring: Fleet) -> list[dict[str, Any]]:
    """Of the servers of both; one that is in both has two entries, and no two may have one name."""
    writes = writing.figures()
    names = {figures["server"] for figures in writes}
    scores = [
        figures | {"server": f"{figures['server']} (scoring)"} if figures["server"] in names else figures
        for figures in scoring.figures()
    ]
    return writes + scores


async def settle(parts: Parts, fleet: Fleet, examination: "Examination | None") -> None:
    """Make sure that all this is what the directory's run is made of, and put it down there.

    Raises:
        ConfigError: An earlier run into the directory was made of something else.
    """
    request = parts.request
    model = ", ".join(sorted(fleet.models))
    shaping = {**parts.shaping, "model": model, **(examination.shaping if examination else {})}
    await asyncio.to_thread(parts.directory.check, shaping, fingerprint(Config()))
    await asyncio.to_thread(parts.directory.save, lasting(request.config), shaping)
    log.info("run.started", model=model, servers=len(fleet.servers), out=str(request.out))


def is_examined(checks: ChecksSection) -> bool:
    """Whether contexts are looked at once more after the recipe's own checks."""
    return (
        checks.context_gain or checks.answerable or bool(checks.eval_sets) or checks.near_duplicate != "off"
    )


@contextmanager
def metrics_of(parts: Parts) -> Iterator[None]:
    """Serve metrics while the block runs, if that is wanted."""
    listen = parts.request.config.run.metrics_listen
    if listen is None:
        yield
        return
    from streamsyn.pipeline.metrics import serving_metrics

    def servers() -> list[dict[str, Any]]:  # of a fleet that is not there yet
        return parts.summary.servers()

    with serving_metrics(listen, parts.summary.counters, servers):
        yield


@asynccontextmanager
async def servers_of(request: RunRequest) -> AsyncIterator[Sequence[str | ServerSection]]:
    """The servers to ask: those of the configuration, or one started for this run."""
    if request.launch is None:
        yield request.config.fleet.servers
        return
    from streamsyn.fleet.launch import launched

    async with launched(
        request.launch,
        python=request.launch_python,
        log_path=request.out / "sglang.log",
        extra_args=request.launch_args,
        on_wait=_say_waiting,
    ) as server:
        yield [server.url]


def _say_waiting(seconds: float, line: str) -> None:
    if round(seconds) % 10 == 0:
        log.info("sglang.starting", seconds=round(seconds), log=line[-100:])


def workers_of(parts: Parts, fleet: Fleet, examination: "Examination | None") -> WorkerPool:
    """Workers, as many as the fleets have places for."""
    draining = asyncio.Event()
    examiner = examination.examiner if examination is not None else None
    fleets = [fleet]
    if examination is not None and examination.fleet not in (None, fleet):
        fleets.append(examination.fleet)

    def drain() -> None:
        draining.set()
        for each in fleets:
            each.drain()

    def size() -> int:
        capacity = sum(each.capacity for each in fleets)
        return capacity + capacity // 8 + 1  # so that no place waits for a worker

    def tail(left: int, of: int) -> None:
        for each in fleets:
            each.tail(left, of)

    pool = WorkerPool(
        lambda: Worker(parts.recipe, fleet, parts.log.journal, draining.is_set, examiner),
        size=size,
        max_consecutive_bugs=parts.request.config.run.max_consecutive_bugs,
        on_drain=drain,
        on_idle=tail,
    )
    for each in fleets:
        each.on_room(pool.grow)
    return pool


def assembly_of(parts: Parts) -> AssemblyStage | NoAssembly:
    """The stage that makes samples, where they are wanted."""
    config = parts.request.config
    if not config.assembly.write:
        return NoAssembly()
    outlet = _Outlet(parts.log, parts.request.stream, parts.counters)
    return AssemblyStage(
        parts.materials.assembler(config.run.seed),
        parts.log,
        outlet,
        logged=parts.log.contexts.rows,
        delivered=parts.log.samples.rows,
        flushes=parts.log.manifest.flushes,
        replay=outlet.replay if parts.request.replay else None,
    )


class _Outlet:
    """Gives samples to whoever reads our stdout, then records them: none is skipped, whatever happens."""

    def __init__(self, run_log: RunLog, stream: SampleStream | None, counters: Counters) -> None:
        self._log = run_log
        self._samples = run_log.samples
        self._stream = stream
        self._counters = counters

    def replay(self) -> None:
        """Give the reader what earlier runs have delivered: one that was killed may not have got it all."""
        if self._stream is not None:
            self._stream.write(map(shards.line, self._log.read_samples()))

    def deliver(self, samples: Sequence[Sample]) -> None:
        if self._stream is not None:
            numbered = enumerate(samples, self._samples.rows)
            self._stream.write(encode_row(seq, sample) for seq, sample in numbered)
        self._samples.append(samples)
        self._counters.samples += len(samples)

    def stop(self) -> None:
        if self._stream is not None:
            self._stream.stop()
