"""Service discovery: the wanted servers, from the configuration, a file and a DNS name, watched for changes.

After the start an error changes nothing: a file that is being replaced, or a name server that is down, does
not remove servers from a run.

A URL may belong to an sglang-router instead of a server. It chooses among its servers by its own policy. The
default one, `cache_aware`, compares prompt prefixes; all prompts of a run share a template, so nearly all
requests go to one server: `warn_about_router` warns.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

import structlog

from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError, ServerError
from streamsyn.fleet.server_spec import (
    NoServersFound,
    ServersFile,
    ServerSpec,
    base_and_query,
    headers_of,
    server_specs,
)
from streamsyn.fleet.transport import Transport
from streamsyn.fleet.wire import read_json
from streamsyn.plain_text import split_userinfo

log = structlog.get_logger()

LookUp = Callable[[str, int], Awaitable[Iterable[str]]]
"""Resolves a host name and a port to all its addresses. Raises OSError when there are none."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
ROUTER_WORKERS = "/workers"
ROUTER_INFO = "/get_server_info"
_TIMEOUT_S = 5.0
_REFUSED = (401, 403)
_BY_KEY = frozenset({"manual", "consistent_hashing"})
"""Policies that send all requests with one routing key to one server."""
_BY_PREFIX = frozenset({"cache_aware", "prefix_hash"})
"""Policies that compare prompt prefixes; all prompts of a run share one."""
_ADVICE = (
    "pass its workers with --server instead, or start it with --policy manual --assignment-mode min_group "
    "(or consistent_hashing): streamsyn sends X-SMG-Routing-Key"
)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a fleet has to do.

    Attributes:
        left: Requests in flight, and those that are known to come; infinite if nobody knows.
        room: Requests that a server can have in flight, on average.
        in_flight: Requests in flight, by server.
    """

    left: float
    room: float
    in_flight: Mapping[str, int]


class PlacedServers(Protocol):
    """Servers that are placed on machines while they are used: only those that are alive are listed.

    Attributes:
        changed: Set when others are listed than before.
        demand: Set by the fleet: returns what it has to do.
    """

    changed: asyncio.Event
    demand: Callable[[], Demand]

    def specs(self) -> list[ServerSpec]:
        """Return the servers that are alive, each with its incarnation."""
        ...


class Discovery:
    """The wanted servers: of `fleet.servers`, `fleet.servers_file` and `fleet.servers_dns`, and placed ones.

    A server named by several sources is one server; the file's settings override those of `fleet.servers`.

    Args:
        section: The `fleet` section of the configuration.
        environ: Holds the servers' keys.
        look_up: Resolves host names.
        may_be_empty: Whether there may be no server at the start.
        placed: Servers that are placed while they are used.

    Raises:
        ConfigError: See `server_specs`.
    """

    def __init__(
        self,
        section: FleetSection,
        environ: Mapping[str, str] = os.environ,
        look_up: LookUp | None = None,
        *,
        may_be_empty: bool = False,
        placed: PlacedServers | None = None,
    ) -> None:
        self._environ = environ
        self._interval_s = section.discover_interval_s
        self._may_be_empty = may_be_empty
        self._placed = placed
        self._configured = server_specs(section, may_be_empty=may_be_empty or placed is not None)
        self._sources: list[_Source] = []
        if section.servers_file is not None:
            file = ServersFile(section.servers_file)
            self._sources.append(_Source(partial(asyncio.to_thread, file.read), environ))
        if section.servers_dns is not None:
            url, query = base_and_query(section.servers_dns, "fleet.servers_dns")
            userinfo = split_userinfo(section.servers_dns).userinfo
            list_servers = partial(servers_at_name, url, look_up or resolve, userinfo, query)
            self._sources.append(_Source(list_servers, environ))
        self._wanted: list[ServerSpec] = []

    async def first(self) -> list[ServerSpec]:
        """Return the servers to start with, each with a valid key: at least one unless there may be none.

        Raises:
            ConfigError: The file cannot be read, a line is invalid (`FILE:LINE`), or a key is not set; or
                no source has any server.
        """
        empty: list[NoServersFound] = []
        for source in self._sources:
            try:
                await source.read()
            except NoServersFound as error:
                source.last_error = str(error)
                empty.append(error)
        self._wanted = self._union()
        for problem in empty:
            if not self._wanted and not self._may_be_empty:
                raise problem
            log.warning("fleet.discovery_failed", error=str(problem))
        for spec in self._wanted:
            headers_of(spec, self._environ)
        return self._wanted

    async def refresh(self) -> list[ServerSpec] | None:
        """Read all sources again. Return the complete new set, or None when nothing changed."""
        for source in self._sources:
            await source.refresh()
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
        """Refresh every `fleet.discover_interval_s` and call `on_change` with each new set, until cancelled.

        A change of placed servers is passed on at once. Returns when there is nothing to watch.
        """
        while self._sources or self._placed is not None:
            await self._until_next()
            wanted = await self.refresh()
            if wanted is not None:
                await on_change(wanted)

    async def _until_next(self) -> None:
        if self._placed is None:
            await asyncio.sleep(self._interval_s)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._interval_s if self._sources else None):
                await self._placed.changed.wait()

    def _union(self) -> list[ServerSpec]:
        union = {spec.url: spec for spec in self._configured}
        if self._placed is not None:
            self._placed.changed.clear()
            union |= {spec.url: spec for spec in self._placed.specs()}
        for source in self._sources:
            for spec in source.found:
                union[spec.url] = _merge(union.get(spec.url), spec)
        return list(union.values())


@dataclass(slots=True)
class _Source:
    """A file or a DNS name; its last good list of servers stays in force."""

    list_servers: Callable[[], Awaitable[list[ServerSpec]]]
    environ: Mapping[str, str]
    found: list[ServerSpec] = field(default_factory=list)
    last_error: str | None = None

    async def read(self) -> None:
        """Replace `found` by the current list.

        Raises:
            ConfigError: The list cannot be read, or a key is not set; `found` is unchanged.
        """
        servers = await self.list_servers()
        for spec in servers:
            headers_of(spec, self.environ)
        self.found = servers

    async def refresh(self) -> None:
        """Read again; an error is logged once and leaves `found` unchanged."""
        try:
            await self.read()
        except ConfigError as error:
            if str(error) != self.last_error:
                log.warning("fleet.discovery_failed", error=str(error), kept=len(self.found))
            self.last_error = str(error)
        else:
            self.last_error = None


def _merge(known: ServerSpec | None, more: ServerSpec) -> ServerSpec:
    """Combine two entries of one server, so that a line of the file can drain a server named elsewhere."""
    if known is None:
        return more
    return ServerSpec(
        known.url,
        weight=known.weight if more.weight == 1 else more.weight,
        key_env=more.key_env or known.key_env,
        draining=known.draining or more.draining,
        server_name=known.server_name or more.server_name,
        userinfo=more.userinfo or known.userinfo,
        query=more.query or known.query,
        incarnation=known.incarnation,
    )


async def servers_at_name(
    url: str, look_up: LookUp, userinfo: str | None = None, query: str = ""
) -> list[ServerSpec]:
    """Return one server per address that the host of `url` resolves to now, each with userinfo and query.

    Raises:
        NoServersFound: The name cannot be resolved.
    """
    parts = urlsplit(url)
    try:
        addresses = await look_up(parts.hostname or "", parts.port or _DEFAULT_PORTS[parts.scheme])
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise NoServersFound(f"fleet.servers_dns: cannot resolve {parts.hostname}: {why}") from error
    return servers_at_addresses(url, addresses, userinfo, query)


def servers_at_addresses(
    url: str, addresses: Iterable[str], userinfo: str | None = None, query: str = ""
) -> list[ServerSpec]:
    """Return `url` with each address in place of its host name, in a fixed order."""
    parts = urlsplit(url)
    port = "" if parts.port is None else f":{parts.port}"
    servers = []
    for address in sorted(set(addresses)):
        host = f"[{address}]" if ":" in address else address
        there = parts._replace(netloc=f"{host}{port}").geturl()
        name = None if parts.hostname == address else parts.hostname
        servers.append(ServerSpec(there, server_name=name, userinfo=userinfo, query=query))
    return servers


async def resolve(name: str, port: int) -> list[str]:
    """Return the IPv4 and IPv6 addresses that the system's resolver finds."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


@dataclass(frozen=True, slots=True)
class Changes:
    """The difference between two sets of servers; `changed` holds the new spec of servers in both."""

    added: tuple[ServerSpec, ...]
    removed: tuple[ServerSpec, ...]
    changed: tuple[ServerSpec, ...]


def changes(before: Iterable[ServerSpec], wanted: Iterable[ServerSpec]) -> Changes:
    """Return what turns the servers `before` into those `wanted`; servers are compared by URL."""
    had = {spec.url: spec for spec in before}
    want = {spec.url: spec for spec in wanted}
    return Changes(
        added=tuple(spec for url, spec in want.items() if url not in had),
        removed=tuple(spec for url, spec in had.items() if url not in want),
        changed=tuple(spec for url, spec in want.items() if url in had and had[url] != spec),
    )


@dataclass(frozen=True, slots=True)
class RouterInfo:
    """What a router reports about itself.

    Source: sglang-router 0.3.2; its successor, the Shepherd gateway, has the same routes. A server answers
    `GET /workers` with 404, a router with its workers. A worker that was added with the label `policy` shows
    it there; a policy from the command line appears only in the metrics, on a separate port.

    Attributes:
        workers: Number of its servers.
        urls: Their URLs; empty if it does not list them.
        policy: How it chooses among them; None if it does not report that.
    """

    workers: int
    urls: tuple[str, ...] = ()
    policy: str | None = None

    @property
    def advice(self) -> str | None:
        """One line on what to do; None if the policy keeps prefix groups together."""
        if self.policy in _BY_KEY or self.workers == 1:
            return None
        if self.policy is None:
            return f"its policy is unknown; if it is cache_aware, the default, {_ADVICE}"
        what = "sends most requests to one worker" if self.policy in _BY_PREFIX else "splits prefix groups"
        return f"its policy {self.policy} {what}; {_ADVICE}"


async def identify_router(transport: Transport) -> RouterInfo | None:
    """Return what a router reports about itself; None if this is not a router or its answer is unusable.

    A second request is sent only if the router lists its workers to administrators only.
    """
    status, answer = await _get(transport, ROUTER_WORKERS)
    if status in _REFUSED:
        _, answer = await _get(transport, ROUTER_INFO)  # needs no credentials
        if not isinstance(answer, dict) or answer.get("router_manager") is not True:
            return None
        count = answer.get("workers_count")
        return RouterInfo(count if isinstance(count, int) else 0)
    workers = answer.get("workers") if status == 200 and isinstance(answer, dict) else None
    if not isinstance(workers, list) or not all(_is_worker(worker) for worker in workers):
        return None
    policies = {_policy(worker) for worker in workers}
    return RouterInfo(
        len(workers),
        tuple(worker["url"] for worker in workers),
        policies.pop() if len(policies) == 1 else None,
    )


async def warn_about_router(url: str, transport: Transport) -> RouterInfo | None:
    """Log whether `url` is a router, with advice if its policy is unknown or bad for prefix groups."""
    info = await identify_router(transport)
    if info is None:
        return None
    policy = info.policy or "unknown"
    if info.advice is None:
        log.info("fleet.router", server=url, workers=info.workers, policy=policy)
    else:
        log.warning("fleet.router", server=url, workers=info.workers, policy=policy, advice=info.advice)
    return info


async def _get(transport: Transport, path: str) -> tuple[int, Any]:
    """Return the status and the JSON of an answer: status 0 without an answer, None for invalid JSON."""
    try:
        reply = await transport.exchange("GET", path, timeout_s=_TIMEOUT_S)
    except (ServerError, ConfigError) as error:
        log.debug("fleet.router_unknown", path=path, error=str(error))
        return 0, None
    try:
        return reply.status, read_json(reply.body)
    except ValueError:
        return reply.status, None


def _is_worker(worker: Any) -> bool:
    return isinstance(worker, dict) and isinstance(worker.get("url"), str)


def _policy(worker: dict[str, Any]) -> str | None:
    """Return the policy in a worker's labels, which 0.3.2 shows as metadata."""
    for place in ("metadata", "labels"):
        labels = worker.get(place)
        if isinstance(labels, dict) and isinstance(labels.get("policy"), str):
            policy: str = labels["policy"]
            return policy
    return None
