"""The batching engine behind a simulation, in virtual time."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from streamsyn.simulator.completion_request import Answer, CompletionRequest
from streamsyn.simulator.costs import CPU
from streamsyn.simulator.engine import DuplicateRid, QueueFull, ServerLost
from streamsyn.simulator.routes import load, metrics, server_info
from streamsyn.simulator.settings import Fault, SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.virtual_time import run_virtually


def ask(rid: str, words: str = "geese ", times: int = 100, **fields: Any) -> CompletionRequest:
    """A request of 150 tokens, unless told otherwise."""
    return CompletionRequest(
        rid, "m", f"{rid} {words * times}", words, **{"max_tokens": 64, "stream": False, **fields}
    )


def virtually(
    main: Callable[[Simulation], Awaitable[None]], *, cost_model: str = "cpu", **fields: Any
) -> Simulation:
    """Runs `main` with a simulation, on a clock that jumps."""
    kept: list[Simulation] = []

    async def run() -> None:
        kept.append(Simulation(SimulatorConfig(cost_model=cost_model, **fields)))
        await main(kept[0])

    run_virtually(run())
    return kept[0]


async def all_of(
    simulation: Simulation, *asks: CompletionRequest, fault: Fault | None = None
) -> list[Answer]:
    """The answers to several requests that come at the same time."""
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(simulation.answer(each, fault)) for each in asks]
    return [each.result() for each in asking]


def test_an_answer_takes_what_the_costs_say() -> None:
    """One request takes its prefill and steps, to the microsecond."""

    async def main(simulation: Simulation) -> None:
        [answer] = await all_of(simulation, ask("a"))
        counted = CPU.prefill([(0, answer.prompt_tokens)]) + CPU.decode(1, answer.prompt_tokens, 63)
        assert answer.seconds == pytest.approx(counted)
        assert (answer.completion_tokens, answer.finish) == (64, {"type": "length", "length": 64})

    virtually(main)


def test_requests_slow_each_other_down() -> None:
    """Of 32 requests at once, each is slower, and all together are faster."""

    async def main(simulation: Simulation) -> None:
        [alone] = await all_of(simulation, ask("alone"))
        together = await all_of(simulation, *(ask(f"{number}") for number in range(32)))
        slowest = max(each.seconds for each in together)
        assert 3 * alone.seconds < slowest < 20 * alone.seconds

    virtually(main, cache_tokens=100_000)


def test_a_stream_gives_the_same_text_in_pieces() -> None:
    """Pieces of eight tokens, as they are written."""

    async def main(simulation: Simulation) -> None:
        times, pieces = [], []

        async def feed(piece: str) -> None:
            times.append(asyncio.get_running_loop().time())
            pieces.append(piece)

        answer = await simulation.answer(ask("a"), None, feed)
        assert "".join(pieces) == answer.text
        assert pieces[0] == ""
        assert [len(piece) for piece in pieces[1:]] == [32] * 8
        # The empty piece comes with the first token; seven steps later the first eight are there.
        step_s = CPU.decode(1, 151, 1)
        assert times[1] - times[0] == pytest.approx(7 * step_s, rel=0.05)
        assert times[5] - times[4] == pytest.approx(8 * step_s, rel=0.05)

    virtually(main)


def test_an_abort_brings_what_was_written() -> None:
    """An aborted running request has part of its text, a waiting one nothing; a duplicate rid is refused."""

    async def main(simulation: Simulation) -> None:
        async with asyncio.TaskGroup() as group:
            runs = group.create_task(simulation.answer(ask("runs"), None))
            await asyncio.sleep(0.1)
            waits = group.create_task(simulation.answer(ask("waits"), None))
            await asyncio.sleep(2)
            with pytest.raises(DuplicateRid):
                await simulation.answer(ask("runs"), None)
            with pytest.raises(QueueFull):
                await simulation.answer(ask("third"), None)
            assert simulation.engine.abort("nobody", exact=True) == 0
            assert simulation.engine.abort("waits", exact=True) == 1
            assert simulation.engine.abort("ru", exact=False) == 1
        assert runs.result().aborted
        assert 0 < runs.result().completion_tokens < 64
        assert len(runs.result().text) == 4 * runs.result().completion_tokens
        assert waits.result().finish == {"type": "abort", "message": "Abort in waiting queue"}
        assert (simulation.engine.running, simulation.engine.waiting) == (0, 0)

    virtually(main, slots=1, queue_limit=1)


@pytest.mark.parametrize("cost_model", ["plain", "cpu"])
def test_a_cancelled_request_releases_its_place(cost_model: str) -> None:
    """A cancelled request gives its place back, stalled or not."""

    async def main(simulation: Simulation) -> None:
        for fault in (None, Fault.STALL):
            for number in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await simulation.answer(ask(f"{number}", times=1000), fault)
        await asyncio.sleep(20)
        assert (simulation.engine.running, simulation.engine.waiting) == (0, 0)
        assert simulation.engine.load().used_tokens == 0

    fields: dict[str, Any] = {"latency_ms": 1000} if cost_model == "plain" else {}
    virtually(main, cost_model=cost_model, slots=2, **fields)


@pytest.mark.parametrize("cost_model", ["plain", "cpu"])
def test_going_down_loses_what_runs_and_the_cache(cost_model: str) -> None:
    """All live requests end with a reset, and afterwards the prefix is not cached."""

    async def main(simulation: Simulation) -> None:
        await simulation.answer(ask("same"), None)
        async with asyncio.TaskGroup() as group:

            async def lost(rid: str, fault: Fault | None) -> None:
                with pytest.raises(ServerLost):
                    await simulation.answer(ask(rid), fault)

            for number in range(3):
                group.create_task(lost(f"{number}", Fault.STALL if number == 1 else None))
            await asyncio.sleep(0.5)
            simulation.go_down()
            assert simulation.gone
            assert not simulation.arrive()
        simulation.come_up()
        assert simulation.arrive()
        again = await simulation.answer(ask("same"), None)
        assert (again.cached_tokens, again.aborted) == (0, False)
        assert (await simulation.answer(ask("same"), None)).cached_tokens == 128

    fields: dict[str, Any] = {"latency_ms": 1000} if cost_model == "plain" else {}
    virtually(main, cost_model=cost_model, slots=2, **fields)


@pytest.mark.parametrize("cost_model", ["plain", "cpu"])
def test_half_speed_takes_twice_as_long(cost_model: str) -> None:
    """Speed is configured or set later; invalid values are refused."""

    async def main(simulation: Simulation) -> None:
        nominal = 1 + 63 * 0.05 + 0.05
        if cost_model == "cpu":
            nominal = CPU.prefill([(0, 151)]) + CPU.decode(1, 151, 63)
        [slow] = await all_of(simulation, ask("a", tail := "b", 601))
        assert tail
        assert slow.seconds == pytest.approx(2 * nominal, rel=0.01)
        simulation.speed = 4.0
        [fast] = await all_of(simulation, ask("c", "d", 601))
        assert fast.seconds == pytest.approx(nominal / 4, rel=0.01)
        with pytest.raises(ValueError, match="positive"):
            simulation.speed = 0

    fields: dict[str, Any] = {"latency_ms": 1000, "ms_per_token": 50} if cost_model == "plain" else {}
    virtually(
        main, cost_model=cost_model, speed=0.5, cache_tokens=0 if cost_model == "plain" else None, **fields
    )


def test_the_load_is_that_of_the_batch() -> None:
    """Running, waiting, tokens and throughput, by the loop's clock."""

    async def main(simulation: Simulation) -> None:
        assert load(simulation, {"core"})["gen_throughput"] == 0
        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(simulation.answer(ask(f"{number}", max_tokens=200), None))
            await asyncio.sleep(6)
            told = load(simulation, {"all"})
            assert (told["num_running_reqs"], told["num_waiting_reqs"]) == (2, 2)
            assert (told["max_running_requests"], told["max_total_num_tokens"]) == (2, 32_768)
            assert told["num_waiting_uncached_tokens"] == 2 * 151
            assert 2 * 151 < told["num_used_tokens"] < 2 * 151 + 2 * 200
            assert told["token_usage"] == round(told["num_used_tokens"] / 32_768, 4)
            assert told["num_total_tokens"] == told["num_used_tokens"] + 2 * 151
            assert told["queues"] == {
                "waiting": 2, "grammar": 0, "paused": 0, "retracted": 0, "prealloc_ready": 0
            }  # fmt: skip
            await asyncio.sleep(4)
            throughput = load(simulation, {"core"})["gen_throughput"]
            assert throughput == pytest.approx(2 / CPU.decode(2, 2 * 230, 1), rel=0.1)
        assert load(simulation, {"core"})["num_used_tokens"] == 0
        assert load(simulation, {"core"})["total_prefill_uncached_tokens"] == 4 * 151
        assert server_info(simulation)["schedule_policy"] == "lpm"
        assert "sglang:num_retracted_requests_total" in metrics(simulation)

    virtually(main, slots=2, words=1000, schedule_policy="lpm")


def test_retractions_are_counted_and_lose_no_text() -> None:
    """With a small pool, requests are retracted, and all answers are complete."""

    async def main(simulation: Simulation) -> None:
        asks = [ask(f"{number:02d}", times=20, max_tokens=600) for number in range(24)]
        answers = await all_of(simulation, *asks)
        assert all(answer.completion_tokens == 600 for answer in answers)
        assert all(len(answer.text) == 2400 for answer in answers)
        assert simulation.stats.retracted == sum(answer.retractions for answer in answers)

    simulation = virtually(main, cache_tokens=5000, words=1000)
    assert simulation.stats.retracted > 0


PROGRAM = """
import asyncio
from streamsyn.simulator.completion_request import CompletionRequest
from streamsyn.simulator.virtual_time import run_virtually
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation

async def main():
    config = SimulatorConfig(cost_model="cpu", cache_tokens=6000, schedule_policy="lpm", words=300)
    server = Simulation(config)
    async def one(number):
        await asyncio.sleep(number % 7 * 0.9)
        prompt = "shared " * (100 * (number % 5)) + f"{number} " * 300
        answer = await server.answer(CompletionRequest(f"{number}", "m", prompt, "", 300), None)
        print(number, answer.seconds, answer.cached_tokens, hash(answer.text) and answer.text[:40])
    async with asyncio.TaskGroup() as group:
        for number in range(60):
            group.create_task(one(number))
    print(server.stats.retracted, asyncio.get_running_loop().time())

run_virtually(main())
"""


def test_a_run_depends_on_nothing_but_its_seed() -> None:
    """Two processes with different hash seeds give the same results."""
    told = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    assert len(told.pop().splitlines()) == 61
