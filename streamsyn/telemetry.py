"""What a run reports about itself: logs, which go to stderr, counters, and the spans of traces.

Tracing is off by default: a trace a draft, with a span a step, a request and a write of the journal. What is
traced opens a `span`. Where spans go is decided by whoever runs the code: `traced` makes them go to a
`Tracer` for the block, and for the asyncio tasks begun in it. Without one a span costs about a microsecond.
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from streamsyn.plain_text import MAX_MESSAGE_BYTES, cut, visible, without_userinfo

_TRACEBACK_BYTES = 2**15
"""Longest traceback in the log."""
_REACHED = 0.95
"""Share of its target length from which a sample counts as long enough."""
Value = str | int | float | bool
"""An attribute of a span."""


def configure_logs(*, as_json: bool, level: int = logging.INFO) -> None:
    """Send structlog's events to stderr: lines for a person, or one JSON object a line.

    An event may carry `plain`, a sentence: a person gets it in place of the event's name and fields.
    """
    shape: list[structlog.typing.Processor] = (
        [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _without_plain,
            structlog.processors.JSONRenderer(),
        ]
        if as_json
        else [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            _plain,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0),
        ]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,  # the daemon's: run, request_id
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            _make_safe,
            *shape,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # looked up each time: see `progress`
    )
    if as_json:  # log records of libraries become JSON too
        logging.captureWarnings(True)
        logging.basicConfig(handlers=[_Forward()])


def log_through_logging() -> None:
    """Send structlog's events to the standard library's loggers below `streamsyn`, as a library does.

    Where the program has configured structlog itself, nothing changes.
    """
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.format_exc_info,
            _make_safe,
            _one_line,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )


def _one_line(_logger: object, _method: str, event: structlog.typing.EventDict) -> str:
    """The event as text: its sentence if it has one, or its name and fields; a traceback on further lines."""
    exception = event.pop("exception", None)
    name = event.pop("event")
    plain = event.pop("plain", None)
    text = plain or " ".join([str(name), *(f"{key}={value!r}" for key, value in event.items())])
    return f"{text}\n{exception}" if exception else text


def _make_safe(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Shorten texts, cut passwords out of URLs in them, and make control characters visible.

    Servers, seeds and libraries wrote some of them.
    """
    return {
        key: _safe(value, _TRACEBACK_BYTES if key == "exception" else MAX_MESSAGE_BYTES)
        for key, value in event.items()
    }


def _safe(value: Any, max_bytes: int) -> Any:
    match value:
        case str():
            return visible(without_userinfo(cut(value, max_bytes)))
        case dict():
            return {_safe(key, max_bytes): _safe(below, max_bytes) for key, below in value.items()}
        case list() | tuple():
            return [_safe(below, max_bytes) for below in value]
        case _:
            return value


def _plain(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if "plain" not in event:
        return event
    return {key: event[key] for key in ("timestamp", "level")} | {"event": event["plain"]}


def _without_plain(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    event.pop("plain", None)
    return event


class _Forward(logging.Handler):
    """Forwards records of the standard library's logging to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        log.log(record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info)


@dataclass(slots=True)
class Counters:
    """What this process has done so far. Stages add to it; progress, summary and Prometheus read it."""

    started_at: float = field(default_factory=time.monotonic)
    seeds_read: int = 0
    """Lines read, valid and invalid."""
    drafts_read: int = 0
    """Outcomes that these lines will have: one per invalid line, `recipe.contexts_per_seed` per seed."""
    finished_before: int = 0
    """Drafts skipped because an earlier run finished them."""
    repeated: int = 0
    """Seeds skipped because their id was read before."""
    other_partitions: int = 0
    """Seeds and invalid lines skipped because they belong to other partitions (`seeds.partition`)."""
    reading_done: bool = False
    contexts: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    reject_examples: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The origin and the detail of the first reject of each reason."""
    context_words: int = 0
    """Words of the contexts."""
    flags: Counter[str] = field(default_factory=Counter)
    """Contexts by flag: what is odd about them, though they passed the checks."""
    samples: int = 0
    short_samples: int = 0
    """Samples under 95 % of their target length."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cached_host_tokens: int = 0
    """Those of them that came from the host memory of a server, as far as servers say so."""
    cached_storage_tokens: int = 0
    useful_tokens: int = 0
    """Completion tokens of contexts."""
    thinking_tokens: int = 0
    """Tokens of thoughts among these."""
    wasted_tokens: int = 0
    """Completion tokens of discarded answers: failed checks, retries, rejects."""
    retries: int = 0
    disk_s: float = 0.0
    """Seconds in which outcomes were being written to the log or synced."""
    scored: int = 0
    """Contexts sent to servers for scoring."""
    unscored: int = 0
    """Contexts among these that servers failed to score."""
    scoring_prompt_tokens: int = 0
    scoring_cached_tokens: int = 0
    scoring_tokens: int = 0
    """Completion tokens of answers requested for scoring; not counted elsewhere."""
    scoring_retries: int = 0

    @property
    def outcomes(self) -> int:
        """Contexts and rejects together."""
        return self.contexts + self.rejects.total()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run started."""
        return time.monotonic() - self.started_at

    def count_context(
        self,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        cached_host_tokens: int,
        cached_storage_tokens: int,
        completion_tokens: int,
        thinking_tokens: int,
        words: int,
        flags: Iterable[str],
    ) -> None:
        """Add a context that has been written to the log."""
        self.contexts += 1
        self.context_words += words
        self.flags.update(flags)
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.cached_host_tokens += cached_host_tokens
        self.cached_storage_tokens += cached_storage_tokens
        self.useful_tokens += completion_tokens
        self.thinking_tokens += thinking_tokens

    @property
    def cached_by_tier(self) -> dict[str, int]:
        """Cached prompt tokens by where they were; `device` unless the server said otherwise."""
        elsewhere = self.cached_host_tokens + self.cached_storage_tokens
        return {
            "device": self.cached_tokens - elsewhere,
            "host": self.cached_host_tokens,
            "storage": self.cached_storage_tokens,
        }

    def count_reject(self, reason: str, origin: str, detail: str) -> None:
        """Add a reject that has been written to the log."""
        self.rejects[reason] += 1
        self.reject_examples.setdefault(reason, (origin, detail))

    def count_sample(self, n_tokens: int, target_tokens: int | None) -> None:
        """Add a sample that has been delivered, with its length, and the length it should have if any."""
        self.samples += 1
        self.short_samples += target_tokens is not None and n_tokens < _REACHED * target_tokens

    def count_scoring(self, figures: Mapping[str, int], retries: int, *, failed: bool) -> None:
        """Add the token counts and retries of scoring one context."""
        self.scored += 1
        self.unscored += failed
        self.scoring_prompt_tokens += figures["prompt_tokens"]
        self.scoring_cached_tokens += figures["cached_tokens"]
        self.scoring_tokens += figures["completion_tokens"]
        self.scoring_retries += retries


class Span(Protocol):
    """A part of a trace that is going on."""

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Add attributes."""
        ...

    def failed(self, error: BaseException) -> None:
        """Mark the span as failed."""
        ...


class Tracer(Protocol):
    """Takes spans."""

    def span(self, name: str, attributes: Mapping[str, Value]) -> AbstractContextManager[Span]:
        """Open a span for the block, within the one that is open in this context."""
        ...

    def headers(self) -> dict[str, str]:
        """Return the HTTP headers that name the open span, as W3C Trace Context has them."""
        ...


_TRACER: ContextVar[Tracer | None] = ContextVar("tracer", default=None)


class _Untraced:
    """The span of a block that nobody traces."""

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_: object) -> None:
        """Let an exception pass."""

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Forget them."""

    def failed(self, error: BaseException) -> None:
        """Forget it."""


_UNTRACED = _Untraced()


@contextmanager
def traced(tracer: Tracer | None) -> Iterator[None]:
    """Have spans go to `tracer`, or nowhere, in the block and in asyncio tasks begun in it."""
    token = _TRACER.set(tracer)
    try:
        yield
    finally:
        _TRACER.reset(token)


def span(name: str, attributes: Mapping[str, Value]) -> AbstractContextManager[Span]:
    """Open a span for the block. An exception that leaves it marks it as failed."""
    tracer = _TRACER.get()
    return _UNTRACED if tracer is None else _traced_span(tracer, name, attributes)


@contextmanager
def _traced_span(tracer: Tracer, name: str, attributes: Mapping[str, Value]) -> Iterator[Span]:
    with tracer.span(name, attributes) as opened:
        try:
            yield opened
        except BaseException as error:
            opened.failed(error)
            raise


def trace_headers() -> dict[str, str]:
    """Return the HTTP headers that name the open span; none without a tracer."""
    tracer = _TRACER.get()
    return {} if tracer is None else tracer.headers()
