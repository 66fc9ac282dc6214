"""`/metrics`: the daemon, its servers and its runs that have not ended, for Prometheus."""

import asyncio
from collections.abc import Iterator
from typing import Any, Final

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from streamsyn.daemon.batch_record import STATUSES
from streamsyn.daemon.daemon import DAEMON, Daemon
from streamsyn.daemon.hosted_run import HostedRun
from streamsyn.daemon.route import Route
from streamsyn.daemon.run_state import STATES
from streamsyn.pipeline.metrics import RunFigures, run_metrics, server_metrics, server_timing_metrics

_ROUND: Final = 100
"""Runs after which other work of the event loop gets its turn."""


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


ROUTES: Final = (
    Route(
        method="GET",
        path="/metrics",
        handler=metrics,
        scope="read",
        summary="Return metrics in the text format of Prometheus.",
        answers={200: "text/plain"},
    ),
)
