"""Membership: servers are added and removed, ejected, probed and readmitted, and their load is watched."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from contextvars import copy_context
from dataclasses import replace
from itertools import count
from math import inf
from random import Random
from typing import Any, TypeAlias

import structlog

from streamsyn.background import Background
from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError, FleetGone, ServerError, ServerUnavailable, WrongAddress
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.discovery import Demand
from streamsyn.fleet.health import Health, Outage, full_jitter
from streamsyn.fleet.limiter import START, AdaptiveLimiter, Limiter
from streamsyn.fleet.models import agreed_models, listed
from streamsyn.fleet.placement import Placement
from streamsyn.fleet.server import Server
from streamsyn.fleet.server_spec import ServerSpec, headers_of
from streamsyn.fleet.transport import KEY_VARIABLE, Transport, http_transport, tls_context
from streamsyn.plain_text import cut

log = structlog.get_logger()

_RAMP_INTERVAL = 0.25
"""Part of the load interval after which load metrics are read while a cap ramps up."""

NOTICE_S = 0.05
"""Runs that share a fleet hear of new or unused places this long after the first one."""

_GRACE_S = 2.0
"""Time that the other servers have to answer at the start, once one has."""

Connect: TypeAlias = Callable[[ServerSpec], AbstractAsyncContextManager[Transport]]
"""Opens a transport to a server."""


async def connect_http(section: FleetSection, environ: Mapping[str, str]) -> Connect:
    """Return what opens a transport over HTTP to a server.

    Raises:
        ConfigError: A certificate of `section` cannot be used.
    """
    tls = await asyncio.to_thread(tls_context, section)

    @asynccontextmanager
    async def connect(spec: ServerSpec) -> AsyncIterator[Transport]:
        async with http_transport(
            spec.url,
            headers_of(spec, environ),
            tls=tls,
            connect_timeout_s=section.connect_timeout_s,
            server_name=spec.server_name,
            query=spec.query,
            max_answer_bytes=section.max_answer_bytes,
        ) as transport:
            yield transport

    return connect


class Membership:
    """All servers of a fleet, and the models that they are used for.

    Args:
        section: The `fleet` section of the configuration.
        connect: Opens a transport to a server.
        tasks: Runs probes and load watches.
        outage: Informed when a model has no usable server.
        rng: For jitter.
        is_shared: Whether several runs use it: then a server may serve models that no run has asked for.
    """

    def __init__(
        self,
        section: FleetSection,
        connect: Connect,
        tasks: Background,
        outage: Outage,
        rng: Random,
        *,
        is_shared: bool = False,
    ) -> None:
        self.servers: list[Server] = []
        self.models: list[str] = []
        """The models that runs ask for."""
        self.on_room: dict[Callable[[], None], None] = {}
        """Called when more requests may be in flight than before, or when a place is not used."""
        self.left: Callable[[], float] = lambda: inf
        """Returns how many requests all servers may still get, those in flight included."""
        self.joined = asyncio.Event()
        """Set when a server has said what it serves; the next one is a new event."""
        self.is_shared = is_shared
        self._is_begun = False
        """Whether servers are being used: new ones are contacted at once."""
        self._context = copy_context()
        """Of no run: probes begin while one makes a request."""
        self._notice: asyncio.TimerHandle | None = None
        self._section = section
        self._connect = connect
        self._tasks = tasks
        self._outage = outage
        self._rng = rng
        self._transports: dict[Server, AsyncExitStack] = {}
        self._watching: dict[Server, set[asyncio.Task[None]]] = {}
        """The probe and the load watch of each server."""
        self._without_server: set[str] = set()
        """Models without a usable server."""
        self.removed_counts: dict[str, Counter[str]] = {}
        """Counters of removed servers, by URL."""
        self.placement = Placement(
            self.servers,
            section.balance_factor,
            section.leader_wait_s,
            asyncio.get_running_loop().time,
            self.let_go,
            self._unused if is_shared else None,
        )

    async def open(self, specs: Iterable[ServerSpec]) -> None:
        """Add servers; they are first contacted by `agree_on_models`."""
        for spec in specs:
            self.servers.append(await self._open_server(spec))

    async def close(self) -> None:
        """Close all connections."""
        self.placement.close()
        if self._notice is not None:
            self._notice.cancel()
        for transport in self._transports.values():
            await transport.aclose()

    async def agree_on_models(self) -> list[str]:
        """Wait for one healthy server and agree on the models; probe servers that did not answer from now on.

        Returns:
            The models.

        Raises:
            ConfigError: Servers serve different models, or not those of the configuration; or each URL is not
                that of an API.
            FleetGone: No server was healthy within `fleet.give_up_s`.
        """
        served: dict[str, list[str]] = {}
        failures: dict[str, ServerError] = {}
        try:
            async with asyncio.timeout(self._section.give_up_s):
                for step in count():
                    await self._ask_all(served, failures)
                    if served:
                        break
                    if failures and all(isinstance(error, WrongAddress) for error in failures.values()):
                        raise ConfigError(cut("; ".join(map(str, failures.values()))))
                    if step == 0:
                        log.warning("fleet.waiting", servers=_texts(failures))
                    await asyncio.sleep(self._probe_pause(step))
        except TimeoutError:
            reasons = cut("; ".join(_texts(failures).values()))
            raise FleetGone(f"no healthy server within {self._section.give_up_s:g} s: {reasons}") from None
        self.models += agreed_models(served, self._section)
        self._is_begun = True
        for server in list(self.servers):
            if server.is_removed:
                self.let_go(server)
            elif server.url in served:
                self._join(server, served[server.url])
                self._run_for(server, self._watch(server), "load")
            else:
                self._start(server)
        self.check_usable()
        return self.models

    def begin(self) -> None:
        """Contact all servers; each is used from when it has answered."""
        self._is_begun = True
        for server in self.servers:
            self._start(server)

    def want(self, models: Iterable[str]) -> None:
        """Use the servers for these models, too."""
        self.models += [model for model in models if model not in self.models]
        for server in self.servers:
            server.models = self._wanted(server)
        self.check_usable()

    @property
    def served(self) -> list[str]:
        """The models that requests may name."""
        if not self.is_shared:
            return self.models
        return sorted({model for server in self.servers for model in server.served})

    def may_serve(self, model: str) -> bool:
        """Whether servers serve `model` or may turn out to; from now on they are used for it, too.

        Of a fleet of one run, only the models that it has agreed on.
        """
        if model in self.models:
            return True
        all_known = all(server.served for server in self.servers)
        if not self.is_shared or (all_known and model not in self.served):
            return False
        self.want([model])
        return True

    def _wanted(self, server: Server) -> tuple[str, ...]:
        return tuple(model for model in self.models if model in server.served)

    async def apply(self, wanted: Iterable[ServerSpec]) -> None:
        """Change to the `wanted` servers: add new ones; drain those not wanted any more, and let them go.

        One with an incarnation that is not wanted any more is dead: its requests fail at once.
        """
        unwanted = {(server.url, server.spec.incarnation): server for server in self.servers}
        for spec in wanted:
            server = unwanted.pop((spec.url, spec.incarnation), None)
            if server is None:
                server = await self._open_server(spec)
                self.servers.append(server)
                if self._is_begun:  # else `agree_on_models` asks it
                    self._start(server)
            elif replace(server.spec, weight=spec.weight, draining=spec.draining) != spec:
                server.client = await self._client(server, spec)
            server.spec, server.is_removed = spec, False
            self._set_draining(server, draining=spec.draining)
        for server in unwanted.values():
            server.is_removed = True
            self._set_draining(server, draining=True)
            if server.spec.incarnation:
                self._hang_up(server)
            self.let_go(server)
        if self._is_begun:
            self.check_usable()

    def demand(self) -> Demand:
        """Return what there is to do, for those who place servers."""
        usable = [server.limiter.cap for server in self.servers if server.is_usable]
        in_flight = {server.url: server.limiter.in_flight for server in self.servers}
        return Demand(self.left(), sum(usable) / max(1, len(usable)), in_flight)

    def _hang_up(self, server: Server) -> None:
        """Close the connections to a server that is dead: of a machine that is gone no packet says so."""
        server.error = "it is dead"
        self._tasks.start(self._transports[server].aclose(), name=f"hang-up-{server.url}", finish=True)

    def let_go(self, server: Server) -> None:
        """Forget a server that was removed and has answered everything; its connections are closed."""
        if not server.is_removed or server.limiter.in_flight or not self._is_begun:
            return
        self.servers.remove(server)
        self.removed_counts.setdefault(server.url, Counter()).update(server.counts())
        log.info("fleet.removed", server=server.url)
        self._tasks.start(self._close(server), name=f"close-{server.url}", finish=True)

    async def _close(self, server: Server) -> None:
        watching = self._watching.pop(server, set())
        for task in watching:
            task.cancel()
        if pending := watching | server.aborts:
            await asyncio.wait(pending)
        await self._transports.pop(server).aclose()

    def _run_for(self, server: Server, work: Coroutine[Any, Any, None], what: str) -> None:
        """Run `work` in the background until it ends or the server is let go."""
        task = self._tasks.start(work, name=f"{what}-{server.url}", context=self._context.copy())
        if task is not None:
            running = self._watching.setdefault(server, set())
            running.add(task)
            task.add_done_callback(running.discard)

    def _start(self, server: Server) -> None:
        """Probe a new server; it becomes usable once it has said what it serves."""
        server.health.ejected = True
        self._run_for(server, self._probe(server), "probe")
        self._run_for(server, self._watch(server), "load")

    def eject(self, server: Server, error: ServerError) -> None:
        """Send no requests to `server` until it answers a probe."""
        server.error = str(error)
        log.warning("fleet.ejected", server=server.url, error=server.error)
        self.placement.withdraw(server)
        self._run_for(server, self._probe(server), "probe")
        self.check_usable()

    def check_usable(self) -> None:
        """Check that each model has a usable server, and start or end the outage."""
        without = {
            model
            for model in self.models
            if not any(server.is_usable and model in server.models for server in self.servers)
        }
        for model in sorted(without - self._without_server):
            after = {} if self.is_shared else {"gives_up_after_s": self._section.give_up_s}
            log.warning("fleet.no_usable_server", model=model, **after)
        self._without_server = without
        if without:
            self._outage.began(asyncio.get_running_loop())
        else:
            self._outage.ended()

    def _join(self, server: Server, served: list[str]) -> None:
        """Use `server` for the wanted models that it serves.

        Raises:
            ServerUnavailable: It serves none of them, and no other run can want one of its own.
        """
        server.served = tuple(served)
        server.models = self._wanted(server)
        self.placement.use_ranks(server)
        if not server.models and not self.is_shared:
            raise ServerUnavailable(f"{server.url} serves {listed(served)}, not {listed(self.models)}")
        self.joined.set()
        self.joined = asyncio.Event()

    def _set_draining(self, server: Server, *, draining: bool) -> None:
        if server.draining == draining:
            return
        server.draining = draining
        log.info("fleet.draining" if draining else "fleet.undrained", server=server.url)
        if draining:
            self.placement.withdraw(server)
        elif server.served:
            server.limiter.readmitted(asyncio.get_running_loop().time())
            self._dispatch()

    def _dispatch(self) -> None:
        self.placement.dispatch()
        if self.is_shared:
            self._unused()
        else:
            self._room()

    def _room(self) -> None:
        for call in list(self.on_room):
            call()

    def _unused(self) -> None:
        """Tell the runs, soon and once, that a place may be free for which nobody waits."""
        if self._notice is None:
            self._notice = asyncio.get_running_loop().call_later(NOTICE_S, self._on_notice)

    def _on_notice(self) -> None:
        self._notice = None
        self._room()

    async def _open_server(self, spec: ServerSpec) -> Server:
        client: Any = None  # set below: transports are kept by server
        server = Server(spec, client, _limiter(self._section), Health(self._section.eject_after))
        server.draining = spec.draining
        server.client = await self._client(server, spec)
        return server

    async def _client(self, server: Server, spec: ServerSpec) -> ServerClient:
        transports = self._transports.setdefault(server, AsyncExitStack())
        transport = await transports.enter_async_context(self._connect(spec))
        key_name = spec.key_env or KEY_VARIABLE
        return ServerClient(spec.url, transport, self._section.request_timeout_s, key_name)

    async def _ask_all(self, served: dict[str, list[str]], failures: dict[str, ServerError]) -> None:
        """Ask all servers what they serve. Fill `served`, and `failures` with errors, by URL.

        Once one has answered, the others get `_GRACE_S` more, so that a server that hangs cannot delay a run.
        """
        clock = asyncio.get_running_loop().time

        async def ask(server: Server, grace: asyncio.Timeout) -> None:
            try:
                served[server.url] = await server.ask_models()
            except ServerError as error:
                failures[server.url] = error
            else:
                if grace.when() is None:
                    grace.reschedule(clock() + _GRACE_S)

        failures.clear()
        failures |= {
            server.url: ServerUnavailable(f"{server.url} is draining")
            for server in self.servers
            if server.draining
        }
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as grace, asyncio.TaskGroup() as group:
                for server in self.servers:
                    if not server.draining:
                        group.create_task(ask(server, grace), name=f"ask-{server.url}")

    async def _probe(self, server: Server) -> None:
        """Probe an ejected server with growing pauses until it answers; then readmit it."""
        if server.health.ejections > 1:  # the last time it answered only probes
            await asyncio.sleep(self._probe_pause(server.health.ejections))
        for step in count():
            try:
                self._join(server, await server.ask_models())
            except (ServerError, ConfigError) as error:
                server.error = str(error)
                log_it = log.debug if step else log.warning if isinstance(error, ConfigError) else log.info
                log_it("fleet.probe_failed", server=server.url, error=str(error))
                await asyncio.sleep(self._probe_pause(step))
            else:
                break
        is_new = not server.health.ejections and not server.completions
        server.health.readmit()
        server.error = None
        if not is_new:
            server.limiter.readmitted(asyncio.get_running_loop().time())
        event = "fleet.joined" if is_new else "fleet.readmitted"
        log.info(event, server=server.url, model=listed(server.served))
        self.check_usable()
        self._dispatch()

    async def _watch(self, server: Server) -> None:
        """Read the server's load metrics at intervals."""
        clock = asyncio.get_running_loop().time
        while True:
            if server.is_usable:
                try:
                    load = await server.client.load()
                except (ServerError, ConfigError) as error:
                    log.debug("fleet.load_unknown", server=server.url, error=str(error))
                else:
                    if load is None:
                        log.info("fleet.no_load_metrics", server=server.url)
                        return
                    server.load = load
                    server.resize_pool()
                    cap = server.limiter.cap
                    server.limiter.observe(load, clock(), self._left_for(server))
                    self.cap_changed(server, cap)
            factor = _RAMP_INTERVAL if server.limiter.is_ramping else 1.0
            await asyncio.sleep(factor * self._section.load_interval_s)

    def _left_for(self, server: Server) -> float:
        """Return the server's part, by weight, of the requests that are left."""
        weights = sum(other.weight for other in self.servers if other.is_usable)
        return self.left() * server.weight / max(weights, server.weight)

    def cap_changed(self, server: Server, before: int) -> None:
        """Log a change of the server's cap from `before`, and use the new room."""
        cap = server.limiter.cap
        if cap == before:
            return
        is_news = abs(cap - server.logged_cap) > server.logged_cap / 4
        if is_news:
            server.logged_cap = cap
        log_it = log.info if is_news else log.debug
        log_it("fleet.cap", server=server.url, cap=cap, was=before, why=server.limiter.last_decision)
        if cap > before and server.is_usable:
            self._dispatch()

    def _probe_pause(self, step: int) -> float:
        interval_s = self._section.probe_interval_s
        pause_s = interval_s / 2 + full_jitter(interval_s, 10 * interval_s, step, self._rng)
        return min(pause_s, max(interval_s / 2, self._section.give_up_s / 4))


@asynccontextmanager
async def open_membership(membership: Membership, specs: Iterable[ServerSpec]) -> AsyncIterator[Membership]:
    """Open the servers of `specs`; at the end, close all servers of `membership`."""
    try:
        await membership.open(specs)
        yield membership
    finally:
        await membership.close()


def _texts(failures: Mapping[str, ServerError]) -> dict[str, str]:
    return {url: str(error) for url, error in failures.items()}


def _limiter(section: FleetSection) -> Limiter:
    if section.concurrency == "auto":
        return AdaptiveLimiter(
            min(START, section.max_in_flight),
            slow_start_s=section.slow_start_s,
            ceiling=section.max_in_flight,
            interval_s=section.load_interval_s,
        )
    return Limiter(min(section.concurrency, section.max_in_flight), section.slow_start_s)
