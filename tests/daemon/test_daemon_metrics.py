"""`/metrics` of the daemon, as a Prometheus server would scrape it."""

import re
from functools import partial
from typing import Any

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from streamsyn.daemon.hosted_run import HostedRun
from tests.daemon.conftest import SERVER, Served
from tests.daemon.test_servers import usable

ABBREVIATED = re.compile(r"_(s|ms|sec|secs|mb|gb|pct|percent)(_|$)")


async def scraped(served: Served) -> list[Metric]:
    """The metrics of a daemon."""
    async with served.session.get("/metrics") as answer:
        assert 200 == answer.status
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        return list(text_string_to_metric_families(await answer.text()))


def has_samples(number: int, run: HostedRun) -> bool:
    """Whether a run has as many samples; the contexts in them have been counted then."""
    return bool(run.as_json()["counts"]["samples"] == number)


def value(metrics: list[Metric], name: str, **labels: str) -> float:
    """The value of the one sample with these labels."""
    [found] = [
        sample.value
        for metric in metrics
        for sample in metric.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return float(found)


async def test_servers_and_runs(daemon: Served) -> None:
    """Each run that has not ended has a label, and each server; they tell apart what each has done."""
    await usable(daemon)
    await daemon.new_run("a")
    await daemon.new_run("b")
    await daemon.submit("a", 7)
    await daemon.submit("b", 3)
    for run_id, number in (("a", 7), ("b", 3)):
        await daemon.until(run_id, partial(has_samples, number))
    await daemon.ask("PUT", "/v1/runs/a/consumers/trainer", {"kind": "contexts"})
    found = await scraped(daemon)
    for run_id, number in (("a", 7), ("b", 3)):
        assert number == value(found, "streamsyn_seeds_accepted_total", run=run_id)
        assert 0 == value(found, "streamsyn_seeds_waiting", run=run_id)
        assert number == value(found, "streamsyn_outcomes_total", run=run_id, kind="context")
        assert number == value(found, "streamsyn_request_duration_seconds_count", run=run_id)
        assert number == value(found, "streamsyn_queue_wait_seconds_count", run=run_id)
    assert 10 == value(found, "streamsyn_server_request_duration_seconds_count", server=SERVER)
    assert 10 == value(found, "streamsyn_server_completions_total", server=SERVER)
    assert 2 == value(found, "streamsyn_runs", state="running")
    assert 7 == value(found, "streamsyn_consumer_lag_rows", run="a", consumer="trainer")
    assert 1 == value(found, "streamsyn_ready")

    await daemon.ask("POST", "/v1/runs/b/close")
    await daemon.until_state("b", "finished")
    found = await scraped(daemon)
    assert not [sample for metric in found for sample in metric.samples if sample.labels.get("run") == "b"]


async def test_names_follow_the_conventions(daemon: Served) -> None:
    """Our prefix, base units, `_total` for counters alone, and help in a sentence."""
    await usable(daemon)
    await daemon.new_run("a")
    await daemon.submit("a", 2)
    await daemon.until("a", partial(has_samples, 2))
    found = await scraped(daemon)
    names = [metric.name for metric in found]
    assert len(names) == len(set(names)) > 30
    for metric in found:
        assert re.fullmatch(r"streamsyn_[a-z_]+", metric.name)
        assert not ABBREVIATED.search(metric.name), metric.name
        assert metric.documentation.endswith("."), metric.name
        samples: list[Any] = metric.samples
        assert metric.type != "counter" or all(sample.name.endswith("_total") for sample in samples)
        assert metric.type == "counter" or not metric.name.endswith("_total")
        assert metric.type != "histogram" or metric.name.endswith("_seconds")
