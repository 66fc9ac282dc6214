"""The order of a stream and the rows of a step: a shuffle buffer, packing into rows, balance between ranks.

Pure functions of what goes in, and of the seed: no files, no clock.
"""

from collections.abc import Iterable, Sequence

from streamsyn.records import digest
from streamsyn.trainer.examples import Example, Key, PackedRow


class ShuffleBuffer:
    """Holds up to `size` examples and draws them in random order.

    What is drawn depends only on `seed`, the number of draws so far, and what is held, in its order.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = str(seed)
        self._held: list[Example] = []
        self.draws = 0
        """Draws made so far."""

    def __len__(self) -> int:
        return len(self._held)

    @property
    def is_full(self) -> bool:
        """Whether an example must be drawn before the next one is put in."""
        return len(self._held) >= self._size

    @property
    def tokens(self) -> int:
        """Tokens of all examples held."""
        return sum(example.length for example in self._held)

    def layout(self) -> list[Key]:
        """The keys of the examples held, in order."""
        return [example.key for example in self._held]

    def restore(self, held: Iterable[Example], draws: int) -> None:
        """Set what is held, and the number of draws made."""
        self._held = list(held)
        self.draws = draws

    def put(self, example: Example) -> None:
        """Add an example."""
        self._held.append(example)

    def draw(self) -> Example:
        """Remove an example and return it."""
        number = int.from_bytes(digest("draw", self._seed, str(self.draws))[:8])
        at = number % len(self._held)
        self.draws += 1
        drawn, last = self._held[at], self._held.pop()
        if at < len(self._held):
            self._held[at] = last
        return drawn


class Packer:
    """Packs whole examples into `rows` open rows of up to `seq_len` tokens, best fit.

    No example may be longer than `seq_len`.
    """

    def __init__(self, rows: int, seq_len: int) -> None:
        self._seq_len = seq_len
        self._rows: list[list[Example]] = [[] for _ in range(rows)]

    @property
    def tokens(self) -> int:
        """Tokens in all open rows."""
        return sum(map(_tokens, self._rows))

    def add(self, example: Example) -> list[PackedRow] | None:
        """Put an example into the row that it fills best.

        Returns:
            None. If it fits into no row: all rows, a full step; the example then starts the next one.
        """
        row = self._best_row(example)
        if row is not None:
            row.append(example)
            return None
        full = self.flush()
        self._rows[0].append(example)
        return full

    def flush(self) -> list[PackedRow]:
        """Return the open rows, some of which may be empty, and open new ones."""
        rows, self._rows = [tuple(row) for row in self._rows], [[] for _ in self._rows]
        return rows

    def layout(self) -> list[list[Key]]:
        """The keys in each open row, in order."""
        return [[example.key for example in row] for row in self._rows]

    def restore(self, layout: Sequence[Sequence[Example]]) -> bool:
        """Set the open rows. False, and nothing changes, if their number or length does not fit."""
        fits = all(_tokens(row) <= self._seq_len for row in layout)
        if len(layout) != len(self._rows) or not fits:
            return False
        self._rows = [list(row) for row in layout]
        return True

    def _best_row(self, example: Example) -> list[Example] | None:
        """The row with the least room left; among equals, the one with the least attention."""
        room = {at: self._seq_len - _tokens(row) for at, row in enumerate(self._rows)}
        fitting = [at for at in room if room[at] >= example.length]
        best = min(fitting, key=lambda at: (room[at], cost(self._rows[at]), at), default=None)
        return None if best is None else self._rows[best]


def balanced(rows: Sequence[PackedRow], ranks: int) -> tuple[PackedRow, ...]:
    """Order rows so that each rank has about the same attention cost, where row i is for rank i % `ranks`.

    The heaviest row goes to the rank with the least cost so far, among those with rows still to get (longest
    processing time first). Each rank's rows come heaviest first, so that the rows that ranks work on at the
    same time cost about the same. `ranks` divides the number of rows.
    """
    share = len(rows) // ranks
    assert share * ranks == len(rows), f"{len(rows)} rows cannot be divided among {ranks} ranks"
    given: list[list[PackedRow]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for row in sorted(rows, key=cost, reverse=True):
        rank = min((rank for rank in range(ranks) if len(given[rank]) < share), key=lambda rank: loads[rank])
        given[rank].append(row)
        loads[rank] += cost(row)
    return tuple(given[at % ranks][at // ranks] for at in range(len(rows)))


def cost(row: Sequence[Example]) -> int:
    """The cost of attention over a row, up to a factor: the sum of squared lengths."""
    return sum(example.length**2 for example in row)


def _tokens(row: Sequence[Example]) -> int:
    return sum(example.length for example in row)
