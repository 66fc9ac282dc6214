"""streamsyn beside other software that sends prompts to servers and keeps the answers.

    python -m benchmarks.peers [--peers NAME ...] [--requests 2000] [--rounds 3]
        [--only rate busy kill memory] [--latency-ms 20]

The other software is installed first, in environments of its own in `.peers/` (3 GB). All send the same
prompts (those of the default recipe) to one simulated server, which answers with 150 words after 20 ms, 256
requests at a time. Each runs in its own process, with the settings that its documentation has for many
requests (`drivers/`).

Columns:

- CPU ms, of bare: CPU time a request, and divided by that of a bare aiohttp loop in the same round. It is the
  difference between a long and a short run (256 requests), so that starting does not count. Child processes
  count, in memory, too.
- rows/s, MiB, first s: rows a second (long minus short run), peak memory, and the time from the start of the
  process to its first request.
- 10x MiB: peak memory with ten times the rows.
- 503: rows missing at the end where one request in twenty gets a 503, and requests sent for a row.
- lost, doubled, sent again, again: after SIGKILL at 40 % of the answers, and the same command again: rows
  missing, rows written twice, requests that were sent by both, and answers that the server gave to both. What
  was in flight at the kill must be sent again: up to 256, and less where the software is the slow part.

Rounds interleave all peers; the figures are medians.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import orjson

from benchmarks.common import seeds_file
from benchmarks.peers.processes import GIVE_UP_S, PEERS, Ended, Peer, Run, Server, environment
from streamsyn.config.loading import load
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import Draft, Seed

MEASUREMENTS = ("rate", "busy", "kill", "memory")
SHORT = 256
KILLED_AT = 0.4
COLUMNS = (
    "CPU ms",
    "of bare",
    "rows/s",
    "MiB",
    "first s",
    "10x MiB",
    "503",
    "lost",
    "doubled",
    "sent again",
    "again",
)


class Measurements:
    """Makes the measurements and holds the figures.

    Args:
        peers: The bare loop, and whose figures are wanted.
        folder: For what they write.
        requests: Requests of a long run.
        concurrency: Requests at a time.
    """

    def __init__(self, peers: Sequence[Peer], folder: Path, requests: int, concurrency: int) -> None:
        self.figures: dict[str, dict[str, str]] = {peer.name: {} for peer in peers}
        self.faults: list[str] = []
        self._peers = peers
        self._folder = folder
        self._requests = requests
        self._concurrency = concurrency

    def rate(self, server: Server, rounds: int) -> None:
        """CPU time, rows/s, memory and the time to the first request."""
        costs: dict[str, list[tuple[Ended, Ended]]] = {peer.name: [] for peer in self._peers}
        for _ in range(rounds):
            for peer in self._peers:
                both = [self._ended(peer, server, number) for number in (SHORT, self._requests)]
                costs[peer.name].append((both[0], both[1]))
        more = self._requests - SHORT
        cpu = {
            name: [(long.cpu_s - short.cpu_s) / more * 1000 for short, long in pairs]
            for name, pairs in costs.items()
        }
        floor = cpu[self._peers[0].name]
        for name, pairs in costs.items():
            ratios = [mine / bare for mine, bare in zip(cpu[name], floor, strict=True)]
            rates = [more / (long.wall_s - short.wall_s) for short, long in pairs]
            self.figures[name] |= {
                "CPU ms": f"{statistics.median(cpu[name]):.2f}",
                "of bare": f"{statistics.median(ratios):.1f}",
                "rows/s": f"{statistics.median(rates):.0f}",
                "MiB": f"{statistics.median(long.peak_mib for _, long in pairs):.0f}",
                "first s": f"{statistics.median(long.first_s or 0 for _, long in pairs):.2f}",
            }

    def busy(self, server: Server) -> None:
        """Rows missing and requests a row, where some requests get a 503."""
        for peer in self._peers:
            if not peer.keeps:
                continue
            run = self._run(peer, server, self._requests)
            ended = run.to_end()
            if self._is_well(peer, "503", run, ended):
                missing = self._requests - len(run.numbers())
                self.figures[peer.name]["503"] = f"{missing}, {ended.arrived.total() / self._requests:.2f}"

    def kill(self, server: Server) -> None:
        """Rows lost and doubled, and answers given twice, after a kill and the same command again."""
        for peer in self._peers:
            if not peer.keeps:
                continue
            run = self._run(peer, server, self._requests)
            killed = run.to_end(killed_at=round(self._requests * KILLED_AT))
            ended = run.to_end()
            answered = killed.answered + ended.answered
            if self._is_well(peer, "lost", run, ended):
                written = run.numbers()
                self.figures[peer.name] |= {
                    "lost": str(self._requests - len(written)),
                    "doubled": str(written.total() - len(written)),
                    "sent again": str(len(killed.arrived.keys() & ended.arrived.keys())),
                    "again": str(answered.total() - len(answered)),
                }

    def memory(self, server: Server) -> None:
        """Peak memory with ten times the rows."""
        for peer in self._peers:
            if not peer.one_at_a_time:
                ended = self._ended(peer, server, self._requests * 10)
                self.figures[peer.name]["10x MiB"] = f"{ended.peak_mib:.0f}"

    def _run(self, peer: Peer, server: Server, number: int) -> Run:
        out = Path(tempfile.mkdtemp(dir=self._folder))
        return Run(peer, server, prompts_file(self._folder, number), out, self._concurrency)

    def _ended(self, peer: Peer, server: Server, number: int) -> Ended:
        run = self._run(peer, server, number)
        ended = run.to_end()
        self._is_well(peer, f"{number} requests", run, ended)
        return ended

    def _is_well(self, peer: Peer, what: str, run: Run, ended: Ended) -> bool:
        print(f"{peer.name}, {what}: {ended}", file=sys.stderr, flush=True)
        if ended.exit_code:
            how = "hangs" if ended.wall_s > GIVE_UP_S else f"exit {ended.exit_code}"
            self.figures[peer.name][what] = how
            self.faults.append(f"{peer.name}, {what}: {how}\n{run.last_lines()}")
        return not ended.exit_code


def prompts_file(folder: Path, number: int) -> Path:
    """Return a file with the prompts of `number` seeds as JSON strings; the seeds lie beside it."""
    place = folder / f"prompts-{number}"
    path = place / "prompts.jsonl"
    if path.exists():
        return path
    place.mkdir()
    seeds = seeds_file(place, number).rename(place / "seeds.jsonl")
    config = load(None, [("fleet.servers", ["http://127.0.0.1:1"])])
    recipe = load_recipe(config.recipe, config.checks)
    with path.open("wb") as file:
        for line in seeds.read_bytes().splitlines():
            seed = orjson.loads(line)
            draft = Draft(Seed("0", "seeds", seed["instruction"], seed["answer"], ""))
            messages = next(recipe.steps(draft)).messages
            file.write(orjson.dumps("\n\n".join(message["content"] for message in messages)) + b"\n")
    return path


def show(figures: dict[str, dict[str, str]]) -> None:
    """Print the table as Markdown."""
    print("| | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, row in figures.items():
        print(f"| {name} | " + " | ".join(row.get(column, "") for column in COLUMNS) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [peer.name for peer in PEERS[1:]]
    parser.add_argument("--peers", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--requests", type=int, default=2000, help="requests of a long run")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency-ms", default="20", help="of the simulated server")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    args = parser.parse_args()
    peers = [PEERS[0], *(peer for peer in PEERS[1:] if peer.name in args.peers)]
    for name in sorted({peer.environment for peer in peers if peer.environment is not None}):
        environment(name)
    with tempfile.TemporaryDirectory() as folder:
        made = Measurements(peers, Path(folder), args.requests, args.concurrency)
        latency = ("--latency-ms", args.latency_ms)
        with Server(*latency) as server:
            if "rate" in args.only:
                made.rate(server, args.rounds)
            if "kill" in args.only:
                made.kill(server)
            if "memory" in args.only:
                made.memory(server)
        if "busy" in args.only:
            with Server("--busy", "0.05", *latency) as server:
                made.busy(server)
    show(made.figures)
    print("\n".join(made.faults), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
