"""What the servers did: tokens, failed tries, and when."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from streamsyn.report.rows import checks_of, number, text
from streamsyn.report.timeline import Timeline

_MOST_NAMES = 48
OTHER = "(others)"


@dataclass(slots=True)
class Usage:
    """Tokens of one server or model."""

    answers: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    failed: int = 0

    def add(self, row: Any) -> None:
        """Count what a row or a step of it used."""
        self.answers += 1
        self.prompt += int(number(row, "prompt_tokens"))
        self.cached += int(number(row, "cached_tokens"))
        self.completion += int(number(row, "completion_tokens"))


class Traffic:
    """Sums over all outcomes."""

    def __init__(self) -> None:
        self.all = Usage()
        self.scoring = Usage()
        self.wasted = 0
        self.servers: dict[str, Usage] = {}
        self.models: dict[str, Usage] = {}
        self.failed: Counter[str] = Counter()
        """Failed tries by kind."""
        self.timeline = Timeline()
        self.newest = 0.0

    def context(self, row: dict[str, Any]) -> None:
        """Count a row of contexts."""
        self.all.add(row)
        _of(self.models, text(row, "model") or "?").add(row)
        for part in row.get("steps") or [row]:
            _of(self.servers, text(part, "server") or "?").add(part)
        if scoring := checks_of(row).get("scoring"):
            self.scoring.add(scoring)
        at = self._outcome(row)
        self.timeline.add(at, "contexts")
        self.timeline.add(at, "tokens", number(row, "completion_tokens"))

    def reject(self, row: dict[str, Any]) -> None:
        """Count a row of rejects."""
        self.timeline.add(self._outcome(row), "rejects")

    def _outcome(self, row: dict[str, Any]) -> float:
        """What contexts and rejects have both; when it was written."""
        self.wasted += int(number(row, "wasted_tokens"))
        at = number(row, "written_at")
        self.newest = max(self.newest, at)
        for attempt in row.get("attempts") or ():
            if error := text(attempt, "error"):
                kind = error.partition(":")[0][:40]
                self.failed[kind if kind in self.failed or len(self.failed) < _MOST_NAMES else OTHER] += 1
                _of(self.servers, text(attempt, "server") or "?").failed += 1
                self.timeline.add(number(attempt, "at"), "failed tries")
        return at


def _of(usages: dict[str, Usage], name: str) -> Usage:
    return usages.setdefault(name if name in usages or len(usages) < _MOST_NAMES else OTHER, Usage())
