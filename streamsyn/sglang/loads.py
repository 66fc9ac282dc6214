"""What a server says of its load: `GET /v1/loads?include=core,queues` of SGLang 0.5."""

from dataclasses import dataclass
from typing import Any

import orjson

from streamsyn.errors import BrokenResponse

_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Load:
    """One reading, over all data-parallel ranks of a server.

    Attributes:
        running: Requests in the running batch.
        waiting: Requests that wait for a place in it.
        waiting_uncached_tokens: Prompt tokens of those that no cache will spare.
        token_usage: Share of the KV pool that running requests use, of the fullest rank.
        pool_tokens: Size of the KV pool.
        max_running: Requests that the batch may hold.
        generated_per_s: Tokens written a second, as the server counts it.
        retracted: Requests taken out of the batch again for want of room in the KV pool, lately.
        taken_at: The server's own stamps; a reading that has those of another one is that other one.
    """

    running: int
    waiting: int
    waiting_uncached_tokens: int = 0
    token_usage: float = 0.0
    pool_tokens: int = 0
    max_running: int = 0
    generated_per_s: float = 0.0
    retracted: int = 0
    taken_at: tuple[float, ...] | None = None


def parse_load(body: bytes) -> Load:
    """The reading in an answer of `/v1/loads`.

    Raises:
        BrokenResponse: It is no such answer.
    """
    try:
        ranks: list[dict[str, Any]] = orjson.loads(body)["loads"]
        return Load(
            running=sum(int(rank["num_running_reqs"]) for rank in ranks),
            waiting=sum(int(rank["num_waiting_reqs"]) for rank in ranks),
            waiting_uncached_tokens=sum(int(rank.get("num_waiting_uncached_tokens") or 0) for rank in ranks),
            token_usage=max(float(rank.get("token_usage") or 0) for rank in ranks),
            pool_tokens=sum(int(rank.get("max_total_num_tokens") or 0) for rank in ranks),
            max_running=sum(int(rank.get("max_running_requests") or 0) for rank in ranks),
            generated_per_s=sum(float(rank.get("gen_throughput") or 0) for rank in ranks),
            retracted=sum(int((rank.get("queues") or {}).get("retracted") or 0) for rank in ranks),
            taken_at=_stamps(ranks),
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        shown = body[:_SHOWN].decode(errors="replace")
        raise BrokenResponse(f"/v1/loads is not answered as expected ({error!r}): {shown!r}") from error


def _stamps(ranks: list[dict[str, Any]]) -> tuple[float, ...] | None:
    stamps = tuple(rank.get("timestamp") for rank in ranks)
    return None if None in stamps else tuple(float(stamp) for stamp in stamps if stamp is not None)
