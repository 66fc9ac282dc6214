"""Two benchmarks side by side: each figure with its noise bounds, and whether the second one is a regression.

Bounds are at 95 %. With several runs they are those of the median of the runs. With one run they come from
the window: it is cut into parts of equal length, and the mean of the parts is bootstrapped. Parts of some
seconds hardly depend on each other, where single answers do: they come in waves.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy
import orjson

from streamsyn.bench.aiperf_export import aiperf_metrics
from streamsyn.bench.figures import figures, ticks_of
from streamsyn.bench.measurement import Interval, Measurement
from streamsyn.bench.series import median_interval
from streamsyn.config.fingerprint import differences, fingerprint
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError
from streamsyn.records import digest
from streamsyn.sink.rundir import read_run_json

Run = Mapping[str, Any]
"""A run in bench.json."""
Bounds = tuple[float, float]

_PARTS: Final = 20
"""Parts of a window, each at least `_PART_S` long; fewer than `_FEWEST` tell nothing about noise."""
_PART_S, _FEWEST = 1.0, 5
_RESAMPLES: Final = 1000
_MARGIN: Final = 2.5
"""Percent of the resampled means on each side that are outside of the bounds."""
_LONG: Final = 200
"""Longest text of a setting that is kept as it is."""
_HEAD: Final = 2**20
"""Bytes at the beginning of a file of seeds that tell whether it is the same."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that is compared.

    Attributes:
        name: Its name.
        path: Where it is in a run of bench.json.
        is_latency: Whether it is what an open loop is for; a closed loop is for throughput.
        is_lower_better: Whether less is better.
        decides: Whether it counts as a regression when it is worse.
    """

    name: str
    path: tuple[str, ...]
    is_latency: bool = False
    is_lower_better: bool = False
    decides: bool = True


FIGURES: Final = (
    Figure("seconds for the replay", ("replayed", "seconds"), is_lower_better=True),
    Figure("useful tokens/s", ("figures", "useful_tokens_per_s")),
    Figure("output tokens/s", ("aiperf", "output_token_throughput", "avg"), decides=False),
    Figure("requests/s", ("aiperf", "request_throughput", "avg"), decides=False),
    Figure("request p50, ms", ("aiperf", "request_latency", "p50"), is_latency=True, is_lower_better=True),
    Figure("request p99, ms", ("aiperf", "request_latency", "p99"), is_latency=True, is_lower_better=True),
    Figure(
        "first token p50, ms", ("aiperf", "time_to_first_token", "p50"), is_latency=True, is_lower_better=True
    ),
    Figure(
        "cached prompt tokens, %", ("aiperf", "overall_usage_prompt_cache_read_pct", "avg"), decides=False
    ),
    Figure(
        "client CPU ms/request",
        ("figures", "client", "cpu_ms_per_request"),
        is_lower_better=True,
        decides=False,
    ),
)


def noise(measurement: Measurement) -> dict[str, Bounds]:
    """Return the bounds of the figures of one run, by name; those that one run cannot tell are left out."""
    window = measurement.window
    parts = min(_PARTS, int(window.seconds / _PART_S))
    if parts < _FEWEST:
        return {}
    length = window.seconds / parts
    begins = [window.begins_at + number * length for number in range(parts)]
    runs = [_part(measurement, Interval(begin, begin + length)) for begin in begins]
    whole, found = _values(measurement), {}
    rng = numpy.random.default_rng(0)
    for figure in FIGURES:
        values = [value for value in (_at(run, figure.path) for run in runs) if value is not None]
        value = _at(whole, figure.path)
        if value is None or len(values) < _FEWEST:
            continue
        means = rng.choice(numpy.array(values), (_RESAMPLES, len(values))).mean(axis=1)
        low, high = numpy.percentile(means, (_MARGIN, 100 - _MARGIN)) - numpy.mean(values)
        found[figure.name] = (value + float(low), value + float(high))
    return found


def _part(measurement: Measurement, interval: Interval) -> Run:
    within = [
        one
        for one in measurement.requests
        if one.done_at >= interval.begins_at and one.sent_at < interval.ends_at
    ]
    ticks = ticks_of(measurement, interval)
    part = replace(measurement, measured=interval, steady=interval, requests=within, ticks=ticks)
    return _values(replace(part, server_counters=[]))


def _values(measurement: Measurement) -> Run:
    found = figures(measurement)
    client = {"cpu_ms_per_request": found.client.cpu_ms_per_request}
    return {
        "figures": {"useful_tokens_per_s": found.useful_tokens_per_s, "client": client},
        "aiperf": aiperf_metrics(measurement),
    }


def _at(run: Run, path: Sequence[str]) -> float | None:
    """The number at a path; None where there is none."""
    found: Any = run
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def work(config: Config, recipe: Mapping[str, str], replay: Path | None = None) -> dict[str, Any]:
    """Return what two benchmarks must have in common to be compared, as JSON values. Reads files.

    Args:
        config: The configuration of the benchmark.
        recipe: The recipe's own fingerprint.
        replay: The run directory whose requests are sent in place of those for the seeds.
    """
    if replay is not None:
        run = read_run_json(replay) or {}
        same = orjson.dumps([run.get("created_at"), run.get("fingerprint")], option=orjson.OPT_SORT_KEYS)
        return {"replay": digest(same).hex()}
    shaping = {
        key: value
        for key, value in {**fingerprint(config), **recipe}.items()
        if key.startswith(("recipe.", "checks."))
    }
    short = {
        key: digest(value).hex() if isinstance(value, str) and len(value) > _LONG else value
        for key, value in shaping.items()
    }
    sources = [_source(source.path) for source in config.seeds.sources]
    found: dict[str, Any] = orjson.loads(orjson.dumps(short | {"seeds": sources}))
    return found


def _source(path: str) -> list[Any]:
    """What identifies a source of seeds: its name, and of files their sizes and beginnings."""
    found = Path(path)
    files = sorted(one for one in found.rglob("*") if one.is_file()) if found.is_dir() else [found]
    if not found.exists():
        return [path]
    return [found.name, *([file.stat().st_size, digest(_head(file)).hex()] for file in files)]


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of both benchmarks; bounds are None where they are not known."""

    figure: Figure
    before: float
    before_bounds: Bounds | None
    now: float
    now_bounds: Bounds | None
    is_regression: bool

    @property
    def change(self) -> float:
        """The change relative to `before`."""
        return (self.now - self.before) / abs(self.before) if self.before else 0.0

    @property
    def is_noise(self) -> bool:
        """Whether the bounds overlap; False where they are not known."""
        if self.before_bounds is None or self.now_bounds is None:
            return False
        return self.before_bounds[0] <= self.now_bounds[1] and self.now_bounds[0] <= self.before_bounds[1]

    @property
    def verdict(self) -> str:
        """The change in a word or two."""
        if self.is_regression:
            return "regression"
        if self.is_noise or not self.change:
            return "within noise"
        return "better" if (self.change < 0) == self.figure.is_lower_better else "worse"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two benchmarks of the same work.

    Attributes:
        paths: Their files.
        rows: The figures that both have.
        tolerance: The change for the worse, relative, that is not a regression.
        notes: What to know about the comparison, one line each.
    """

    paths: tuple[Path, Path]
    rows: Sequence[Row]
    tolerance: float
    notes: Sequence[str]

    @property
    def regressions(self) -> list[Row]:
        """What is worse by more than the tolerance, and by more than noise."""
        return [row for row in self.rows if row.is_regression]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "before": str(self.paths[0]),
            "now": str(self.paths[1]),
            "tolerance": self.tolerance,
            "is_regression": bool(self.regressions),
            "figures": [
                {
                    "name": row.figure.name,
                    "before": row.before,
                    "before_bounds": row.before_bounds,
                    "now": row.now,
                    "now_bounds": row.now_bounds,
                    "change": row.change,
                    "verdict": row.verdict,
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """Yield the table for a terminal."""
        yield f"{'':26}{'A':>24}{'B':>24}{'change':>9}"
        for row in self.rows:
            before, now = _shown(row.before, row.before_bounds), _shown(row.now, row.now_bounds)
            yield f"{row.figure.name:26}{before:>24}{now:>24}{row.change:>+9.1%}  {row.verdict}"
        yield "A: {}, B: {}; ± are the 95 % bounds".format(*self.paths)
        yield from self.notes
        for row in self.regressions:
            yield (
                f"regression: {row.figure.name} {row.change:+.1%}, beyond noise and --tolerance "
                f"{self.tolerance:g}"
            )


def _shown(value: float, bounds: Bounds | None) -> str:
    digits = 0 if abs(value) >= 1000 else 2
    if bounds is None:
        return f"{value:,.{digits}f}"
    return f"{value:,.{digits}f} ±{(bounds[1] - bounds[0]) / 2:,.{digits}f}"


def compare(before: Path, now: Path, tolerance: float) -> Comparison:
    """Compare two files bench.json, or the folders that hold them.

    Args:
        before: The benchmark to compare with.
        now: The one that may be worse.
        tolerance: The change for the worse, relative, that is not a regression.

    Raises:
        ConfigError: A file is not a bench.json, or the two measured different work.
    """
    first, second = _read(before), _read(now)
    _check_same_work(before, first, now, second)
    is_open_loop = _typical(first)["load"].get("rate") is not None
    rows = []
    for figure in FIGURES:
        value, other = _at(_typical(first), figure.path), _at(_typical(second), figure.path)
        if value is None or other is None:
            continue
        value, bounds = _with_bounds(first, figure, value)
        other, other_bounds = _with_bounds(second, figure, other)
        row = Row(figure, value, bounds, other, other_bounds, is_regression=False)
        worse_by = row.change if figure.is_lower_better else -row.change
        decides = figure.decides and figure.is_latency == is_open_loop
        rows.append(replace(row, is_regression=decides and worse_by > tolerance and not row.is_noise))
    return Comparison((before, now), rows, tolerance, list(_notes(before, first, now, second)))


def _read(path: Path) -> dict[str, Any]:
    file = path / "bench.json" if path.is_dir() else path
    try:
        found = orjson.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"--compare {path}: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"--compare {path} is not a bench.json: it is not JSON ({error})") from error
    try:
        typical = _typical(found)
        is_bench = all(isinstance(typical[key], dict) for key in ("load", "figures", "aiperf"))
        is_bench = is_bench and isinstance(found["asked"]["work"], dict)
    except (KeyError, IndexError, TypeError):
        is_bench = False
    if not is_bench:
        hint = "; the bench.json beside it is one" if "aiperf" in file.name else ""
        raise ConfigError(f"--compare {path} is not a bench.json of `streamsyn bench`{hint}")
    return dict(found)


def _typical(bench: Mapping[str, Any]) -> dict[str, Any]:
    run: dict[str, Any] = bench["runs"][bench["typical_run"]]
    return run


def _check_same_work(before: Path, first: Mapping[str, Any], now: Path, second: Mapping[str, Any]) -> None:
    different = differences(first["asked"]["work"], second["asked"]["work"], {})
    rates = [_typical(bench)["load"].get("rate") for bench in (first, second)]
    if rates[0] != rates[1]:
        different = "; ".join(filter(None, (different, f"--rate: {rates[0]} before, {rates[1]} now")))
    if different:
        raise ConfigError(f"{before} and {now} measured different work ({different})")


def _with_bounds(bench: Mapping[str, Any], figure: Figure, value: float) -> tuple[float, Bounds | None]:
    """The figure of a benchmark and its bounds; of several runs the median, of a sweep the typical one."""
    values = [_at(run, figure.path) for run in bench["runs"] if run.get("is_complete")]
    known = [value for value in values if value is not None]
    if bench.get("kind") == "repeats" and len(known) > 1:
        interval = median_interval(known)
        if interval.low is None or interval.high is None:
            return interval.median, (min(known), max(known))
        return interval.median, (interval.low, interval.high)
    bounds = _typical(bench).get("noise", {}).get(figure.name)
    return value, None if bounds is None else (float(bounds[0]), float(bounds[1]))


def _notes(before: Path, first: Mapping[str, Any], now: Path, second: Mapping[str, Any]) -> Iterator[str]:
    for path, bench in ((before, first), (now, second)):
        if not bench.get("is_complete"):
            yield f"note: {path} is incomplete: {_typical(bench).get('stopped')}"
    for key in ("models", "gpus", "is_simulated"):
        values = [_typical(bench).get(key) for bench in (first, second)]
        if values[0] != values[1]:
            yield f"note: {key} differ: {values[0]} in A, {values[1]} in B"
    loads = [
        {key: value for key, value in _typical(bench)["load"].items() if key in ("cap", "with_log")}
        for bench in (first, second)
    ]
    if loads[0] != loads[1]:
        yield f"note: the loads differ: {loads[0]} in A, {loads[1]} in B"
