"""Who may do what: tokens and scopes, web pages, addresses, TLS."""

import asyncio
import ssl
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from streamsyn.config.loading import load
from streamsyn.daemon.access import is_loopback, read_tokens
from streamsyn.daemon.daemon import open_daemon
from streamsyn.daemon.serve import bound, check_address, host_and_port
from streamsyn.errors import ConfigError, DirectoryInUse
from tests.daemon.conftest import QUICK, Served, StartDaemon
from tests.examples import in_turn

READ, WRITE, ADMIN = "r" * 20, "w" * 20, "a" * 20
PEM = Path(__file__).parents[1] / "fleet" / "pem"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A file with a token of each scope; that of writing is kept as its digest."""
    path = tmp_path / "tokens"
    path.write_text(
        f"# who may use the daemon\nann read {READ}\n\neve admin {ADMIN}\n"
        f"bob read,write sha256:{sha256(WRITE.encode()).hexdigest()}\n"
    )
    return path


def bearer(token: str) -> dict[str, str]:
    """The header of a token."""
    return {"Authorization": f"Bearer {token}"}


async def test_each_scope_includes_those_before_it(start_daemon: StartDaemon, tokens: Path) -> None:
    """Reading, writing and administration; nothing without a valid token but the state of health."""
    async with start_daemon({"serve.tokens_file": str(tokens)}) as served:
        statuses = {}
        for name, token in (("none", ""), ("wrong", "x" * 20), ("r", READ), ("w", WRITE), ("a", ADMIN)):
            found = []
            for method, path in (
                ("GET", "/healthz"),
                ("GET", "/v1/runs"),
                ("POST", f"/v1/runs/{name}/pause"),
                ("DELETE", "/v1/runs/none"),
            ):
                async with served.session.request(method, path, headers=bearer(token)) as answer:
                    found.append(answer.status)
            statuses[name] = found
        assert statuses == {
            "none": [200, 401, 401, 401],
            "wrong": [200, 401, 401, 401],
            "r": [200, 200, 403, 403],
            "w": [200, 200, 404, 403],
            "a": [200, 200, 404, 404],
        }
        async with served.session.get("/v1/runs") as answer:
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        problem = await served.refused("DELETE", "/v1/runs/x", headers=bearer(READ))
        assert problem["detail"] == "the token 'ann' has the scope read; this needs admin"


async def test_a_token_counts_in_its_header_alone(start_daemon: StartDaemon, tokens: Path) -> None:
    """Not in the URL, which ends in logs, not as a cookie, which browsers add, nor as a password."""
    async with start_daemon({"serve.tokens_file": str(tokens)}) as served:
        for headers in (
            {"Cookie": f"token={ADMIN}"},
            {"Authorization": aiohttp.encode_basic_auth("eve", ADMIN)},
            {"Authorization": ADMIN},
            bearer(sha256(ADMIN.encode()).hexdigest()),
        ):
            query = {"token": ADMIN, "access_token": ADMIN}
            async with served.session.get("/v1/runs", headers=headers, params=query) as answer:
                assert answer.status == 401


async def test_guesses_of_tokens_are_slowed_down(start_daemon: StartDaemon, tokens: Path) -> None:
    """Wrong tokens of one address are limited, and do not use up what the owner of a right one may ask."""
    keys = {"serve.tokens_file": str(tokens), "serve.requests_per_s": 5.0}
    async with start_daemon(keys) as served:
        statuses = []
        for number in range(8):
            async with served.session.get("/v1/runs", headers=bearer(f"{number:020}")) as answer:
                statuses.append(answer.status)
        assert (statuses[0], statuses[-1]) == (401, 429)
        async with served.session.get("/v1/runs", headers=bearer(READ)) as answer:
            assert answer.status == 200


async def test_tokens_are_reloaded(start_daemon: StartDaemon, tokens: Path) -> None:
    """A removed token is refused from then on; a file with a mistake leaves the tokens as they are."""
    async with start_daemon({"serve.tokens_file": str(tokens)}) as served:
        access = served.daemon.access
        await asyncio.to_thread(tokens.write_text, f"ann read {READ}\n")
        await asyncio.to_thread(access.reload, tokens)
        assert (await served.refused("GET", "/v1/runs", headers=bearer(ADMIN)))["status"] == 401

        await asyncio.to_thread(tokens.write_text, f"ann reed {READ}\n")
        with pytest.raises(ConfigError, match="unknown scope 'reed'"):
            await asyncio.to_thread(access.reload, tokens)
        async with served.session.get("/v1/runs", headers=bearer(READ)) as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "has no token"),
        ("ann read", ":1: expected NAME SCOPE"),
        ("\nann owner SECRETSECRETSECRET", ":2: unknown scope 'owner'"),
        ("ann read short-SECRET", "too short"),
        ("ann read sha256:SECRET", "64 hexadecimal digits"),
        ("ann read SECRETSECRETSECRET\nann write SECRETSECRETSECRET", ":2: the name 'ann' is used twice"),
    ],
)
def test_mistakes_in_the_file_of_tokens(tmp_path: Path, text: str, what: str) -> None:
    """They are named by their line, and no token is shown."""
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what) as raised:
        read_tokens(path)
    assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8200"}, 200),
        ({"Host": "[::1]:8200"}, 200),
        ({"Host": "127.0.0.5:8200"}, 200),
        ({"Host": "192.168.1.5:8200"}, 421),
        ({"Host": "rebound.example:8200"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "localhost:8200", "Origin": "http://localhost:8200"}, 200),
        ({"Host": "localhost:8200", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost:8200", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:8200", "Origin": "null"}, 403),
    ],
)
async def test_web_pages_of_other_sites_are_refused(
    daemon: Served, headers: dict[str, str], status: int
) -> None:
    """A daemon without tokens answers under its own names alone (DNS rebinding), and its own pages (CSRF)."""
    async with daemon.session.get("/v1/runs", headers=headers) as answer:
        assert answer.status == status


async def test_a_form_of_a_web_page_creates_nothing(daemon: Served) -> None:
    """A browser sends a form's body without asking first; it is not JSON, and comes from elsewhere."""
    body = {"data": b'{"id": "forged"}', "headers": {"Content-Type": "text/plain"}}
    assert (await daemon.refused("POST", "/v1/runs", **body))["status"] == 415
    assert (await daemon.ask("GET", "/v1/runs"))["data"] == []


@in_turn(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "gpu-1", "", "example.com", "2001:db8::1")],
)
def test_which_addresses_only_this_machine_reaches(host: str, expected: bool) -> None:
    """Names other than localhost could resolve to anything."""
    assert is_loopback(host) == expected


@in_turn(
    ("keys", "what"),
    [
        ({"serve.listen": "0.0.0.0:8200"}, "serve.tokens_file must be set"),
        ({"serve.listen": "gpu-1:8200"}, "serve.tokens_file must be set"),
        ({"serve.listen": "[::]:8200"}, "serve.tokens_file must be set"),
        ({"serve.listen": "::1:8200"}, "in brackets"),
        ({"serve.listen": "8200"}, "expected HOST:PORT"),
        ({"serve.listen": "127.0.0.1:99999"}, "expected HOST:PORT"),
        ({"serve.tls_key": "key.pem"}, "serve.tls_certificate is not"),
    ],
)
def test_addresses_that_are_refused(keys: dict[str, Any], what: str) -> None:
    """Where other machines can connect, tokens are needed; what is no address is named."""
    with pytest.raises(ConfigError, match=what):
        check_address(load(None, keys.items()).serve)


def test_addresses_are_read() -> None:
    """IPv6 addresses are in brackets."""
    assert host_and_port("[::1]:80") == ("::1", 80)
    assert host_and_port("localhost:0") == ("localhost", 0)


async def test_https(start_daemon: StartDaemon) -> None:
    """With a certificate the daemon speaks https alone."""
    keys = {"serve.tls_certificate": str(PEM / "server.pem")}
    async with start_daemon(keys) as served:
        assert served.url.startswith("https://")
        context = ssl.create_default_context(cafile=PEM / "ca.pem")
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
            async with session.get(served.url.replace("127.0.0.1", "localhost") + "/healthz") as answer:
                assert answer.status == 200
            with pytest.raises(aiohttp.ClientError):
                await session.get(served.url.replace("https", "http") + "/healthz")


async def test_a_directory_has_one_daemon(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """A second one on the same ROOT is refused, and names the process that has it."""
    async with start_daemon():
        with pytest.raises(DirectoryInUse, match="in use by another process"):
            async with open_daemon(tmp_path / "root", load(None, QUICK.items()), {}):
                raise AssertionError("it is open twice")


async def test_a_port_that_is_taken(start_daemon: StartDaemon) -> None:
    """One line names the key and the address."""
    async with start_daemon() as served:
        port = served.url.rpartition(":")[2]
        keys = QUICK | {"serve.listen": f"127.0.0.1:{port}"}
        with pytest.raises(ConfigError, match=rf"serve\.listen: cannot listen at 127\.0\.0\.1:{port}: Addr"):
            await asyncio.to_thread(bound, load(None, keys.items()).serve)


async def test_what_is_not_a_daemons_directory(tmp_path: Path) -> None:
    """A directory with other things in it, or of a later version, is refused before anything is written."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"not the directory of a daemon.*thesis\.tex"):
        async with open_daemon(tmp_path, load(None, QUICK.items()), {}):
            raise AssertionError("it is used")
    later = tmp_path / "later"
    later.mkdir()
    (later / "daemon.json").write_text('{"format_version": 2}')
    with pytest.raises(ConfigError, match="format version 2"):
        async with open_daemon(later, load(None, QUICK.items()), {}):
            raise AssertionError("it is used")
