"""Seeds over HTTP: streamed, compressed, repeated, refused, cut off, and held up by a run that is slow."""

import asyncio
import gzip
import io
import resource
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import zstandard

from streamsyn.seeds.inbox import Inbox
from streamsyn.simulator.settings import SimulatorConfig
from tests.daemon.conftest import Served, StartDaemon, seed_lines

URL = "/v1/runs/one/seeds"
NOTHING = {"accepted": 0, "duplicate": 0, "refused": 0, "refused_lines": []}


def body_of(number: int, first: int = 0) -> bytes:
    return b"".join(line + b"\n" for line in seed_lines(number, first))


async def post(daemon: Served, body: Any, status: int = 202, **headers: str) -> dict[str, Any]:
    """Post seeds; the answer must have the status."""
    given = {"Content-Type": "application/x-ndjson"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    async with daemon.session.post(URL, data=body, headers=given) as answer:
        content: dict[str, Any] = await answer.json(content_type=None)
        assert status == answer.status, content
        return content


async def accepted(daemon: Served) -> int:
    counts = (await daemon.ask("GET", "/v1/runs/one"))["counts"]
    return int(counts["accepted"])


async def test_seeds_are_accepted_and_get_their_outcomes(daemon: Served) -> None:
    """Refused lines are named, repeated ones counted; each accepted seed has one outcome."""
    await daemon.new_run("one")
    first = await post(daemon, body_of(5) + b"nix\n\n{}\n" + seed_lines(1)[0])
    second = await post(daemon, body_of(7))
    await daemon.ask("POST", "/v1/runs/one/close")
    run = await daemon.until_state("one", "finished")

    assert (5, 1, 2) == (first["accepted"], first["duplicate"], first["refused"])
    assert [6, 8] == [line["line"] for line in first["refused_lines"]]
    assert "'nix'" in first["refused_lines"][0]["detail"]
    assert {**NOTHING, "accepted": 2, "duplicate": 5} == second
    assert (7, 7) == (run["counts"]["accepted"], run["counts"]["contexts"] + run["counts"]["rejects"])


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "identity": bytes,
}


@pytest.mark.parametrize("coding", PACK)
async def test_a_body_is_streamed_in_pieces(daemon: Served, coding: str) -> None:
    """Compressed or not, and wherever it is cut."""
    await daemon.new_run("one")
    await daemon.ask("POST", "/v1/runs/one/pause")
    packed = PACK[coding](body_of(300))

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(packed), 997):
            yield packed[start : start + 997]

    assert {**NOTHING, "accepted": 300} == await post(daemon, pieces(), Content_Encoding=coding)


async def test_a_key_repeats_the_answer(start_daemon: StartDaemon) -> None:
    """After a restart and to a closed run too; a different body, or one at the same time, is refused."""
    async with start_daemon() as daemon:
        await daemon.new_run("one")
        first = await post(daemon, body_of(3) + b"nix\n", Idempotency_Key="k-1")
        await daemon.ask("POST", "/v1/runs/one/close")
        await daemon.until_state("one", "finished")
        closed = await post(daemon, body_of(3) + b"nix\n", Idempotency_Key="k-1")
    async with start_daemon() as daemon:
        again = await post(daemon, body_of(3) + b"nix\n", Idempotency_Key="k-1")
        different = await post(daemon, body_of(4), 422, Idempotency_Key="k-1")
        unknown = await post(daemon, body_of(3), 409, Idempotency_Key="k-2")
        too_long = await post(daemon, body_of(3), 422, Idempotency_Key="k" * 256)

    assert {3: 1} == {first["accepted"]: first["refused"]}
    assert first == closed == again
    assert "different content" in different["detail"]
    assert "finished" in unknown["detail"]
    assert "1 to 255" in too_long["detail"]


async def test_a_key_is_for_one_request_at_a_time(daemon: Served) -> None:
    """The second is told to wait."""
    await daemon.new_run("one")
    begun, going_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield body_of(1)
        begun.set()
        await going_on.wait()
        yield body_of(1, 1)

    async with asyncio.TaskGroup() as group:
        first = group.create_task(post(daemon, slow(), Idempotency_Key="k"), name="first")
        await begun.wait()
        await daemon.until("one", lambda run: run.as_json()["counts"]["accepted"] == 1)
        second = await post(daemon, body_of(1), 409, Idempotency_Key="k")
        going_on.set()

    assert "is being received" in second["detail"]
    assert {**NOTHING, "accepted": 2} == first.result()


@pytest.mark.parametrize(("action", "why"), [("close", "closed"), ("drain", "resume it first")])
async def test_a_run_that_accepts_nothing_says_why(daemon: Served, action: str, why: str) -> None:
    """With 409, also in the middle of a body; what was accepted before stays."""
    await daemon.new_run("one")
    begun, changed = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield body_of(2)
        begun.set()
        await changed.wait()
        yield body_of(2, 2)

    async with asyncio.TaskGroup() as group:
        first = group.create_task(post(daemon, slow(), 409), name="first")
        await begun.wait()
        await daemon.until("one", lambda run: run.as_json()["counts"]["accepted"] == 2)
        await daemon.ask("POST", f"/v1/runs/one/{action}")
        changed.set()
    after = await post(daemon, body_of(1, 9), 409)

    assert 2 == first.result()["accepted"]
    assert 2 == await accepted(daemon)
    assert why in after["detail"]
    assert "accepted" not in after


async def test_a_client_that_goes_away_leaves_what_was_on_disk(daemon: Served) -> None:
    """And nothing of the line that it was sending."""
    await daemon.new_run("one")
    host, port = daemon.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/runs/one/seeds HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
    writer.write(body_of(3) + body_of(1, 3)[:20])
    await writer.drain()
    await daemon.until("one", lambda run: run.as_json()["counts"]["accepted"] == 3)
    writer.close()
    await writer.wait_closed()
    found = await post(daemon, body_of(4))

    assert {**NOTHING, "accepted": 1, "duplicate": 3} == found


async def test_an_endless_line_is_cut_off(start_daemon: StartDaemon) -> None:
    """With 413, without holding or reading it; so is a body that is too long, also once it is unpacked."""
    async with start_daemon({"serve.max_line_bytes": 100_000, "serve.max_body_bytes": 1_000_000}) as daemon:
        await daemon.new_run("one")
        await daemon.ask("POST", "/v1/runs/one/pause")
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            yield body_of(2)
            for _ in range(1000):
                sent += 1 << 16
                yield b"x" * (1 << 16)

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        line = await post(daemon, endless(), 413)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        bomb = await post(daemon, gzip.compress(body_of(1) * 20_000), 413, Content_Encoding="gzip")
        declared = await post(daemon, io.BytesIO(body_of(20_000)), 413)

    assert "line 3 is longer than 100,000 bytes" == line["detail"]
    assert 2 == line["accepted"]
    assert sent < 10 << 20
    assert grown < 30_000  # KiB
    assert "when decompressed" in bomb["detail"]
    assert "longer than 1,000,000 bytes" in declared["detail"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "detail"),
    [
        (b"x", {"Content_Encoding": "br"}, 415, "use gzip or zstd"),
        (b"not gzip", {"Content_Encoding": "gzip"}, 400, "not valid gzip"),
        # Without the time: its name must be the same for each process that runs tests.
        (gzip.compress(body_of(3), mtime=0)[:-9], {"Content_Encoding": "gzip"}, 400, "cut short"),
        (b"not zstd!", {"Content_Encoding": "zstd"}, 400, "not valid zstd"),
        (b"x", {"Content_Type": "multipart/form-data; boundary=x"}, 415, "one seed a line"),
    ],
)
async def test_bodies_that_cannot_be_read_are_refused(
    daemon: Served, body: bytes, headers: dict[str, str], status: int, detail: str
) -> None:
    """With what is wrong."""
    await daemon.new_run("one")

    assert detail in (await post(daemon, body, status, **headers))["detail"]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when a request begins to wait for a run to take up seeds."""
    event, room = asyncio.Event(), Inbox.room

    async def noted(inbox: Inbox, limit: int) -> None:
        event.set()
        await room(inbox, limit)

    monkeypatch.setattr(Inbox, "room", noted)
    return event


SLOW = {"serve.max_unread_seeds": 10, "fleet.max_in_flight": 1, "run.queue_size": 1}


async def test_whoever_submits_waits_for_a_slow_run(start_daemon: StartDaemon, waits: asyncio.Event) -> None:
    """A piece more than the limit is taken; the rest when the run is paused: the disk is the limit then."""
    async with start_daemon(SLOW, simulator=SimulatorConfig(latency_ms=60_000)) as daemon:
        await daemon.new_run("one")
        async with asyncio.TaskGroup() as group:
            posting = group.create_task(post(daemon, body_of(5000)), name="posting")
            await waits.wait()
            waiting = await accepted(daemon)
            await daemon.ask("POST", "/v1/runs/one/pause")
        await (await daemon.daemon.runs.get("one")).stop("the test is over", at_once=True)

    assert 10 < waiting < 5000
    assert {**NOTHING, "accepted": 5000} == posting.result()


async def test_a_daemon_that_ends_waits_for_no_slow_run(
    start_daemon: StartDaemon, waits: asyncio.Event
) -> None:
    """Whoever is submitting is told, with what was accepted."""
    keys = SLOW | {"run.drain_timeout_s": 0.1}
    async with start_daemon(keys, simulator=SimulatorConfig(latency_ms=60_000)) as daemon:
        await daemon.new_run("one")
        async with asyncio.TaskGroup() as group:
            posting = group.create_task(post(daemon, body_of(5000), 503), name="posting")
            await waits.wait()
            await daemon.daemon.drain()

    assert "the daemon is ending" == posting.result()["detail"]
    assert 10 < posting.result()["accepted"] < 5000
