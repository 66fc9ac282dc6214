"""Streams of a hosted run over HTTP: live and complete, from any row, for named consumers, across cuts."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from streamsyn.sink.shards import KINDS
from tests.daemon.conftest import Served, StartDaemon


async def rows(served: Served, path: str, **headers: str) -> list[dict[str, Any]]:
    """The rows of a stream that ends."""
    async with served.session.get(path, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return [orjson.loads(line) for line in (await answer.read()).splitlines()]


def seqs(found: list[dict[str, Any]]) -> list[int]:
    return [row["seq"] for row in found]


async def finished(served: Served, run_id: str, seeds: int) -> dict[str, Any]:
    await served.new_run(run_id)
    await served.submit(run_id, seeds)
    await served.ask("POST", f"/v1/runs/{run_id}/close")
    return await served.until_state(run_id, "finished")


async def test_a_stream_follows_a_run_to_its_end(daemon: Served) -> None:
    """Each row once and in order, whenever the reader comes; each is the line of the shard."""
    await daemon.new_run("r")
    async with asyncio.TaskGroup() as group:
        early = [group.create_task(rows(daemon, f"/v1/runs/r/{kind}?follow=1"), name=kind) for kind in KINDS]
        await daemon.submit("r", 10)
        run = await daemon.until("r", lambda run: run.rows["samples"] > 3)
        late = group.create_task(rows(daemon, "/v1/runs/r/samples?follow=true"), name="late")
        await daemon.submit("r", 10, first=10)
        await daemon.ask("POST", "/v1/runs/r/close")
    for kind, task in zip(KINDS, early, strict=True):
        assert seqs(task.result()) == list(range(run.rows[kind]))
        on_disk = b"".join(path.read_bytes() for path in sorted((run.root / kind).glob("part-*")))
        assert [orjson.loads(line) for line in on_disk.splitlines()] == task.result()
    assert late.result() == early[KINDS.index("samples")].result()
    assert run.rows["contexts"] == 20


async def test_where_a_stream_begins_and_ends(daemon: Served) -> None:
    await finished(daemon, "r", 8)
    path = "/v1/runs/r/contexts"
    assert seqs(await rows(daemon, path)) == list(range(8))
    assert seqs(await rows(daemon, f"{path}?after=5")) == [6, 7]
    assert seqs(await rows(daemon, f"{path}?after=-1&limit=2")) == [0, 1]
    assert seqs(await rows(daemon, f"{path}?after=2&limit=3&follow=1")) == [3, 4, 5]
    assert seqs(await rows(daemon, f"{path}?after=7&follow=1")) == []
    assert seqs(await rows(daemon, f"{path}?after=1", **{"Last-Event-ID": "5"})) == [6, 7]
    async with daemon.session.get(f"{path}?after=6", headers={"Accept": "text/event-stream"}) as answer:
        text = await answer.text()
    assert text.startswith('id: 7\ndata: {"seq":7,')
    assert text.endswith('\n\nevent: end\ndata: {"rows":8}\n\n')
    async with daemon.session.head(path) as answer:
        assert (answer.status, await answer.read()) == (200, b"")


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        ("after=x", {}, 422),
        ("after=-2", {}, 422),
        ("limit=0", {}, 422),
        ("follow=maybe", {}, 422),
        ("consumer=nobody", {}, 404),
        ("", {"Accept": "text/html"}, 406),
    ],
)
async def test_a_wrong_request_is_refused(
    daemon: Served, query: str, headers: dict[str, str], status: int
) -> None:
    await daemon.new_run("r")
    problem = await daemon.refused("GET", f"/v1/runs/r/samples?{query}", headers=headers)
    assert problem["status"] == status
    assert (await daemon.refused("GET", "/v1/runs/nothing/samples"))["status"] == 404


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        ("gzip, zstd", "zstd"),
        ("gzip, deflate, br", "gzip"),
        ("zstd;q=0.5, gzip;q=0.8", "gzip"),
        ("*", "gzip"),
        ("gzip;q=0, br", None),
        ("identity, gzip;q=0.5", None),
        ("", None),
        ("gzip;q=x", None),
    ],
)
async def test_the_coding_is_what_the_client_prefers(daemon: Served, accept: str, coding: str | None) -> None:
    await finished(daemon, "r", 2)
    async with (
        aiohttp.ClientSession(daemon.url, auto_decompress=False) as session,
        session.get("/v1/runs/r/contexts", headers={"Accept-Encoding": accept}) as answer,
    ):
        assert answer.headers.get("Content-Encoding") == coding


async def test_a_restart_cuts_streams_off_and_a_reader_takes_up_where_it_was(
    start_daemon: StartDaemon,
) -> None:
    """No row twice, none missing; the cut is not taken for the end."""
    seen: list[int] = []
    async with start_daemon() as served:
        await served.new_run("r")
        await served.submit("r", 6)
        await served.until("r", lambda run: run.rows["contexts"] == 6)
        async with served.session.get("/v1/runs/r/contexts?follow=1") as answer:
            while len(seen) < 6:
                seen.append(orjson.loads(await answer.content.readline())["seq"])
            began = asyncio.get_running_loop().time()
            served.daemon.hosting.streams.close()
            with pytest.raises(aiohttp.ClientError):
                await answer.content.read()
            assert asyncio.get_running_loop().time() - began < 1
        assert (await served.refused("GET", "/v1/runs/r/contexts"))["status"] == 503
    async with start_daemon() as served:
        await served.submit("r", 3, first=6)
        await served.ask("POST", "/v1/runs/r/close")
        seen += seqs(await rows(served, f"/v1/runs/r/contexts?follow=1&after={seen[-1]}"))
    assert seen == list(range(9))


async def test_streams_of_a_paused_run_wait_and_of_a_deleted_one_are_cut_off(daemon: Served) -> None:
    await daemon.new_run("r")
    await daemon.submit("r", 2)
    await daemon.until("r", lambda run: run.rows["contexts"] == 2)
    await daemon.ask("POST", "/v1/runs/r/pause")
    await daemon.until_state("r", "paused")
    async with daemon.session.get("/v1/runs/r/contexts?follow=1&after=0") as answer:
        assert orjson.loads(await answer.content.readline())["seq"] == 1
        await daemon.submit("r", 1, first=2)
        await daemon.ask("POST", "/v1/runs/r/resume")
        assert orjson.loads(await answer.content.readline())["seq"] == 2
        await daemon.ask("DELETE", "/v1/runs/r?force=true")
        with pytest.raises(aiohttp.ClientError):
            await answer.content.read()
    assert not daemon.daemon.hosting.streams.tails
    await daemon.new_run("r")  # a new run of this id has rows of its own
    assert await rows(daemon, "/v1/runs/r/contexts") == []


async def test_a_run_that_is_reopened_goes_on_where_its_rows_ended(daemon: Served) -> None:
    await finished(daemon, "r", 3)
    assert seqs(await rows(daemon, "/v1/runs/r/contexts?follow=1")) == [0, 1, 2]
    await daemon.ask("POST", "/v1/runs/r/resume")
    async with daemon.session.get("/v1/runs/r/contexts?follow=1&after=2") as answer:
        await daemon.submit("r", 2, first=3)
        assert orjson.loads(await answer.content.readline())["seq"] == 3
        await daemon.ask("POST", "/v1/runs/r/close")
        assert len((await answer.content.read()).splitlines()) == 1


async def test_a_named_consumer_goes_on_behind_its_acknowledgement(start_daemon: StartDaemon) -> None:
    path = "/v1/runs/r/consumers"
    async with start_daemon() as served:
        await finished(served, "r", 6)
        assert await served.ask("PUT", f"{path}/trainer", {"kind": "samples"}) == {
            "name": "trainer",
            "kind": "samples",
            "acked": None,
            "lag": 6,
        }
        assert seqs(await rows(served, "/v1/runs/r/samples?consumer=trainer")) == list(range(6))
        acked = await served.ask("POST", f"{path}/trainer/ack", {"seq": 3})
        assert (acked["acked"], acked["lag"]) == (3, 2)
        assert (await served.ask("GET", "/v1/runs/r"))["consumers"] == [acked]
        assert (await served.ask("POST", f"{path}/trainer/ack", {"seq": 1}))["acked"] == 3
        problem = await served.refused("POST", f"{path}/trainer/ack", {"seq": 6})
        assert (problem["status"], "the last row is 5" in problem["detail"]) == (409, True)
        await served.ask("PUT", f"{path}/audit", {"kind": "rejects"})
        assert (await served.refused("GET", "/v1/runs/r/samples?consumer=audit"))["status"] == 409
    async with start_daemon() as served:
        assert (await served.ask("GET", "/v1/runs"))["data"][0]["consumers"][0] == acked
        assert await served.ask("GET", path) == {
            "data": [
                {"name": "trainer", "kind": "samples", "acked": 3, "lag": 2},
                {"name": "audit", "kind": "rejects", "acked": None, "lag": 0},
            ]
        }
        assert seqs(await rows(served, "/v1/runs/r/samples?consumer=trainer")) == [4, 5]
        assert seqs(await rows(served, "/v1/runs/r/samples?consumer=trainer&after=0")) == [1, 2, 3, 4, 5]
        await served.ask("DELETE", f"{path}/audit")
        assert (await served.refused("GET", f"{path}/audit"))["status"] == 404
        assert (await served.refused("PUT", f"{path}/..%2F..%2Fx"))["status"] in {404, 422}
        assert (await served.refused("PUT", f"{path}/new", {"after": 6}))["status"] == 409


async def test_a_finished_run_that_nobody_reads_keeps_nothing_open(daemon: Served, tmp_path: Path) -> None:
    await finished(daemon, "r", 3)
    await rows(daemon, "/v1/runs/r/samples")
    streams = daemon.daemon.hosting.streams
    assert (streams.readers, streams.cache.bytes, streams.tails) == (0, 0, set())
