"""Cost of the near-duplicate check and the leak check: CPU time, memory and disk.

    python -m benchmarks.repeats FOLDER [--contexts 100000] [--runs 10000000] [--words 2000]

Texts are random words. First `--contexts` contexts of 200 words go through `Duplicates`; none are similar,
so all are kept. Then an evaluation set with about `--runs` different 13-grams is written to FOLDER and
loaded, and texts of `--words` words that share no 13-gram with it are compared with it.
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


def text(rng: numpy.random.Generator, words: int) -> str:
    """Return `words` random words."""
    return " ".join([VOCABULARY[number] for number in rng.integers(0, len(VOCABULARY), words).tolist()])


def memory_mib() -> float:
    """Return the resident memory of this process in MiB."""
    return float(psutil.Process().memory_info().rss) / 2**20


def per_call_us(call: Callable[[str], object], texts: list[str]) -> float:
    """Return the mean CPU time of one call in microseconds."""
    started = time.process_time()
    for each in texts:
        call(each)
    return (time.process_time() - started) / len(texts) * 1e6


def duplicates(folder: Path, contexts: int) -> None:
    path = folder / "duplicates.sqlite"
    path.unlink(missing_ok=True)
    rng = numpy.random.default_rng(1)
    before, index = memory_mib(), Duplicates(path, 0.8)
    wall, cpu, longest = 0.0, 0.0, 0.0
    for number in range(contexts):
        new = text(rng, 200)
        started, worked = time.perf_counter(), time.process_time()
        index.check_and_add(f"seed-{number}", new)
        cpu += time.process_time() - worked
        took = time.perf_counter() - started
        wall, longest = wall + took, max(longest, took)
    print(
        f"{contexts} contexts: {cpu / contexts * 1e6:.0f} us of CPU each, "
        f"{wall / contexts * 1e6:.0f} us elapsed, at most {longest * 1e3:.0f} ms; "
        f"{memory_mib() - before:.0f} MiB of memory"
    )
    index.close()
    print(f"on disk: {path.stat().st_size / contexts:.0f} bytes a context")


def leaks(folder: Path, runs: int, words: int) -> None:
    rng = numpy.random.default_rng(2)
    path = folder / "set.jsonl"
    with path.open("wb") as file:
        for _ in range(runs // (ROW_WORDS - 12)):
            file.write(orjson.dumps({"context": text(rng, ROW_WORDS)}) + b"\n")
    before, started, worked = memory_mib(), time.perf_counter(), time.process_time()
    sets = EvalSets([str(path)], 13)
    print(
        f"{len(sets)} n-grams from {path.stat().st_size / 2**20:.0f} MiB: "
        f"{time.process_time() - worked:.1f} s of CPU, {time.perf_counter() - started:.1f} s elapsed; "
        f"{memory_mib() - before:.0f} MiB of memory, {_peak_mib() - before:.0f} MiB at the peak"
    )
    texts = [text(rng, words) for _ in range(300)]
    print(f"overlap of {words} words: {per_call_us(sets.overlap, texts):.0f} us of CPU")
    print(f"signature of {words} words: {per_call_us(signature, texts):.0f} us of CPU")


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text().split()
    return float(status[status.index("VmHWM:") + 1]) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="folder for the index and the evaluation set; created if missing"
    )
    parser.add_argument("--contexts", type=int, default=100_000, help="contexts to add")
    parser.add_argument("--runs", type=int, default=10_000_000, help="13-grams of the evaluation set")
    parser.add_argument("--words", type=int, default=2000, help="words of a compared text")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    duplicates(args.folder, args.contexts)
    leaks(args.folder, args.runs, args.words)


if __name__ == "__main__":
    main()
