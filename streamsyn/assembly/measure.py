"""How long a sample is, in tokens."""

from collections.abc import Sequence
from typing import Protocol

from streamsyn.assembly.passages import Passage, Piece


class Measure(Protocol):
    """Counts the tokens of samples."""

    def about(self, relevant: Passage, piece: Piece) -> int:
        """How many tokens a piece adds to the sample of `relevant`, about."""
        ...

    def slack(self, pieces: int) -> int | None:
        """By how much a sum over so many pieces may be off; None: it never is."""
        ...

    def total(self, relevant: Passage, pieces: Sequence[Piece], user: str | None = None) -> int:
        """Tokens of the sample of `relevant` that holds `pieces`, in this order.

        Args:
            relevant: Also one of `pieces`.
            pieces: All passages of the sample.
            user: The user message, where it has been rendered already.
        """
        ...


class ServerCounts:
    """Counts the passages alone, as the servers counted that wrote them."""

    def about(self, relevant: Passage, piece: Piece) -> int:  # noqa: ARG002 - the protocol's
        return piece.tokens

    def slack(self, pieces: int) -> None:  # noqa: ARG002 - the protocol's
        return None

    def total(self, relevant: Passage, pieces: Sequence[Piece], user: str | None = None) -> int:  # noqa: ARG002
        return sum(piece.tokens for piece in pieces)
