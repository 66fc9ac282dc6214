"""The configuration of a simulated server, and the faults that it can have."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import Any, Final, TypeAlias

from streamsyn.errors import ConfigError
from streamsyn.simulator import costs
from streamsyn.simulator.costs import CostModel


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


SGLANG_VERSION: Final = "0.5.23"
"""The simulated release."""
PLAIN_SLOTS: Final = 256
PLAIN_CACHE_TOKENS: Final = 500_000
POLICIES: Final = ("fcfs", "lpm")
_PLAIN_ONLY: Final = ("latency_ms", "jitter_ms", "ms_per_token")
_BATCHING_ONLY: Final = ("max_prefill_tokens", "chunked_prefill_size")


@dataclass(frozen=True, slots=True)
class SimulatorConfig:
    """What to simulate. The defaults make a fast server without faults."""

    model: str = "simulated"
    """Name in `/v1/models`; a request may use any name and gets that name back."""
    cost_model: str = costs.PLAIN
    """`plain`: each request on its own clock. `cpu`, `h100`: continuous batching at its costs."""
    slots: int | None = None
    """Maximum running requests (`--max-running-requests`). None: 256, or the cost model's."""
    queue_limit: int | None = None
    """Maximum waiting requests (`--max-queued-requests`); beyond it the answer is 503. None: no limit."""
    dp_size: int = 1
    """Data-parallel ranks (`--dp-size`), each with slots, a queue and a cache of its own."""
    schedule_policy: str = "fcfs"
    """Order of the queue, with batching: `fcfs`, or `lpm` for the longest cached prefix first."""
    max_prefill_tokens: int | None = None
    """Maximum prompt tokens computed in a prefill batch (`--max-prefill-tokens`). None: the cost model's."""
    chunked_prefill_size: int | None = None
    """Longer prompts are computed in chunks (`--chunked-prefill-size`). None: the cost model's."""
    speed: float = 1.0
    """Speed factor: 1 is nominal, 0.5 half as fast."""
    latency_ms: float = 0.0
    """Time from the start of a request to its first token; plain only, like the next two."""
    jitter_ms: float = 0.0
    """A uniform draw from -jitter to +jitter is added to each latency."""
    ms_per_token: float = 0.0
    """Time per token after the first."""
    words: int = 150
    """Length of a generated text in words, within a tenth; `max_tokens` cuts it."""
    faithful: float = 0.0
    """Share of generated texts that contain the text after `Answer:` in their prompt, word for word."""
    context_tokens: int = 131_072
    """Longest prompt (`--context-length`); a longer one is refused with 400."""
    keep_alive_s: float = 5.0
    """Idle connections are closed after this time; 5 s is SGLang's SGLANG_TIMEOUT_KEEP_ALIVE."""
    cache_tokens: int | None = None
    """Size of the prefix cache, with LRU eviction. With batching, size of the KV pool, which the cache shares
    with running requests. 0: no prefix caching. None: 500,000, or the cost model's."""
    cache_report: bool = True
    """`--enable-cache-report`: answers of the chat route have `prompt_tokens_details`."""
    tokenizer_workers: int = 1
    """`--tokenizer-worker-num`: with 1, `/abort_request` ignores a rid that is only a prefix of live rids."""
    seed: int = 0
    """Determines texts, jitter and faults for a given order of arrival."""
    load_s: float = 0.0
    """Duration of a weight update (`/update_weights_from_disk`)."""
    api_key: str | None = field(default=None, repr=False)
    """Bearer token, required except on health, readiness and metrics. None: no authentication."""
    faults: Mapping[str, float] = field(default_factory=dict)
    """Share of requests that meet each kind of `Fault`; in total at most 1."""
    die_after: int | None = None
    """The server dies when a request arrives after this many others."""

    def __post_init__(self) -> None:
        if self.cost_model not in costs.NAMES:
            raise ConfigError(
                f"unknown cost_model {self.cost_model!r}; choose one of {', '.join(costs.NAMES)}"
            )
        if self.schedule_policy not in POLICIES:
            raise ConfigError(
                f"unknown schedule_policy {self.schedule_policy!r}; choose one of {', '.join(POLICIES)}"
            )
        for name in ("slots", "dp_size", "words", "context_tokens", "tokenizer_workers", *_BATCHING_ONLY):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1, not {number}")
        for name in (
            "latency_ms",
            "jitter_ms",
            "ms_per_token",
            "cache_tokens",
            "queue_limit",
            "die_after",
            "load_s",
        ):
            number = getattr(self, name)
            if number is not None and not number >= 0:
                raise ConfigError(f"{name} must not be negative, not {number}")
        for name in ("keep_alive_s", "speed"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.faithful <= 1:
            raise ConfigError(f"faithful must be between 0 and 1, not {self.faithful}")
        self._check_use()
        check_rates(self.faults)

    def _check_use(self) -> None:
        """Refuse settings that have no effect with this cost model."""
        plain = self.cost_model == costs.PLAIN
        for name in _BATCHING_ONLY if plain else _PLAIN_ONLY:
            if getattr(self, name):
                raise ConfigError(f"{name} has no effect with cost_model {self.cost_model!r}")
        if plain and self.schedule_policy != "fcfs":
            raise ConfigError(f"schedule_policy has no effect with cost_model {self.cost_model!r}")

    @property
    def batching(self) -> CostModel | None:
        """The cost model, with the limits that are set here; None with `plain`."""
        if self.cost_model == costs.PLAIN:
            return None
        preset = costs.PRESETS[self.cost_model]
        return dataclasses.replace(
            preset,
            pool_tokens=self.cache_tokens or preset.pool_tokens,
            max_running_requests=self.slots or preset.max_running_requests,
            max_prefill_tokens=self.max_prefill_tokens or preset.max_prefill_tokens,
            chunked_prefill_size=self.chunked_prefill_size or preset.chunked_prefill_size,
        )


def check_rates(rates: Mapping[str, float]) -> None:
    """Check fault kinds and rates.

    Raises:
        ConfigError: A kind is unknown, a rate is outside 0 to 1, or their sum is above 1.
    """
    for kind, rate in rates.items():
        if kind not in list(Fault):
            raise ConfigError(f"unknown fault {str(kind)!r}; choose from {', '.join(Fault)}")
        if not 0 <= rate <= 1:
            raise ConfigError(f"the rate of fault {str(kind)!r} must be between 0 and 1, not {rate}")
    if sum(rates.values()) > 1 + 1e-9:
        raise ConfigError(f"the fault rates sum to {sum(rates.values()):g}; they must not exceed 1")
