from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from streamsyn.errors import ConfigError
from streamsyn.sglang.simulator.faults import Fault

SGLANG_VERSION: Final = "0.5.23"
"""The release whose routes, bodies and manners are simulated."""


@dataclass(frozen=True, slots=True)
class SimulatorConfig:
    """What is simulated. Defaults make a fast server without faults."""

    model: str = "simulated"
    """Name under `/v1/models`; a request may name any other and gets that name back."""
    slots: int = 256
    """Requests that run at once (`--max-running-requests`); the others wait."""
    queue_limit: int | None = None
    """Requests that may wait (`--max-queued-requests`); beyond it the answer is 503. None: no limit."""
    latency_ms: float = 0.0
    """Time from the start of a request to its first token."""
    jitter_ms: float = 0.0
    """Each latency is moved by a uniform draw from -jitter to +jitter."""
    ms_per_token: float = 0.0
    """Time for each token after that."""
    words: int = 150
    """Length of a written text in words, give or take a tenth; `max_tokens` cuts it."""
    context_tokens: int = 131_072
    """Longest prompt (`--context-length`); a longer one is refused with 400."""
    keep_alive_s: float = 5.0
    """Idle connections are closed after this time; 5 s is SGLang's SGLANG_TIMEOUT_KEEP_ALIVE."""
    cache_tokens: int = 500_000
    """Size of the prefix cache; the least recently used blocks go first. 0: no prefix caching."""
    tokenizer_workers: int = 1
    """`--tokenizer-worker-num`: with 1, `/abort_request` ignores a rid that no live request has exactly."""
    seed: int = 0
    """Fixes texts, jitter and faults for a given order of arrival."""
    api_key: str | None = field(default=None, repr=False)
    """Bearer token asked for everywhere but on health, readiness and metrics. None: no authentication."""
    faults: Mapping[str, float] = field(default_factory=dict)
    """Share of requests that meet each kind of `Fault`; together at most 1."""
    die_after: int | None = None
    """The process dies without a word when this many requests had come and another one comes."""

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("words", 1), ("context_tokens", 1), ("tokenizer_workers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("latency_ms", "jitter_ms", "ms_per_token", "cache_tokens"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        if not self.keep_alive_s > 0:
            raise ConfigError(f"keep_alive_s must be positive, not {self.keep_alive_s}")
        for name in ("queue_limit", "die_after"):
            limit = getattr(self, name)
            if limit is not None and limit < 0:
                raise ConfigError(f"{name} must not be negative, not {limit}")
        check_rates(self.faults)


def check_rates(rates: Mapping[str, float]) -> None:
    """Refuses unknown kinds of fault, rates outside 0..1 and rates that add up to more than 1."""
    for kind, rate in rates.items():
        if kind not in list(Fault):
            raise ConfigError(f"unknown fault {str(kind)!r}; there are {', '.join(Fault)}")
        if not 0 <= rate <= 1:
            raise ConfigError(f"the rate of fault {str(kind)!r} must lie between 0 and 1, not {rate}")
    if sum(rates.values()) > 1 + 1e-9:
        raise ConfigError(f"the rates of the faults add up to {sum(rates.values()):g}, more than 1")
