"""What a person is told while a run goes on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import structlog

from streamsyn.config.loading import load
from streamsyn.config.sections import FleetSection
from streamsyn.fleet.fleet import open_fleet
from streamsyn.fleet.wire import Load
from streamsyn.pipeline import progress as progress_module
from streamsyn.pipeline.progress import Progress, _line, _table, duration, reporting
from streamsyn.seeds.reader import SeedReader
from streamsyn.telemetry import Counters
from tests.examples import in_turn

URLS = ("http://one:1", "http://two:2")


class Clock(Counters):
    """Counters whose time is set by hand."""

    now_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return self.now_s


@asynccontextmanager
async def progress_of(folder: Path, *, lines: int = 100) -> AsyncIterator[tuple[Progress, Clock, SeedReader]]:
    """Progress over two servers that are never asked and a file of seeds."""

    def reader() -> SeedReader:
        path = folder / "seeds.jsonl"
        path.write_text('{"instruction": "i", "answer": "a"}\n' * lines)
        return SeedReader(load(None, [("seeds.sources", [{"path": str(path)}])]).seeds, 0, None)

    counters, seeds = Clock(), await asyncio.to_thread(reader)
    async with open_fleet(FleetSection(servers=URLS), lambda _: None) as fleet:
        yield Progress(counters, seeds, fleet), counters, seeds


async def test_nothing_yet(tmp_path: Path) -> None:
    """What is unknown is None, and nothing is divided by zero."""
    async with progress_of(tmp_path) as (progress, _, _):
        expected: dict[str, Any] = {
            "done": 0,
            "total": None,
            "total_is_exact": False,
            "outcomes_per_s": 0.0,
            "output_tokens_per_s": 0.0,
            "cached_share": 0.0,
            "in_flight": dict.fromkeys(URLS, 0),
            "caps": dict.fromkeys(URLS, 8),
            "ejected": [],
            "contexts": 0,
            "samples": 0,
            "rejects": {},
            "eta_s": None,
            "generated_per_s": None,
            "drain_ends_in_s": None,
            "gives_up_in_s": None,
            "training": "",
        }
        assert expected == progress.figures()


async def test_figures_of_a_run(tmp_path: Path) -> None:
    """Counts of this run, what an earlier one had done, and the servers as they are."""
    async with progress_of(tmp_path) as (progress, counters, _):
        counters.contexts, counters.finished_before, counters.samples = 6, 10, 4
        counters.rejects.update({"empty": 2})
        counters.prompt_tokens, counters.cached_tokens = 1000, 750
        _sent(progress, 3)
        progress.fleet.servers[1].health.ejected = True
        figures = progress.figures()
    assert (18, 6, 4, {"empty": 2}, 0.75) == (
        figures["done"],
        figures["contexts"],
        figures["samples"],
        figures["rejects"],
        figures["cached_share"],
    )
    assert ({URLS[0]: 3, URLS[1]: 0}, [URLS[1]]) == (figures["in_flight"], figures["ejected"])


async def test_the_total_is_exact_at_the_end_of_the_seeds(tmp_path: Path) -> None:
    """Drafts of seeds and bad lines, which are one each: `done` gets there, and nothing is left."""
    async with progress_of(tmp_path) as (progress, counters, _):
        counters.reading_done, counters.seeds_read, counters.repeated = True, 6, 1
        counters.drafts_read = 4 * 3 + 1
        counters.contexts, counters.finished_before = 10, 1
        counters.rejects["not_a_seed"] = 2
        progress.figures()
        counters.now_s, counters.contexts = 1.0, 10
        figures = progress.figures()
    assert (13, 13, True) == (figures["done"], figures["total"], figures["total_is_exact"])


async def test_the_total_is_estimated_before_that(tmp_path: Path) -> None:
    """From the share of bytes read."""
    async with progress_of(tmp_path, lines=50_000) as (progress, counters, seeds):
        batches = seeds.batches(lambda _: False)
        counters.drafts_read = sum([len(await asyncio.to_thread(next, batches)) for _ in range(3)])
        total = progress.figures()["total"]
    assert 45_000 <= total <= 55_000


async def test_rates_and_time_left(tmp_path: Path) -> None:
    """Over the last half minute, not since the start: a slow start does not count for ever."""
    async with progress_of(tmp_path) as (progress, counters, _):
        counters.reading_done, counters.drafts_read = True, 1000
        progress.figures()
        for _ in range(4):
            counters.now_s += 10
            counters.contexts += 20
            counters.useful_tokens += 900
            counters.wasted_tokens += 100
            figures = progress.figures()
        assert (2.0, 100.0, 460) == (
            figures["outcomes_per_s"],
            figures["output_tokens_per_s"],
            figures["eta_s"],
        )
        for _ in range(8):
            counters.now_s += 10
            figures = progress.figures()
        assert 0.0 == figures["outcomes_per_s"]


async def test_the_time_left_is_steady_when_answers_come_in_waves(tmp_path: Path) -> None:
    """Waves of 80 answers every 40 s: after the first minutes the end that is predicted hardly moves."""
    ends: list[float] = []
    async with progress_of(tmp_path) as (progress, counters, _):
        counters.reading_done, counters.drafts_read = True, 4000
        for second in range(1200):
            counters.now_s = float(second)
            counters.contexts += 80 * (second % 40 == 39)
            figures = progress.figures()
            if second > 400:
                ends.append(second + figures["eta_s"])
    assert max(ends) - min(ends) < 0.15 * 2000


async def test_what_servers_generate_is_a_sign_of_life(tmp_path: Path) -> None:
    """The sum over the servers that report it; None if none does."""
    async with progress_of(tmp_path) as (progress, _, _):
        assert progress.figures()["generated_per_s"] is None
        progress.fleet.servers[0].load = Load(running=3, waiting=0, generated_per_s=1234.5)
        assert 1234.5 == progress.figures()["generated_per_s"]
        assert "servers generate 1,234 tokens/s" in drawn(progress.figures())


@in_turn(
    ("seconds", "expected"),
    [
        (None, "?"),
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (61, "1 min 01 s"),
        (3600, "1 h 00 min"),
        (90_061, "25 h 01 min"),
    ],
)
def test_durations(seconds: float | None, expected: str) -> None:
    """Hours, minutes and seconds."""
    assert expected == duration(seconds)


def drawn(figures: dict[str, Any]) -> str:
    """The table as text."""
    from rich.console import Console

    console = Console(file=StringIO(), width=120)
    console.print(_table(figures))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return " ".join(text.split())


async def test_the_table(tmp_path: Path) -> None:
    """An estimate is marked, an ejected server is named, rejects are listed by reason."""
    async with progress_of(tmp_path) as (progress, counters, _):
        assert "seeds 0 of ? ETA ?" in drawn(progress.figures())
        counters.reading_done, counters.drafts_read, counters.contexts = True, 2000, 1200
        counters.rejects.update({"too_short": 3, "empty": 1})
        counters.now_s = 10.0
        progress.fleet.servers[1].health.ejected = True
        text = drawn(progress.figures())
        assert "~50" in drawn({**progress.figures(), "total": 50, "total_is_exact": False})
    assert "seeds 1,204 of 2,000 (60%) ETA 7 s rate 120.4 outcomes/s" in text
    assert "in flight http://one:1 0 of 8, http://two:2 ejected" in text
    assert "rejects empty 1, too_short 3" in text


def _sent(progress: Progress, requests: int) -> None:
    """Have requests in flight at the first server."""
    for _ in range(requests):
        progress.fleet._share.begin(progress.fleet.servers[0].url)


async def test_what_a_person_must_know_now(tmp_path: Path) -> None:
    """A drain and an outage count down, and a training has a row; nothing in it is markup."""
    async with progress_of(tmp_path) as (progress, _, _):
        progress.drain_ends_in_s, progress.training = lambda: 58.7, lambda: "step 12 [bold]loss 1.3"
        _sent(progress, 141)
        progress.fleet._outage.began(asyncio.get_running_loop())
        figures = progress.figures()
    text = drawn(figures)
    assert "stopping 141 in flight, up to 59 s; Ctrl-C again stops now" in text
    assert "servers none can be used; the run stops in 5 min 00 s (fleet.give_up_s)" in text
    assert "training step 12 [bold]loss 1.3" in text
    assert "up to 59 s; Ctrl-C again stops now; servers: none can be used" in _line(figures)


async def test_many_servers_are_one_line(tmp_path: Path) -> None:
    """Their sums, and the first of those that are ejected."""
    urls = [f"http://gpu-{number}:1" for number in range(64)]
    figures = {
        "in_flight": dict.fromkeys(urls, 10),
        "caps": dict.fromkeys(urls, 16),
        "ejected": urls[:6],
    }
    async with progress_of(tmp_path) as (progress, _, _):
        text = drawn({**progress.figures(), **figures})
        line = _line({**progress.figures(), **figures})
    first = ", ".join(urls[:4])
    assert f"in flight 640 of 1,024 on 64 servers; 6 ejected: {first} and 2 more rejects none" in text
    assert "in flight 640 of 1,024" in line
    assert "6 of 64 servers ejected" in line


async def test_log_lines_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log line at each interval, with all values; none after the block."""
    monkeypatch.setattr(progress_module, "_LOG_EVERY_S", 0.001)
    async with progress_of(tmp_path) as (progress, _, _):
        with structlog.testing.capture_logs() as logged:
            async with asyncio.timeout(5), reporting(progress, show=False):
                while len(logged) < 2:
                    progress.counters.contexts += 1
                    await asyncio.sleep(0)
        before = len(logged)
        await asyncio.sleep(0)
    assert {"run.progress"} == {line["event"] for line in logged}
    assert {*progress.figures(), "plain", "event", "log_level"} == set(logged[0])
    assert before == len(logged)


async def test_a_line_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that waits for seeds logs its progress once, not every ten seconds for days."""
    seen: list[None] = []

    def same(_figures: Any) -> str:
        seen.append(None)
        return "nothing to do"

    monkeypatch.setattr(progress_module, "_LOG_EVERY_S", 0.001)
    monkeypatch.setattr(progress_module, "_line", same)
    async with progress_of(tmp_path) as (progress, _, _):
        with structlog.testing.capture_logs() as logged:
            async with asyncio.timeout(5), reporting(progress, show=False):
                while len(seen) < 3:  # noqa: ASYNC110 - a computed line sets no event
                    await asyncio.sleep(0)
    assert ["nothing to do"] == [line["plain"] for line in logged]
