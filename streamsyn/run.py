"""One run, from an open directory to its end: sets the stages up, runs them, closes the log."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import structlog

from streamsyn.assembly.assembler import Assembler
from streamsyn.assembly.prompts import SamplePrompts
from streamsyn.assembly.stage import AssemblyStage, NoAssembly
from streamsyn.config import Config, fingerprint
from streamsyn.errors import ConfigError, StoppedEarly, root_cause
from streamsyn.pipeline import Pipeline, Stages
from streamsyn.pool import WorkerPool
from streamsyn.producer import Producer
from streamsyn.progress import Progress, reporting
from streamsyn.recipes.load import load_recipe
from streamsyn.recipes.recipe import Recipe
from streamsyn.records import Sample
from streamsyn.sections import ServerSection
from streamsyn.seeds.reader import SeedReader
from streamsyn.sglang.fleet import Fleet, open_fleet
from streamsyn.sglang.roster import Connect
from streamsyn.sglang.spec import specs
from streamsyn.sink.log import encode_row
from streamsyn.sink.rundir import RunDirectory
from streamsyn.sink.runlog import RunLog
from streamsyn.sink.writer import OutcomeWriter
from streamsyn.stdout import SampleStream
from streamsyn.stopper import Stopper
from streamsyn.telemetry import Counters
from streamsyn.workers import Worker

log = structlog.get_logger()


@dataclass(slots=True, kw_only=True)
class RunRequest:
    """What is to be run.

    Attributes:
        config: The resolved configuration.
        out: The run directory.
        environ: Holds the servers' keys.
        connect: What carries requests to servers; None is HTTP.
        runner: Runs the event loop; another one for a simulation in virtual time.
        draw: For jitter; a seeded one for a simulation that is to be repeated.
        stream: Where samples go besides the log, if anywhere.
        launch: A model to start a server for; None uses `config.fleet.servers`.
        launch_python: The interpreter that has sglang.
        launch_args: More flags for the server.
        show_progress: Draw progress on stderr when it is a terminal.
    """

    config: Config
    out: Path
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    connect: Connect | None = None
    runner: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run
    draw: Random | None = None
    stream: SampleStream | None = None
    launch: str | None = None
    launch_python: Path | None = None
    launch_args: Sequence[str] = ()
    show_progress: bool = True


@dataclass(slots=True)
class RunSummary:
    """What came of a run; totals are of the directory, counters of this process."""

    out: Path
    counters: Counters
    stopped: str | None = None
    contexts: int = 0
    rejects: int = 0
    samples: int = 0
    servers: Callable[[], list[dict[str, Any]]] = list
    """What there is to say of each server."""

    @property
    def reject_fraction(self) -> float:
        """Share of rejects among all outcomes in the directory."""
        return self.rejects / max(1, self.contexts + self.rejects)


def run(request: RunRequest, summary: RunSummary | None = None) -> RunSummary:
    """Run until every seed has an outcome, or until stopped; the summary says which.

    Args:
        request: What is to be run.
        summary: One to fill as the run goes on, for whoever looks at it meanwhile.

    Raises:
        ConfigError: Something the user gave cannot be used; nothing is lost.
        SinkError: The log cannot be written; the directory resumes.
        LaunchError: The server to be started did not come up.
    """
    recipe = load_recipe(request.config.recipe, request.config.checks)
    prompts = SamplePrompts(request.config.assembly)
    shaping = {**fingerprint(request.config), **recipe.fingerprint(), **prompts.fingerprint()}
    if request.stream is not None and not request.config.assembly.write:
        raise ConfigError("--stdout prints samples, and assembly.write = false makes none")
    if request.launch is None:
        specs(request.config.fleet)
    reader = SeedReader(request.config.seeds, request.config.run.seed, request.out / "spool")
    if not reader.has_sources:
        raise ConfigError("no seeds: pass --seeds PATH or set seeds.sources")
    summary = summary or RunSummary(request.out, Counters())
    directory = RunDirectory(request.out)
    try:
        directory.check(shaping, fingerprint(Config()))
        run_log = RunLog(request.out, request.config.sink)
        with _closing(run_log):
            parts = _Parts(request, directory, run_log, reader, recipe, prompts, shaping, summary)
            _spare_the_collector()
            try:
                with _metrics(parts):
                    request.runner(_run(parts))
            except (StoppedEarly, BaseExceptionGroup) as raised:
                cause = root_cause(raised)
                if not isinstance(cause, StoppedEarly):
                    raise cause from None
                summary.stopped = str(cause)
        summary.contexts, summary.rejects = run_log.contexts.rows, run_log.rejects.rows
        summary.samples = run_log.samples.rows
    finally:
        directory.close()
    return summary


@contextmanager
def _closing(run_log: RunLog) -> Iterator[None]:
    """Close the log at the end of the block; an error of the block is the one to tell of."""
    try:
        yield
    except BaseException:
        run_log.close(quietly=True)
        raise
    run_log.close()


def _spare_the_collector() -> None:
    """What is there now stays; most of what comes is freed by counting references."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a run is made of, once its directory is open."""

    request: RunRequest
    directory: RunDirectory
    log: RunLog
    reader: SeedReader
    recipe: Recipe
    prompts: SamplePrompts
    shaping: dict[str, Any]
    summary: RunSummary

    @property
    def counters(self) -> Counters:
        """What this process has done."""
        return self.summary.counters


async def _run(parts: _Parts) -> None:
    config = parts.request.config
    stopper = Stopper()
    with stopper.signals():
        async with _servers(parts.request) as servers, _fleet(parts, servers, stopper) as fleet:
            claims = await asyncio.to_thread(parts.log.claims)
            assembly = _assembly(parts)
            try:
                stages = Stages(
                    producer=Producer(parts.reader, claims, config, parts.counters, parts.recipe.group),
                    workers=_workers(parts, fleet),
                    sink=OutcomeWriter(parts.log, config.sink, parts.counters),
                    assembly=assembly,
                )
                stopper.pipeline = Pipeline(stages, config.run.queue_size, config.run.drain_timeout_s)
                progress = Progress(parts.counters, parts.reader, fleet)
                async with reporting(progress, show=parts.request.show_progress):
                    await stopper.pipeline.run()
            finally:
                await asyncio.to_thread(claims.close)
        await asyncio.to_thread(_finish, parts, assembly)


@asynccontextmanager
async def _fleet(
    parts: _Parts, servers: Sequence[str | ServerSection], stopper: "Stopper"
) -> AsyncIterator[Fleet]:
    """The fleet, once it is known which model it serves, and that this is the run's."""
    request = parts.request
    section = request.config.fleet.model_copy(update={"servers": tuple(servers)})
    if request.launch is not None:
        section = section.model_copy(update={"servers_file": None, "servers_dns": None})
    gone = f"no server was usable for fleet.give_up_s = {section.give_up_s:g} s"
    async with open_fleet(
        section, lambda: stopper.cancel(gone), request.environ, request.connect, request.draw
    ) as fleet:
        parts.summary.servers = fleet.figures
        await fleet.ask_models()
        model = ", ".join(sorted(fleet.models))
        shaping = {**parts.shaping, "model": model}
        parts.directory.check(shaping, fingerprint(Config()))
        await asyncio.to_thread(parts.directory.save, _lasting(request.config), shaping)
        log.info("run.started", model=model, servers=len(fleet.servers), out=str(request.out))
        yield fleet


@contextmanager
def _metrics(parts: _Parts) -> Iterator[None]:
    """Serve metrics while the block runs, if that is wanted."""
    listen = parts.request.config.run.metrics_listen
    if listen is None:
        yield
        return
    from streamsyn.metrics import serving_metrics

    def servers() -> list[dict[str, Any]]:  # of a fleet that is not there yet
        return parts.summary.servers()

    with serving_metrics(listen, parts.summary.counters, servers):
        yield


def _lasting(config: Config) -> dict[str, Any]:
    """The configuration as a later run, from wherever it is started, can go on with it."""
    saved = config.model_dump(mode="json")
    for source in saved["seeds"]["sources"]:
        if source["path"] != "-":
            source["path"] = str(Path(source["path"]).absolute())
    recipe, assembly = saved["recipe"], saved["assembly"]
    templates = [recipe, assembly, *recipe["tasks"].values(), *assembly["tasks"].values()]
    paths = [(settings, "template") for settings in templates]
    paths += [(saved["fleet"], key) for key in ("servers_file", "tls_ca", "tls_cert")]
    for settings, key in paths:
        if settings[key] is not None:
            settings[key] = str(Path(settings[key]).absolute())
    return saved


@asynccontextmanager
async def _servers(request: RunRequest) -> AsyncIterator[Sequence[str | ServerSection]]:
    """The servers to ask: those of the configuration, or one started for this run."""
    if request.launch is None:
        yield request.config.fleet.servers
        return
    from streamsyn.sglang.launch import launched

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


def _workers(parts: _Parts, fleet: Fleet) -> WorkerPool:
    draining = asyncio.Event()

    def drain() -> None:
        draining.set()
        fleet.drain()

    pool = WorkerPool(
        lambda: Worker(parts.recipe, fleet, parts.log.journal, draining.is_set),
        size=lambda: fleet.capacity + fleet.capacity // 8 + 1,  # so that none waits for a worker
        max_consecutive_bugs=parts.request.config.run.max_consecutive_bugs,
        on_drain=drain,
        on_idle=fleet.tail,
    )
    fleet.on_room(pool.grow)
    return pool


def _assembly(parts: _Parts) -> AssemblyStage | NoAssembly:
    config = parts.request.config
    if not config.assembly.write:
        return NoAssembly()
    return AssemblyStage(
        Assembler(config.assembly, config.run.seed, parts.prompts),
        parts.log,
        _Outlet(parts.log, parts.request.stream, parts.counters),
        logged=parts.log.contexts.rows,
        delivered=parts.log.samples.rows,
        flushes=parts.log.manifest.flushes,
    )


def _finish(parts: _Parts, assembly: AssemblyStage | NoAssembly) -> None:
    """Every seed has its outcome: seal the log, and make the samples that still waited."""
    parts.log.seal_outcomes()
    assembly.finish()
    parts.log.finish()


class _Outlet:
    """Gives samples to whoever reads our stdout, then records them: none is skipped, whatever happens."""

    def __init__(self, run_log: RunLog, stream: SampleStream | None, counters: Counters) -> None:
        self._samples = run_log.samples
        self._stream = stream
        self._counters = counters

    def deliver(self, samples: Sequence[Sample]) -> None:
        if self._stream is not None:
            numbered = enumerate(samples, self._samples.rows)
            self._stream.write(encode_row(seq, sample) for seq, sample in numbered)
        self._samples.append(samples)
        self._counters.samples += len(samples)

    def stop(self) -> None:
        if self._stream is not None:
            self._stream.stop()
