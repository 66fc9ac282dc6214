"""Seeds that are submitted to a run: it takes them up as they come, and a later run finishes them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from streamsyn.config.loading import load
from streamsyn.config.sections import SeedsSection
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run_in_loop
from streamsyn.pipeline.verify import verify
from streamsyn.seeds.inbox import Inbox
from streamsyn.simulator.app import running
from streamsyn.simulator.settings import SimulatorConfig
from tests.builders import rows

pytestmark = pytest.mark.timeout(20)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """A simulated server that answers at once."""
    async with running(SimulatorConfig()) as server:
        yield server.url


def request(out: Path, url: str, **given: Any) -> RunRequest:
    settings = {
        "fleet.servers": [url],
        "assembly.contexts_per_sample": 1,
        "checks.min_words": 5,
        "sink.sync_interval_s": 0.01,
    }
    config = load(None, settings.items())
    return RunRequest(config=config, out=out, handles_signals=False, show_progress=False, **given)


def pair(name: str) -> dict[str, str]:
    return {"instruction": f"{name}?", "answer": f"Keeper {name}."}


async def asked(out: Path) -> list[str]:
    """The questions that have a context, in the order of the log, of a directory without problems."""
    problems, _ = await asyncio.to_thread(verify, out)
    assert [] == problems
    return [row["instruction"] for row in await asyncio.to_thread(rows, out, "contexts")]


class Written:
    """Waits for rows of contexts that readers may see."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._contexts = 0

    def on_rows(self, kind: str, count: int) -> None:
        if kind == "contexts":
            self._contexts = count
            self._loop.call_soon_threadsafe(self._changed.set)

    async def contexts(self, count: int) -> None:
        while self._contexts < count:
            self._changed.clear()
            await self._changed.wait()


async def test_a_run_goes_on_until_its_inbox_is_closed(tmp_path: Path, url: str) -> None:
    """What is submitted gets its outcome at once, and once."""
    out, written = tmp_path / "out", Written()
    inbox = Inbox(out, SeedsSection())
    async with asyncio.TaskGroup() as group:
        run = group.create_task(
            run_in_loop(request(out, url, inbox=inbox, on_rows=written.on_rows)), name="run"
        )
        for number in range(3):
            await asyncio.to_thread(inbox.submit, [pair("first"), pair(f"later {number}")])
            await written.contexts(number + 2)
        await asyncio.to_thread(inbox.close)
    summary = run.result()
    await asyncio.to_thread(inbox.release)

    assert None is summary.stopped
    assert {"first?", "later 0?", "later 1?", "later 2?"} == set(await asked(out))
    assert 4 == summary.contexts


async def test_a_later_run_finishes_what_was_submitted(tmp_path: Path, url: str) -> None:
    """As after a kill, and without a source; a reopened inbox goes on behind the end of the log."""
    out, written = tmp_path / "out", Written()
    inbox = Inbox(out, SeedsSection())
    first = request(out, url, inbox=inbox, on_rows=written.on_rows)
    async with asyncio.TaskGroup() as group:
        run = group.create_task(run_in_loop(first), name="run")
        await asyncio.to_thread(inbox.submit, [pair("first")])
        await written.contexts(1)
        first.control.drain("enough")
    await asyncio.to_thread(inbox.submit, [pair("second")])
    await asyncio.to_thread(inbox.release)
    resumed = await run_in_loop(request(out, url))
    await asyncio.to_thread(inbox.open)
    await asyncio.to_thread(inbox.submit, [pair("third"), pair("second")])
    await asyncio.to_thread(inbox.close)
    reopened = await run_in_loop(request(out, url, inbox=inbox))
    await asyncio.to_thread(inbox.release)

    assert "enough" == run.result().stopped
    assert (2, 3) == (resumed.contexts, reopened.contexts)
    assert ["first?", "second?", "third?"] == await asked(out)
