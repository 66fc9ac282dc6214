"""Progress on stderr: a live table on a terminal, otherwise a log line every 10 s."""

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from streamsyn.background import background
from streamsyn.fleet.fleet import Fleet
from streamsyn.seeds.reader import SeedReader
from streamsyn.telemetry import Counters

log = structlog.get_logger()

_LOG_EVERY_S = 10.0
_DRAW_EVERY_S = 0.5
_RATE_OVER_S = 30.0


@dataclass(slots=True)
class Progress:
    """Computes progress from the counters. Rates are over the last 30 s."""

    counters: Counters
    reader: SeedReader
    fleet: Fleet
    _past: deque[tuple[float, int, int]] = field(default_factory=deque)

    def figures(self) -> dict[str, Any]:
        """The present progress; what is unknown is None."""
        counters = self.counters
        outcomes_per_s, tokens_per_s = self._rates()
        done = counters.outcomes + counters.finished_before
        total, exact = self._total()
        left = None if total is None else max(0, total - done)
        return {
            "done": done,
            "total": total,
            "total_is_exact": exact,
            "outcomes_per_s": round(outcomes_per_s, 1),
            "output_tokens_per_s": round(tokens_per_s, 1),
            "cached_share": round(counters.cached_tokens / max(1, counters.prompt_tokens), 3),
            "in_flight": self.fleet.in_flight,
            "caps": {server.url: server.limiter.cap for server in self.fleet.servers},
            "ejected": [server.url for server in self.fleet.servers if server.health.ejected],
            "contexts": counters.contexts,
            "samples": counters.samples,
            "rejects": {str(reason): number for reason, number in counters.rejects.items()},
            "eta_s": round(left / outcomes_per_s) if left is not None and outcomes_per_s else None,
        }

    def _total(self) -> tuple[int | None, bool]:
        """The total of drafts, estimated from the bytes read until all are read; and whether it is exact."""
        counters = self.counters
        if counters.reading_done:
            return counters.drafts_read, True
        fraction = self.reader.fraction()
        return (round(counters.drafts_read / fraction), False) if fraction else (None, False)

    def _rates(self) -> tuple[float, float]:
        counters = self.counters
        now, tokens = counters.elapsed_s, counters.useful_tokens + counters.wasted_tokens
        self._past.append((now, counters.outcomes, tokens))
        while len(self._past) > 2 and now - self._past[0][0] > _RATE_OVER_S:
            self._past.popleft()
        since, outcomes_then, tokens_then = self._past[0]
        seconds = max(now - since, 1e-9)
        if len(self._past) < 2:
            return 0.0, 0.0
        return (counters.outcomes - outcomes_then) / seconds, (tokens - tokens_then) / seconds


@asynccontextmanager
async def reporting(progress: Progress, *, show: bool) -> AsyncIterator[None]:
    """Report progress while the block runs; `show` allows the live table, if stderr is a terminal."""
    async with background() as tasks:
        if show and sys.stderr.isatty():
            tasks.start(_draw(progress), name="progress")
        else:
            tasks.start(_log(progress), name="progress")
        yield


async def _log(progress: Progress) -> None:
    while True:
        progress.figures()  # so that the first line has a rate
        await asyncio.sleep(_LOG_EVERY_S)
        log.info("run.progress", **progress.figures())


async def _draw(progress: Progress) -> None:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        while True:
            live.update(_table(progress.figures()), refresh=True)
            await asyncio.sleep(_DRAW_EVERY_S)


def _table(figures: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    total = (
        "?" if figures["total"] is None else f"{'' if figures['total_is_exact'] else '~'}{figures['total']:,}"
    )
    rejects = ", ".join(f"{reason} {number:,}" for reason, number in sorted(figures["rejects"].items()))
    servers = ", ".join(
        f"{url} " + ("ejected" if url in figures["ejected"] else f"{number} of {figures['caps'][url]}")
        for url, number in figures["in_flight"].items()
    )
    table.add_row("seeds", f"{figures['done']:,} of {total}   ETA {duration(figures['eta_s'])}")
    table.add_row(
        "rate",
        f"{figures['outcomes_per_s']:,} outcomes/s   {figures['output_tokens_per_s']:,.0f} output tokens/s",
    )
    table.add_row("written", f"{figures['contexts']:,} contexts   {figures['samples']:,} samples")
    table.add_row("cached", f"{figures['cached_share']:.0%} of prompt tokens")
    table.add_row("in flight", servers)
    table.add_row("rejects", rejects or "none")
    return table


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds for a person; `?` when unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
