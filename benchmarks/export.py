"""Export 100,000 contexts to Parquet in samples of 32k tokens: speed, and memory over time.

    python -m benchmarks.export [--contexts 100000] [--samples 100000] [--target-tokens 32768]
        [--format parquet] [--workers N] [--folder DIR] [--check]
    python -m benchmarks.export --speedup 2 [--rounds 2]     in under a minute on two idle cores

The log is written directly by the sink, with the simulator's texts (about 2,000 words each, ten tasks; one
token is counted as four characters). A run would write the same rows but take longer. `streamsyn export`
then runs in its own process, and its memory is sampled twice a second. With --check the exit code is 1 when
the peak exceeds `ALLOWED_GROWTH` times the peak of the first tenth.

With --speedup N the same log, of 6,000 contexts, is exported by one process and by N, in turn: wall time,
CPU time, and whether the files are the same. Other programs take cores from it: the load is printed.
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from benchmarks.resume import context_of
from streamsyn.assembly.resources import AssemblyResources
from streamsyn.config.fingerprint import fingerprint, with_absolute_paths
from streamsyn.config.loading import Config
from streamsyn.records import Context, Seed
from streamsyn.simulator.texts import Prose
from streamsyn.sink.log import RunLog
from streamsyn.sink.rundir import RunDirectory

TASKS = 10
SPEEDUP_CONTEXTS = 6000
"""Enough for more than one process: `streamsyn export` takes one for a log below 64 MiB."""
ALLOWED_GROWTH = 1.15


def make(out: Path, contexts: int, words: int) -> int:
    """Write a finished log of `contexts` contexts of `words` words; return the total characters of text."""
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


def run_watched(command: list[str]) -> tuple[float, float, list[float], str]:
    """Run a command and return its seconds, and of all its processes the CPU seconds, memory samples in MiB
    and stdout.

    Raises:
        RuntimeError: The exit code is not 0.
    """
    started = time.perf_counter()
    command_run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watched = psutil.Process(command_run.pid)
    memory: list[float] = []
    ended = threading.Event()

    def sample_memory() -> None:
        while not ended.wait(0.5):
            rss = 0
            with suppress(psutil.NoSuchProcess):  # one of them has just exited
                for process in (watched, *watched.children(recursive=True)):
                    rss += process.memory_info().rss
            if rss:
                memory.append(rss / 2**20)

    sampler = threading.Thread(target=sample_memory)
    sampler.start()
    assert command_run.stdout is not None
    stdout = command_run.stdout.read()
    used = watched.cpu_times()
    ended.set()
    sampler.join()
    if command_run.wait():
        raise RuntimeError(f"exit code {command_run.returncode} from: {' '.join(command)}")
    cpu_s = used.user + used.system + used.children_user + used.children_system
    return time.perf_counter() - started, cpu_s, memory, stdout


def speedup(command: list[str], folder: Path, workers: int, rounds: int) -> int:
    """Export with one process and with `workers`, in turn; print the times; return 1 if the files differ."""
    found: dict[int, list[tuple[float, float]]] = {1: [], workers: []}
    digests = set()
    load = os.getloadavg()[0]
    for number in range(rounds):
        for processes, times in found.items():
            to = folder / f"export-{number}-{processes}"
            wall_s, cpu_s, _, _ = run_watched([*command, "--to", str(to), "--workers", str(processes)])
            times.append((wall_s, cpu_s))
            digests.add(digest_of(to))
    for processes, times in found.items():
        wall_s, cpu_s = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"--workers {processes}: {wall_s:.1f} s, {cpu_s:.1f} s of CPU (medians of {rounds})")
    ratio = statistics.median(one[0] / many[0] for one, many in zip(found[1], found[workers], strict=True))
    same = "the same files" if len(digests) == 1 else "DIFFERENT FILES"
    print(f"{ratio:.2f} times as fast with {workers}, {same}; load before: {load:.1f}")
    return int(len(digests) > 1)


def digest_of(export: Path) -> str:
    """Return a digest of the names and bytes of all rows of an export."""
    whole = hashlib.sha256()
    for path in sorted(path for path in export.rglob("*") if path.suffix in (".parquet", ".jsonl", ".arrow")):
        whole.update(str(path.relative_to(export)).encode())
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, help="contexts in the log; default: 100,000")
    parser.add_argument(
        "--samples", type=int, default=100_000, help="maximum samples to export; limited by disk space"
    )
    parser.add_argument("--words", type=int, default=2000, help="words a context")
    parser.add_argument("--target-tokens", type=int, default=32_768, help="tokens a sample")
    parser.add_argument("--format", default="parquet", choices=["jsonl", "parquet", "datasets"])
    parser.add_argument("--workers", type=int, default=1, help="processes of the export")
    parser.add_argument("--speedup", type=int, metavar="N", help="compare N processes with one")
    parser.add_argument("--rounds", type=int, default=2, help="of the comparison")
    parser.add_argument("--folder", type=Path, help="folder for the files; default: the system's")
    parser.add_argument("--check", action="store_true", help="exit with 1 when memory grows too much")
    args = parser.parse_args()
    args.contexts = args.contexts or (SPEEDUP_CONTEXTS if args.speedup else 100_000)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        run, to = Path(name) / "run", Path(name) / "export"
        started = time.perf_counter()
        text_bytes = make(run, args.contexts, args.words)
        seconds = time.perf_counter() - started
        print(f"log: {args.contexts:,} contexts, {text_bytes / 1e9:.2f} GB of text, in {seconds:.0f} s")
        command = [sys.executable, "-m", "streamsyn", "export", str(run), "--format", args.format]
        command += ["--limit", str(args.samples), "--target-tokens", str(args.target_tokens)]
        if args.speedup:
            return speedup(command, Path(name), args.speedup, args.rounds)
        command += ["--to", str(to), "--workers", str(args.workers)]
        wall_s, cpu_s, memory, stdout = run_watched(command)
        files = [path for path in (to / "data").rglob("*") if path.is_file()] or [*to.glob("*.arrow")]
        size = sum(path.stat().st_size for path in files)
    print(stdout.splitlines()[0].rpartition(": ")[2])
    samples = min(args.samples, args.contexts)
    # Four characters a token. The last context takes a sample past its target, by half a context on average.
    text = samples * (args.target_tokens + text_bytes / args.contexts / 8) * 4
    print(
        f"{samples:,} samples of {args.target_tokens:,} tokens, about {text / 1e9:.2f} GB of text -> "
        f"{size / 1e9:.2f} GB in {len(files)} files"
    )
    print(
        f"{wall_s:.1f} s ({cpu_s:.1f} s of CPU): {samples / wall_s:,.0f} samples/s, "
        f"{text / wall_s / 1e6:.0f} MB/s of text, {text / cpu_s / 1e6:.0f} MB a second of CPU"
    )
    tenth = max(memory[: max(1, len(memory) // 10)])
    peak = max(memory)
    readings = [memory[round(share * (len(memory) - 1))] for share in (0.1, 0.25, 0.5, 0.75, 1)]
    print(f"RSS after 10, 25, 50, 75, 100 % of the time: {', '.join(f'{mib:.0f}' for mib in readings)} MiB")
    print(f"peak RSS: {tenth:.0f} MiB in the first tenth, {peak:.0f} MiB in all ({peak / tenth:.2f} times)")
    return int(args.check and peak > ALLOWED_GROWTH * tenth)


if __name__ == "__main__":
    sys.exit(main())
