"""Shuffling a stream: the next example is drawn from those that are held.

Packing: whole examples into rows of bounded length, and rows onto ranks of equal load.
"""

from collections.abc import Iterable, Sequence

from streamsyn.records import digest
from streamsyn.trainer.examples import Example, Key


class ShuffleBuffer:
    """Holds `size` examples at most. Which one is drawn follows from `seed`, the number of draws made before
    and what is held, in its order: nothing else.
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
        """Whether something must be drawn before more can be put in."""
        return len(self._held) >= self._size

    @property
    def tokens(self) -> int:
        """Tokens of all that is held."""
        return sum(example.length for example in self._held)

    def layout(self) -> list[Key]:
        """What is held, in order."""
        return [example.key for example in self._held]

    def restore(self, held: Iterable[Example], draws: int) -> None:
        """Go on where another one stood."""
        self._held = list(held)
        self.draws = draws

    def put(self, example: Example) -> None:
        """Hold one more."""
        self._held.append(example)

    def draw(self) -> Example:
        """Take one out."""
        number = int.from_bytes(digest("draw", self._seed, str(self.draws))[:8])
        at = number % len(self._held)
        self.draws += 1
        drawn, last = self._held[at], self._held.pop()
        if at < len(self._held):
            self._held[at] = last
        return drawn


Row = list[Example]


class Packer:
    """Keeps `rows` rows open, each of `seq_len` tokens at most. An example goes where least room is left.

    Every example given to it must have `seq_len` tokens at most.
    """

    def __init__(self, rows: int, seq_len: int) -> None:
        self._seq_len = seq_len
        self._rows: list[Row] = [[] for _ in range(rows)]

    @property
    def tokens(self) -> int:
        """Tokens in all open rows."""
        return sum(map(_tokens, self._rows))

    def add(self, example: Example) -> list[Row] | None:
        """Put an example into a row. If it fits into none, the rows as they were: a full step; it is then the
        first of the next one.
        """
        row = self._place(example)
        if row is not None:
            row.append(example)
            return None
        full = self.flush()
        self._rows[0].append(example)
        return full

    def flush(self) -> list[Row]:
        """The rows as they are, some of them perhaps empty; new ones are opened."""
        rows, self._rows = self._rows, [[] for _ in self._rows]
        return rows

    def layout(self) -> list[list[Key]]:
        """What lies in which open row, in order."""
        return [[example.key for example in row] for row in self._rows]

    def restore(self, layout: Sequence[Sequence[Example]]) -> bool:
        """Go on where another packer stood; False, and nothing is done, if it had rows of other sizes."""
        fits = all(_tokens(row) <= self._seq_len for row in layout)
        if len(layout) != len(self._rows) or not fits:
            return False
        self._rows = [list(row) for row in layout]
        return True

    def _place(self, example: Example) -> Row | None:
        """The row that it fills best; among those that it fills alike, the one with the least attention."""
        room = {at: self._seq_len - _tokens(row) for at, row in enumerate(self._rows)}
        fitting = [at for at in room if room[at] >= example.length]
        best = min(fitting, key=lambda at: (room[at], cost(self._rows[at]), at), default=None)
        return None if best is None else self._rows[best]


def cost(row: Sequence[Example]) -> int:
    """What attention over a row costs, up to a factor: the sum of squared lengths."""
    return sum(example.length**2 for example in row)


def balanced(rows: Sequence[Sequence[Example]], ranks: int) -> tuple[tuple[Example, ...], ...]:
    """The same rows in an order in which rank i % `ranks` of row i has about as much attention as any other.

    The heaviest row goes to the rank with the least so far, among those that have not got their share of
    rows (longest processing time first). Each rank's rows come heaviest first, so that those that ranks
    work on at the same time cost about the same. `ranks` divides the number of rows.
    """
    share = len(rows) // ranks
    assert share * ranks == len(rows), f"{len(rows)} rows cannot be shared out among {ranks} ranks"
    given: list[list[tuple[Example, ...]]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for row in sorted(rows, key=cost, reverse=True):
        rank = min((rank for rank in range(ranks) if len(given[rank]) < share), key=lambda rank: loads[rank])
        given[rank].append(tuple(row))
        loads[rank] += cost(row)
    return tuple(given[at % ranks][at // ranks] for at in range(len(rows)))


def _tokens(row: Sequence[Example]) -> int:
    return sum(example.length for example in row)
