"""Stops a run that writes rejects and little else: a mistake of the whole set-up must not use up the seeds.

A refusal comes at once, an answer takes a minute. So drafts in flight count as if they would succeed.
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

from streamsyn.plain_text import cut
from streamsyn.queues import Backlog
from streamsyn.records import Context, Outcome, Reject
from streamsyn.telemetry import Counters

FIRST: Final = 32
"""Rejects for one reason, with no context before them, that stop a run."""
JUDGED_FROM: Final = 200
"""Outcomes of a run from which its share of rejects is judged."""
_DETAIL_BYTES: Final = 300

Stop = Callable[[str, bool], None]
"""Stops the run for a reason; True gives up what is in flight."""


class RejectLimits:
    """Decides which outcomes are written, and when there are too many rejects.

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
        self, allowed: float, stop: Stop, advice: Callable[[Reject], str], counters: Counters
    ) -> None:
        self._allowed = allowed
        self._stop = stop
        self._advice = advice
        self._counters = counters
        self._held: list[Reject] = []
        self._reasons: Counter[str] = Counter()
        self._is_holding = allowed < 1
        self._has_stopped = self._drops = False
        self._in_flight = self._outcomes = self._rejects = 0

    def began(self) -> None:
        """Count a draft, or an invalid line, that a worker has begun."""
        self._in_flight += 1

    def take(self, outcome: Outcome) -> list[Outcome]:
        """Return the outcomes to write now that this one is there."""
        self._in_flight -= 1
        if isinstance(outcome, Reject) and not outcome.attempts:
            return [outcome]
        self._outcomes += 1
        self._rejects += isinstance(outcome, Reject)
        if isinstance(outcome, Context):
            return [*self.end(drop=self._drops), outcome]
        if not (self._is_holding or self._drops):
            self._judge_share()
            return [outcome]
        self._held.append(outcome)
        self._reasons[outcome.reason] += 1
        self._judge_first(outcome)
        if self._drops:
            self.end(drop=True)
        return []

    def end(self, *, drop: bool) -> list[Outcome]:
        """Return the rejects that are held back, to be written now; none if they are dropped."""
        held, self._held, self._is_holding = self._held, [], False
        if not drop:
            return list(held)
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


class LimitedResults:
    """The results of workers, as far as `limits` lets them be written.

    Args:
        results: Takes them.
        limits: Decides.
    """

    def __init__(self, results: Backlog[Outcome], limits: RejectLimits) -> None:
        self._results = results
        self._limits = limits

    async def room(self) -> None:
        """Wait for room before an item is begun; see `Backlog.room`."""
        await self._results.room()
        self._limits.began()

    def put(self, outcome: Outcome) -> None:
        """Add an outcome."""
        for one in self._limits.take(outcome):
            self._results.put(one)

    def end(self, *, drop: bool) -> bool:
        """Add what is held back, or drop it; returns whether anything was dropped."""
        drops_any = drop and self._limits.holds_any
        for one in self._limits.end(drop=drop):
            self._results.put(one)
        return drops_any
