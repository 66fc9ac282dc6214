"""One run on one page: check, open the directory and the log, set up the stages, run them, seal, deliver.

    seeds -> producer -> [work] -> workers -> [results] -> sink -> [durable] -> assembly -> samples

Each name in brackets is a queue, closed by the stage that puts. A slow stage fills the queue before it, so
the stage before that waits: back to the producer, which stops reading. Only `results` takes every item at
once, so that what is answered is written; while it is full, workers begin no drafts.
"""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from streamsyn.assembly.resources import AssemblyResources
from streamsyn.background import in_threads
from streamsyn.config.fingerprint import fingerprint
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError, SinkError, StoppedEarly, root_cause
from streamsyn.fleet.server_spec import server_specs
from streamsyn.io.process_files import temporary_files_near
from streamsyn.pipeline.delivery import AssemblyStage, NoAssembly
from streamsyn.pipeline.preflight import preflight
from streamsyn.pipeline.progress import Progress, reporting
from streamsyn.pipeline.reopened import may_change
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.setup import (
    Parts,
    make_assembly,
    make_producer,
    make_sink,
    make_workers,
    metrics_served,
    open_fleets,
    record_fingerprint,
    traces_exported,
)
from streamsyn.pipeline.stages import Pipeline, Stages
from streamsyn.pipeline.stop import Stopper
from streamsyn.pipeline.summary import RunSummary
from streamsyn.plain_text import without_userinfo
from streamsyn.recipes.recipe import Recipe
from streamsyn.recipes.registry import load_recipe
from streamsyn.seeds.reader import SeedReader
from streamsyn.sink.epoch import Epoch
from streamsyn.sink.log import RunLog
from streamsyn.sink.mirror import mirrored
from streamsyn.sink.mirror_restore import restore
from streamsyn.sink.rundir import RunDirectory, refuse_different
from streamsyn.telemetry import Counters, traced


def run(request: RunRequest, summary: RunSummary | None = None) -> RunSummary:
    """Run until every seed has an outcome, or until stopped; `RunSummary.stopped` has the reason.

    For a process that does nothing else: it handles signals, and has the garbage collector run rarely.

    Args:
        request: What is to be run.
        summary: A summary to fill while the run goes on, for a caller who watches it.

    Raises:
        ConfigError: A setting, a source of seeds or the directory cannot be used; nothing is lost.
        SinkError: The log cannot be written; the directory can be resumed.
        LaunchError: The server to be launched did not come up.
    """
    summary = summary or RunSummary(request.out, Counters())
    with (
        _opened(request, summary) as parts,
        garbage_collected_rarely(),
        early_stop_noted(summary),
        metrics_served(parts),
    ):
        request.runner(_traced_run(parts))
    return summary


async def run_in_loop(request: RunRequest, summary: RunSummary | None = None) -> RunSummary:
    """Run as `run` does, in the event loop of the caller, beside whatever else goes on there.

    Nothing blocks the loop. A cancelled run stops at once; its directory is closed before this returns, and
    can be resumed.

    Args:
        request: What is to be run; its `runner` is not used.
        summary: A summary to fill while the run goes on.

    Raises:
        ConfigError, SinkError, LaunchError: As `run`.
    """
    summary = summary or RunSummary(request.out, Counters())
    async with in_threads(_opened(request, summary)) as parts:
        with early_stop_noted(summary):
            async with in_threads(metrics_served(parts)):
                await _traced_run(parts)
    return summary


@contextmanager
def _opened(request: RunRequest, summary: RunSummary) -> Iterator[Parts]:
    """Check the request, and open the directory and the log for the block; then complete the summary."""
    temporary_files_near(request.out)
    given, config = request.given, request.config
    recipe = load_recipe(config.recipe, config.checks) if given is None else given.recipe
    resources = AssemblyResources(config.assembly)
    shaping = {**fingerprint(config), **recipe.fingerprint(), **resources.fingerprint()}
    reader = _check(request, recipe)
    summary.recipe = config.recipe
    directory = RunDirectory(request.out, take_over=request.take_over)
    try:
        if config.sink.mirror and request.inbox is None:  # what was submitted is not in the mirror
            _restore(request, directory, shaping)
        reader.move_ids(directory.epoch.database("ids.sqlite"))
        may_differ = may_change(request.out) if request.retry else None
        directory.check(shaping, fingerprint(Config()), may_differ)
        with _open_log(request, directory.epoch) as run_log:
            summary.in_log = run_log.counts
            yield Parts(request, directory, run_log, reader, recipe, resources, shaping, summary)
            in_log = run_log.counts()
            summary.contexts, summary.rejects = in_log["contexts"], in_log["rejects"]
            summary.samples = in_log["samples"]
            summary.notes = list(reader.notes())
    except SinkError:
        directory.epoch.check()  # a newer process moves files away from under this one
        raise
    finally:
        if request.stream is not None:
            request.stream.leave()
        directory.close()


@contextmanager
def early_stop_noted(summary: RunSummary) -> Iterator[None]:
    """Note in the summary why the block stopped early; of several errors, raise the one to report."""
    try:
        yield
    except (StoppedEarly, BaseExceptionGroup) as raised:
        cause = root_cause(raised)
        if not isinstance(cause, StoppedEarly):
            raise cause from None
        summary.stopped = str(cause)


async def _traced_run(parts: Parts) -> None:
    request = parts.request
    collector = None if request.tracer is not None else request.config.run.traces
    async with traces_exported(collector) as tracer:
        with traced(request.tracer or tracer):
            await _run(parts)


async def _run(parts: Parts) -> None:
    """Everything that runs on the event loop: connect, set up the stages, run them, seal the log."""
    config, supervisor, control = parts.request.config, parts.request.supervisor, parts.request.control
    stopper = Stopper(None if supervisor is None else supervisor.end)
    # The first signal drains the pipeline, the second cancels it.
    with (
        _signal_noted(parts.summary, stopper),
        stopper.stopping(signals=parts.request.handles_signals),
        control.of(stopper),
    ):
        async with open_fleets(parts, stopper) as fleets:
            async with asyncio.TaskGroup() as group:
                # It takes a while, with numpy: not in the event loop, nor while requests are in flight.
                needed = "streamsyn.assembly.assembler" if config.assembly.write else "streamsyn.shingles"
                group.create_task(asyncio.to_thread(import_module, needed), name="import-later-stages")
                await preflight(parts, fleets.writing)
            await record_fingerprint(parts, fleets)
            parts.request.on_begun()
            claims = await asyncio.to_thread(parts.log.claims)
            assembly = make_assembly(parts)
            try:
                stages = Stages(
                    producer=make_producer(parts, claims),
                    workers=make_workers(parts, fleets, stopper),
                    sink=make_sink(parts, fleets),
                    assembly=assembly,
                )
                # A sync begins at `sync_rows`, and more drafts may end while it runs.
                queue_size, backlog = config.run.queue_size, config.run.queue_size + config.sink.sync_rows
                stopper.pipeline = Pipeline(stages, queue_size, backlog, config.run.drain_timeout_s)
                if supervisor is not None:
                    supervisor.start(stopper.drain)
                progress = Progress(
                    parts.counters,
                    parts.reader,
                    fleets.writing,
                    drain_ends_in_s=lambda: stopper.drain_ends_in_s,
                    training=lambda: "" if supervisor is None else supervisor.last_line,
                )
                parts.summary.progress = progress.figures
                pipeline = stopper.pipeline
                parts.summary.queues = lambda: pipeline.queues
                async with reporting(progress, show=parts.request.show_progress):
                    await stopper.pipeline.run()  # raises StoppedEarly when it leaves work to a later run
            finally:
                await asyncio.to_thread(claims.close)
        await asyncio.to_thread(_finish, parts.log, assembly)


@contextmanager
def _signal_noted(summary: RunSummary, stopper: Stopper) -> Iterator[None]:
    """Note in the summary whether a signal arrived within the block."""
    try:
        yield
    finally:
        summary.interrupted = stopper.signalled


def _finish(run_log: RunLog, assembly: AssemblyStage | NoAssembly) -> None:
    """Every seed has its outcome: seal contexts and rejects, deliver the last samples, seal those."""
    run_log.seal_outcomes()
    assembly.finish()
    run_log.finish()


def _check(request: RunRequest, recipe: Recipe) -> SeedReader:
    """Refuse a request that cannot work, before anything is written; returns the reader of its seeds."""
    config = request.config
    if request.stream is not None and not config.assembly.write:
        raise ConfigError("--stdout prints samples, but assembly.write = false makes none")
    if request.supervisor is not None and not config.assembly.write:
        raise ConfigError("--train trains on samples, but assembly.write = false makes none")
    if config.recipe.use == "chat" and (config.seeds.format != "request" or config.assembly.write):
        raise ConfigError('recipe.use = "chat" needs seeds.format = "request" and assembly.write = false')
    if request.launch is None and request.servers is None:
        are_placed = config.cluster.address is not None or request.placed is not None
        server_specs(config.fleet, may_be_empty=are_placed)
    reader = SeedReader(
        config.seeds,
        config.run.seed,
        request.out / "spool",
        takes_documents=recipe.takes_documents,
        ids=request.out / "index" / "ids.sqlite",
        inbox=request.inbox,
        repeats=request.repeats_seeds,
        skip=request.skips_seeds,
    )
    if not (reader.has_sources or request.retry or request.given):
        raise ConfigError("no seeds: pass --seeds PATH or set seeds.sources")
    return reader


def _restore(request: RunRequest, directory: RunDirectory, shaping: dict[str, Any]) -> None:
    """Have an empty directory go on with the run that its mirror holds, if it has the same fingerprint."""
    url = request.config.sink.mirror or ""

    def refuse(saved: dict[str, Any]) -> None:
        refuse_different(without_userinfo(url), saved, shaping, fingerprint(Config()))

    restore(directory, url, refuse, takes_over=request.take_over)


@contextmanager
def _open_log(request: RunRequest, epoch: Epoch) -> Iterator[RunLog]:
    """The log, mirrored and closed at the end of the block; an error of the block takes precedence."""
    sink = request.config.sink
    with mirrored(request.out, sink, epoch, takes_over=request.take_over) as mirror:
        run_log = RunLog(request.out, sink, request.on_rows, epoch)
        if mirror is not None:
            mirror.follow(run_log)
        try:
            yield run_log
        except BaseException:
            run_log.close(quietly=True)
            raise
        run_log.close()


@contextmanager
def garbage_collected_rarely() -> Iterator[None]:
    """What exists now lives as long as the run; almost all later objects are freed without the collector."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
