"""Whether a URL is that of an sglang-router, and what that means for prefix groups.

A router in front of several servers chooses among them by its own policy, and the default one, `cache_aware`,
takes the template that all prompts share for the prefix they share: nearly everything goes to one server.

What tells (sglang-router 0.3.2; the Shepherd gateway it became has the same routes): a server answers
`GET /workers` with 404, a router with its workers. A worker that was added with the label `policy` shows it
there; the policy of the command line is told nowhere but among the metrics, on a port of their own.
"""

from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from streamsyn.errors import ConfigError, ServerError
from streamsyn.fleet.transport import Transport

log = structlog.get_logger()

WORKERS = "/workers"
SERVER_INFO = "/get_server_info"

_TIMEOUT_S = 5.0
_REFUSED = (401, 403)
_KEYED = frozenset({"manual", "consistent_hashing"})
"""Policies that keep the requests of one routing key together."""
_BY_BEGINNING = frozenset({"cache_aware", "prefix_hash"})
"""Policies that go by how a prompt begins, and all prompts of a run begin alike."""
_DO = (
    "name the workers themselves with --server, or start it with --policy manual --assignment-mode min_group "
    "(or consistent_hashing): streamsyn sends X-SMG-Routing-Key"
)


@dataclass(frozen=True, slots=True)
class RouterFacts:
    """What a router says of itself.

    Attributes:
        workers: How many servers it has.
        urls: Theirs; none where it keeps them to itself.
        policy: How it chooses among them; None when it does not say.
    """

    workers: int
    urls: tuple[str, ...] = ()
    policy: str | None = None

    @property
    def advice(self) -> str | None:
        """What to do about it in one line; None when prefix groups are safe."""
        if self.policy in _KEYED or self.workers == 1:
            return None
        if self.policy is None:
            return f"it does not say by which policy it chooses; if that is cache_aware, its default, {_DO}"
        what = "crowds them on one worker" if self.policy in _BY_BEGINNING else "splits prefix groups"
        return f"its policy {self.policy} {what}; {_DO}"


async def recognised(transport: Transport) -> RouterFacts | None:
    """What the router at the other end says of itself; None when it is no router, or nothing of use comes.

    Asks once; twice where the router lists its workers for its administrator only.
    """
    status, told = await _asked(transport, WORKERS)
    if status in _REFUSED:
        _, told = await _asked(transport, SERVER_INFO)  # open to all
        if not isinstance(told, dict) or told.get("router_manager") is not True:
            return None
        count = told.get("workers_count")
        return RouterFacts(count if isinstance(count, int) else 0)
    workers = told.get("workers") if status == 200 and isinstance(told, dict) else None
    if not isinstance(workers, list) or not all(_is_worker(worker) for worker in workers):
        return None
    policies = {_policy(worker) for worker in workers}
    return RouterFacts(
        len(workers),
        tuple(worker["url"] for worker in workers),
        policies.pop() if len(policies) == 1 else None,
    )


async def warn_of_router(url: str, transport: Transport) -> RouterFacts | None:
    """See whether `url` is a router; log what to do if its policy is bad for prefix groups, or unknown."""
    facts = await recognised(transport)
    if facts is None:
        return None
    policy = facts.policy or "unknown"
    if facts.advice is None:
        log.info("fleet.router", server=url, workers=facts.workers, policy=policy)
    else:
        log.warning("fleet.router", server=url, workers=facts.workers, policy=policy, advice=facts.advice)
    return facts


async def _asked(transport: Transport, path: str) -> tuple[int, Any]:
    """The status and the JSON of an answer; status 0 when there was none, None for what is no JSON."""
    try:
        reply = await transport.exchange("GET", path, timeout_s=_TIMEOUT_S)
    except (ServerError, ConfigError) as error:
        log.debug("fleet.router_unknown", path=path, error=str(error))
        return 0, None
    try:
        return reply.status, orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        return reply.status, None


def _is_worker(worker: Any) -> bool:
    return isinstance(worker, dict) and isinstance(worker.get("url"), str)


def _policy(worker: dict[str, Any]) -> str | None:
    """The policy that a worker's labels ask for: 0.3.2 shows them as metadata."""
    for place in ("metadata", "labels"):
        labels = worker.get(place)
        if isinstance(labels, dict) and isinstance(labels.get("policy"), str):
            policy: str = labels["policy"]
            return policy
    return None
