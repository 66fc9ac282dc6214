"""The fleet: every request ends, whatever happens to the servers, and nothing is left running."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from streamsyn.config.sections import FleetSection
from streamsyn.errors import (
    BrokenResponse,
    ConfigError,
    FleetGone,
    RequestRefused,
    ServerError,
    ServerTimeout,
    ServerUnavailable,
    StoppedEarly,
    root_cause,
)
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.records import Attempt, Completion, Request
from streamsyn.simulator.app import RunningSimulator, running
from streamsyn.simulator.settings import BAD_CONTENT, Fault, Script, SimulatorConfig

pytestmark = pytest.mark.usefixtures("no_task_left")

REQUEST = Request([{"role": "user", "content": "About geese."}], {})
QUICK: dict[str, Any] = {
    "probe_interval_s": 0.02,
    "backoff_base_s": 0.005,
    "backoff_max_s": 0.02,
    "give_up_s": 10.0,
    "request_timeout_s": 5.0,
    "slow_start_s": 0.001,
}


@asynccontextmanager
async def opened(
    *urls: str, on_gone: Callable[[str], None] = lambda _: None, key: str | None = None, **section: Any
) -> AsyncIterator[Fleet]:
    """A fleet that has not asked for models yet; times are short."""
    settings = FleetSection(servers=urls, **QUICK | section)
    environ = {} if key is None else {"STREAMSYN_API_KEY": key}
    async with asyncio.timeout(20), open_fleet(settings, on_gone, environ) as fleet:
        yield fleet


@asynccontextmanager
async def fleet_of(*urls: str, **options: Any) -> AsyncIterator[Fleet]:
    """A fleet that is ready."""
    async with opened(*urls, **options) as fleet:
        await fleet.ask_models()
        yield fleet


class Simulators:
    """Simulators that may be stopped, and started again where they were."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._running: dict[str, AsyncExitStack] = {}

    async def start(self, script: Script = (), port: int = 0, **config: Any) -> RunningSimulator:
        """One more."""
        own = await self._stack.enter_async_context(AsyncExitStack())
        server = await own.enter_async_context(running(SimulatorConfig(**config), port=port, script=script))
        self._running[server.url] = own
        return server

    async def stop(self, url: str) -> int:
        """From now on connections to it are refused; its port."""
        await self._running.pop(url).aclose()
        return int(url.rpartition(":")[2])


@asynccontextmanager
async def simulators() -> AsyncIterator[Simulators]:
    """Simulators that end with the block."""
    async with asyncio.timeout(20), AsyncExitStack() as stack:
        yield Simulators(stack)


async def until(condition: Callable[[], object]) -> None:
    """Return when `condition` holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0)


async def ask(fleet: Fleet, attempts: list[Attempt] | None = None) -> Completion:
    """One request."""
    return await fleet.complete(REQUEST, attempts if attempts is not None else [])


async def ask_many(fleet: Fleet, number: int) -> list[Completion]:
    """So many requests at once."""
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(ask(fleet)) for _ in range(number)]
    return [task.result() for task in asked]


class Rids:
    """The rids of requests to write, and of aborts, as a simulator sees them."""

    def __init__(self, stalled: int) -> None:
        self.asked: list[str] = []
        self.aborted: list[str] = []
        self._stalled = stalled

    def script(self, number: int, body: dict[str, Any]) -> Fault | None:
        """Stalls the first requests and notes the rid of each."""
        self.asked.append(body["rid"])
        return Fault.STALL if number <= self._stalled else None

    def listen_to(self, server: RunningSimulator) -> None:
        """Note aborts that come to `server`."""
        engine, abort = server.simulation.engine, server.simulation.engine.abort

        def noted(rid: str, *, exact: bool) -> int:
            self.aborted.append(rid)
            return abort(rid, exact=exact)

        engine.abort = noted  # type: ignore[method-assign]


HARMFUL = sorted(set(Fault) - BAD_CONTENT - {Fault.REFUSE, Fault.PAUSE})
"""All that a request survives; a pause takes 3 s, and is tested in virtual time."""


@pytest.mark.parametrize("fault", HARMFUL)
async def test_a_request_survives(fault: Fault) -> None:
    """After any fault at each server the request is answered, and its tries are recorded."""
    attempts: list[Attempt] = []
    async with simulators() as simulated:
        servers = [await simulated.start([fault, fault]) for _ in range(2)]
        urls = [server.url for server in servers]
        async with fleet_of(*urls, request_timeout_s=0.3 if fault is Fault.STALL else 5.0) as fleet:
            completion = await ask(fleet, attempts)
    *failed, last = attempts
    assert (None, completion.server, completion.completion_tokens) == (
        last.error,
        last.server,
        last.completion_tokens,
    )
    assert (fault in (Fault.QUEUE_FULL, Fault.RATE_LIMIT)) is not bool(failed)
    assert all(attempt.error and attempt.server in urls and attempt.seconds >= 0 for attempt in failed)
    assert all(one.server != other.server for one, other in zip(failed, attempts[1:], strict=True))


async def test_a_mix_of_faults() -> None:
    """With three servers that fail every other request, all requests are answered."""
    rates = dict.fromkeys(("http_500", "reset", "cut_body", "bad_json", "error_in_200", "aborted"), 0.08)
    async with simulators() as simulated:
        urls = [(await simulated.start(faults=rates, seed=seed)).url for seed in range(3)]
        async with fleet_of(*urls, max_attempts=40, max_in_flight=8) as fleet:
            assert 120 == len(await ask_many(fleet, 120))


async def test_one_of_two_dies_and_comes_back() -> None:
    """The other answers everything; the dead one is ejected, probed, readmitted, and gets its share again."""
    async with simulators() as simulated:
        dying, other = await simulated.start(), await simulated.start()
        async with fleet_of(dying.url, other.url, max_in_flight=4) as fleet:
            await ask_many(fleet, 8)
            port = await simulated.stop(dying.url)
            answers = await ask_many(fleet, 30)
            assert {other.url} == {answer.server for answer in answers}
            assert [True, False] == [server.health.ejected for server in fleet.servers]
            back = await simulated.start(port=port)
            await until(lambda: not fleet.servers[0].health.ejected)
            await ask_many(fleet, 30)
            assert 10 <= back.simulation.stats.answered <= 20


async def test_a_server_that_dies_with_requests_in_flight() -> None:
    """They are retried at the other server."""
    async with simulators() as simulated:
        dying, other = await simulated.start(die_after=3, latency_ms=10_000), await simulated.start()
        async with fleet_of(dying.url, other.url, max_in_flight=50) as fleet:
            answers = await ask_many(fleet, 40)
    assert {other.url} == {answer.server for answer in answers}


@pytest.mark.parametrize("prefixes", [(), ("shared",)], ids=["whole", "streamed"])
async def test_a_server_that_dies_in_the_middle_of_an_answer(prefixes: tuple[str, ...]) -> None:
    """It counts as unavailable, and is ejected."""
    async with simulators() as simulated:
        dying, other = await simulated.start([Fault.CUT_BODY]), await simulated.start()
        attempts: list[Attempt] = []
        async with fleet_of(dying.url, other.url, eject_after=1) as fleet:
            await fleet.complete(Request(REQUEST.messages, {}, prefixes=prefixes), attempts)
            assert [1, 0] == [server.health.ejections for server in fleet.servers]
            assert [1, 0] == [metrics["unfinished"] for metrics in fleet.metrics()]
    errors = [str(attempt.error).partition(":")[0] for attempt in attempts if attempt.error]
    assert ["ServerUnavailable"] == errors


async def test_a_full_queue_is_waited_for() -> None:
    """It costs no try: with one try allowed, all are answered without a recorded failure."""
    async with simulators() as simulated:
        server = await simulated.start(slots=1, queue_limit=1, latency_ms=10)
        tries: list[list[Attempt]] = [[] for _ in range(8)]
        async with fleet_of(server.url, max_attempts=1) as fleet, asyncio.TaskGroup() as group:
            for attempts in tries:
                group.create_task(ask(fleet, attempts))
        assert server.simulation.stats.requests > 8
    assert [1] * 8 == [len(attempts) for attempts in tries]
    assert not fleet.servers[0].health.failures


async def test_queues_that_stay_full_are_not_waited_for_for_ever() -> None:
    """If no request was accepted for longer than one may take, the run gives up."""
    gone = asyncio.Event()
    async with simulators() as simulated:
        server = await simulated.start(faults={Fault.QUEUE_FULL: 1.0})
        async with (
            fleet_of(server.url, on_gone=lambda _: gone.set(), give_up_s=1.0, request_timeout_s=0.2) as fleet,
            asyncio.TaskGroup() as group,
        ):
            asked = group.create_task(ask(fleet))
            async with asyncio.timeout(10):
                await gone.wait()
            asked.cancel()


async def test_a_drain_ends_all_waits() -> None:
    """Waiting requests fail at once; requests in flight are answered."""
    async with simulators() as simulated:
        server = await simulated.start(latency_ms=200)
        async with fleet_of(server.url, max_in_flight=1) as fleet, asyncio.TaskGroup() as group:
            in_flight = group.create_task(ask(fleet))
            await until(lambda: fleet.servers[0].limiter.in_flight)
            waiting = group.create_task(_stopped(fleet))
            await until(fleet._membership.placement.waiting)
            fleet.drain()
            assert await waiting
            assert await _stopped(fleet)
            assert (await in_flight).text


async def _stopped(fleet: Fleet) -> bool:
    try:
        await ask(fleet)
    except StoppedEarly:
        return True
    return False


async def test_a_key_that_no_header_can_hold() -> None:
    """ConfigError is raised before anything is sent."""
    with pytest.raises(ConfigError, match="STREAMSYN_API_KEY"):
        async with open_fleet(
            FleetSection(servers=("http://one:1",)), lambda _: None, {"STREAMSYN_API_KEY": "a\nb"}
        ):
            pass


async def test_a_refused_request_is_tried_once() -> None:
    """It is not sent to another server, and the server stays in use."""
    attempts: list[Attempt] = []
    async with simulators() as simulated:
        servers = [await simulated.start([Fault.REFUSE]) for _ in range(2)]
        async with fleet_of(*(server.url for server in servers), eject_after=1) as fleet:
            with pytest.raises(RequestRefused, match="The simulator refuses this request"):
                await ask(fleet, attempts)
            assert not any(server.health.ejected for server in fleet.servers)
        assert 1 == sum(server.simulation.stats.requests for server in servers)
    assert ["RequestRefused"] == [str(attempt.error).partition(":")[0] for attempt in attempts]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault.HTTP_500, ServerUnavailable),
        (Fault.BAD_JSON, BrokenResponse),
        (Fault.STALL, ServerTimeout),
        (Fault.RESET, ServerUnavailable),
    ],
)
async def test_tries_come_to_an_end(fault: Fault, kind: type[ServerError]) -> None:
    """After `fleet.max_attempts` the last failure is raised, and each try is recorded."""
    attempts: list[Attempt] = []
    timeout_s = 0.05 if fault is Fault.STALL else 5.0
    async with simulators() as simulated:
        server = await simulated.start(lambda _, __: fault)
        async with fleet_of(server.url, max_attempts=3, request_timeout_s=timeout_s, eject_after=2) as fleet:
            with pytest.raises(ServerError) as raised:
                await ask(fleet, attempts)
    assert kind is type(raised.value)
    assert [kind.__name__] * 3 == [str(attempt.error).partition(":")[0] for attempt in attempts]


async def test_a_broken_answer_does_not_eject() -> None:
    """A server that sends invalid answers is alive, so it is not ejected."""
    async with simulators() as simulated:
        server = await simulated.start([Fault.BAD_JSON, Fault.ABORTED])
        async with fleet_of(server.url, eject_after=1) as fleet:
            await ask(fleet)
            assert 1 == server.simulation.stats.by_route["/v1/models"]  # no probe
            assert 3 == server.simulation.stats.requests


async def test_a_timeout_aborts_at_the_server() -> None:
    """The abort names the rid of that try; all rids have one length, so it matches one request only."""
    rids = Rids(stalled=2)
    async with simulators() as simulated:
        server = await simulated.start(rids.script)
        rids.listen_to(server)
        async with fleet_of(server.url, request_timeout_s=0.5) as fleet:
            answer = await ask(fleet)
            metrics = fleet.metrics()[0]
        # Two tries of half a second, at the rate of the whole answer, which took much less.
        assert 2 == metrics["unfinished"]
        assert answer.completion_tokens < metrics["unfinished_tokens"]
        assert 0 == server.simulation.stats.in_flight
    assert rids.asked[:2] == rids.aborted
    assert 3 == len(set(rids.asked))
    assert 1 == len({len(rid) for rid in rids.asked})


async def test_a_cancelled_request_is_aborted_at_the_server() -> None:
    """A cancelled request must not go on running at its server."""
    rids = Rids(stalled=1)
    async with simulators() as simulated:
        server = await simulated.start(rids.script)
        rids.listen_to(server)
        async with fleet_of(server.url) as fleet, asyncio.TaskGroup() as group:
            asked = group.create_task(ask(fleet))
            await until(lambda: rids.asked)
            asked.cancel()
        assert asked.cancelled()
        assert {server.url: 0} == fleet.in_flight
        assert 1 == fleet.metrics()[0]["unfinished"]
    assert rids.asked == rids.aborted


class Stop(Exception):
    """Raised by a test to leave a block."""


async def test_what_is_in_flight_is_aborted_when_the_fleet_closes_early() -> None:
    """Aborts are sent before the connections close, also after an error."""
    rids = Rids(stalled=9)
    async with simulators() as simulated:
        server = await simulated.start(rids.script)
        rids.listen_to(server)

        async def block() -> None:
            async with fleet_of(server.url) as fleet, asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(ask(fleet))
                await until(lambda: len(rids.asked) == 3)
                raise Stop

        with pytest.raises(BaseExceptionGroup) as raised:
            await block()
    assert isinstance(root_cause(raised.value), Stop)
    assert sorted(rids.asked) == sorted(rids.aborted)


async def test_a_fleet_that_is_gone() -> None:
    """`on_gone` is called after `fleet.give_up_s`; the request still waits and is not rejected."""
    gone = asyncio.Event()
    async with simulators() as simulated:
        servers = [await simulated.start() for _ in range(2)]
        async with (
            fleet_of(
                *(server.url for server in servers), on_gone=lambda _: gone.set(), give_up_s=1.0
            ) as fleet,
            asyncio.TaskGroup() as group,
        ):
            for server in servers:
                await simulated.stop(server.url)
            asked = group.create_task(ask(fleet))
            async with asyncio.timeout(5):
                await gone.wait()
            assert not asked.done()
            asked.cancel()


async def test_a_fleet_that_comes_back_in_time() -> None:
    """A request survives the outage with one try allowed: an unreachable server costs none."""
    calls: list[str] = []
    attempts: list[Attempt] = []
    async with simulators() as simulated:
        server = await simulated.start()
        async with (
            fleet_of(server.url, on_gone=lambda _: calls.append("gone"), max_attempts=1) as fleet,
            asyncio.TaskGroup() as group,
        ):
            port = await simulated.stop(server.url)
            asked = group.create_task(ask(fleet, attempts))
            await until(lambda: fleet.servers[0].health.ejected)
            timers = [fleet._outage._timer]
            await simulated.start(port=port)
            assert (await asked).text
            timers.append(fleet._outage._timer)
    assert [True, False] == [timer is not None for timer in timers]
    assert [] == calls
    assert [True, False] == [attempt.error is not None for attempt in attempts]


async def test_a_server_that_comes_back_with_another_model_stays_out() -> None:
    """Contexts of two models must not be mixed in one run."""
    async with simulators() as simulated:
        changed, other = await simulated.start(model="small"), await simulated.start(model="small")
        async with fleet_of(changed.url, other.url) as fleet:
            port = await simulated.stop(changed.url)
            await ask_many(fleet, 10)
            back = await simulated.start(port=port, model="large")
            await until(lambda: back.simulation.stats.by_route["/v1/models"] > 1)
            await ask_many(fleet, 10)
            assert fleet.servers[0].health.ejected
            assert 0 == back.simulation.stats.requests


async def test_the_model_that_all_serve() -> None:
    """It need not be configured."""
    async with simulators() as simulated:
        urls = [(await simulated.start(model="small")).url for _ in range(3)]
        async with fleet_of(*urls) as fleet:
            assert ["small"] == fleet.models
            assert "small" == (await ask(fleet)).model


async def test_servers_that_disagree() -> None:
    """The message names both models and where they are."""
    async with simulators() as simulated:
        small, large = await simulated.start(model="small"), await simulated.start(model="large")
        async with opened(small.url, large.url) as fleet:
            with pytest.raises(ConfigError) as raised:
                await fleet.ask_models()
    assert f"{small.url} serves small" in str(raised.value)
    assert f"{large.url} serves large" in str(raised.value)


async def test_a_model_that_is_not_served() -> None:
    """The message names the key, the server and its models; a served model is accepted."""
    async with simulators() as simulated:
        server = await simulated.start(model="small")
        async with opened(server.url, model="large") as fleet:
            with pytest.raises(ConfigError, match=rf"fleet\.model: {server.url} serves small, not large"):
                await fleet.ask_models()
        async with fleet_of(server.url, model="small") as fleet:
            assert ["small"] == fleet.models


async def test_a_key_that_is_not_accepted() -> None:
    """It raises ConfigError at the start; with the key all works."""
    async with simulators() as simulated:
        server = await simulated.start(api_key="sesame")
        with pytest.raises(BaseExceptionGroup) as raised:
            async with fleet_of(server.url):
                pass
        cause = root_cause(raised.value)
        assert isinstance(cause, ConfigError)
        assert "STREAMSYN_API_KEY" in str(cause)
        async with fleet_of(server.url, key="sesame") as fleet:
            await ask(fleet)


async def test_no_healthy_server() -> None:
    """The start waits for a server for `fleet.give_up_s`."""
    async with simulators() as simulated:
        server = await simulated.start()
        await simulated.stop(server.url)
        async with opened(server.url, give_up_s=0.1) as fleet:
            with pytest.raises(FleetGone, match=rf"no healthy server within 0\.1 s: .*{server.url}"):
                await fleet.ask_models()


async def test_servers_that_come_up_late() -> None:
    """The start waits for the first one; a later one joins."""
    async with simulators() as simulated:
        ports = [await simulated.stop((await simulated.start()).url) for _ in range(2)]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        async with opened(*urls) as fleet, asyncio.TaskGroup() as group:
            asking = group.create_task(fleet.ask_models())
            await asyncio.sleep(0)
            await simulated.start(port=ports[0])
            await asking
            assert {urls[0]} == {answer.server for answer in await ask_many(fleet, 4)}
            late = await simulated.start(port=ports[1])
            await until(lambda: not fleet.servers[1].health.ejected)
            await ask_many(fleet, 8)
            assert late.simulation.stats.answered >= 3


async def test_the_cap_of_each_server_is_kept() -> None:
    """Requests in flight reach the cap and never exceed it; all servers get the same share."""
    async with simulators() as simulated:
        servers = [await simulated.start(latency_ms=30) for _ in range(3)]
        async with fleet_of(*(server.url for server in servers), max_in_flight=4) as fleet:
            assert 12 == fleet.capacity
            await ask_many(fleet, 90)
            assert {server.url: 0 for server in servers} == fleet.in_flight
        assert 4 == max(server.simulation.stats.max_in_flight for server in servers)
        assert all(24 <= server.simulation.stats.answered <= 36 for server in servers)


async def test_one_at_a_time_still_uses_all_servers() -> None:
    """With equal load, servers take turns."""
    async with simulators() as simulated:
        servers = [await simulated.start() for _ in range(3)]
        async with fleet_of(*(server.url for server in servers)) as fleet:
            for _ in range(9):
                await ask(fleet)
        assert [3, 3, 3] == [server.simulation.stats.answered for server in servers]


async def test_urls_as_people_write_them() -> None:
    """A trailing slash, a trailing /v1 and duplicates give one server."""
    async with opened("http://one:1/", "http://one:1/v1", "http://one:1", "https://two:2/v1/") as fleet:
        assert ["http://one:1", "https://two:2"] == [server.url for server in fleet.servers]


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        ((), "--server URL"),
        (("one:30000",), "one:30000 is not a valid URL"),
        (("http://",), "http:// is not a valid URL"),
        (("http://one two",), "http://one two is not a valid URL"),
    ],
)
async def test_no_usable_server_is_given(urls: tuple[str, ...], said: str) -> None:
    """The message says what is wrong, or what to do."""
    with pytest.raises(ConfigError, match=said):
        async with opened(*urls):
            pass


async def test_a_fleet_that_answers_probes_and_nothing_else_is_gone() -> None:
    """Servers that answer probes but fail each request end the run, and do not use up all seeds."""
    gone = asyncio.Event()
    async with simulators() as simulated:
        server = await simulated.start(faults={Fault.HTTP_500: 1.0})
        async with (
            fleet_of(server.url, on_gone=lambda _: gone.set(), give_up_s=1.0, max_attempts=1000) as fleet,
            asyncio.TaskGroup() as group,
        ):
            asked = group.create_task(ask(fleet))
            async with asyncio.timeout(10):
                await gone.wait()
            assert fleet.servers[0].health.ejections > 1
            asked.cancel()
