"""Shuffling a stream: the next example is drawn from those that are held."""

from collections.abc import Iterable

from streamsyn.records import digest
from streamsyn.trainer.stream.examples import Example, Key


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
