"""What looking for near-duplicates and leaks costs, in time of one core, memory and disk.

    python -m benchmarks.repeats FOLDER [--contexts 100000] [--runs 10000000] [--words 2000]

Texts are of random words. First `--contexts` contexts of 200 words each go through `Duplicates`, none like
another, so all are kept; then an evaluation set with so many runs of 13 words is made in FOLDER and loaded,
and texts of `--words` words, which have nothing of it, are compared with it.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import orjson
import psutil

from streamsyn.scoring.contamination import EvalSets
from streamsyn.scoring.duplicates import Duplicates
from streamsyn.shingles import signature

VOCABULARY = ["".join(random.Random(number).choices("abcdefghijklmnop", k=6)) for number in range(50_000)]
ROW_WORDS = 5000


def text(chance: numpy.random.Generator, words: int) -> str:
    """Words without sense."""
    return " ".join([VOCABULARY[number] for number in chance.integers(0, len(VOCABULARY), words).tolist()])


def memory_mib() -> float:
    """What this process has in memory."""
    return float(psutil.Process().memory_info().rss) / 2**20


def per_call_us(act: Callable[[str], object], texts: list[str]) -> float:
    """Processor time of one call."""
    started = time.process_time()
    for each in texts:
        act(each)
    return (time.process_time() - started) / len(texts) * 1e6


def duplicates(folder: Path, contexts: int) -> None:
    path = folder / "duplicates.sqlite"
    path.unlink(missing_ok=True)
    chance = numpy.random.default_rng(1)
    before, index = memory_mib(), Duplicates(path, 0.8)
    wall, cpu, longest = 0.0, 0.0, 0.0
    for number in range(contexts):
        new = text(chance, 200)
        started, worked = time.perf_counter(), time.process_time()
        index.check_and_add(f"seed-{number}", new)
        cpu += time.process_time() - worked
        took = time.perf_counter() - started
        wall, longest = wall + took, max(longest, took)
    print(
        f"{contexts} contexts: {cpu / contexts * 1e6:.0f} us of processor each, "
        f"{wall / contexts * 1e6:.0f} us elapsed, the longest {longest * 1e3:.0f} ms; "
        f"{memory_mib() - before:.0f} MiB of memory"
    )
    index.close()
    print(f"on disk: {path.stat().st_size / contexts:.0f} bytes a context")


def leaks(folder: Path, runs: int, words: int) -> None:
    chance = numpy.random.default_rng(2)
    path = folder / "set.jsonl"
    with path.open("wb") as file:
        for _ in range(runs // (ROW_WORDS - 12)):
            file.write(orjson.dumps({"context": text(chance, ROW_WORDS)}) + b"\n")
    before, started, worked = memory_mib(), time.perf_counter(), time.process_time()
    sets = EvalSets([str(path)], 13)
    print(
        f"{len(sets)} runs from {path.stat().st_size / 2**20:.0f} MiB: "
        f"{time.process_time() - worked:.1f} s of processor, {time.perf_counter() - started:.1f} s elapsed; "
        f"{memory_mib() - before:.0f} MiB of memory, {_peak_mib() - before:.0f} MiB at most"
    )
    texts = [text(chance, words) for _ in range(300)]
    print(f"overlap of {words} words: {per_call_us(sets.overlap, texts):.0f} us of processor")
    print(f"signature of {words} words: {per_call_us(signature, texts):.0f} us of processor")


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text().split()
    return float(status[status.index("VmHWM:") + 1]) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contexts", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=10_000_000)
    parser.add_argument("--words", type=int, default=2000)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    duplicates(options.folder, options.contexts)
    leaks(options.folder, options.runs, options.words)


if __name__ == "__main__":
    main()
