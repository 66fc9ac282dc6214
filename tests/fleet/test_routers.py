"""A router is recognised by its own words, recorded from sglang-router 0.3.2, and by nothing else."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from streamsyn.fleet.routers import RouterInfo, identify_router, warn_about_router
from streamsyn.fleet.transport import Transport, http_transport
from streamsyn.simulator.app import running
from streamsyn.simulator.settings import SimulatorConfig

pytestmark = pytest.mark.usefixtures("no_task_left")

SERVERS = ("http://127.0.0.1:30001", "http://127.0.0.1:30002")
UNKNOWN = (404, "", b"")
"""What the router answers to paths that it does not have: `/v1/loads`, `/server_info`, `/abort_request`."""
SERVER_INFO = (
    200,
    "text/plain; charset=utf-8",
    b'{"router_manager":true,"routers_count":1,"workers_count":2}',
)

Answer = tuple[int, str, bytes]


def worker(url: str, **labels: str) -> dict[str, Any]:
    """One entry of GET /workers, as recorded."""
    return {
        "id": "9e4e909d-9d9a-4d60-8069-15ead7012175",
        "url": url,
        "model_id": "simulated",
        "priority": 50,
        "cost": 1.0,
        "worker_type": "regular",
        "is_healthy": True,
        "load": 0,
        "connection_mode": "HTTP",
        "metadata": {
            "served_model_name": "simulated",
            "model_type": "llama",
            "architectures": '["LlamaForCausalLM"]',
            "tp_size": "1",
            "dp_size": "1",
            "model_path": "simulated",
            **labels,
        },
        "disable_health_check": False,
    }


def workers(*entries: dict[str, Any]) -> Answer:
    """GET /workers, as recorded."""
    stats = {"prefill_count": 0, "decode_count": 0, "regular_count": len(entries)}
    body = {"workers": list(entries), "total": len(entries), "stats": stats}
    return 200, "application/json", json.dumps(body).encode()


class Answering:
    """A server that answers by path, and remembers what it was asked."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self.asked: list[str] = []
        self._answers = answers

    async def answer(self, request: web.Request) -> web.Response:
        """Answer as recorded."""
        self.asked.append(f"{request.method} {request.path}")
        status, kind, body = self._answers.get(request.path, UNKNOWN)
        return web.Response(status=status, body=body, headers={"Content-Type": kind} if kind else {})


@asynccontextmanager
async def answering(answers: Mapping[str, Answer]) -> AsyncIterator[tuple[Transport, Answering]]:
    """A transport to a server that answers so."""
    handler = Answering(answers)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with http_transport(url, {}, connect_timeout_s=2.0) as transport:
            yield transport, handler
    finally:
        await runner.cleanup()


async def test_a_router_that_does_not_tell_its_policy() -> None:
    """As the command line starts it, whatever its policy: one GET tells of its workers."""
    async with answering({"/workers": workers(*map(worker, SERVERS))}) as (transport, handler):
        facts = await identify_router(transport)
    assert RouterInfo(2, SERVERS, None) == facts
    assert ["GET /workers"] == handler.asked


@pytest.mark.parametrize("place", ["metadata", "labels"])
async def test_a_policy_that_workers_are_labelled_with(place: str) -> None:
    """By POST /workers with the label `policy`: 0.3.2 shows it as metadata, the newer gateway as a label."""
    entries = [worker(url) | {place: {"policy": "manual"}} for url in SERVERS]
    async with answering({"/workers": workers(*entries)}) as (transport, _):
        assert RouterInfo(2, SERVERS, "manual") == await identify_router(transport)


async def test_workers_that_disagree_tell_no_policy() -> None:
    """The first one that came decides, and which that was is not told."""
    entries = [worker(SERVERS[0], policy="manual"), worker(SERVERS[1])]
    async with answering({"/workers": workers(*entries)}) as (transport, _):
        assert RouterInfo(2, SERVERS, None) == await identify_router(transport)


@pytest.mark.parametrize("refusal", [(401, "", b""), (401, "text/plain", b"Invalid authentication token")])
async def test_a_router_that_lists_its_workers_for_its_administrator(refusal: Answer) -> None:
    """With control-plane keys: its own facts are open to all."""
    async with answering({"/workers": refusal, "/get_server_info": SERVER_INFO}) as (transport, handler):
        assert RouterInfo(2) == await identify_router(transport)
    assert ["GET /workers", "GET /get_server_info"] == handler.asked


async def test_a_router_without_workers() -> None:
    """One that was just started."""
    async with answering({"/workers": workers()}) as (transport, _):
        assert RouterInfo(0) == await identify_router(transport)


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"/workers": (404, "application/json", b'{"detail":"Not Found"}')},
        {"/workers": (200, "text/html", b"<html>all paths lead here</html>")},
        {"/workers": (200, "application/json", b"[]")},
        {"/workers": (200, "application/json", b'{"workers": 4}')},
        {"/workers": (200, "application/json", b'{"workers": ["idle"]}')},
        {"/workers": (500, "text/plain", b"no")},
        {"/workers": (401, "", b"")},
        {"/workers": (403, "", b""), "/get_server_info": (200, "", b'{"model_path": "m"}')},
        {"/workers": (401, "", b""), "/get_server_info": (200, "", b"[]")},
    ],
)
async def test_what_is_no_router(answers: Mapping[str, Answer]) -> None:
    """Neither are other servers, whatever they have at that path, nor is it said of them."""
    async with answering(answers) as (transport, _):
        with capture_logs() as logs:
            assert await warn_about_router("http://s", transport) is None
    assert [] == [entry for entry in logs if entry["event"] == "fleet.router"]


async def test_a_server_is_no_router() -> None:
    """SGLang has no such route; nor is one recognised that cannot be reached."""
    async with running(SimulatorConfig()) as server, http_transport(server.url, {}) as transport:
        assert await identify_router(transport) is None
    async with http_transport(server.url, {}, connect_timeout_s=2.0) as transport:
        assert await identify_router(transport) is None


@pytest.mark.parametrize(
    ("policy", "level", "says"),
    [
        (
            "cache_aware",
            "warning",
            "its policy cache_aware sends most requests to one worker; pass its workers",
        ),
        ("round_robin", "warning", "its policy round_robin splits prefix groups; pass its workers"),
        ("manual", "info", None),
        ("consistent_hashing", "info", None),
    ],
)
async def test_what_is_said_of_a_router(policy: str, level: str, says: str | None) -> None:
    """A warning that says what to do; a word only where groups stay together."""
    entries = [worker(url, policy=policy) for url in SERVERS]
    async with answering({"/workers": workers(*entries)}) as (transport, _):
        with capture_logs() as logs:
            await warn_about_router("http://r", transport)
    (entry,) = logs
    assert ("fleet.router", level, "http://r", 2, policy) == tuple(
        entry[name] for name in ("event", "log_level", "server", "workers", "policy")
    )
    assert says is None or entry["advice"].startswith(says)
    assert says is None or "--policy manual" in entry["advice"]


async def test_a_policy_that_is_not_told_is_warned_of() -> None:
    """It is cache_aware unless somebody chose another one; with one worker there is nothing to choose."""
    async with answering({"/workers": workers(*map(worker, SERVERS))}) as (transport, _):
        with capture_logs() as logs:
            await warn_about_router("http://r", transport)
    assert [("warning", "unknown")] == [(entry["log_level"], entry["policy"]) for entry in logs]
    assert "if it is cache_aware" in logs[0]["advice"]
    assert RouterInfo(1, SERVERS[:1]).advice is None
