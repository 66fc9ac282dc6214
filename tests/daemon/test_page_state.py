"""What the page gets: its files, and the states that it shows."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import orjson
import pytest

from streamsyn.daemon import page_routes
from streamsyn.daemon.page_routes import MAX_POINTS, PAGE_FILES, PageState, Throughput
from tests.daemon.conftest import Served, StartDaemon


async def states(answer: aiohttp.ClientResponse, number: int) -> list[dict[str, Any]]:
    """The first states of a stream."""
    found: list[dict[str, Any]] = []
    while len(found) < number:
        line = await answer.content.readline()
        assert line, "the stream has ended"
        if line.startswith(b"data: "):
            found.append(orjson.loads(line[6:]))
    return found


async def test_a_state_has_what_the_page_shows(daemon: Served) -> None:
    """Runs as the API shows them, the number in each state, throughput, disk, and readiness."""
    await daemon.new_run("books")
    async with daemon.session.get("/v1/events") as answer:
        assert "text/event-stream" == answer.headers["Content-Type"]
        [state] = await states(answer, 1)
    async with daemon.session.head("/v1/events") as answer:
        assert b"" == await answer.read()

    assert [await daemon.ask("GET", "/v1/runs/books")] == state["runs"]
    assert {"running": 1} == state["states"]
    assert {"outcomes_per_s": 0, "output_tokens_per_s": 0} == state["rates"]
    assert len(state["history"]["at"]) == len(state["history"]["outcomes_per_s"]) >= 1
    assert 0 < state["disk"]["free_bytes"] < state["disk"]["total_bytes"]
    assert {"ok": True, "why": None} == state["ready"]
    assert daemon.daemon.started_at == state["started_at"] < state["at"]


async def test_a_state_is_computed_once_for_all_and_only_while_somebody_watches(
    daemon: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten who watch cost as much as one."""
    computed = 0
    compute = PageState._state

    async def counting(self: PageState) -> dict[str, Any]:
        nonlocal computed
        computed += 1
        return await compute(self)

    monkeypatch.setattr(PageState, "_state", counting)
    monkeypatch.setattr(page_routes, "EVERY_S", 1e6)
    await daemon.new_run()
    assert 0 == computed
    answers = [await daemon.session.get("/v1/events") for _ in range(10)]
    found = [await states(answer, 1) for answer in answers]
    for answer in answers:
        answer.close()

    assert 1 == computed
    assert all(state == found[0] for state in found)


async def test_runs_that_have_ended_are_shown_behind_those_that_have_not(daemon: Served) -> None:
    """Of those that have ended the newest ones, up to a number."""
    for number in range(3):
        await daemon.new_run(f"ended-{number}")
        await daemon.ask("POST", f"/v1/runs/ended-{number}/close")
        await daemon.until_state(f"ended-{number}", "finished")
    await daemon.new_run("active")
    state = PageState(daemon.daemon)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_routes, "MAX_RUNS", 3)
        shown = [run["id"] for run in await state._runs()]

    assert ["active", "ended-2"] == shown[:2]
    assert "ended-0" not in shown
    assert {"finished": 3, "running": 1} == daemon.daemon.runs.by_state()


async def test_the_stream_ends_with_the_daemon(start_daemon: StartDaemon) -> None:
    """Who watches does not keep the daemon from ending."""
    async with start_daemon() as served:
        answer = await served.session.get("/v1/events")
        await states(answer, 1)
        await served.daemon.drain()
        async for _ in answer.content:
            pass


async def test_who_takes_nothing_is_cut_off(daemon: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stands still keeps its connection for a time, not for ever."""
    left = asyncio.Event()
    watched = PageState.watched

    @contextmanager
    def noted(self: PageState) -> Iterator[None]:
        with watched(self):
            yield
        left.set()

    async def large(self: PageState) -> bytes:
        return bytes(2**23)

    monkeypatch.setattr(PageState, "watched", noted)
    monkeypatch.setattr(PageState, "event", large)
    monkeypatch.setattr(page_routes, "WRITE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(page_routes, "EVERY_S", 0.001)
    host, port = daemon.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1)
    writer.write(f"GET /v1/events HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    async with asyncio.timeout(10):
        await left.wait()
    writer.close()


async def test_the_page_runs_only_its_own_code(daemon: Served) -> None:
    """Each file has its type, and headers that allow neither inline code, other origins nor frames."""
    for name in PAGE_FILES:
        async with daemon.session.get("/" if name == "index.html" else f"/page/{name}") as answer:
            assert 200 == answer.status
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert "nosniff" == answer.headers["X-Content-Type-Options"]
            assert "no-referrer" == answer.headers["Referrer-Policy"]
            text = await answer.text()
        assert "http://" not in text.replace("http://127.0.0.1:30000", "").replace(
            "http://www.w3.org/2000/svg", ""
        )
        assert "https://" not in text
        assert "innerHTML" not in text
        assert "style=" not in text
    await daemon.refused("GET", "/page/..%2fpage_state.py")


def test_throughput_is_kept_for_an_hour() -> None:
    """Older points are dropped."""
    throughput = Throughput()
    for at in range(MAX_POINTS + 5):
        throughput.add(float(at), {"outcomes_per_s": 1.0, "output_tokens_per_s": 2.0})

    points = throughput.as_json()
    assert MAX_POINTS == len(points["at"]) == len(points["outcomes_per_s"])
    assert 5.0 == points["at"][0]
