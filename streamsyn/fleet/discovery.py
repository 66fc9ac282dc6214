"""The servers behind one name: `fleet.servers_dns`.

A file of servers, which people edit while a run goes on: `fleet.servers_file`.

It is best replaced in one step, by renaming a new one: half a file is read as what it says.

Which servers are wanted, while that changes: a file that people edit, a name that stands for addresses.

Whatever goes wrong later than at the start leaves the servers as they are: a file that is being replaced,
or a name server that is out, is no reason to send a run's servers away.
"""

import asyncio
import math
import os
import socket
import stat
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import structlog

from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.server import NoServersFound, ServerSpec, base_url, headers_of, server_specs

log = structlog.get_logger()

LookUp = Callable[[str, int], Awaitable[Iterable[str]]]
"""All addresses of a host name, for a port. Raises OSError when it has none."""

_DEFAULT_PORTS = {"http": 80, "https": 443}


async def at_name(url: str, look_up: LookUp) -> list[ServerSpec]:
    """The servers at all addresses that the host of `url` has now.

    Raises:
        NothingFound: It has none, or nobody can be asked.
    """
    parts = urlsplit(url)
    try:
        addresses = await look_up(parts.hostname or "", parts.port or _DEFAULT_PORTS[parts.scheme])
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise NoServersFound(f"fleet.servers_dns: {parts.hostname} cannot be looked up: {why}") from error
    return at_addresses(url, addresses)


def at_addresses(url: str, addresses: Iterable[str]) -> list[ServerSpec]:
    """One server an address: `url` with the address in place of its name; always in the same order."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    port = "" if parts.port is None else f":{parts.port}"
    servers = []
    for address in sorted(set(addresses)):
        host = f"[{address}]" if ":" in address else address
        there = parts._replace(netloc=f"{user}{at}{host}{port}").geturl()
        name = None if parts.hostname == address else parts.hostname
        servers.append(ServerSpec(there, server_name=name))
    return servers


async def system_look_up(name: str, port: int) -> list[str]:
    """Addresses as the system's resolver finds them, IPv4 and IPv6."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


MAX_FILE_BYTES = 2**20
"""A larger file is no list of servers."""
LINE = "URL [weight=W] [key_env=NAME] [drain]"
_SETTLED_S = 2.0
"""A file that changed more recently may change again without its times showing it."""


class ServersFile:
    """Reads a file of servers, when it has changed. Blocks.

    Args:
        path: The file.
        settled_s: So long after its last change its times are enough to see that it has not changed.
    """

    def __init__(self, path: Path, settled_s: float = _SETTLED_S) -> None:
        self._path = path
        self._settled_s = settled_s
        self._stamp: tuple[int, ...] | None = None
        self._servers: list[ServerSpec] = []

    def read(self) -> list[ServerSpec]:
        """What it says now; read only when it is not the same file, unchanged, as the last time.

        Raises:
            ConfigError: It cannot be read, or a line is wrong, or it names no server.
        """
        try:
            now = self._path.stat()
            stamp = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
            if stamp == self._stamp:
                return self._servers
            if not stat.S_ISREG(now.st_mode):  # opening a pipe might never end
                raise ConfigError(f"fleet.servers_file: {self._path} is no file")
            with self._path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"fleet.servers_file: cannot read {self._path}: {why}") from error
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"fleet.servers_file: {self._path} has more than {MAX_FILE_BYTES} bytes")
        self._servers = self._parsed(content)
        self._stamp = stamp if time.time() - now.st_ctime > self._settled_s else None
        return self._servers

    def _parsed(self, content: bytes) -> list[ServerSpec]:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"fleet.servers_file: {self._path} is no UTF-8: {error.reason}") from error
        servers = parse_servers(text, str(self._path))
        if not servers:
            raise NoServersFound(f"fleet.servers_file: {self._path} names no server")
        return servers


def parse_servers(text: str, name: str) -> list[ServerSpec]:
    """The servers that `text` names, one a line; what follows a `#` at the begin of a word is a comment.

    Args:
        text: The lines.
        name: Of the file, for messages.

    Raises:
        ConfigError: A line is wrong; the message begins with `name:line`.
    """
    found: dict[str, ServerSpec] = {}
    for number, line in enumerate(text.split("\n"), 1):
        words = _words(line)
        if not words:
            continue
        where = f"{name}:{number}"
        spec = _server(words, where)
        if found.setdefault(spec.url, spec) != spec:
            raise ConfigError(f"{where}: {spec.url} stands in a line before, which says something else of it")
    return list(found.values())


def _words(line: str) -> list[str]:
    words = line.split()
    comment = next((place for place, word in enumerate(words) if word.startswith("#")), None)
    return words[:comment]


def _server(words: list[str], where: str) -> ServerSpec:
    url = base_url(words[0], where)
    given: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if key not in ("weight", "key_env", "drain") or bool(equals) != (key != "drain") or key in given:
            raise ConfigError(f"{where}: cannot use {word!r}; a line is {LINE}")
        given[key] = value
    if given.get("key_env") == "":
        raise ConfigError(f"{where}: key_env= takes the name of an environment variable")
    weight = _weight(given.get("weight", "1"), where)
    return ServerSpec(url, weight, given.get("key_env"), draining="drain" in given)


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"{where}: weight= takes a number above 0, not {text!r}")
    return weight


@dataclass(frozen=True, slots=True)
class Changes:
    """What leads from one set of servers to another; `changed` holds what is now wanted of those in both."""

    added: tuple[ServerSpec, ...]
    removed: tuple[ServerSpec, ...]
    changed: tuple[ServerSpec, ...]


def changes(before: Iterable[ServerSpec], wanted: Iterable[ServerSpec]) -> Changes:
    """What is to be done so that the servers `before` become those `wanted`; a server is its URL."""
    had = {spec.url: spec for spec in before}
    want = {spec.url: spec for spec in wanted}
    return Changes(
        added=tuple(spec for url, spec in want.items() if url not in had),
        removed=tuple(spec for url, spec in had.items() if url not in want),
        changed=tuple(spec for url, spec in want.items() if url in had and had[url] != spec),
    )


class Discovery:
    """The wanted servers: those of `fleet.servers`, of `fleet.servers_file` and of `fleet.servers_dns`.

    A server that several of them name is one: what the file says of it counts more than what
    `fleet.servers` does.

    Args:
        section: The section of the configuration.
        environ: Where keys come from.
        look_up: Finds the addresses of a name.

    Raises:
        ConfigError: See `specs`.
    """

    def __init__(
        self,
        section: FleetSection,
        environ: Mapping[str, str] = os.environ,
        look_up: LookUp = system_look_up,
    ) -> None:
        self._environ = environ
        self._interval_s = section.discover_interval_s
        self._configured = server_specs(section)
        self._sources: list[_Source] = []
        if section.servers_file is not None:
            file = ServersFile(section.servers_file)
            self._sources.append(_Source(partial(asyncio.to_thread, file.read), environ))
        if section.servers_dns is not None:
            url = base_url(section.servers_dns, "fleet.servers_dns")
            self._sources.append(_Source(partial(at_name, url, look_up), environ))
        self._wanted: list[ServerSpec] = []

    async def first(self) -> list[ServerSpec]:
        """The servers to start with: at least one, each with a key that can be sent.

        Raises:
            ConfigError: The file cannot be read, a line of it is wrong (`FILE:LINE`), a key is not set; or
                the file is empty, the name has no address, and there is no other server.
        """
        nothing: list[NoServersFound] = []
        for source in self._sources:
            try:
                await source.ask()
            except NoServersFound as error:
                source.trouble = str(error)
                nothing.append(error)
        self._wanted = self._union()
        for problem in nothing:
            if not self._wanted:
                raise problem
            log.warning("fleet.discovery_failed", error=str(problem))
        for spec in self._wanted:
            headers_of(spec, self._environ)
        return self._wanted

    async def look(self) -> list[ServerSpec] | None:
        """Look once more: the complete new set, or None when it is the same as before."""
        for source in self._sources:
            await source.look()
        wanted = self._union()
        difference = changes(self._wanted, wanted)
        if difference == Changes((), (), ()):
            return None
        self._wanted = wanted
        log.info(
            "fleet.servers_changed",
            servers=len(wanted),
            added=[spec.url for spec in difference.added],
            removed=[spec.url for spec in difference.removed],
            changed=[spec.url for spec in difference.changed],
        )
        return wanted

    async def watch(self, on_change: Callable[[list[ServerSpec]], Awaitable[None]]) -> None:
        """Look every `fleet.discover_interval_s`, and tell of each new set: until cancelled.

        Returns at once when there is nothing that could change.
        """
        while self._sources:
            await asyncio.sleep(self._interval_s)
            wanted = await self.look()
            if wanted is not None:
                await on_change(wanted)

    def _union(self) -> list[ServerSpec]:
        union = {spec.url: spec for spec in self._configured}
        for source in self._sources:
            for spec in source.found:
                union[spec.url] = _merged(union.get(spec.url), spec)
        return list(union.values())


def _merged(known: ServerSpec | None, more: ServerSpec) -> ServerSpec:
    """What two places say of a server: so a line of the file can drain one that another place named."""
    if known is None:
        return more
    return ServerSpec(
        known.url,
        weight=known.weight if more.weight == 1 else more.weight,
        key_env=more.key_env or known.key_env,
        draining=known.draining or more.draining,
        server_name=known.server_name or more.server_name,
    )


@dataclass(slots=True)
class _Source:
    """One place that names servers: what it named last is what holds."""

    named_now: Callable[[], Awaitable[list[ServerSpec]]]
    environ: Mapping[str, str]
    found: list[ServerSpec] = field(default_factory=list)
    trouble: str | None = None

    async def ask(self) -> None:
        """Have it name its servers.

        Raises:
            ConfigError: It cannot, or not in full, or a key is not set; `found` is as before.
        """
        named = await self.named_now()
        for spec in named:
            headers_of(spec, self.environ)
        self.found = named

    async def look(self) -> None:
        """Ask once more; what is wrong is logged once, and changes nothing."""
        try:
            await self.ask()
        except ConfigError as error:
            if str(error) != self.trouble:
                log.warning("fleet.discovery_failed", error=str(error), kept=len(self.found))
            self.trouble = str(error)
        else:
            self.trouble = None
