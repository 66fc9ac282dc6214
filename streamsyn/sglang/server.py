"""One server of the fleet: its client, and what is known of it."""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamsyn.sglang.client import ServerClient
from streamsyn.sglang.health import Health
from streamsyn.sglang.leaders import Leaders
from streamsyn.sglang.limiter import Limiter
from streamsyn.sglang.loads import Load
from streamsyn.sglang.prefixes import PrefixModel
from streamsyn.sglang.spec import ServerSpec

if TYPE_CHECKING:
    from streamsyn.sglang.placement import Waiter


@dataclass(slots=True, eq=False)
class Server:
    """What the fleet holds of a server; the decisions are those of its limiter, its health, its leaders.

    Attributes:
        spec: What the configuration says of it.
        client: Speaks to it.
        limiter: How many requests it may have.
        health: Whether it is used.
        model: What it is asked for.
        leaders: Which beginnings are in its cache, and who waits for those that are on their way there.
        prefixes: What its prefix cache should hold.
        queue: Requests that wait for a place here, since their group is at home here.
        homes: Groups that are at home here.
        draining: It gets nothing new.
    """

    spec: ServerSpec
    client: ServerClient
    limiter: Limiter
    health: Health
    model: str = ""
    leaders: Leaders = field(default_factory=Leaders)
    prefixes: PrefixModel = field(default_factory=PrefixModel)
    queue: "deque[Waiter]" = field(default_factory=deque)
    homes: int = 0
    draining: bool = False
    is_gone: bool = False
    """It is no longer one of the fleet's."""
    load: Load | None = None
    weight_version: str | None = None
    """Of its weights, when it was asked last; an answer that is not streamed says it itself."""
    told_cap: int = 0
    """The cap that the log told of last."""
    completions: int = 0
    completion_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    planned_cached_tokens: float = 0.0

    @property
    def url(self) -> str:
        """Base URL."""
        return self.client.url

    @property
    def weight(self) -> float:
        """Its share of the work, beside the others'."""
        return self.spec.weight

    @property
    def is_in(self) -> bool:
        """Whether it gets requests at all."""
        return not self.health.ejected and not self.draining

    @property
    def assigned(self) -> int:
        """Requests that are there, or wait to go there."""
        return self.limiter.in_flight + len(self.queue) + self.leaders.followers

    @property
    def cap(self) -> int:
        """Requests that it may have in flight."""
        return self.limiter.cap

    def counts(self) -> dict[str, int]:
        """What it has done."""
        return {
            "completions": self.completions,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "planned_cached_tokens": round(self.planned_cached_tokens),
        }

    def figures(self) -> dict[str, Any]:
        """What there is to say of it now."""
        load = self.load
        return {
            "server": self.url,
            "model": self.model,
            "weight": self.weight,
            "in_flight": self.limiter.in_flight,
            "cap": self.limiter.cap,
            "queued": len(self.queue) + self.leaders.followers,
            "running": load and load.running,
            "waiting": load and load.waiting,
            "waiting_uncached_tokens": load and load.waiting_uncached_tokens,
            "token_usage": load and load.token_usage,
            "generated_per_s": load and load.generated_per_s,
            "ejected": self.health.ejected,
            "draining": self.draining,
            "decisions": dict(self.limiter.decisions),
            **self.counts(),
        }
