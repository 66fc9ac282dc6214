"""Time and peak memory to resume a run directory with 1,000,000 outcomes.

    python -m benchmarks.resume [--outcomes 1000000] [--more 200]

The sink writes the directory and leaves it as a kill would: with the last shard open. A run over the same
seeds and `--more` new ones then resumes it. The baseline is a run over `--more` seeds in a new directory.
"""

import argparse
import tempfile
import time
from pathlib import Path

import orjson

from benchmarks.common import Simulator, run_measured, seeds_file
from streamsyn.config.sections import FieldsSection, SinkSection
from streamsyn.io.rows import Line
from streamsyn.records import Context, Seed
from streamsyn.seeds.parse import SeedParser
from streamsyn.sink.log import RunLog
from streamsyn.sink.rundir import RunDirectory

TEXT = "The keeper climbed the stair at dusk and wrote the weather into the book. " * 8


def context_of(seed: Seed) -> Context:
    """Return a context of about 100 words as a run logs it."""
    return Context(
        id=seed.id,
        seed_id=seed.id,
        draft=0,
        task=seed.task,
        instruction=seed.instruction,
        answer=seed.answer,
        context=TEXT,
        model="simulated",
        server="http://127.0.0.1",
        weight_version="default",
        finish_reason="stop",
        prompt_tokens=500,
        cached_tokens=400,
        completion_tokens=130,
        wasted_tokens=0,
        attempts=[],
        steps=[],
        checks={"words": 112, "repetition": 0.0, "flags": []},
        origin=seed.origin,
        metadata={},
        written_at=time.time(),
    )


def make(out: Path, seeds: Path, outcomes: int) -> None:
    """Write a log with contexts for the first `outcomes` seeds."""
    directory, parser = RunDirectory(out), SeedParser(FieldsSection())
    log = RunLog(out, SinkSection())
    batch: list[Context] = []
    with seeds.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            seed = parser.line(Line(number, line, len(line)), str(seeds), seeds.stem, 1 << 20)
            assert isinstance(seed, Seed)
            batch.append(context_of(seed))
            if len(batch) == 256 or number == outcomes:
                log.append(batch)
                batch.clear()
            if number == outcomes:
                break
    log.close()
    directory.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outcomes", type=int, default=1_000_000, help="outcomes in the log")
    parser.add_argument("--more", type=int, default=200, help="new seeds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Simulator("--latency-ms", "0") as url:
        folder = Path(name)
        seeds, few = seeds_file(folder, args.outcomes + args.more), seeds_file(folder, args.more)
        started = time.perf_counter()
        make(folder / "out", seeds, args.outcomes)
        size = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
        seconds = time.perf_counter() - started
        print(f"made {args.outcomes:,} outcomes, {size / 2**20:,.0f} MiB, in {seconds:.0f} s")
        started = time.perf_counter()
        log = RunLog(folder / "out", SinkSection())
        print(f"opening the log: {time.perf_counter() - started:.2f} s, {log.outcomes:,} outcomes")
        log.close()
        options = ["--server", url, "--no-progress", "--set", "assembly.write=false"]
        fresh = run_measured("run", "--seeds", str(few), "--out", str(folder / "fresh"), *options)
        resumed = run_measured("run", "--seeds", str(seeds), "--out", str(folder / "out"), *options)
        final = orjson.loads((folder / "out" / "manifest.jsonl").read_bytes().splitlines()[-1])
        assert final["contexts"] == args.outcomes + args.more, final
    print(f"{'':34}{'seconds':>9}{'CPU s':>8}{'peak RSS MiB':>14}")
    for what, cost in (
        (f"{args.more} seeds, new directory", fresh),
        (f"the same after {args.outcomes:,} outcomes", resumed),
    ):
        print(f"{what:34}{cost.wall_s:9.2f}{cost.cpu_s:8.2f}{cost.peak_mib:14.1f}")


if __name__ == "__main__":
    main()
