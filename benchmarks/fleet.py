"""How much of a simulated fleet a run uses: 64 servers, some slow, one flapping, one dying, in virtual time.

    python -m benchmarks.fleet [--seeds 20000] [--drafts 4] [--words 1000] [--plot PATH] [--check]

Every variant asks the same in-process servers (`h100` cost model) on an event loop whose clock jumps, so
the client's own CPU time counts for nothing: what is compared is who is asked for what, and when. Variants:

- `streamsyn run` as it is: caps found, groups placed, seeds read, contexts checked and logged durably;
- the same with a fixed cap of 512 a server;
- a plain loop: 512 a server, round robin, each failure asked again at the next server.

Capacity is counted from the cost model (`costs.capacity`), with each server's speed and the time it is up.
The figure is the tokens written between the 60th second and the moment when nothing is left to begin, of
those that could have been: outside of that, servers are filling up or running empty whatever anyone does.
(Not the requests answered: they come in waves, as all begin at once.) What a server lost when it went down
does not count as written.
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
    """What the fleet is, and what is asked of it."""

    servers: int
    seeds: int
    drafts: int
    words: int
    slots: int

    @property
    def urls(self) -> list[str]:
        """URLs of the servers: the first ones are slow, the last two flap and die."""
        return [f"http://gpu-{number:02}:30000" for number in range(self.servers)]

    @property
    def slow(self) -> int:
        """How many run at half speed: an eighth."""
        return self.servers // 8

    def speed(self, number: int) -> float:
        """Of a server, 1 for nominal."""
        return 0.5 if number < self.slow else 1.0

    def kind(self, number: int) -> str:
        """What is special about a server."""
        special = {self.servers - 2: "flapping", self.servers - 1: "dying"}
        return special.get(number, "slow" if number < self.slow else "usual")

    @property
    def config(self) -> SimulatorConfig:
        """Of each server."""
        return SimulatorConfig(cost_model=COST_MODEL, slots=self.slots, words=self.words)

    def requests_per_s(self) -> float:
        """Capacity of one server at nominal speed, requests a second, from the cost model."""
        prompt, shared, answer = tokens_of_a_request(self)
        model = self.config.batching
        assert model is not None
        return costs.capacity(model, prompt, shared, answer)

    def dies_at_s(self) -> float:
        """Half of the time that the whole work should take."""
        speeds = sum(self.speed(number) for number in range(self.servers))
        return self.seeds * self.drafts / (self.requests_per_s() * speeds) / 2

    def capacity(self, from_s: float, to_s: float) -> float:
        """Tokens that the fleet can write in that time."""
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
        """New servers, with what is to happen to them."""
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
    """What came of a variant. Times are virtual seconds."""

    name: str
    ended_s: float = 0.0
    left_s: float = 0.0
    """When the first worker had nothing left to do."""
    written: list[tuple[float, int]] = field(default_factory=list)
    """Tokens written so far, each second."""
    caps: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    waiting: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    real_s: float = 0.0

    def between(self, from_s: float, to_s: float) -> int:
        """Tokens written in that time."""
        before = [count for at, count in self.written if at <= from_s]
        until = [count for at, count in self.written if at <= to_s]
        return (until[-1] if until else 0) - (before[-1] if before else 0)


@cache
def tokens_of_a_request(scenario: Scenario) -> tuple[int, int, int]:
    """Tokens of a prompt, those of it that are cached, tokens of an answer, as the simulator counts them."""
    prompt, shared, _ = example(scenario)
    prose = Prose(0)
    written = [len(prose.write(scenario.words)) for _ in range(200)]
    return len(prompt) // 4, len(shared) // 4, round(sum(written) / len(written) / 4)


def example(scenario: Scenario) -> tuple[str, str, Request]:
    """A request's text, what of it all others share, and the request."""
    config = load(None, settings(scenario, []))
    seed = Seed("0", "seeds", "Who kept the lighthouse in year 10000?", "Keeper 79190000", "")
    request = next(load_recipe(config.recipe, config.checks).steps(Draft(seed)))
    text = "".join(message["content"] for message in request.messages)
    return text, request.messages[0]["content"], request


def settings(scenario: Scenario, more: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Of a run."""
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
    """Tokens that all servers have written so far."""
    return sum(server.engine.load().generated_tokens or 0 for server in fleet.simulations.values())


async def sampled(
    main: Coroutine[Any, Any, None],
    scenario: Scenario,
    fleet: InProcessServers,
    summary: RunSummary,
    out: Outcome,
) -> None:
    """Run `main`, and look at the fleet each virtual second."""
    clock = asyncio.get_running_loop().time
    drafts = scenario.seeds * scenario.drafts

    async def look() -> None:
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
        looking = group.create_task(look())
        try:
            await main
        finally:
            looking.cancel()
    out.ended_s = clock()


def with_streamsyn(scenario: Scenario, name: str, more: list[tuple[str, Any]]) -> Outcome:
    """`streamsyn run`, whole."""
    out, began = Outcome(name), time.perf_counter()
    fleet = scenario.fleet()
    with tempfile.TemporaryDirectory() as folder:
        seeds = seeds_file(Path(folder), scenario.seeds)
        config = load(None, [*settings(scenario, more), ("seeds.sources", [{"path": str(seeds)}])])
        summary = RunSummary(Path(folder) / "out", Counters())

        def runner(main: Coroutine[Any, Any, None]) -> None:
            fleet.run(sampled(main, scenario, fleet, summary, out))

        request = RunRequest(
            config=config,
            out=summary.out,
            connect=fleet.connect,
            runner=runner,
            rng=Random(0),
            show_progress=False,
        )
        run(request, summary)
    if summary.contexts != scenario.seeds * scenario.drafts:
        print(
            f"{name}: {summary.contexts} contexts, rejects {dict(summary.counters.rejects)}", file=sys.stderr
        )
    out.real_s = time.perf_counter() - began
    return out


def with_a_loop(scenario: Scenario, name: str, cap: int) -> Outcome:
    """So many at a time, each at the next server in turn; what fails is asked again at the next one."""
    out, began = Outcome(name), time.perf_counter()
    fleet, turns = scenario.fleet(), itertools.count()
    _, _, request = example(scenario)
    left = iter(range(scenario.seeds * scenario.drafts))

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        clients = []
        for url in scenario.urls:
            transport = await fleet.connect(ServerSpec(url)).__aenter__()
            clients.append(ServerClient(url, transport, 3600.0))

        async def work() -> None:
            for _ in left:
                while True:
                    turn = next(turns)
                    try:
                        await clients[turn % len(clients)].chat(request, "simulated", f"{turn:09}")
                    except ServerError:
                        await asyncio.sleep(0.1)
                    else:
                        break

        async def look() -> None:
            while True:
                out.written.append((clock(), written(fleet)))
                await asyncio.sleep(1.0)

        async with asyncio.TaskGroup() as group:
            looking = group.create_task(look())
            async with asyncio.TaskGroup() as workers:
                for _ in range(cap * len(clients)):
                    workers.create_task(work())
            out.ended_s = clock()
            looking.cancel()

    fleet.run(main())
    out.real_s = time.perf_counter() - began
    return out


def level(scenario: Scenario, outcome: Outcome) -> tuple[float, float]:
    """When the caps of the usual servers had found their level, and how far they move after, of the level.

    The level is the mean cap of a server from `SETTLED_S` to the end of the full load; it is found when the
    cap comes within a tenth of it. Medians over the servers.
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
    """The caps of a server of each kind, and what waited there."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6), layout="constrained")
    shown = {scenario.kind(number): number for number in range(scenario.servers)}
    for kind, number in sorted(shown.items()):
        url = scenario.urls[number]
        above.plot(*zip(*outcome.caps[url], strict=True), label=kind)
        below.plot(*zip(*outcome.waiting[url], strict=True), label=kind)
    for axes, title in ((above, "in-flight cap"), (below, "waiting at the server")):
        axes.axvline(outcome.left_s, color="grey", linestyle=":")
        axes.set_ylabel(title)
    above.legend(title="a server of each kind", loc="lower right")
    below.set_xlabel("simulated seconds; dotted: nothing left to begin")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run the variants and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--servers", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=20_000)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--words", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--plot", type=Path, default=Path("fleet.png"))
    parser.add_argument("--only", choices=["auto"])
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    given = parser.parse_args()
    configure_logs(as_json=False, level=logging.ERROR)
    scenario = Scenario(given.servers, given.seeds, given.drafts, given.words, given.slots)
    prompt, shared, answer = tokens_of_a_request(scenario)
    print(
        f"{scenario.servers} servers, {scenario.seeds * scenario.drafts} requests of {prompt} tokens "
        f"({shared} shared by all), answers of {answer}; one server: {scenario.requests_per_s():.2f} a second"
    )
    auto = with_streamsyn(scenario, "streamsyn, auto", [])
    outcomes = [auto]
    if given.only is None:
        outcomes.append(with_streamsyn(scenario, "streamsyn, 512 each", [("fleet.concurrency", 512)]))
        outcomes.append(with_a_loop(scenario, "round robin, 512 each", 512))
    print(f"{'':24}{'of capacity':>12}{'whole run':>11}{'ended at':>10}{'real':>8}")
    shares = []
    for outcome in outcomes:
        share = outcome.between(SETTLED_S, auto.left_s) / scenario.capacity(SETTLED_S, auto.left_s)
        whole = scenario.seeds * scenario.drafts * answer / scenario.capacity(0, outcome.ended_s)
        shares.append(share)
        print(f"{outcome.name:24}{share:12.3f}{whole:11.3f}{outcome.ended_s:9.0f}s{outcome.real_s:7.0f}s")
    found_s, swing = level(scenario, auto)
    print(f"caps found their level after {found_s:.0f} s; from {SETTLED_S:.0f} s they moved by {swing:.0%}")
    plot(scenario, auto, given.plot)
    print(
        json.dumps(
            {"share": shares[0], "found_s": found_s, "swing": swing, "window_s": auto.left_s - SETTLED_S}
        )
    )
    return int(given.check and not (shares[0] >= 0.95 and found_s <= SETTLED_S and swing <= 0.25))


if __name__ == "__main__":
    sys.exit(main())
