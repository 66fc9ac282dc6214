"""The verdict: what limited the run, as coded warnings, and which of them is the main limit.

    seeds -> client -> caps -> servers: queue, batch, KV pool, prefix cache -> disk -> assembly, reader

A pure function of a measurement. A limit shows itself by what stands still because of it. Where drafts wait
until outcomes are taken, the disk or the reader is the limit. Where the servers have room, it is the client,
or the load that was asked for. Where they always have work waiting, it is their KV pool, prompts that are
computed again, or their speed.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Final, Literal

from streamsyn.bench.figures import (
    BUSY,
    Figures,
    counter_growth,
    growth_per_s,
    server_ticks,
    ticks_of,
    tokens_over_time,
)
from streamsyn.bench.measurement import Load, Measurement, ServerTick, Tick

Code = Literal[
    "client_bound",
    "server_bound",
    "queue_starved",
    "prefix_lost",
    "kv_pressure",
    "disk_bound",
    "reader_bound",
    "unsteady",
]

BUSY_SHARE: Final = 0.5
"""Share of the servers' time with work waiting there from which the servers are the limit."""
PAUSED_SHARE: Final = 0.5
"""Share of the time in which no draft may begin, since too many outcomes wait."""
DISK_SHARE: Final = 0.5
"""Seconds of writing and syncing per second from which outcomes wait for the disk, and not for a reader."""
CPU_SHARE: Final = 0.9
"""CPU seconds per second of the client, whose event loop has one core."""
LAG_MS: Final = 50.0
"""Median of the longest delay of a timer in each second; with time to spare it is below 10 ms."""
KEPT_SHARE: Final = 0.8
"""Share of the planned prefix tokens that were cached; blocks and pages of caches cost some per cent."""
PLANNED_SHARE: Final = 0.05
"""Share of the prompt tokens that is planned to be cached, from which the plan matters."""
LOST_WORK_SHARE: Final = 0.2
"""Share of the servers' work that went into lost prefixes, from which these are the main limit."""
_COMPUTED_PER_WRITTEN: Final = 3.0
"""Prompt tokens that are computed in the time of writing one token in a full batch: 2.6 by the cost model
`h100`, 3.4 by `cpu`."""
POOL_FULL: Final = 0.9
"""Share of the KV pool in use from which it is full: servers keep the rest for running requests to grow."""
_PREFILL_TOKENS: Final = 8192
"""Prompt tokens that SGLang computes in one prefill (`--chunked-prefill-size`)."""
POOL_FULL_SHARE: Final = 0.5
"""Share of the servers' time with a full pool."""
RETRACTED_SHARE: Final = 0.05
"""Retractions per answer; each one computes a prompt and what was written to it once more."""
FAILED_SHARE: Final = 0.1
"""Share of the requests that failed. Full queues and rate limits do not count as failures."""
EJECTED_SHARE: Final = 0.02
"""Share of the servers' time in which they got no requests, since they had failed."""
VARIATION: Final = 0.25
"""Coefficient of variation of the tokens per second between tenths of the window."""
_PARTS: Final = 10
_AT_CAP: Final = 0.9
"""Share of its cap from which a server has as many requests in flight as it may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedWarning:
    """One limit that was reached, in GuideLLM's form.

    Attributes:
        code: Which one.
        observed: The value that shows it.
        threshold: The value from which it is a limit, or up to which for `prefix_lost`.
        unit: Unit of both.
        sample_count: Number of observations behind `observed`.
        note: What was seen, and what to change.
    """

    code: Code
    observed: float
    threshold: float
    unit: str
    sample_count: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What limited the run.

    Attributes:
        limit: The main limit; None if none was found.
        headline: The same as a sentence.
        warnings: All limits that were reached, the main one first.
    """

    limit: Code | None
    headline: str
    warnings: list[CodedWarning]


_HEADLINES: Final[dict[Code | None, str]] = {
    "client_bound": "The client is the limit: its CPU or its event loop cannot keep up with the servers.",
    "server_bound": "The servers are the limit: they have as much work as they can do.",
    "queue_starved": "The load is the limit: the servers have room for more work.",
    "prefix_lost": "Lost prefixes are the limit: servers compute prompts that should be in their caches.",
    "kv_pressure": "The KV cache is the limit: it holds no more requests.",
    "disk_bound": "The disk is the limit: drafts wait until outcomes are in the log.",
    "reader_bound": "The reader is the limit: drafts wait for assembly, or for whoever reads the samples.",
    "unsteady": "The run was too unsteady to name a limit.",
    None: "No limit was found.",
}


def verdict(measurement: Measurement, found: Figures) -> Verdict:
    """Return what limited the run, from its record and its figures."""
    ticks = ticks_of(measurement, measurement.window)
    reached = list(_limits(measurement, found, ticks)) if len(ticks) > 1 else []
    limit = next((warning.code for warning, may_be_main in reached if may_be_main), None)
    warnings = sorted((warning for warning, _ in reached), key=lambda warning: warning.code != limit)
    return Verdict(limit=limit, headline=_HEADLINES[limit], warnings=warnings)


def _limits(
    measurement: Measurement, found: Figures, ticks: Sequence[Tick]
) -> Iterator[tuple[CodedWarning, bool]]:
    """Yield the limits that were reached, and whether each may be the main one; causes before effects."""
    paused, client = _paused(measurement, ticks), _client_bound(found, ticks)
    _, *ticks = ticks
    busy = [
        is_busy for one in server_ticks(ticks) if (is_busy := _is_busy(one, measurement.load)) is not None
    ]
    is_busy = bool(busy) and fmean(busy) >= BUSY_SHARE
    failing, varied = _ejected(ticks) or _failed(measurement), _varied(measurement)
    if paused:
        yield paused, True
    if client:
        yield client, not is_busy or measurement.is_simulated  # virtual servers wait for no client
    if failing:
        yield failing, True
    retracted, lost, full = _retracted(measurement), _prefix_lost(found), _pool_full(ticks)
    if retracted:
        yield retracted, is_busy
    if lost:
        yield lost, is_busy and _lost_work(measurement, found) >= LOST_WORK_SHARE
    if full and not retracted:
        yield full, True
    if is_busy:
        yield _server_bound(fmean(busy), len(busy), found), True
    elif busy and not (paused or client):
        yield _queue_starved(measurement, ticks, 1 - fmean(busy), len(busy)), True
    if varied and not failing:
        yield varied, True


def _is_busy(server: ServerTick, load: Load) -> bool | None:
    """Whether a server had as much work as it can do; None if that cannot be known."""
    if server.ejected:
        return None
    if server.waiting is not None:
        is_full = server.running is not None and server.running >= (server.max_running or float("inf"))
        return server.waiting > 0 or is_full or _has_full_pool(server)
    if load.cap == "auto" and load.rate is None:  # the adaptive cap has stopped where more did not pay
        return server.in_flight >= _AT_CAP * server.cap
    return None


def _paused(measurement: Measurement, ticks: Sequence[Tick]) -> CodedWarning | None:
    """Drafts wait until outcomes are taken: by the disk, or else by assembly and its reader."""
    share = fmean(0 < tick.rows_waiting_limit <= tick.rows_waiting for tick in ticks[1:])
    if share < PAUSED_SHARE:
        return None
    disk = growth_per_s(ticks, lambda tick: tick.disk_s)
    if disk >= DISK_SHARE and not measurement.is_simulated:
        return CodedWarning(
            code="disk_bound",
            observed=disk,
            threshold=DISK_SHARE,
            unit="disk seconds per second",
            sample_count=len(ticks) - 1,
            note=f"No draft could begin for {share:.0%} of the time: outcomes waited for the disk. Put the "
            "run directory on a faster disk, or sync less often: raise sink.sync_interval_s and "
            "sink.sync_rows.",
        )
    return CodedWarning(
        code="reader_bound",
        observed=share,
        threshold=PAUSED_SHARE,
        unit="share of the time",
        sample_count=len(ticks) - 1,
        note="No draft could begin, as outcomes waited for assembly or for the reader of the samples. Read "
        "faster, make assembly cheaper (fewer contexts a sample, no target_tokens), or write contexts only "
        "(assembly.write = false) and assemble later with `streamsyn export`.",
    )


def _client_bound(found: Figures, ticks: Sequence[Tick]) -> CodedWarning | None:
    client = found.client
    advice = (
        f"Each answer costs the client {client.cpu_ms_per_request:.1f} ms of CPU. Make the recipe's checks "
        "cheaper or move blocking calls out of them, give the client a core of its own, or split the seeds "
        "over several runs."
    )
    if client.loop_lag_ms is not None and client.loop_lag_ms >= LAG_MS:
        return CodedWarning(
            code="client_bound",
            observed=client.loop_lag_ms,
            threshold=LAG_MS,
            unit="ms",
            sample_count=sum(tick.loop_lag_s is not None for tick in ticks),
            note=f"The event loop stood still for {client.loop_lag_ms:.0f} ms in most seconds. {advice}",
        )
    if client.cpu_share >= CPU_SHARE:
        return CodedWarning(
            code="client_bound",
            observed=client.cpu_share,
            threshold=CPU_SHARE,
            unit="CPU seconds per second",
            sample_count=len(ticks) - 1,
            note=f"The client used {client.cpu_share:.2f} of a core. {advice}",
        )
    return None


def _ejected(ticks: Sequence[Tick]) -> CodedWarning | None:
    seen = list(server_ticks(ticks))
    share = fmean(server.ejected for server in seen) if seen else 0.0
    if share < EJECTED_SHARE:
        return None
    names = sorted({server.server for server in seen if server.ejected})
    return CodedWarning(
        code="unsteady",
        observed=share,
        threshold=EJECTED_SHARE,
        unit="share of server seconds",
        sample_count=len(seen),
        note=f"Servers failed and came back or stayed away: {', '.join(names[:5])}"
        f"{' and others' if len(names) > 5 else ''}. Look at their logs, or leave them out, "
        "and measure again.",
    )


def _failed(measurement: Measurement) -> CodedWarning | None:
    window = measurement.window
    ended = [one for one in measurement.requests if window.holds(one.done_at) and one.error not in BUSY]
    failed = [one for one in ended if one.ended == "error"]
    if not failed or len(failed) < FAILED_SHARE * len(ended):
        return None
    by_server = Counter(one.server for one in failed).most_common()
    names = ", ".join(f"{server} ({number:,})" for server, number in by_server[:5])
    message = failed[0].error_message or failed[0].error
    return CodedWarning(
        code="unsteady",
        observed=len(failed) / len(ended),
        threshold=FAILED_SHARE,
        unit="share of requests",
        sample_count=len(ended),
        note=f"Requests failed at {names}{' and others' if len(by_server) > 5 else ''}; the first one with: "
        f"{message.removesuffix('.')}. Mend the servers or the requests, and measure again.",
    )


def _varied(measurement: Measurement) -> CodedWarning | None:
    """The tokens per second change much within the window; an open loop's arrivals do that by themselves."""
    window = measurement.window
    if measurement.load.rate is not None or window.seconds <= 0:
        return None
    edges = [window.begins_at + part * window.seconds / _PARTS for part in range(_PARTS + 1)]
    written = tokens_over_time(measurement.requests, edges)
    mean = fmean(written)
    variation = pstdev(written) / mean if mean else 0.0
    if variation < VARIATION:
        return None
    return CodedWarning(
        code="unsteady",
        observed=variation,
        threshold=VARIATION,
        unit="coefficient of variation",
        sample_count=_PARTS,
        note="The tokens per second changed much within the window. Measure for longer (--duration-s, "
        "--warmup-s), and see that nothing else uses the servers.",
    )


def _retracted(measurement: Measurement) -> CodedWarning | None:
    retracted = counter_growth(measurement, "sglang:num_retracted_requests_total")
    part = measurement.measured
    answers = sum(one.ended == "ok" and part.holds(one.done_at) for one in measurement.requests)
    if not retracted or not answers or retracted / answers < RETRACTED_SHARE:
        return None
    return CodedWarning(
        code="kv_pressure",
        observed=retracted / answers,
        threshold=RETRACTED_SHARE,
        unit="retractions per answer",
        sample_count=answers,
        note="Servers ran out of KV cache and put running requests back into their queues, to be computed "
        "again. Lower the cap (or use --cap auto), give the pool more memory (--mem-fraction-static), or "
        "store it in fp8 (--kv-cache-dtype fp8_e5m2).",
    )


def _has_full_pool(server: ServerTick) -> bool:
    """Whether a server's KV pool keeps requests out of its batch.

    SGLang reserves room for what running requests may still write, so a pool can be full with a low usage:
    then requests wait though the batch has seats, and though one prefill could compute all their prompts.
    The adaptive cap keeps them from waiting there: by what they will need, it sends as many as the pool
    holds.
    """
    if server.token_usage is None:
        return False
    has_seats = server.max_running is not None and (server.running or 0) < _AT_CAP * server.max_running
    waits_for_prefill = (server.waiting_uncached_tokens or 0) > _PREFILL_TOKENS
    is_at_cap = server.in_flight >= _AT_CAP * server.cap
    return (
        server.token_usage >= POOL_FULL
        or (bool(server.waiting) and has_seats and not waits_for_prefill)
        or (server.decision == "kv_pool" and is_at_cap)
    )


def _pool_full(ticks: Sequence[Tick]) -> CodedWarning | None:
    full = [_has_full_pool(server) for server in server_ticks(ticks) if server.token_usage is not None]
    share = fmean(full) if full else 0.0
    if share < POOL_FULL_SHARE:
        return None
    return CodedWarning(
        code="kv_pressure",
        observed=share,
        threshold=POOL_FULL_SHARE,
        unit="share of server seconds",
        sample_count=len(full),
        note="The KV pools were full, or reserved: no further request fit into the batch, though it had "
        "seats. Give the pool more memory (--mem-fraction-static), store it in fp8 (--kv-cache-dtype), "
        "write shorter contexts, or lower recipe.max_tokens to what is really written.",
    )


def _prefix_lost(found: Figures) -> CodedWarning | None:
    prefix = found.prefix_tokens
    kept = prefix.kept_share
    if kept is None or kept >= KEPT_SHARE or prefix.planned < PLANNED_SHARE * prefix.prompt:
        return None
    return CodedWarning(
        code="prefix_lost",
        observed=kept,
        threshold=KEPT_SHARE,
        unit="share of planned tokens",
        sample_count=sum(server.requests for server in found.servers),
        note=f"{prefix.lost:,} of {prefix.planned:,} prompt tokens that should have been cached were "
        "computed. Give the URLs of servers instead of a router's, leave the radix cache on, and see that "
        "its pool has room beside running requests: a lower cap, or more memory.",
    )


def _lost_work(measurement: Measurement, found: Figures) -> float:
    """Return the share of the servers' work that went into lost prefixes, in tokens written."""
    window = measurement.window
    written = sum(
        one.completion_tokens
        for one in measurement.requests
        if one.ended == "ok" and window.holds(one.done_at)
    )
    prefix = found.prefix_tokens
    work = prefix.computed + _COMPUTED_PER_WRITTEN * written
    return prefix.lost / work if work else 0.0


def _server_bound(busy: float, samples: int, found: Figures) -> CodedWarning:
    capacity = found.share_of_capacity
    note = "Requests waited at the servers: more in flight would only wait longer. Add servers or GPUs, use "
    note += "faster ones, or lower the work (shorter contexts, quantized weights)."
    if capacity is not None:
        note += f" They write {capacity:.0%} of what their cost model allows."
    return CodedWarning(
        code="server_bound",
        observed=busy,
        threshold=BUSY_SHARE,
        unit="share of server seconds",
        sample_count=samples,
        note=note,
    )


def _queue_starved(
    measurement: Measurement, ticks: Sequence[Tick], idle: float, samples: int
) -> CodedWarning:
    load = measurement.load
    seen = [server for server in server_ticks(ticks) if not server.ejected]
    cap = max((server.cap for server in seen), default=0)
    at_cap = fmean(server.in_flight >= _AT_CAP * server.cap for server in seen) if seen else 0.0
    if load.rate is not None:
        advice = f"Raise --rate, which was {load.rate:g} drafts per second"
    elif load.cap != "auto":
        advice = f"Raise --cap, which was {load.cap}, or use --cap auto"
    elif at_cap >= BUSY_SHARE:
        advice = f"The cap, at most {cap}, was reached: raise fleet.max_in_flight, or warm up for longer"
    else:
        advice = "Too few drafts were ready: read the seeds from a faster source, or raise run.queue_size"
    return CodedWarning(
        code="queue_starved",
        observed=idle,
        threshold=1 - BUSY_SHARE,
        unit="share of server seconds",
        sample_count=samples,
        note=f"No request waited at the servers and their KV pools had room. {advice}.",
    )
