"""`--from URL`: the samples of a run at a daemon, for which `RunServer` stands."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError, RunReplaced
from streamsyn.following import daemon_client
from streamsyn.following.daemon_client import is_run_url
from streamsyn.trainer.examples import StepPlan
from streamsyn.trainer.sources.locate import open_sources
from streamsyn.trainer.sources.run_samples import DaemonSamples, RunSamples
from streamsyn.trainer.sources.source import HasContexts, Sources
from tests.builders import opened, sample, sink
from tests.following.run_server import RunServer, in_thread
from tests.trainer.streams import keys, planner, plans
from tests.trainer.test_run_samples import Alike


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again at once."""
    monkeypatch.setattr(daemon_client, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def server() -> Iterator[RunServer]:
    """A server in a thread of its own."""
    with in_thread(RunServer()) as serving:
        yield serving


@pytest.fixture
def source(server: RunServer) -> Iterator[DaemonSamples]:
    """What `--from URL` opens."""
    opened = DaemonSamples(server.url + "/samples")
    yield opened
    opened.close()


def numbers(rows: Any) -> list[int]:
    return [row["seq"] for row in rows]


def test_rows_are_read_and_found_again_by_number(server: RunServer, source: DaemonSamples) -> None:
    """Whatever connections do meanwhile; the end is known once the run has finished."""
    assert [] == source.fetch(0, 5)
    server.write(90)
    server.set(lose_after=[3, 0], refuse=[503])

    assert [0, 1, 2, 3, 4] == numbers(source.fetch(0, 5))
    assert list(range(80, 90)) == numbers(source.fetch(80, 32))
    assert [0, 3, 70, 71, 89] == numbers(source.pick([0, 3, 70, 71, 89, 90]))
    assert source.total() is None
    server.set(state="finished")
    assert 90 == source.total()
    server.set(created_at=2.0)
    with pytest.raises(RunReplaced, match="now a different run"):
        source.total()


def test_contexts_are_asked_for_by_number(server: RunServer, source: DaemonSamples) -> None:
    """With few requests, in the order asked for; those that are missing or removed are not known."""
    server.contexts = [f"text {number}" for number in range(70)]

    assert isinstance(source, HasContexts)
    assert ["text 69", "text 3", "text 5", "text 3"] == source.contexts({}, [69, 3, 5, 3])
    assert 2 == server.asked["/v1/runs/one/contexts"]
    assert source.contexts({}, [5, 70]) is None
    server.set(refuse=[410])
    assert source.contexts({}, [5]) is None


async def test_a_new_row_ends_the_wait(server: RunServer, source: DaemonSamples) -> None:
    """So does the end of the run; nothing is asked meanwhile."""
    server.write(2)
    await asyncio.to_thread(source.fetch, 0, 5)
    before = server.asked.total()
    await source.changed(0.05)
    for state in ("running", "finished"):
        server.waiting.clear()
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            waiting = group.create_task(source.changed(60.0), name="waiting")
            assert await asyncio.to_thread(server.waiting.wait, 10)
            assert not waiting.done()
            server.write(1, state=state)
        await asyncio.to_thread(source.fetch, 0, 5)

    assert server.asked.total() - before <= 6


def test_a_missing_run_is_refused_at_once(server: RunServer, tmp_path: Path) -> None:
    """Before anything else is loaded."""
    server.set(refuse=[404])

    with pytest.raises(ConfigError, match=r"/v1/runs/one does not exist: not now"):
        open_sources(server.url, TrainSection(), tmp_path)
    assert not is_run_url("https://host/data/rows.jsonl")


def test_a_checkpoint_continues_with_the_directory_or_the_url(server: RunServer, tmp_path: Path) -> None:
    """Both number the same rows alike, so the position is the same, and exact."""
    with opened(tmp_path, sink()) as log:
        log.samples.append([sample(at) for at in range(60)])
        log.finish()
    server.set(rows=RunSamples(tmp_path)._samples.rows(0, 60), state="finished")
    whole = asyncio.run(plans(planner(Sources(RunSamples(tmp_path)), rendering=Alike())))

    async def step(sources: Sources, state: Any) -> StepPlan:
        stream = planner(sources, state, rendering=Alike())
        made = await stream.next(1000.0)
        stream.close()
        assert isinstance(made, StepPlan)
        return made

    made: list[StepPlan] = []
    for number in range(len(whole)):
        url = number % 2 == 0
        stream = DaemonSamples(server.url) if url else RunSamples(tmp_path)
        made.append(asyncio.run(step(Sources(stream), made[-1].state if made else None)))

    assert keys(whole) == keys(made)
