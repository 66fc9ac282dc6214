"""Exporting a log of 100,000 contexts to Parquet at 32k tokens a sample: speed, and memory over time.

    python -m benchmarks.export [--contexts 100000] [--samples 100000] [--target-tokens 32768]
        [--format parquet] [--folder DIR] [--check]

The log is written with the sink itself, of texts as the simulator writes them (about 2,000 words each, a
token is four characters, ten tasks): a run over it would take longer and write the same rows. Then
`streamsyn export` runs as a process of its own, and this one looks at its memory twice a second. Flat means:
the peak of the whole export is near that of its first tenth.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil

from benchmarks.resume import context_of
from streamsyn.assembly.resources import AssemblyResources
from streamsyn.config.fingerprint import fingerprint, with_absolute_paths
from streamsyn.config.loading import Config
from streamsyn.records import Context, Seed
from streamsyn.simulator.prose import Prose
from streamsyn.sink.log import RunLog
from streamsyn.sink.rundir import RunDirectory

TASKS = 10
ALLOWED_GROWTH = 1.15


def make(out: Path, contexts: int, words: int) -> int:
    """Write a finished log of so many contexts; the bytes of their texts."""
    config = Config()
    directory, prose = RunDirectory(out), Prose(0)
    directory.save(
        with_absolute_paths(config),
        {**fingerprint(config), **AssemblyResources(config.assembly).fingerprint()},
    )
    log = RunLog(out, config.sink)
    batch: list[Context] = []
    written = 0
    for number in range(contexts):
        seed = Seed(
            f"seed-{number}", f"task-{number % TASKS}", f"Question {number}?", f"Answer {number * 7919}", ""
        )
        text = prose.write(words)
        written += len(text)
        batch.append(replace(context_of(seed), context=text, completion_tokens=len(text) // 4))
        if len(batch) == 256 or number == contexts - 1:
            log.append(batch)
            batch.clear()
    log.seal_outcomes()
    log.finish()
    log.close()
    directory.close()
    return written


def watched(command: list[str]) -> tuple[float, float, list[float], str]:
    """Run a command to its end: seconds, CPU seconds, its memory in MiB over time, what it said."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    looked_at = psutil.Process(process.pid)
    memory: list[float] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            if rss := looked_at.memory_info().rss:  # none of one that has just ended
                memory.append(rss / 2**20)

    looking = threading.Thread(target=look)
    looking.start()
    assert process.stdout is not None
    said = process.stdout.read()
    used = looked_at.cpu_times()
    ended.set()
    looking.join()
    if process.wait():
        raise RuntimeError(f"exit code {process.returncode}")
    return time.perf_counter() - started, used.user + used.system, memory, said


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=100_000, help="as many as the disk has room for")
    parser.add_argument("--words", type=int, default=2000)
    parser.add_argument("--target-tokens", type=int, default=32_768)
    parser.add_argument("--format", default="parquet", choices=["jsonl", "parquet", "datasets"])
    parser.add_argument("--folder", type=Path, help="where there is room; by default that of temporary files")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        run, to = Path(name) / "run", Path(name) / "export"
        started = time.perf_counter()
        text_bytes = make(run, given.contexts, given.words)
        seconds = time.perf_counter() - started
        print(f"log: {given.contexts:,} contexts, {text_bytes / 1e9:.2f} GB of text, in {seconds:.0f} s")
        command = [sys.executable, "-m", "streamsyn", "export", str(run), "--to", str(to)]
        command += ["--format", given.format, "--limit", str(given.samples)]
        command += ["--target-tokens", str(given.target_tokens)]
        wall_s, cpu_s, memory, said = watched(command)
        files = [path for path in (to / "data").rglob("*") if path.is_file()] or [*to.glob("*.arrow")]
        size = sum(path.stat().st_size for path in files)
    print(said.splitlines()[0].rpartition(": ")[2])
    samples = min(given.samples, given.contexts)
    # A sample's text is four characters a token, and reaches its target with its last passage.
    text = samples * (given.target_tokens + text_bytes / given.contexts / 8) * 4
    print(
        f"{samples:,} samples of {given.target_tokens:,} tokens, about {text / 1e9:.2f} GB of text -> "
        f"{size / 1e9:.2f} GB in {len(files)} files"
    )
    print(
        f"{wall_s:.1f} s ({cpu_s:.1f} s of CPU): {samples / wall_s:,.0f} samples/s, "
        f"{text / wall_s / 1e6:.0f} MB/s of text, {text / cpu_s / 1e6:.0f} MB a second of CPU"
    )
    tenth = max(memory[: max(1, len(memory) // 10)])
    peak = max(memory)
    at = [memory[round(share * (len(memory) - 1))] for share in (0.1, 0.25, 0.5, 0.75, 1)]
    print(f"RSS at 10, 25, 50, 75, 100 %: {', '.join(f'{mib:.0f}' for mib in at)} MiB")
    print(f"RSS, peak: first tenth {tenth:.0f} MiB, all {peak:.0f} MiB, {peak / tenth:.2f} times that")
    return int(given.check and peak > ALLOWED_GROWTH * tenth)


if __name__ == "__main__":
    sys.exit(main())
