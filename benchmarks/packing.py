"""How full rows are, and how long ranks wait for the slowest one, by the way in which samples are packed.

    python -m benchmarks.packing [--steps 400] [--held 512] [--ranks 8]

No model runs: the time of a row is that of Llama 3.1 8B with recomputed activations, 8 * 7.5e9 FLOP a token
and 8 * 32 * 4096 times the squared length of each sample. Ranks wait for each other in every pass, as with
FSDP2.
Lengths are drawn from five distributions. Four ways choose the rows of a step from `--held` samples:

    one by one    samples in random order, each into the open row that it fills best, until one fits into
                  none: what streamsyn did before
    best fit      random rows of all that is held, packed by best-fit decreasing
    bounded       the same with rows that cost at most 1.3 times as much as the mean sample filling them
    by cost       rows of all that is held that are near to each other in cost: what streamsyn does

Each line has the mean fill of rows, the fill that nine of ten steps reach, the share of the ranks' time spent
waiting, and the CPU time of packing a step.
"""

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from statistics import fmean, quantiles

import numpy

from streamsyn.trainer.examples import Example, Key, PackedRow
from streamsyn.trainer.stream.packing import Packer, balanced, cost

TOKENS = numpy.zeros(131_072, dtype=numpy.int32)
Lengths = Callable[[random.Random], int]
Steps = Iterator[Sequence[PackedRow]]
Packing = Callable[[Iterator[Example], int, int, int], Steps]
"""The steps of a stream of samples; takes the rows of a step, their tokens, and how many samples to hold."""


def chat_and_books(rng: random.Random) -> int:
    """One long sample for ten short ones."""
    return int(rng.uniform(24_000, 32_000) if rng.random() < 1 / 11 else rng.uniform(300, 3000))


def log_uniform(low: int, high: int) -> Lengths:
    """Lengths that are even on a logarithmic scale."""
    return lambda rng: int(low * math.exp(rng.random() * math.log(high / low)))


DISTRIBUTIONS: dict[str, tuple[int, Lengths]] = {
    "about 8k (the paper), rows of 32k": (
        32_768,
        lambda rng: int(min(32_768, max(2000, rng.gauss(8500, 2500)))),
    ),
    "log-uniform 1k to 32k, rows of 32k": (32_768, log_uniform(1000, 32_768)),
    "log-uniform 8k to 128k, rows of 128k": (131_072, log_uniform(8000, 131_072)),
    "uniform 16k to 64k, rows of 64k": (65_536, lambda rng: int(rng.uniform(16_000, 65_536))),
    "chat, one in eleven 30k, rows of 32k": (32_768, chat_and_books),
}


def stream(lengths: Lengths) -> Iterator[Example]:
    """Samples without end."""
    rng = random.Random(0)
    for number in count():
        yield Example(Key("run", 0, number), "", "", TOKENS[: lengths(rng)], 1)


def one_by_one(samples: Iterator[Example], rows: int, seq_len: int, held: int) -> Steps:
    rng, waiting = random.Random(1), [next(samples) for _ in range(held)]
    opened: list[list[Example]] = [[] for _ in range(rows)]
    while True:
        place = rng.randrange(held)
        drawn, waiting[place] = waiting[place], next(samples)
        room = [seq_len - sum(one.length for one in row) for row in opened]
        fitting = [row for row in range(rows) if room[row] >= drawn.length]
        if not fitting:
            yield [tuple(row) for row in opened]
            opened, fitting, room = [[] for _ in range(rows)], [0], [seq_len] * rows
        opened[min(fitting, key=lambda row: (room[row], cost(opened[row])))].append(drawn)


def random_rows(bound: float) -> Packing:
    """Random rows of all that is held; `bound` limits their cost, in that of mean samples filling a row."""

    def steps(samples: Iterator[Example], rows: int, seq_len: int, held: int) -> Steps:
        rng, waiting = random.Random(1), [next(samples) for _ in range(held)]
        while True:
            most = bound * seq_len * cost(waiting) / sum(one.length for one in waiting)
            packed: list[list[Example]] = []
            room: list[int] = []
            costs: list[int] = []
            for one in sorted(waiting, key=lambda one: one.length, reverse=True):
                fitting = [at for at, left in enumerate(room) if left >= one.length]
                fitting = [at for at in fitting if costs[at] + one.length**2 <= most]
                best = min(fitting, key=room.__getitem__, default=len(packed))
                if best == len(packed):
                    packed.append([])
                    room.append(seq_len)
                    costs.append(0)
                packed[best].append(one)
                room[best] -= one.length
                costs[best] += one.length**2
            chosen = rng.sample(packed, rows)
            taken = {one.key for row in chosen for one in row}
            waiting = [one for one in waiting if one.key not in taken]
            waiting += [next(samples) for _ in taken]
            yield [tuple(row) for row in chosen]

    return steps


def by_cost(samples: Iterator[Example], rows: int, seq_len: int, held: int) -> Steps:
    packer = Packer(rows, seq_len, 1, held)
    while True:
        while not packer.is_full:
            packer.put(next(samples))
        taken = packer.take()
        assert taken is not None, "a full packer fills a step"
        yield taken


WAYS: dict[str, Packing] = {
    "one by one": one_by_one,
    "best fit": random_rows(math.inf),
    "bounded": random_rows(1.3),
    "by cost": by_cost,
}


def flops(row: PackedRow) -> float:
    """What a row costs, forward and backward."""
    return sum(8 * 7.5e9 * one.length + 8 * 32 * 4096 * one.length**2 for one in row)


def idle(rows: Sequence[PackedRow], ranks: int) -> float:
    """The share of the ranks' time in which they wait for the slowest one."""
    times = [flops(row) for row in balanced(rows, ranks)]
    passes = [times[begin : begin + ranks] for begin in range(0, len(times), ranks)]
    return 1 - sum(times) / (ranks * sum(map(max, passes)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="steps of each measurement, after 20 others")
    parser.add_argument("--held", type=int, default=512, help="samples held (train.shuffle_size)")
    parser.add_argument("--ranks", type=int, default=8)
    given = parser.parse_args()
    for name, (seq_len, lengths) in DISTRIBUTIONS.items():
        for rows in (given.ranks, 4 * given.ranks):
            print(f"{name}; {rows} rows on {given.ranks} ranks")
            for way, packing in WAYS.items():
                steps, fills, idles = packing(stream(lengths), rows, seq_len, given.held), [], []
                began = time.process_time()
                for number in range(20 + given.steps):
                    step = next(steps)
                    if number >= 20:
                        fills.append(sum(one.length for row in step for one in row) / (rows * seq_len))
                        idles.append(idle(step, given.ranks))
                took = (time.process_time() - began) / (20 + given.steps)
                print(
                    f"    {way:12} fill {fmean(fills):6.1%} ({quantiles(fills, n=10)[0]:.1%})   "
                    f"waiting {fmean(idles):6.1%}   {1000 * took:.1f} ms"
                )


if __name__ == "__main__":
    main()
