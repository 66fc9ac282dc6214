"""Traces: a trace a draft, a span a step and a request, sent to a collector that may be away."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from streamsyn.errors import ConfigError
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.transport import Reply, Transport
from streamsyn.pipeline import otlp
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run_in_loop
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import Fault, SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from tests.pipeline.test_run_in_loop import URL, Runs, ids


class Collector:
    """Takes spans over HTTP on a loopback port."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.service = ""
        self._connections: set[object] = set()

    @property
    def exporters(self) -> int:
        """How many connections sent spans."""
        return len(self._connections)

    async def _take(self, request: web.Request) -> web.Response:
        self._connections.add(request.transport)
        found = ExportTraceServiceRequest.FromString(await request.read())
        for resource in found.resource_spans:
            named = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.service = named["service.name"]
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Serve during the block; yields the base URL."""
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


class Recorded:
    """Transports that note the trace context of each chat request."""

    def __init__(self, servers: InProcessServers) -> None:
        self._servers = servers
        self.parents: list[str] = []

    @asynccontextmanager
    async def connect(self, spec: ServerSpec) -> AsyncIterator[Transport]:
        """See Connect."""
        async with self._servers.connect(spec) as transport:
            yield _Recording(transport, self.parents)


class _Recording:
    def __init__(self, transport: Transport, parents: list[str]) -> None:
        self._transport = transport
        self._parents = parents

    async def exchange(self, method: str, path: str, **given: Any) -> Reply:
        """See Transport."""
        if path.startswith("/v1/chat"):
            self._parents.append(given["headers"].get("traceparent", ""))
        return await self._transport.exchange(method, path, **given)


def traced_run(root: Path, seeds: int) -> tuple[RunRequest, Recorded]:
    """A run whose first try fails."""
    runs = Runs(root)
    simulation = Simulation(SimulatorConfig(), lambda number, _: Fault.CUT_BODY if number == 1 else None)
    recorded = Recorded(InProcessServers({URL: simulation}))
    request = runs.request("a", seeds, preflight=False)
    request.connect = recorded.connect
    return request, recorded


def with_traces(request: RunRequest, collector: str) -> RunRequest:
    """The same with `run.traces`."""
    section = request.config.run.model_copy(update={"traces": collector})
    request.config = request.config.model_copy(update={"run": section})
    return request


def attributes(span: Span) -> dict[str, Any]:
    """The attributes of a span."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "") for one in span.attributes}


async def test_a_trace_a_draft(tmp_path: Path) -> None:
    """Spans of steps lie in that of their draft, those of requests in their step; servers get the headers."""
    request, recorded = await asyncio.to_thread(traced_run, tmp_path, 5)
    collector = Collector()
    async with collector.listening() as url:
        await run_in_loop(with_traces(request, url))
    assert [5, 5] == await asyncio.to_thread(ids, tmp_path / "out-a")
    assert "streamsyn" == collector.service
    by_name: dict[str, list[Span]] = defaultdict(list)
    for one in collector.spans:
        by_name[one.name].append(one)
    assert {"draft": 5, "step": 5, "request": 6} == {name: len(spans) for name, spans in by_name.items()}
    assert 5 == len({draft.trace_id for draft in by_name["draft"]})
    drafts = {draft.span_id: draft for draft in by_name["draft"]}
    steps = {step.span_id: step for step in by_name["step"]}
    assert not any(draft.parent_span_id for draft in drafts.values())
    for step in steps.values():
        assert step.trace_id == drafts[step.parent_span_id].trace_id
    for sent in by_name["request"]:
        assert sent.trace_id == steps[sent.parent_span_id].trace_id
    sent_as = {f"00-{sent.trace_id.hex()}-{sent.span_id.hex()}" for sent in by_name["request"]}
    assert sent_as == {parent[:-3] for parent in recorded.parents}  # without the flags
    [failed] = [sent for sent in by_name["request"] if sent.status.code == Status.STATUS_CODE_ERROR]
    assert "ServerUnavailable" == attributes(failed)["error.type"]
    fine = next(sent for sent in by_name["request"] if sent is not failed)
    assert URL == attributes(fine)["server.address"]
    assert attributes(fine)["gen_ai.usage.output_tokens"] > 0
    assert {"context"} == {attributes(draft)["outcome.kind"] for draft in drafts.values()}
    assert 5 == len({attributes(draft)["seed.id"] for draft in drafts.values()})


async def test_a_collector_that_is_away_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is as without traces, and one warning says that spans were dropped."""
    monkeypatch.setattr(otlp, "_TIMEOUT_S", 0.2)
    request, _ = await asyncio.to_thread(traced_run, tmp_path, 5)
    with structlog.testing.capture_logs() as logged:
        summary = await run_in_loop(with_traces(request, "http://127.0.0.1:9"))
    assert (None, 5) == (summary.stopped, summary.contexts)
    assert ["http://127.0.0.1:9"] == [one["collector"] for one in logged if one["event"] == "traces.dropped"]


async def test_without_traces_servers_get_no_headers(tmp_path: Path) -> None:
    request, recorded = await asyncio.to_thread(traced_run, tmp_path, 2)
    await run_in_loop(request)
    assert {""} == set(recorded.parents)


@pytest.mark.parametrize(
    ("url", "said"),
    [("collector:4318", "not a valid URL"), ("http://user:geheim@collector:1", "OTEL_EXPORTER_OTLP_HEADERS")],
)
async def test_a_collector_that_cannot_be(tmp_path: Path, url: str, said: str) -> None:
    """A mistake of the configuration, which does not show a password."""
    request, _ = await asyncio.to_thread(traced_run, tmp_path, 1)
    with pytest.raises(ConfigError, match=said) as raised:
        await run_in_loop(with_traces(request, url))
    assert "geheim" not in str(raised.value)
