"""The rows of a step: which of the examples held come next, packed into rows; balance between ranks.

Pure functions of what goes in, and of the seed: no files, no clock.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from random import Random

from streamsyn.records import digest
from streamsyn.trainer.examples import Example, Key, PackedRow


class Packer:
    """Holds examples and packs them into the rows of one step after the other.

    Each step is packed anew from all that is held: the longest example first, each into the row that it fills
    best (best-fit decreasing). A random row is taken, and with it those that are nearest to it in cost: the
    rows of a step cost about the same, so that no rank waits long for another. The other examples stay held.

    What is taken depends only on `seed`, the number of steps so far, and what is held, in its order.

    Args:
        rows: Rows of a step.
        seq_len: Maximum tokens of a row; no example may be longer.
        seed: Seed of the random choices.
        size: Number of examples to hold, in order to choose among them.
    """

    def __init__(self, rows: int, seq_len: int, seed: int, size: int) -> None:
        self._rows = rows
        self._seq_len = seq_len
        self._seed = str(seed)
        self._size = size
        self._held: list[Example] = []
        self.tokens = 0
        """Tokens of all examples held."""
        self.draws = 0
        """Steps packed so far."""

    def __len__(self) -> int:
        return len(self._held)

    @property
    def is_full(self) -> bool:
        """Whether enough examples are held: `size`, and as many as fill the rows of a step for sure."""
        return self.tokens > self._rows * self._seq_len and len(self._held) >= self._size

    def put(self, example: Example) -> None:
        """Hold an example."""
        self._held.append(example)
        self.tokens += example.length

    def take(self) -> list[PackedRow] | None:
        """Remove the examples of a full step and return its rows; None if too few are held to fill one."""
        rng = Random(digest("draw", self._seed, str(self.draws)))
        order = list(range(len(self._held)))
        rng.shuffle(order)  # examples of the same length come in random order
        packed = self._packed(order)
        del packed[-1:]  # it may still have much room
        if len(packed) < self._rows:
            return None
        chosen = self._nearest(packed, rng.randrange(len(packed)))
        return self._removed(chosen)

    def flush(self) -> list[PackedRow]:
        """Remove all examples and return them in the rows of one step, some of which may be empty.

        Call it when `take` returns None: then they fit.
        """
        packed = self._packed(range(len(self._held)))
        return self._removed([*packed, *[[]] * (self._rows - len(packed))])

    def layout(self) -> list[Key]:
        """The keys of the examples held, in order."""
        return [example.key for example in self._held]

    def restore(self, held: Iterable[Example], draws: int) -> None:
        """Set what is held, and the number of steps packed."""
        self._held = list(held)
        self.tokens = sum(example.length for example in self._held)
        self.draws = draws

    def _packed(self, order: Iterable[int]) -> list[list[int]]:
        """All examples held in rows, by their places in `_held`; only the last row may have much room."""
        lengths = [example.length for example in self._held]
        longest_first = sorted(order, key=lengths.__getitem__, reverse=True)
        rows: list[list[int]] = []
        room: list[tuple[int, int]] = []  # tokens left in each row, and its place in `rows`; sorted
        for at in longest_first:
            best = bisect_left(room, (lengths[at], 0))
            if best == len(room):
                left, row = self._seq_len, len(rows)
                rows.append([])
            else:
                left, row = room.pop(best)
            rows[row].append(at)
            insort(room, (left - lengths[at], row))
        return rows

    def _nearest(self, packed: Sequence[list[int]], drawn: int) -> list[list[int]]:
        """The row drawn and those that are nearest to it in cost: as many as a step has."""
        costs = [cost([self._held[at] for at in row]) for row in packed]
        by_cost = sorted(range(len(packed)), key=costs.__getitem__)
        place, rows = by_cost.index(drawn), self._rows
        begin = min(
            range(max(0, place + 1 - rows), min(place, len(packed) - rows) + 1),
            key=lambda first: costs[by_cost[first + rows - 1]] - costs[by_cost[first]],
        )
        return [packed[row] for row in by_cost[begin : begin + rows]]

    def _removed(self, rows: Sequence[list[int]]) -> list[PackedRow]:
        made = [tuple(self._held[at] for at in row) for row in rows]
        taken = {at for row in rows for at in row}
        self.restore((one for at, one in enumerate(self._held) if at not in taken), self.draws + 1)
        return made


def one_a_row(rows: Sequence[PackedRow], ranks: int) -> list[PackedRow]:
    """Give each sample a row of its own. Empty rows are added, so that each rank gets equally many.

    A step holds the same samples as with packed rows, and has the same loss.
    """
    singles: list[PackedRow] = [(example,) for row in rows for example in row]
    return [*singles, *[()] * (-len(singles) % ranks)]


def balanced(rows: Sequence[PackedRow], ranks: int) -> tuple[PackedRow, ...]:
    """Order rows so that ranks wait for each other as little as possible; row i is for rank i % `ranks`.

    The heaviest rows are worked on at the same time, then the next ones: with FSDP2, each pass takes as long
    as its heaviest row. Of the rows of a pass, a rank with less so far gets a heavier one: with DDP, ranks
    wait for each other in the last pass only. `ranks` divides the number of rows.
    """
    assert len(rows) % ranks == 0, f"{len(rows)} rows cannot be divided among {ranks} ranks"
    heaviest_first = sorted(rows, key=cost, reverse=True)
    ordered: list[PackedRow] = []
    loads = [0] * ranks
    for begin in range(0, len(rows), ranks):
        lightest_first = sorted(range(ranks), key=loads.__getitem__)
        of_pass = dict(zip(lightest_first, heaviest_first[begin : begin + ranks], strict=True))
        ordered += [of_pass[rank] for rank in range(ranks)]
        loads = [load + cost(of_pass[rank]) for rank, load in enumerate(loads)]
    return tuple(ordered)


def cost(row: Sequence[Example]) -> int:
    """The cost of attention over a row, up to a factor: the sum of squared lengths."""
    return sum(example.length**2 for example in row)
