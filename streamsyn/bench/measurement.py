"""The record of one measured run, from which everything that is reported is computed.

All times are seconds since the run began (`started_at` has the clock time), virtual ones in a simulation.

    0 ...... warm-up ...... | ........ measured ........ | .... drain ....
                                  [ steady state ]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

Ended = Literal["ok", "error", "aborted"]
"""How a request ended. An aborted one was given up by the client: a hedge that lost, or a drain that took too
long."""
OutcomeKind = Literal["context", "reject", "unfinished"]

TICK_S: Final = 1.0
"""Seconds between two ticks."""
STEADY_SHARE: Final = 0.5
"""Share of the measured part from which on a steady state stands for it."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A part of the run, from `begins_at` up to `ends_at`."""

    begins_at: float
    ends_at: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.ends_at - self.begins_at

    def holds(self, at: float) -> bool:
        """Whether a time is in it."""
        return self.begins_at <= at < self.ends_at


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One try of a request at one server. Full queues (503) and rate limits are tries, too.

    Attributes:
        draft: Index of its draft in `Measurement.drafts`.
        step: Number of the step within the draft, from 0.
        server: Base URL.
        model: The model that was asked.
        group: Key of its prefix group; "" for none.
        queued_at: When the try began to wait for a place at a server; a pause before a retry is included.
        sent_at: When it had its place and was sent.
        first_token_at: When the first token came; None where the answer was not streamed.
        done_at: When the answer was complete, or the try had failed.
        ended: How it ended.
        error: Name of the exception, such as `ServerBusy`; "" without one.
        error_message: Its message, shortened.
        is_hedge: Whether it is the second try of a request whose first one was still in flight.
        prompt_tokens: As the server reports, like all tokens; 0 without an answer.
        cached_tokens: Prompt tokens that were in the server's prefix cache.
        planned_cached_tokens: Prompt tokens that placement expected to be there.
        cached_host_tokens: Cached tokens that came from host memory, where the server says so.
        cached_storage_tokens: Cached tokens that came from storage, where the server says so.
        completion_tokens: Tokens generated.
        useful_tokens: Its part of the tokens of the context that its draft became: 0 for rejects and failed
            tries. The sum over the requests of a draft is `DraftRecord.useful_tokens`. None while the draft
            has no outcome: the drain gave it up.
    """

    draft: int
    step: int
    server: str
    model: str
    group: str
    queued_at: float
    sent_at: float
    done_at: float
    ended: Ended
    first_token_at: float | None = None
    error: str = ""
    error_message: str = ""
    is_hedge: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    planned_cached_tokens: int = 0
    cached_host_tokens: int = 0
    cached_storage_tokens: int = 0
    completion_tokens: int = 0
    useful_tokens: float | None = None

    @property
    def queue_s(self) -> float:
        """Seconds for which it waited for a place."""
        return self.sent_at - self.queued_at

    @property
    def server_s(self) -> float:
        """Seconds from sending to the end: at the server and on the network."""
        return self.done_at - self.sent_at


@dataclass(slots=True, kw_only=True)
class DraftRecord:
    """One draft: the requests of one context.

    Attributes:
        seed_id: Id of its seed.
        number: Number of the draft among those of its seed.
        begun_at: When a worker took it.
        ended_at: When it had its outcome; None if it was given up, or is still in flight.
        outcome: What it became.
        reason: Why it was rejected; "" otherwise.
        useful_tokens: Completion tokens of its context; 0 without one.
        wasted_tokens: Completion tokens that servers spent on it in vain, as far as they reported them.
        client_s: Seconds between its steps: the recipe's prompts, parsing and checks.
        disk_s: Seconds in which it waited for the journal of finished steps; part of `--with-log` alone.
    """

    seed_id: str
    number: int
    begun_at: float
    ended_at: float | None = None
    outcome: OutcomeKind = "unfinished"
    reason: str = ""
    useful_tokens: int = 0
    wasted_tokens: int = 0
    client_s: float = 0.0
    disk_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTick:
    """A server at a tick, from `Fleet.metrics`. None stands for what a server does not report.

    Attributes:
        server: Base URL.
        in_flight: Requests of this client in flight.
        cap: Most requests that may be in flight.
        decision: Why an adaptive cap was changed last, such as `kv_pool`; see `fleet.limiter`.
        queued: Requests that wait for a place at this server.
        running: Requests in the server's batch, as it reports.
        max_running: Most requests in its batch, as it reports.
        waiting: Requests in the server's queue, as it reports.
        waiting_uncached_tokens: Their prompt tokens that are not in its prefix cache, as it reports.
        token_usage: Share of its KV cache in use, 0 to 1, as it reports.
        generated_per_s: Tokens per second that it reports.
        ejected: Whether it gets no requests since it failed.
        counts: Counters of `Usage.counts`, from the beginning: `completions`, `completion_tokens`,
            `prompt_tokens`, `cached_tokens`, `planned_cached_tokens`, `failures`, `unfinished`,
            `unfinished_tokens`.
    """

    server: str
    in_flight: int
    cap: int
    queued: int
    decision: str = ""
    running: int | None = None
    max_running: int | None = None
    waiting: int | None = None
    waiting_uncached_tokens: int | None = None
    token_usage: float | None = None
    generated_per_s: float | None = None
    ejected: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """The client and the servers at one time, each `TICK_S`.

    Attributes:
        at: When.
        servers: Every server.
        client_cpu_s: CPU seconds of this process since the run began, all threads.
        loop_lag_s: Longest delay of a timer of the event loop since the last tick; None in virtual time.
        work_queued: Drafts on the work queue, which `work_queue_size` bounds.
        rows_waiting: Outcomes that wait for the disk, for assembly or for a reader of samples.
        rows_waiting_limit: Number of these at which no drafts are begun.
        disk_s: Seconds since the run began in which the log was written or synced.
        drafts_in_flight: Drafts that workers have taken.
    """

    at: float
    servers: Sequence[ServerTick]
    client_cpu_s: float
    loop_lag_s: float | None
    work_queued: int
    work_queue_size: int
    rows_waiting: int
    rows_waiting_limit: int
    disk_s: float
    drafts_in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCounters:
    """Counters of a server from its Prometheus endpoint, where it has one.

    Attributes:
        server: Base URL.
        at: When they were read.
        values: Value of each counter by name, labels summed.
    """

    server: str
    at: float
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What was asked for.

    Attributes:
        cap: Requests in flight a server: "auto" or a number.
        rate: Drafts per second of an open loop; None for a closed loop.
        warmup_s: Length of the warm-up; None: by the durations of requests.
        duration_s: Length of the measured part; None: by the durations of requests.
        with_log: Whether outcomes are written to a durable log and assembled.
        slos: Service level objectives in milliseconds, by AIPerf's names of latencies: for `goodput`.
    """

    cap: int | Literal["auto"] = "auto"
    rate: float | None = None
    warmup_s: float | None = None
    duration_s: float | None = None
    with_log: bool = False
    slos: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What came of a replay.

    Attributes:
        recorded_factor: Prompt tokens for each that was computed, of the same answers in the recorded run.
        factor: The same now.
        seconds: From the begin to the last answer.
        left_out: Drafts that were not repeated, by why.
        notes: What to know about it, one line each.
    """

    recorded_factor: float
    factor: float
    seconds: float
    left_out: Mapping[str, int]
    notes: Sequence[str]


@dataclass(slots=True, kw_only=True)
class Measurement:
    """One measured run.

    Attributes:
        load: What was asked for.
        started_at: When it began, in Unix seconds.
        models: The models that wrote.
        gpus: GPUs of the fleet.
        is_simulated: Whether it ran in process, in virtual time.
        warm_up: From the beginning to the measured part.
        measured: The measured part; the load goes on through its begin and up to its end.
        drain: What was in flight at the end of the measured part finished here.
        steady: The steady state within `measured`; None if there is none.
        requests: All tries of requests, of warm-up and drain, too.
        drafts: All drafts.
        ticks: The ticks.
        server_counters: Read at the begin and at the end of `measured`.
        capacity_tokens_per_s: Tokens per second that the whole fleet can write by the simulator's cost model;
            None with real servers.
        seeds: Different seeds that were begun.
        seeds_read: Lines read from the seeds, also of drafts that were not begun.
        repeats: Drafts of seeds that had been begun before, since the seeds ran out: their prompts
            are cached.
        replayed: What came of a replay; None without one.
        stopped: Why it ended early; "" otherwise.
        has_too_many_rejects: Whether rejects are why.
        warnings: What limits the use of this measurement, one sentence each.
    """

    load: Load
    started_at: float
    models: Sequence[str] = ()
    gpus: int = 1
    is_simulated: bool = False
    warm_up: Interval = Interval(0.0, 0.0)
    measured: Interval = Interval(0.0, 0.0)
    drain: Interval = Interval(0.0, 0.0)
    steady: Interval | None = None
    requests: list[RequestRecord] = field(default_factory=list)
    drafts: list[DraftRecord] = field(default_factory=list)
    ticks: list[Tick] = field(default_factory=list)
    server_counters: list[ServerCounters] = field(default_factory=list)
    capacity_tokens_per_s: float | None = None
    seeds: int = 0
    seeds_read: int = 0
    repeats: int = 0
    replayed: Replayed | None = None
    stopped: str = ""
    has_too_many_rejects: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether the measured part is as long as asked for."""
        return not self.stopped

    @property
    def window(self) -> Interval:
        """The interval that figures are of: the steady state, if it is most of the measured part.

        Else the whole measured part: a run that stops and goes, for a slow disk or reader, is never steady.
        """
        if self.steady is not None and self.steady.seconds >= STEADY_SHARE * self.measured.seconds:
            return self.steady
        return self.measured
