"""The adaptive cap against simulated servers whose KV pool is the limit, in virtual time."""

import asyncio
from dataclasses import dataclass
from random import Random

from streamsyn.config.sections import FleetSection
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.records import Request
from streamsyn.simulator.costs import capacity
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation

URL = "http://gpu:30000"
PROMPT = "Write a text of this kind. " * 40
POOL = 50_000


@dataclass
class Seen:
    """What a fleet of one server did: virtual seconds, and counters of the server."""

    caps: list[int]
    ended_s: float
    retracted: int
    answered: int
    cached: float


def work(turns: int, conversations: int, words: int) -> Seen:
    """Have `conversations` written of `turns` answers each, as many at a time as the fleet allows."""
    simulation = Simulation(SimulatorConfig(cost_model="h100", cache_tokens=POOL, words=words, slots=2048))
    servers = InProcessServers({URL: simulation})
    todo = iter(range(conversations))
    caps: list[int] = []

    async def one(fleet: Fleet) -> None:
        for number in todo:
            messages = [{"role": "user", "content": f"{PROMPT} The seed {number}."}]
            for turn in range(turns):
                tokens = turns * 2 * words if turns > 1 else 0
                request = Request(
                    messages, {"max_tokens": 3 * words}, group=str(number), conversation_tokens=tokens
                )
                completion = await fleet.complete(request, [])
                reply = {"role": "assistant", "content": completion.text}
                messages = [*messages, reply, {"role": "user", "content": f"Part {turn}."}]

    async def main() -> float:
        section = FleetSection(servers=[{"url": URL}], request_timeout_s=3600)
        async with open_fleet(section, lambda _: None, {}, servers.connect, Random(0)) as fleet:
            await fleet.ask_models()
            clock = asyncio.get_running_loop().time
            async with asyncio.TaskGroup() as group:
                for _ in range(conversations):
                    while sum(task.done() for task in workers) + fleet.capacity <= len(workers):
                        caps.append(fleet.capacity)
                        await asyncio.sleep(0.25)
                    workers.append(group.create_task(one(fleet), name="worker"))
            return clock()

    workers: list[asyncio.Task[None]] = []
    ended_s = servers.run(main(), limit_s=1e5)
    stats = simulation.stats
    return Seen(caps, ended_s, stats.retracted, stats.answered, stats.cached_tokens / stats.prompt_tokens)


def test_single_answers_fill_the_pool_at_an_even_pace() -> None:
    """Next to nothing is retracted, the cap stays near its level, and the pool's capacity is used."""
    seen = work(turns=1, conversations=800, words=300)
    late = seen.caps[len(seen.caps) // 3 :]
    assert seen.answered == 800
    assert seen.retracted < 0.05 * seen.answered
    assert min(late) >= max(late) / 2
    model = SimulatorConfig(cost_model="h100", cache_tokens=POOL, slots=2048).batching
    assert model is not None
    assert 800 / seen.ended_s > 0.7 * capacity(model, 285, 256, 531)


def test_conversations_keep_their_cached_past() -> None:
    """As many as fit with all that they will write: otherwise each step computes its past again."""
    seen = work(turns=8, conversations=60, words=300)
    assert seen.answered == 480
    assert seen.cached > 0.9
