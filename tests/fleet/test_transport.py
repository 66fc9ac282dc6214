"""HTTP to a server: TLS over real sockets, and `Retry-After` in all its forms."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError, ServerUnavailable, ServerUnreachable
from streamsyn.fleet.transport import MAX_RETRY_AFTER_S, Reply, http_transport, retry_after_s, tls_context
from tests.examples import examples, in_turn

pytestmark = pytest.mark.usefixtures("no_task_left")

PEM = Path(__file__).parent / "pem"


@pytest.fixture(scope="module")
def server_side() -> ssl.SSLContext:
    """What the server shows, and whom it lets in: anybody."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(PEM / "server.pem")
    return context


@pytest.fixture(scope="module")
def strict_server_side() -> ssl.SSLContext:
    """The same for a server that asks for a certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=PEM / "ca.pem")
    context.load_cert_chain(PEM / "server.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def trusting(authority: str = "ca.pem", certificate: str | None = None) -> ssl.SSLContext | None:
    """The context for these files."""
    cert = None if certificate is None else PEM / certificate
    return tls_context(FleetSection(tls_ca=PEM / authority, tls_cert=cert))


@asynccontextmanager
async def https_server(context: ssl.SSLContext) -> AsyncIterator[int]:
    """Answers each request with the Host header that came with it; yields its port."""

    async def say_host(request: web.Request) -> web.Response:
        return web.Response(text=request.headers["Host"])

    app = web.Application()
    app.router.add_get("/", say_host)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def ask(url: str, tls: ssl.SSLContext | None, server_name: str | None = None) -> Reply:
    """One request."""
    async with (
        asyncio.timeout(10),
        http_transport(url, {"X-One": "1"}, tls=tls, server_name=server_name) as transport,
    ):
        return await transport.exchange("GET", "/", timeout_s=5)


TRUSTING = trusting()
KNOWN = trusting(certificate="client.pem")
ELSEWHERE = trusting("other-ca.pem")


async def test_a_base_url_with_a_version_of_its_own() -> None:
    """Its routes follow without /v1, as OpenAI's clients send them."""

    async def models(request: web.Request) -> web.Response:
        return web.Response(text=request.query_string)

    app = web.Application()
    app.router.add_get("/api/paas/v4/models", models)
    async with TestServer(app) as server, asyncio.timeout(10):
        base = str(server.make_url("/api/paas/v4"))
        async with http_transport(base, {}, query="a=1") as transport:
            reply = await transport.exchange("GET", "/v1/models", timeout_s=5)

    assert (200, b"a=1") == (reply.status, reply.body)


def test_nothing_is_set() -> None:
    """Without settings, aiohttp's defaults are used."""
    assert tls_context(FleetSection()) is None


async def test_a_server_with_our_authority(server_side: ssl.SSLContext) -> None:
    """`fleet.tls_ca` makes the certificate valid."""
    async with https_server(server_side) as port:
        reply = await ask(f"https://localhost:{port}", TRUSTING)

        assert (200, f"localhost:{port}".encode()) == (reply.status, reply.body)


@pytest.mark.parametrize("tls", [None, ELSEWHERE], ids=["the system's", "another"])
async def test_an_unknown_authority(server_side: ssl.SSLContext, tls: ssl.SSLContext | None) -> None:
    """It is as good as not there; the message says why."""
    async with https_server(server_side) as port:
        with pytest.raises(ServerUnreachable, match="certificate verify failed"):
            await ask(f"https://localhost:{port}", tls)


async def test_an_address_with_the_name_it_was_looked_up_by(server_side: ssl.SSLContext) -> None:
    """The certificate is checked against the name, and the Host header has the name."""
    async with https_server(server_side) as port:
        reply = await ask(f"https://127.0.0.1:{port}", TRUSTING, "sglang.test")

        assert f"sglang.test:{port}".encode() == reply.body


@pytest.mark.parametrize("name", [None, "other.test"])
async def test_an_address_that_the_certificate_does_not_cover(
    server_side: ssl.SSLContext, name: str | None
) -> None:
    """No name, or a wrong one: refused."""
    async with https_server(server_side) as port:
        with pytest.raises(ServerUnreachable, match="certificate verify failed"):
            await ask(f"https://127.0.0.1:{port}", TRUSTING, name)


async def test_a_server_that_requires_a_client_certificate(strict_server_side: ssl.SSLContext) -> None:
    """A server that requires a client certificate accepts `fleet.tls_cert`."""
    async with https_server(strict_server_side) as port:
        assert 200 == (await ask(f"https://localhost:{port}", KNOWN)).status
        with pytest.raises(ServerUnavailable):
            await ask(f"https://localhost:{port}", TRUSTING)


NO_PEM = Path(__file__)


@pytest.mark.parametrize(
    ("key", "path", "said"),
    [
        ("tls_ca", "absent.pem", "fleet.tls_ca: cannot read absent.pem: No such file"),
        ("tls_ca", NO_PEM, f"fleet.tls_ca: {NO_PEM} has no PEM certificates"),
        ("tls_cert", "absent.pem", "fleet.tls_cert: cannot read absent.pem: No such file"),
        ("tls_cert", NO_PEM, f"fleet.tls_cert: {NO_PEM} must hold a PEM certificate and its key"),
        ("tls_cert", PEM / "ca.pem", "fleet.tls_cert: .*/ca.pem must hold .* and its key"),
        ("tls_cert", PEM / "locked.pem", "fleet.tls_cert: .*/locked.pem must hold .* without a pass phrase"),
        ("tls_ca", PEM, "fleet.tls_ca: .*/pem"),
        ("tls_cert", PEM, "fleet.tls_cert: .*/pem"),
    ],
)
def test_files_that_cannot_be_used(key: str, path: Path | str, said: str) -> None:
    """The message names the key and the file; there is no prompt for a pass phrase."""
    with pytest.raises(ConfigError, match=said) as raised:
        tls_context(FleetSection.model_validate({key: path}))
    assert "\n" not in str(raised.value)
    assert "None" not in str(raised.value)


NOW = 1_800_000_000.0


@in_turn(
    ("value", "pause_s"),
    [
        ("3", 3.0),
        (" 0 ", 0.0),
        ("0.25", 0.25),
        (str(10 * MAX_RETRY_AFTER_S), MAX_RETRY_AFTER_S),
        (formatdate(NOW + 90, usegmt=True), 90.0),
        (formatdate(NOW - 90, usegmt=True), 0.0),
        (formatdate(NOW + 86_400, usegmt=True), MAX_RETRY_AFTER_S),
        ("", None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("Sun, 99 Nov 9999 99:99:99 GMT", None),
    ],
)
def test_the_pause(value: str, pause_s: float | None) -> None:
    """Whole seconds, fractions and dates; nothing else, and at most `MAX_RETRY_AFTER_S`."""
    assert pause_s == retry_after_s({"Retry-After": value}, NOW)


def test_no_header() -> None:
    """Without the header there is no pause."""
    assert retry_after_s({}, NOW) is None


def test_a_date_is_compared_with_the_servers_clock() -> None:
    """A client whose clock is an hour late does not wait for an hour."""
    headers = {"Retry-After": formatdate(NOW + 5, usegmt=True), "Date": formatdate(NOW, usegmt=True)}
    assert 5.0 == retry_after_s(headers, NOW - 3600)


@examples(200)
@given(st.dictionaries(st.sampled_from(["Retry-After", "Date"]), st.text()))
def test_any_header(headers: dict[str, str]) -> None:
    """Whatever a server sends is a pause within bounds, or none."""
    pause_s = retry_after_s(headers, NOW)
    assert pause_s is None or 0 <= pause_s <= MAX_RETRY_AFTER_S
