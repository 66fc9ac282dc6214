"""What a measurement shows that other benchmarks do not: useful tokens, the prefix plan, where time goes.

Pure functions of a `Measurement`. Everything is of its window, except what is over time, which is of the
whole run. Rates count a request by the share of its time at the server that lies in the window: answers come
in waves, and whether a wave ends just before or after the end of the window is chance. What is per request is
of those that were answered in the window.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Final, Literal

import numpy

from streamsyn.bench.measurement import (
    Interval,
    Measurement,
    OutcomeKind,
    RequestRecord,
    ServerTick,
    Tick,
)

BUSY: Final = frozenset({"ServerBusy", "RateLimited"})
"""Errors of tries that are backpressure, and not failures."""
_NOT_BEGUN: Final = BUSY | {"RequestRefused", "ServerUnreachable", "WrongAddress"}
"""Errors of tries for which a server has written nothing."""
_MAX_POINTS: Final = 300
"""Most points over time; with more ticks, the values of neighbours are averaged."""
_SERVER_S: Final = "sglang:e2e_request_latency_seconds"
_GENERATED: Final = "sglang:generation_tokens_total"

Use = Literal["useful", "rejects", "retries", "hedges", "aborted"]
"""What tokens were written for: contexts; drafts that were rejected; answers that were asked once more; the
slower one of two hedged requests; requests that were given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixTokens:
    """Prompt tokens of the requests that were answered.

    Attributes:
        prompt: All of them.
        planned: Those that placement expected in the server's prefix cache.
        achieved: Those that were in it.
        computed: Those that were not.
        lost: Those that were planned, but computed.
        from_host: Those of `achieved` that came from host memory, where servers say so.
        from_storage: Those of `achieved` that came from storage, where servers say so.
    """

    prompt: int
    planned: int
    achieved: int
    computed: int
    lost: int
    from_host: int = 0
    from_storage: int = 0

    @property
    def kept_share(self) -> float | None:
        """Share of the planned tokens that were in the cache; None without a plan."""
        return 1 - self.lost / self.planned if self.planned else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeParts:
    """Mean seconds per answered request, by where they pass.

    Attributes:
        queue: Waiting in the client for a place at a server.
        network: Between client and server; None where servers do not report their own times, and then
            `server` includes it.
        server: At the server, its queue included.
        checks: In the recipe: prompts, parsing, checks.
        disk: Writing and syncing the log and the journal.
    """

    queue: float
    network: float | None
    server: float
    checks: float
    disk: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """What the run costs the client's machine.

    Attributes:
        cpu_ms_per_request: CPU milliseconds per answered request, all threads; without simulated servers.
        cpu_share: CPU seconds per second. In virtual time: of what a client would need, without sockets.
        loop_lag_ms: Median over the ticks of the longest delay of a timer in the event loop; None in virtual
            time.
        loop_lag_max_ms: The longest of all.
    """

    cpu_ms_per_request: float
    cpu_share: float
    loop_lag_ms: float | None
    loop_lag_max_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFigures:
    """One server, with means over the ticks of the window. None stands for what it does not report."""

    server: str
    requests: int
    tokens_per_s: float
    reported_tokens_per_s: float | None
    cap: float
    in_flight: float
    queued: float
    running: float | None
    waiting: float | None
    token_usage: float | None
    ejected_share: float
    failures: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOverTime:
    """One server at the times of `OverTime.at`."""

    server: str
    cap: list[float]
    in_flight: list[float]
    queued: list[float]
    waiting: list[float | None]
    token_usage: list[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class OverTime:
    """The whole run over time: one value for each time in `at`, in seconds since it began."""

    at: list[float]
    tokens_per_s: list[float]
    in_flight: list[float]
    cpu_share: list[float]
    loop_lag_ms: list[float | None]
    rows_waiting: list[float]
    servers: list[ServerOverTime]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Our section of the report.

    Attributes:
        useful_tokens_per_s: Tokens of contexts; the measure of throughput here.
        useful_tokens_per_s_per_gpu: The same for each GPU of the fleet.
        written_tokens_per_s: All tokens that servers wrote, also those written in vain.
        deducted_tokens_per_s: Those written in vain, by what for; of requests without an answer they are
            estimated from their time.
        contexts_per_s: Drafts that became contexts.
        outcomes: Drafts that ended in the window, by outcome: contexts, rejects by reason.
        prefix_tokens: The prefix plan and what became of it.
        seconds_per_request: Where time passes.
        client: What it costs the client.
        share_of_reported: Tokens per second in this record, relative to those that servers report in
            `/v1/loads`; clearly below 1, others use them, too. None where they report none.
        share_of_counters: The same with their Prometheus counters, over the whole measured part.
        share_of_capacity: Tokens per second relative to what the cost model allows; None with real servers.
        servers: Each server.
        over_time: The whole run over time.
    """

    useful_tokens_per_s: float
    useful_tokens_per_s_per_gpu: float
    written_tokens_per_s: float
    deducted_tokens_per_s: dict[str, float]
    contexts_per_s: float
    outcomes: dict[str, int]
    prefix_tokens: PrefixTokens
    seconds_per_request: TimeParts
    client: Client
    share_of_reported: float | None
    share_of_counters: float | None
    share_of_capacity: float | None
    servers: list[ServerFigures]
    over_time: OverTime


def figures(measurement: Measurement) -> Figures:
    """Return our section of the report."""
    window = measurement.window
    seconds = max(window.seconds, 1e-9)
    tokens = {use: sum_ / seconds for use, sum_ in _tokens_by_use(measurement, window).items()}
    useful, written = tokens.get("useful", 0.0), sum(tokens.values())
    answered = [one for one in measurement.requests if one.ended == "ok" and window.holds(one.done_at)]
    servers = _servers(measurement, window)
    ended = [one for one in measurement.drafts if one.ended_at is not None and window.holds(one.ended_at)]
    return Figures(
        useful_tokens_per_s=useful,
        useful_tokens_per_s_per_gpu=useful / max(1, measurement.gpus),
        written_tokens_per_s=written,
        deducted_tokens_per_s={use: tokens.get(use, 0.0) for use in _DEDUCTED},
        contexts_per_s=sum(draft.outcome == "context" for draft in ended) / seconds,
        outcomes=dict(Counter(draft.reason or draft.outcome for draft in ended)),
        prefix_tokens=_prefix_tokens(answered),
        seconds_per_request=_time_parts(measurement, answered, window),
        client=_client(measurement, len(answered), window),
        share_of_reported=_ratio(written, _total(one.reported_tokens_per_s for one in servers)),
        share_of_counters=_share_of_counters(measurement),
        share_of_capacity=_ratio(written, measurement.capacity_tokens_per_s),
        servers=servers,
        over_time=_over_time(measurement),
    )


_DEDUCTED: Final[tuple[Use, ...]] = ("rejects", "retries", "hedges", "aborted")


def share_within(request: RequestRecord, window: Interval) -> float:
    """Return the share of a request's time at its server that lies in the window."""
    if request.server_s <= 0:
        return float(window.holds(request.done_at))
    overlap = min(request.done_at, window.ends_at) - max(request.sent_at, window.begins_at)
    return max(0.0, overlap) / request.server_s


def ticks_of(measurement: Measurement, window: Interval) -> list[Tick]:
    """Return the ticks of an interval; each one is of the time since the one before.

    The first one is the last before the interval, if there is one: counters grow from its values.
    """
    before = [tick for tick in measurement.ticks if tick.at <= window.begins_at][-1:]
    later = [tick for tick in measurement.ticks if tick.at > window.begins_at]
    within = [tick for tick in later if tick.at < window.ends_at]
    return before + later[: len(within) + 1]


def server_ticks(ticks: Iterable[Tick]) -> Iterator[ServerTick]:
    """Yield each server at each tick."""
    return (server for tick in ticks for server in tick.servers)


def tokens_over_time(requests: Iterable[RequestRecord], edges: Sequence[float]) -> list[float]:
    """Return the tokens written between neighbouring `edges`, each answer's spread evenly over its time."""
    columns = [(one.sent_at, one.server_s, one.completion_tokens) for one in requests if one.ended == "ok"]
    if not columns or len(edges) < 2:
        return [0.0] * max(0, len(edges) - 1)
    sent, lasted, tokens = numpy.array(columns, dtype=float).T
    lasted = numpy.maximum(lasted, 1e-9)
    until = [float(tokens @ numpy.clip((edge - sent) / lasted, 0.0, 1.0)) for edge in edges]
    return [after - before for before, after in pairwise(until)]


def _tokens_by_use(measurement: Measurement, window: Interval) -> dict[Use, float]:
    """Return the tokens written in the window, by what they were written for.

    Tokens of drafts that the drain gave up are divided among the uses as the tokens of the others are, since
    these drafts ended only because the measurement did.
    """
    found: defaultdict[Use | None, float] = defaultdict(float)
    per_s = _tokens_per_request_s(measurement.requests)
    answered = {(one.draft, one.step) for one in measurement.requests if one.ended == "ok"}
    for one in measurement.requests:
        share = share_within(one, window)
        outcome = measurement.drafts[one.draft].outcome
        if not share or one.error in _NOT_BEGUN:
            continue
        tokens = one.completion_tokens if one.ended == "ok" else one.server_s * per_s
        useful = min(tokens, one.useful_tokens or 0.0)
        found["useful"] += share * useful
        found[_in_vain(one, outcome, (one.draft, one.step) in answered)] += share * (tokens - useful)
    unknown, known = found.pop(None, 0.0), sum(found.values())
    scale = 1 + unknown / known if known else 1.0
    return {use: scale * tokens for use, tokens in found.items() if use is not None}


def _in_vain(request: RequestRecord, outcome: OutcomeKind, is_answered: bool) -> Use | None:
    """Return why tokens of a request are in no context; None if its draft has no outcome yet.

    Args:
        request: The request.
        outcome: What its draft became.
        is_answered: Whether its step was answered, by this request or a different one.
    """
    if request.ended == "aborted" and is_answered:
        return "hedges"
    if outcome == "unfinished":
        return None
    if request.ended == "aborted":
        return "aborted"
    return "rejects" if outcome == "reject" else "retries"


def _tokens_per_request_s(requests: Iterable[RequestRecord]) -> float:
    """Return the tokens per second of one request, to estimate those of requests without an answer."""
    answered = [one for one in requests if one.ended == "ok"]
    return sum(one.completion_tokens for one in answered) / (sum(one.server_s for one in answered) or 1.0)


def _tokens_answered(requests: Iterable[RequestRecord], window: Interval) -> float:
    return sum(share_within(one, window) * one.completion_tokens for one in requests if one.ended == "ok")


def _prefix_tokens(answered: Sequence[RequestRecord]) -> PrefixTokens:
    prompt = sum(one.prompt_tokens for one in answered)
    achieved = sum(one.cached_tokens for one in answered)
    return PrefixTokens(
        prompt=prompt,
        planned=sum(one.planned_cached_tokens for one in answered),
        achieved=achieved,
        computed=prompt - achieved,
        lost=sum(max(0, one.planned_cached_tokens - one.cached_tokens) for one in answered),
        from_host=sum(one.cached_host_tokens for one in answered),
        from_storage=sum(one.cached_storage_tokens for one in answered),
    )


def _time_parts(measurement: Measurement, answered: Sequence[RequestRecord], window: Interval) -> TimeParts:
    number, numbers = len(answered) or 1, Counter(one.draft for one in measurement.requests)
    ended = [
        (draft, numbers[index])
        for index, draft in enumerate(measurement.drafts)
        if draft.ended_at is not None and window.holds(draft.ended_at)
    ]
    of_drafts = sum(requests for _, requests in ended) or 1
    whole = sum(one.server_s for one in answered) / number
    network = _network_s(measurement)
    log_s = window.seconds * growth_per_s(ticks_of(measurement, window), lambda tick: tick.disk_s)
    return TimeParts(
        queue=sum(one.queue_s for one in answered) / number,
        network=network,
        server=max(0.0, whole - (network or 0.0)),
        checks=sum(draft.client_s for draft, _ in ended) / of_drafts,
        disk=sum(draft.disk_s for draft, _ in ended) / of_drafts + log_s / number,
    )


def _network_s(measurement: Measurement) -> float | None:
    """Return the mean seconds of a request beyond its server's own time; None if not all servers report it.

    Both are of the measured part, which the counters span: in the window requests may be longer or shorter.
    """
    own, measured = _reported_server_s(measurement), measurement.measured
    answered = [
        one.server_s for one in measurement.requests if one.ended == "ok" and measured.holds(one.done_at)
    ]
    return None if own is None or not answered else max(0.0, fmean(answered) - own)


def _reported_server_s(measurement: Measurement) -> float | None:
    """Return the mean seconds of a request by the servers' own counters; None if not all have them."""
    seconds, count = (
        counter_growth(measurement, f"{_SERVER_S}_sum"),
        counter_growth(measurement, f"{_SERVER_S}_count"),
    )
    return seconds / count if seconds is not None and count else None


def counter_growth(measurement: Measurement, name: str) -> float | None:
    """Return by how much a Prometheus counter of all servers has grown; None if some lack it.

    A server has no counter with labels before the first thing that it counts: then it was 0.
    """
    readings: defaultdict[str, list[float | None]] = defaultdict(list)
    for reading in sorted(measurement.server_counters, key=lambda one: one.at):
        readings[reading.server].append(reading.values.get(name))
    servers = {server.server for server in server_ticks(measurement.ticks[-1:])}
    grown = [
        last - (first or 0.0)
        for first, *_, last in (readings[server] for server in servers if len(readings[server]) > 1)
        if last is not None
    ]
    return sum(grown) if servers and len(grown) == len(servers) else None


def _share_of_counters(measurement: Measurement) -> float | None:
    """Return it by the answers that ended in the measured part: servers count tokens when one ends."""
    generated, part = counter_growth(measurement, _GENERATED), measurement.measured
    ended = [one for one in measurement.requests if one.ended == "ok" and part.holds(one.done_at)]
    return _ratio(sum(one.completion_tokens for one in ended), generated)


def growth_per_s(ticks: Sequence[Tick], counter: Callable[[Tick], float]) -> float:
    """Return by how much a counter grows per second over ticks."""
    if len(ticks) < 2:
        return 0.0
    first, *_, last = ticks
    return (counter(last) - counter(first)) / max(last.at - first.at, 1e-9)


def _client(measurement: Measurement, answers: int, window: Interval) -> Client:
    ticks = ticks_of(measurement, window)
    cpu_share = growth_per_s(ticks, lambda tick: tick.client_cpu_s)
    lags = [1000 * tick.loop_lag_s for tick in ticks[1:] if tick.loop_lag_s is not None]
    return Client(
        cpu_ms_per_request=1000 * cpu_share * window.seconds / answers if answers else 0.0,
        cpu_share=cpu_share,
        loop_lag_ms=float(numpy.median(lags)) if lags else None,
        loop_lag_max_ms=max(lags, default=None),
    )


def _servers(measurement: Measurement, window: Interval) -> list[ServerFigures]:
    seen: defaultdict[str, list[ServerTick]] = defaultdict(list)
    for one in server_ticks(ticks_of(measurement, window)[1:]):
        seen[one.server].append(one)
    requests: defaultdict[str, list[RequestRecord]] = defaultdict(list)
    for request in measurement.requests:
        requests[request.server].append(request)
    seconds = max(window.seconds, 1e-9)
    return [
        ServerFigures(
            server=server,
            requests=sum(one.ended == "ok" and window.holds(one.done_at) for one in requests[server]),
            tokens_per_s=_tokens_answered(requests[server], window) / seconds,
            reported_tokens_per_s=_mean(0.0 if tick.ejected else tick.generated_per_s for tick in ticks),
            cap=fmean(tick.cap for tick in ticks),
            in_flight=fmean(tick.in_flight for tick in ticks),
            queued=fmean(tick.queued for tick in ticks),
            running=_mean(tick.running for tick in ticks),
            waiting=_mean(tick.waiting for tick in ticks),
            token_usage=_mean(tick.token_usage for tick in ticks),
            ejected_share=fmean(tick.ejected for tick in ticks),
            failures=sum(
                one.ended == "error" and one.error not in BUSY and window.holds(one.done_at)
                for one in requests[server]
            ),
        )
        for server, ticks in sorted(seen.items())
    ]


def _over_time(measurement: Measurement) -> OverTime:
    ticks = measurement.ticks
    size = max(1, -(-len(ticks) // _MAX_POINTS))
    lots = [ticks[start : start + size] for start in range(0, len(ticks), size)]
    ends = [lot[-1].at for lot in lots]
    tokens = tokens_over_time(measurement.requests, [0.0, *ends])
    cpu = [0.0, *(lot[-1].client_cpu_s for lot in lots)]
    lengths = [max(end - begin, 1e-9) for begin, end in pairwise([0.0, *ends])]
    names = sorted({one.server for one in server_ticks(ticks)})
    return OverTime(
        at=ends,
        tokens_per_s=[one / length for one, length in zip(tokens, lengths, strict=True)],
        in_flight=[fmean(sum(one.in_flight for one in tick.servers) for tick in lot) for lot in lots],
        cpu_share=[
            (after - before) / length for (before, after), length in zip(pairwise(cpu), lengths, strict=True)
        ],
        loop_lag_ms=[_scaled(_most(tick.loop_lag_s for tick in lot)) for lot in lots],
        rows_waiting=[fmean(tick.rows_waiting for tick in lot) for lot in lots],
        servers=[_server_over_time(name, lots) for name in names],
    )


def _server_over_time(name: str, lots: Sequence[Sequence[Tick]]) -> ServerOverTime:
    of_server = [[one for one in server_ticks(lot) if one.server == name] for lot in lots]

    def means(value: Callable[[ServerTick], float | None]) -> list[float | None]:
        return [_mean(value(one) for one in lot) for lot in of_server]

    return ServerOverTime(
        server=name,
        cap=[one or 0.0 for one in means(lambda one: one.cap)],
        in_flight=[one or 0.0 for one in means(lambda one: one.in_flight)],
        queued=[one or 0.0 for one in means(lambda one: one.queued)],
        waiting=means(lambda one: one.waiting),
        token_usage=means(lambda one: one.token_usage),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _total(values: Iterable[float | None]) -> float | None:
    """Return the sum; None if one of them is unknown."""
    found = list(values)
    return sum(value for value in found if value is not None) if found and None not in found else None


def _scaled(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _ratio(value: float, of: float | None) -> float | None:
    return value / of if of else None
