"""Stops a run that writes rejects and little else: a mistake of the whole set-up must not use up the seeds.

A refusal comes at once, an answer takes a minute. So drafts in flight count as if they would succeed.
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

from streamsyn.plain_text import cut
from streamsyn.records import Reject
from streamsyn.telemetry import Counters

FIRST: Final = 32
"""Rejects for one reason, with no context before them, that stop a run."""
JUDGED_FROM: Final = 200
"""Outcomes of a run from which its share of rejects is judged."""
_DETAIL_BYTES: Final = 300

Stop = Callable[[str, bool], None]
"""Stops the run for a reason; True gives up what is in flight."""


class RejectLimits:
    """Decides which rejects are written, and when there are too many.

    Rejects are held back until the first context. If as many as FIRST of them have one reason, and no fewer
    than are in flight, the run stops, and their seeds keep no outcome: the next run asks them again. A kill
    has the same effect. Lines that are not seeds, and drafts that no server was asked for, do not count.

    Args:
        allowed: `run.max_reject_fraction`; 1 accepts any rejects.
        stop: Stops the run.
        advice: Returns what to do about a reject.
        counters: Counts the tokens of rejects that are not written.
    """

    def __init__(
        self,
        allowed: float = 1.0,
        stop: Stop = lambda _why, _at_once: None,
        advice: Callable[[Reject], str] = lambda _: "",
        counters: Counters | None = None,
    ) -> None:
        self._allowed = allowed
        self._stop = stop
        self._advice = advice
        self._counters = counters or Counters()
        self._held: list[Reject] = []
        self._reasons: Counter[str] = Counter()
        self._is_holding = allowed < 1
        self._has_stopped = self._drops = False
        self._in_flight = self._outcomes = self._rejects = 0

    def began(self) -> None:
        """Count a draft, or an invalid line, that a worker has begun."""
        self._in_flight += 1

    def context(self) -> list[Reject]:
        """Count a context; return the rejects to write before it."""
        self._in_flight -= 1
        self._outcomes += 1
        return self.end(drop=self._drops)

    def reject(self, reject: Reject) -> list[Reject]:
        """Take a reject; return it if it is to be written now."""
        self._in_flight -= 1
        if not reject.attempts:
            return [reject]
        self._outcomes += 1
        self._rejects += 1
        if not (self._is_holding or self._drops):
            self._judge_share()
            return [reject]
        self._held.append(reject)
        self._reasons[reject.reason] += 1
        self._judge_first(reject)
        if self._drops:
            self.end(drop=True)
        return []

    def end(self, *, drop: bool) -> list[Reject]:
        """Return the rejects that are held back, to be written now; none if they are dropped."""
        held, self._held, self._is_holding = self._held, [], False
        if not drop:
            return held
        self._counters.wasted_tokens += sum(reject.wasted_tokens for reject in held)
        return []

    @property
    def holds_any(self) -> bool:
        """Whether rejects are held back."""
        return bool(self._held)

    def _judge_first(self, reject: Reject) -> None:
        times = self._reasons[reject.reason]
        if self._drops or times < max(FIRST, self._in_flight):
            return
        self._has_stopped = self._drops = True
        detail = cut(" ".join(reject.detail.split()), _DETAIL_BYTES)
        self._stop(
            f"{times} drafts were rejected as {reject.reason} before any context was written: {detail} "
            f"({self._advice(reject)})",
            True,
        )

    def _judge_share(self) -> None:
        if self._has_stopped or self._outcomes < JUDGED_FROM:
            return
        if self._rejects > self._allowed * (self._outcomes + self._in_flight):
            self._has_stopped = True
            share = self._rejects / self._outcomes
            self._stop(
                f"{share:.1%} of {self._outcomes} outcomes are rejects, more than run.max_reject_fraction = "
                f"{self._allowed:.1%}",
                False,
            )
