"""The fleet: many servers used as one. Each request goes to a server, and elsewhere if it fails there."""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
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
    RateLimited,
    RequestRefused,
    ServerBusy,
    ServerError,
    ServerTimeout,
    ServerUnavailable,
    ServerUnreachable,
    StoppedEarly,
)
from streamsyn.fleet import prefixes
from streamsyn.fleet.discovery import Discovery, PlacedServers
from streamsyn.fleet.health import Outage, RetryBudget
from streamsyn.fleet.hedging import Call, Hedging
from streamsyn.fleet.kv_pool import Footprint
from streamsyn.fleet.membership import NOTICE_S, Connect, Membership, connect_http, open_membership
from streamsyn.fleet.models import ModelWeights, listed
from streamsyn.fleet.server import Place, Server, Timings, Usage
from streamsyn.fleet.shares import Share, Shares
from streamsyn.fleet.try_outcomes import TryOutcomes
from streamsyn.io.process_files import within_sockets
from streamsyn.records import Attempt, Completion, Request
from streamsyn.telemetry import span

log = structlog.get_logger()

_MAX_CHECKED = 3
"""Servers of a model that are asked before a run."""
_CAPACITY_S = 0.8 * NOTICE_S
"""A run's part of a shared fleet holds for this long. Runs hear of changes later than that."""
_REFUSED_WITHIN_S = 3.0
"""A request that has not been refused within this time is accepted."""


class Fleet:
    """The servers of a run. Made by `open_fleet`.

    Each try has a rid of its own, all of the same length: a server refuses a rid that it still has, and an
    abort applies to every request whose rid starts with the given one.
    """

    def __init__(
        self,
        section: FleetSection,
        agree: Callable[[FleetSection], Awaitable[list[str]]],
        membership: Membership,
        outage: Outage,
        tasks: Background,
        rng: Random,
        shares: Shares,
        share: Share,
    ) -> None:
        self._section = section
        self._agree = agree
        self._membership = membership
        self._outage = outage
        self._tasks = tasks
        self._rng = rng
        self._shares = shares
        self._share = share
        self._outcomes = TryOutcomes(membership, outage, rng, lambda: self.capacity)
        self._models: list[str] = []
        self._capacity = 0
        self._capacity_until = 0.0
        self._model_weights = ModelWeights({"": 1.0})
        self._hedging = Hedging(section.hedge_tail, membership.placement, tasks)
        self._clock = asyncio.get_running_loop().time
        self._run_rid = secrets.token_hex(6)
        self._requests = count()
        self._draining = asyncio.Event()

    @property
    def servers(self) -> list[Server]:
        """All servers, usable or not."""
        return self._membership.servers

    @property
    def models(self) -> list[str]:
        """The models in use; set by `ask_models`."""
        return self._models

    @property
    def is_shared(self) -> bool:
        """Whether other runs may use the same servers."""
        return self._membership.is_shared

    @property
    def capacity(self) -> int:
        """Maximum requests in flight at all servers together; of a shared fleet, this run's part of it."""
        now = self._clock()
        if not self.is_shared or now >= self._capacity_until:
            self._capacity = self._shares.capacity(self._share, sum(server.cap for server in self.servers))
            self._capacity_until = now + _CAPACITY_S
        return self._capacity

    @property
    def gives_up_in_s(self) -> float | None:
        """Seconds until the fleet is given up for want of a usable server; None while one is usable."""
        return self._outage.gives_up_in_s(self._clock())

    @property
    def limited(self) -> int:
        """Requests with rate limits of their own, which wait without a place; at most `capacity` counts."""
        return min(self._outcomes.limited, self.capacity)

    @property
    def in_flight(self) -> dict[str, int]:
        """Requests of this run in flight, by server."""
        at = self._share.in_flight_at
        return {server.url: at.get(server.url, 0) for server in self.servers}

    @property
    def moves(self) -> int:
        """How often a prefix group changed its server."""
        return self._membership.placement.moves

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics of each server; counters include those of removed servers with the same URL.

        Of shared servers, requests in flight and counters are those of this run.
        """
        found = {server.url: server.metrics() for server in list(self.servers)}
        removed: dict[str, Mapping[str, int]] = dict(self._membership.removed_counts)
        if self.is_shared:
            removed = {url: usage.counts() for url, usage in list(self._outcomes.usage.items())}
            for url, in_flight in self.in_flight.items():
                found[url] |= Usage().counts() | {"in_flight": in_flight}
        for url, counts in removed.items():
            metrics = found.setdefault(url, {"server": url, "in_flight": 0, "cap": 0, "queued": 0})
            for name, number in counts.items():
                metrics[name] = metrics.get(name, 0) + number
        return list(found.values())

    @property
    def timings(self) -> Timings:
        """How long this run's requests took."""
        return self._outcomes.timings

    def on_room(self, call: Callable[[], None]) -> None:
        """Call `call` whenever more requests may be in flight than before."""
        self._membership.on_room.pop(self._outcomes.on_room, None)
        self._outcomes.on_room = call
        self._membership.on_room[call] = None

    def know_left(self, not_begun: Callable[[], float]) -> None:
        """Have `not_begun` return how many drafts no worker has taken: a small job need not be spread."""
        self._share.not_begun = not_begun

    async def ask_models(self) -> None:
        """Wait for a healthy server and agree on the models.

        Raises:
            ConfigError: Servers serve different models, or not those of the configuration.
            FleetGone: No server was healthy within `fleet.give_up_s`; never for a shared fleet.
        """
        self._models = await self._agree(self._section)
        self._model_weights = ModelWeights(self._section.models or dict.fromkeys(self.models, 1.0))

    async def check_scores(self, model: str) -> None:
        """Check that the usable servers of `model` can score; a server that does not answer now is accepted.

        Raises:
            ConfigError: A server cannot score.
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
            for server in self._usable(model):
                group.create_task(check(server), name=f"check-{server.url}")
        if refused:
            raise ConfigError(min(refused))

    async def check_accepted(self, requests: Sequence[Request], model: str) -> Completion | None:
        """Check that the servers of `model` accept one of `requests`, outside the run's own requests.

        A server refuses a request at once, so an answer that takes longer than a few seconds is not awaited.

        Returns:
            The answer, if it came.

        Raises:
            ConfigError: All servers that were asked refused all requests.
        """
        usable = self._usable(model)
        asked = [(server, request) for request in requests[:1] for server in usable[:_MAX_CHECKED]]
        asked += [(server, request) for request in requests[1:] for server in usable[:1]]
        refused: list[str] = []
        for server, request in asked:
            rid, started = f"{self._run_rid}-{next(self._requests):012x}", self._clock()
            try:
                async with asyncio.timeout(_REFUSED_WITHIN_S):
                    return await server.client.complete(request, model, rid)
            except TimeoutError:
                self._abort(server, rid)
                self._outcomes.unfinished(server, self._since(started))
                return None
            except RequestRefused as error:
                refused.append(str(error))
            except RateLimited as error:  # the run's own requests wait, too
                budget = RetryBudget(self._section, self._rng)
                self._outcomes.rate_limited(server, error, budget)
                return None
            except ServerError as error:  # down, busy or broken: no mistake of the configuration
                log.info("fleet.acceptance_unknown", server=server.url, error=str(error))
                return None
        if refused:
            raise ConfigError(refused[0])
        return None

    async def context_tokens(self, model: str) -> int | None:
        """Return the smallest context length that servers of `model` report; None if none does."""
        found: list[int] = []
        for server in self._usable(model)[:_MAX_CHECKED]:
            try:
                length = await server.client.context_tokens(model)
            except (ServerError, ConfigError) as error:
                log.debug("fleet.context_length_unknown", server=server.url, error=str(error))
            else:
                found += [] if length is None else [length]
        return min(found, default=None)

    def _usable(self, model: str) -> list[Server]:
        return [server for server in self.servers if model in server.models and server.is_usable]

    def model_of(self, key: bytes) -> str:
        """Return the model that writes the draft with this key; the same one in every run."""
        return self._model_weights.model_of(key)

    async def complete(
        self, request: Request, attempts: list[Attempt], model: str | None = None
    ) -> Completion:
        """Return the answer to `request`, after retries if need be.

        Args:
            request: The request.
            attempts: Each try is appended to it, full queues and rate limits aside.
            model: The model to use where the request names none; may be None if there is only one.

        Raises:
            ServerError: The last failure: the request was refused, or its retry budget is used up, or no
                server serves its model.
            StoppedEarly: The run is draining, and no server has a free place.
        """
        model = request.model or model or self._models[0]
        if not self._membership.may_serve(model):
            raise RequestRefused(f"no server serves {model}; served: {listed(self._membership.served)}")
        budget = RetryBudget(self._section, self._rng)
        try:
            return await self._complete(request, attempts, model, budget)
        finally:
            self._outcomes.limited -= budget.has_own_limit

    async def _complete(
        self, request: Request, attempts: list[Attempt], model: str, budget: RetryBudget
    ) -> Completion:
        placement = self._membership.placement
        footprint = Footprint.of(request)
        failed_at: Server | None = None

        async def send(to: Place) -> Completion:
            own = request if to is place else replace(request, group="", prefixes=())
            return await self._ask(to, own, footprint, budget)

        while True:
            asked = self._clock()
            place = await placement.acquire(footprint, failed_at, model, self._share)
            at, started = time.time(), self._clock()
            self._outcomes.waited(place.server, started - asked)
            try:
                if self._hedging.is_on and request.scored is None:
                    call = Call(footprint, place, send, started)
                    completion = await self._hedging.ask(call)
                    if call.failure is not None:
                        attempts.append(_failed(place.server.url, at, *call.failure))
                else:
                    completion = await send(place)
            except ServerError as error:
                failure, failed_at = error, place.server
            else:
                took = self._since(started)
                attempts.append(Attempt(completion.server, at, took, None, completion.completion_tokens))
                return completion
            finally:
                placement.release(place)
            took, url = self._since(started), place.server.url
            if not isinstance(failure, ServerBusy):  # not a try, and there may be thousands
                attempts.append(_failed(url, at, failure, took))
            pause_s = budget.pause_after(failure, took)
            if pause_s is None:
                if isinstance(failure, RateLimited):
                    attempts.append(_failed(url, at, failure, took))
                raise failure
            await self._pause(pause_s, failure)

    async def _pause(self, seconds: float, failure: ServerError) -> None:
        """Wait between two tries; a drain ends the wait of a request that no server has accepted.

        Raises:
            StoppedEarly: The run is draining, and `failure` is a rate limit.
        """
        if not isinstance(failure, RateLimited):
            await asyncio.sleep(seconds)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._draining.wait()
        if self._draining.is_set():
            raise StoppedEarly(f"the run is draining: {failure}")

    def drain(self) -> None:
        """Fail requests that wait for a place with StoppedEarly, now and from now on."""
        self._draining.set()
        self._membership.placement.drain(self._share)

    def tail(self, busy: int, workers: int) -> None:
        """Record that there is no new work, and that `busy` of `workers` workers are still busy."""
        if self._draining.is_set():
            return  # nothing new is sent
        self._hedging.tail(busy, workers)

    async def _ask(
        self, place: Place, request: Request, footprint: Footprint, budget: RetryBudget
    ) -> Completion:
        """Make one try at one server, and update the server's state by its outcome."""
        server, rank, started = place.server, place.rank, self._clock()
        text = prefixes.conversation_text(request)
        keys = prefixes.block_keys(text)
        scored = request.scored
        whole = text if scored is None else prefixes.with_answer(text, scored)
        planned = rank.prefixes.cached_share(whole, keys)

        rid = f"{self._run_rid}-{next(self._requests):012x}"
        self._outage.sent(rid, started)
        try:
            attributes = {
                "server.address": server.url,
                "gen_ai.request.model": place.model,
                "rid": rid,
                "prefix.group": request.group,
            }
            with span("request", attributes) as opened:

                def first_token() -> None:
                    seconds = self._since(started)
                    opened.set({"gen_ai.server.time_to_first_token": seconds})
                    self._outcomes.began(server, seconds)
                    rank.prefixes.add(keys)
                    self._membership.placement.warmed(place)

                on_first = first_token if place.leads else None
                completion = await server.client.complete(request, place.model, rid, on_first, rank.routed)
                opened.set(_usage_of(completion, planned))
        except (ServerError, asyncio.CancelledError) as error:
            if isinstance(error, ServerTimeout | asyncio.CancelledError):
                self._abort(server, rid)
            if isinstance(error, ServerError):
                self._outcomes.failed(server, error, budget)
            if scored is None and _was_begun(error):
                self._outcomes.unfinished(server, self._since(started))
            raise
        finally:
            self._outage.done(rid)
        if place.leads:
            self._membership.placement.warmed(place)
        if request.group and scored is None:  # the conversation may continue
            keys = prefixes.block_keys(prefixes.with_answer(text, completion.text), keys)
        rank.prefixes.add(keys)
        self._membership.placement.use_ranks(server)  # it may have refused to take any
        server.limiter.learn(footprint, completion)
        self._outcomes.answered(server, completion, planned, self._since(started), generated=scored is None)
        if completion.weight_version is None and server.weight_version is not None:
            completion = replace(completion, weight_version=await server.current_weights())
        return completion

    def _abort(self, server: Server, rid: str) -> None:
        """Abort a request: a server continues one whose client has disconnected, for seconds at least.

        It needs the whole rid: with one tokenizer worker, the default, a prefix has no effect.
        """
        if task := self._tasks.start(server.abort(rid), name=f"abort-{rid}", finish=True):
            server.aborts.add(task)
            task.add_done_callback(server.aborts.discard)

    def _since(self, started: float) -> float:
        return round(self._clock() - started, 4)


@asynccontextmanager
async def open_fleet(
    section: FleetSection,
    on_gone: Callable[[str], None],
    environ: Mapping[str, str] = os.environ,
    connect: Connect | None = None,
    rng: Random | None = None,
    max_sockets: int | None = None,
    placed: PlacedServers | None = None,
) -> AsyncIterator[Fleet]:
    """Open a fleet of the servers in `section`; requests still in flight at the end are aborted.

    Args:
        section: The `fleet` section of the configuration.
        on_gone: Called with the reason when no server was usable for `fleet.give_up_s`.
        environ: Holds the servers' keys.
        connect: Opens a transport to a server; None uses HTTP.
        rng: For jitter; a seeded one makes a simulation repeatable.
        max_sockets: Connections that this process can open to all servers together; None for any number.
        placed: Servers that are placed while they are used, beside those of `section`.

    Raises:
        ConfigError: There is no server, or a URL, file or key is invalid.
    """
    discovery = Discovery(section, environ, placed=placed)
    first = await discovery.first()
    if max_sockets is not None:
        section = within_sockets(max_sockets, section, len(first))
    connect = connect or await connect_http(section, environ)
    rng = rng or Random()
    outage = Outage(section, on_gone)
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(background())
        membership = Membership(section, connect, tasks, outage, rng)
        await stack.enter_async_context(open_membership(membership, first))
        if placed is not None:
            placed.demand = membership.demand

        async def agree(_: FleetSection) -> list[str]:
            tasks.start(discovery.watch(membership.apply), name="discovery")
            return await membership.agree_on_models()

        shares = Shares()
        membership.left = shares.left
        fleet = Fleet(section, agree, membership, outage, tasks, rng, shares, shares.open())
        try:
            yield fleet
        finally:
            outage.close()
            await tasks.close()  # before the connections, which aborts still need


def _usage_of(completion: Completion, planned: float) -> dict[str, int]:
    """Return the tokens of an answer as attributes of its span.

    Args:
        completion: The answer.
        planned: Part of its prompt that should have been in the prefix cache, 0 to 1.
    """
    return {
        "gen_ai.usage.input_tokens": completion.prompt_tokens,
        "gen_ai.usage.output_tokens": completion.completion_tokens,
        "gen_ai.usage.cached_tokens": completion.cached_tokens,
        "gen_ai.usage.planned_cached_tokens": round(planned * completion.prompt_tokens),
        "gen_ai.usage.cached_host_tokens": completion.cached_host_tokens,
        "gen_ai.usage.cached_storage_tokens": completion.cached_storage_tokens,
    }


def _was_begun(error: BaseException) -> bool:
    """Whether the server may have written a part of an answer."""
    begun = (BrokenResponse, ServerUnavailable, ServerTimeout, asyncio.CancelledError)
    return isinstance(error, begun) and not isinstance(error, ServerUnreachable)


def _failed(url: str, at: float, error: ServerError, seconds: float) -> Attempt:
    return Attempt(url, at, seconds, f"{type(error).__name__}: {error}", error.completion_tokens)
