"""Who may do what, and how much of it: tokens with scopes, and limits of connections and requests.

A daemon on loopback without tokens serves everyone on this machine. A web page that is open in a browser
there could send it requests too: under a name of its own that resolves to 127.0.0.1 (DNS rebinding), or by a
form (cross-site request forgery). So the Host header must name this machine, and an Origin header must be the
daemon's own.
"""

import asyncio
import hmac
import ipaddress
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from aiohttp import web

from streamsyn.config.command_sections import ServeSection
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.route import Scope
from streamsyn.errors import ConfigError

_SCOPES: Final[tuple[Scope, ...]] = ("open", "read", "write", "admin")
_DIGEST: Final = re.compile(r"sha256:([0-9a-fA-F]{64})")
_MIN_TOKEN_CHARS: Final = 16
_UNAUTHORIZED: Final = {"WWW-Authenticate": 'Bearer realm="streamsyn"'}
_FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: 85\r\n\r\n"
    b'{"title":"Service Unavailable","status":503,"detail":"too many open connections now"}'
)
_MAX_CLIENTS: Final = 10_000
"""Clients whose rates are remembered."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token: its name, for logs, the SHA-256 of its secret, and its scope."""

    name: str
    digest: bytes
    scope: Scope


class Access:
    """Decides which requests are allowed.

    Args:
        tokens_file: `serve.tokens_file`; None allows everyone everything.

    Raises:
        ConfigError: The file cannot be read, or has an invalid line.
    """

    def __init__(self, tokens_file: Path | None) -> None:
        self._tokens: tuple[Token, ...] | None = None
        self.reload(tokens_file)

    @property
    def has_tokens(self) -> bool:
        """Whether clients need a token."""
        return self._tokens is not None

    def reload(self, tokens_file: Path | None) -> None:
        """Read the tokens again. Blocks on the disk.

        Raises:
            ConfigError: As for the class; the tokens stay as they are.
        """
        self._tokens = None if tokens_file is None else read_tokens(tokens_file)

    def check(self, request: web.Request, scope: Scope) -> str:
        """Return the name of the client that sent a request: that of its token, or its address.

        Raises:
            Problem: 401, 403 or 421: the request is refused.
        """
        if not self.has_tokens:
            _check_same_machine(request)
            return request.remote or "local"
        if scope == "open":
            return request.remote or "unknown"
        token = self._find(request.headers.get("Authorization", ""))
        if token is None:
            raise Problem(
                401, "a valid token is needed: send Authorization: Bearer TOKEN", headers=_UNAUTHORIZED
            )
        if _SCOPES.index(token.scope) < _SCOPES.index(scope):
            raise Problem(403, f"the token {token.name!r} has the scope {token.scope}; this needs {scope}")
        return token.name

    def _find(self, authorization: str) -> Token | None:
        kind, _, secret = authorization.partition(" ")
        if kind.lower() != "bearer":
            return None
        digest = sha256(secret.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for token in self._tokens or ():  # all of them, whichever matches: the time tells nothing
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found


def read_tokens(path: Path) -> tuple[Token, ...]:
    """Read a file of tokens.

    Raises:
        ConfigError: It cannot be read, has an invalid line or no token; the message never shows a token.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"serve.tokens_file: cannot read {path}: {why}") from error
    tokens = tuple(_tokens(path, text))
    if not tokens:
        raise ConfigError(f"serve.tokens_file: {path} has no token; add a line: NAME SCOPE TOKEN")
    return tokens


def _tokens(path: Path, text: str) -> Iterator[Token]:
    names = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not (parts := line.split()) or line.lstrip().startswith("#"):
            continue
        where = f"{path}:{number}"
        if len(parts) != 3:
            raise ConfigError(f"{where}: expected NAME SCOPE[,SCOPE] TOKEN, found {len(parts)} words")
        name, scopes, secret = parts
        if name in names:
            raise ConfigError(f"{where}: the name {name!r} is used twice")
        names.add(name)
        yield Token(name, _digest(where, secret), _highest(where, scopes))


def _highest(where: str, scopes: str) -> Scope:
    highest: Scope = "open"
    for word in scopes.split(","):
        scope = next((one for one in _SCOPES[1:] if one == word), None)
        if scope is None:
            raise ConfigError(f"{where}: unknown scope {word!r}; the scopes are read, write and admin")
        highest = max(highest, scope, key=_SCOPES.index)
    return highest


def _digest(where: str, secret: str) -> bytes:
    if secret.startswith("sha256:"):
        found = _DIGEST.fullmatch(secret)
        if found is None:
            raise ConfigError(f"{where}: sha256: must be followed by 64 hexadecimal digits")
        return bytes.fromhex(found[1])
    if len(secret) < _MIN_TOKEN_CHARS:
        raise ConfigError(f"{where}: the token is too short; use {_MIN_TOKEN_CHARS} characters or more")
    return sha256(secret.encode()).digest()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen at."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_same_machine(request: web.Request) -> None:
    """Refuse what a browser sends for a page of a different site."""
    host = request.headers.get("Host", "")
    if not is_loopback(_host_name(host)):  # a name of an attacker is not an address
        raise Problem(
            421, f"this daemon is not {host[:100]!r}: without tokens it is localhost or 127.0.0.1 only"
        )
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise Problem(
            403, "requests from web pages of other sites are refused while the daemon has no tokens"
        )


def _host_name(host: str) -> str:
    """The name in a Host header, without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


class Connections:
    """Makes the protocol of each connection; for `create_server`.

    aiohttp closes a connection that is idle between requests; here it is one that never completes its first.

    Args:
        limits: Returns the section with the limits as they are now.

    Attributes:
        server: Makes protocols for HTTP; set before the first connection.
    """

    server: web.Server

    def __init__(self, limits: Callable[[], ServeSection]) -> None:
        self._limits = limits
        self._silent: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}

    def __call__(self) -> asyncio.BaseProtocol:
        limits = self._limits()
        if len(self.server.connections) >= limits.max_connections:
            return _Full()
        protocol = self.server()
        loop = asyncio.get_running_loop()
        self._silent[protocol] = loop.call_later(limits.body_timeout_s, self._close, protocol)
        return protocol

    def spoke(self, request: web.Request) -> None:
        """Note that a connection has sent a whole request."""
        timer = self._silent.pop(request.protocol, None)
        if timer is not None:
            timer.cancel()

    def _close(self, protocol: web.RequestHandler) -> None:
        self._silent.pop(protocol, None)
        if protocol.transport is not None:
            protocol.transport.abort()


class _Full(asyncio.Protocol):
    """Answers a connection that is one too many, and closes it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(_FULL)
        transport.close()


class RateLimit:
    """Decides which requests come too fast, by a token bucket for each client that holds those of a second.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """For each client, least recent first: what its bucket held, and when."""

    def wait_s(self, client: str, per_s: float) -> float:
        """Count a request; returns the seconds to wait before it is allowed: 0 if it is now.

        Args:
            client: Who asks.
            per_s: Requests per second that are allowed.
        """
        now, most = self._clock(), max(1.0, per_s)
        held, then = self._buckets.pop(client, (most, now))
        held = min(most, held + (now - then) * per_s)
        is_allowed = held >= 1
        self._buckets[client] = (held - 1 if is_allowed else held), now
        if len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if is_allowed else (1 - held) / per_s
