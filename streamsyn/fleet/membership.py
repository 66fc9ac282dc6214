"""The servers there are: who comes and goes, what each serves, who is ejected, probed and readmitted."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from itertools import count
from random import Random
from typing import Any, TypeAlias

import structlog

from streamsyn.background import Background
from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError, FleetGone, ServerError, ServerUnavailable
from streamsyn.fleet.affinity import Affinity
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.health import Health, Outage, full_jitter
from streamsyn.fleet.limiter import START, AdaptiveLimiter, Limiter
from streamsyn.fleet.models import agreed_models, served_here
from streamsyn.fleet.placement import Placement
from streamsyn.fleet.routers import warn_of_router
from streamsyn.fleet.server import Server, ServerSpec
from streamsyn.fleet.transport import KEY_VARIABLE, Transport

log = structlog.get_logger()

_RAMP_LOOK = 0.25
"""While a cap doubles, its server's load is looked at after this part of the interval."""

_MOMENT_S = 2.0
"""What other servers have to answer in, at the start, once one has."""

Connect: TypeAlias = Callable[[ServerSpec], AbstractAsyncContextManager[Transport]]
"""Opens what carries requests to a server."""


class Membership:
    """All servers of a fleet, in one pool for each model.

    Args:
        section: The section of the configuration.
        connect: Opens what carries requests to a server.
        tasks: Where probes and looks at the load run.
        outage: Told when no server is in.
        rng: For jitter.
    """

    def __init__(
        self, section: FleetSection, connect: Connect, tasks: Background, outage: Outage, rng: Random
    ) -> None:
        self.servers: list[Server] = []
        self.pools: dict[str, Placement] = {}
        self.on_room: Callable[[], None] = lambda: None
        """Called when the servers may have more in flight than before."""
        self._section = section
        self._connect = connect
        self._tasks = tasks
        self._outage = outage
        self._rng = rng
        self._transports: dict[Server, AsyncExitStack] = {}
        self._out: set[str] = set()
        """Models that no server is in for."""
        self.past: dict[str, Counter[str]] = {}
        """What servers did that are gone, by URL."""

    async def open(self, specs: Iterable[ServerSpec]) -> None:
        """Take up servers; they are not asked before `agree`."""
        for spec in specs:
            self.servers.append(await self._opened(spec))

    async def close(self) -> None:
        """Let go of all connections."""
        for pool in self.pools.values():
            pool.close()
        for transport in self._transports.values():
            await transport.aclose()

    async def agree(self) -> None:
        """Find out which models are served; waits for one server, the others are probed from now on.

        Raises:
            ConfigError: Servers serve different models, or not those asked for.
            FleetGone: None came up within `fleet.give_up_s`.
        """
        served: dict[str, list[str]] = {}
        why: dict[str, str] = {}
        try:
            async with asyncio.timeout(self._section.give_up_s):
                for step in count():
                    await self._ask_each(served, why)
                    if served:
                        break
                    if step == 0:
                        log.warning("fleet.waiting", servers=why)
                    await asyncio.sleep(self._probe_pause(step))
        except TimeoutError:
            reasons = "; ".join(why.values())
            raise FleetGone(f"no server came up within {self._section.give_up_s:g} s: {reasons}") from None
        clock = asyncio.get_running_loop().time
        for model in agreed_models(served, self._section):
            homes = Affinity(self._section.balance_factor, clock)
            self.pools[model] = Placement([], homes, self._section.leader_wait_s, clock)
        for server in self.servers:
            if server.url in served:
                self._join(server, served[server.url])
                self._tasks.start(self._watch(server), name=f"load-{server.url}")
            else:
                self._start(server)
        self.check_in()

    async def apply(self, wanted: Iterable[ServerSpec]) -> None:
        """Go over to another set of servers: some are new, some are to finish what they have and go."""
        await self._let_go()
        left = {server.url: server for server in self.servers}
        for spec in wanted:
            server = left.pop(spec.url, None)
            if server is None:
                server = await self._opened(spec)
                self.servers.append(server)
                if self.pools:  # else it is asked with the others
                    self._start(server)
            elif (server.spec.key_env, server.spec.server_name) != (spec.key_env, spec.server_name):
                server.client = await self._client(server, spec)
            server.spec, server.is_gone = spec, False
            self._set_draining(server, draining=spec.draining)
        for server in left.values():
            server.is_gone = True
            self._set_draining(server, draining=True)
        if self.pools:
            self.check_in()

    def _start(self, server: Server) -> None:
        """A server that is not in yet: it is, once it has said what it serves."""
        server.health.ejected = True
        self._tasks.start(self._probe(server), name=f"probe-{server.url}")
        self._tasks.start(self._watch(server), name=f"load-{server.url}")

    def eject(self, server: Server, error: ServerError) -> None:
        """`server` gets nothing more until it answers a probe."""
        log.warning("fleet.ejected", server=server.url, error=str(error))
        self._left(server)
        self._tasks.start(self._probe(server), name=f"probe-{server.url}")
        self.check_in()

    def check_in(self) -> None:
        """See whether each model has a server that is in."""
        out = {
            model for model, pool in self.pools.items() if not any(server.is_in for server in pool.servers)
        }
        for model in sorted(out - self._out):
            log.warning("fleet.none_in", model=model, gives_up_after_s=self._section.give_up_s)
        self._out = out
        if out:
            self._outage.none_in(asyncio.get_running_loop())
        else:
            self._outage.some_in()

    def _left(self, server: Server) -> None:
        if server.model:
            self.pools[server.model].left(server)

    def _join(self, server: Server, models: list[str]) -> None:
        """`server` is in, for the first of our models that it serves.

        Raises:
            ServerUnavailable: It serves none of them.
        """
        if server.model:
            return
        server.model = served_here(models, self.pools) or ""
        if not server.model:
            raise ServerUnavailable(f"{server.url} serves {', '.join(models)}, not {', '.join(self.pools)}")
        self.pools[server.model].servers.append(server)

    async def _models(self, server: Server) -> list[str]:
        """What it serves; on the way the other things that are asked of a server once, when it comes up.

        Raises:
            ServerError: It is not up.
            ConfigError: It does not accept our key.
        """
        models = await server.client.models()
        await warn_of_router(server.url, server.client.transport)
        try:
            server.weight_version = await server.client.weight_version()
        except ServerError as error:
            log.debug("fleet.weights_unknown", server=server.url, error=str(error))
        return models

    def _set_draining(self, server: Server, *, draining: bool) -> None:
        if server.draining == draining:
            return
        server.draining = draining
        log.info("fleet.draining" if draining else "fleet.undrained", server=server.url)
        if draining:
            self._left(server)
        elif server.model:
            server.limiter.readmitted(asyncio.get_running_loop().time())
            self._dispatch(server)

    def _dispatch(self, server: Server) -> None:
        self.pools[server.model].dispatch()
        self.on_room()

    async def _opened(self, spec: ServerSpec) -> Server:
        client: Any = None  # for a moment: connections are kept by server
        server = Server(spec, client, _limiter(self._section), Health(self._section.eject_after))
        server.draining = spec.draining
        server.client = await self._client(server, spec)
        return server

    async def _client(self, server: Server, spec: ServerSpec) -> ServerClient:
        transports = self._transports.setdefault(server, AsyncExitStack())
        transport = await transports.enter_async_context(self._connect(spec))
        key_name = spec.key_env or KEY_VARIABLE
        return ServerClient(spec.url, transport, self._section.request_timeout_s, key_name)

    async def _let_go(self) -> None:
        """Forget servers that are gone and have answered what they had."""
        for server in [server for server in self.servers if server.is_gone]:
            if not server.limiter.in_flight:
                self.servers.remove(server)
                self.past.setdefault(server.url, Counter()).update(server.counts())
                if server.model:
                    self.pools[server.model].servers.remove(server)
                await self._transports.pop(server).aclose()

    async def _ask_each(self, served: dict[str, list[str]], why: dict[str, str]) -> None:
        """Ask all servers what they serve; `why` takes what those say that are not up.

        Once one has answered the others get a moment more: one that hangs need not hold up a run.
        """
        clock = asyncio.get_running_loop().time

        async def ask(server: Server, moment: asyncio.Timeout) -> None:
            try:
                served[server.url] = await self._models(server)
            except ServerError as error:
                why[server.url] = str(error)
            else:
                if moment.when() is None:
                    moment.reschedule(clock() + _MOMENT_S)

        why.clear()
        why |= {server.url: f"{server.url} is to be drained" for server in self.servers if server.draining}
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as moment, asyncio.TaskGroup() as group:
                for server in self.servers:
                    if not server.draining:
                        group.create_task(ask(server, moment), name=f"ask-{server.url}")

    async def _probe(self, server: Server) -> None:
        """Ask an ejected server, ever less often, until it answers; then use it again."""
        if server.health.ejections > 1:  # the last time it answered probes only
            await asyncio.sleep(self._probe_pause(server.health.ejections))
        for step in count():
            if server not in self.servers:
                return
            try:
                models = await self._models(server)
                if server.model and server.model not in models:
                    raise ServerUnavailable(f"{server.url} serves {', '.join(models)}, not {server.model}")
                self._join(server, models)
            except (ServerError, ConfigError) as error:
                say = log.debug if step else log.warning if isinstance(error, ConfigError) else log.info
                say("fleet.probe_failed", server=server.url, error=str(error))
                await asyncio.sleep(self._probe_pause(step))
            else:
                break
        is_new = not server.health.ejections and not server.completions
        server.health.readmit()
        server.limiter.readmitted(asyncio.get_running_loop().time())
        log.info("fleet.joined" if is_new else "fleet.readmitted", server=server.url, model=server.model)
        self.check_in()
        self._dispatch(server)

    async def _watch(self, server: Server) -> None:
        """Look at the server's load, again and again."""
        clock = asyncio.get_running_loop().time
        while server in self.servers:
            if server.is_in:
                try:
                    load = await server.client.load()
                except (ServerError, ConfigError) as error:
                    log.debug("fleet.load_unknown", server=server.url, error=str(error))
                else:
                    if load is None:
                        log.info("fleet.tells_no_load", server=server.url)
                        return
                    server.load = load
                    if load.pool_tokens:
                        server.prefixes.resize(load.pool_tokens)
                    cap = server.limiter.cap
                    server.limiter.observe(load, clock())
                    self.cap_moved(server, cap)
            hurry = _RAMP_LOOK if server.limiter.is_looking else 1.0
            await asyncio.sleep(hurry * self._section.load_interval_s)

    def cap_moved(self, server: Server, before: int) -> None:
        """Say so, and use the room, if the server's cap is not what it was `before`."""
        cap = server.limiter.cap
        if cap == before:
            return
        is_news = abs(cap - server.told_cap) > server.told_cap / 4
        if is_news:
            server.told_cap = cap
        say = log.info if is_news else log.debug
        say("fleet.cap", server=server.url, cap=cap, was=before, why=server.limiter.last_decision)
        if cap > before and server.is_in:
            self._dispatch(server)

    def _probe_pause(self, step: int) -> float:
        interval_s = self._section.probe_interval_s
        pause_s = interval_s / 2 + full_jitter(interval_s, 10 * interval_s, step, self._rng)
        return min(pause_s, max(interval_s / 2, self._section.give_up_s / 4))


@asynccontextmanager
async def open_membership(roster: Membership, specs: Iterable[ServerSpec]) -> AsyncIterator[Membership]:
    """Opens the servers of `specs`; closes all that the roster has at the end."""
    try:
        await roster.open(specs)
        yield roster
    finally:
        await roster.close()


def _limiter(section: FleetSection) -> Limiter:
    if section.concurrency == "auto":
        return AdaptiveLimiter(
            min(START, section.max_in_flight),
            slow_start_s=section.slow_start_s,
            ceiling=section.max_in_flight,
            interval_s=section.load_interval_s,
        )
    return Limiter(min(section.concurrency, section.max_in_flight), section.slow_start_s)
