"""What is to be run, and what came of it."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from streamsyn.config.loading import Config
from streamsyn.fleet.membership import Connect
from streamsyn.pipeline.delivery import SampleStream
from streamsyn.telemetry import Counters


class Supervisor(Protocol):
    """Something that goes on beside a run: a training."""

    def start(self, drain: Callable[[str], None]) -> None:
        """The run is up. `drain` stops it early, with a reason; it may be called in any thread."""
        ...

    def end(self) -> None:
        """A second signal has come: everything ends at once."""
        ...


@dataclass(slots=True, kw_only=True)
class RunRequest:
    """What is to be run.

    Attributes:
        config: The resolved configuration.
        out: The run directory.
        environ: Holds the servers' keys.
        connect: What carries requests to servers; None is HTTP.
        runner: Runs the event loop; another one for a simulation in virtual time.
        rng: For jitter; a seeded one for a simulation that is to be repeated.
        stream: Where samples go besides the log, if anywhere.
        replay: Begin the stream with the samples of earlier runs.
        launch: A model to start a server for; None uses `config.fleet.servers`.
        launch_python: The interpreter that has sglang.
        launch_args: More flags for the server.
        show_progress: Draw progress on stderr when it is a terminal.
        companion: What is to go on beside the run, if anything.
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
    companion: Supervisor | None = None


@dataclass(slots=True)
class RunSummary:
    """What came of a run; totals are of the directory, counters of this process."""

    out: Path
    counters: Counters
    stopped: str | None = None
    interrupted: bool = False
    """A signal came, and found nothing left that it could have stopped."""
    contexts: int = 0
    rejects: int = 0
    samples: int = 0
    servers: Callable[[], list[dict[str, Any]]] = list
    """What there is to say of each server."""

    @property
    def reject_fraction(self) -> float:
        """Share of rejects among all outcomes in the directory."""
        return self.rejects / max(1, self.contexts + self.rejects)
