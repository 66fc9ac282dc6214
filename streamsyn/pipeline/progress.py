"""Progress on stderr: a live panel on a terminal, otherwise a readable line every 10 s."""

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from streamsyn.background import background
from streamsyn.fleet.fleet import Fleet
from streamsyn.plain_text import visible
from streamsyn.seeds.reader import SeedReader
from streamsyn.telemetry import Counters

log = structlog.get_logger()

_LOG_EVERY_S = 10.0
_DRAW_EVERY_S = 0.5
_RATE_OVER_S = 30.0
_ETA_OVER_S = 600.0
"""Long answers come in waves, which must not move the remaining time up and down."""
_MAX_SERVERS = 4
"""Servers shown one by one; of more, a summary."""


@dataclass(slots=True)
class Progress:
    """Computes progress from the counters.

    Args:
        counters: The counters of the run.
        reader: Knows which share of the seeds has been read.
        fleet: The servers that write.
        drain_ends_in_s: Returns the seconds until a drain is cut short; None while nothing is draining.
        training: Returns the last line of the training beside the run; empty without one.
    """

    counters: Counters
    reader: SeedReader
    fleet: Fleet
    drain_ends_in_s: Callable[[], float | None] = lambda: None
    training: Callable[[], str] = lambda: ""
    _rate: "_Rate" = field(default_factory=lambda: _Rate(_RATE_OVER_S))
    _steady_rate: "_Rate" = field(default_factory=lambda: _Rate(_ETA_OVER_S))

    def figures(self) -> dict[str, Any]:
        """The present progress; what is unknown is None."""
        counters = self.counters
        now, tokens = counters.elapsed_s, counters.useful_tokens + counters.wasted_tokens
        outcomes_per_s, tokens_per_s = self._rate.add(now, counters.outcomes, tokens)
        steadily_per_s, _ = self._steady_rate.add(now, counters.outcomes, tokens)
        done = counters.outcomes + counters.finished_before
        total, exact = self._total()
        left = None if total is None else max(0, total - done)
        return {
            "done": done,
            "total": total,
            "total_is_exact": exact,
            "outcomes_per_s": round(outcomes_per_s, 1),
            "output_tokens_per_s": round(tokens_per_s, 1),
            "generated_per_s": self._generated_per_s(),
            "cached_share": round(counters.cached_tokens / max(1, counters.prompt_tokens), 3),
            "in_flight": self.fleet.in_flight,
            "caps": {server.url: server.limiter.cap for server in self.fleet.servers},
            "ejected": [server.url for server in self.fleet.servers if server.health.ejected],
            "contexts": counters.contexts,
            "samples": counters.samples,
            "rejects": {str(reason): number for reason, number in counters.rejects.items()},
            "eta_s": round(left / steadily_per_s) if left is not None and steadily_per_s else None,
            "drain_ends_in_s": _rounded(self.drain_ends_in_s()),
            "gives_up_in_s": _rounded(self.fleet.gives_up_in_s),
            "training": self.training(),
        }

    def _total(self) -> tuple[int | None, bool]:
        """The total of drafts, estimated from the bytes read until all are read; and whether it is exact."""
        counters = self.counters
        if counters.reading_done:
            return counters.drafts_read, True
        fraction = self.reader.fraction()
        return (round(counters.drafts_read / fraction), False) if fraction else (None, False)

    def _generated_per_s(self) -> float | None:
        """Tokens that the servers generate per second, as they report; None if none reports it.

        While long answers are being written this is the only sign of life.
        """
        loads = [server.load for server in self.fleet.servers if not server.health.ejected]
        known = [load.generated_per_s for load in loads if load and load.generated_per_s is not None]
        return round(sum(known), 1) if known else None


class _Rate:
    """Outcomes and tokens per second over the last `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._past: deque[tuple[float, int, int]] = deque()

    def add(self, now: float, outcomes: int, tokens: int) -> tuple[float, float]:
        """Add the counts at `now`, at most twenty within the window, and return the two rates."""
        past = self._past
        if not past or now - past[-1][0] >= self._seconds / 20:
            past.append((now, outcomes, tokens))
        while len(past) > 2 and now - past[1][0] >= self._seconds:
            past.popleft()
        since, outcomes_then, tokens_then = past[0]
        seconds = now - since
        if seconds <= 0:
            return 0.0, 0.0
        return (outcomes - outcomes_then) / seconds, (tokens - tokens_then) / seconds


def _rounded(seconds: float | None) -> int | None:
    return None if seconds is None else max(0, round(seconds))


@asynccontextmanager
async def reporting(progress: Progress, *, show: bool) -> AsyncIterator[None]:
    """Report progress while the block runs; `show` allows the live panel, if stderr is a terminal."""
    async with background() as tasks:
        if show and sys.stderr.isatty():
            tasks.start(_draw(progress), name="progress")
        else:
            tasks.start(_log(progress), name="progress")
        yield


async def _log(progress: Progress) -> None:
    logged = ""
    while True:
        progress.figures()  # so that the first line has a rate
        await asyncio.sleep(_LOG_EVERY_S)
        figures = progress.figures()
        if (line := _line(figures)) != logged:  # one that waits for seeds repeats nothing
            logged = line
            log.info("run.progress", plain=line, **figures)


def _line(figures: dict[str, Any]) -> str:
    """Progress as one line of text."""
    parts = [
        _seeds(figures),
        f"{figures['outcomes_per_s']:,} outcomes/s",
        f"in flight {sum(figures['in_flight'].values()):,} of {sum(figures['caps'].values()):,}",
        f"{figures['cached_share']:.0%} cached",
        f"rejects {_rejects(figures)}",
        *(
            [f"{len(figures['ejected'])} of {len(figures['caps'])} servers ejected"]
            * bool(figures["ejected"])
        ),
    ]
    return "; ".join([*parts, *(": ".join(alarm) for alarm in _alarms(figures))])


async def _draw(progress: Progress) -> None:
    from rich.console import Console
    from rich.live import Live

    # While it is drawn, rich replaces sys.stderr: log lines, and lines of a training, scroll above the panel.
    with Live(
        console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=False
    ) as live:
        while True:
            live.update(_table(progress.figures()), refresh=True)
            await asyncio.sleep(_DRAW_EVERY_S)


def _table(figures: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="ellipsis")
    rate = f"{figures['outcomes_per_s']:,} outcomes/s   {figures['output_tokens_per_s']:,.0f} output tokens/s"
    if figures["generated_per_s"] is not None:
        rate += f"   servers generate {figures['generated_per_s']:,.0f} tokens/s"
    rows = [
        ("seeds", _seeds(figures)),
        ("rate", rate),
        ("written", f"{figures['contexts']:,} contexts   {figures['samples']:,} samples"),
        ("cached", f"{figures['cached_share']:.0%} of prompt tokens"),
        ("in flight", _servers(figures)),
        ("rejects", _rejects(figures)),
        *([("training", figures["training"])] * bool(figures["training"])),
        *_alarms(figures),
    ]
    for name, text in rows:
        table.add_row(name, Text(visible(text), overflow="ellipsis"))  # Text: nothing in it is markup
    return table


def _seeds(figures: dict[str, Any]) -> str:
    done, total = figures["done"], figures["total"]
    eta = f"ETA {duration(figures['eta_s'])}"
    if total is None:
        return f"{done:,} of ?   {eta}"
    estimated = "" if figures["total_is_exact"] else "~"
    return f"{done:,} of {estimated}{total:,} ({done / max(1, total):.0%})   {eta}"


def _servers(figures: dict[str, Any]) -> str:
    """The requests in flight: server by server, or of many servers the sum and those that are ejected."""
    in_flight, caps, ejected = figures["in_flight"], figures["caps"], figures["ejected"]
    if len(caps) <= _MAX_SERVERS:
        return ", ".join(
            f"{url} " + ("ejected" if url in ejected else f"{number} of {caps[url]}")
            for url, number in in_flight.items()
        )
    more = len(ejected) - _MAX_SERVERS
    names = ", ".join(ejected[:_MAX_SERVERS]) + (f" and {more} more" if more > 0 else "")
    total = f"{sum(in_flight.values()):,} of {sum(caps.values()):,} on {len(caps)} servers"
    return f"{total}; {len(ejected)} ejected: {names}" if ejected else total


def _rejects(figures: dict[str, Any]) -> str:
    return (
        ", ".join(f"{reason} {number:,}" for reason, number in sorted(figures["rejects"].items())) or "none"
    )


def _alarms(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a person must know now: the name of the row, and its text."""
    in_flight, drain_s, outage_s = (
        sum(figures["in_flight"].values()),
        figures["drain_ends_in_s"],
        figures["gives_up_in_s"],
    )
    if drain_s is not None:
        yield "stopping", f"{in_flight:,} in flight, up to {drain_s} s; Ctrl-C again stops now"
    if outage_s is not None:
        yield "servers", f"none can be used; the run stops in {duration(outage_s)} (fleet.give_up_s)"


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds for a person; `?` when unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
