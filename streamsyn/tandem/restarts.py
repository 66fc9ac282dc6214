"""What to do when a trainer has ended: a decision without a clock or a process."""

from dataclasses import dataclass

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
_FINAL = (0, EXIT_USAGE, EXIT_STOPPED)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a trainer ended.

    Attributes:
        code: What it said that it ends with, else its exit status: negative for a signal.
        said: Whether it said so: then it ended by its own decision.
    """

    code: int
    said: bool = False

    @property
    def in_words(self) -> str:
        """For a log line."""
        return f"it exited with {self.code}" if self.code >= 0 else f"it was ended by signal {-self.code}"


@dataclass(frozen=True, slots=True)
class Again:
    """Start it once more, after a pause; the `number`-th time in a row that brought no checkpoint."""

    after_s: float
    number: int


@dataclass(frozen=True, slots=True)
class Over:
    """Leave it at that: 0 trained to the end, 75 stopped, 2 the user's to mend, 1 it cannot be kept up."""

    code: int


class Restarts:
    """Decides. A trainer that ended by its own decision is not started again; one that died is.

    Args:
        checkpoint: The newest checkpoint before the first start.
        most: So many times in a row without a new checkpoint.
        pause_s: Before the first of them; twice as long before each further one.
    """

    def __init__(self, checkpoint: str | None, *, most: int = 3, pause_s: float = 1.0) -> None:
        self._checkpoint = checkpoint
        self._most = most
        self._pause_s = pause_s
        self._in_a_row = 0

    def after(self, ended: Ended, checkpoint: str | None, *, stopping: bool) -> Again | Over:
        """What comes next.

        Args:
            ended: How it ended.
            checkpoint: The newest checkpoint now.
            stopping: Whether it had been told to stop.
        """
        if ended.code in _FINAL:
            return Over(ended.code)
        if stopping:
            return Over(EXIT_STOPPED)
        if ended.said:
            return Over(EXIT_FAILED)
        if checkpoint != self._checkpoint:
            self._checkpoint, self._in_a_row = checkpoint, 0
        if self._in_a_row == self._most:
            return Over(EXIT_FAILED)
        self._in_a_row += 1
        return Again(self._pause_s * 2.0 ** (self._in_a_row - 1), self._in_a_row)
