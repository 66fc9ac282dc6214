"""Faults and outages at set times of a server's life, from a TOML file.

[[event]]
at_s = 60              # seconds after the server's start
speed = 0.5            # half as fast from here on
[[event]]
at_s = 120
every_s = 90           # again and again; without it, once
down_s = 30            # gone for so long: connections reset, then refused; the prefix cache is lost
[[event]]
at_s = 300
faults = {http_500 = 0.1}    # these rates from here on, in place of all earlier ones
[[event]]
at_s = 600
die = true             # gone for good
"""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from random import Random
from typing import Any, Final, TypeAlias


class Fault(StrEnum):
    """One way in which a request goes wrong."""

    # refused before anything runs
    QUEUE_FULL = "queue_full"  # 503 "The request queue is full."
    HTTP_500 = "http_500"
    REFUSE = "refuse"  # 400 BadRequestError
    RESET = "reset"  # connection reset before any byte of an answer
    # broken on the way out, after the time that an answer takes
    ERROR_IN_200 = "error_in_200"  # an error object with status 200
    CUT_BODY = "cut_body"  # Content-Length promises more than comes, then the connection closes
    BAD_JSON = "bad_json"
    STALL = "stall"  # holds its slot until aborted or disconnected
    ABORTED = "aborted"  # finish_reason "abort" with part of the text
    # answered, but with content that a check should reject
    EMPTY = "empty"
    SHORT = "short"
    REFUSAL = "refusal"
    TRUNCATED = "truncated"  # finish_reason "length"
    REPETITION = "repetition"
    ECHO = "echo"  # the prompt comes back
    QA = "qa"  # a question and an answer are pasted below the text


BAD_CONTENT: Final = frozenset(
    {Fault.EMPTY, Fault.SHORT, Fault.REFUSAL, Fault.TRUNCATED, Fault.REPETITION, Fault.ECHO, Fault.QA}
)
"""Faults of an answer that arrives whole."""

Script: TypeAlias = Sequence[Fault | None] | Callable[[int, dict[str, Any]], Fault | None]
"""Faults by hand. A sequence holds one entry a request, in order of arrival, and leaves the rest to the
rates; a function is asked for every request, with its number (from 1) and decoded body. None: no fault."""


class FaultPlan:
    """Decides which fault a request meets: from its number, or as the script says."""

    def __init__(self, rates: Mapping[str, float], seed: int, script: Script | None = None) -> None:
        self._seed = seed
        self._script = script
        self.set_rates(rates)
        self.rewind()

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """From the next request on, these rates hold and no others."""
        self._kinds: list[tuple[float, Fault]] = []
        edge = 0.0
        for kind, rate in rates.items():
            edge += rate
            self._kinds.append((edge, Fault(kind)))

    def rewind(self) -> None:
        """Starts again as if no request had come; rates that were set stay."""
        self._random = Random(f"faults {self._seed}")

    def decide(self, number: int, body: dict[str, Any]) -> Fault | None:
        """The fault of request `number`, counted from 1; to be called once for each, in order."""
        drawn = self._draw()
        if callable(self._script):
            return self._script(number, body)
        if self._script is not None and number <= len(self._script):
            return self._script[number - 1]
        return drawn

    def _draw(self) -> Fault | None:
        point = self._random.random()  # one draw a request, so that the n-th request has the n-th draw
        return next((kind for edge, kind in self._kinds if point < edge), None)
