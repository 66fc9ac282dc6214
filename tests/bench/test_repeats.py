"""How often a measurement is repeated: until the interval of its median is narrow."""

from dataclasses import replace
from pathlib import Path
from random import Random

import orjson
import pytest

from streamsyn.bench.measured_run import RunToMeasure
from streamsyn.bench.measurement import Load, Measurement
from streamsyn.bench.series import median_interval, repeated, sweep_points, swept, throughput_interval
from streamsyn.config.loading import load
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation

URL = "http://gpu-0:30000"


@pytest.mark.parametrize(
    ("number", "ends"),  # Conover's table for the sign test at 95 %
    [(1, None), (5, None), (6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (12, (3, 10)), (20, (6, 15))],
)
def test_the_interval_is_that_of_the_order_statistics(number: int, ends: tuple[int, int] | None) -> None:
    """Whatever the order of the values."""
    values = [float(value) for value in range(1, number + 1)]
    Random(0).shuffle(values)
    found = median_interval(values)

    assert (number + 1) / 2 == found.median
    assert ends == (None if found.low is None else (found.low, found.high))


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """At least 95 % of the time, also for a skewed distribution."""
    rng = Random(0)
    samples = [median_interval([rng.expovariate(1.0) for _ in range(9)]) for _ in range(2000)]
    held = sum((one.low or 0.0) <= 0.6931 <= (one.high or 0.0) for one in samples)

    assert 0.95 < held / 2000 < 0.975  # 0.961 exactly


@pytest.mark.parametrize(("spread", "is_narrow"), [(0.0145, True), (0.0155, False)])
def test_narrow_is_a_width_under_3_per_cent(spread: float, is_narrow: bool) -> None:
    """Of the median."""
    values = [100 * (1 - spread), 100.0, 100.0, 100.0, 100.0, 100 * (1 + spread)]

    assert is_narrow == median_interval(values).is_narrow


def test_no_interval_is_not_narrow() -> None:
    """However near the values are."""
    assert not median_interval([1.0] * 5).is_narrow


@pytest.fixture
def asked(tmp_path: Path) -> RunToMeasure:
    """A run of 4 s at one simulated server with four seats."""
    path = tmp_path / "seeds.jsonl"
    rows = [{"id": f"s{n}", "instruction": f"What of {n}?", "answer": f"It is {n}."} for n in range(400)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    simulated = SimulatorConfig(latency_ms=500.0, slots=4)
    settings = {
        "seeds.sources": [{"path": str(path)}],
        "fleet.servers": [URL],
        "run.queue_size": 1,
        "seeds.group_window": 0,
    }
    return RunToMeasure(
        config=load(None, settings.items()),
        load=Load(cap=2, warmup_s=1.0, duration_s=3.0),
        simulated=lambda: InProcessServers({URL: Simulation(simulated)}),
        handles_signals=False,
    )


def test_repeats_end_when_the_interval_is_narrow(asked: RunToMeasure) -> None:
    """Six runs that hardly differ."""
    told: list[Measurement] = []
    runs = repeated(asked, None, told.append)

    assert 6 == len(runs)
    assert told == runs
    assert throughput_interval(runs).is_narrow


@pytest.mark.parametrize(("repeats", "limit_s", "number"), [(2, 900.0, 2), (None, 13.0, 3)])
def test_repeats_end_at_their_number_or_their_time(
    asked: RunToMeasure, repeats: int | None, limit_s: float, number: int
) -> None:
    """A run that would end after the limit is not begun."""
    assert number == len(repeated(replace(asked, limit_s=limit_s), repeats))


def test_a_sweep_measures_each_cap(asked: RunToMeasure) -> None:
    """Until the seats of the server are the limit."""
    runs = swept(asked, (1, 2, 4, 8))
    points = sweep_points(runs)

    assert [1, 2, 4, 8] == [run.load.cap for run in runs]
    assert [1.0, 2.0, 4.0, 8.0] == pytest.approx([point.in_flight for point in points], rel=0.02)
    rates = [point.tokens_per_s / points[0].tokens_per_s for point in points]
    assert [1.0, 2.0, 4.0, 4.0] == pytest.approx(rates, rel=0.1)


def test_a_sweep_without_caps_ends_when_throughput_does_not_grow(asked: RunToMeasure) -> None:
    """It doubles the cap."""
    longest_wait = Load(warmup_s=9.0, duration_s=9.0)
    caps = [run.load.cap for run in swept(replace(asked, load=longest_wait), ())]

    assert [4, 8, 16, 32, 64] == caps
