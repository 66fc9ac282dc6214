"""What `benchmarks.fleet` has simulated servers write."""

from dataclasses import dataclass
from typing import Any

CAPS = (90, 110, 130, 160, 200, 230, 260, 300, 350, 400)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is written, and by what kind of servers.

    Attributes:
        words: Words of an answer.
        seeds: Seeds for each server.
        drafts: Contexts for each seed.
        slots: Requests that a server runs at once.
        settings: Other configuration.
        caps: Fixed caps to compare with; of several, the best one counts.
        document_tokens: Tokens of a document of several answers.
        pool_bound: Whether the KV pool is the limit, not the slots.
        sigma: Deviation of the logarithm of answer lengths.
        faulty: Whether some servers are slow, one flaps and one dies.
    """

    words: int
    seeds: int
    drafts: int = 1
    slots: int = 2048
    settings: tuple[tuple[str, Any], ...] = ()
    caps: tuple[int, ...] = CAPS
    document_tokens: int = 0
    pool_bound: bool = True
    sigma: float = 0.0
    faulty: bool = False


def _sections(tokens: int) -> tuple[tuple[str, Any], ...]:
    return ("recipe.use", "sections"), ("recipe.target_tokens", tokens)


WORKLOADS = {
    "default": Workload(2000, 1600),
    "full": Workload(2500, 1400),
    "varied": Workload(1000, 2500, sigma=0.5, caps=(200, 260, 350, 450, 600)),
    "short": Workload(200, 12_000, settings=(("recipe.max_tokens", 512),), caps=(260, 400, 1000, 1500, 2048)),
    "seats": Workload(1000, 2000, slots=256, pool_bound=False, caps=(256, 300, 400)),
    "sections-8k": Workload(
        580, 250, settings=_sections(8000), document_tokens=8000, caps=(30, 45, 60, 80, 100)
    ),
    "sections-32k": Workload(
        580, 60, settings=_sections(32_000), document_tokens=32_000, caps=(8, 12, 16, 20, 24)
    ),
    "faulty": Workload(1000, 312, drafts=4, slots=256, pool_bound=False, caps=(512,), faulty=True),
}
