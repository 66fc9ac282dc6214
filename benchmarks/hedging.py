"""What hedged requests bring to the end of a run: simulated fleets in virtual time, with and without them.

    python -m benchmarks.hedging [--seeds 3000] [--words 500] [--repeats 5] [--share 0.05]

The same `streamsyn run` goes to eight in-process servers (`h100` costs, 64 slots) with `fleet.hedge_tail`
off and at `--share`. Fleets: equal servers; one server at 0.3 of the speed; answers whose lengths vary
(log-normal, sigma 0.5); both. The tail is the time from when no work is left to start to the end of the run.
Each workload is repeated with other texts. A second try draws a new length, as a sampling model does.
"""

import argparse
import asyncio
import logging
import statistics
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.common import VariedProse, seeds_file
from streamsyn.config.loading import load
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.summary import RunSummary
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.telemetry import Counters, configure_logs

SERVERS = 8
SLOTS = 64
SLOW = 0.3
SIGMA = 0.5


def fleet(words: int, seed: int, *, slow: bool, varied: bool) -> InProcessServers:
    """Return new servers; `seed` determines their texts."""
    servers = {}
    for number in range(SERVERS):
        speed = SLOW if slow and number == 0 else 1.0
        config = SimulatorConfig(
            cost_model="h100", words=words, seed=100 * seed + number, speed=speed, slots=SLOTS
        )
        simulation = servers[f"http://gpu-{number}:30000"] = Simulation(config)
        if varied:
            simulation._prose = VariedProse(config.seed, SIGMA)  # noqa: SLF001 - the simulator has no such setting
    return InProcessServers(servers)


def run_once(
    servers: InProcessServers, seeds: int, words: int, seed: int, hedge: float
) -> tuple[float, float, int]:
    """Return the seconds of the run, those of its tail, and the requests that the servers received."""
    times = {"left": 0.0, "ended": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        settings: list[tuple[str, Any]] = [
            ("recipe.target_words", words),
            ("recipe.max_tokens", 16 * words),
            ("checks.min_words", 1),
            ("checks.max_repetition", 1.0),
            ("assembly.write", False),
            ("fleet.servers", list(servers.simulations)),
            ("fleet.request_timeout_s", 3600.0),
            ("fleet.hedge_tail", hedge),
            ("seeds.sources", [{"path": str(seeds_file(Path(folder), seeds))}]),
        ]
        summary = RunSummary(Path(folder) / "out", Counters())

        async def timed(main: Coroutine[Any, Any, None]) -> None:
            clock = asyncio.get_running_loop().time

            async def watch() -> None:
                while True:
                    figures = summary.servers()
                    held = sum(one["completions"] + one["in_flight"] + one["queued"] for one in figures)
                    if not times["left"] and held >= seeds * 0.999:
                        times["left"] = clock()
                    await asyncio.sleep(0.1)

            watching = asyncio.create_task(watch())
            await main
            watching.cancel()
            times["ended"] = clock()

        config = load(None, settings)
        request = RunRequest(
            config=config,
            out=summary.out,
            connect=servers.connect,
            runner=lambda main: servers.run(timed(main)),
            rng=Random(seed),
            show_progress=False,
            preflight=False,
        )
        run(request, summary)
    asked = sum(server.stats.requests for server in servers.simulations.values())
    return times["ended"], times["ended"] - times["left"], asked


def main() -> None:
    """Run all fleets and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3000)
    parser.add_argument("--words", type=int, default=500)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    configure_logs(as_json=False, level=logging.ERROR)
    print(
        f"{'fleet':16}{'tail off':>10}{'tail on':>10}{'change of each repeat':>42}"
        f"{'run off':>10}{'run on':>10}{'more requests':>15}"
    )
    for name, slow, varied in (
        ("equal", False, False),
        ("one slow", True, False),
        ("varied", False, True),
        ("slow and varied", True, True),
    ):
        pairs = []
        for seed in range(args.repeats):
            pair = [
                run_once(
                    fleet(args.words, seed, slow=slow, varied=varied), args.seeds, args.words, seed, share
                )
                for share in (0.0, args.share)
            ]
            pairs.append(pair)
        tails = [statistics.mean(pair[way][1] for pair in pairs) for way in (0, 1)]
        runs = [statistics.mean(pair[way][0] for pair in pairs) for way in (0, 1)]
        changes = " ".join(f"{on[1] / off[1] - 1:+.0%}" for off, on in pairs)
        more = statistics.mean(on[2] - off[2] for off, on in pairs)
        print(
            f"{name:16}{tails[0]:9.1f}s{tails[1]:9.1f}s{changes:>42}{runs[0]:9.1f}s{runs[1]:9.1f}s{more:15.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
