"""The report page: verdict, metrics and examples as one HTML file that loads nothing."""

from collections.abc import Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from streamsyn.errors import ConfigError, SinkError
from streamsyn.io.durable import write_whole
from streamsyn.report import charts
from streamsyn.report import verdict as thresholds
from streamsyn.report.charts import Bin, Histogram
from streamsyn.report.report_examples import SampleExample, shortened
from streamsyn.report.run_metrics import DEPTHS, RunMetrics, Scores, tokens_target
from streamsyn.report.verdict import Verdict, percent, verdict

_MAX_NAME = 60
"""Characters shown of names of runs, tasks, servers and models."""
_REASONS = {
    "near_duplicate": "repeats an earlier context",
    "contaminated": "shares text with evaluation data",
    "low_context_gain": "does not make its answer more likely",
    "not_answerable": "a model does not find the answer in it",
}


def write_report(directory: Path, path: Path | None = None) -> tuple[bytes, Verdict]:
    """Return the page on a run directory and its verdict; write the page to `path` if one is given.

    Raises:
        ConfigError: The directory is not a run directory, or the page cannot be written.
    """
    metrics = RunMetrics(directory)
    found = verdict(metrics)
    page = render(metrics, found)
    if path is not None:
        try:
            write_whole(path, page)
        except SinkError as error:
            raise ConfigError(str(error)) from error
    return page, found


def render(metrics: RunMetrics, found: Verdict) -> bytes:
    """Return the page, encoded as UTF-8."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(files("streamsyn") / "data" / "report")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    assert environment.loader is not None, "it has just been given"
    style, _, _ = environment.loader.get_source(environment, "style.css")
    template = environment.get_template("page.html.j2")
    page = template.render(
        style=Markup(style),  # noqa: S704 - ours, from the package
        metrics=metrics,
        verdict=found,
        thresholds=thresholds,
        charts=charts,
        percent=percent,
        name=partial(shortened, max_chars=_MAX_NAME),
        reason_words=_REASONS,
        lengths=list(_lengths(metrics)),
        gain_range=_range(scores.gain for _, scores in _measured(metrics)),
        stretches=metrics.traffic.timeline.stretches(),
        tokens=_tokens(metrics),
        examples=metrics.samples_to_read.spread(),
        flagged=list(_flagged(metrics)),
    )
    return page.encode("utf-8", "replace")


def _lengths(metrics: RunMetrics) -> Iterator[dict[str, Any]]:
    """Yield the charts of lengths and positions."""
    config = metrics.config
    words = [words for words, _ in metrics.word_targets.most_common(1)]
    yield _plotted(metrics.all.words, "Words per context", "words", words)
    tokens = tokens_target(config.recipe)
    yield _plotted(metrics.context_tokens, "Tokens per context", "tokens", [tokens] if tokens else [])
    bounds = metrics.sample_target
    targets = sorted({bounds.low, bounds.high}) if bounds is not None else []
    yield _plotted(metrics.sample_tokens, "Tokens per assembled sample", "tokens", targets)
    if any(metrics.depth):
        tenths = [Bin(at / DEPTHS, (at + 1) / DEPTHS, count) for at, count in enumerate(metrics.depth)]
        yield {
            "title": "Position of the relevant context",
            "chart": charts.columns(tenths, "Position of the relevant context", "of the prompt", ""),
            "caption": "0 is the start of the prompt's passages, 1 their end",
        }


def _plotted(values: Histogram, title: str, unit: str, targets: list[int]) -> dict[str, Any]:
    markers = [(float(target), f"target {target:,}") for target in targets]
    p5, p50, p95 = (charts.number_text(values.quantile(share)) for share in (0.05, 0.5, 0.95))
    caption = f"median {p50}; 90 % from {p5} to {p95}" if values.count else "none yet"
    return {"title": title, "chart": charts.histogram(values, title, unit, markers), "caption": caption}


def _measured(metrics: RunMetrics) -> list[tuple[str, Scores]]:
    return [("all", metrics.all), *metrics.tasks.sorted()]


def _range(histograms: Iterator[Histogram]) -> tuple[float, float]:
    """Return a common range for box plots: it holds all whiskers, and zero."""
    ends = [(one.quantile(0.05), one.quantile(0.95)) for one in histograms if one.count]
    low, high = min((low for low, _ in ends), default=0.0), max((high for _, high in ends), default=0.0)
    low, high = min(low, 0.0), max(high, 0.0, 0.1)
    margin = 0.03 * (high - low)
    return low - margin, high + margin


def _tokens(metrics: RunMetrics) -> list[tuple[str, int, str]]:
    """Return what tokens were used for, as (label, number, CSS class)."""
    used, scoring = metrics.traffic.all, metrics.traffic.scoring
    rows = [
        ("Prompts, computed", used.prompt - used.cached, ""),
        ("Prompts, from the cache", used.cached, "soft"),
        *([("of these from host memory", used.host, "soft")] if used.host else []),
        *([("of these from storage", used.storage, "soft")] if used.storage else []),
        ("Written and kept", used.completion - used.thinking, ""),
        *([("Thoughts of what is kept", used.thinking, "soft")] if used.thinking else []),
        ("Written and discarded", metrics.traffic.wasted, "wasted"),
    ]
    if scoring.answers:
        rows += [
            ("Scoring: prompts, computed", scoring.prompt - scoring.cached, ""),
            ("Scoring: prompts, from the cache", scoring.cached, "soft"),
            ("Scoring: answers", scoring.completion, ""),
        ]
    return [(name, max(0, number), style) for name, number, style in rows]


def _flagged(metrics: RunMetrics) -> Iterator[SampleExample]:
    yield from metrics.samples_to_read.lowest_gain.items
    lowest = {example.key for example in metrics.samples_to_read.lowest_gain.items}
    yield from (one for one in metrics.samples_to_read.unanswered.items if one.key not in lowest)
