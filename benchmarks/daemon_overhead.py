"""What a run under the daemon costs beside `streamsyn run`, and how runs share a fleet.

    python -m benchmarks.daemon_overhead cost [--requests 4000] [--rounds 3]    CPU time a request
    python -m benchmarks.daemon_overhead shares                                 places by weight and priority

cost: the same seeds at the same simulator (20 ms), by `streamsyn run` and by one run of `streamsyn serve`.
Start-up does not count: CPU time a request is the difference between a long and a short run, divided by the
difference in requests. The daemon has accepted all seeds before the run goes on; what that costs is a column
of its own.

shares: whole runs at two simulated servers of 32 places each, in virtual time: requests take 1 s. Rates are
those of 60 s in which all runs have seeds.
"""

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from benchmarks.common import Simulator, run_measured, seeds_file
from benchmarks.daemon_load import cpu_s
from streamsyn.config.loading import load
from streamsyn.config.sections import FleetSection
from streamsyn.fleet.shared_servers import Servers, open_servers
from streamsyn.fleet.shares import PRIORITIES, Priority
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run_in_loop
from streamsyn.pipeline.stop import RunControl
from streamsyn.pipeline.summary import RunSummary
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.telemetry import Counters, configure_logs

SHORT = 256
PLACES = 32
URLS = ("http://one:1", "http://two:1")
MIXES: dict[str, list[tuple[float, Priority]]] = {
    "two, 1 : 1": [(1, "normal"), (1, "normal")],
    "two, 1 : 3": [(1, "normal"), (3, "normal")],
    "two, low and normal": [(1, "low"), (1, "normal")],
    "five, 1 : 1 : 2 : 4 : 8": [(1, "normal"), (1, "normal"), (2, "normal"), (4, "normal"), (8, "normal")],
    "five, low, 1, 1, 1, high": [(1, "low"), (1, "normal"), (1, "normal"), (1, "normal"), (1, "high")],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["cost", "shares"])
    parser.add_argument("--requests", type=int, default=4000, help="requests of a long run (more than 256)")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.what == "shares":
        shares()
    else:
        cost(args.requests, args.concurrency, args.rounds)


def cost(requests: int, concurrency: int, rounds: int) -> None:
    """Both, interleaved."""
    alone: list[float] = []
    hosted: list[float] = []
    accepting: list[float] = []
    simulator = Simulator("--latency-ms", "20", "--words", "150", "--slots", "4096")
    with tempfile.TemporaryDirectory() as name, simulator as url:
        folder = Path(name)
        for _ in range(rounds):
            used = [run_alone(url, folder, number, concurrency) for number in (SHORT, requests)]
            alone.append((used[1] - used[0]) / (requests - SHORT) * 1000)
            spent = [run_hosted(url, folder, number, concurrency) for number in (SHORT, requests)]
            hosted.append((spent[1].running - spent[0].running) / (requests - SHORT) * 1000)
            accepting.append((spent[1].accepting - spent[0].accepting) / (requests - SHORT) * 1000)
    ratios = [mine / other for mine, other in zip(hosted, alone, strict=True)]
    print(f"{requests} requests, concurrency {concurrency}, 20 ms, 150 words, {rounds} rounds")
    print(f"{'':30}{'CPU ms/request':>16}{'ratio':>8}{'least':>8}{'most':>8}")
    print(f"{'streamsyn run':30}{statistics.median(alone):16.3f}{1:8.2f}")
    print(
        f"{'a run under the daemon':30}{statistics.median(hosted):16.3f}{statistics.median(ratios):8.2f}"
        f"{min(ratios):8.2f}{max(ratios):8.2f}"
    )
    print(f"{'acceptance of its seeds':30}{statistics.median(accepting):16.3f}")


def run_alone(url: str, folder: Path, requests: int, concurrency: int) -> float:
    """CPU seconds of `streamsyn run`."""
    out = tempfile.mkdtemp(dir=folder)
    command = ["run", "--seeds", str(seeds_file(folder, requests)), "--out", out, "--server", url]
    return run_measured(*command, "--set", f"fleet.concurrency={concurrency}", "--no-progress").cpu_s


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds of the daemon's process."""

    accepting: float
    running: float


def run_hosted(url: str, folder: Path, requests: int, concurrency: int) -> Spent:
    """CPU seconds of a run under a new daemon."""
    with served(Path(tempfile.mkdtemp(dir=folder)), url, concurrency) as (process, daemon):
        return asyncio.run(_run_hosted(process, daemon, seeds_file(folder, requests).read_bytes()))


async def _run_hosted(process: psutil.Process, daemon: str, seeds: bytes) -> Spent:
    async with aiohttp.ClientSession(daemon, raise_for_status=True) as session:
        await session.post("/v1/runs", json={"id": "r"})
        await session.post("/v1/runs/r/pause")
        began = cpu_s(process)
        headers = {"Content-Type": "application/x-ndjson"}
        await session.post("/v1/runs/r/seeds", data=seeds, headers=headers)
        await session.post("/v1/runs/r/close")
        accepted = cpu_s(process)
        await session.post("/v1/runs/r/resume")
        state = ""
        while state != "finished":
            await asyncio.sleep(0.25)
            async with session.get("/v1/runs/r") as answer:
                state = (await answer.json())["state"]
        return Spent(accepted - began, cpu_s(process) - accepted)


@contextmanager
def served(root: Path, url: str, concurrency: int) -> Iterator[tuple[psutil.Process, str]]:
    """A daemon in a process of its own; yields the process and its URL."""
    command = [sys.executable, "-m", "streamsyn", "serve", str(root / "root"), "--server", url]
    command += ["--listen", "127.0.0.1:0", "--set", f"fleet.concurrency={concurrency}"]
    log = root / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        while (found := re.search(r"at (http://\S+)", log.read_text("utf-8"))) is None:
            time.sleep(0.1)
        yield psutil.Process(process.pid), found[1]
        process.terminate()
        process.wait()
    finally:
        process.kill()
        process.wait()


def shares() -> None:
    """Each mix of runs."""
    configure_logs(as_json=True, level=40)
    print(f"{'runs':28}{'share by weight':38}{'share achieved':38}{'places used':>12}")
    for name, mix in MIXES.items():
        with tempfile.TemporaryDirectory() as folder:
            rates = share(Path(folder), mix)
        weights = [weight * PRIORITIES[priority] for weight, priority in mix]
        wanted = "  ".join(f"{weight / sum(weights):6.1%}" for weight in weights)
        got = "  ".join(f"{rate / sum(rates):6.1%}" for rate in rates)
        print(f"{name:28}{wanted:38}{got:38}{sum(rates) / (PLACES * len(URLS)):12.1%}", flush=True)


def share(folder: Path, mix: list[tuple[float, Priority]]) -> list[float]:
    """Answers a second of each run."""
    simulations = {url: Simulation(SimulatorConfig(latency_ms=1_000)) for url in URLS}
    in_process = InProcessServers(simulations)
    summaries = [RunSummary(folder / str(number), Counters()) for number in range(len(mix))]
    rates: list[float] = []

    async def main() -> None:
        section = FleetSection(servers=URLS, concurrency=PLACES)
        controls = [RunControl() for _ in mix]
        async with open_servers(section, {}, in_process.connect) as servers, asyncio.TaskGroup() as group:
            for summary, control, (weight, priority) in zip(summaries, controls, mix, strict=True):
                asked = request(folder, servers, summary.out, control, weight, priority)
                group.create_task(run_in_loop(asked, summary), name=summary.out.name)
            await asyncio.sleep(20)
            before = [summary.counters.contexts for summary in summaries]
            await asyncio.sleep(60)
            after = [summary.counters.contexts for summary in summaries]
            rates.extend((now - was) / 60 for now, was in zip(after, before, strict=True))
            for control in controls:
                control.cancel("measured")

    in_process.run(main())
    return rates


def request(
    folder: Path, servers: Servers, out: Path, control: RunControl, weight: float, priority: Priority
) -> RunRequest:
    """A run with more seeds than it can finish meanwhile."""
    keys = {"seeds.sources": [{"path": str(seeds_file(folder, 6_000))}], "assembly.write": False}
    return RunRequest(
        config=load(None, keys.items()),
        out=out,
        servers=servers,
        weight=weight,
        priority=priority,
        control=control,
        handles_signals=False,
        show_progress=False,
    )


if __name__ == "__main__":
    main()
