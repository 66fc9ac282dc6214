"""The request for a run: what is to be run, and what goes on beside it."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from streamsyn.config.loading import Config
from streamsyn.fleet.discovery import PlacedServers
from streamsyn.fleet.membership import Connect
from streamsyn.fleet.shared_servers import Servers
from streamsyn.fleet.shares import Priority
from streamsyn.pipeline.delivery import SampleGate
from streamsyn.pipeline.stages import ProducerStage
from streamsyn.pipeline.stdout import SampleStream
from streamsyn.pipeline.stop import RunControl
from streamsyn.recipes.recipe import Recipe
from streamsyn.records import RejectReason, Request
from streamsyn.seeds.inbox import Inbox
from streamsyn.telemetry import Tracer


class Supervisor(Protocol):
    """Supervises what goes on beside a run: a training on its samples."""

    @property
    def last_line(self) -> str:
        """The last line that it wrote to its log."""
        ...

    def start(self, drain: Callable[[str], None]) -> None:
        """The stages are set up. `drain` stops the run early, with a reason, from any thread."""
        ...

    def end(self) -> None:
        """A second signal has arrived: end at once."""
        ...


class Arrivals(Protocol):
    """When drafts begin, whatever is in flight; without it, a draft begins as soon as a worker is free."""

    on_arrival: Callable[[], None]
    """Called when a draft has arrived: it needs a worker."""

    def after(self, producer: ProducerStage) -> ProducerStage:
        """Return a producer whose drafts, those of `producer`, arrive at their times."""
        ...

    def workers(self, outcomes: int) -> int:
        """Return how many workers there should be, after this many outcomes."""
        ...


class GivenWork(Protocol):
    """Drafts in place of those of the seeds, and what writes them."""

    @property
    def recipe(self) -> Recipe:
        """Writes the drafts."""
        ...

    def opening(self) -> Request | None:
        """Return the request to send before all others, in place of the preflight. Reads files."""
        ...

    def producer(self) -> ProducerStage:
        """Return the producer of the drafts."""
        ...


@dataclass(slots=True, kw_only=True)
class RunRequest:
    """What is to be run.

    Attributes:
        config: The resolved configuration.
        out: The run directory.
        environ: The environment, which holds the servers' credentials.
        connect: The transport to servers; None is HTTP.
        runner: Runs the event loop; a different one simulates virtual time.
        rng: For jitter; a seeded one makes a simulation repeatable.
        stream: Where samples go besides the log, if anywhere.
        replay: Begin the stream with the samples of earlier runs.
        launch: The model to launch a server for; None uses `config.fleet.servers`.
        launch_python: The interpreter that has sglang installed.
        launch_args: More flags for the launched server.
        show_progress: Draw progress on stderr when it is a terminal.
        preflight: Check what all seeds have in common before the first is taken.
        supervisor: Supervises a training beside the run, if there is one.
        retry: Ask rejects of these reasons again; empty only resumes.
        on_rows: Tells readers of the directory how many rows of a kind they may see, as `RunLog` describes.
        handles_signals: Drain at a signal. Only the main thread of a process can.
        control: Stops the run from outside.
        after_samples: Learns of samples in the log, and may hold up the run.
        inbox: Takes seeds while the run goes on, which ends when it is closed. Its owner releases it after
            the run. None reads what was submitted to earlier runs.
        on_begun: Called in the event loop when run.json and the log say what this run is to do.
        servers: Servers that other runs use, too; those of the configuration, `connect` and `launch` do not
            count then.
        placed: Opens servers that another process has placed on a cluster; those of `config.cluster` do not
            count then.
        tracer: Takes the spans of the run; None exports them if `run.traces` is set.
        weight: The run's part of these servers relative to the other runs; above 0.
        priority: Multiplies the weight by 1/8, 1 or 8.
        repeats_seeds: Read the seeds again and again until the run is stopped; see `SeedReader`.
        skips_seeds: Leave out this many seeds at the beginning.
        take_over: Take the directory from a process that has it open, as `RunDirectory` describes.
        arrivals: When drafts begin; None begins them as soon as a worker is free.
        given: Work in place of that of the seeds, if any.
    """

    config: Config
    out: Path
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    connect: Connect | None = None
    runner: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run
    rng: Random | None = None
    stream: SampleStream | None = None
    replay: bool = False
    launch: str | None = None
    launch_python: Path | None = None
    launch_args: Sequence[str] = ()
    show_progress: bool = True
    supervisor: Supervisor | None = None
    preflight: bool = True
    retry: Sequence[RejectReason] = ()
    on_rows: Callable[[str, int], None] = lambda _kind, _rows: None
    handles_signals: bool = True
    control: RunControl = field(default_factory=RunControl)
    after_samples: SampleGate | None = None
    inbox: Inbox | None = None
    on_begun: Callable[[], None] = lambda: None
    servers: Servers | None = None
    placed: Callable[[], AbstractAsyncContextManager[PlacedServers]] | None = None
    tracer: Tracer | None = None
    weight: float = 1.0
    priority: Priority = "normal"
    repeats_seeds: bool = False
    skips_seeds: int = 0
    take_over: bool = False
    arrivals: Arrivals | None = None
    given: GivenWork | None = None
