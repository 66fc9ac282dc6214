"""Metrics, as a Prometheus server would scrape them."""

import socket
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamsyn.errors import ConfigError
from streamsyn.fleet.server import Timings
from streamsyn.pipeline.prometheus import Figures, RunFigures, serving_metrics
from streamsyn.sink.writer import count_outcome
from streamsyn.telemetry import Counters
from tests.builders import context, reject
from tests.examples import in_turn

TIMINGS = Timings()
SERVERS = [
    {
        "server": "http://one:1",
        "in_flight": 7,
        "cap": 9,
        "waiting": 2,
        "running": 5,
        "token_usage": 0.25,
        "completions": 30,
        "completion_tokens": 300,
        "prompt_tokens": 900,
        "cached_tokens": 400,
        "cached_host_tokens": 90,
        "cached_storage_tokens": 10,
        "planned_cached_tokens": 500,
        "ejected": False,
        "draining": True,
        "weight": 2.5,
        "model": 'a "quoted" model',
        "decisions": {"raise": 3, "hold": 4},
    },
    # One that has said nothing yet, and does not serve its load.
    {"server": "http://two:2", "in_flight": 0, "waiting": None, "ejected": True, "decisions": {}},
]


def of(counters: Counters | None = None, servers: Sequence[Mapping[str, Any]] = ()) -> Figures:
    """The figures of a run."""
    found = counters or Counters()
    return lambda: (RunFigures(found, TIMINGS), servers)


def scraped(url: str) -> dict[tuple[str, ...], float]:
    """All samples: (name, label values in the order of their names) -> value."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_the_run_has_done() -> None:
    """The counters of the run, with their values at the time of the scrape."""
    counters = Counters(seeds_read=5, drafts_read=4, repeated=1, samples=2, finished_before=3)
    with serving_metrics("127.0.0.1:0", of(counters)) as url:
        before = scraped(url)
        steps = [{"cached_tokens": 1, "cached_host_tokens": 1}]
        for outcome in (context(1, wasted_tokens=4), context(2, steps=steps), reject(3)):
            count_outcome(counters, outcome)
        counters.reading_done = True
        figures = {"prompt_tokens": 70, "cached_tokens": 30, "completion_tokens": 9}
        counters.count_scoring(figures, 2, failed=True)
        after = scraped(url)

    assert 0 == before["streamsyn_outcomes_total", "context"]
    assert 2 == after["streamsyn_outcomes_total", "context"]
    assert 1 == after["streamsyn_outcomes_total", "reject"]
    assert 1 == after["streamsyn_rejects_total", "not_a_seed"]
    tokens = {
        kind: after["streamsyn_tokens_total", kind] for kind in ("useful", "wasted", "prompt", "cached")
    }
    assert {"useful": 20, "wasted": 4, "prompt": 6, "cached": 2} == tokens
    tiers = {tier: after["streamsyn_cached_tokens_total", tier] for tier in ("device", "host", "storage")}
    assert {"device": 1, "host": 1, "storage": 0} == tiers
    scoring = {
        kind: after["streamsyn_scoring_tokens_total", kind] for kind in ("written", "prompt", "cached")
    }
    assert {"written": 9, "prompt": 70, "cached": 30} == scoring
    assert (1, 1) == (after["streamsyn_contexts_scored_total",], after["streamsyn_contexts_unscored_total",])
    assert 2 == after["streamsyn_scoring_retries_total",]
    assert 5 == after["streamsyn_seeds_read_total",]
    assert 4 == after["streamsyn_drafts_read_total",]
    assert 3 == after["streamsyn_drafts_finished_before_total",]
    assert 1 == after["streamsyn_seeds_repeated_total",]
    assert 2 == after["streamsyn_samples_total",]
    assert 0 == after["streamsyn_retries_total",]
    assert before["streamsyn_elapsed_seconds",] < after["streamsyn_elapsed_seconds",]
    assert (0, 1) == (before["streamsyn_reading_done",], after["streamsyn_reading_done",])


def test_what_the_servers_do() -> None:
    """Each metric has the label of its server; an unknown one is left out."""
    with serving_metrics("127.0.0.1:0", of(servers=SERVERS)) as url:
        samples = scraped(url)

    one = {
        name.removeprefix("streamsyn_server_"): value
        for (name, *labels), value in samples.items()
        if labels == ["http://one:1"]
    }
    assert one == {
        "in_flight": 7,
        "cap": 9,
        "waiting": 2,
        "running": 5,
        "token_usage_ratio": 0.25,
        "completions_total": 30,
        "completion_tokens_total": 300,
        "prompt_tokens_total": 900,
        "cached_tokens_total": 400,
        "planned_cached_tokens_total": 500,
        "ejected": 0,
        "draining": 1,
        "weight": 2.5,
    }
    tiers = {
        tier: samples["streamsyn_server_cached_tier_tokens_total", "http://one:1", tier]
        for tier in ("device", "host", "storage")
    }
    assert {"device": 300, "host": 90, "storage": 10} == tiers
    assert 3 == samples["streamsyn_cap_decisions_total", "raise", "http://one:1"]
    assert 4 == samples["streamsyn_cap_decisions_total", "hold", "http://one:1"]
    assert 1 == samples["streamsyn_server_info", 'a "quoted" model', "http://one:1"]
    two = {name for (name, *labels) in samples if labels == ["http://two:2"]}
    assert {"streamsyn_server_in_flight", "streamsyn_server_ejected"} == two


def test_servers_that_come_and_go() -> None:
    """A server that is gone is not reported any more."""
    servers: list[Mapping[str, Any]] = list(SERVERS)
    with serving_metrics("127.0.0.1:0", of(servers=servers)) as url:
        assert ("streamsyn_server_ejected", "http://two:2") in scraped(url)
        servers.pop()
        assert ("streamsyn_server_ejected", "http://two:2") not in scraped(url)


def test_nothing_listens_afterwards() -> None:
    """The port is free again, and can be taken at once."""
    with serving_metrics("127.0.0.1:0", of()) as url:
        scraped(url)
    port = url.split(":")[2].split("/")[0]
    with serving_metrics(f"127.0.0.1:{port}", of()) as again:
        assert url == again


@in_turn(
    "listen",
    ["", "9100", ":9100", "localhost", "localhost:", "localhost:http", "localhost:65536", "::1:9100", "[]:1"],
)
def test_an_invalid_address(listen: str) -> None:
    """One line that names the key and the expected form."""
    with (
        pytest.raises(ConfigError, match=r"run\.metrics_listen: .* is not HOST:PORT"),
        serving_metrics(listen, of()),
    ):
        pass


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b"])
def test_a_host_that_is_not_local(host: str) -> None:
    """It cannot be listened on."""
    with (
        pytest.raises(ConfigError, match=rf"run\.metrics_listen: cannot listen on {host}:0: \w"),
        serving_metrics(f"{host}:0", of()),
    ):
        pass


def test_an_address_in_use() -> None:
    """Two runs on one machine need two ports."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(
                ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"
            ),
            serving_metrics(f"127.0.0.1:{port}", of()),
        ):
            pass


def test_an_ipv6_address() -> None:
    """In brackets, as in URLs."""
    if not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    with serving_metrics("[::1]:0", of()) as url:
        assert url.startswith("http://[::1]:")
        assert scraped(url)


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_how_long_requests_took() -> None:
    """Histograms in seconds: cumulative buckets, the sum and the count."""
    timings = Timings()
    for seconds in (0.004, 0.1, 0.2, 700.0):
        timings.request_duration.observe(seconds)
    with serving_metrics("127.0.0.1:0", lambda: (RunFigures(Counters(), timings), ())) as url:
        samples = scraped(url)
    name = "streamsyn_request_duration_seconds"
    buckets = {bound: samples[f"{name}_bucket", bound] for bound in ("0.01", "0.1", "0.25", "600.0", "+Inf")}
    assert {"0.01": 1, "0.1": 2, "0.25": 3, "600.0": 3, "+Inf": 4} == buckets
    assert 4 == samples[f"{name}_count",]
    assert 700.304 == pytest.approx(samples[f"{name}_sum",])
    assert 4 == timings.request_duration.count
    assert 0 == samples["streamsyn_queue_wait_seconds_count",]
    assert 0 == samples["streamsyn_time_to_first_token_seconds_count",]
