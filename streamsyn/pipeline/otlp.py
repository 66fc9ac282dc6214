"""Exports traces to an OpenTelemetry collector; imported only when `run.traces` is set.

Spans are sent by a thread in batches. What a collector does not take, or takes too slowly, is dropped: it
never ends a run, nor holds it up. Keys of the collector come from `OTEL_EXPORTER_OTLP_HEADERS`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import structlog

import streamsyn
from streamsyn.errors import ConfigError
from streamsyn.fleet.server_spec import base_url
from streamsyn.plain_text import split_userinfo
from streamsyn.telemetry import Span, Tracer, Value

try:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise ConfigError("run.traces needs OpenTelemetry: pip install 'streamsyn[traces]'") from error

log = structlog.get_logger()

_TIMEOUT_S: Final = 3.0
"""Longest wait for a collector to take a batch, also at the end of a run."""
_WARN_EVERY_S: Final = 300.0
_QUEUED_SPANS: Final = 8192
_PROPAGATOR: Final = TraceContextTextMapPropagator()


@asynccontextmanager
async def exporting(collector: str) -> AsyncIterator[Tracer]:
    """Export spans to the collector during the block.

    Args:
        collector: Its base URL, such as `http://collector:4318`.

    Raises:
        ConfigError: It is not a valid URL, or has a password.
    """
    if split_userinfo(collector).userinfo is not None:
        raise ConfigError("run.traces: give no user or password; set OTEL_EXPORTER_OTLP_HEADERS")
    url = base_url(collector, "run.traces").removesuffix("/v1/traces")
    provider = await asyncio.to_thread(_provider, url)
    try:
        yield _OtlpTracer(provider.get_tracer("streamsyn", streamsyn.__version__))
    finally:
        await asyncio.to_thread(provider.shutdown)


def _provider(url: str) -> TracerProvider:
    exporter = OTLPSpanExporter(f"{url}/v1/traces", timeout=_TIMEOUT_S)
    resource = Resource.create({"service.name": "streamsyn", "service.version": streamsyn.__version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    processor = BatchSpanProcessor(
        _Patient(exporter, url),
        max_queue_size=_QUEUED_SPANS,
        export_timeout_millis=1000 * _TIMEOUT_S,
    )
    provider.add_span_processor(processor)
    return provider


class _Patient(SpanExporter):
    """Logs that a collector does not take spans, now and then, where OpenTelemetry would for each batch."""

    def __init__(self, exporter: SpanExporter, url: str) -> None:
        self._exporter = exporter
        self._url = url
        self._warned_at: float | None = None
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch; it is dropped if the collector does not take it."""
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001 - of a library, in its thread: traces must not end a run
            result, why = SpanExportResult.FAILURE, repr(error)
        else:
            why = "it did not accept them"
        now = time.monotonic()
        if result is not SpanExportResult.SUCCESS and (
            self._warned_at is None or now - self._warned_at >= _WARN_EVERY_S
        ):
            self._warned_at = now
            log.warning("traces.dropped", collector=self._url, spans=len(spans), error=why)
        return result

    def shutdown(self) -> None:
        """Close the connection."""
        self._exporter.shutdown()


class _OtlpTracer:
    """See Tracer."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    @contextmanager
    def span(self, name: str, attributes: Mapping[str, Value]) -> Iterator[Span]:
        """See Tracer."""
        with self._tracer.start_as_current_span(
            name, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as opened:
            yield _OtlpSpan(opened)

    def headers(self) -> dict[str, str]:
        """See Tracer."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return carrier


class _OtlpSpan:
    """See Span."""

    def __init__(self, opened: trace.Span) -> None:
        self._opened = opened

    def set(self, attributes: Mapping[str, Value]) -> None:
        """See Span."""
        self._opened.set_attributes(attributes)

    def failed(self, error: BaseException) -> None:
        """See Span."""
        self._opened.set_attribute("error.type", type(error).__name__)
        self._opened.set_status(trace.StatusCode.ERROR, str(error)[:500])
