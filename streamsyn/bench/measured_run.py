"""One measured run: the stages of a real run under a load that does not end, recorded.

    seeds, again and again -> producer -> [work] -> workers -> fleet -> outcomes: counted and dropped,
                                                                        or, with a log, a whole `pipeline.run`

The load goes on from the warm-up through the measured part without a pause. Then nothing new is begun, and
what is in flight finishes, outside the measured part.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Final

from streamsyn.background import background
from streamsyn.bench.kept_servers import KeptServers
from streamsyn.bench.load import OpenLoop, under_load
from streamsyn.bench.measurement import Load, Measurement, Replayed, ServerCounters
from streamsyn.bench.phases import Phases, steady_state
from streamsyn.bench.recorder import Recorder
from streamsyn.bench.replay import open_replay
from streamsyn.bench.server_counters import open_counters
from streamsyn.bench.unlogged_run import UnloggedRun
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError, root_cause
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import garbage_collected_rarely, run_in_loop
from streamsyn.pipeline.summary import RunSummary
from streamsyn.seeds.reader import REPEATED
from streamsyn.simulator import costs
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.telemetry import Counters

_TELL_EVERY_S: Final = 10.0
"""Real seconds between two reports of progress."""
_MEASURED = "measured"
"""Why a run is stopped at the end of the measured part."""
_NO_LIMIT_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class RunToMeasure:
    """What is to be measured.

    Attributes:
        config: The resolved configuration: recipe, checks, seeds, servers.
        load: The load.
        limit_s: Longest warm-up and measured part together; virtual seconds in a simulation.
        gpus: GPUs of the fleet; None for one a server.
        folder: Where the directory of a run with a log is made, and deleted at the end. None: where the
            system has temporary files.
        environ: The environment, with the servers' keys.
        simulated: Makes simulated servers, which run in this process in virtual time; None for real ones.
        kept: Servers on a cluster that other measured runs use, too; None places those of `config.cluster`.
        replay: A run directory whose requests are sent, once, in place of those for the seeds.
        once: Take each seed once, so that the run ends by itself; else the seeds are begun again.
        skip: Seeds to leave out at the beginning: prompts that the servers may have in their caches.
        seed: Random seed of arrivals and jitter.
        on_phase: Called with what the run is doing, when that changes, and with its progress.
        handles_signals: Whether a signal ends the run; only in the main thread of a process.
    """

    config: Config
    load: Load
    limit_s: float = 900.0
    gpus: int | None = None
    folder: Path | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    simulated: Callable[[], InProcessServers] | None = None
    kept: KeptServers | None = None
    replay: Path | None = None
    once: bool = False
    skip: int = 0
    seed: int = 0
    on_phase: Callable[[str], None] = lambda _: None
    handles_signals: bool = True


def measure(asked: RunToMeasure) -> Measurement:
    """Run until the measured part is over, or until stopped; `Measurement.stopped` has the reason.

    Raises:
        ConfigError: A setting or a source of seeds cannot be used.
        SinkError: The log of a run with a log cannot be written.
    """
    if any(source.path == "-" for source in asked.config.seeds.sources):
        raise ConfigError("--seeds -: stdin cannot be read again when the seeds run out; give a file")
    fleet = asked.config.fleet
    placed = asked.config.cluster.address is not None
    if not (fleet.servers or fleet.servers_file or fleet.servers_dns or placed):
        raise ConfigError("no server: pass --server URL, set fleet.servers, or simulate some with --simulate")
    scratch_in = asked.folder if asked.load.with_log else None
    with (
        tempfile.TemporaryDirectory(prefix="streamsyn-bench-", dir=scratch_in) as scratch,
        garbage_collected_rarely(),
    ):
        run = _MeasuredRun(asked, Path(scratch))
        try:
            if run.servers is not None:
                run.servers.run(run.run())
            else:
                (asyncio.run if asked.kept is None else asked.kept.runner.run)(run.run())
        except BaseExceptionGroup as errors:
            raise root_cause(errors) from None
    return run.measurement()


class _MeasuredRun:
    """The state of one measured run."""

    def __init__(self, asked: RunToMeasure, scratch: Path) -> None:
        self.servers = None if asked.simulated is None else asked.simulated()
        self._asked = asked
        self._replay = None if asked.replay is None else open_replay(asked.replay)
        config = asked.config
        if self._replay is not None:  # the run's, but for the servers and the disk
            of_run = self._replay.config
            seeds = of_run.seeds.model_copy(update={"sources": ()})  # the drafts are given
            kept = {"fleet": config.fleet, "run": config.run, "sink": config.sink, "seeds": seeds}
            config = of_run.model_copy(update=kept)
        gives_up_s = min(config.fleet.give_up_s, asked.limit_s)
        config = config.model_copy(
            update={"fleet": config.fleet.model_copy(update={"give_up_s": gives_up_s})}
        )
        if self.servers is not None:  # virtual time costs nothing, and each draft shall have its outcome
            config = config.model_copy(
                update={"run": config.run.model_copy(update={"drain_timeout_s": _NO_LIMIT_S})}
            )
        self._has_end = self._replay is not None or asked.once
        out, rng = scratch / "run", Random(asked.seed)
        rate, queue_size = asked.load.rate, config.run.queue_size
        self._summary = RunSummary(out, Counters())
        self._begun = asyncio.Event()
        self._phases = Phases(asked.load, asked.limit_s, has_end=self._has_end)
        self._ended_at = 0.0
        self._told_at = time.monotonic()
        self._warnings: list[str] = []
        self._counters: list[ServerCounters] = []
        self._started_at = time.time()
        self._recorder: Recorder
        self._request = RunRequest(
            config=under_load(config, asked.load, once=asked.once),
            out=out,
            environ=asked.environ,
            connect=None if self.servers is None else self.servers.connect,
            rng=rng,
            show_progress=False,
            preflight=False,
            handles_signals=asked.handles_signals,
            repeats_seeds=not asked.once,
            skips_seeds=asked.skip,
            arrivals=None if rate is None else OpenLoop(rate, rng, queue_size),
            on_begun=self._begin,
            given=self._replay,
            placed=None if asked.kept is None else asked.kept.opened,
        )
        self._unlogged: UnloggedRun | None = None
        if not asked.load.with_log:
            self._unlogged = UnloggedRun(self._request, self._summary, scratch)

    async def run(self) -> None:
        """Run to the end."""
        self._recorder = self._request.tracer = Recorder(asyncio.get_running_loop().time)
        async with background() as tasks:
            tasks.start(self._timed(), name="bench-timing")
            if self._unlogged is None:
                await run_in_loop(self._request, self._summary)
            else:
                await self._unlogged.run()
        self._ended_at = self._recorder.now()

    def _begin(self) -> None:
        self._recorder.begin()
        self._begun.set()

    async def _timed(self) -> None:
        """Record ticks; end the measured part."""
        recorder, phases = self._recorder, self._phases
        await self._begun.wait()
        request = self._request
        async with (
            open_counters(request.config.fleet, request.environ, request.connect, recorder.now) as counters,
            background() as tasks,
        ):
            self._counters = counters.readings
            if self.servers is None:
                tasks.start(recorder.watch_lag(), name="bench-lag")
            self._asked.on_phase("warming up")
            while True:
                was_warm, was_over = phases.warm_at is not None, phases.measured_at is not None
                queues = self._summary.queues()
                next_look = phases.look(
                    recorder.now(),
                    recorder.requests,
                    recorder.requests_in_flight,
                    is_stopped=queues is not None and queues.is_draining,
                    work_ended=queues is not None and queues.work_ended,
                )
                recorder.tick(self._summary)
                if phases.warm_at is not None and not was_warm:
                    self._asked.on_phase("measuring")
                    tasks.start(counters.read(), name="bench-counters", finish=True)
                if phases.measured_at is not None and not was_over:
                    self._asked.on_phase("finishing what is in flight")
                    tasks.start(counters.read(), name="bench-counters", finish=True)
                if phases.measured_at is not None and not was_over and not (queues and queues.work_ended):
                    self._request.control.drain(_MEASURED)
                self._tell_progress()
                await asyncio.sleep(next_look - recorder.now())

    def _tell_progress(self) -> None:
        """Say now and then how far the run is, in real time: a simulation may take long, too."""
        if time.monotonic() - self._told_at < _TELL_EVERY_S:
            return
        self._told_at = time.monotonic()
        recorder = self._recorder
        self._asked.on_phase(
            f"{recorder.now():,.0f} s: {recorder.requests_in_flight:,} requests in flight, "
            f"{len(recorder.requests):,} ended"
        )

    def measurement(self) -> Measurement:
        """Return what was measured."""
        asked, recorder = self._asked, self._recorder
        warm_up, measured, drain = self._phases.intervals(self._ended_at)
        if self._phases.was_short:
            self._warnings.append(
                "the work ended during the warm-up, so the warm-up is part of what is measured"
            )
        if self._phases.was_cut:
            self._warnings.append(
                "the time limit ended the warm-up before each request in flight was answered once: raise "
                "--time-limit-s or set --warmup-s"
            )
        steady = steady_state(recorder.requests, measured)
        if asked.load.rate is not None and steady is not None:
            steady = measured  # an open loop keeps the rate, not the requests in flight
        stopped = self._summary.stopped or ("" if self._has_end else "none of the seeds is valid")
        if self._has_end and stopped == _MEASURED and asked.load.duration_s is None:
            stopped = "the time was too short for all of the work: raise --time-limit-s"
        servers = {server.server for tick in recorder.ticks for server in tick.servers}
        found = Measurement(
            load=asked.load,
            started_at=self._started_at,
            models=sorted({request.model for request in recorder.requests}),
            gpus=asked.gpus or max(1, len(servers)),
            is_simulated=self.servers is not None,
            warm_up=warm_up,
            measured=measured,
            drain=drain,
            steady=steady,
            requests=recorder.requests,
            drafts=recorder.drafts,
            ticks=recorder.ticks,
            server_counters=self._counters,
            seeds=len({draft.seed_id.partition(REPEATED)[0] for draft in recorder.drafts}),
            seeds_read=self._summary.counters.seeds_read,
            repeats=sum(REPEATED in draft.seed_id for draft in recorder.drafts),
            stopped="" if stopped == _MEASURED else stopped,
            has_too_many_rejects=self._summary.too_many_rejects,
            warnings=self._warnings,
        )
        if self._replay is not None:
            found.replayed = Replayed(
                recorded_factor=self._replay.recorded.factor,
                factor=self._replay.replayed.factor,
                seconds=self._ended_at,
                left_out=dict(self._replay.left_out),
                notes=self._replay.notes,
            )
        if self.servers is not None:
            found.capacity_tokens_per_s = capacity(self.servers, found)
        return found


def capacity(servers: InProcessServers, found: Measurement) -> float | None:
    """Return the tokens per second that simulated servers can write, by their cost models.

    Prompts and answers are as long as those of the window on average; see `costs.capacity`.

    Returns:
        None if no request was answered in the window, or a server has no cost model.
    """
    window = found.window
    answered = [one for one in found.requests if one.ended == "ok" and window.holds(one.done_at)]
    models = [simulation.config.batching for simulation in servers.simulations.values()]
    if not answered:
        return None
    prompt, cached, written = (
        round(fmean(numbers))
        for numbers in zip(
            *((one.prompt_tokens, one.cached_tokens, one.completion_tokens) for one in answered), strict=True
        )
    )
    total = 0.0
    for simulation, model in zip(servers.simulations.values(), models, strict=True):
        if model is None:
            return None
        rate = costs.capacity(model, prompt, cached, written) * written * simulation.config.speed
        total += simulation.config.dp_size * rate
    return total
