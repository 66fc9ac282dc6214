"""Many servers as one: asks, tries again elsewhere, ejects, probes, readmits."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from random import Random

import structlog

from streamsyn.background import Background, background
from streamsyn.config import FleetSection
from streamsyn.errors import (
    BrokenResponse,
    ConfigError,
    FleetGone,
    RequestRefused,
    ServerBusy,
    ServerError,
    ServerTimeout,
    ServerUnavailable,
    ServerUnreachable,
)
from streamsyn.records import Attempt, Completion, Request
from streamsyn.sglang.backoff import RetryBudget, full_jitter
from streamsyn.sglang.client import ServerClient, open_session
from streamsyn.sglang.health import Health
from streamsyn.sglang.limiter import Limiter
from streamsyn.sglang.placement import Placement
from streamsyn.sglang.server import Server

log = structlog.get_logger()


class Fleet:
    """The servers of a run. Made by `open_fleet`.

    Each try carries a rid of its own, all of one width: a server refuses a rid that it still has,
    and aborts every request whose rid begins with the one it is given.
    """

    def __init__(
        self,
        section: FleetSection,
        servers: Sequence[Server],
        tasks: Background,
        on_gone: Callable[[], None],
    ) -> None:
        self.servers = servers
        self.model = ""
        """What is asked for, once `ask_models` has found out."""
        self._section = section
        self._placement = Placement(servers)
        self._tasks = tasks
        self._on_gone = on_gone
        self._gone_timer: asyncio.TimerHandle | None = None
        self._busy_since: float | None = None
        self._gone_since: float | None = None
        self._draw = Random()
        self._run_rid = secrets.token_hex(6)
        self._requests = count()

    @property
    def capacity(self) -> int:
        """Requests that may be in flight at all servers together."""
        return sum(server.limiter.cap for server in self.servers)

    @property
    def in_flight(self) -> dict[str, int]:
        """Requests in flight, by server."""
        return {server.url: server.limiter.in_flight for server in self.servers}

    async def complete(self, request: Request, attempts: list[Attempt]) -> Completion:
        """The answer to `request`, from whichever server gives one. Adds each try to `attempts`.

        Raises:
            ServerError: The last failure, when the request was refused or its budget is used up.
            StoppedEarly: The run is draining, and no server has a place.
        """
        budget = RetryBudget(self._section, self._draw)
        failed_at: Server | None = None
        while True:
            server = await self._placement.acquire(avoid=failed_at)
            at, started = time.time(), time.monotonic()
            try:
                completion = await self._ask(server, request)
            except ServerError as error:
                failure, failed_at = error, server
                self._failed(server, error)
            else:
                self._answered(server, completion)
                tokens = completion.completion_tokens
                attempts.append(Attempt(server.url, at, _since(started), None, tokens))
                return completion
            finally:
                self._placement.release(server)
            if not isinstance(failure, ServerBusy):  # no try; there may be thousands
                said = f"{type(failure).__name__}: {failure}"
                attempts.append(Attempt(server.url, at, _since(started), said, failure.completion_tokens))
            pause_s = budget.pause_after(failure, _since(started))
            if pause_s is None:
                raise failure
            await asyncio.sleep(pause_s)

    async def ask_models(self) -> None:
        """Find out which model is served; waits for one server, the others are probed from now on.

        Raises:
            ConfigError: Servers serve different models, or not the one asked for.
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
        self.model = _agreed_model(served, self._section.model)
        for server in self.servers:
            if server.url not in served:
                server.health.ejected = True
                self._tasks.start(self._probe(server), name=f"probe-{server.url}")

    def drain(self) -> None:
        """From now on a request that finds no place at once fails with StoppedEarly."""
        self._placement.drain()

    def close(self) -> None:
        """Stop the timers."""
        self._placement.close()
        if self._gone_timer is not None:
            self._gone_timer.cancel()

    async def _ask(self, server: Server, request: Request) -> Completion:
        rid = f"{self._run_rid}-{next(self._requests):012x}"
        try:
            return await server.client.chat(request, self.model, rid)
        except (ServerTimeout, asyncio.CancelledError):
            # A server goes on with a request whose client has left, for seconds at the least.
            # By its whole rid: with one tokenizer worker, the default, a prefix of it aborts nothing.
            self._tasks.start(_abort(server, rid), name=f"abort-{rid}", finish=True)
            raise

    async def _ask_each(self, served: dict[str, list[str]], why: dict[str, str]) -> None:
        """Ask all servers what they serve; `why` takes what those say that are not up."""

        async def ask(server: Server) -> None:
            try:
                served[server.url] = await server.client.models()
            except ServerError as error:
                why[server.url] = str(error)

        async with asyncio.TaskGroup() as group:
            for server in self.servers:
                group.create_task(ask(server), name=f"ask-{server.url}")

    def _answered(self, server: Server, completion: Completion) -> None:
        self._busy_since = self._gone_since = None
        server.health.answered()
        server.limiter.answered()
        server.completions += 1
        server.completion_tokens += completion.completion_tokens

    def _failed(self, server: Server, error: ServerError) -> None:
        if isinstance(error, ServerBusy):
            server.health.answered()
            server.limiter.busy(time.monotonic(), self._draw.random())
            self._still_busy(time.monotonic())
        elif isinstance(error, RequestRefused | BrokenResponse):
            server.health.answered()  # it is alive, whatever it said
        elif server.health.failed(is_there=not isinstance(error, ServerUnreachable)):
            log.warning("fleet.ejected", server=server.url, error=str(error))
            self._tasks.start(self._probe(server), name=f"probe-{server.url}")
            if all(other.health.ejected for other in self.servers):
                self._all_ejected(asyncio.get_running_loop())

    def _all_ejected(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count the time from when it first was so since the last answer, whatever probes say."""
        if self._gone_since is None:
            self._gone_since = loop.time()
        self._gone_timer = loop.call_at(self._gone_since + self._section.give_up_s, self._on_gone)

    def _still_busy(self, now: float) -> None:
        """Queues that stay full are waited for, but not for ever.

        What a server has accepted is answered, or late, within `request_timeout_s`: when all are only
        busy for longer than that, nothing was accepted.
        """
        if self._busy_since is None:
            self._busy_since = now
        elif now - self._busy_since > max(self._section.give_up_s, self._section.request_timeout_s):
            self._on_gone()

    async def _probe(self, server: Server) -> None:
        """Ask an ejected server, ever less often, until it answers; then use it again."""
        if server.health.ejections > 1:  # the last time it answered probes only
            await asyncio.sleep(self._probe_pause(server.health.ejections))
        for step in count():
            try:
                models = await server.client.models()
                if self.model not in models:
                    raise ServerUnavailable(f"{server.url} serves {', '.join(models)}, not {self.model}")
            except (ServerError, ConfigError) as error:
                say = log.debug if step else log.info
                say("fleet.probe_failed", server=server.url, error=str(error))
                await asyncio.sleep(self._probe_pause(step))
            else:
                break
        server.health.readmit()
        log.info("fleet.readmitted", server=server.url)
        if self._gone_timer is not None:
            self._gone_timer.cancel()
            self._gone_timer = None
        self._placement.dispatch()

    def _probe_pause(self, step: int) -> float:
        interval_s = self._section.probe_interval_s
        return interval_s / 2 + full_jitter(interval_s, 10 * interval_s, step, self._draw)


@asynccontextmanager
async def open_fleet(
    section: FleetSection, api_key: str | None, on_gone: Callable[[], None]
) -> AsyncIterator[Fleet]:
    """A fleet of the servers in `section`; what it still has under way at the end is aborted.

    Args:
        section: The section of the configuration.
        api_key: Sent as a bearer token.
        on_gone: Called when no server was usable for `fleet.give_up_s`.

    Raises:
        ConfigError: There is no server, or what stands for one is no URL.
    """
    urls = _distinct(section.servers)
    if api_key is not None and not api_key.isprintable():
        raise ConfigError("STREAMSYN_API_KEY holds characters that no HTTP header can, such as a line end")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with AsyncExitStack() as stack:
        servers = []
        for url in urls:
            session = await stack.enter_async_context(open_session(headers))
            client = ServerClient(url, session, section.request_timeout_s, section.connect_timeout_s)
            servers.append(Server(client, Limiter(section.max_in_flight), Health(section.eject_after)))
        tasks = await stack.enter_async_context(background())
        fleet = Fleet(section, servers, tasks, on_gone)
        try:
            yield fleet
        finally:
            fleet.close()


async def _abort(server: Server, rid: str) -> None:
    try:
        await server.client.abort(rid)
    except ServerError as error:
        log.debug("fleet.abort_failed", server=server.url, rid=rid, error=str(error))


def check_urls(urls: Sequence[str]) -> None:
    """See that there are servers, named by URLs.

    Raises:
        ConfigError: There are none, or one is no URL.
    """
    if not urls:
        raise ConfigError(
            "no server: pass --server URL, set fleet.servers, or --launch MODEL to have one started"
        )
    for url in urls:
        host = url.removeprefix("https://").removeprefix("http://").split("/")[0]
        if not url.startswith(("http://", "https://")) or not host or not url.isprintable() or " " in url:
            raise ConfigError(f"fleet.servers: {url} is no URL; it starts with http:// or https://")


def _distinct(urls: Sequence[str]) -> list[str]:
    check_urls(urls)
    return list(dict.fromkeys(url.rstrip("/").removesuffix("/v1") for url in urls))


def _agreed_model(served: dict[str, list[str]], wanted: str | None) -> str:
    if wanted is not None:
        for url, models in served.items():
            if wanted not in models:
                raise ConfigError(f"fleet.model: {url} serves {', '.join(models)}, not {wanted}")
        return wanted
    first = {models[0]: url for url, models in served.items() if models}
    if len(first) != 1:
        found = ", ".join(f"{model} at {url}" for model, url in first.items()) or "none at all"
        raise ConfigError(f"the servers do not agree on a model ({found}); name one with fleet.model")
    return next(iter(first))


def _since(started: float) -> float:
    return round(time.monotonic() - started, 4)
