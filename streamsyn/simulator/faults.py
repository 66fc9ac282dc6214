"""Faults that requests meet: their kinds, at what rates, or by a script."""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from random import Random
from typing import Any, Final, TypeAlias


class Fault(StrEnum):
    """A way in which a request can fail."""

    # refused before anything runs
    QUEUE_FULL = "queue_full"  # 503 "The request queue is full."
    RATE_LIMIT = "rate_limit"  # 429, as hosted APIs answer
    PAUSE = "pause"  # 429 with "Retry-After: 3"
    HTTP_500 = "http_500"
    REFUSE = "refuse"  # 400 BadRequestError
    RESET = "reset"  # connection reset before any byte of an answer
    # fails after the time that an answer takes
    ERROR_IN_200 = "error_in_200"  # an error object with status 200
    CUT_BODY = "cut_body"  # fewer bytes than Content-Length, then the connection closes
    BAD_JSON = "bad_json"
    STALL = "stall"  # holds its slot until aborted or disconnected
    ABORTED = "aborted"  # finish_reason "abort" with part of the text
    # complete answers with content that a check should reject
    EMPTY = "empty"
    SHORT = "short"
    REFUSAL = "refusal"
    TRUNCATED = "truncated"  # finish_reason "length"
    REPETITION = "repetition"
    ECHO = "echo"  # repeats the prompt
    QA = "qa"  # appends a question and an answer to the text


PAUSE_S: Final = 3
"""The pause that `Fault.PAUSE` asks for."""
BAD_CONTENT: Final = frozenset(
    {Fault.EMPTY, Fault.SHORT, Fault.REFUSAL, Fault.TRUNCATED, Fault.REPETITION, Fault.ECHO, Fault.QA}
)
"""Faults of complete answers."""

Script: TypeAlias = Sequence[Fault | None] | Callable[[int, dict[str, Any]], Fault | None]
"""Faults by hand. A sequence has one entry per request in order of arrival; later requests follow the rates.
A function is called for every request with its number, from 1, and its decoded body. None means no fault."""


class FaultPlan:
    """Chooses the fault of each request: at random by the rates, or from a script."""

    def __init__(self, rates: Mapping[str, float], seed: int, script: Script | None = None) -> None:
        self._seed = seed
        self._script = script
        self.set_rates(rates)
        self.rewind()

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Replace all rates, from the next request on."""
        self._kinds: list[tuple[float, Fault]] = []
        edge = 0.0
        for kind, rate in rates.items():
            edge += rate
            self._kinds.append((edge, Fault(kind)))

    def rewind(self) -> None:
        """Restart the random draws; the rates stay."""
        self._random = Random(f"faults {self._seed}")

    def decide(self, number: int, body: dict[str, Any]) -> Fault | None:
        """Return the fault of request `number`, from 1. Call it once per request, in order."""
        drawn = self._draw()
        if callable(self._script):
            return self._script(number, body)
        if self._script is not None and number <= len(self._script):
            return self._script[number - 1]
        return drawn

    def _draw(self) -> Fault | None:
        point = self._random.random()  # one draw per request, so that the n-th request has the n-th draw
        return next((kind for edge, kind in self._kinds if point < edge), None)
