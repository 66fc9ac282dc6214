"""`follow` and `streamsyn train --from` on a real daemon."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import structlog

from streamsyn.errors import ConfigError
from streamsyn.following import daemon_client
from streamsyn.following.follow import Follower, follow
from streamsyn.trainer.sources.run_samples import DaemonSamples
from tests.builders import rows
from tests.daemon.conftest import Served, StartDaemon


async def read_rest(follower: Follower) -> list[int]:
    """The numbers of the rows that are left."""
    return [row["seq"] async for row in follower]


async def test_a_run_is_followed_to_its_end(daemon: Served, tmp_path: Path) -> None:
    """Each kind as it stands in the directory, while it is written."""
    await daemon.new_run("one")
    found: dict[str, list[Any]] = {}

    async def read(kind: Any) -> None:
        async with follow(f"{daemon.url}/v1/runs/one", kind=kind) as follower:
            found[kind] = [row async for row in follower]

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for kind in ("samples", "contexts", "rejects"):
            group.create_task(read(kind), name=kind)
        await daemon.submit("one", 12)
        await daemon.until("one", lambda run: run.as_json()["counts"]["samples"] > 3)
        await daemon.submit("one", 12, 12)
        await daemon.ask("POST", "/v1/runs/one/close")
    root = tmp_path / "root" / "runs" / "one"

    assert 24 == len(found["contexts"]) + len(found["rejects"])
    for kind, lines in found.items():
        assert await asyncio.to_thread(rows, root, kind) == lines


async def test_a_run_that_is_gone_or_not_there_is_an_error(daemon: Served) -> None:
    """It is not waited for unless asked."""
    with pytest.raises(ConfigError, match="/v1/runs/none/samples does not exist"):
        await anext(follow(f"{daemon.url}/v1/runs/none"))
    await daemon.new_run("one")
    async with follow(f"{daemon.url}/v1/runs/one") as follower:
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(anext(follower), name="waiting")
            await daemon.submit("one", 3)
        assert 0 == waiting.result()["seq"]
        await daemon.ask("DELETE", "/v1/runs/one?force=true")
        with pytest.raises(ConfigError, match="does not exist"):
            await read_rest(follower)


async def test_a_daemon_that_starts_again_is_followed_on(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row once; the interruption is logged."""
    monkeypatch.setattr(daemon_client, "FIRST_PAUSE_S", 0.05)
    seqs: list[int] = []
    async with start_daemon() as first:
        await first.new_run("one")
        await first.submit("one", 6)
        port = first.url.rpartition(":")[2]
        follower = follow(f"{first.url}/v1/runs/one")
        seqs.append((await anext(follower))["seq"])

    async def read() -> None:
        seqs.extend(await read_rest(follower))

    with structlog.testing.capture_logs() as logged:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            reading = group.create_task(read(), name="reading")
            async with start_daemon({"serve.listen": f"127.0.0.1:{port}"}) as second:
                await second.submit("one", 6, 6)
                await second.ask("POST", "/v1/runs/one/close")
                await second.until_state("one", "finished")
                last = (await second.ask("GET", "/v1/runs/one"))["last"]["samples"]
                await asyncio.wait([reading])

    assert list(range(last + 1)) == seqs
    assert "follow.interrupted" in {line["event"] for line in logged}


async def test_a_training_reads_the_samples_of_a_daemon(daemon: Served, tmp_path: Path) -> None:
    """All of them, and their number once the run has finished."""
    await daemon.new_run("one")
    source = await asyncio.to_thread(DaemonSamples, f"{daemon.url}/v1/runs/one")
    before = await asyncio.to_thread(source.total)
    await daemon.submit("one", 8)
    await daemon.ask("POST", "/v1/runs/one/close")
    await daemon.until_state("one", "finished")
    total = await asyncio.to_thread(source.total)
    found = await asyncio.to_thread(source.fetch, 0, 100)
    await asyncio.to_thread(source.close)

    assert before is None
    assert total == len(found)
    assert await asyncio.to_thread(rows, tmp_path / "root" / "runs" / "one", "samples") == found
