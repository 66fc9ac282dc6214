"""Metrics of a run for Prometheus, imported only when `run.metrics_listen` is set.

The numbers are those of progress and summary, read at each scrape, so they cost nothing in between.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from streamsyn.errors import ConfigError
from streamsyn.telemetry import Counters

log = structlog.get_logger()

ServerMetrics = Callable[[], Sequence[Mapping[str, Any]]]
"""Returns the metrics of each server, as `Fleet.metrics` does; an absent key, or None, is unknown."""

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


class RunCollector(Collector):
    """Makes metrics of the counters and the servers at each scrape, in the thread that serves it."""

    def __init__(self, counters: Counters, server_metrics: ServerMetrics) -> None:
        self._counters = counters
        self._server_metrics = server_metrics

    def collect(self) -> Iterable[Metric]:
        """All metrics, with their present values."""
        yield from _run_metrics(self._counters)
        yield from _server_metrics(self._server_metrics())


def _run_metrics(counters: Counters) -> Iterator[Metric]:
    rejects = dict(counters.rejects)  # copied in one step: the run goes on counting
    for name, help_text, value in (
        ("seeds_read", "Lines read from the sources, good and bad.", counters.seeds_read),
        ("drafts_read", "Drafts of the lines read; each ends as one outcome.", counters.drafts_read),
        ("drafts_finished_before", "Drafts finished by an earlier run.", counters.finished_before),
        ("seeds_repeated", "Seeds skipped because their id was read before.", counters.repeated),
        ("samples", "Samples assembled.", counters.samples),
        ("retries", "Failed tries of requests.", counters.retries),
        ("contexts_scored", "Contexts sent to be scored.", counters.scored),
        ("contexts_unscored", "Contexts that servers failed to score.", counters.unscored),
        ("scoring_retries", "Failed tries of scoring requests.", counters.scoring_retries),
    ):
        yield CounterMetricFamily(f"streamsyn_{name}", help_text, value=value)
    yield _by_label(
        "outcomes",
        "Outcomes in the log.",
        "kind",
        {"context": counters.contexts, "reject": sum(rejects.values())},
    )
    yield _by_label("rejects", "Rejects in the log.", "reason", rejects)
    yield _by_label(
        "tokens",
        "Tokens of writing: useful and wasted were generated; cached are part of prompt, thinking of useful.",
        "kind",
        {
            "useful": counters.useful_tokens,
            "thinking": counters.thinking_tokens,
            "wasted": counters.wasted_tokens,
            "prompt": counters.prompt_tokens,
            "cached": counters.cached_tokens,
        },
    )
    yield _by_label(
        "scoring_tokens",
        "Tokens of scoring requests, which streamsyn_tokens does not include.",
        "kind",
        {
            "written": counters.scoring_tokens,
            "prompt": counters.scoring_prompt_tokens,
            "cached": counters.scoring_cached_tokens,
        },
    )
    yield GaugeMetricFamily(
        "streamsyn_elapsed_seconds", "Seconds since the run started.", value=counters.elapsed_s
    )
    yield GaugeMetricFamily(
        "streamsyn_reading_done", "1 when all seeds have been read.", value=counters.reading_done
    )


def _by_label(name: str, help_text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"streamsyn_{name}", help_text, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([str(key)], value)
    return family


def _server_metrics(servers: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    for families, kind in ((_SERVER_GAUGES, GaugeMetricFamily), (_SERVER_COUNTERS, CounterMetricFamily)):
        for key, help_text in families.items():
            family = kind(f"streamsyn_server_{key}", help_text, labels=["server"])
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
    for server in servers:
        info.add_metric([server["server"], server.get("model") or ""], 1)
        for decision, times in sorted(server.get("decisions", {}).items()):
            decisions.add_metric([server["server"], decision], times)
    yield info
    yield decisions


@contextmanager
def serving_metrics(listen: str, counters: Counters, server_metrics: ServerMetrics) -> Iterator[str]:
    """Serve the metrics over HTTP while the block runs; yields the URL.

    Enter it outside the event loop: opening and closing block.

    Args:
        listen: `HOST:PORT`; port 0 takes a free port.
        counters: The counters of the run.
        server_metrics: Called in the serving thread, so it must tolerate what
            the event loop changes meanwhile.

    Raises:
        ConfigError: `listen` is malformed, or the address cannot be used.
    """
    host, port = _host_and_port(listen)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(counters, server_metrics))
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
