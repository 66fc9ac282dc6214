"""Metrics of a run for Prometheus, imported only when `run.metrics_listen` is set.

The numbers are those of progress and summary, read at each scrape, so they cost nothing in between. To add
a metric of a run, count in `telemetry.Counters` and add a line to a table below: `run.metrics_listen` and the
daemon serve it. Metrics of the daemon itself are in `daemon/health_routes.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from streamsyn.errors import ConfigError
from streamsyn.fleet.server import Histogram, Timings
from streamsyn.telemetry import Counters

log = structlog.get_logger()

_SERVER_GAUGES = {
    "in_flight": "Requests in flight.",
    "cap": "Most requests that may be in flight (the adaptive cap).",
    "waiting": "Requests in the server's queue, as the server reports.",
    "waiting_uncached_tokens": "Queued prompt tokens that are not cached, as the server reports.",
    "generated_per_s": "Tokens generated per second, as the server reports.",
    "running": "Requests in the server's batch, as the server reports.",
    "token_usage": "Share of the server's KV cache in use, 0 to 1, as the server reports.",
    "ejected": "1 while the server gets no requests because it failed.",
    "draining": "1 while the server gets no new requests because it is being removed.",
    "weight": "The server's weight in placement, relative to the others.",
}
_NAMES = {"generated_per_s": "generated_tokens_per_second", "token_usage": "token_usage_ratio"}
"""Names of metrics that have their unit in Prometheus' terms."""
_SERVER_COUNTERS = {
    "completions": "Requests answered.",
    "completion_tokens": "Tokens generated.",
    "prompt_tokens": "Prompt tokens sent.",
    "cached_tokens": "Prompt tokens found in the prefix cache.",
    "planned_cached_tokens": "Prompt tokens planned to be found in the prefix cache.",
    "failures": "Failed tries of requests, without full queues and rate limits.",
    "unfinished": "Requests that ended without their answer: aborted, timed out, lost or broken.",
    "unfinished_tokens": "Tokens generated for these, estimated from their time.",
}


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What metrics of a run are made of.

    Attributes:
        counters: What it has done.
        timings: How long its requests took.
        labels: Labels of its metrics, such as {"run": ID}; each run of a scrape has the same ones.
    """

    counters: Counters
    timings: Timings
    labels: Mapping[str, str] = field(default_factory=dict)


Figures = Callable[[], tuple[RunFigures, Sequence[Mapping[str, Any]]]]
"""Returns the figures of a run and the metrics of its servers, as they are now."""


class RunCollector(Collector):
    """Makes metrics of a run and its servers at each scrape, in the thread that serves it."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        """All metrics, with their present values."""
        run, servers = self._figures()
        yield from run_metrics([run])
        yield from server_metrics(servers)


_RUN_COUNTERS: Mapping[str, tuple[str, Callable[[Counters], float]]] = {
    "seeds_read": ("Lines read from the sources, good and bad.", lambda run: run.seeds_read),
    "drafts_read": ("Drafts of the lines read; each ends as one outcome.", lambda run: run.drafts_read),
    "drafts_finished_before": ("Drafts finished by an earlier run.", lambda run: run.finished_before),
    "seeds_repeated": ("Seeds skipped because their id was read before.", lambda run: run.repeated),
    "samples": ("Samples assembled.", lambda run: run.samples),
    "retries": ("Failed tries of requests.", lambda run: run.retries),
    "contexts_scored": ("Contexts sent to be scored.", lambda run: run.scored),
    "contexts_unscored": ("Contexts that servers failed to score.", lambda run: run.unscored),
    "scoring_retries": ("Failed tries of scoring requests.", lambda run: run.scoring_retries),
}
_BY_LABEL: Mapping[str, tuple[str, str, Callable[[Counters], Mapping[Any, float]]]] = {
    "outcomes": (
        "Outcomes in the log.",
        "kind",
        lambda run: {"context": run.contexts, "reject": sum(dict(run.rejects).values())},
    ),
    "rejects": ("Rejects in the log.", "reason", lambda run: dict(run.rejects)),
    "tokens": (
        "Tokens of writing: useful and wasted were generated; cached are part of prompt, thinking of useful.",
        "kind",
        lambda run: {
            "useful": run.useful_tokens,
            "thinking": run.thinking_tokens,
            "wasted": run.wasted_tokens,
            "prompt": run.prompt_tokens,
            "cached": run.cached_tokens,
        },
    ),
    "cached_tokens": (
        "Cached prompt tokens of writing, by tier of the cache; device unless the server says otherwise.",
        "tier",
        lambda run: run.cached_by_tier,
    ),
    "scoring_tokens": (
        "Tokens of scoring requests, which streamsyn_tokens does not include.",
        "kind",
        lambda run: {
            "written": run.scoring_tokens,
            "prompt": run.scoring_prompt_tokens,
            "cached": run.scoring_cached_tokens,
        },
    ),
}
_RUN_GAUGES: Mapping[str, tuple[str, Callable[[Counters], float]]] = {
    "elapsed_seconds": ("Seconds since the run started.", lambda run: run.elapsed_s),
    "reading_done": ("1 when all seeds have been read.", lambda run: run.reading_done),
}
_TIMINGS: Mapping[str, tuple[str, Callable[[Timings], Histogram]]] = {
    "queue_wait_seconds": (
        "How long requests waited for a place at a server.",
        lambda timings: timings.queue_wait,
    ),
    "time_to_first_token_seconds": (
        "From sending a request to its first token, where the answer was streamed.",
        lambda timings: timings.time_to_first_token,
    ),
    "request_duration_seconds": (
        "From sending a request to its whole answer.",
        lambda timings: timings.request_duration,
    ),
}


def run_metrics(runs: Sequence[RunFigures]) -> Iterator[Metric]:
    """Yield the metrics of runs, which all have the same names of labels."""
    names = list(runs[0].labels) if runs else []
    family: CounterMetricFamily | GaugeMetricFamily
    for name, (help_text, value) in _RUN_COUNTERS.items():
        family = CounterMetricFamily(f"streamsyn_{name}", help_text, labels=names)
        for run in runs:
            family.add_metric([*run.labels.values()], value(run.counters))
        yield family
    for name, (help_text, label, values) in _BY_LABEL.items():
        family = CounterMetricFamily(f"streamsyn_{name}", help_text, labels=[*names, label])
        for run in runs:
            for key, number in sorted(values(run.counters).items()):
                family.add_metric([*run.labels.values(), str(key)], number)
        yield family
    for name, (help_text, value) in _RUN_GAUGES.items():
        family = GaugeMetricFamily(f"streamsyn_{name}", help_text, labels=names)
        for run in runs:
            family.add_metric([*run.labels.values()], value(run.counters))
        yield family
    yield from _timing_metrics("streamsyn", names, [([*run.labels.values()], run.timings) for run in runs])


def server_timing_metrics(timings: Mapping[str, Timings]) -> Iterator[Metric]:
    """Yield how long the requests at each server took; `timings` are by URL."""
    yield from _timing_metrics(
        "streamsyn_server", ["server"], [([url], taken) for url, taken in timings.items()]
    )


def _timing_metrics(
    prefix: str, names: Sequence[str], timings: Sequence[tuple[list[str], Timings]]
) -> Iterator[Metric]:
    for name, (help_text, histogram) in _TIMINGS.items():
        family = HistogramMetricFamily(f"{prefix}_{name}", help_text, labels=names)
        for values, taken in timings:
            one = histogram(taken)
            family.add_metric(values, one.buckets(), one.total_s)
        yield family


def server_metrics(servers: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    """Yield the metrics of servers, from what `Fleet.metrics` returns of them."""
    for families, kind in ((_SERVER_GAUGES, GaugeMetricFamily), (_SERVER_COUNTERS, CounterMetricFamily)):
        for key, help_text in families.items():
            name = f"streamsyn_server_{_NAMES.get(key, key)}"
            family = kind(name, help_text, labels=["server"])
            for server in servers:
                if server.get(key) is not None:
                    family.add_metric([server["server"]], server[key])
            yield family
    info = GaugeMetricFamily(
        "streamsyn_server_info",
        "Always 1; the label is the model that the server serves.",
        labels=["server", "model"],
    )
    decisions = CounterMetricFamily(
        "streamsyn_cap_decisions", "Decisions of the adaptive cap.", labels=["server", "decision"]
    )
    tiers = CounterMetricFamily(
        "streamsyn_server_cached_tier_tokens",
        "Prompt tokens found in the prefix cache, by tier; device unless the server says otherwise.",
        labels=["server", "tier"],
    )
    for server in servers:
        for tier, number in _by_tier(server).items():
            tiers.add_metric([server["server"], tier], number)
        info.add_metric([server["server"], server.get("model") or ""], 1)
        for decision, times in sorted(server.get("decisions", {}).items()):
            decisions.add_metric([server["server"], decision], times)
    yield info
    yield tiers
    yield decisions


def _by_tier(server: Mapping[str, Any]) -> dict[str, float]:
    if "cached_tokens" not in server:
        return {}
    host, storage = server.get("cached_host_tokens", 0), server.get("cached_storage_tokens", 0)
    return {"device": server["cached_tokens"] - host - storage, "host": host, "storage": storage}


@contextmanager
def serving_metrics(listen: str, figures: Figures) -> Iterator[str]:
    """Serve the metrics over HTTP while the block runs; yields the URL.

    Enter it outside the event loop: opening and closing block.

    Args:
        listen: `HOST:PORT`; port 0 takes a free port.
        figures: Called in the serving thread, so it must tolerate what the event loop changes meanwhile.

    Raises:
        ConfigError: `listen` is malformed, or the address cannot be used.
    """
    host, port = _host_and_port(listen)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(figures))
    try:
        server, thread = start_http_server(port, host, registry)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"run.metrics_listen: cannot listen on {listen}: {why}") from error
    url = f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics"
    log.info("metrics.serving", url=url)
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _host_and_port(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 2**16
    bare = host[1:-1] if bracketed else host
    if not is_port or not bare or (":" in bare) != bracketed:
        raise ConfigError(f"run.metrics_listen: {listen!r} is not HOST:PORT, such as 127.0.0.1:9100")
    return bare, int(port)
