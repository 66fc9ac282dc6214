"""The dashboard and the alerts in deploy/monitoring ask for metrics and labels that the daemon has."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import Metric

import streamsyn
from streamsyn.simulator.settings import SimulatorConfig
from tests.daemon.conftest import Served, StartDaemon
from tests.daemon.test_daemon_metrics import has_samples, scraped
from tests.daemon.test_servers import usable

FOLDER = Path(streamsyn.__file__).parents[1] / "deploy" / "monitoring"
OF_PROMETHEUS = {"up", "ALERTS"}
MADE_BY_PROMETHEUS = {"job", "instance"}
SELECTOR = re.compile(r"\b((?:streamsyn|up)[a-z_]*)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\bby \(([a-z_, ]+)\)")
SHOWN = re.compile(r"\{\{\s*(?:\$labels\.)?([a-z_]+)\s*\}\}")


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> Iterator[tuple[str, str]]:
    """Each query, and the text that shows its labels."""
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]
    for alert in alerts():
        yield alert["expr"], alert["annotations"]["summary"]


def labels_by_metric(found: list[Metric]) -> dict[str, set[str]]:
    """The names of metrics as queries have them, with the labels of their samples."""
    labels: dict[str, set[str]] = defaultdict(set)
    for metric in found:
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
        for suffix in suffixes:
            labels[metric.name + suffix].update(MADE_BY_PROMETHEUS)
        for sample in metric.samples:
            labels[sample.name].update(sample.labels)
    return labels


async def worked(served: Served) -> list[Metric]:
    """The metrics of a daemon with contexts, rejects and a consumer: all labels have values."""
    await usable(served)
    await served.new_run("a")
    await served.new_run(
        "b",
        config={
            "run": {"max_reject_fraction": 1},
            "checks": {"min_words": 19_000},
            "recipe": {"max_tokens": 9},
        },
    )
    await served.submit("a", 8)
    await served.submit("b", 2)
    await served.until("b", lambda run: bool(run.as_json()["counts"]["rejects"] == 2))
    await served.until("a", partial(has_samples, 8))
    await served.ask("PUT", "/v1/runs/a/consumers/trainer", {"kind": "samples"})
    return await scraped(served)


async def test_every_metric_and_label_exists(start_daemon: StartDaemon) -> None:
    """In queries, groupings, legends and summaries."""
    async with start_daemon(simulator=SimulatorConfig(cost_model="h100", speed=1000)) as served:
        exist = labels_by_metric(await worked(served))

    asked = 0
    for query, shown in queries():
        selectors = SELECTOR.findall(query)
        assert selectors, query
        has: set[str] = set()
        for name, matchers in selectors:
            assert name in exist or name in OF_PROMETHEUS, f"{name} in {query}"
            has |= exist[name] | MADE_BY_PROMETHEUS
            assert set(re.findall(r"([a-z_]+)\s*=", matchers)) <= exist[name] | MADE_BY_PROMETHEUS, query
        grouped = {label.strip() for labels in GROUPED.findall(query) for label in labels.split(",")}
        assert grouped | set(SHOWN.findall(shown)) <= has, query
        asked += len(selectors)
    assert asked > 40


def test_the_test_above_sees_each_part_of_a_query() -> None:
    """Names with and without labels, groupings, and both forms of legends."""
    query = 'sum by (run, kind) (rate(streamsyn_a_total{run=~"$run", kind="x"}[5m])) / streamsyn_b'

    assert [("streamsyn_a_total", 'run=~"$run", kind="x"'), ("streamsyn_b", "")] == SELECTOR.findall(query)
    assert ["run, kind"] == GROUPED.findall(query)
    assert ["run", "consumer"] == SHOWN.findall("{{run}} of {{ $labels.consumer }}")


def test_each_alert_says_what_to_do() -> None:
    """A severity, a summary, and one line of a runbook, under a name of its own."""
    names = [alert["alert"] for alert in alerts()]

    assert len(names) == len(set(names)) >= 10
    for alert in alerts():
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert alert["annotations"]["summary"]
        assert "\n" not in alert["annotations"]["runbook"]


def test_panels_do_not_overlap() -> None:
    """On Grafana's grid of 24 columns; each has an id of its own."""
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for cell in (
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ):
            assert cell not in taken, f"{panel['title']} is over {taken[cell]}"
            taken[cell] = panel["title"]
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
