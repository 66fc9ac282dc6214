"""A router is recognised by its answers, recorded from sglang-router 0.3.2."""

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


async def test_a_router_without_a_reported_policy() -> None:
    """A router as started from the command line lists its workers, not its policy."""
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


async def test_workers_with_different_policies() -> None:
    """With different policies the router's policy is unknown."""
    entries = [worker(SERVERS[0], policy="manual"), worker(SERVERS[1])]
    async with answering({"/workers": workers(*entries)}) as (transport, _):
        assert RouterInfo(2, SERVERS, None) == await identify_router(transport)


@pytest.mark.parametrize("refusal", [(401, "", b""), (401, "text/plain", b"Invalid authentication token")])
async def test_a_router_that_lists_its_workers_for_its_administrator(refusal: Answer) -> None:
    """With control-plane keys, the router's info is open to all."""
    async with answering({"/workers": refusal, "/get_server_info": SERVER_INFO}) as (transport, handler):
        assert RouterInfo(2) == await identify_router(transport)
    assert ["GET /workers", "GET /get_server_info"] == handler.asked


async def test_a_router_without_workers() -> None:
    """A router that was just started has no workers."""
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
async def test_other_servers_are_not_routers(answers: Mapping[str, Answer]) -> None:
    """Other servers with an answer at that path are not routers, and nothing is logged."""
    async with answering(answers) as (transport, _):
        with capture_logs() as logs:
            assert await warn_about_router("http://s", transport) is None
    assert [] == [entry for entry in logs if entry["event"] == "fleet.router"]


async def test_sglang_is_not_a_router() -> None:
    """SGLang has no such route; an unreachable URL is not a router either."""
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
async def test_the_advice_for_each_policy(policy: str, level: str, says: str | None) -> None:
    """A policy that splits groups is a warning with advice; others are an info line."""
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


async def test_an_unknown_policy_is_a_warning() -> None:
    """An unknown policy may be cache_aware, the default; with one worker it does not matter."""
    async with answering({"/workers": workers(*map(worker, SERVERS))}) as (transport, _):
        with capture_logs() as logs:
            await warn_about_router("http://r", transport)
    assert [("warning", "unknown")] == [(entry["log_level"], entry["policy"]) for entry in logs]
    assert "if it is cache_aware" in logs[0]["advice"]
    assert RouterInfo(1, SERVERS[:1]).advice is None
