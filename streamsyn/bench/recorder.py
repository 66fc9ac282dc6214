"""Records a run while it goes on: its spans, and a tick each second. Runs without a benchmark pay nothing.

The recorder is a `telemetry.Tracer`: a draft, its steps and their requests reach it as they would reach an
OpenTelemetry collector. What servers and queues hold comes from the summary of the run.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Final, Self

from streamsyn.bench.measurement import DraftRecord, RequestRecord, ServerTick, Tick
from streamsyn.pipeline.summary import RunSummary
from streamsyn.plain_text import cut
from streamsyn.simulator.cpu_time import SPENT
from streamsyn.telemetry import Span, Value

LAG_EVERY_S: Final = 0.05
"""Seconds of the timer whose delay is the lag of the event loop."""
_MESSAGE_BYTES: Final = 300
SCORING_STEP: Final = -1
"""Step of a request that scores what was written."""

_Attributes = Mapping[str, Value]


class Recorder:
    """Keeps the record of one run.

    Args:
        clock: Seconds of the event loop.

    Attributes:
        requests: Tries of requests that have ended.
        drafts: Drafts that have begun, in this order.
        ticks: Ticks so far.
        drafts_in_flight: Drafts without an outcome.
        requests_in_flight: Requests without an answer.
        lag_s: Longest delay of a timer since the last tick; None before the first one is measured.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._cpu_began_s = _cpu_s()
        self.lag_s: float | None = None
        self.requests: list[RequestRecord] = []
        self.drafts: list[DraftRecord] = []
        self.ticks: list[Tick] = []
        self.drafts_in_flight = 0
        self.requests_in_flight = 0

    def begin(self) -> None:
        """Count the seconds from now on."""
        self._began, self._cpu_began_s = self._clock(), _cpu_s()

    def now(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._began

    def span(self, name: str, attributes: _Attributes) -> AbstractContextManager[Span]:
        """See Tracer."""
        if name == "draft":
            return _DraftSpan(self, attributes)
        draft = _DRAFT.get()
        if draft is None or draft.recorder is not self:
            return nullcontext(_UNRECORDED)
        match name:
            case "step":
                return _StepSpan(draft, attributes)
            case "request":
                return _RequestSpan(draft, attributes)
            case "journal":
                return _JournalSpan(draft)
            case _:
                return nullcontext(_UNRECORDED)

    def headers(self) -> dict[str, str]:
        """See Tracer: a benchmark sends what a run sends without traces."""
        return {}

    def tick(self, summary: RunSummary) -> None:
        """Add a tick with the present figures of the run."""
        queues = summary.queues()
        work, results = ((0, 0), (0, 0)) if queues is None else (queues.work, queues.results)
        self.ticks.append(
            Tick(
                at=self.now(),
                servers=[_server_tick(metrics) for metrics in summary.servers()],
                client_cpu_s=_cpu_s() - self._cpu_began_s,
                loop_lag_s=self.lag_s,
                work_queued=work[0],
                work_queue_size=work[1],
                rows_waiting=results[0],
                rows_waiting_limit=results[1],
                disk_s=summary.counters.disk_s,
                drafts_in_flight=self.drafts_in_flight,
            )
        )
        if self.lag_s is not None:
            self.lag_s = 0.0

    async def watch_lag(self) -> None:
        """Measure the lag of the event loop, until it is cancelled. Not for virtual time, which has none."""
        while True:
            due = self._clock() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            self.lag_s = max(self.lag_s or 0.0, self._clock() - due)


def _cpu_s() -> float:
    """Return the CPU seconds of this process, without those of servers that are simulated in it."""
    return time.process_time() - SPENT.seconds


def _server_tick(metrics: Mapping[str, Any]) -> ServerTick:
    given = {name: metrics.get(name) for name in _REPORTED}
    return ServerTick(
        server=metrics["server"],
        in_flight=metrics["in_flight"],
        cap=metrics["cap"],
        decision=metrics.get("last_decision", ""),
        queued=metrics["queued"],
        ejected=metrics.get("ejected", False),
        counts={name: metrics[name] for name in _COUNTS if name in metrics},
        **given,
    )


_REPORTED: Final = (
    "running",
    "max_running",
    "waiting",
    "waiting_uncached_tokens",
    "token_usage",
    "generated_per_s",
)
_COUNTS: Final = (
    "completions",
    "completion_tokens",
    "prompt_tokens",
    "cached_tokens",
    "planned_cached_tokens",
    "failures",
    "unfinished",
    "unfinished_tokens",
)


class _Unrecorded:
    def set(self, attributes: _Attributes) -> None:
        """Forget them."""

    def failed(self, error: BaseException) -> None:
        """Forget it."""


_UNRECORDED: Final = _Unrecorded()


class _DraftSpan:
    """A draft in progress."""

    def __init__(self, recorder: Recorder, attributes: _Attributes) -> None:
        self.recorder = recorder
        self._attributes = attributes
        self._token: Token[_DraftSpan | None]
        self._has_outcome = False
        self.step: int | None = None
        """The step that is open."""
        self.free_at = 0.0
        """When the open step began, or its last try ended: since then its next try waits for a place."""
        self.open_requests = 0
        self.elsewhere_s = 0.0
        """Seconds of its steps and of the journal."""
        self.requests: list[RequestRecord] = []

    def __enter__(self) -> Self:
        recorder = self.recorder
        self.record = DraftRecord(
            seed_id=str(self._attributes["seed.id"]),
            number=int(self._attributes["draft.number"]),
            begun_at=recorder.now(),
        )
        self.index = len(recorder.drafts)
        recorder.drafts.append(self.record)
        recorder.drafts_in_flight += 1
        self._token = _DRAFT.set(self)
        return self

    def set(self, attributes: _Attributes) -> None:
        record = self.record
        self._has_outcome = True
        record.outcome = "context" if attributes["outcome.kind"] == "context" else "reject"
        record.reason = str(attributes.get("reject.reason", ""))
        record.wasted_tokens = int(attributes["outcome.wasted_tokens"])
        record.useful_tokens = int(attributes["outcome.completion_tokens"])

    def failed(self, error: BaseException) -> None:
        """A draft that is given up has no outcome."""

    def __exit__(self, *_: object) -> None:
        _DRAFT.reset(self._token)
        self.recorder.drafts_in_flight -= 1
        if not self._has_outcome:
            return
        record = self.record
        record.ended_at = self.recorder.now()
        record.client_s = max(0.0, record.ended_at - record.begun_at - self.elsewhere_s)
        written = sum(request.completion_tokens for request in self.requests if _is_written(request))
        share = record.useful_tokens / written if written else 0.0
        for request in self.requests:
            request.useful_tokens = share * request.completion_tokens if _is_written(request) else 0.0


def _is_written(request: RequestRecord) -> bool:
    """Whether its answer may be a part of the context."""
    return request.ended == "ok" and request.step != SCORING_STEP


_DRAFT: ContextVar[_DraftSpan | None] = ContextVar("draft", default=None)


class _StepSpan:
    """A step: from the recipe's request to its answer, with all tries."""

    def __init__(self, draft: _DraftSpan, attributes: _Attributes) -> None:
        self._draft = draft
        self._number = int(attributes["step.number"])

    def __enter__(self) -> Self:
        draft = self._draft
        self._began = draft.free_at = draft.recorder.now()
        draft.step = self._number
        return self

    def set(self, attributes: _Attributes) -> None:
        """It has none."""

    def failed(self, error: BaseException) -> None:
        """Its last request has failed."""

    def __exit__(self, *_: object) -> None:
        self._draft.step = None
        self._draft.elsewhere_s += self._draft.recorder.now() - self._began


class _JournalSpan:
    """A finished step that is being written to the journal."""

    def __init__(self, draft: _DraftSpan) -> None:
        self._draft = draft

    def __enter__(self) -> Span:
        self._began = self._draft.recorder.now()
        return _UNRECORDED

    def __exit__(self, *_: object) -> None:
        seconds = self._draft.recorder.now() - self._began
        self._draft.record.disk_s += seconds
        self._draft.elsewhere_s += seconds


class _RequestSpan:
    """One try at one server."""

    def __init__(self, draft: _DraftSpan, attributes: _Attributes) -> None:
        self._draft = draft
        sent_at = draft.recorder.now()
        is_hedge = draft.step is not None and draft.open_requests > 0
        waits_since = draft.free_at if draft.step is not None and not is_hedge else sent_at
        self._record = RequestRecord(
            draft=draft.index,
            step=SCORING_STEP if draft.step is None else draft.step,
            server=str(attributes["server.address"]),
            model=str(attributes["gen_ai.request.model"]),
            group=str(attributes["prefix.group"]),
            queued_at=waits_since,
            sent_at=sent_at,
            done_at=sent_at,
            ended="ok",
            is_hedge=is_hedge,
        )

    def __enter__(self) -> Self:
        self._draft.open_requests += 1
        self._draft.recorder.requests_in_flight += 1
        return self

    def set(self, attributes: _Attributes) -> None:
        record = self._record
        if "gen_ai.usage.input_tokens" not in attributes:
            record.first_token_at = self._draft.recorder.now()
            return
        record.prompt_tokens = int(attributes["gen_ai.usage.input_tokens"])
        record.completion_tokens = int(attributes["gen_ai.usage.output_tokens"])
        record.cached_tokens = int(attributes["gen_ai.usage.cached_tokens"])
        record.planned_cached_tokens = int(attributes["gen_ai.usage.planned_cached_tokens"])
        record.cached_host_tokens = int(attributes.get("gen_ai.usage.cached_host_tokens", 0))
        record.cached_storage_tokens = int(attributes.get("gen_ai.usage.cached_storage_tokens", 0))

    def failed(self, error: BaseException) -> None:
        record = self._record
        record.ended = "aborted" if isinstance(error, asyncio.CancelledError) else "error"
        record.error, record.error_message = type(error).__name__, cut(str(error), _MESSAGE_BYTES)
        record.completion_tokens = getattr(error, "completion_tokens", 0)

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        draft, record = self._draft, self._record
        record.done_at = draft.free_at = draft.recorder.now()
        draft.open_requests -= 1
        draft.recorder.requests_in_flight -= 1
        draft.requests.append(record)
        draft.recorder.requests.append(record)
        if record.step == SCORING_STEP:
            draft.elsewhere_s += record.server_s
