"""A run that keeps nothing: the stages of a real run, with outcomes counted and dropped at the end."""

import asyncio
from pathlib import Path

import streamsyn.shingles  # noqa: F401 - for checks, which must not import it in the event loop
from streamsyn.errors import ConfigError
from streamsyn.pipeline.delivery import NoAssembly
from streamsyn.pipeline.preflight import send_opening
from streamsyn.pipeline.producer import Producer
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import early_stop_noted
from streamsyn.pipeline.setup import Fleets, is_examined, own_fleet, worker_pool
from streamsyn.pipeline.stages import Pipeline, ProducerStage, Stages
from streamsyn.pipeline.stop import Stopper
from streamsyn.pipeline.summary import RunSummary
from streamsyn.queues import Backlog, BoundedQueue
from streamsyn.recipes.recipe import Recipe
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import DurableContext, Outcome
from streamsyn.seeds.reader import SeedReader
from streamsyn.sink.completed_keys import Claims
from streamsyn.sink.writer import count_outcome
from streamsyn.telemetry import Counters, traced


class DroppedOutcomes:
    """The sink of a run without a log."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    async def run(self, results: Backlog[Outcome], _durable: BoundedQueue[DurableContext]) -> None:
        """Count outcomes until `results` ends."""
        async for outcome in results:
            count_outcome(self._counters, outcome)
            results.done()


class UnloggedRun:
    """A run without a log. Made outside the event loop, since it looks at the seeds.

    Args:
        request: What is to be run.
        summary: Filled while it goes on.
        scratch: An existing folder for the ids of the seeds that were read.

    Raises:
        ConfigError: The recipe or a source of seeds cannot be used, or the checks need a log.
    """

    def __init__(self, request: RunRequest, summary: RunSummary, scratch: Path) -> None:
        config, given = request.config, request.given
        if is_examined(config.checks):
            raise ConfigError(
                "checks.context_gain, checks.answerable, checks.eval_sets and checks.near_duplicate need the "
                "log: add --with-log, or switch them off with --set"
            )
        self._request, self._summary, self._scratch = request, summary, scratch
        self._recipe: Recipe = load_recipe(config.recipe, config.checks) if given is None else given.recipe
        self._reader: SeedReader | None = None
        if given is not None:
            return
        self._reader = SeedReader(
            config.seeds,
            config.run.seed,
            spool_folder=None,
            takes_documents=self._recipe.takes_documents,
            repeats=request.repeats_seeds,
            skip=request.skips_seeds,
        )
        if not self._reader.has_sources:
            raise ConfigError("no seeds: pass --seeds PATH or set seeds.sources")

    async def run(self) -> None:
        """Run until stopped by `request.control`, a signal, or servers that are gone; the summary says why.

        Raises:
            ConfigError: The servers cannot be used, or refuse what is replayed; or a source of seeds cannot
                be read.
        """
        request, summary = self._request, self._summary
        stopper = Stopper()
        with (
            early_stop_noted(summary),
            traced(request.tracer),
            stopper.stopping(signals=request.handles_signals),
            request.control.of(stopper),
        ):
            async with own_fleet(request, stopper) as fleet:
                summary.servers, summary.timings = fleet.metrics, fleet.timings
                await fleet.ask_models()
                if request.given is not None:
                    await send_opening(request.given, request.config, fleet)
                claims = await asyncio.to_thread(Claims, None, self._scratch / "claims.sqlite")
                try:
                    pipeline = stopper.pipeline = self._pipeline(Fleets(fleet, None), stopper, claims)
                    summary.queues = lambda: pipeline.queues
                    request.on_begun()
                    await pipeline.run()
                finally:
                    await asyncio.to_thread(claims.close)

    def _producer(self, claims: Claims) -> ProducerStage:
        if self._request.given is not None:
            return self._request.given.producer()
        assert self._reader is not None, "without given work there are seeds"
        config = self._request.config
        return Producer(self._reader, claims, config, self._summary.counters, self._recipe.group)

    def _pipeline(self, fleets: Fleets, stopper: Stopper, claims: Claims) -> Pipeline:
        config, counters = self._request.config, self._summary.counters
        producer, arrivals = self._producer(claims), self._request.arrivals
        if arrivals is not None:
            producer = arrivals.after(producer)
        workers = worker_pool(self._request, self._recipe, fleets, stopper, self._summary, journal=None)
        stages = Stages(producer, workers, DroppedOutcomes(counters), NoAssembly())
        backlog = config.run.queue_size + config.sink.sync_rows
        return Pipeline(stages, config.run.queue_size, backlog, config.run.drain_timeout_s)
