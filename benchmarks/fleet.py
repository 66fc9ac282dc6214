"""What the in-flight cap makes of simulated servers, in virtual time: adaptive, beside fixed caps.

    python -m benchmarks.fleet [WORKLOAD] [--servers N] [--seeds N] [--caps N ...] [--draw N] [--plot PATH]
                               [--check]
    python -m benchmarks.fleet --all

Workloads: `default` (recipe and lengths as they are by default: the KV pool is the limit), `full` (answers as
long as `max_tokens`), `varied` (log-normal lengths), `short` (the pool is the limit, answers of 200 words),
`seats` (256 seats are the limit), `sections-8k`, `sections-32k`, and `faulty`: some of the servers are slow,
one flaps, one dies. All begin cold, with an empty cache and nothing known about the answers.

Every variant runs the whole `streamsyn run` (prefix groups placed, contexts checked and logged durably) with
in-process servers (`h100` cost model) on an event loop with a virtual clock, so the client's own CPU time
does not count. `faulty` adds a plain loop: 512 requests a server, round robin, failures retried elsewhere.

Columns. `window`: the tokens written from the 60th second (or half of the time, if work is left for less than
two minutes) until no work is left to start, as a share of capacity; `whole`: those of the whole run, whose
start and end are never full. Capacity comes from the cost model (`costs.capacity`), each server's speed and
the time it is up; for `sections` a document counts as one answer, so it is an upper bound. Tokens are counted
rather than answers because answers come in waves; tokens that a server lost when it went down do not count.
`retracted`: how often a request was retracted, as a share of all answers. `cap`: lowest and highest within
the window, of all usual servers. With --check the exit code is 1 when `auto` misses a target: with the pool
as the limit, the window and the whole run of the best fixed cap, and retractions under 5 %; elsewhere 0.95
and 0.90 (`faulty`: 0.95 in the window alone, since one server dies); no cap below half of the highest.
"""

import argparse
import asyncio
import itertools
import logging
import math
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.common import VariedProse, seeds_file
from benchmarks.workloads import WORKLOADS, Workload
from streamsyn.config.loading import load
from streamsyn.errors import ServerError
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.summary import RunSummary
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import Draft, Request, Seed
from streamsyn.simulator import costs
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.texts import Prose
from streamsyn.simulator.timeline import Event, Timeline
from streamsyn.telemetry import Counters, configure_logs

SETTLED_S = 60.0
QUICK_CAPS = (130, 260, 400)
FLAP_EVERY_S, FLAP_DOWN_S, FLAP_FROM_S = 90.0, 10.0, 45.0
COST_MODEL = "h100"


@dataclass(frozen=True, slots=True)
class Scenario:
    """A workload and the size of the fleet.

    Attributes:
        servers: Number of servers.
        seeds: Number of seeds.
        workload: What is written.
        draw: Random seed of the texts and their lengths.
    """

    servers: int
    seeds: int
    workload: Workload
    draw: int = 0

    @property
    def drafts(self) -> int:
        """Contexts to write."""
        return self.seeds * self.workload.drafts

    @property
    def urls(self) -> list[str]:
        """URLs of the servers: first the `slow` ones, last the flapping and the dying one."""
        return [f"http://gpu-{number:02}:30000" for number in range(self.servers)]

    @property
    def slow(self) -> int:
        """Number of servers at half speed: an eighth of all in a faulty fleet."""
        return self.servers // 8 if self.workload.faulty else 0

    def speed(self, number: int) -> float:
        """Return the relative speed of a server; 1 is nominal."""
        return 0.5 if number < self.slow else 1.0

    def kind(self, number: int) -> str:
        """Return the kind of a server: usual, slow, flapping or dying."""
        if not self.workload.faulty:
            return "usual"
        special = {self.servers - 2: "flapping", self.servers - 1: "dying"}
        return special.get(number, "slow" if number < self.slow else "usual")

    @property
    def config(self) -> SimulatorConfig:
        """The simulator's configuration, the same for each server."""
        return SimulatorConfig(
            cost_model=COST_MODEL, slots=self.workload.slots, words=self.workload.words, seed=self.draw
        )

    def requests_per_s(self) -> float:
        """Return the capacity of one server at nominal speed in requests a second, from the cost model."""
        model = self.config.batching
        assert model is not None
        return costs.capacity(model, *tokens_of_a_request(self))

    def dies_at_s(self) -> float:
        """Return when the dying server dies: half of the time that all requests should take, in seconds."""
        speeds = sum(self.speed(number) for number in range(self.servers))
        return self.drafts / (self.requests_per_s() * speeds) / 2

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
        servers = {url: Simulation(self.config) for url in self.urls}
        if self.workload.sigma:
            for number, simulation in enumerate(servers.values()):
                # the simulator has no such setting
                simulation._prose = VariedProse(number + 1000 * self.draw, self.workload.sigma)  # noqa: SLF001
        return InProcessServers(servers, timelines)


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
    answers: int = 0
    retracted: int = 0
    real_s: float = 0.0

    @property
    def settled_s(self) -> float:
        """When the window begins."""
        return min(SETTLED_S, self.left_s / 2)

    def window(self, scenario: Scenario) -> float:
        """Return the tokens written in the window, as a share of capacity; NaN if all began at once."""
        capacity = scenario.capacity(self.settled_s, self.left_s)
        return self.between(self.settled_s, self.left_s) / capacity if capacity else math.nan

    def whole(self, scenario: Scenario) -> float:
        """Return the tokens written in the whole run, as a share of capacity."""
        return self.between(0, self.ended_s) / scenario.capacity(0, self.ended_s)

    def cap_range(self, scenario: Scenario) -> tuple[int, int]:
        """Return the lowest and the highest cap of a usual server within the window."""
        usual = [url for number, url in enumerate(scenario.urls) if scenario.kind(number) == "usual"]
        caps = [
            cap for url in usual for at, cap in self.caps[url] if self.settled_s <= at <= self.left_s
        ] or [self.caps[usual[0]][-1][1]]
        return min(caps), max(caps)

    def between(self, from_s: float, to_s: float) -> int:
        """Return the tokens written between two times."""
        before = [count for at, count in self.written if at <= from_s]
        until = [count for at, count in self.written if at <= to_s]
        return (until[-1] if until else 0) - (before[-1] if before else 0)


@cache
def tokens_of_a_request(scenario: Scenario) -> tuple[int, int, int]:
    """Return the tokens of a prompt, of its cached part and of an answer, as the simulator counts them."""
    prompt, shared, request = sample_request(scenario)
    prose = VariedProse(0, scenario.workload.sigma) if scenario.workload.sigma else Prose(0)
    most, samples = request.sampling["max_tokens"], 2000 if scenario.workload.sigma else 200
    written = [min(most, len(prose.write(scenario.workload.words)) // 4) for _ in range(samples)]
    answer = scenario.workload.document_tokens or round(sum(written) / len(written))
    return len(prompt) // 4, len(shared) // 4, answer


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
        ("recipe.contexts_per_seed", scenario.workload.drafts),
        ("recipe.target_words", scenario.workload.words),
        ("checks.max_repetition", 1.0),
        ("assembly.write", False),
        ("fleet.servers", scenario.urls),
        ("fleet.request_timeout_s", 3600.0),
        ("fleet.max_attempts", 100),
        *scenario.workload.settings,
        *more,
    ]


def written(fleet: InProcessServers) -> int:
    """Return the tokens that all servers have written so far."""
    return sum(server.engine.load().generated_tokens or 0 for server in fleet.simulations.values())


def asked(fleet: InProcessServers) -> int:
    """Return the requests that all servers have answered or still hold."""
    servers = fleet.simulations.values()
    return sum(server.stats.answered + server.stats.in_flight for server in servers)


async def run_sampled(
    main: Coroutine[Any, Any, None],
    scenario: Scenario,
    fleet: InProcessServers,
    summary: RunSummary,
    out: Outcome,
) -> None:
    """Run `main` and record caps, queues and tokens in `out` each virtual second."""
    clock = asyncio.get_running_loop().time

    async def sample() -> None:
        while True:
            figures = summary.servers()
            out.written.append((clock(), written(fleet)))
            begun = summary.counters.outcomes + sum(
                server["in_flight"] + server["queued"] for server in figures
            )
            if not scenario.workload.document_tokens:  # without those that are being checked or written
                begun = max(begun, asked(fleet))
            if not out.left_s and begun >= scenario.drafts * 0.999:
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
    out.written.append((out.ended_s, written(fleet)))
    out.answers = sum(server.stats.answered for server in fleet.simulations.values())
    out.retracted = sum(server.stats.retracted for server in fleet.simulations.values())


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
    if summary.contexts != scenario.drafts:
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
    numbers = iter(range(scenario.drafts))

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
            out.written.append((out.ended_s, written(fleet)))
            sampler.cancel()

    fleet.run(main())
    out.real_s = time.perf_counter() - started
    return out


def plot(scenario: Scenario, outcomes: list[Outcome], path: Path) -> None:
    """Plot throughput over time, and the caps and queues of one server of each kind under `auto`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (above, middle, below) = pyplot.subplots(3, 1, sharex=True, figsize=(9, 9), layout="constrained")
    auto = outcomes[0]
    for outcome in outcomes:
        times = [at for at, _ in outcome.written][::10]
        shares = [outcome.between(at, at + 10) / scenario.capacity(at, at + 10) for at in times[:-1]]
        above.plot(times[:-1], shares, label=outcome.name, linewidth=2 if outcome is auto else 1)
    shown = {scenario.kind(number): number for number in range(scenario.servers)}
    for kind, number in sorted(shown.items()):
        url = scenario.urls[number]
        middle.plot(*zip(*auto.caps[url], strict=True), label=kind)
        below.plot(*zip(*auto.waiting[url], strict=True), label=kind)
    titles = ("share of capacity, each 10 s", "in-flight cap, auto", "requests queued at the server, auto")
    for axes, title in zip((above, middle, below), titles, strict=True):
        axes.axvline(auto.left_s, color="grey", linestyle=":")
        axes.set_ylabel(title)
    above.legend(loc="lower center", ncols=4)
    if len(shown) > 1:
        middle.legend(title="one server of each kind", loc="lower right")
    below.set_xlabel("virtual seconds; dotted line: no work left to start (auto)")
    figure.savefig(path, dpi=100)


def measure(
    name: str, servers: int, seeds: int, caps: tuple[int, ...], picture: Path | None = None, draw: int = 0
) -> bool:
    """Run a workload with `auto` and with fixed caps, and print a table. Return whether `auto` is good."""
    workload = WORKLOADS[name]
    scenario = Scenario(servers, seeds * servers, workload, draw)
    prompt, shared, answer = tokens_of_a_request(scenario)
    print(
        f"{name}: {servers} servers, {scenario.drafts} documents of {answer} tokens, prompts of {prompt} "
        f"({shared} shared); one server: {scenario.requests_per_s():.2f} documents/s"
    )
    print(f"{'':22}{'window':>8}{'whole':>8}{'retracted':>11}{'cap':>13}{'ended at':>10}{'wall':>8}")
    outcomes = []
    for cap in ("auto", *caps):
        outcomes.append(with_streamsyn(scenario, f"cap {cap}", [("fleet.concurrency", cap)]))
        print_row(scenario, outcomes[-1])
    auto, *fixed = outcomes
    if workload.faulty:
        print_row(scenario, with_a_loop(scenario, "round robin, 512", 512))
    if picture is not None:
        plot(scenario, outcomes, picture)
    return is_good(scenario, auto, fixed)


def print_row(scenario: Scenario, outcome: Outcome) -> None:
    """Print the figures of a variant."""
    caps = "-".join(map(str, outcome.cap_range(scenario))) if outcome.caps else ""
    retracted = f"{outcome.retracted / outcome.answers:.1%}" if outcome.answers else ""
    print(
        f"{outcome.name:22}{outcome.window(scenario):8.3f}{outcome.whole(scenario):8.3f}{retracted:>11}"
        f"{caps:>13}{outcome.ended_s:9.0f}s{outcome.real_s:7.0f}s",
        flush=True,
    )


def is_good(scenario: Scenario, auto: Outcome, fixed: list[Outcome]) -> bool:
    """Return whether `auto` meets the targets; each one that it misses is printed."""
    wanted = (0.95, 0.0 if scenario.workload.faulty else 0.9)
    if scenario.workload.pool_bound:
        wanted = (
            max((outcome.window(scenario) for outcome in fixed), default=0.0),
            max((outcome.whole(scenario) for outcome in fixed), default=0.0),
        )
    lowest, highest = auto.cap_range(scenario)
    targets = {
        f"window at least {wanted[0]:.3f}": auto.window(scenario) >= wanted[0],
        f"whole run at least {wanted[1]:.3f}": auto.whole(scenario) >= wanted[1],
        "retractions under 5 %": auto.retracted < 0.05 * auto.answers,
        "no cap below half of the highest": lowest >= highest / 2,
    }
    missed = [target for target, is_met in targets.items() if not is_met]
    print(f"auto misses: {', '.join(missed)}\n" if missed else "auto meets all targets\n", flush=True)
    return not missed


def main() -> int:
    """Run workloads and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("workload", nargs="?", choices=list(WORKLOADS), default="default")
    parser.add_argument("--servers", type=int, help="default: 1, and 64 for `faulty`")
    parser.add_argument("--seeds", type=int, help="seeds for each server")
    parser.add_argument("--caps", type=int, nargs="*", help="fixed caps to compare with")
    parser.add_argument("--draw", type=int, default=0, help="random seed of the texts and their lengths")
    parser.add_argument("--plot", type=Path, help="where to save the picture")
    parser.add_argument("--all", action="store_true", help="all workloads, with 1, 8 and 64 servers; hours")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    args = parser.parse_args()
    configure_logs(as_json=False, level=logging.ERROR)
    if not args.all:
        workload = WORKLOADS[args.workload]
        caps = QUICK_CAPS if args.workload == "default" else workload.caps
        caps = caps if args.caps is None else tuple(args.caps)
        servers = args.servers or (64 if workload.faulty else 1)
        good = measure(args.workload, servers, args.seeds or workload.seeds, caps, args.plot, args.draw)
        return int(args.check and not good)
    found = []
    for name, workload in WORKLOADS.items():
        for servers in (64,) if workload.faulty else (1, 8, 64):
            caps = (
                workload.caps
                if servers == 1 or workload.faulty
                else workload.caps[len(workload.caps) // 2 :][:1]
            )
            seeds = workload.seeds if servers < 64 else workload.seeds // 4
            found.append(measure(name, servers, args.seeds or seeds, caps))
    return int(args.check and not all(found))


if __name__ == "__main__":
    sys.exit(main())
