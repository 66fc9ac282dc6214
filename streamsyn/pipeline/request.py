"""The request for a run, and the summary that it returns."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from streamsyn.config.loading import Config
from streamsyn.config.sections import RecipeSection
from streamsyn.fleet.membership import Connect
from streamsyn.fleet.server import Timings
from streamsyn.fleet.shares import Priority
from streamsyn.fleet.sharing import Servers
from streamsyn.pipeline.delivery import SampleGate, SampleStream
from streamsyn.pipeline.stages import Queues
from streamsyn.pipeline.stop import RunControl
from streamsyn.records import RejectReason
from streamsyn.seeds.inbox import Inbox
from streamsyn.telemetry import Counters, Tracer


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
        tracer: Takes the spans of the run; None exports them if `run.traces` is set.
        weight: The run's part of these servers relative to the other runs; above 0.
        priority: Multiplies the weight by 1/8, 1 or 8.
        repeats_seeds: Read the seeds again and again until the run is stopped; see `SeedReader`.
        skips_seeds: Leave out this many seeds at the beginning.
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
    tracer: Tracer | None = None
    weight: float = 1.0
    priority: Priority = "normal"
    repeats_seeds: bool = False
    skips_seeds: int = 0


@dataclass(slots=True)
class RunSummary:
    """The result of a run, filled while it goes on.

    Attributes:
        out: The run directory.
        counters: What this process did.
        stopped: Why the run stopped early; None when it did not.
        too_many_rejects: Whether rejects are why it stopped early.
        interrupted: Whether a signal arrived.
        contexts: Contexts in the directory, of all runs into it.
        rejects: Rejects in the directory that no later outcome supersedes.
        samples: Samples in the directory.
        in_log: Returns the numbers of contexts, rejects that hold, and samples in the directory now; empty
            before it is open.
        servers: Returns the metrics of each server.
        timings: How long requests took.
        queues: Returns how full the queues are; None before the run has begun.
        progress: Returns the present progress; empty before the run has begun. Call it in the event loop of
            the run.
        recipe: What was asked for, to compare with.
        notes: What to know about the seeds, one line each.
    """

    out: Path
    counters: Counters
    stopped: str | None = None
    too_many_rejects: bool = False
    interrupted: bool = False
    contexts: int = 0
    rejects: int = 0
    samples: int = 0
    in_log: Callable[[], dict[str, int]] = dict
    servers: Callable[[], list[dict[str, Any]]] = list
    timings: Timings = field(default_factory=Timings)
    queues: Callable[[], Queues | None] = lambda: None
    progress: Callable[[], dict[str, Any]] = dict
    recipe: RecipeSection | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def reject_fraction(self) -> float:
        """Share of rejects among all outcomes in the directory."""
        return self.rejects / max(1, self.contexts + self.rejects)

    def unfinished(self) -> tuple[int, int]:
        """Number of answers that were aborted, timed out or broken, and of their tokens, as far as known."""
        servers = self.servers()
        return (
            sum(server.get("unfinished", 0) for server in servers),
            sum(server.get("unfinished_tokens", 0) for server in servers),
        )

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values: of this run, and under `directory` those of all runs into it."""
        counters = self.counters
        unfinished, unfinished_tokens = self.unfinished()
        return {
            "out": str(self.out),
            "stopped": self.stopped,
            "seconds": round(counters.elapsed_s, 3),
            "contexts": counters.contexts,
            "rejects": dict(counters.rejects),
            "samples": counters.samples,
            "finished_before": counters.finished_before,
            "repeated": counters.repeated,
            "useful_tokens": counters.useful_tokens,
            "thinking_tokens": counters.thinking_tokens,
            "wasted_tokens": counters.wasted_tokens + unfinished_tokens,
            "unfinished_answers": unfinished,
            "unfinished_tokens": unfinished_tokens,
            "flags": dict(counters.flags),
            "short_samples": counters.short_samples,
            "prompt_tokens": counters.prompt_tokens,
            "cached_tokens": counters.cached_tokens,
            "failed_tries": counters.retries,
            "scored": counters.scored,
            "unscored": counters.unscored,
            "scoring_prompt_tokens": counters.scoring_prompt_tokens,
            "scoring_cached_tokens": counters.scoring_cached_tokens,
            "scoring_tokens": counters.scoring_tokens,
            "scoring_failed_tries": counters.scoring_retries,
            "seeds": self.notes,
            "servers": self.servers(),
            "directory": {
                "contexts": self.contexts,
                "rejects": self.rejects,
                "samples": self.samples,
            },
        }
