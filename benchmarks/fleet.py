"""Utilisation of a simulated fleet in virtual time: 64 servers, some slow, one flapping, one dying.

    python -m benchmarks.fleet [--seeds 20000] [--drafts 4] [--words 1000] [--plot PATH] [--check]

All variants send requests to the same in-process servers (`h100` cost model) on an event loop with a
virtual clock. The client's own CPU time does not count: only the choice of server and the time of each
request matter. Variants:

- `streamsyn run`: in-flight caps found automatically, prefix groups placed, contexts checked and logged
  durably;
- the same with a fixed cap of 512 a server;
- a plain loop: 512 requests a server, round robin, each failure retried at the next server.

Capacity comes from the cost model (`costs.capacity`), each server's speed and the time it is up. The result
is the tokens written from the 60th second until no work is left to start, as a share of capacity. Before
and after that window, servers fill up or run empty with every policy. Tokens are counted rather than
answers because answers come in waves: all requests start at once. Tokens that a server lost when it went
down do not count. With --check the exit code is 1 when streamsyn uses less than 0.95 of capacity, or its
caps settle after the 60th second or move by more than 25 % later.
"""

import argparse
import asyncio
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.common import seeds_file
from streamsyn.config.loading import load
from streamsyn.errors import ServerError
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.pipeline.request import RunRequest, RunSummary
from streamsyn.pipeline.run import run
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import Draft, Request, Seed
from streamsyn.simulator import costs
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.prose import Prose
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.timeline import Event, Timeline
from streamsyn.telemetry import Counters, configure_logs

SETTLED_S = 60.0
FLAP_EVERY_S, FLAP_DOWN_S, FLAP_FROM_S = 90.0, 10.0, 45.0
COST_MODEL = "h100"


@dataclass(frozen=True, slots=True)
class Scenario:
    """The size of the fleet and of the work.

    Attributes:
        servers: Number of servers.
        seeds: Number of seeds.
        drafts: Contexts for each seed.
        words: Words of a context.
        slots: Requests that a server runs at once.
    """

    servers: int
    seeds: int
    drafts: int
    words: int
    slots: int

    @property
    def urls(self) -> list[str]:
        """URLs of the servers: first the `slow` ones, last the flapping and the dying one."""
        return [f"http://gpu-{number:02}:30000" for number in range(self.servers)]

    @property
    def slow(self) -> int:
        """Number of servers at half speed: an eighth of all."""
        return self.servers // 8

    def speed(self, number: int) -> float:
        """Return the relative speed of a server; 1 is nominal."""
        return 0.5 if number < self.slow else 1.0

    def kind(self, number: int) -> str:
        """Return the kind of a server: usual, slow, flapping or dying."""
        special = {self.servers - 2: "flapping", self.servers - 1: "dying"}
        return special.get(number, "slow" if number < self.slow else "usual")

    @property
    def config(self) -> SimulatorConfig:
        """The simulator's configuration, the same for each server."""
        return SimulatorConfig(cost_model=COST_MODEL, slots=self.slots, words=self.words)

    def requests_per_s(self) -> float:
        """Return the capacity of one server at nominal speed in requests a second, from the cost model."""
        prompt, shared, answer = tokens_of_a_request(self)
        model = self.config.batching
        assert model is not None
        return costs.capacity(model, prompt, shared, answer)

    def dies_at_s(self) -> float:
        """Return when the dying server dies: half of the time that all requests should take, in seconds."""
        speeds = sum(self.speed(number) for number in range(self.servers))
        return self.seeds * self.drafts / (self.requests_per_s() * speeds) / 2

    def capacity(self, from_s: float, to_s: float) -> float:
        """Return the tokens that the fleet can write between two times."""
        total = 0.0
        for number in range(self.servers):
            up_s = to_s - from_s
            if self.kind(number) == "flapping":
                up_s -= sum(
                    max(0.0, min(to_s, down + FLAP_DOWN_S) - max(from_s, down))
                    for down in itertools.takewhile(
                        lambda at: at < to_s, itertools.count(FLAP_FROM_S, FLAP_EVERY_S)
                    )
                )
            elif self.kind(number) == "dying":
                up_s = max(0.0, min(to_s, self.dies_at_s()) - from_s)
            total += up_s * self.speed(number)
        return total * self.requests_per_s() * tokens_of_a_request(self)[2]

    def fleet(self) -> InProcessServers:
        """Return new servers with the events of the slow, flapping and dying ones."""
        timelines = {}
        for number, url in enumerate(self.urls):
            events = []
            if self.speed(number) != 1:
                events.append(Event(0.0, speed=self.speed(number)))
            if self.kind(number) == "flapping":
                events.append(Event(FLAP_FROM_S, every_s=FLAP_EVERY_S, down_s=FLAP_DOWN_S))
            if self.kind(number) == "dying":
                events.append(Event(self.dies_at_s(), die=True))
            if events:
                timelines[url] = Timeline(events)
        return InProcessServers({url: Simulation(self.config) for url in self.urls}, timelines)


@dataclass(slots=True)
class Outcome:
    """Measurements of one variant. Times are virtual seconds, except `real_s`."""

    name: str
    ended_s: float = 0.0
    left_s: float = 0.0
    """When no work was left to start."""
    written: list[tuple[float, int]] = field(default_factory=list)
    """(time, tokens written until then), each second."""
    caps: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    waiting: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    real_s: float = 0.0

    def between(self, from_s: float, to_s: float) -> int:
        """Return the tokens written between two times."""
        before = [count for at, count in self.written if at <= from_s]
        until = [count for at, count in self.written if at <= to_s]
        return (until[-1] if until else 0) - (before[-1] if before else 0)


@cache
def tokens_of_a_request(scenario: Scenario) -> tuple[int, int, int]:
    """Return the tokens of a prompt, of its cached part and of an answer, as the simulator counts them."""
    prompt, shared, _ = sample_request(scenario)
    prose = Prose(0)
    written = [len(prose.write(scenario.words)) for _ in range(200)]
    return len(prompt) // 4, len(shared) // 4, round(sum(written) / len(written) / 4)


def sample_request(scenario: Scenario) -> tuple[str, str, Request]:
    """Return the text of a request, the part that all requests share, and the request."""
    config = load(None, settings(scenario, []))
    seed = Seed("0", "seeds", "Who kept the lighthouse in year 10000?", "Keeper 79190000", "")
    request = next(load_recipe(config.recipe, config.checks).steps(Draft(seed)))
    text = "".join(message["content"] for message in request.messages)
    return text, request.messages[0]["content"], request


def settings(scenario: Scenario, more: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the configuration overrides of a run: those of the scenario, then `more`."""
    return [
        ("recipe.contexts_per_seed", scenario.drafts),
        ("recipe.target_words", scenario.words),
        ("checks.max_repetition", 1.0),
        ("assembly.write", False),
        ("fleet.servers", scenario.urls),
        ("fleet.request_timeout_s", 3600.0),
        ("fleet.max_attempts", 100),
        *more,
    ]


def written(fleet: InProcessServers) -> int:
    """Return the tokens that all servers have written so far."""
    return sum(server.engine.load().generated_tokens or 0 for server in fleet.simulations.values())


async def run_sampled(
    main: Coroutine[Any, Any, None],
    scenario: Scenario,
    fleet: InProcessServers,
    summary: RunSummary,
    out: Outcome,
) -> None:
    """Run `main` and record caps, queues and tokens in `out` each virtual second."""
    clock = asyncio.get_running_loop().time
    drafts = scenario.seeds * scenario.drafts

    async def sample() -> None:
        while True:
            figures = summary.servers()
            out.written.append((clock(), written(fleet)))
            held = sum(server["completions"] + server["in_flight"] + server["queued"] for server in figures)
            if not out.left_s and held >= drafts * 0.999:
                out.left_s = clock()
            for server in figures:
                out.caps.setdefault(server["server"], []).append((clock(), server["cap"]))
                out.waiting.setdefault(server["server"], []).append((clock(), server["waiting"] or 0))
            await asyncio.sleep(1.0)

    async with asyncio.TaskGroup() as group:
        sampler = group.create_task(sample())
        try:
            await main
        finally:
            sampler.cancel()
    out.ended_s = clock()


def with_streamsyn(scenario: Scenario, name: str, more: list[tuple[str, Any]]) -> Outcome:
    """Run the whole `streamsyn run` on a new fleet."""
    out, started = Outcome(name), time.perf_counter()
    fleet = scenario.fleet()
    with tempfile.TemporaryDirectory() as folder:
        seeds = seeds_file(Path(folder), scenario.seeds)
        config = load(None, [*settings(scenario, more), ("seeds.sources", [{"path": str(seeds)}])])
        summary = RunSummary(Path(folder) / "out", Counters())

        def runner(main: Coroutine[Any, Any, None]) -> None:
            fleet.run(run_sampled(main, scenario, fleet, summary, out))

        request = RunRequest(
            config=config,
            out=summary.out,
            connect=fleet.connect,
            runner=runner,
            rng=Random(0),
            show_progress=False,
            preflight=False,
        )
        run(request, summary)
    if summary.contexts != scenario.seeds * scenario.drafts:
        print(
            f"{name}: {summary.contexts} contexts, rejects {dict(summary.counters.rejects)}", file=sys.stderr
        )
    out.real_s = time.perf_counter() - started
    return out


def with_a_loop(scenario: Scenario, name: str, cap: int) -> Outcome:
    """Send `cap` requests a server at a time, round robin; a failure is retried at the next server."""
    out, started = Outcome(name), time.perf_counter()
    fleet, turns = scenario.fleet(), itertools.count()
    _, _, request = sample_request(scenario)
    numbers = iter(range(scenario.seeds * scenario.drafts))

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        clients = []
        for url in scenario.urls:
            transport = await fleet.connect(ServerSpec(url)).__aenter__()
            clients.append(ServerClient(url, transport, 3600.0))

        async def work() -> None:
            for _ in numbers:
                while True:
                    turn = next(turns)
                    try:
                        await clients[turn % len(clients)].chat(request, "simulated", f"{turn:09}")
                    except ServerError:
                        await asyncio.sleep(0.1)
                    else:
                        break

        async def sample() -> None:
            while True:
                out.written.append((clock(), written(fleet)))
                await asyncio.sleep(1.0)

        async with asyncio.TaskGroup() as group:
            sampler = group.create_task(sample())
            async with asyncio.TaskGroup() as workers:
                for _ in range(cap * len(clients)):
                    workers.create_task(work())
            out.ended_s = clock()
            sampler.cancel()

    fleet.run(main())
    out.real_s = time.perf_counter() - started
    return out


def settling(scenario: Scenario, outcome: Outcome) -> tuple[float, float]:
    """Return when the caps of the usual servers settled, in seconds, and their later relative movement.

    The level of a server is its mean cap from `SETTLED_S` until no work is left to start. It is settled when
    the cap first comes within a tenth of the level. The movement after `SETTLED_S` is
    (highest - lowest) / level.
    Both results are medians over the servers.
    """
    found, swings = [], []
    for number, url in enumerate(scenario.urls):
        if scenario.kind(number) != "usual":
            continue
        caps = [(at, cap) for at, cap in outcome.caps[url] if at <= outcome.left_s]
        late = [cap for at, cap in caps if at >= SETTLED_S] or [caps[-1][1]]
        mean = sum(late) / len(late)
        found.append(next((at for at, cap in caps if abs(cap - mean) <= 0.1 * mean), float("inf")))
        swings.append((max(late) - min(late)) / mean)
    return sorted(found)[len(found) // 2], sorted(swings)[len(swings) // 2]


def plot(scenario: Scenario, outcome: Outcome, path: Path) -> None:
    """Plot the in-flight cap and the queue length of one server of each kind."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6), layout="constrained")
    shown = {scenario.kind(number): number for number in range(scenario.servers)}
    for kind, number in sorted(shown.items()):
        url = scenario.urls[number]
        above.plot(*zip(*outcome.caps[url], strict=True), label=kind)
        below.plot(*zip(*outcome.waiting[url], strict=True), label=kind)
    for axes, title in ((above, "in-flight cap"), (below, "requests queued at the server")):
        axes.axvline(outcome.left_s, color="grey", linestyle=":")
        axes.set_ylabel(title)
    above.legend(title="one server of each kind", loc="lower right")
    below.set_xlabel("virtual seconds; dotted line: no work left to start")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run the variants and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--servers", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=20_000)
    parser.add_argument("--drafts", type=int, default=4, help="contexts for each seed")
    parser.add_argument("--words", type=int, default=1000, help="words a context")
    parser.add_argument("--slots", type=int, default=256, help="requests that a server runs at once")
    parser.add_argument("--plot", type=Path, default=Path("fleet.png"), help="plot of caps and queues")
    parser.add_argument("--only", choices=["auto"], help="run only the first variant")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    args = parser.parse_args()
    configure_logs(as_json=False, level=logging.ERROR)
    scenario = Scenario(args.servers, args.seeds, args.drafts, args.words, args.slots)
    prompt, shared, answer = tokens_of_a_request(scenario)
    print(
        f"{scenario.servers} servers, {scenario.seeds * scenario.drafts} requests of {prompt} tokens "
        f"({shared} shared), answers of {answer}; one server: {scenario.requests_per_s():.2f} requests/s"
    )
    auto = with_streamsyn(scenario, "streamsyn, auto", [])
    outcomes = [auto]
    if args.only is None:
        outcomes.append(with_streamsyn(scenario, "streamsyn, 512 each", [("fleet.concurrency", 512)]))
        outcomes.append(with_a_loop(scenario, "round robin, 512 each", 512))
    print(f"{'':24}{'of capacity':>12}{'whole run':>11}{'ended at':>10}{'wall':>8}")
    shares = []
    for outcome in outcomes:
        share = outcome.between(SETTLED_S, auto.left_s) / scenario.capacity(SETTLED_S, auto.left_s)
        whole = scenario.seeds * scenario.drafts * answer / scenario.capacity(0, outcome.ended_s)
        shares.append(share)
        print(f"{outcome.name:24}{share:12.3f}{whole:11.3f}{outcome.ended_s:9.0f}s{outcome.real_s:7.0f}s")
    found_s, swing = settling(scenario, auto)
    print(f"caps settled after {found_s:.0f} s; from {SETTLED_S:.0f} s on they moved by {swing:.0%}")
    plot(scenario, auto, args.plot)
    print(
        json.dumps(
            {"share": shares[0], "found_s": found_s, "swing": swing, "window_s": auto.left_s - SETTLED_S}
        )
    )
    return int(args.check and not (shares[0] >= 0.95 and found_s <= SETTLED_S and swing <= 0.25))


if __name__ == "__main__":
    sys.exit(main())
