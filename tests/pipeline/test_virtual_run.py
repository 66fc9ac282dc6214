"""A whole run in virtual time: servers in the process, a clock that jumps, and twice the same."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from streamsyn.config.loading import load
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.summary import RunSummary
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import Fault, SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.timeline import Event, Timeline

SERVERS, SEEDS = 8, 300


def played(root: Path) -> list[tuple[Any, ...]]:
    """What a run over servers that are slow, flap, fail and die has written."""
    seeds = root / "seeds.jsonl"
    root.mkdir()
    lines = [{"instruction": f"Who kept light {n}?", "answer": f"Keeper {n * 7919}."} for n in range(SEEDS)]
    seeds.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    urls = [f"http://gpu-{number}:30000" for number in range(SERVERS)]
    faulty = SimulatorConfig(cost_model="h100", slots=32, faults={"http_500": 0.02, "cut_body": 0.02})
    simulations = {url: Simulation(faulty) for url in urls}
    timelines = {
        urls[0]: Timeline([Event(0.0, speed=0.5)]),
        urls[1]: Timeline([Event(5.0, every_s=30.0, down_s=10.0)]),
        urls[2]: Timeline([Event(20.0, die=True)]),
    }
    servers = InProcessServers(simulations, timelines)
    settings = [
        ("seeds.sources", [{"path": str(seeds)}]),
        ("fleet.servers", urls),
        ("recipe.contexts_per_seed", 2),
        ("assembly.contexts_per_sample", 3),
    ]
    request = RunRequest(
        config=load(None, settings),
        out=root / "out",
        connect=servers.connect,
        runner=servers.run,
        rng=Random(0),
        show_progress=False,
    )
    summary = run(request)
    assert (2 * SEEDS, 0) == (summary.contexts, summary.rejects)
    lines = [
        orjson.loads(line) for line in (root / "out/contexts/part-000000.jsonl").read_bytes().splitlines()
    ]
    return [(row["seq"], row["id"], row["server"], row["context"], len(row["attempts"])) for row in lines]


def test_a_simulated_run_is_repeatable(tmp_path: Path) -> None:
    """Minutes of a faulty fleet: the same requests at the same servers in the same order."""
    first, second = played(tmp_path / "first"), played(tmp_path / "second")
    assert first == second
    assert any(tries > 1 for *_, tries in first)


def limited_run(root: Path, limited: set[int], number: int, fault: Fault) -> tuple[RunSummary, float]:
    """A run in which some seeds are always refused; returns also its seconds."""

    def script(_: int, body: dict[str, Any]) -> Fault | None:
        return fault if any(f"light {n}?" in str(body["messages"]) for n in limited) else None

    async def timed(main: Coroutine[Any, Any, None]) -> None:
        await main
        ended.append(asyncio.get_running_loop().time())

    ended: list[float] = []
    seeds = root / "seeds.jsonl"
    root.mkdir(exist_ok=True)
    lines = [{"instruction": f"Who kept light {n}?", "answer": f"Keeper {n}."} for n in range(number)]
    seeds.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    config = SimulatorConfig(slots=8, latency_ms=2000)
    servers = InProcessServers({"http://gpu:1": Simulation(config, script)})
    settings = [
        ("seeds.sources", [{"path": str(seeds)}]),
        ("fleet.servers", list(servers.simulations)),
        ("assembly.write", False),
    ]
    request = RunRequest(
        config=load(None, settings),
        out=root / "out",
        connect=servers.connect,
        runner=lambda main: servers.run(timed(main)),
        rng=Random(0),
        show_progress=False,
    )
    return run(request), ended[0]


@pytest.mark.parametrize("fault", [Fault.RATE_LIMIT, Fault.PAUSE])
def test_a_seed_that_is_always_rate_limited_becomes_a_reject(tmp_path: Path, fault: Fault) -> None:
    """Also when all others are finished long before `fleet.give_up_s`; the text of the server is kept."""
    summary, _ = limited_run(tmp_path, {7}, 60, fault)
    assert (59, 1, None) == (summary.contexts, summary.rejects, summary.stopped)
    (reject,) = (
        orjson.loads(line) for line in (tmp_path / "out/rejects/part-000000.jsonl").read_bytes().splitlines()
    )
    assert "request_refused" == reject["reason"]
    assert "You exceeded your current quota" in reject["detail"]
    assert 1 == len(reject["attempts"])


def test_many_seeds_that_are_always_rate_limited_do_not_hold_all_workers(tmp_path: Path) -> None:
    """A tenth of the seeds: the run takes `fleet.give_up_s` longer than without them, and does not stop."""
    _, alone_s = limited_run(tmp_path / "alone", set(), 360, Fault.RATE_LIMIT)
    summary, beside_s = limited_run(tmp_path / "beside", set(range(0, 400, 10)), 400, Fault.RATE_LIMIT)
    assert (360, 40) == (summary.contexts, summary.rejects)
    assert beside_s < alone_s + 300 + 60
