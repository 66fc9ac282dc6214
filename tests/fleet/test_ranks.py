"""Data-parallel ranks of a server: each has a prefix cache, so a group is at one of them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from streamsyn.config.sections import FleetSection
from streamsyn.fleet import wire
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.fleet.limiter import Limiter
from streamsyn.fleet.placement import Placement
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.transport import Reply, Transport
from streamsyn.records import Completion, Request
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import Fault, SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.virtual_time import run_virtually
from tests.builders import server_at
from tests.examples import in_turn
from tests.fleet.test_membership import ask_groups, request
from tests.fleet.test_placement import of, place, settle

URL = "http://one:1"


class Claiming:
    """A transport to a simulation whose `/server_info` says what it is told to."""

    def __init__(self, transport: Transport, info: dict[str, Any]) -> None:
        self._transport = transport
        self._info = info

    async def exchange(self, method: str, path: str, **given: Any) -> Reply:
        """See Transport."""
        if path == wire.SERVER_INFO:
            return Reply(200, orjson.dumps(self._info))
        return await self._transport.exchange(method, path, **given)


class Ranked:
    """One server with ranks, in virtual time; the ranks that requests named are in `named`.

    Args:
        claims: What `/server_info` says in place of the truth.
        fault: The fault of a request, by its number.
        config: The server's.
    """

    def __init__(
        self,
        claims: dict[str, Any] | None = None,
        fault: Callable[[int], Fault | None] = lambda _: None,
        **config: Any,
    ) -> None:
        self.named: list[int | None] = []
        self._claims = claims

        def note(number: int, body: dict[str, Any]) -> Fault | None:
            self.named.append(body.get("routed_dp_rank"))
            return fault(number)

        self.simulation = Simulation(SimulatorConfig(**config), note)

    @asynccontextmanager
    async def _connect(self, spec: ServerSpec) -> AsyncIterator[Transport]:
        async with InProcessServers({URL: self.simulation}).connect(spec) as transport:
            yield transport if self._claims is None else Claiming(transport, self._claims)

    @asynccontextmanager
    async def fleet(self, **section: Any) -> AsyncIterator[Fleet]:
        """A fleet of the server, ready."""
        settings = FleetSection(servers=(URL,), **section)
        async with open_fleet(settings, lambda _: None, {}, self._connect, Random(0)) as fleet:
            await fleet.ask_models()
            yield fleet


@in_turn(
    ("info", "ranks"),
    [
        ({"dp_size": 4, "attn_dp_size": 1}, 4),
        ({"dp_size": 1, "attn_dp_size": 8}, 8),  # --enable-dp-attention
        ({"dp_size": 2}, 2),
        ({"dp_size": 4, "disaggregation_mode": "prefill"}, 1),
        ({"dp_size": 4, "disaggregation_mode": "null"}, 4),
        ({"dp_size": "4"}, 1),
        ({"dp_size": True}, 1),
        ({"dp_size": -4}, 1),
        ({"dp_size": 10**9}, 1),
        ({}, 1),
    ],
)
def test_how_many_ranks_a_server_has(info: dict[str, Any], ranks: int) -> None:
    """As `/server_info` says; whatever cannot be, or is a router's to choose, is one."""
    assert ranks == wire.parse_features(orjson.dumps(info)).ranks


def cached_share(claims: dict[str, Any] | None) -> tuple[float, float, list[int | None]]:
    """Share of the prompt tokens from the cache, that of the plan, and the ranks named, with 4 ranks."""
    ranked = Ranked(claims, dp_size=4, latency_ms=5)

    async def main() -> tuple[float, float, list[int | None]]:
        async with ranked.fleet(concurrency=64) as fleet:
            await ask_groups(fleet, 12, 8)
            [found] = fleet.metrics()
        prompt = found["prompt_tokens"]
        return found["cached_tokens"] / prompt, found["planned_cached_tokens"] / prompt, ranked.named

    return run_virtually(main())


def test_groups_have_a_rank_each_and_find_their_prefix_there() -> None:
    """12 groups of 8 requests on 4 ranks: all but the first of a group are cached; by turns only some are."""
    with_ranks, planned, named = cached_share(None)
    by_turns, planned_in_vain, unnamed = cached_share({})

    print(f"cached of prompt tokens: {with_ranks:.1%} with ranks, {by_turns:.1%} by turns")
    assert with_ranks > 0.85 > 0.65 > by_turns
    assert with_ranks == pytest.approx(planned, abs=0.02), "the plan knows of the ranks"
    assert planned_in_vain > by_turns + 0.2
    assert {None} == set(unnamed)
    assert {0: 24, 1: 24, 2: 24, 3: 24} == Counter(named), "groups are spread evenly"


def test_a_server_that_takes_no_rank_is_asked_without() -> None:
    """It has fewer ranks than it said: one line, no failed request, and no rank is named from then on."""
    ranked = Ranked({"dp_size": 4}, dp_size=2, latency_ms=5)

    async def main() -> None:
        with capture_logs() as logs:
            async with ranked.fleet(concurrency=64) as fleet:
                answers = await ask_groups(fleet, 12, 8)
                before = len(ranked.named)
                await ask_groups(fleet, 4, 2)
                [found] = fleet.metrics()
        assert 96 == len(answers)
        assert 0 == found["failures"]
        assert 1 == found["ranks"]
        assert {None} == set(ranked.named[before:])
        refused = [each for each in logs if each["event"] == "fleet.field_refused"]
        assert [["routed_dp_rank"]] == [each["fields"] for each in refused]
        assert [4, 1] == [each["ranks"] for each in logs if each["event"] == "fleet.ranks"]

    run_virtually(main())


@pytest.mark.parametrize("ranks", [2, 4])
def test_scores_are_asked_of_the_rank_of_their_group(ranks: int) -> None:
    """The context is in that cache; a server with fewer ranks than it said scores all the same."""
    ranked = Ranked({"dp_size": ranks}, dp_size=2)

    async def main() -> list[Completion]:
        async with ranked.fleet() as fleet:
            found = []
            for number in range(4):
                asked = request(f"group-{number}", 0)
                await fleet.complete(asked, [])
                scored = Request(asked.messages, {}, asked.group, asked.prefixes, scored="So it says.")
                found.append(await fleet.complete(scored, []))
            return found

    found = run_virtually(main())
    assert all(each.logprobs for each in found)
    if ranks == 2:
        assert all(each.cached_tokens > 0.9 * each.prompt_tokens for each in found)
        assert {0, 1} == set(ranked.named)


def test_a_prefix_has_a_leader_at_each_rank() -> None:
    """Requests without a group go to the rank with the least to do; each rank computes the template once."""
    ranked = Ranked(dp_size=4, latency_ms=100)
    template = {"role": "system", "content": "Write about birds. " * 100}

    async def main() -> list[int]:
        async with ranked.fleet(concurrency=64) as fleet, asyncio.TaskGroup() as group:
            asked = [
                Request([template, {"role": "user", "content": str(number)}], {}, "", ("template",))
                for number in range(32)
            ]
            answers = [group.create_task(fleet.complete(one, [])) for one in asked]
        return [answer.result().cached_tokens for answer in answers]

    cached = run_virtually(main())
    assert 4 == cached.count(0)
    assert {7, 8, 9} >= set(Counter(ranked.named).values())


def test_a_straggler_is_asked_again_at_another_rank() -> None:
    """Also where there is a single server."""
    ranked = Ranked(fault=lambda number: Fault.STALL if number == 4 else None, dp_size=2, latency_ms=1000)

    async def main() -> None:
        async with ranked.fleet() as fleet:
            for number in range(3):
                await fleet.complete(request("one", number), [])
            async with asyncio.TaskGroup() as group:
                asking = group.create_task(fleet.complete(request("one", 3), []))
                await asyncio.sleep(0)
                fleet.tail(1, 100)
            assert asking.result().text
        *_, first, second = ranked.named
        assert {0, 1} == {first, second}

    run_virtually(main(), limit_s=60)


async def test_requests_that_wait_when_the_ranks_change_are_placed_anew() -> None:
    """What waits for a leader, and what waits for a place, loses neither; old places are given back."""
    server = server_at("http://one:1", Limiter(3))
    placement = Placement([server], 1.25, 60.0, asyncio.get_running_loop().time)
    server.split(2)
    leading = await place(placement, of("red", "red"))
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(placement.acquire(of("red", "red"))) for _ in range(3)]
        await settle()
        assert not any(task.done() for task in asked)
        placement.withdraw(server, 1)
        await settle()
        [leader] = [task.result() for task in asked if task.done()]
        assert leading.rank is not leader.rank is server.ranks[0]
        placement.warmed(leader)
        placement.release(leading)
    assert 3 == server.limiter.in_flight == server.ranks[0].in_flight
    assert {leader.rank} == {task.result().rank for task in asked}
    placement.close()
