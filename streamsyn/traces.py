"""Spans of what a run does: a trace a draft, with a span a step, a request and a write of the journal. Off by
default.

What is traced opens a `span`. Where spans go is decided by whoever runs the code: `traced` makes them go to a
`Tracer` for the block, and for the asyncio tasks begun in it. Without one a span costs about a microsecond.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol

Value = str | int | float | bool


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


@contextmanager
def span(name: str, attributes: Mapping[str, Value]) -> Iterator[Span]:
    """Open a span for the block. An exception that leaves it marks it as failed."""
    tracer = _TRACER.get()
    if tracer is None:
        yield _UNTRACED
        return
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
