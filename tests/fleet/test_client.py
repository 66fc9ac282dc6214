"""The client of one server over real sockets, with scripted failures: only our own errors are raised."""

import asyncio
import os
import resource
import socket
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from streamsyn.errors import (
    BrokenResponse,
    ConfigError,
    RateLimited,
    RequestRefused,
    ServerBusy,
    ServerError,
    ServerTimeout,
    ServerUnavailable,
    ServerUnreachable,
    WrongAddress,
)
from streamsyn.fleet import transport as transport_module
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.transport import http_transport
from streamsyn.records import Request
from streamsyn.simulator.app import RunningSimulator, running
from streamsyn.simulator.settings import BAD_CONTENT, Fault, Script, SimulatorConfig

pytestmark = pytest.mark.usefixtures("no_task_left")

DAY = b"Mon, 30 Nov 2026 %s GMT"
REQUEST = Request([{"role": "user", "content": "About geese."}], {})
ANSWER = (
    b'{"model": "m", "choices": [{"message": {"content": "Geese."}, "finish_reason": "stop"}],'
    b' "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@asynccontextmanager
async def client_of(
    url: str, *, request_timeout_s: float = 5.0, key: str | None = None, connect_timeout_s: float = 2.0
) -> AsyncIterator[ServerClient]:
    """A client with a session of its own."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    opened = http_transport(url, headers, connect_timeout_s=connect_timeout_s, max_answer_bytes=2**20)
    async with asyncio.timeout(20), opened as transport:
        yield ServerClient(url, transport, request_timeout_s)


@asynccontextmanager
async def simulated(
    script: Script = (), *, request_timeout_s: float = 5.0, key: str | None = None, **fields: object
) -> AsyncIterator[tuple[ServerClient, RunningSimulator]]:
    """A client and the simulator that it asks."""
    config = SimulatorConfig(**fields)  # type: ignore[arg-type]
    async with (
        running(config, script=script) as server,
        client_of(server.url, request_timeout_s=request_timeout_s, key=key) as client,
    ):
        yield client, server


class RawServer:
    """Answers each request of each connection with bytes by hand; what it serves is a list of them.

    An entry of None closes the connection; each connection begins with the next script.
    """

    def __init__(self, *scripts: Sequence[bytes | None]) -> None:
        self.scripts = list(scripts)
        self.bodies: list[bytes] = []
        self.connections = self.served = 0
        self.url = ""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        script = self.scripts[min(self.connections, len(self.scripts) - 1)]
        self.connections += 1
        self.served += 1
        try:
            for sent in script:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                )
                self.bodies.append(await reader.readexactly(length))
                if sent is None:
                    break
                writer.write(sent)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.served -= 1


@asynccontextmanager
async def raw(*scripts: Sequence[bytes | None]) -> AsyncIterator[tuple[ServerClient, RawServer]]:
    """A client and the raw server that it asks."""
    handler = RawServer(*scripts)
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        handler.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with client_of(handler.url) as client:
            yield client, handler
            server.close()
        await until(lambda: not handler.served)


async def until(condition: Callable[[], object]) -> None:
    """Return when `condition` holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0)


def closed_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


async def test_an_answer() -> None:
    """A completion has all values of the answer, and the server's URL."""
    async with simulated(words=20) as (client, server):
        completion = await client.chat(REQUEST, "any", "r-1")
    assert ("stop", "any", server.url, "default") == (
        completion.finish_reason,
        completion.model,
        completion.server,
        completion.weight_version,
    )
    assert completion.text
    assert server.simulation.stats.prompt_tokens == completion.prompt_tokens > 0
    assert server.simulation.stats.completion_tokens == completion.completion_tokens > 0


WHAT_BECOMES: dict[Fault, type[ServerError]] = {
    Fault.QUEUE_FULL: ServerBusy,
    Fault.RATE_LIMIT: RateLimited,
    Fault.PAUSE: RateLimited,
    Fault.HTTP_500: ServerUnavailable,
    Fault.REFUSE: RequestRefused,
    Fault.RESET: ServerUnavailable,
    Fault.ERROR_IN_200: ServerUnavailable,
    Fault.CUT_BODY: ServerUnavailable,
    Fault.BAD_JSON: BrokenResponse,
    Fault.STALL: ServerTimeout,
    Fault.ABORTED: BrokenResponse,
}


def test_every_fault_is_covered() -> None:
    """The table of this test knows all faults that the simulator has."""
    assert set(Fault) == WHAT_BECOMES.keys() | BAD_CONTENT


@pytest.mark.parametrize("fault", WHAT_BECOMES)
async def test_a_fault_becomes_its_error(fault: Fault) -> None:
    """On a fresh connection, and on one that was used before: the same error, and it names the server."""
    timeout_s = 0.3 if fault is Fault.STALL else 5.0  # only what stalls is to time out
    async with simulated(lambda _, __: fault, request_timeout_s=timeout_s) as (client, server):
        with pytest.raises(ServerError, match=server.url) as fresh:
            await client.chat(REQUEST, "m", "r-1")
    async with simulated(lambda number, _: fault if number > 1 else None, request_timeout_s=timeout_s) as (
        client,
        _,
    ):
        await client.chat(REQUEST, "m", "r-1")
        with pytest.raises(ServerError) as reused:
            await client.chat(REQUEST, "m", "r-2")
    assert [WHAT_BECOMES[fault]] * 2 == [type(fresh.value), type(reused.value)]


@pytest.mark.parametrize("fault", sorted(BAD_CONTENT))
async def test_bad_content_is_an_answer(fault: Fault) -> None:
    """The client accepts bad content; checks reject it later."""
    async with simulated([fault]) as (client, server):
        await client.chat(Request(REQUEST.messages, {}), "m", "r-1")
        assert 1 == server.simulation.stats.answered


async def test_one_reset_is_retried_two_are_an_error() -> None:
    """A connection that breaks at once may have been stale: the request is sent once more, not twice."""
    async with simulated([Fault.RESET]) as (client, server):
        await client.chat(REQUEST, "m", "r-1")
        assert 2 == server.simulation.stats.requests
    async with simulated([Fault.RESET] * 5) as (client, server):
        with pytest.raises(ServerUnavailable, match="closed the connection"):
            await client.chat(REQUEST, "m", "r-1")
        assert 2 == server.simulation.stats.requests


@pytest.mark.parametrize("last", [b"", None])
async def test_a_stale_connection_costs_nothing(last: bytes | None) -> None:
    """A kept-alive connection that the server closes is replaced, and the request is answered."""
    whole = HEAD % len(ANSWER) + ANSWER
    first = [whole] if last == b"" else [whole, None]  # closed when idle; closed at the next request
    async with raw(first, [whole]) as (client, server):
        for rid in ("r-1", "r-2"):
            assert "Geese." == (await client.chat(REQUEST, "m", rid)).text
    assert 2 == server.connections
    assert b'"rid":"r-2"' in server.bodies[-1]


async def test_a_connection_that_breaks_late_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server was working on the request and would refuse its rid: it is not sent again."""
    monkeypatch.setattr(transport_module, "_STALE_WITHIN_S", 0.0)
    async with raw([None]) as (client, server):
        with pytest.raises(ServerUnavailable, match="closed the connection"):
            await client.chat(REQUEST, "m", "r-1")
    assert 1 == len(server.bodies)


async def test_a_short_keep_alive_of_the_server() -> None:
    """Idle connections that the server has closed are not used again: each request is answered."""
    async with simulated(keep_alive_s=0.01) as (client, server):
        for number in range(3):
            await client.chat(REQUEST, "m", f"r-{number}")
            await until_closed(client)
        assert 3 == server.simulation.stats.connections
        assert 3 == server.simulation.stats.requests


async def until_closed(client: ServerClient) -> None:
    """Return when the server has closed all connections that the client keeps."""
    connector = client.transport._connections._connector  # type: ignore[attr-defined]
    assert connector is not None
    await until(
        lambda: not any(kept.is_connected() for group in connector._conns.values() for kept, _ in group)
    )


@pytest.mark.parametrize(
    "sent",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
)
async def test_nonsense_is_a_broken_response(sent: bytes) -> None:
    """Invalid HTTP and invalid answers become BrokenResponse."""
    async with raw([sent, None]) as (client, _):
        with pytest.raises(ServerError) as raised:
            await client.chat(REQUEST, "m", "r-1")
    assert type(raised.value) in (BrokenResponse, ServerUnavailable)


@pytest.mark.parametrize(
    ("location", "named"),
    [
        (b"https://elsewhere/v1/chat/completions", "https://elsewhere/v1/chat/completions"),
        (b"/elsewhere/v1/chat/completions", "URL/elsewhere/v1/chat/completions"),
        (b"http://[::bad/", "http://[::bad/"),
        (b"http://h:99999/", "http://h:99999/"),
        (b"/x\x1b[2J", r"URL/x\x1b[2J"),
        (b"", "URL/v1/chat/completions"),
        (b"ftp://x/" + b"y" * 5_000, "ftp://x/yyyyy"),
    ],
)
@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(location: bytes, named: str, status: int) -> None:
    """The message names where it leads, also if that is malformed."""
    redirect = b"HTTP/1.1 %d Moved\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % (status, location)
    async with raw([redirect]) as (client, server):
        with pytest.raises(WrongAddress, match="redirects /v1/chat/completions to ") as raised:
            await client.chat(REQUEST, "m", "r-1")
    assert named.replace("URL", server.url) in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000
    assert 1 == len(server.bodies)


@pytest.mark.parametrize(("path", "expected"), [("/a", b"/a?v=1&w="), ("/a?b=c", b"/a?b=c&v=1&w=")])
async def test_a_query_goes_along(path: str, expected: bytes) -> None:
    """Behind the route's own."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, http_transport(url, {}, query="v=1&w=") as transport:
        await transport.exchange("GET", path, timeout_s=5)
    assert [b"GET %b HTTP/1.1\r\n" % expected] == asked


async def test_long_headers() -> None:
    """Proxies add cookies and policies: a header may have 64 KB."""
    head = b"HTTP/1.1 200 OK\r\nX: %b\r\nContent-Length: %d\r\n\r\n"
    async with raw([head % (b"y" * 60_000, len(ANSWER)) + ANSWER]) as (client, _):
        assert "Geese." == (await client.chat(REQUEST, "m", "r-1")).text


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n%b\r\n"
MANY = b"10000\r\n" + b" " * 2**16 + b"\r\n"
BOMB = zlib.compress(bytes(2**27), level=9, wbits=31)
"""128 MiB of zeros, as 130 KB of gzip."""
LONG = {
    "with its length": [HEAD % 2**30 + bytes(2**16)],
    "in chunks": [CHUNKED % b"" + 32 * MANY],
    "compressed": [
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB
    ],
    "compressed, in chunks": [
        CHUNKED % b"Content-Encoding: gzip\r\n" + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BOMB), BOMB)
    ],
}


@pytest.mark.parametrize("form", LONG)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_long_answer_is_not_read_on(form: str, stream: bool) -> None:
    """What is held of an answer is bounded, whatever its length, encoding and compression."""
    async with raw(LONG[form]) as (client, _):
        tracemalloc.start()
        with pytest.raises(BrokenResponse, match=r"more than fleet.max_answer_bytes = 1048576 bytes"):
            await client.chat(REQUEST, "m", "r-1", (lambda: None) if stream else None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 16 * 2**20


async def test_an_answer_of_just_the_longest_length() -> None:
    """The bound itself is allowed, and the connection is used again."""
    whole = HEAD % 2**20 + ANSWER.ljust(2**20)
    async with raw([whole, whole]) as (client, server):
        for rid in ("r-1", "r-2"):
            assert "Geese." == (await client.chat(REQUEST, "m", rid)).text
    assert 1 == server.connections


@pytest.mark.parametrize("where", ["refusal", "answer"])
async def test_a_long_message_is_cut(where: str) -> None:
    """The message of a server, of 10 MB here, takes at most 2 KB in what is raised, logged and kept."""
    told = b'{"error": {"message": "' + b"too long " * 1_111_111 + b'"}}'
    head = HEAD if where == "answer" else HEAD.replace(b"200 OK", b"500 No")
    async with raw([head % len(told) + told]) as (client, _):
        client.transport._max_answer_bytes = 2**25  # type: ignore[attr-defined]
        with pytest.raises(ServerUnavailable, match=r"answered 500: .*too long") as raised:
            await client.chat(REQUEST, "m", "r-1")
    assert len(str(raised.value)) <= 2048


STRICT = b'{"detail": [{"type": "extra_forbidden", "loc": ["body", "%b"]}]}'


def refusal(field: bytes) -> bytes:
    """The answer of a server that does not know `field`."""
    return HEAD.replace(b"200 OK", b"422 No") % len(STRICT % field) + STRICT % field


async def test_a_server_that_refuses_our_fields() -> None:
    """It is asked again without them, which is remembered, and logged once; it is sent no abort either."""
    whole = HEAD % len(ANSWER) + ANSWER
    async with raw([refusal(b"rid"), refusal(b"stream_options"), whole, whole, whole]) as (client, server):
        with capture_logs() as logs:
            for rid in ("r-1", "r-2"):
                assert "Geese." == (await client.chat(REQUEST, "m", rid, lambda: None)).text
            assert "Geese." == (await client.chat(REQUEST, "m", "r-3")).text
            await client.abort("r-3")
    fields = [set(orjson.loads(body)) for body in server.bodies]
    streamed = {"model", "messages", "stream"}
    assert [
        streamed | {"stream_options", "rid"},
        streamed | {"stream_options"},
        streamed,
        streamed,
    ] == fields[:4]
    assert [{"model", "messages"}] == fields[4:]
    assert [["rid", "stream_options"]] == [entry["fields"] for entry in logs]


async def test_a_field_is_not_to_blame_for_every_refusal() -> None:
    """A server that refuses the request without it as well is sent it again."""
    whole = HEAD % len(ANSWER) + ANSWER
    other = refusal(b"temperature")
    async with raw([refusal(b"rid"), other, whole]) as (client, server):
        with pytest.raises(RequestRefused):
            await client.chat(REQUEST, "m", "r-1")
        await client.chat(REQUEST, "m", "r-2")
    assert [True, False, True] == [b'"rid"' in body for body in server.bodies]


async def test_missing_token_counts_are_logged_once() -> None:
    """The first answer without them is."""
    bare = ANSWER.replace(b"usage", b"other")
    async with raw([HEAD % len(bare) + bare] * 2) as (client, server):
        with capture_logs() as logs:
            for rid in ("r-1", "r-2"):
                assert (await client.chat(REQUEST, "m", rid)).tokens_estimated
    assert [("fleet.no_token_counts", server.url)] == [(entry["event"], entry["server"]) for entry in logs]


async def test_half_an_answer_is_an_unavailable_server() -> None:
    """A body shorter than its Content-Length is an error, not a silent retry."""
    async with raw([HEAD % 1000 + ANSWER]) as (client, server):
        with pytest.raises(ServerUnavailable, match="ended its answer early"):
            await client.chat(REQUEST, "m", "r-1")
    assert 1 == len(server.bodies)


@pytest.mark.parametrize(
    ("head", "pause_s"),
    [
        (b"429 Too Many Requests\r\nRetry-After: 7", 7.0),
        (b"503 Service Unavailable\r\nRetry-After: 7", 7.0),
        (b"429 No\r\nDate: " + DAY % b"09:00:00" + b"\r\nRetry-After: " + DAY % b"09:01:00", 60.0),
        (b"429 Too Many Requests", None),
    ],
)
async def test_the_pause_that_a_server_asks_for(head: bytes, pause_s: float | None) -> None:
    """The error has the pause and the text of the server."""
    body = b'{"error": {"message": "You exceeded your current quota"}}'
    answer = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (head, len(body), body)
    async with raw([answer]) as (client, _):
        with pytest.raises(RateLimited, match="You exceeded your current quota") as raised:
            await client.chat(REQUEST, "m", "r-1")
    assert pause_s == raised.value.retry_after_s


async def test_a_server_without_tls() -> None:
    """TLS spoken to a server that does not: the message says what to change."""
    async with simulated() as (plain, _):
        url = plain.url.replace("http://", "https://")
        async with client_of(url) as client:
            with pytest.raises(ServerUnreachable, match=f"{url} does not speak TLS; use http://"):
                await client.chat(REQUEST, "m", "r-1")


async def test_no_answer_in_time() -> None:
    """The timeout covers the whole exchange, and the message has its value."""
    async with simulated([Fault.STALL], request_timeout_s=0.1) as (client, server):
        with pytest.raises(ServerTimeout, match=r"did not answer within 0\.1 s"):
            await client.chat(REQUEST, "m", "r-1")
        assert server.url


def dead(call: str) -> Callable[[ServerClient], Awaitable[object]]:
    """A call of the client."""
    calls: dict[str, Callable[[ServerClient], Awaitable[object]]] = {
        "chat": lambda client: client.chat(REQUEST, "m", "r-1"),
        "abort": lambda client: client.abort("r-1"),
        "models": lambda client: client.models(),
    }
    return calls[call]


@pytest.mark.parametrize("call", ["chat", "abort", "models"])
@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
async def test_an_unreachable_server(call: str, host: str) -> None:
    """A refused connection, and a name that does not exist: the request was never sent."""
    async with client_of(f"http://{host}:{closed_port()}") as client:
        with pytest.raises(ServerUnreachable, match="cannot connect to"):
            await dead(call)(client)


@pytest.mark.parametrize("url", ["http://", "http://h:99999", "http://[::", "http://a..b:1"])
async def test_invalid_urls(url: str) -> None:
    """An invalid URL raises ConfigError with the URL."""
    async with client_of(url) as client:
        with pytest.raises(ConfigError, match="is not a valid URL"):
            await client.chat(REQUEST, "m", "r-1")


async def test_models() -> None:
    """The models are those that the server lists."""
    async with simulated(model="small") as (client, _):
        assert ["small"] == await client.models()


async def test_the_key_is_sent() -> None:
    """Every request has the bearer token."""
    async with simulated(api_key="sesame", key="sesame") as (client, server):
        assert ["simulated"] == await client.models()
        await client.chat(REQUEST, "m", "r-1")
        await client.abort("r-1")
        assert 1 == server.simulation.stats.answered


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_a_wrong_key(key: str | None) -> None:
    """ConfigError names the variable, not the key."""
    async with simulated(api_key="sesame", key=key) as (client, server):
        with pytest.raises(ConfigError, match=f"{server.url} .* set STREAMSYN_API_KEY") as raised:
            await client.models()
    assert "wrong" not in str(raised.value)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_proxy_that_asks_for_a_key_everywhere(status: int) -> None:
    """A key that is refused for the list of models raises ConfigError; /health may need another one."""
    refusal = b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status
    async with get_server(refusal, refusal) as client:
        with pytest.raises(ConfigError, match="STREAMSYN_API_KEY"):
            await client.models()


REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n"
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
ABSENT = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
MODELS = b'{"data": [{"id": "other"}]}'


@pytest.mark.parametrize("health", [ABSENT, FORBIDDEN, REDIRECT])
async def test_another_server_than_sglang(health: bytes) -> None:
    """Whatever is at /health there, the list of models counts."""
    async with get_server(health, HEAD % len(MODELS) + MODELS) as client:
        assert ["other"] == await client.models()


PAGE = HEAD % 15 + b"<!doctype html>"


@pytest.mark.parametrize("models", [ABSENT, ABSENT.replace(b"404", b"405"), REDIRECT, PAGE])
async def test_no_list_of_models(models: bytes) -> None:
    """The URL is not that of an API."""
    async with get_server(ABSENT, models) as client:
        with pytest.raises(WrongAddress, match="/v1/models"):
            await client.models()


@pytest.mark.parametrize("status", [500, 503])
async def test_a_server_that_is_not_healthy_yet(status: int) -> None:
    """An unhealthy server raises ServerUnavailable, so it is probed later."""
    async with get_server(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status) as client:
        with pytest.raises(ServerUnavailable, match=f"/health answered {status}"):
            await client.models()


@asynccontextmanager
async def get_server(*answers: bytes) -> AsyncIterator[ServerClient]:
    """A client and a server that sends `answers`, one after the other."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while left:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(left.pop(0))
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, client_of(f"http://127.0.0.1:{port}") as client:
        yield client


async def test_more_requests_at_once_than_aiohttp_would_allow() -> None:
    """aiohttp's own limit of 100 connections is off; only the fleet limits requests in flight."""
    async with simulated(lambda _, __: Fault.STALL) as (client, server), asyncio.TaskGroup() as group:
        asked = [group.create_task(client.chat(REQUEST, "m", f"r-{number}")) for number in range(130)]
        await until(lambda: server.simulation.stats.in_flight == 130)
        for task in asked:
            task.cancel()
    assert 130 == server.simulation.stats.max_in_flight


async def test_an_abort_by_rid() -> None:
    """The request with that rid ends with its partial text; others continue."""
    async with simulated([Fault.STALL, Fault.STALL]) as (client, server), asyncio.TaskGroup() as group:
        first = group.create_task(ended(client, "r-1"))
        second = group.create_task(ended(client, "r-2"))
        await until(lambda: server.simulation.engine.running == 2)
        await client.abort("r-2")
        assert "BrokenResponse" == await second
        assert not first.done()
        await client.abort("r-1")
    assert "BrokenResponse" == first.result()
    assert 2 == server.simulation.stats.aborted


async def ended(client: ServerClient, rid: str) -> str:
    """The name of the error with which a request ends."""
    try:
        await client.chat(REQUEST, "m", rid)
    except ServerError as error:
        return type(error).__name__
    return "answered"


@pytest.mark.parametrize("fault", [None, Fault.HTTP_500, Fault.REFUSE])
async def test_the_first_token_is_that_of_an_answer(fault: Fault | None) -> None:
    """A refused leader has not warmed the cache, so the callback is not called."""
    told = []
    async with simulated([fault]) as (client, _):
        try:
            await client.chat(REQUEST, "m", "r", lambda: told.append(1))
        except ServerError:
            assert fault is not None
    assert told == ([1] if fault is None else [])


async def test_our_own_limit_of_open_files_is_not_the_servers_failure() -> None:
    """The request waits for a place, as for a full queue: no server is ejected, and no try spent."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with simulated() as (client, _):
        next_file = os.dup(0)
        os.close(next_file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_file, before[1]))
        try:
            with pytest.raises(ServerBusy, match="too many open files"):
                await client.chat(REQUEST, "sim", "r1")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert (await client.chat(REQUEST, "sim", "r2")).text


@pytest.mark.parametrize(
    ("chunks", "first"),
    [
        ([b": ping\n\n", b": ping\n\n", b"data: {}\n\n", b"data: {}\n\n"], 3),
        ([b": ping\n\ndata: {}\n\n", b"data: {}\n\n"], 1),
        ([b'{"model": "m"', b"}"], 1),
        ([b": ping\n\n"], None),
    ],
)
async def test_a_comment_is_not_a_first_token(chunks: list[bytes], first: int | None) -> None:
    """A server sends comments while a request waits in its queue."""
    left, called_at = list(chunks), []

    async def readany() -> bytes:
        return left.pop(0) if left else b""

    answer: Any = SimpleNamespace(status=200, headers={}, content=SimpleNamespace(readany=readany))
    async with http_transport("http://one:1", {}) as transport:
        body = await transport._read(answer, lambda: called_at.append(len(chunks) - len(left)))
    assert b"".join(chunks) == body
    assert ([] if first is None else [first]) == called_at
