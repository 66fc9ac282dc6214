"""Which servers are wanted, while that changes: a file that people edit, a name that stands for addresses.

Whatever goes wrong later than at the start leaves the servers as they are: a file that is being replaced,
or a name server that is out, is no reason to send a run's servers away.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import structlog

from streamsyn.errors import ConfigError
from streamsyn.sections import FleetSection
from streamsyn.sglang.addresses import LookUp, at_name, system_look_up
from streamsyn.sglang.serverlist import ServersFile
from streamsyn.sglang.spec import NothingFound, ServerSpec, base_url, headers_of, specs

log = structlog.get_logger()


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
        self._configured = specs(section)
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
        nothing: list[NothingFound] = []
        for source in self._sources:
            try:
                await source.ask()
            except NothingFound as error:
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
