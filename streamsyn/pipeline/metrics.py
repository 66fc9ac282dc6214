"""What a running run has done, for Prometheus. Imported only where it is asked for.

The figures are those of progress and summary, read when somebody scrapes: counting costs nothing more.
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

Figures = Callable[[], Sequence[Mapping[str, Any]]]
"""The figures of each server, as `Fleet.figures` has them; a key that is absent or None is not known."""

_SERVER_GAUGES = {
    "in_flight": "Requests in flight.",
    "cap": "Requests that may be in flight.",
    "waiting": "Requests in the server's queue, as it says.",
    "waiting_uncached_tokens": "Prompt tokens in its queue that no cache spares it, as it says.",
    "generated_per_s": "Tokens it writes a second, as it says.",
    "running": "Requests in the server's batch, as it says.",
    "token_usage": "Share of the server's KV cache in use, 0 to 1, as it says.",
    "ejected": "1 while it gets no requests, for it failed.",
    "draining": "1 while it gets no new requests, for it is to go.",
    "weight": "Its share of the work beside the others'.",
}
_SERVER_COUNTERS = {
    "completions": "Requests it answered.",
    "completion_tokens": "Tokens it wrote.",
    "prompt_tokens": "Prompt tokens it was sent.",
    "cached_tokens": "Prompt tokens it had in its prefix cache.",
    "planned_cached_tokens": "Prompt tokens that were planned to be in its prefix cache.",
}


class RunCollector(Collector):
    """Turns counters and servers' figures into metrics, at each scrape, in the thread that scrapes."""

    def __init__(self, counters: Counters, figures: Figures) -> None:
        self._counters = counters
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        """All metrics as they are now."""
        yield from _run_metrics(self._counters)
        yield from _server_metrics(self._figures())


def _run_metrics(counters: Counters) -> Iterator[Metric]:
    rejects = dict(counters.rejects)  # in one step: the run goes on counting
    for name, help_text, value in (
        ("seeds_read", "Lines read from the sources, good and bad.", counters.seeds_read),
        ("drafts_read", "Outcomes that the lines read come to.", counters.drafts_read),
        ("drafts_finished_before", "Drafts that an earlier run had finished.", counters.finished_before),
        ("seeds_repeated", "Seeds skipped, their id had been read before.", counters.repeated),
        ("samples", "Samples assembled.", counters.samples),
        ("retries", "Tries of requests that failed.", counters.retries),
        ("contexts_scored", "Contexts that servers were asked about.", counters.scored),
        ("contexts_unscored", "Those among them that servers failed to score.", counters.unscored),
        ("scoring_retries", "Tries of scoring requests that failed.", counters.scoring_retries),
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
        "Tokens: useful and wasted were written; prompt were read, cached are a part of those.",
        "kind",
        {
            "useful": counters.useful_tokens,
            "wasted": counters.wasted_tokens,
            "prompt": counters.prompt_tokens,
            "cached": counters.cached_tokens,
        },
    )
    yield _by_label(
        "scoring_tokens",
        "Tokens of scoring requests, as those of streamsyn_tokens, which has none of them.",
        "kind",
        {
            "written": counters.scoring_tokens,
            "prompt": counters.scoring_prompt_tokens,
            "cached": counters.scoring_cached_tokens,
        },
    )
    yield GaugeMetricFamily(
        "streamsyn_elapsed_seconds", "Time since the run was started.", value=counters.elapsed_s
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
            for figures in servers:
                if figures.get(key) is not None:
                    family.add_metric([figures["server"]], figures[key])
            yield family
    info = GaugeMetricFamily("streamsyn_server_info", "Always 1: what it serves.", labels=["server", "model"])
    decisions = CounterMetricFamily(
        "streamsyn_cap_decisions", "What was decided of its cap.", labels=["server", "decision"]
    )
    for figures in servers:
        info.add_metric([figures["server"], figures.get("model") or ""], 1)
        for decision, times in sorted(figures.get("decisions", {}).items()):
            decisions.add_metric([figures["server"], decision], times)
    yield info
    yield decisions


@contextmanager
def serving_metrics(listen: str, counters: Counters, figures: Figures) -> Iterator[str]:
    """Serve the metrics over HTTP until the block ends; yields the URL.

    A thread of its own serves, and calls `figures`: that must not trip over what the event loop changes
    meanwhile. To be entered outside of the event loop, as opening and closing block.

    Args:
        listen: `HOST:PORT`; port 0 takes a free one.
        counters: Of the run.
        figures: Of its servers.

    Raises:
        ConfigError: `listen` is malformed, or cannot be listened on.
    """
    host, port = _host_and_port(listen)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(counters, figures))
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
        raise ConfigError(f"run.metrics_listen: {listen!r} is no HOST:PORT, such as 127.0.0.1:9100")
    return bare, int(port)
