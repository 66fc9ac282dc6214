"""The health of the daemon: `/healthz`, `/readyz`, `/metrics` for Prometheus, and `/v1/diagnostics`.

Diagnostics are what to look at when the daemon behaves strangely, without secrets or seeds.
"""

import asyncio
import gc
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

import streamsyn
from streamsyn.daemon.batch_record import STATUSES
from streamsyn.daemon.bodies import JsonBody
from streamsyn.daemon.daemon import DAEMON, Daemon
from streamsyn.daemon.disk_space import free_on_disk
from streamsyn.daemon.hosted_run import HostedRun
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.route import Route, json_response
from streamsyn.daemon.run_record import STATES
from streamsyn.pipeline.prometheus import RunFigures, run_metrics, server_metrics, server_timing_metrics
from streamsyn.plain_text import without_userinfo_within

_ROUND: Final = 100
"""Runs after which other work of the event loop gets its turn."""
_PACKAGES: Final = ("aiohttp", "orjson", "pydantic", "jinja2", "structlog", "zstandard", "prometheus-client")
_MAX_TASKS: Final = 1000
_MAX_FRAMES: Final = 8
_MAX_RUNS: Final = 1000


class Health(JsonBody):
    """The daemon is alive."""

    status: str


class Ready(JsonBody):
    """The daemon can work."""

    status: str


async def healthz(_request: web.Request) -> web.Response:
    """Answer as long as the event loop does."""
    return json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """Answer 503 while the daemon ends, and while no server can be used: then runs wait."""
    why = request.app[DAEMON].why_not_ready
    if why is not None:
        raise Problem(503, why)
    return json_response({"status": "ready"})


async def metrics(request: web.Request) -> web.Response:
    """Return all metrics. Each process counts from zero; runs that have ended are left out."""
    daemon = request.app[DAEMON]
    runs = []
    for number, run in enumerate(daemon.hosted(), 1):
        runs.append((run, run.as_json()))
        if number % _ROUND == 0:
            await asyncio.sleep(0)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Found([*_daemon_metrics(daemon), *_hosted_metrics(runs)]))
    text = await asyncio.to_thread(generate_latest, registry)
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})


class _Found(Collector):
    """Metrics that have been collected."""

    def __init__(self, found: list[Metric]) -> None:
        self._found = found

    def collect(self) -> list[Metric]:
        return self._found


def _daemon_metrics(daemon: Daemon) -> Iterator[Metric]:
    is_ready = daemon.why_not_ready is None
    yield GaugeMetricFamily(
        "streamsyn_ready",
        "1 while the daemon can work, as /readyz answers.",
        value=is_ready,
    )
    yield GaugeMetricFamily(
        "streamsyn_start_time_seconds", "When the daemon started, in Unix seconds.", value=daemon.started_at
    )
    states = GaugeMetricFamily("streamsyn_runs", "Runs by state, those of batches aside.", labels=["state"])
    by_state = daemon.runs.by_state()
    for state in STATES:
        states.add_metric([state], by_state.get(state, 0))
    yield states
    batches = GaugeMetricFamily("streamsyn_batches", "Batches by status.", labels=["status"])
    by_status = daemon.batches.by_status()
    for status in STATUSES:
        batches.add_metric([status], by_status[status])
    yield batches
    yield GaugeMetricFamily(
        "streamsyn_webhooks_pending",
        "Events that their receivers have not taken yet.",
        value=daemon.hosting.webhooks.pending,
    )
    servers = daemon.hosting.servers
    yield from server_metrics(servers.describe())
    yield from server_timing_metrics(servers.timings())


def _hosted_metrics(runs: list[tuple[HostedRun, dict[str, Any]]]) -> Iterator[Metric]:
    """Yield the metrics of runs, with the label `run`."""
    accepted = CounterMetricFamily("streamsyn_seeds_accepted", "Seeds accepted.", labels=["run"])
    waiting = GaugeMetricFamily(
        "streamsyn_seeds_waiting",
        "Seeds accepted, neither in flight nor with an outcome.",
        labels=["run"],
    )
    in_flight = GaugeMetricFamily("streamsyn_in_flight", "Requests in flight.", labels=["run"])
    lag = GaugeMetricFamily(
        "streamsyn_consumer_lag_rows",
        "Rows that a named consumer has not acknowledged.",
        labels=["run", "consumer", "kind"],
    )
    for run, shown in runs:
        accepted.add_metric([run.id], shown["counts"]["accepted"])
        waiting.add_metric([run.id], shown["counts"]["waiting"])
        in_flight.add_metric([run.id], shown["counts"]["in_flight"])
        for consumer in shown["consumers"]:
            lag.add_metric([run.id, consumer["name"], consumer["kind"]], consumer["lag"])
    yield from (accepted, waiting, in_flight, lag)
    yield from run_metrics(
        [
            RunFigures(run.summary.counters, run.summary.timings, {"run": run.id})
            for run, _ in runs
            if run.summary is not None
        ]
    )


class Diagnostics(JsonBody):
    """The state of the process.

    `versions` of Python and packages; `process`: memory, threads, open files; `config` without passwords;
    `tasks`: asyncio tasks with their stacks, innermost last; `runs`: those that have not ended.
    """

    versions: dict[str, str]
    process: dict[str, Any]
    config: dict[str, Any]
    tasks: list[dict[str, Any]]
    runs: list[dict[str, Any]]


async def diagnostics(request: web.Request) -> web.Response:
    """Describe the process."""
    daemon = request.app[DAEMON]
    return json_response(
        {
            "versions": await asyncio.to_thread(_versions),
            "process": await asyncio.to_thread(_process, daemon),
            "config": without_userinfo_within(daemon.config.model_dump(mode="json")),
            "tasks": _tasks(),
            "runs": [_run(run) for run in daemon.hosted()[:_MAX_RUNS]],
        }
    )


def _versions() -> dict[str, str]:
    found = {"streamsyn": streamsyn.__version__, "python": sys.version, "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _process(daemon: Daemon) -> dict[str, Any]:
    memory = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text("utf-8").splitlines()
        if ":" in line
    )
    return {
        "pid": os.getpid(),
        "uptime_s": round(time.time() - daemon.started_at, 1),
        "held": daemon.hosting.held,
        "rss_bytes": _kib(memory, "VmRSS"),
        "max_rss_bytes": _kib(memory, "VmHWM"),
        "free_disk_bytes": free_on_disk(daemon.root),
        "open_files": _open_files(),
        "threads": [thread.name for thread in threading.enumerate()],
        "gc_objects": gc.get_count(),
    }


def _kib(memory: dict[str, str], name: str) -> int:
    return int(memory[name].split()[0]) * 1024


def _open_files() -> dict[str, int]:
    """Number of open files, by kind; their names are not shown."""
    kinds: dict[str, int] = {}
    for entry in os.scandir("/proc/self/fd"):
        try:
            target = os.readlink(entry.path)  # noqa: PTH115 - most targets are not paths
        except FileNotFoundError:
            continue  # closed meanwhile: the folder itself, for example
        kind = "file" if target.startswith("/") else target.split(":")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def _tasks() -> list[dict[str, Any]]:
    tasks = sorted(asyncio.all_tasks(), key=lambda task: task.get_name())
    return [
        {
            "name": task.get_name(),
            "stack": [
                f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_qualname}"
                for frame in task.get_stack(limit=_MAX_FRAMES)
            ],
        }
        for task in tasks[:_MAX_TASKS]
    ]


def _run(run: Any) -> dict[str, Any]:
    return {
        "id": run.id,
        "state": run.state,
        "is_executed": run.is_executed,
        "unread_seeds": run.unread_seeds,
        "progress": run.summary.progress() if run.summary is not None else {},
    }


ROUTES: Final = (
    Route(
        method="GET",
        path="/healthz",
        handler=healthz,
        scope="open",
        summary="Whether the daemon is alive.",
        answers={200: Health},
    ),
    Route(
        method="GET",
        path="/readyz",
        handler=readyz,
        scope="open",
        summary="Whether the daemon can work: it is not ending, and a server can be used.",
        answers={200: Ready},
        problems=(503,),
    ),
    Route(
        method="GET",
        path="/metrics",
        handler=metrics,
        scope="read",
        summary="Return metrics in the text format of Prometheus.",
        answers={200: "text/plain"},
    ),
    Route(
        method="GET",
        path="/v1/diagnostics",
        handler=diagnostics,
        scope="admin",
        summary="The state of the process, for a report of a problem: without secrets and without seeds.",
        answers={200: Diagnostics},
    ),
)
