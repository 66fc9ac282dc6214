"""Daemons whose ROOT other nodes share: what one has acknowledged counts, whoever serves ROOT next."""

import asyncio
import fcntl
from pathlib import Path

import pytest

from streamsyn.daemon import daemon as daemon_module
from streamsyn.errors import TakenOver, root_cause
from streamsyn.pipeline.verify import verify
from streamsyn.sink import epoch
from tests.builders import rows
from tests.daemon.conftest import Served, StartDaemon


@pytest.fixture
def other_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks keep nobody out, and whatever opens a directory seems to be on a node of its own."""
    nodes = (f"node {number}" for number in range(100))
    monkeypatch.setattr(epoch, "boot_id", lambda: next(nodes))
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


def forget_ends(root: Path) -> None:
    """Have all epochs look like those of processes that were killed, or are alive."""
    for token in root.rglob("epochs/0*"):
        token.write_bytes(token.read_bytes().splitlines(keepends=True)[0])


async def seeds_with_outcome(served: Served, run_id: str) -> list[str]:
    """Close the run, and return the seeds of its contexts when it has finished."""
    await served.ask("POST", f"/v1/runs/{run_id}/close")
    await served.until_state(run_id, "finished")
    root = served.daemon.runs.folder / run_id
    assert [] == (await asyncio.to_thread(verify, root))[0]
    return sorted(row["seed_id"] for row in await asyncio.to_thread(rows, root, "contexts"))


@pytest.mark.usefixtures("other_node")
async def test_a_daemon_goes_on_on_a_different_node(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """For all that is known the first one is alive: seeds that are submitted from then on are not lost."""
    root = tmp_path / "root"
    async with start_daemon() as served:
        run_id = (await served.new_run())["id"]
        await served.submit(run_id, 5)
        await served.until(run_id, lambda run: run.rows["contexts"] == 5)
    await asyncio.to_thread(forget_ends, root)
    async with start_daemon() as served:
        assert 1 == await served.submit(run_id, 1, first=5)
        await served.until(run_id, lambda run: run.rows["contexts"] == 6)  # it has claimed its directory
        assert 4 == await served.submit(run_id, 4, first=6)
        await served.until(run_id, lambda run: run.rows["contexts"] == 10)
    async with start_daemon() as served:
        assert 0 == await served.submit(run_id, 10)
        assert [f"s{n}" for n in range(10)] == await seeds_with_outcome(served, run_id)


@pytest.mark.usefixtures("other_node")
async def test_of_two_daemons_the_older_one_acknowledges_nothing(start_daemon: StartDaemon) -> None:
    """Whatever a client asks of it, and seeds that it has read already; the newer one takes them."""
    async with start_daemon() as older:
        run_id = (await older.new_run())["id"]
        assert 3 == await older.submit(run_id, 3)
        await older.until(run_id, lambda run: run.rows["contexts"] == 3)
        async with start_daemon() as newer:
            for path, body in ((f"/v1/runs/{run_id}/close", None), ("/v1/runs", {"id": "late"})):
                problem = await older.refused("POST", path, body)
                assert 503 == problem["status"]
                assert "was taken over by pid" in problem["detail"]
            assert not (older.daemon.runs.folder / "late").exists()
            with pytest.raises(TakenOver):
                await older.submit(run_id, 3, first=3)
            assert 3 == await newer.submit(run_id, 3, first=3)
            assert [f"s{n}" for n in range(6)] == await seeds_with_outcome(newer, run_id)


@pytest.mark.usefixtures("other_node")
async def test_a_daemon_that_was_taken_over_ends(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that nobody asks for anything."""
    monkeypatch.setattr(daemon_module, "CHECK_S", 0.01)

    started = asyncio.Event()

    async def serve() -> None:
        async with start_daemon():
            started.set()
            await asyncio.Event().wait()

    async def serve_both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(serve(), name="older")
            await started.wait()
            await serve()

    with pytest.raises(BaseExceptionGroup) as raised:
        await serve_both()
    assert isinstance(root_cause(raised.value), TakenOver)
