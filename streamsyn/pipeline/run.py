"""One run, from an open directory to its end: sets the stages up, runs them, closes the log.

The whole flow of a run on one page.

    seeds -> producer -> [work] -> workers -> [results] -> sink -> [durable] -> assembly -> samples

Each arrow in brackets is a bounded queue, closed by the stage that puts. A slow stage fills the queue
before it, so the one before that waits: back to the producer, which stops reading.
"""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from streamsyn.assembly.resources import AssemblyResources
from streamsyn.assembly.stage import AssemblyStage, NoAssembly
from streamsyn.config.fingerprint import fingerprint
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError, StoppedEarly, root_cause
from streamsyn.fleet.server import server_specs
from streamsyn.pipeline.producer import Producer
from streamsyn.pipeline.progress import Progress, reporting
from streamsyn.pipeline.request import RunRequest, RunSummary
from streamsyn.pipeline.setup import (
    Parts,
    assembly_of,
    examination_of,
    fleet_of,
    metrics_of,
    servers_of,
    settle,
    workers_of,
)
from streamsyn.pipeline.stages import Pipeline, Stages, Stopper
from streamsyn.recipes.registry import load_recipe
from streamsyn.seeds.reader import SeedReader
from streamsyn.sink.log import RunLog
from streamsyn.sink.mirror import mirrored
from streamsyn.sink.rundir import RunDirectory
from streamsyn.sink.writer import OutcomeWriter
from streamsyn.telemetry import Counters

log = structlog.get_logger()


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
    materials = AssemblyResources(request.config.assembly)
    shaping = {**fingerprint(request.config), **recipe.fingerprint(), **materials.fingerprint()}
    if request.stream is not None and not request.config.assembly.write:
        raise ConfigError("--stdout prints samples, and assembly.write = false makes none")
    if request.companion is not None and not request.config.assembly.write:
        raise ConfigError("--train trains on samples, and assembly.write = false makes none")
    if request.launch is None:
        server_specs(request.config.fleet)
    reader = SeedReader(
        request.config.seeds,
        request.config.run.seed,
        request.out / "spool",
        takes_documents=recipe.takes_documents,
    )
    if not reader.has_sources:
        raise ConfigError("no seeds: pass --seeds PATH or set seeds.sources")
    summary = summary or RunSummary(request.out, Counters())
    directory = RunDirectory(request.out)
    try:
        directory.check(shaping, fingerprint(Config()))
        with _opened_log(request) as run_log:
            parts = Parts(request, directory, run_log, reader, recipe, materials, shaping, summary)
            _spare_the_collector()
            try:
                with metrics_of(parts):
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
def _opened_log(request: RunRequest) -> Iterator[RunLog]:
    """The log, closed and mirrored at the end of the block; an error of the block is the one to tell of."""
    with mirrored(request.out, request.config.sink) as mirror:
        run_log = RunLog(request.out, request.config.sink)
        mirror.follow(run_log)
        try:
            yield run_log
        except BaseException:
            run_log.close(quietly=True)
            raise
        run_log.close()


def _spare_the_collector() -> None:
    """What is there now stays; most of what comes is freed by counting references."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


async def _run(parts: Parts) -> None:
    config = parts.request.config
    companion = parts.request.companion
    stopper = Stopper(None if companion is None else companion.end)
    with stopper.signals():
        async with (
            servers_of(parts.request) as servers,
            fleet_of(parts, servers, stopper) as fleet,
            examination_of(parts, fleet, stopper) as examination,
        ):
            await settle(parts, fleet, examination)
            claims = await asyncio.to_thread(parts.log.claims)
            assembly = assembly_of(parts)
            try:
                stages = Stages(
                    producer=Producer(parts.reader, claims, config, parts.counters, parts.recipe.group),
                    workers=workers_of(parts, fleet, examination),
                    sink=OutcomeWriter(parts.log, config.sink, parts.counters),
                    assembly=assembly,
                )
                stopper.pipeline = Pipeline(stages, config.run.queue_size, config.run.drain_timeout_s)
                if companion is not None:
                    companion.start(stopper.drain)
                progress = Progress(parts.counters, parts.reader, fleet)
                async with reporting(progress, show=parts.request.show_progress):
                    await stopper.pipeline.run()
            finally:
                await asyncio.to_thread(claims.close)
        await asyncio.to_thread(_finish, parts, assembly)
    parts.summary.interrupted = stopper.signalled


def _finish(parts: Parts, assembly: AssemblyStage | NoAssembly) -> None:
    """Every seed has its outcome: seal the log, and make the samples that still waited."""
    parts.log.seal_outcomes()
    assembly.finish()
    parts.log.finish()
