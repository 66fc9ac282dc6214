"""The whole flow in one process: real stages, a simulated server, a directory on disk."""

import asyncio
import gzip
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from streamsyn.assembly.assembler import Assembler
from streamsyn.assembly.sample_prompts import SamplePrompts
from streamsyn.config.loading import Config, load
from streamsyn.errors import ConfigError, ReaderGone, SinkError, StoppedEarly, root_cause
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.pipeline.delivery import AssemblyStage, NoAssembly
from streamsyn.pipeline.producer import Producer
from streamsyn.pipeline.stages import Pipeline, Stages
from streamsyn.pipeline.workers import Worker, WorkerPool
from streamsyn.queues import BoundedQueue
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import DurableContext, Outcome, Sample
from streamsyn.seeds.reader import SeedReader
from streamsyn.simulator.app import RunningSimulator, running
from streamsyn.simulator.settings import Fault, Script, SimulatorConfig
from streamsyn.sink import shards
from streamsyn.sink.log import RunLog
from streamsyn.sink.rundir import RunDirectory
from streamsyn.sink.writer import OutcomeWriter
from streamsyn.telemetry import Counters

QUICK: dict[str, Any] = {
    "fleet.max_in_flight": 8,
    "fleet.backoff_base_s": 0.005,
    "sink.sync_interval_s": 0.01,
    "assembly.contexts_per_sample": 2,
}


def lines(number: int, padding: int = 0) -> bytes:
    """So many seeds."""
    return b"".join(
        orjson.dumps(
            {
                "id": f"s{n}",
                "task": "qa",
                "instruction": f"What of {n}? {'x' * padding}",
                "answer": f"It is {n}.",
            }
        )
        + b"\n"
        for n in range(number)
    )


class Outlet:
    """Takes samples into the log, once its gate is open."""

    def __init__(self, log: RunLog) -> None:
        self._log = log
        self.gate = threading.Event()
        self.gate.set()
        self.waits = False
        self.stopped = False

    def deliver(self, samples: Sequence[Sample]) -> None:
        """Record samples."""
        self.waits = not self.gate.is_set()
        assert self.gate.wait(20)
        if self.stopped:
            raise ReaderGone("the reader has gone")
        self._log.samples.append(samples)

    def stop(self) -> None:
        """Let one go that waits."""
        self.stopped = True
        self.gate.set()


class Log(RunLog):
    """A log whose disk is as slow as its gate says, and full after some rows."""

    def __init__(self, root: Path, config: Config) -> None:
        super().__init__(root, config.sink)
        self.gate = threading.Event()
        self.gate.set()
        self.waits = False
        self.sync_gate = threading.Event()
        self.sync_gate.set()
        self.full_at: int | None = None
        self.failure: Exception | None = None

    def append(self, outcomes: Sequence[Outcome]) -> list[tuple[int, Outcome]]:
        """Write, when the disk lets us."""
        self.waits = not self.gate.is_set()
        assert self.gate.wait(20)
        if self.failure is not None:
            raise self.failure
        if self.full_at is not None and self.outcomes >= self.full_at:
            raise SinkError("the disk is full")
        return super().append(outcomes)

    def sync(self) -> None:
        """Sync, when the disk lets us."""
        assert self.sync_gate.wait(20)
        super().sync()


class Bench:
    """What a run is made of, but for the fleet; to be made and closed in a thread."""

    def __init__(self, root: Path, keys: dict[str, Any]) -> None:
        paths = [{"path": str(path)} for path in sorted(root.glob("seeds*"))]
        self.config = load(None, [("seeds.sources", paths), *(QUICK | keys).items()])
        self.out = root / "out"
        self.directory = RunDirectory(self.out)
        self.log = Log(self.out, self.config)
        self.claims = self.log.claims()
        self.counters = Counters()
        self.outlet = Outlet(self.log)
        self.fleet: Fleet
        self.reader = SeedReader(self.config.seeds, 0, self.out / "spool")
        self.sink = OutcomeWriter(self.log, self.config.sink, self.counters)
        section = self.config.assembly
        self.assembly: AssemblyStage | NoAssembly = AssemblyStage(
            lambda: Assembler(section, 0, SamplePrompts(section)),
            self.log,
            self.outlet,
            logged=self.log.contexts.rows,
            delivered=self.log.samples.rows,
            flushes=self.log.manifest.flushes,
        )

    def pipeline(self, fleet: Fleet) -> Pipeline:
        """The stages, wired as `run` wires them."""
        config = self.config
        recipe = load_recipe(config.recipe, config.checks)
        stages = Stages(
            producer=Producer(self.reader, self.claims, config, self.counters),
            workers=WorkerPool(
                lambda: Worker(recipe, fleet), lambda: fleet.capacity, config.run.max_consecutive_bugs
            ),
            sink=self.sink,
            assembly=self.assembly,
        )
        backlog = config.run.queue_size + config.sink.sync_rows
        return Pipeline(stages, config.run.queue_size, backlog, config.run.drain_timeout_s)

    def finish(self) -> None:
        """As `run` does at the end of the seeds."""
        self.log.seal_outcomes()
        self.assembly.finish()
        self.log.finish()

    def close(self) -> None:
        """Leave the directory."""
        self.claims.close()
        self.log.close()
        self.directory.close()


@asynccontextmanager
async def bench(
    root: Path, script: Script = (), latency_ms: float = 0, **keys: Any
) -> AsyncIterator[tuple[Bench, Pipeline, RunningSimulator]]:
    """A bench, its pipeline, and the server that it asks."""
    dotted = {key.replace("__", "."): value for key, value in keys.items()}
    made = await asyncio.to_thread(Bench, root, dotted)
    try:
        async with asyncio.timeout(30):
            async with running(SimulatorConfig(latency_ms=latency_ms), script=script) as server:
                section = made.config.fleet.model_copy(update={"servers": (server.url,)})
                async with open_fleet(section, lambda _: None) as fleet:
                    await fleet.ask_models()
                    made.fleet = fleet
                    yield made, await asyncio.to_thread(made.pipeline, fleet), server
    finally:
        await asyncio.to_thread(made.close)


def rows(root: Path, kind: str) -> list[dict[str, Any]]:
    """What the log holds of a kind."""
    return [row for path in sorted((root / "out" / kind).glob("part-*")) for row in shards.rows(path)]


async def ended(pipeline: Pipeline) -> Exception:
    """The error with which a run ends."""
    try:
        await pipeline.run()
    except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - that is what is asked for
        cause = root_cause(error)
        assert isinstance(cause, Exception)
        return cause
    raise AssertionError("the run went to its end")


async def until(condition: Callable[[], object]) -> None:
    """Return when `condition` holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0)


async def test_a_run_to_its_end(tmp_path: Path) -> None:
    """Each seed has a context and a sample, each bad line a reject; counters and log agree."""
    (tmp_path / "seeds.jsonl").write_bytes(lines(60) + b"no json\n" + lines(3))
    async with bench(tmp_path) as (made, pipeline, server):
        await pipeline.run()
        await asyncio.to_thread(made.finish)
        assert 60 == server.simulation.stats.answered
    contexts, rejects, samples = (rows(tmp_path, kind) for kind in ("contexts", "rejects", "samples"))
    assert sorted(f"s{n}" for n in range(60)) == sorted(row["seed_id"] for row in contexts)
    assert list(range(60)) == [row["seq"] for row in contexts]
    assert [("invalid_json", f"{tmp_path}/seeds.jsonl:61")] == [
        (row["reason"], row["origin"]) for row in rejects
    ]
    assert sorted(row["seed_id"] for row in contexts) == sorted(row["seed_id"] for row in samples)
    counted = made.counters
    assert (64, 61, 3, 60, 1) == (
        counted.seeds_read,
        counted.drafts_read,
        counted.repeated,
        counted.contexts,
        counted.outcomes - counted.contexts,
    )


async def test_drafts_of_a_seed_are_units_of_their_own(tmp_path: Path) -> None:
    """Each ends once, under an id of its own; one may fail and the other not."""
    (tmp_path / "seeds.jsonl").write_bytes(lines(10))
    script = [Fault.REFUSE] * 3
    async with bench(tmp_path, script, recipe__contexts_per_seed=2) as (_, pipeline, _):
        await pipeline.run()
    done = [row["id"] for kind in ("contexts", "rejects") for row in rows(tmp_path, kind)]
    assert sorted(f"s{n}{draft}" for n in range(10) for draft in ("", "#1")) == sorted(done)
    assert 3 == len(rows(tmp_path, "rejects"))


async def test_a_drain_writes_what_is_in_flight(tmp_path: Path) -> None:
    """Nothing new is asked; every answer is in the log; the next run does the rest, and nothing twice."""
    (tmp_path / "seeds.jsonl").write_bytes(lines(120))
    async with bench(tmp_path, latency_ms=10, run__queue_size=8) as (made, pipeline, server):
        async with asyncio.TaskGroup() as group:
            running_it = group.create_task(ended(pipeline))
            await until(lambda: made.counters.contexts >= 10 and server.simulation.stats.in_flight)
            in_flight = server.simulation.stats.in_flight
            asked = server.simulation.stats.requests
            pipeline.drain("stopped by a test")
            pipeline.drain("again")
        assert isinstance(running_it.result(), StoppedEarly)
        assert "stopped by a test" == str(running_it.result())
        assert in_flight > 0
        assert asked <= server.simulation.stats.requests <= asked + made.config.fleet.max_in_flight
        assert server.simulation.stats.answered == made.counters.contexts < 120
        assert 0 == server.simulation.stats.disconnected
        first = made.counters.contexts
    async with bench(tmp_path) as (made, pipeline, _):
        await pipeline.run()
        assert (first, 120 - first) == (made.counters.finished_before, made.counters.contexts)
    done = [row["seed_id"] for row in rows(tmp_path, "contexts")]
    assert sorted(f"s{n}" for n in range(120)) == sorted(done)


async def test_a_drain_that_takes_too_long(tmp_path: Path) -> None:
    """After `run.drain_timeout_s` what is in flight is given up, and aborted at the server."""
    (tmp_path / "seeds.jsonl").write_bytes(lines(30))
    stalling: Script = lambda number, _: Fault.STALL if number > 5 else None  # noqa: E731
    async with bench(tmp_path, stalling, run__drain_timeout_s=0.05) as (made, pipeline, server):
        async with asyncio.TaskGroup() as group:
            running_it = group.create_task(ended(pipeline))
            await until(lambda: made.counters.contexts == 5 and server.simulation.stats.in_flight == 8)
            pipeline.drain("stopped by a test")
        assert "stopped by a test" == str(running_it.result())
        await until(lambda: server.simulation.stats.in_flight == 0)
    assert 5 == len(rows(tmp_path, "contexts"))
    assert [] == rows(tmp_path, "rejects")


async def test_a_drain_with_nothing_left_is_the_end(tmp_path: Path) -> None:
    """A signal that comes when all has been asked does not make the run unfinished."""
    (tmp_path / "seeds.jsonl").write_bytes(lines(4))
    async with bench(tmp_path, latency_ms=300) as (made, pipeline, server), asyncio.TaskGroup() as group:
        running_it = group.create_task(pipeline.run())
        # the first of them has brought the prompt's beginning into the cache
        await until(lambda: made.counters.reading_done and server.simulation.stats.in_flight == 3)
        pipeline.drain("stopped by a test")
        await running_it
    assert 4 == len(rows(tmp_path, "contexts"))


class Behind(NoAssembly):
    """An assembly that is far behind, until it is stopped."""

    def __init__(self) -> None:
        self._stopped = asyncio.Event()

    async def run(self, contexts: BoundedQueue[DurableContext]) -> None:
        """Catch up for ever."""
        await self._stopped.wait()
        async for _ in contexts:
            pass

    def stop(self) -> None:
        """Let go."""
        self._stopped.set()


async def test_a_cancel_leaves_samples_to_be_made(tmp_path: Path) -> None:
    """All seeds have outcomes, but assembly was cut short: the run is not done, and must not be sealed."""
    (tmp_path / "seeds.jsonl").write_bytes(lines(5))
    async with bench(tmp_path) as (made, _, server):
        made.assembly = Behind()
        section = made.config.fleet.model_copy(update={"servers": (server.url,)})
        async with open_fleet(section, lambda _: None) as fleet:
            await fleet.ask_models()
            pipeline = await asyncio.to_thread(made.pipeline, fleet)
            async with asyncio.TaskGroup() as group:
                running_it = group.create_task(ended(pipeline))
                await until(lambda: made.counters.contexts == 5)
                pipeline.cancel("stopped twice")
    assert isinstance(running_it.result(), StoppedEarly)


async def test_a_full_disk_ends_the_run(tmp_path: Path) -> None:
    """With the queues full and requests in flight: it ends, and what was written is there."""
    (tmp_path / "seeds.jsonl").write_bytes(lines(200))
    async with bench(tmp_path, run__queue_size=2) as (made, pipeline, _):
        made.log.full_at = 20
        error = await ended(pipeline)
    assert (SinkError, "the disk is full") == (type(error), str(error))
    assert 20 <= len(rows(tmp_path, "contexts")) < 200


@pytest.mark.parametrize("failure", [SinkError("the disk is full"), ZeroDivisionError("a bug")])
async def test_a_failed_run_does_not_wait_for_a_slow_reader(tmp_path: Path, failure: Exception) -> None:
    """A delivery that waits is ended, and the error that came first is the one that is raised."""
    (tmp_path / "seeds.jsonl").write_bytes(lines(200))
    async with bench(tmp_path, latency_ms=20) as (made, pipeline, _):
        made.outlet.gate.clear()
        running = asyncio.create_task(ended(pipeline))
        await until(lambda: made.outlet.waits)
        made.log.failure = failure
        error = await running
        is_released = made.outlet.stopped
    assert failure is error
    assert is_released


async def test_a_run_that_is_cancelled_from_outside_does_not_wait_for_a_slow_reader(tmp_path: Path) -> None:
    """As by a bug in a task that runs beside the pipeline."""
    (tmp_path / "seeds.jsonl").write_bytes(lines(200))
    async with bench(tmp_path, latency_ms=20) as (made, pipeline, _):
        made.outlet.gate.clear()
        running = asyncio.create_task(pipeline.run())
        await until(lambda: made.outlet.waits)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert made.outlet.stopped


async def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    """The run stops early; outcomes that were on their way are in the log all the same."""
    (tmp_path / "seeds.jsonl").write_bytes(lines(200))
    async with bench(tmp_path, run__queue_size=4, sink__sync_rows=8) as (made, pipeline, server):
        made.outlet.stopped = True
        error = await ended(pipeline)
        answered = sum(one.completions for one in made.fleet.servers)
        assert answered >= server.simulation.stats.answered - 8  # what was in flight
    assert (StoppedEarly, "the reader has gone") == (StoppedEarly, str(error))
    assert isinstance(error, StoppedEarly)
    assert answered == len(rows(tmp_path, "contexts")) < 200


async def test_a_source_that_breaks(tmp_path: Path) -> None:
    """What could be read has outcomes; then the run ends with what is wrong."""
    whole = gzip.compress(lines(3000, padding=50), 1)
    (tmp_path / "seeds.jsonl.gz").write_bytes(whole[: len(whole) // 12])
    async with bench(tmp_path) as (made, pipeline, _):
        error = await ended(pipeline)
        assert made.counters.drafts_read == made.counters.contexts > 0
    assert isinstance(error, ConfigError)
    assert "cannot be read to its end" in str(error)


@pytest.mark.parametrize("slow", ["write", "sync", "assembly"])
async def test_a_slow_stage_stops_the_reading(tmp_path: Path, slow: str) -> None:
    """The backlog is full, no request is in flight any more, and no further seeds are read (G5). But what was
    answered is in the log, unless that itself cannot be written (G4)."""
    (tmp_path / "seeds.jsonl").write_bytes(lines(2000, padding=2000))
    bounds: dict[str, Any] = {"run__queue_size": 4, "sink__sync_rows": 4, "fleet__max_in_flight": 4}
    async with bench(tmp_path, assembly__contexts_per_sample=1, **bounds) as (made, pipeline, server):
        gates = {"write": made.log.gate, "sync": made.log.sync_gate, "assembly": made.outlet.gate}
        gates[slow].clear()
        backlog, bound = pipeline._results, 8
        async with asyncio.TaskGroup() as group:
            running_it = group.create_task(ended(pipeline))
            try:
                if slow == "assembly":
                    await until(lambda: made.outlet.waits and len(pipeline._durable) == 4)
                await until(lambda: len(pipeline._work) == 4 and backlog.not_done >= bound)
                await until(lambda: len(backlog._may_begin._waiters) == 4)  # the workers
                answered, read = server.simulation.stats.answered, made.counters.seeds_read
                if slow != "write":
                    await until(lambda: made.log.outcomes == answered)
                for _ in range(500):
                    await asyncio.sleep(0)
                assert (answered, read) == (server.simulation.stats.answered, made.counters.seeds_read)
                # the backlog, one more for each worker, and what assembly has taken
                assert backlog.not_done <= bound + 4
                assert answered <= bound + 4 + 4 + 64
                assert read <= 500
            finally:
                gates[slow].set()
            await until(lambda: made.counters.contexts > answered)
            pipeline.drain("enough")
        assert isinstance(running_it.result(), StoppedEarly)
