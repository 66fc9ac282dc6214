"""From the configuration and an open run directory to the servers and the stages of a run."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from streamsyn.assembly.resources import AssemblyResources
from streamsyn.cluster import needing_ray
from streamsyn.config.command_sections import ClusterSection
from streamsyn.config.fingerprint import fingerprint, with_absolute_paths
from streamsyn.config.loading import Config
from streamsyn.config.sections import ChecksSection, FleetSection
from streamsyn.fleet.discovery import PlacedServers
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.fleet.thinking import Thinking
from streamsyn.io.process_files import free_files, raise_limit
from streamsyn.pipeline.delivery import AssemblyStage, NoAssembly, SampleDelivery
from streamsyn.pipeline.producer import Producer
from streamsyn.pipeline.reject_limits import RejectLimits
from streamsyn.pipeline.reopened import Reopened, may_change
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.stages import ProducerStage
from streamsyn.pipeline.stop import Stopper
from streamsyn.pipeline.summary import GOVERNED_BY, RunSummary
from streamsyn.pipeline.workers import Worker, WorkerPool
from streamsyn.recipes.prompt import UnusedText
from streamsyn.recipes.recipe import Recipe
from streamsyn.records import Reject, RejectReason
from streamsyn.seeds.reader import SeedReader
from streamsyn.sink.completed_keys import Claims
from streamsyn.sink.journal import Journal
from streamsyn.sink.log import RunLog
from streamsyn.sink.rundir import RunDirectory, read_run_json
from streamsyn.sink.writer import OutcomeWriter
from streamsyn.telemetry import Counters, Tracer

if TYPE_CHECKING:
    from streamsyn.cluster.placing import Servers as ServersOnCluster
    from streamsyn.scoring.examiner import Examination

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is made of, once its directory and log are open; `shaping` is its fingerprint so far."""

    request: RunRequest
    directory: RunDirectory
    log: RunLog
    reader: SeedReader
    recipe: Recipe
    resources: AssemblyResources
    shaping: dict[str, Any]
    summary: RunSummary

    @property
    def counters(self) -> Counters:
        """What this process has done."""
        return self.summary.counters


@dataclass(frozen=True, slots=True)
class Fleets:
    """The servers of a run: those that write contexts, and the examination of what they wrote, if any.

    The examination may have a fleet of its own, or ask the servers that write.
    """

    writing: Fleet
    examination: "Examination | None"

    def all(self) -> list[Fleet]:
        """The one or two fleets."""
        examination = self.examination
        scoring = None if examination is None else examination.fleet
        return [self.writing] if scoring is None or scoring is self.writing else [self.writing, scoring]


@asynccontextmanager
async def open_fleets(parts: Parts, stopper: Stopper) -> AsyncIterator[Fleets]:
    """Launch a server if one is to be launched, connect to all servers, and ask which models they serve."""
    async with (
        _open_writing(parts, stopper) as writing,
        _open_examination(parts, writing, stopper) as examination,
    ):
        yield Fleets(writing, examination)


@asynccontextmanager
async def _servers(request: RunRequest) -> AsyncIterator[tuple[FleetSection, PlacedServers | None]]:
    """The servers of the configuration, those placed on a cluster, or one launched for this run."""
    section, cluster = request.config.fleet, request.config.cluster
    if request.launch is None and request.placed is None and cluster.address is None:
        yield section, None
        return
    if request.launch is None:
        async with on_cluster(cluster) if request.placed is None else request.placed() as placed:
            # A server that died is not missing for good before another could have started.
            give_up_s = max(section.give_up_s, 2 * cluster.start_timeout_s)
            yield section.model_copy(update={"give_up_s": give_up_s}), placed
        return
    from streamsyn.fleet.launch import launched

    async with launched(
        request.launch,
        python=request.launch_python,
        log_path=request.out / "sglang.log",
        extra_args=request.launch_args,
        on_wait=_log_waiting,
    ) as server:
        alone = {"servers": (server.url,), "servers_file": None, "servers_dns": None}
        yield section.model_copy(update=alone), None


@asynccontextmanager
async def on_cluster(section: ClusterSection, *, waits: bool = True) -> AsyncIterator["ServersOnCluster"]:
    """Servers that Ray places; if it `waits`, one of them is ready.

    Raises:
        ConfigError: Ray is not installed, or no cluster is at the address.
        LaunchError: No server could be started.
    """
    with needing_ray("cluster.address"):
        from streamsyn.cluster.placing import placed
    async with placed(section, waits=waits) as servers:
        yield servers


def _log_waiting(seconds: float, line: str) -> None:
    if round(seconds) % 10 == 0:
        log.info("sglang.starting", seconds=round(seconds), log=line[-100:])


@asynccontextmanager
async def _open_writing(parts: Parts, stopper: Stopper) -> AsyncIterator[Fleet]:
    """The fleet that writes contexts, once the models that it serves are known."""
    request = parts.request
    shared = request.servers
    opening = (
        own_fleet(request, stopper)
        if shared is None
        else shared.fleet(await _with_its_model(request), request.weight, request.priority)
    )
    async with opening as fleet:
        parts.summary.servers, parts.summary.timings = fleet.metrics, fleet.timings
        await fleet.ask_models()
        yield fleet


async def _with_its_model(request: RunRequest) -> FleetSection:
    """The section `fleet`; a run that resumes keeps its model, whatever else the servers serve by now."""
    section = request.config.fleet
    saved = await asyncio.to_thread(read_run_json, request.out)
    model = "" if saved is None else saved["fingerprint"].get("model", "")
    if section.models or section.model is not None or not model or ", " in model:
        return section
    return section.model_copy(update={"model": model})


@asynccontextmanager
async def own_fleet(request: RunRequest, stopper: Stopper) -> AsyncIterator[Fleet]:
    """A fleet of this run alone."""
    async with (
        _servers(request) as (section, placed),
        open_fleet(
            section,
            stopper.cancel,
            request.environ,
            request.connect,
            request.rng,
            _max_sockets(request),
            placed,
        ) as fleet,
    ):
        yield fleet


@asynccontextmanager
async def _open_examination(
    parts: Parts, writing: Fleet, stopper: Stopper
) -> AsyncIterator["Examination | None"]:
    """The examination of contexts, if the configuration has one; its code is imported only then."""
    config = parts.request.config
    if not is_examined(config.checks):
        yield None
        return
    from streamsyn.scoring.examiner import open_examination

    request = parts.request
    opening = partial(
        open_fleet,
        environ=request.environ,
        connect=request.connect,
        rng=request.rng,
        max_sockets=_max_sockets(request),
    )
    run_log = parts.log
    async with open_examination(
        config,
        run_log.epoch.database("duplicates.sqlite"),
        lambda first: run_log.read_contexts(first, run_log.contexts.rows),
        writing,
        lambda section: opening(section, lambda why: stopper.cancel(f"scoring servers: {why}")),
        parts.counters,
    ) as examination:
        if examination.fleet is not None and examination.fleet is not writing:
            parts.summary.servers = partial(_server_metrics, writing, examination.fleet)
        yield examination


def _max_sockets(request: RunRequest) -> int | None:
    """How many connections each fleet can open; None if they need no files."""
    if request.connect is not None:
        return None
    config = request.config
    fleets = 2 if config.scoring.servers and _asks_servers(config.checks) else 1
    return free_files(raise_limit(), inputs=len(config.seeds.sources)) // fleets


def _server_metrics(writing: Fleet, scoring: Fleet) -> list[dict[str, Any]]:
    """The metrics of the servers of both fleets; a server in both gets two entries with different names."""
    writes = writing.metrics()
    names = {figures["server"] for figures in writes}
    scores = [
        figures | {"server": f"{figures['server']} (scoring)"} if figures["server"] in names else figures
        for figures in scoring.metrics()
    ]
    return writes + scores


def is_examined(checks: ChecksSection) -> bool:
    """Whether contexts are examined after the recipe's own checks."""
    return _asks_servers(checks) or bool(checks.eval_sets) or checks.near_duplicate != "off"


def _asks_servers(checks: ChecksSection) -> bool:
    """Whether the examination asks servers."""
    return checks.context_gain or checks.answerable


async def record_fingerprint(parts: Parts, fleets: Fleets) -> None:
    """Check the fingerprint again, now with the servers' models, and write run.json.

    Raises:
        ConfigError: An earlier run into the directory had a different fingerprint.
    """
    request, examination = parts.request, fleets.examination
    model = ", ".join(sorted(fleets.writing.models))
    shaping = {**parts.shaping, "model": model, **(examination.shaping if examination else {})}
    await asyncio.to_thread(_record, parts, shaping)
    log.info("run.started", model=model, servers=len(fleets.writing.servers), out=str(request.out))


def _record(parts: Parts, shaping: dict[str, Any]) -> None:
    request, directory, run_log = parts.request, parts.directory, parts.log
    may_differ = may_change(request.out) if request.retry else None
    directory.check(shaping, fingerprint(Config()), may_differ)
    rows = {"contexts": run_log.contexts.rows, "rejects": run_log.rejects.rows} if request.retry else {}
    directory.save(with_absolute_paths(request.config), shaping, rows)
    # After the settings: a kill in between leaves the rejects as they are, and not asked with old settings.
    if request.retry:
        run_log.add_retry(request.retry)


def make_producer(parts: Parts, claims: Claims) -> ProducerStage:
    """The producer: of the given drafts, or of the seeds, which begins with the rejects of an open retry."""
    request = parts.request
    producer = _producer(parts, claims) if request.given is None else request.given.producer()
    return producer if request.arrivals is None else request.arrivals.after(producer)


def _producer(parts: Parts, claims: Claims) -> Producer:
    reopened = None
    if parts.log.manifest.open_retries:
        reopened = Reopened(parts.log, takes_documents=parts.recipe.takes_documents)
    config, group = parts.request.config, parts.recipe.group
    look = UnusedText(parts.recipe).look
    return Producer(parts.reader, claims, config, parts.counters, group, reopened, look)


def make_workers(parts: Parts, fleets: Fleets, stopper: Stopper) -> WorkerPool:
    """The workers of a run."""
    return worker_pool(parts.request, parts.recipe, fleets, stopper, parts.summary, parts.log.journal)


def worker_pool(
    request: RunRequest,
    recipe: Recipe,
    fleets: Fleets,
    stopper: Stopper,
    summary: RunSummary,
    journal: Journal | None,
) -> WorkerPool:
    """Return the workers of a run.

    Args:
        request: What is to be run.
        recipe: Its recipe.
        fleets: The servers to ask.
        stopper: Stops the run when there are too many rejects.
        summary: Notes that.
        journal: Keeps finished steps of drafts; None without a log.
    """
    draining = asyncio.Event()
    examiner = None if fleets.examination is None else fleets.examination.examiner
    each, thinking, arrivals = fleets.all(), Thinking(request.config.recipe), request.arrivals

    def drain() -> None:
        draining.set()
        for fleet in each:
            fleet.drain()

    def size() -> int:
        if arrivals is not None:
            return arrivals.workers(summary.counters.outcomes)
        capacity = sum(fleet.capacity for fleet in each)
        waiting = sum(fleet.limited for fleet in each)  # their workers need no place
        return capacity + capacity // 8 + 1 + waiting  # so that no place waits for a worker

    def tail(left: int, of: int) -> None:
        for fleet in each:
            fleet.tail(left, of)

    pool = WorkerPool(
        lambda: Worker(recipe, fleets.writing, journal, draining.is_set, examiner, thinking),
        size=size,
        max_consecutive_bugs=request.config.run.max_consecutive_bugs,
        on_drain=drain,
        on_idle=tail,
        limits=_reject_limits(request, summary, stopper),
        shrinks=fleets.writing.is_shared,
    )
    for fleet in each:
        fleet.on_room(pool.grow)
    fleets.writing.know_left(pool.not_begun)
    if arrivals is not None:
        arrivals.on_arrival = pool.grow
    return pool


def _reject_limits(request: RunRequest, summary: RunSummary, stopper: Stopper) -> RejectLimits:
    def stop(why: str, at_once: bool) -> None:
        summary.too_many_rejects = True
        if at_once:
            stopper.cancel(why)
        else:
            stopper.drain(why)

    def advice(reject: Reject) -> str:
        key = GOVERNED_BY.get(RejectReason(reject.reason))
        return f"see {key}" if key else "see the log"

    return RejectLimits(request.config.run.max_reject_fraction, stop, advice, summary.counters)


def make_sink(parts: Parts, fleets: Fleets) -> OutcomeWriter:
    """The stage that writes the log; the examiner learns which contexts are on disk."""
    section = parts.request.config.sink
    if fleets.examination is None:
        return OutcomeWriter(parts.log, section, parts.counters)
    return OutcomeWriter(parts.log, section, parts.counters, fleets.examination.examiner.logged)


def make_assembly(parts: Parts) -> AssemblyStage | NoAssembly:
    """The stage that makes samples, if `assembly.write` is on."""
    config = parts.request.config
    if not config.assembly.write:
        return NoAssembly()
    delivery = SampleDelivery(parts.log, parts.request.stream, parts.counters, parts.request.after_samples)
    return AssemblyStage(
        partial(parts.resources.assembler, config.run.seed),
        parts.log,
        delivery,
        logged=parts.log.contexts.rows,
        delivered=parts.log.samples.rows,
        flushes=parts.log.manifest.flushes,
        replay=delivery.replay if parts.request.replay else None,
    )


@asynccontextmanager
async def traces_exported(collector: str | None) -> AsyncIterator[Tracer | None]:
    """Export traces while the block runs, if there is a collector; the code for it is imported only then."""
    if collector is None:
        yield None
        return

    def imported() -> Callable[[str], AbstractAsyncContextManager[Tracer]]:
        from streamsyn.pipeline.otlp import exporting

        return exporting

    exporting = await asyncio.to_thread(imported)
    async with exporting(collector) as tracer:
        yield tracer


@contextmanager
def metrics_served(parts: Parts) -> Iterator[None]:
    """Serve metrics while the block runs, if `run.metrics_listen` is set."""
    listen = parts.request.config.run.metrics_listen
    if listen is None:
        yield
        return
    from streamsyn.pipeline.prometheus import RunFigures, serving_metrics

    def figures() -> tuple[RunFigures, list[dict[str, Any]]]:  # at each scrape: the fleets are opened later
        summary = parts.summary
        return RunFigures(summary.counters, summary.timings), summary.servers()

    with serving_metrics(listen, figures):
        yield
