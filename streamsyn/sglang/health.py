"""Whether a server is used: in, or ejected until it answers a probe. A plain state machine."""

from dataclasses import dataclass


@dataclass(slots=True)
class Health:
    """Counts failures in a row; so many of them, or a connection not made, eject the server."""

    eject_after: int
    ejected: bool = False
    failures: int = 0
    ejections: int = 0
    """Since the last answer: a server may answer probes and nothing else."""

    def answered(self) -> None:
        """An answer came, of whatever kind: the server is alive."""
        self.failures = self.ejections = 0

    def failed(self, *, is_there: bool = True) -> bool:
        """No answer came, or the server `is_there` no longer. True when this ejects it."""
        self.failures += 1
        if self.ejected or (is_there and self.failures < self.eject_after):
            return False
        self.ejected = True
        self.ejections += 1
        return True

    def readmit(self) -> None:
        """A probe was answered."""
        self.ejected = False
        self.failures = 0
