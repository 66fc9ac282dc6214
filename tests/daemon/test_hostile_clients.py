"""Hostile and broken clients: each is refused or cut off in time, nothing grows, no secret reaches a log."""

import asyncio
import contextlib
import gc
import io
import re
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import yarl

from streamsyn.daemon.access import RateLimit
from tests.daemon.conftest import Served, StartDaemon

SHORT = {"serve.body_timeout_s": 0.2, "serve.idle_timeout_s": 0.2}
HEAD = "POST /v1/runs/slow/seeds HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"


@contextlib.asynccontextmanager
async def connection(served: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection to the daemon."""
    port = int(served.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def sent(served: Served, data: bytes, max_bytes: int = 2**16) -> bytes:
    """What the daemon answers to some bytes until it closes the connection; it must do so within 10 s."""
    async with connection(served) as (reader, writer), asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(max_bytes):
                answer += piece
        return answer


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: 1",
        b"GET /healthz HTTP/1.1\r\nHost: loca",
    ],
    ids=["nothing", "method", "header", "half a header"],
)
async def test_a_connection_without_a_request_is_closed(start_daemon: StartDaemon, data: bytes) -> None:
    """A head that never comes to its end (slow loris) holds a connection for a bounded time."""
    async with start_daemon(SHORT) as served:
        assert await sent(served, data) == b""


async def test_an_idle_connection_is_closed(start_daemon: StartDaemon) -> None:
    """Between two requests as well."""
    async with start_daemon(SHORT) as served:
        answer = await sent(served, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/runs/slow/seeds"])
async def test_a_body_that_stops_is_given_up(start_daemon: StartDaemon, path: str) -> None:
    """408, and the connection is closed."""
    async with start_daemon(SHORT) as served:
        await served.new_run("slow")
        head = HEAD.replace("/v1/runs/slow/seeds", path) + 'Content-Length: 100\r\n\r\n{"id'
        answer = await sent(served, head.encode())
        assert answer.startswith(b"HTTP/1.1 408")


NOT_HTTP = (
    (b"\x00\x01\x02\r\n\r\n", 400),
    (b"GET / HTTP/9.9\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 400),
    (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 5000 + b"\r\n", 400),
    (HEAD.encode() + b"Content-Length: -5\r\n\r\n", 400),
    (HEAD.encode() + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", 400),
    (HEAD.encode() + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nabcde", 400),
    (HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nnot-a-size\r\n", 400),
    (HEAD.encode() + b"Content-Length: 99999999999999\r\n\r\n", 413),
)


async def test_what_is_not_http(daemon: Served) -> None:
    """Refused with one answer; the connection is closed, so that nothing is taken for a second request."""
    await daemon.new_run("slow")
    for data, status in NOT_HTTP:
        answer = await sent(daemon, data)
        assert re.match(rb"HTTP/1\.[01] %d " % status, answer), (data[:80], answer[:80])
        assert answer.count(b"HTTP/1.") == 1


PATHS = (
    "/v1/runs/..%2f..%2fetc%2fpasswd",
    "/v1/runs/../../../etc/passwd",
    "/v1/runs/%2e%2e/service.json",
    "/v1/runs/first%00",
    "/v1/runs/first%2fservice.json",
    "/v1/runs/.hidden",
    "//etc/passwd",
    "/v1/runs/" + "%c0%ae" * 4,
    "/v1/runs/first/../first",
    "/page/../daemon.json",
    "/v1/files/..%2fruns%2ffirst/content",
)


async def test_paths_lead_nowhere(daemon: Served) -> None:
    """What is not an id that exists is not found; nothing outside is read or deleted."""
    await daemon.new_run("first")
    for path in PATHS:
        for method in "GET", "DELETE", "POST":
            url = yarl.URL(daemon.url + path, encoded=True)
            async with daemon.session.request(method, url) as answer:
                assert answer.status in {400, 404, 405}, (method, path)
                body = await answer.text()
                assert "root:" not in body
                assert "format_version" not in body
    assert await asyncio.to_thread((daemon.daemon.root / "runs" / "first" / "service.json").is_file)


MALFORMED = (
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b"[" * 100_000, 400),
    (b"[" * 500 + b"]" * 500, 422),
    (b"NaN", 400),
    (b"null", 422),
    (b"[]", 422),
    (b'{"id": 5}', 422),
    (b'{"id": "a", "unknown": 1}', 422),
    (b'{"weight": 1e999}', 400),
    (b'{"weight": -1}', 422),
    (b'{"weight": true}', 422),
    (b'{"weight": "NaN"}', 422),
    (b'{"labels": {"a": {}}}', 422),
    (b'{"config": {"recipe": 5}}', 422),
    (b'{"config": {"recipe": {"target_words": 1e300}}}', 422),
    (b'{"config": {"run": {"seed": 99999999999999999999999999}}}', 422),
    (b'{"config": {"' + b"a" * 100_000 + b'": {}}}', 422),
    (b'{"config": {"seeds": {"fields": {"instruction": "\\ud800"}}}}', 400),
    (b'{"templates": {"recipe": "\\u0000"}}', 422),
    (b"x" * (2**20 + 1), 413),
)


async def test_malformed_json(daemon: Served) -> None:
    """Each mistake of a body is the client's: never a server error, nor an endless message."""
    headers = {"Content-Type": "application/json"}
    for body, status in MALFORMED:
        async with daemon.session.post("/v1/runs", data=io.BytesIO(body), headers=headers) as answer:
            content = await answer.json(content_type=None)
            assert (answer.status, content["status"]) == (status, status), (body[:80], content)
            assert len(orjson.dumps(content)) < 10_000
    assert (await daemon.ask("GET", "/v1/runs"))["data"] == []


async def test_a_body_that_is_not_an_object_is_named(daemon: Served) -> None:
    """The message has something to begin with."""
    async with daemon.session.post("/v1/runs", json=[]) as answer:
        assert (await answer.json())["detail"] == "the body must be a JSON object"


async def test_a_malformed_request_is_not_logged_with_its_token(
    daemon: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the header that is wrong, nor a traceback."""
    url = yarl.URL(daemon.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"GET /v1/runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer geheim\x01\r\n\r\n")
    assert b" 400 " in await reader.readline()
    writer.close()
    assert "geheim" not in caplog.text


async def test_endless_lines_take_no_memory(start_daemon: StartDaemon) -> None:
    """A line of 64 MB, and a body that is sent on for ever, are refused without being kept."""
    line = b"x" * 2**20

    async def body() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield line

    async with start_daemon({"serve.max_body_bytes": 2**27}) as served:
        await served.new_run("wide")
        gc.collect()
        tracemalloc.start()
        try:
            with contextlib.suppress(OSError):  # cut off while it still sends
                async with served.session.post("/v1/runs/wide/seeds", data=body()) as answer:
                    assert answer.status in {202, 413}
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 24 * 2**20
        assert (await served.ask("GET", "/v1/runs/wide"))["counts"]["accepted"] == 0


async def test_connections_beyond_the_limit_are_answered_and_closed(start_daemon: StartDaemon) -> None:
    """503 at once; when others go, there is room again."""
    async with start_daemon({"serve.max_connections": 3}) as served:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                _, writer = await stack.enter_async_context(connection(served))
                writer.write(b"GET /healthz HTTP/1.1\r\n")
            answer = await sent(served, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503")
            assert orjson.loads(body)["status"] == 503
            assert f"Content-Length: {len(body)}".encode() in head
        async with asyncio.timeout(10):
            while not (await sent(served, b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")).startswith(
                b"HTTP/1.0 200"
            ):
                continue


async def test_a_client_that_asks_too_often(start_daemon: StartDaemon) -> None:
    """429 with the time to wait; others, such as probes of health from elsewhere, are counted apart."""
    async with start_daemon({"serve.requests_per_s": 5.0}) as served:
        statuses = []
        for _ in range(8):
            async with served.session.get("/v1/runs") as answer:
                statuses.append(answer.status)
                if answer.status == 429:
                    assert int(answer.headers["Retry-After"]) >= 1
        assert statuses[:5] == [200] * 5
        assert 429 in statuses


def test_the_rate_of_each_client() -> None:
    """A bucket holds the requests of a second and fills at the rate; clients do not share one."""
    now = 0.0
    limit = RateLimit(lambda: now)
    assert [limit.wait_s("a", 4) for _ in range(4)] == [0, 0, 0, 0]
    assert limit.wait_s("a", 4) == pytest.approx(0.25)
    assert limit.wait_s("b", 4) == 0
    now = 0.25
    assert limit.wait_s("a", 4) == 0
    assert limit.wait_s("a", 4) > 0
    now = 100.0
    assert [limit.wait_s("a", 4) == 0 for _ in range(5)] == [True] * 4 + [False]
    for number in range(20_000):
        limit.wait_s(str(number), 4)
    assert len(limit._buckets) <= 10_000


async def test_no_secret_is_logged(
    start_daemon: StartDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither tokens, right or wrong, nor passwords in URLs, nor bodies; requests have ids instead."""
    path = tmp_path / "tokens"
    path.write_text("ann admin SECRET-admin-token\n")
    async with start_daemon({"serve.tokens_file": str(path)}) as served:
        for token in ("SECRET-admin-token", "SECRET-wrong-token"):
            headers = {"Authorization": f"Bearer {token}", "X-Request-Id": "mine-1"}
            for body in (
                b'{"id": "SECRET',
                b'{"labels": {"a": "http://user:SECRET@host"}, "config": {"SECRET": {}}}',
            ):
                async with served.session.post("/v1/runs", data=body, headers=headers) as answer:
                    assert answer.headers["X-Request-Id"] == "mine-1"
                    await answer.read()
    output = capsys.readouterr()
    assert "SECRET" not in output.out + output.err


async def test_a_bug_is_logged_under_its_request(
    daemon: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The client gets an id and no more; the log has the traceback under it."""

    async def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug with a SECRET")

    monkeypatch.setattr(daemon.daemon.runs, "page", broken)
    problem = await daemon.refused("GET", "/v1/runs", headers={"X-Request-Id": "mine-2"})
    assert problem["status"] == 500
    assert "mine-2" in problem["detail"]
    assert "SECRET" not in str(problem)
    assert "mine-2" in capsys.readouterr().err


async def test_clients_that_hang_up(daemon: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that changes something is finished when its client is gone; the daemon goes on."""
    body = orjson.dumps({"id": "left"})
    head = f"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json"
    runs, begun, gone, done = daemon.daemon.runs, asyncio.Event(), asyncio.Event(), asyncio.Event()
    create = runs.create

    async def slowly(*args: Any) -> Any:
        begun.set()
        await gone.wait()
        try:
            return await create(*args)
        finally:
            done.set()

    monkeypatch.setattr(runs, "create", slowly)
    async with asyncio.timeout(10):
        async with connection(daemon) as (_, writer):
            writer.write(f"{head}\r\n\r\n".encode() + body)
            await begun.wait()
        gone.set()
        await done.wait()
    assert (await daemon.ask("GET", "/v1/runs/left"))["state"] == "running"
