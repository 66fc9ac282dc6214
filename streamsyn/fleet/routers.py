"""Detects an sglang-router behind a URL, and warns if its policy is bad for prefix groups.

A router chooses among its servers by its own policy. The default one, `cache_aware`, compares prompt
prefixes; all prompts of a run share a template, so nearly all requests go to one server.

Source: sglang-router 0.3.2; its successor, the Shepherd gateway, has the same routes. A server answers
`GET /workers` with 404, a router with its workers. A worker that was added with the label `policy` shows it
there; a policy from the command line appears only in the metrics, on a separate port.
"""

from dataclasses import dataclass
from typing import Any

import structlog

from streamsyn.errors import ConfigError, ServerError
from streamsyn.fleet.transport import Transport
from streamsyn.fleet.wire import read_json

log = structlog.get_logger()

WORKERS = "/workers"
SERVER_INFO = "/get_server_info"

_TIMEOUT_S = 5.0
_REFUSED = (401, 403)
_BY_KEY = frozenset({"manual", "consistent_hashing"})
"""Policies that send all requests with one routing key to one server."""
_BY_PREFIX = frozenset({"cache_aware", "prefix_hash"})
"""Policies that compare prompt prefixes; all prompts of a run share one."""
_ADVICE = (
    "pass its workers with --server instead, or start it with --policy manual --assignment-mode min_group "
    "(or consistent_hashing): streamsyn sends X-SMG-Routing-Key"
)


@dataclass(frozen=True, slots=True)
class RouterInfo:
    """What a router reports about itself.

    Attributes:
        workers: Number of its servers.
        urls: Their URLs; empty if it does not list them.
        policy: How it chooses among them; None if it does not report that.
    """

    workers: int
    urls: tuple[str, ...] = ()
    policy: str | None = None

    @property
    def advice(self) -> str | None:
        """One line on what to do; None if the policy keeps prefix groups together."""
        if self.policy in _BY_KEY or self.workers == 1:
            return None
        if self.policy is None:
            return f"its policy is unknown; if it is cache_aware, the default, {_ADVICE}"
        what = "sends most requests to one worker" if self.policy in _BY_PREFIX else "splits prefix groups"
        return f"its policy {self.policy} {what}; {_ADVICE}"


async def identify_router(transport: Transport) -> RouterInfo | None:
    """Return what a router reports about itself; None if this is not a router or its answer is unusable.

    A second request is sent only if the router lists its workers to administrators only.
    """
    status, answer = await _get(transport, WORKERS)
    if status in _REFUSED:
        _, answer = await _get(transport, SERVER_INFO)  # needs no credentials
        if not isinstance(answer, dict) or answer.get("router_manager") is not True:
            return None
        count = answer.get("workers_count")
        return RouterInfo(count if isinstance(count, int) else 0)
    workers = answer.get("workers") if status == 200 and isinstance(answer, dict) else None
    if not isinstance(workers, list) or not all(_is_worker(worker) for worker in workers):
        return None
    policies = {_policy(worker) for worker in workers}
    return RouterInfo(
        len(workers),
        tuple(worker["url"] for worker in workers),
        policies.pop() if len(policies) == 1 else None,
    )


async def warn_about_router(url: str, transport: Transport) -> RouterInfo | None:
    """Log whether `url` is a router, with advice if its policy is unknown or bad for prefix groups."""
    info = await identify_router(transport)
    if info is None:
        return None
    policy = info.policy or "unknown"
    if info.advice is None:
        log.info("fleet.router", server=url, workers=info.workers, policy=policy)
    else:
        log.warning("fleet.router", server=url, workers=info.workers, policy=policy, advice=info.advice)
    return info


async def _get(transport: Transport, path: str) -> tuple[int, Any]:
    """Return the status and the JSON of an answer: status 0 without an answer, None for invalid JSON."""
    try:
        reply = await transport.exchange("GET", path, timeout_s=_TIMEOUT_S)
    except (ServerError, ConfigError) as error:
        log.debug("fleet.router_unknown", path=path, error=str(error))
        return 0, None
    try:
        return reply.status, read_json(reply.body)
    except ValueError:
        return reply.status, None


def _is_worker(worker: Any) -> bool:
    return isinstance(worker, dict) and isinstance(worker.get("url"), str)


def _policy(worker: dict[str, Any]) -> str | None:
    """Return the policy in a worker's labels, which 0.3.2 shows as metadata."""
    for place in ("metadata", "labels"):
        labels = worker.get(place)
        if isinstance(labels, dict) and isinstance(labels.get("policy"), str):
            policy: str = labels["policy"]
            return policy
    return None
