"""The page: figures and verdict, as HTML that stands alone."""

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
from streamsyn.report.collection import DEPTHS, RunMetrics, tokens_target
from streamsyn.report.distributions import Bin, Histogram, Scores
from streamsyn.report.excerpts import shortened
from streamsyn.report.reader_samples import ReaderSample
from streamsyn.report.verdict import Verdict, percent, verdict

_NAME = 60
REASON_WORDS = {
    "near_duplicate": "repeats an earlier context",
    "contaminated": "shares words with evaluation data",
    "low_context_gain": "does not make its answer likelier",
    "not_answerable": "the answer is not found in it",
}


def write_report(directory: Path, path: Path | None = None) -> tuple[bytes, Verdict]:
    """The page on a run directory, and the verdict in it; written to `path` where one is given.

    Raises:
        ConfigError: It is no run directory, or the page cannot be written.
    """
    figures = RunMetrics(directory)
    found = verdict(figures)
    page = render(figures, found)
    if path is not None:
        try:
            write_whole(path, page)
        except SinkError as error:
            raise ConfigError(str(error)) from error
    return page, found


def render(figures: RunMetrics, found: Verdict) -> bytes:
    """The page as bytes of UTF-8."""
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
        figures=figures,
        verdict=found,
        thresholds=thresholds,
        charts=charts,
        percent=percent,
        name=partial(shortened, most_chars=_NAME),
        reason_words=REASON_WORDS,
        lengths=list(_lengths(figures)),
        gain_range=_range(scores.gain for _, scores in _measured(figures)),
        stretches=figures.traffic.timeline.stretches(),
        tokens=_tokens(figures),
        spread=figures.readings.spread(),
        flagged=list(_flagged(figures)),
    )
    return page.encode("utf-8", "replace")


def _lengths(figures: RunMetrics) -> Iterator[dict[str, Any]]:
    """What is shown of each length."""
    config = figures.config
    asked = [(float(words), f"asked for {words:,}") for words, _ in figures.words_asked.most_common(1)]
    yield _plotted(figures.all.words, "Words a context", "words", asked)
    target = tokens_target(config.recipe)
    asked = [(float(target), f"asked for {target:,}")] if target else []
    yield _plotted(figures.context_tokens, "Tokens a context", "tokens", asked)
    if figures.sample_target is not None:
        low, high = figures.sample_target.low, figures.sample_target.high
        asked = [(float(value), f"asked for {value:,}") for value in sorted({low, high})]
    else:
        asked = []
    yield _plotted(figures.sample_tokens, "Tokens a sample, assembled", "tokens", asked)
    if any(figures.depth):
        tenths = [Bin(at / DEPTHS, (at + 1) / DEPTHS, count) for at, count in enumerate(figures.depth)]
        yield {
            "title": "Place of the relevant context",
            "chart": charts.columns(tenths, "Place of the relevant context", "of the prompt", told=""),
            "told": "0 is the start of the prompt's passages, 1 their end",
        }


def _plotted(values: Histogram, title: str, unit: str, marks: list[tuple[float, str]]) -> dict[str, Any]:
    p5, p50, p95 = (charts.number_text(values.quantile(share)) for share in (0.05, 0.5, 0.95))
    told = f"median {p50}; 90 of 100 from {p5} to {p95}" if values.count else "none yet"
    return {"title": title, "chart": charts.histogram(values, title, unit, marks), "told": told}


def _measured(figures: RunMetrics) -> list[tuple[str, Scores]]:
    return [("all", figures.all), *figures.tasks.sorted()]


def _range(histograms: Iterator[Histogram]) -> tuple[float, float]:
    """A range for rows of boxes that are compared: all whiskers are on it, and zero."""
    ends = [(one.quantile(0.05), one.quantile(0.95)) for one in histograms if one.count]
    low, high = min((low for low, _ in ends), default=0.0), max((high for _, high in ends), default=0.0)
    low, high = min(low, 0.0), max(high, 0.0, 0.1)
    room = 0.03 * (high - low)
    return low - room, high + room


def _tokens(figures: RunMetrics) -> list[tuple[str, int, str]]:
    """What tokens were used for: a name, how many, a style."""
    used, scoring = figures.traffic.all, figures.traffic.scoring
    rows = [
        ("Prompts, computed", used.prompt - used.cached, ""),
        ("Prompts, from the cache", used.cached, "soft"),
        ("Written and kept", used.completion, ""),
        ("Written and thrown away", figures.traffic.wasted, "wasted"),
    ]
    if scoring.answers:
        rows += [
            ("Scoring: prompts, computed", scoring.prompt - scoring.cached, ""),
            ("Scoring: prompts, from the cache", scoring.cached, "soft"),
            ("Scoring: answers", scoring.completion, ""),
        ]
    return [(name, max(0, number), style) for name, number, style in rows]


def _flagged(figures: RunMetrics) -> Iterator[ReaderSample]:
    yield from figures.readings.lowest_gain.items
    lowest = {reading.key for reading in figures.readings.lowest_gain.items}
    yield from (one for one in figures.readings.unanswered.items if one.key not in lowest)
