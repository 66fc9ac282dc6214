"""One set of servers for many runs: each has a `Fleet` of its own over them, and a fair share of the places.

    async with open_servers(section) as servers:  # there may be none yet
        async with servers.fleet(run_section, weight=2.0) as fleet:
            await fleet.ask_models()
            completion = await fleet.complete(request, attempts)

Runs wait while no server is usable; only a run's own mistakes end it.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import structlog

from streamsyn.background import background
from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.discovery import Discovery, PlacedServers
from streamsyn.fleet.fleet import Fleet
from streamsyn.fleet.health import Outage
from streamsyn.fleet.membership import Connect, Membership, connect_http, open_membership
from streamsyn.fleet.models import shared_models
from streamsyn.fleet.server import Timings
from streamsyn.fleet.server_spec import ServerSpec, base_and_query, headers_of
from streamsyn.fleet.shares import Priority, Shares
from streamsyn.io.process_files import within_sockets
from streamsyn.plain_text import split_userinfo

log = structlog.get_logger()

_FEW_SERVERS = 8
"""Connections are divided among this many servers at least, since more may be added."""


@dataclass(slots=True)
class ServerEdits:
    """What was changed while the servers are in use, beside what the configuration and its sources name.

    Attributes:
        added: Servers that were added, by URL.
        removed: URLs that were removed.
        draining: URLs that get no new requests.
    """

    added: dict[str, ServerSpec] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    draining: set[str] = field(default_factory=set)

    def add(self, spec: ServerSpec) -> None:
        """Add a server, or use one again that was removed or draining."""
        self.added[spec.url] = spec
        self.removed.discard(spec.url)
        self.draining.discard(spec.url)

    def remove(self, url: str) -> None:
        """Remove a server, wherever it was named."""
        self.added.pop(url, None)
        self.draining.discard(url)
        self.removed.add(url)

    def apply(self, named: Iterable[ServerSpec]) -> list[ServerSpec]:
        """Return the servers to use: those `named` elsewhere with these changes."""
        wanted = {spec.url: spec for spec in named} | self.added
        return [
            replace(spec, draining=spec.draining or url in self.draining)
            for url, spec in wanted.items()
            if url not in self.removed
        ]


Save = Callable[[ServerEdits], Awaitable[None]]
"""Keeps edits."""


class Servers:
    """The servers that runs share. Made by `open_servers`.

    Attributes:
        edits: What was added, removed and drained beside the configuration.
    """

    def __init__(
        self,
        membership: Membership,
        outage: Outage,
        rng: Random,
        environ: Mapping[str, str],
        named: list[ServerSpec],
        edits: ServerEdits,
        save: Save,
        discovery: Discovery,
    ) -> None:
        self.edits = edits
        self._discovery = discovery
        self._save = save
        self._membership = membership
        self._outage = outage
        self._rng = rng
        self._environ = environ
        self._named = named
        self._shares = Shares()
        membership.left = self._shares.left
        self._changing = asyncio.Lock()

    @property
    def usable(self) -> int:
        """Number of servers that get requests."""
        return sum(server.is_usable for server in self._membership.servers)

    @asynccontextmanager
    async def fleet(
        self, section: FleetSection, weight: float = 1.0, priority: Priority = "normal"
    ) -> AsyncIterator[Fleet]:
        """Open the fleet of one run; its requests still in flight at the end are aborted.

        Args:
            section: The `fleet` section of the run: its models, retries, timeouts and hedging. Its servers
                and their settings are ignored.
            weight: The run's part of the places relative to the others; above 0.
            priority: Multiplies the weight by 1/8, 1 or 8.
        """
        share = self._shares.open(weight, priority)
        async with background() as tasks:
            fleet = Fleet(
                section, self._agree, self._membership, self._outage, tasks, self._rng, self._shares, share
            )
            try:
                yield fleet
            finally:
                fleet.on_room(_nobody)
                self._membership.on_room.pop(_nobody)
                self._shares.close(share)
                await tasks.close()

    def why_not_served(self, model: str) -> str | None:
        """Return why no run can use a model; None if one can, or servers have not yet said what they have."""
        try:
            shared_models(self._served(), FleetSection(model=model))
        except ConfigError as error:
            return str(error)
        return None

    def _served(self) -> dict[str, Sequence[str]]:
        return {server.url: server.served for server in self._membership.servers if not server.draining}

    async def _agree(self, section: FleetSection) -> list[str]:
        """Return the models of a run, once servers with them have answered."""
        while True:
            joined = self._membership.joined
            models = shared_models(self._served(), section)
            if models is not None:
                self._membership.want(models)
                return models
            await joined.wait()

    async def add(self, url: str, weight: float = 1.0, key_env: str | None = None) -> str:
        """Add a server, or use it again, and return its base URL. It is used once it has answered.

        Args:
            url: Its base URL.
            weight: Its share of the requests relative to the other servers.
            key_env: Environment variable that holds its key.

        Raises:
            ConfigError: The URL or the key is invalid.
        """
        base, query = base_and_query(url, "url")
        spec = ServerSpec(base, weight, key_env, userinfo=split_userinfo(url).userinfo, query=query)
        headers_of(spec, self._environ)
        await self._edit(lambda edits: edits.add(spec))
        return base

    async def remove(self, url: str) -> None:
        """Send no new requests to a server, and forget it when it has answered those it has.

        Raises:
            KeyError: There is no such server.
        """
        self._check_known(url)
        await self._edit(lambda edits: edits.remove(url))

    async def drain(self, url: str) -> None:
        """Send no new requests to a server; `add` uses it again.

        Raises:
            KeyError: There is no such server.
        """
        self._check_known(url)
        await self._edit(lambda edits: edits.draining.add(url))

    def describe(self) -> list[dict[str, Any]]:
        """Return the metrics of each server, its `state`, and why it is not usable."""
        return [
            server.metrics() | {"state": server.state, "error": server.error}
            for server in self._membership.servers
        ]

    def timings(self) -> dict[str, Timings]:
        """Return how long the requests at each server took, by URL."""
        return {server.url: server.timings for server in self._membership.servers}

    async def rediscover(self) -> None:
        """Read the file of servers and the DNS name now, without waiting for `fleet.discover_interval_s`."""
        named = await self._discovery.refresh()
        if named is not None:
            await self.rediscovered(named)

    async def rediscovered(self, named: list[ServerSpec]) -> None:
        """Change to the servers that the configuration and its sources name now."""
        async with self._changing:
            self._named = named
            await self._membership.apply(self.edits.apply(named))

    async def _edit(self, change: Callable[[ServerEdits], None]) -> None:
        """Change the edits: saved first, then in effect."""
        async with self._changing:
            edits = deepcopy(self.edits)
            change(edits)
            await self._save(edits)
            self.edits = edits
            await self._membership.apply(edits.apply(self._named))

    def _check_known(self, url: str) -> None:
        if all(server.url != url for server in self._membership.servers):
            raise KeyError(url)


async def _kept_in_memory(_: ServerEdits) -> None:
    """Edits end with the process."""


def _nobody() -> None:
    """Nothing waits for room."""


@asynccontextmanager
async def open_servers(
    section: FleetSection,
    environ: Mapping[str, str] = os.environ,
    connect: Connect | None = None,
    rng: Random | None = None,
    max_sockets: int | None = None,
    edits: ServerEdits | None = None,
    save: Save = _kept_in_memory,
    placed: PlacedServers | None = None,
) -> AsyncIterator[Servers]:
    """Open the servers of `section`, of which there may be none yet.

    Args:
        section: The `fleet` section of the configuration; its models and retries are those of each run.
        environ: Holds the servers' keys.
        connect: Opens a transport to a server; None uses HTTP.
        rng: For jitter.
        max_sockets: Connections that this process can open to all servers together; None for any number.
        edits: What was changed before: servers added, removed and drained.
        save: Keeps each change before it takes effect.
        placed: Servers that are placed while they are used, beside those of `section`.

    Raises:
        ConfigError: A URL, file or key is invalid.
    """
    edits, rng = edits or ServerEdits(), rng or Random()
    for spec in list(edits.added.values()):
        try:
            headers_of(spec, environ)
        except ConfigError as error:  # one server must not keep the others from being used
            log.warning("fleet.server_left_out", server=spec.url, error=str(error))
            del edits.added[spec.url]
    discovery = Discovery(section, environ, may_be_empty=True, placed=placed)
    named = await discovery.first()
    first = edits.apply(named)
    if max_sockets is not None:
        section = within_sockets(max_sockets, section, max(_FEW_SERVERS, len(first)))
    connect = connect or await connect_http(section, environ)
    outage = Outage(section, on_gone=None)
    async with background() as tasks:
        membership = Membership(section, connect, tasks, outage, rng, is_shared=True)
        if placed is not None:
            placed.demand = membership.demand
        async with open_membership(membership, first):
            servers = Servers(membership, outage, rng, environ, named, edits, save, discovery)
            membership.begin()
            tasks.start(discovery.watch(servers.rediscovered), name="discovery")
            try:
                yield servers
            finally:
                outage.close()
                await tasks.close()  # before the connections, which aborts still need
