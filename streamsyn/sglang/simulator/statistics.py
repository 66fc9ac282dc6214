from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Statistics:
    """What `/simulator/stats` tells. `requests` are those to write or score; `by_route` counts all."""

    requests: int = 0
    answered: int = 0
    """Answers sent to the last byte, good or with bad content; tokens are counted for these."""
    aborted: int = 0
    """Requests that were answered with finish_reason "abort"."""
    disconnected: int = 0
    """Requests whose client went away first."""
    connections: int = 0
    """Connections on which at least one request came."""
    retracted: int = 0
    """How often a request was thrown out of the running batch to be computed again."""
    in_flight: int = 0
    max_in_flight: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    by_route: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def cache_hit_rate(self) -> float:
        """Share of prompt tokens that came from the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """A plain copy, ready for JSON."""
        return {
            "requests": self.requests,
            "by_route": dict(self.by_route),
            "answered": self.answered,
            "faults": {str(kind): count for kind, count in self.faults.items()},
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "connections": self.connections,
            "aborted": self.aborted,
            "disconnected": self.disconnected,
            "retracted": self.retracted,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
        }
