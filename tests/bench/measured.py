"""Measurements made by hand, for tests of what is computed from them."""

from collections.abc import Mapping, Sequence
from typing import Any

from streamsyn.bench.measurement import (
    DraftRecord,
    Interval,
    Load,
    Measurement,
    RequestRecord,
    ServerTick,
    Tick,
)

SERVERS = ("http://a:1", "http://b:2")


def request(draft: int = 0, sent_at: float = 10.0, done_at: float = 12.0, **given: Any) -> RequestRecord:
    """A request that was answered with 200 tokens, all of them useful."""
    record = RequestRecord(
        draft=draft,
        step=0,
        server=SERVERS[draft % 2],
        model="m",
        group="",
        queued_at=sent_at - 0.5,
        sent_at=sent_at,
        done_at=done_at,
        ended="ok",
        prompt_tokens=100,
        cached_tokens=60,
        planned_cached_tokens=60,
        completion_tokens=200,
        useful_tokens=200.0,
    )
    for name, value in given.items():
        setattr(record, name, value)
    return record


def drafts(requests: Sequence[RequestRecord], outcomes: Mapping[int, str]) -> list[DraftRecord]:
    """The drafts of requests: contexts, but for those in `outcomes`."""
    found = []
    for number in range(1 + max((one.draft for one in requests), default=-1)):
        own = [one for one in requests if one.draft == number]
        outcome: Any = outcomes.get(number, "context")
        found.append(
            DraftRecord(
                seed_id=str(number),
                number=0,
                begun_at=min((one.queued_at for one in own), default=0.0),
                ended_at=None if outcome == "unfinished" else max((one.done_at for one in own), default=0.0),
                outcome=outcome,
                reason="too_short" if outcome == "reject" else "",
                client_s=0.002,
            )
        )
    return found


def tick(at: float, server: Mapping[str, Any] | None = None, **given: Any) -> Tick:
    """A tick in which both servers work at their caps, with one request waiting at each."""
    state: dict[str, Any] = {
        "in_flight": 8,
        "cap": 8,
        "queued": 2,
        "running": 7,
        "waiting": 1,
        "token_usage": 0.5,
        **(server or {}),
    }
    client: dict[str, Any] = {
        "client_cpu_s": 0.1 * at,
        "loop_lag_s": 0.001,
        "work_queued": 10,
        "work_queue_size": 10,
        "rows_waiting": 0,
        "rows_waiting_limit": 100,
        "disk_s": 0.0,
        "drafts_in_flight": 16,
        **given,
    }
    return Tick(at=at, servers=[ServerTick(server=url, **state) for url in SERVERS], **client)


def steady_requests(number: int = 40) -> list[RequestRecord]:
    """Requests of 2 s, one begun each second from 0 s."""
    return [request(draft, float(draft), draft + 2.0) for draft in range(number)]


def measurement(
    requests: Sequence[RequestRecord] | None = None,
    ticks: Sequence[Tick] | None = None,
    outcomes: Mapping[int, str] | None = None,
    **given: Any,
) -> Measurement:
    """A run of 40 s: 10 s of warm-up, 20 s measured, 10 s of drain."""
    requests = steady_requests() if requests is None else requests
    found: dict[str, Any] = {
        "load": Load(warmup_s=10.0, duration_s=20.0),
        "started_at": 1_800_000_000.0,
        "models": ["m"],
        "gpus": 2,
        "warm_up": Interval(0.0, 10.0),
        "measured": Interval(10.0, 30.0),
        "drain": Interval(30.0, 40.0),
        "requests": list(requests),
        "drafts": drafts(requests, outcomes or {}),
        "ticks": [tick(float(second)) for second in range(1, 41)] if ticks is None else list(ticks),
        "seeds": len(requests),
        **given,
    }
    return Measurement(**found)
