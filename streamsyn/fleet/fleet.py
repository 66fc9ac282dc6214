"""Many servers as one: asks, tries again elsewhere, and tells what came of it."""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import count
from random import Random
from typing import Any

import structlog

from streamsyn.background import Background, background
from streamsyn.config.sections import FleetSection
from streamsyn.errors import (
    BrokenResponse,
    ConfigError,
    RequestRefused,
    ServerBusy,
    ServerError,
    ServerTimeout,
    ServerUnreachable,
)
from streamsyn.fleet import prefixes
from streamsyn.fleet.discovery import Discovery
from streamsyn.fleet.health import Outage, RetryBudget
from streamsyn.fleet.hedging import Call, Hedging
from streamsyn.fleet.limiter import total_cap
from streamsyn.fleet.membership import Connect, Membership, open_membership
from streamsyn.fleet.models import ModelWeights
from streamsyn.fleet.placement import Placement
from streamsyn.fleet.server import Place, Server, ServerSpec, headers_of
from streamsyn.fleet.transport import Transport, http_transport, tls_context
from streamsyn.records import Attempt, Completion, Request

log = structlog.get_logger()


class Fleet:
    """The servers of a run. Made by `open_fleet`.

    Each try carries a rid of its own, all of one width: a server refuses a rid that it still has,
    and aborts every request whose rid begins with the one it is given.
    """

    def __init__(
        self,
        section: FleetSection,
        discovery: Discovery,
        roster: Membership,
        outage: Outage,
        tasks: Background,
        rng: Random,
    ) -> None:
        self._section = section
        self._discovery = discovery
        self._roster = roster
        self._outage = outage
        self._tasks = tasks
        self._rng = rng
        self._shares = ModelWeights({"": 1.0})
        self._hedging = Hedging(section.hedge_tail, tasks, self._ask)
        self._clock = asyncio.get_running_loop().time
        self._run_rid = secrets.token_hex(6)
        self._requests = count()

    @property
    def servers(self) -> list[Server]:
        """All there are, in or out."""
        return self._roster.servers

    @property
    def models(self) -> list[str]:
        """What is asked for, once `ask_models` has found out."""
        return list(self._roster.pools)

    @property
    def capacity(self) -> int:
        """Requests that may be in flight at all servers together."""
        return total_cap(server.limiter for server in self.servers)

    @property
    def in_flight(self) -> dict[str, int]:
        """Requests in flight, by server."""
        return {server.url: server.limiter.in_flight for server in self.servers}

    def figures(self) -> list[dict[str, Any]]:
        """What there is to say of each server now, and what those did that are gone."""
        told = {server.url: server.figures() for server in list(self.servers)}
        for url, counts in list(self._roster.past.items()):
            figures = told.setdefault(url, {"server": url, "in_flight": 0, "cap": 0, "queued": 0})
            for name, number in counts.items():
                figures[name] = figures.get(name, 0) + number
        return list(told.values())

    def on_room(self, call: Callable[[], None]) -> None:
        """Have `call` made when more may be in flight than before."""
        self._roster.on_room = call

    async def ask_models(self) -> None:
        """Find out which models are served; waits for one server, the others are probed from now on.

        From then on servers also come and go as the configuration's file and name tell.

        Raises:
            ConfigError: Servers serve different models, or not those asked for.
            FleetGone: None came up within `fleet.give_up_s`.
        """
        self._tasks.start(self._discovery.watch(self._roster.apply), name="discovery")
        await self._roster.agree()
        self._shares = ModelWeights(self._section.models or dict.fromkeys(self.models, 1.0))

    async def check_scores(self, model: str) -> None:
        """See whether the servers of `model` that are in can score; one that gives no answer now may.

        Raises:
            ConfigError: One cannot.
        """
        refused: list[str] = []

        async def check(server: Server) -> None:
            rid = f"{self._run_rid}-{next(self._requests):012x}"
            try:
                await server.client.check_scores(model, rid)
            except RequestRefused as error:
                refused.append(str(error))
            except ServerError as error:
                log.info("fleet.scores_unknown", server=server.url, error=str(error))

        async with asyncio.TaskGroup() as group:
            for server in self._roster.pools[model].servers:
                if server.is_in:
                    group.create_task(check(server), name=f"check-{server.url}")
        if refused:
            raise ConfigError(min(refused))

    def model_of(self, key: bytes) -> str:
        """The model that writes the draft of this key; the same in every run."""
        return self._shares.model_of(key)

    async def complete(
        self, request: Request, attempts: list[Attempt], model: str | None = None
    ) -> Completion:
        """The answer to `request`, from whichever server gives one. Adds each try to `attempts`.

        Args:
            request: What is asked.
            attempts: Added to.
            model: What is to answer; None when there is but one.

        Raises:
            ServerError: The last failure, when the request was refused or its budget is used up.
            StoppedEarly: The run is draining, and no server has a place.
        """
        pool = self._roster.pools[model or self.models[0]]
        budget = RetryBudget(self._section, self._rng)
        failed_at: Server | None = None
        while True:
            place = await pool.acquire(request, failed_at)
            at, started = time.time(), self._clock()
            try:
                if self._hedging.is_on and request.scored is None:
                    completion = await self._hedging.ask(Call(request, place, pool, started))
                else:
                    completion = await self._ask(place, pool, request)
            except ServerError as error:
                failure, failed_at = error, place.server
            else:
                took = self._since(started)
                attempts.append(Attempt(completion.server, at, took, None, completion.completion_tokens))
                return completion
            finally:
                pool.release(place)
            took, url = self._since(started), place.server.url
            if not isinstance(failure, ServerBusy):  # no try; there may be thousands
                said = f"{type(failure).__name__}: {failure}"
                attempts.append(Attempt(url, at, took, said, failure.completion_tokens))
            pause_s = budget.pause_after(failure, took)
            if pause_s is None:
                raise failure
            await asyncio.sleep(pause_s)

    def drain(self) -> None:
        """From now on a request that finds no place at once fails with StoppedEarly."""
        for pool in self._roster.pools.values():
            pool.drain()

    def tail(self, left: int, of: int) -> None:
        """There is no more work to begin: `left` workers `of` so many are still at theirs."""
        self._hedging.tail(left, of)

    async def _ask(self, place: Place, pool: Placement, request: Request) -> Completion:
        """One try at one server, and what it tells of that server."""
        server, started = place.server, self._clock()
        text = prefixes.rendered(request)
        keys = prefixes.chain(text)
        scored = request.scored
        planned = server.prefixes.share(text if scored is None else prefixes.answered(text, scored), keys)

        def first_token() -> None:
            server.prefixes.add(keys)
            pool.warmed(place)

        rid = f"{self._run_rid}-{next(self._requests):012x}"
        try:
            completion = await server.client.complete(
                request, server.model, rid, first_token if place.leads else None
            )
        except (ServerTimeout, asyncio.CancelledError) as error:
            # A server goes on with a request whose client has left, for seconds at the least.
            # By its whole rid: with one tokenizer worker, the default, a prefix of it aborts nothing.
            self._tasks.start(_abort(server, rid), name=f"abort-{rid}", finish=True)
            if isinstance(error, ServerError):
                self._failed(server, error)
            raise
        except ServerError as error:
            self._failed(server, error)
            raise
        if place.leads:
            pool.warmed(place)
        server.planned_cached_tokens += planned * completion.prompt_tokens
        if request.group and scored is None:  # it may go on
            keys = prefixes.chain(prefixes.answered(text, completion.text), keys)
        server.prefixes.add(keys)
        self._answered(server, completion, self._since(started), wrote=scored is None)
        if completion.weight_version is None and server.weight_version is not None:
            completion = replace(completion, weight_version=await self._weights_now(server))
        return completion

    async def _weights_now(self, server: Server) -> str | None:
        """Which weights `server` has: a streamed answer does not say, and they may be new."""
        try:
            server.weight_version = await server.client.weight_version() or server.weight_version
        except ServerError as error:
            log.debug("fleet.weights_unknown", server=server.url, error=str(error))
        return server.weight_version

    def _answered(self, server: Server, completion: Completion, seconds: float, *, wrote: bool) -> None:
        self._outage.answered()
        server.health.answered()
        server.completions += 1
        server.completion_tokens += completion.completion_tokens
        server.prompt_tokens += completion.prompt_tokens
        server.cached_tokens += completion.cached_tokens
        cap = server.limiter.cap
        if wrote:
            server.limiter.answered(self._clock(), seconds, completion.completion_tokens)
        else:
            computed = completion.prompt_tokens - completion.cached_tokens
            server.limiter.scored(self._clock(), seconds, computed)
        self._roster.cap_moved(server, cap)

    def _failed(self, server: Server, error: ServerError) -> None:
        cap = server.limiter.cap
        if isinstance(error, ServerBusy):
            server.health.answered()
            server.limiter.busy(self._clock(), self._rng.random())
            self._outage.busy(self._clock())
            self._roster.cap_moved(server, cap)
            return
        server.limiter.failed()
        if isinstance(error, RequestRefused | BrokenResponse):
            server.health.answered()  # it is alive, whatever it said
        elif server.health.failed(is_there=not isinstance(error, ServerUnreachable)):
            self._roster.eject(server, error)

    def _since(self, started: float) -> float:
        return round(self._clock() - started, 4)


@asynccontextmanager
async def open_fleet(
    section: FleetSection,
    on_gone: Callable[[], None],
    environ: Mapping[str, str] = os.environ,
    connect: Connect | None = None,
    rng: Random | None = None,
) -> AsyncIterator[Fleet]:
    """A fleet of the servers in `section`; what it still has under way at the end is aborted.

    Args:
        section: The section of the configuration.
        on_gone: Called when no server was usable for `fleet.give_up_s`.
        environ: Holds the servers' keys.
        connect: Opens what carries requests to a server; None is HTTP.
        rng: For jitter; a seeded one makes a simulation repeatable.

    Raises:
        ConfigError: There is no server, or what stands for one is no URL.
    """
    discovery = Discovery(section, environ)
    first = await discovery.first()
    connect = connect or await _http(section, environ)
    rng = rng or Random()
    outage = Outage(section, on_gone)
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(background())
        roster = Membership(section, connect, tasks, outage, rng)
        await stack.enter_async_context(open_membership(roster, first))
        fleet = Fleet(section, discovery, roster, outage, tasks, rng)
        try:
            yield fleet
        finally:
            outage.some_in()
            await tasks.close()  # before the connections: aborts still need theirs


async def _http(section: FleetSection, environ: Mapping[str, str]) -> Connect:
    tls = await asyncio.to_thread(tls_context, section)

    @asynccontextmanager
    async def connect(spec: ServerSpec) -> AsyncIterator[Transport]:
        async with http_transport(
            spec.url,
            headers_of(spec, environ),
            tls=tls,
            connect_timeout_s=section.connect_timeout_s,
            server_name=spec.server_name,
        ) as transport:
            yield transport

    return connect


async def _abort(server: Server, rid: str) -> None:
    try:
        await server.client.abort(rid)
    except ServerError as error:
        log.debug("fleet.abort_failed", server=server.url, rid=rid, error=str(error))
