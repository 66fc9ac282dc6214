"""The coordinators of a run with partitions: each a process of its own that runs one partition.

The process that starts them owns the signals, shows one progress, starts those that died again, and records
in partitions.json which have ended.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from signal import SIGTERM, SIGUSR1
from time import monotonic
from typing import Any, Final

import orjson
import structlog

from streamsyn.background import background
from streamsyn.errors import SinkError
from streamsyn.fleet.discovery import Demand
from streamsyn.pipeline.coordinator_process import CoordinatorProcess, Launch
from streamsyn.pipeline.progress import duration
from streamsyn.sink.partitions import Partitions
from streamsyn.sink.rundir import wait_until_free
from streamsyn.sink.snapshot import Snapshot
from streamsyn.stop_signals import GENTLE, stop_signals

log = structlog.get_logger()

_WORST_FIRST: Final = (1, 2, 3, 75)
"""Exit codes of `streamsyn run`."""
_FINAL: Final = (0, 2, 3, 75)
"""With these a coordinator ended by its own decision."""
_REFUSED: Final = 2
_ENDED: Final = (0, 3)
"""With these it may have read all seeds."""
_DRAIN: Final = SIGUSR1
"""Never ends a coordinator at once: who stops all processes of a job or a service sent it SIGTERM, too."""
_LOG_EVERY_S: Final = 10.0
_SHOWN: Final = ("warning", "error", "critical")


class RestartLimit:
    """Decides whether a coordinator that died is started again. Has no clock and no process.

    Args:
        most: Maximum restarts in a row without a new outcome.
        pause_s: Seconds before the first of these; doubled for each further one, up to a minute.
    """

    def __init__(self, most: int = 5, pause_s: float = 1.0) -> None:
        self._most = most
        self._pause_s = pause_s
        self._in_a_row = 0
        self._bytes = 0

    def after(self, log_bytes: int) -> float | None:
        """Return the seconds to wait before it is started again; None if it is given up.

        Args:
            log_bytes: The size of its log, which tells whether it wrote anything since the last death.
        """
        if log_bytes > self._bytes:
            self._in_a_row = 0
        self._bytes = max(self._bytes, log_bytes)
        self._in_a_row += 1
        if self._in_a_row > self._most:
            return None
        return min(60.0, self._pause_s * 2.0 ** (self._in_a_row - 1))


@dataclass(slots=True)
class Coordinator:
    """One coordinator.

    Attributes:
        at: Its partition.
        directory: Its run directory.
        code: Its exit code, once it has ended for good; negative for a signal.
        figures: Its progress, as it logged it last.
        done: Its summary, once it has logged it.
        error: Why it failed, as it reported it.
        may_start: Set when its directory is free, and when it is not to start any more.
    """

    at: int
    directory: Path
    code: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    process: CoordinatorProcess | None = None
    restarts: RestartLimit = field(default_factory=RestartLimit)
    may_start: asyncio.Event = field(default_factory=asyncio.Event)


class Coordinators:
    """Runs the coordinators of all partitions to their ends.

    Args:
        partitions: OUT, which this process has locked.
        launch: Starts the coordinator of a partition.
        as_json: Whether to log all that they log, instead of what a person must know.
        waits: Wait for a process that has the directory of a partition open.
    """

    def __init__(
        self,
        partitions: Partitions,
        launch: Launch,
        *,
        as_json: bool,
        waits: bool = True,
    ) -> None:
        self.partitions = partitions
        self.each = [Coordinator(at, path) for at, path in enumerate(partitions.directories)]
        self.interrupted = False
        self._launch = launch
        self._as_json = as_json
        self._waits = waits
        self._began = monotonic()
        self._stopping = asyncio.Event()
        self._recording = asyncio.Lock()
        self._beginning = asyncio.Event()

    async def run(self, ready: Callable[[], Awaitable[None]] | None = None) -> int:
        """Run each partition until it has ended or is stopped; return the worst exit code.

        Partitions that have ended while others have not are only taken up, for seeds that are new, once all
        have: this keeps the numbers of rows (see `sink.partitions`).

        Args:
            ready: Returns when coordinators can start.
        """
        loop = asyncio.get_running_loop()
        for number in stop_signals():
            loop.add_signal_handler(number, self._on_signal, number)
        async with background() as tasks:
            if ready is not None:
                tasks.start(self._begin_after(ready), name="ready")
                await self._beginning.wait()
            tasks.start(self._report(), name="progress")
            everyone = set(range(self.partitions.number))
            if self.partitions.has_ended:
                self.partitions = await asyncio.to_thread(self.partitions.with_next_round)
            first = everyone - self.partitions.ended.keys()
            await self._run_all(first)
            later = everyone - first
            if later and self.partitions.has_ended and not self._stopping.is_set():
                self.partitions = await asyncio.to_thread(self.partitions.with_next_round, first)
                await self._run_all(later)
        codes = [one.code for one in self.each if one.code is not None]
        return next((code for code in _WORST_FIRST if code in codes), 0)

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return monotonic() - self._began

    def total(self, *names: str) -> int:
        """A figure of the summaries, added up over the partitions; the names are those of nested tables."""
        total = 0
        for one in self.each:
            value: Any = one.done
            for name in names:
                value = value.get(name, 0) if isinstance(value, dict) else 0
            total += sum(value.values()) if isinstance(value, dict) else value
        return total

    def demand(self) -> Demand:
        """What all coordinators have to do, by the progress that they logged last."""
        known = [one.figures for one in self.each if one.figures and one.code is None]
        left = sum(inf if one["total"] is None else one["total"] - one["done"] for one in known)
        caps, in_flight = Counter[str](), Counter[str]()
        for one in known:
            caps.update(one["caps"])
            in_flight.update(one["in_flight"])
        return Demand(left, sum(caps.values()) / max(1, len(caps)) or 1, in_flight)

    def rejects(self) -> Counter[str]:
        """The rejects of this run by reason."""
        return sum((Counter(one.done.get("rejects", {})) for one in self.each), Counter())

    async def _begin_after(self, ready: Callable[[], Awaitable[None]]) -> None:
        await ready()
        self._beginning.set()

    async def _run_all(self, some: set[int]) -> None:
        async with asyncio.TaskGroup() as group:
            for at in sorted(some):
                group.create_task(self._keep(self.each[at]), name=f"coordinator-{at}")

    async def _keep(self, one: Coordinator) -> None:
        """Run a coordinator, again if it dies, to its end."""
        is_lost = False
        while not self._stopping.is_set():
            if self._waits and not is_lost:
                await self._until_free(one)
                if self._stopping.is_set():
                    break
            code, lost = await self._run_once(one, is_lost=is_lost)
            is_lost = is_lost or bool(lost)
            if code in _ENDED and not one.done.get("stopped"):
                async with self._recording:
                    self.partitions = await asyncio.to_thread(self.partitions.with_ended, one.at)
            if code in _FINAL:
                one.code = code
                if code == _REFUSED:  # by what all have in common, as a rule
                    log.error("coordinator.refused", partition=one.at, why=one.error)
                    self._stop("a coordinator was refused")
                return
            if code < 0 and self._stopping.is_set():  # by the signal, before it could handle it
                break
            pause_s = one.restarts.after(await asyncio.to_thread(_log_bytes, one.directory))
            how = lost or (f"exit code {code}" if code >= 0 else f"signal {-code}")
            if pause_s is None:
                log.error("coordinator.given_up", partition=one.at, because=how, why=one.error)
                one.code = 1
                return
            log.warning("coordinator.restarts", partition=one.at, because=how, why=one.error, in_s=pause_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()
        one.code = 75

    async def _until_free(self, one: Coordinator) -> None:
        """Wait for a coordinator of an earlier run, which drains: the process that started it was killed."""
        loop = asyncio.get_running_loop()

        def wait() -> None:
            try:
                wait_until_free(one.directory, waiting)
            except OSError as error:  # the coordinator will fail by it, too
                log.debug("coordinator.lock_failed", partition=one.at, why=str(error))
            with suppress(RuntimeError):  # this run has been stopped meanwhile
                loop.call_soon_threadsafe(one.may_start.set)

        def waiting(holder: str) -> None:
            log.info("coordinator.waits", partition=one.at, holder=holder)

        one.may_start.clear()
        # A thread that nobody joins: the earlier coordinator may be stuck.
        threading.Thread(target=wait, name=f"lock-{one.at}", daemon=True).start()
        await one.may_start.wait()

    async def _run_once(self, one: Coordinator, *, is_lost: bool) -> tuple[int, str]:
        """Run a coordinator to its end; return its exit code, and how it was lost, if it was."""
        one.figures, one.done, one.error = {}, {}, ""
        await asyncio.to_thread(self.partitions.check)  # it would take the partition from a newer process
        process = one.process = await self._launch(one.at, is_lost)
        if self._stopping.is_set():
            process.stop(_DRAIN)
        try:
            async for line in process.lines():
                self._take_line(one, line)
            code = await process.wait()
        finally:
            one.process = None
            process.kill()  # it runs only if this process has a bug, or cannot write partitions.json
        one.error = one.error or process.lost
        return code, process.lost

    def _take_line(self, one: Coordinator, line: bytes) -> None:
        """Keep what a coordinator logs about itself, and pass on the rest."""
        try:
            event = orjson.loads(line)
            name, level = event.pop("event"), event.pop("level")
        except (ValueError, KeyError, TypeError, AttributeError):
            text = line.decode(errors="replace").rstrip()
            if text:
                log.warning("coordinator.said", partition=one.at, text=text)
            return
        event.pop("timestamp", None)
        if name == "run.progress":
            one.figures = event
        elif name == "run.done":
            one.done = event
        elif name == "run.failed":
            one.error = str(event.get("error"))
        if self._as_json or (level in _SHOWN and name != "run.failed"):
            event.pop("partition", None)
            getattr(log, level if level in _SHOWN else "info")(name, partition=one.at, **event)

    def _on_signal(self, number: int) -> None:
        if number in GENTLE and self.interrupted:
            return
        self.interrupted = True
        self._stop("stopped by a signal")

    def _stop(self, why: str) -> None:
        """Drain the coordinators; a second time, have them stop at once."""
        number = SIGTERM if self._stopping.is_set() else _DRAIN
        if not self._stopping.is_set():
            log.info(
                "run.draining", plain=f"{why}: finishing what is in flight; Ctrl-C again stops now", why=why
            )
        self._stopping.set()
        self._beginning.set()
        for one in self.each:
            one.may_start.set()
            if one.process is not None:
                one.process.stop(number)

    async def _report(self) -> None:
        logged = ""
        while True:
            await asyncio.sleep(_LOG_EVERY_S)
            line, figures = self._progress()
            if line != logged:
                logged = line
                log.info("run.progress", plain=line, **figures)

    def _progress(self) -> tuple[str, dict[str, Any]]:
        """The progress of all coordinators, as a line and as figures."""
        known = [one.figures for one in self.each if one.figures]
        live = sum(one.process is not None for one in self.each)
        totals = [one["total"] for one in known]
        total = None if None in totals or len(known) < len(self.each) else sum(totals)
        left = [one["eta_s"] for one in known if one["eta_s"] is not None]
        rejects: Counter[str] = sum((Counter(one["rejects"]) for one in known), Counter())
        figures = {
            "coordinators": live,
            "partitions": len(self.each),
            "done": sum(one["done"] for one in known),
            "total": total,
            "outcomes_per_s": round(sum(one["outcomes_per_s"] for one in known), 1),
            "in_flight": sum(sum(one["in_flight"].values()) for one in known),
            "rejects": dict(rejects),
            "eta_s": max(left, default=None),
        }
        named = ", ".join(f"{reason} {number:,}" for reason, number in sorted(rejects.items())) or "none"
        line = (
            f"{figures['done']:,} of {'?' if total is None else f'~{total:,}'}   "
            f"ETA {duration(figures['eta_s'])}; {figures['outcomes_per_s']:,} outcomes/s; "
            f"in flight {figures['in_flight']:,}; rejects {named}; "
            f"{live} of {len(self.each)} coordinators at work"
        )
        return line, figures


def _log_bytes(directory: Path) -> int:
    try:
        parts = Snapshot(directory).parts
    except (SinkError, OSError):  # the coordinator has reported it
        return 0
    return sum(part.bytes for kind in ("contexts", "rejects") for part in parts[kind])
