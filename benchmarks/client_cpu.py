"""CPU time of the client an answer, by stage: can one process keep a fleet of hundreds of servers busy?

    python -m benchmarks.client_cpu [--seeds 2000] [--words 2000] [--servers 2] [--rounds 3]

Simulated servers with an H100's costs write the contexts in this process, in virtual time. Their own CPU time
is left out. The log is on. Start-up does not count: the difference between a long and a short run is divided
by the difference in answers. HTTP is not part of it; `benchmarks.overhead` measures that.

512 such servers write about 2,700 answers of 2,000 words a second: one core has 0.37 ms for each.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.common import seeds_file
from streamsyn.config.loading import load
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.summary import RunSummary
from streamsyn.simulator.cpu_time import SPENT
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.telemetry import Counters, configure_logs

SHARE_OF_SHORT = 0.2
VARIANTS: dict[str, tuple[str, Any]] = {
    "contexts only": ("assembly.write", False),
    "n = 1": ("assembly.contexts_per_sample", 1),
    "n = 10": ("assembly.contexts_per_sample", 10),
}


def cpu_of_run(variant: tuple[str, Any], seeds: int, words: int, servers: int) -> float:
    """Return the CPU seconds of a run without those of its servers."""
    fleet = InProcessServers(
        {
            f"http://gpu-{number}:30000": Simulation(
                SimulatorConfig(cost_model="h100", words=words, seed=number, slots=2048)
            )
            for number in range(servers)
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        config = load(
            None,
            [
                ("recipe.target_words", words),
                ("checks.max_repetition", 1.0),
                ("fleet.servers", list(fleet.simulations)),
                ("fleet.request_timeout_s", 3600.0),
                ("fleet.hedge_tail", 0.0),  # the end of a short run is most of it
                ("seeds.sources", [{"path": str(seeds_file(Path(folder), seeds))}]),
                variant,
            ],
        )

        def runner(main: Coroutine[Any, Any, None]) -> None:
            fleet.run(main)

        summary = RunSummary(Path(folder) / "out", Counters())
        request = RunRequest(
            config=config,
            out=summary.out,
            connect=fleet.connect,
            runner=runner,
            rng=Random(1),
            show_progress=False,
            preflight=False,
        )
        began_s = time.process_time() - SPENT.seconds
        run(request, summary)
        return time.process_time() - SPENT.seconds - began_s


def main() -> None:
    """Measure each variant and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2000, help="answers of a long run")
    parser.add_argument("--words", type=int, default=2000, help="words an answer")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    configure_logs(as_json=False, level=logging.ERROR)
    short = round(SHARE_OF_SHORT * args.seeds)
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name, variant in VARIANTS.items():
            least = cpu_of_run(variant, short, args.words, args.servers)
            most = cpu_of_run(variant, args.seeds, args.words, args.servers)
            found[name].append((most - least) / (args.seeds - short) * 1000)
    print(f"{args.words} words, {args.seeds} seeds, {args.servers} servers, median of {args.rounds} rounds")
    print(f"{'':20}{'CPU ms an answer':>18}{'answers/s of a core':>22}")
    for name, rounds in found.items():
        print(f"{name:20}{statistics.median(rounds):18.3f}{1000 / statistics.median(rounds):22,.0f}")


if __name__ == "__main__":
    main()
