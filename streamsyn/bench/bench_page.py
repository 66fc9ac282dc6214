"""`bench.html`: the verdict, the figures and plots as one file that loads nothing."""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, Final

import jinja2
from markupsafe import Markup

import streamsyn
from streamsyn.bench.aiperf_export import Metric, aiperf_metrics
from streamsyn.bench.figures import Figures, ServerOverTime, figures
from streamsyn.bench.limits import verdict
from streamsyn.bench.measurement import Measurement
from streamsyn.bench.series import Benchmark, knee, saturation, sweep_points, throughput_interval
from streamsyn.report import charts
from streamsyn.report.charts import Line

FILE_NAME: Final = "bench.html"
_MAX_SERVERS: Final = 12
"""Servers with charts of their own; all are in the table and in bench.json."""
_USES: Final = {
    "useful": "In contexts",
    "rejects": "Drafts that were rejected",
    "retries": "Answers that were asked again",
    "hedges": "The slower of two hedged requests",
    "aborted": "Requests that were given up",
}
_PARTS: Final = {
    "queue": "Waiting for a place at a server",
    "network": "Network",
    "server": "At the server",
    "checks": "Prompts, parsing, checks",
    "disk": "Log and journal",
}


def bench_page(benchmark: Benchmark) -> bytes:
    """Return the page, encoded as UTF-8."""
    data = files("streamsyn") / "data"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(data / "bench"), str(data / "report")]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    assert environment.loader is not None, "it has just been given"
    styles = [environment.loader.get_source(environment, name)[0] for name in ("style.css", "bench.css")]
    run = benchmark.typical
    found = figures(run)
    page = environment.get_template("bench.html.j2").render(
        style=Markup("\n".join(styles)),  # noqa: S704 - ours, from the package
        benchmark=benchmark,
        run=run,
        found=found,
        verdict=verdict(run, found),
        facts=list(_facts(run, found)),
        charts=charts,
        number=charts.number_text,
        over_time=list(_over_time(run, found)),
        servers=_shown(found.over_time.servers),
        server_lines=_server_lines,
        uses=_uses(found),
        parts=_parts(found),
        prefix=_prefix(found),
        metrics=list(_metric_rows(aiperf_metrics(run))),
        points=sweep_points(benchmark.runs) if benchmark.kind == "sweep" else [],
        knee=knee(sweep_points(benchmark.runs)) if benchmark.kind == "sweep" else None,
        saturation=saturation(sweep_points(benchmark.runs)) if benchmark.kind == "sweep" else None,
        interval=throughput_interval(benchmark.runs) if benchmark.kind == "repeats" else None,
        throughputs=[figures(one).useful_tokens_per_s for one in benchmark.runs],
        version=streamsyn.__version__,
    )
    return page.encode("utf-8", "replace")


def _facts(run: Measurement, found: Figures) -> Iterator[tuple[str, str, str]]:
    """Yield the main figures as name, value and explanation."""
    gpus = f"{run.gpus:,} {'GPU' if run.gpus == 1 else 'GPUs'}"
    of_written = (
        f"of {found.written_tokens_per_s:,.0f} written; {found.useful_tokens_per_s_per_gpu:,.0f} per GPU"
    )
    yield "Useful tokens per second", f"{found.useful_tokens_per_s:,.0f}", f"{of_written} ({gpus})"
    yield "Contexts per second", f"{found.contexts_per_s:,.2f}", _outcomes(found)
    prefix = found.prefix_tokens
    if prefix.kept_share is not None:
        planned = f"{prefix.planned:,} prompt tokens were planned to be cached, {prefix.lost:,} were not"
        yield "Prefix plan kept", f"{prefix.kept_share:.0%}", planned
    cpu = f"{found.client.cpu_share:.2f} of a core"
    if run.is_simulated:
        cpu = f"{cpu} in the fleet's time; over sockets more"
    yield "Client CPU per request", f"{found.client.cpu_ms_per_request:,.2f} ms", cpu
    if found.client.loop_lag_ms is not None:
        yield (
            "Event-loop lag",
            f"{found.client.loop_lag_ms:,.1f} ms",
            f"median of the longest in each second; at most {found.client.loop_lag_max_ms or 0:,.0f} ms",
        )
    counted, reported = found.share_of_counters, found.share_of_reported
    for name, share, what in (
        ("Share of capacity", found.share_of_capacity, "of what the simulator's cost model allows"),
        ("Share of the servers' counters", counted, "of the tokens that their Prometheus counters grew by"),
        (
            "Share of the servers' own figure",
            reported if counted is None else None,
            "of the tokens per second that they report in /v1/loads",
        ),
    ):
        if share is not None:
            yield name, f"{share:.0%}", what


def _outcomes(found: Figures) -> str:
    rejects = [f"{number:,} {reason}" for reason, number in found.outcomes.items() if reason != "context"]
    return f"rejects: {', '.join(rejects)}" if rejects else "no rejects"


def _over_time(run: Measurement, found: Figures) -> Iterator[tuple[str, str, Markup]]:
    """Yield charts of the whole run as title, highest value and chart."""
    over, window = found.over_time, (run.window.begins_at, run.window.ends_at)
    waits = run.load.with_log and any(over.rows_waiting)
    drawn: list[tuple[str, Sequence[float | None]]] = [
        ("Tokens per second", over.tokens_per_s),
        ("Requests in flight", over.in_flight),
        ("Client CPU seconds per second", over.cpu_share),
        ("Event-loop lag in ms", over.loop_lag_ms),
        *([("Outcomes that wait for the disk or a reader", over.rows_waiting)] if waits else []),
    ]
    for title, values in drawn:
        if chart := charts.lines(over.at, [Line(title, values, "first")], title, window):
            most = max(value for value in values if value is not None)
            yield title, charts.number_text(most), chart


def _shown(servers: Sequence[ServerOverTime]) -> list[ServerOverTime]:
    """Return the servers with charts: all, or those spread evenly over the list."""
    step = max(1, -(-len(servers) // _MAX_SERVERS))
    return list(servers[::step])


def _server_lines(server: ServerOverTime, run: Measurement, found: Figures) -> Markup:
    drawn = [
        Line("cap", server.cap, "third"),
        Line("in flight", server.in_flight, "first"),
        Line("waiting at the server", server.waiting, "second"),
    ]
    window = (run.window.begins_at, run.window.ends_at)
    return charts.lines(found.over_time.at, drawn, f"{server.server}: cap, in flight, waiting", window)


def _uses(found: Figures) -> list[tuple[str, float, str]]:
    """Return tokens per second by what they were written for, as label, value and CSS class."""
    rates = {"useful": found.useful_tokens_per_s, **found.deducted_tokens_per_s}
    return [(_USES[use], rate, "" if use == "useful" else "wasted") for use, rate in rates.items()]


def _parts(found: Figures) -> list[tuple[str, float]]:
    parts = found.seconds_per_request
    return [
        (label, 1000 * seconds)
        for part, label in _PARTS.items()
        if (seconds := getattr(parts, part)) is not None
    ]


def _prefix(found: Figures) -> list[tuple[str, int, str]]:
    tokens = found.prefix_tokens
    return [
        ("Prompt tokens", tokens.prompt, ""),
        ("Planned to be cached", tokens.planned, "soft"),
        ("Cached", tokens.achieved, ""),
        *([("Cached in host memory", tokens.from_host, "soft")] if tokens.from_host else []),
        *([("Cached in storage", tokens.from_storage, "soft")] if tokens.from_storage else []),
        ("Computed", tokens.computed, "wasted"),
        ("Planned, but computed", tokens.lost, "wasted"),
    ]


def _metric_rows(metrics: dict[str, Metric]) -> Iterator[dict[str, Any]]:
    for name, metric in metrics.items():
        yield {"name": name, **{key: metric.get(key) for key in ("unit", "avg", "p50", "p90", "p99", "max")}}
