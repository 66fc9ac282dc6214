"""The figures of the fleet benchmark, from made-up measurements."""

import math

from benchmarks.fleet import Outcome, Scenario, with_streamsyn
from benchmarks.workloads import WORKLOADS


def test_the_window_ends_before_the_work_does() -> None:
    """It begins at the 60th second, or after half of a shorter time; without time it has no figure."""
    scenario = Scenario(1, 10, WORKLOADS["short"])
    a_second = scenario.capacity(0, 1)
    out = Outcome("auto", ended_s=90, left_s=40, written=[(at, round(at * a_second / 2)) for at in range(91)])
    assert (20, 0.5, 0.5) == (
        out.settled_s,
        round(out.window(scenario), 3),
        round(out.whole(scenario), 3),
    )
    out.left_s = 300
    assert 60 == out.settled_s
    out.left_s = 0
    assert math.isnan(out.window(scenario))


def test_a_small_job_begins_at_once() -> None:
    """100 seeds, whose answers all fit into the pool: as long as a fixed cap of 100 takes, and not 84 s."""
    out = with_streamsyn(Scenario(1, 100, WORKLOADS["default"]), "auto", [])
    assert (100, 0) == (out.answers, out.retracted)
    assert out.ended_s < 70


def test_caps_are_those_of_the_window() -> None:
    """A cap from before it does not count as the lowest."""
    scenario = Scenario(1, 10, WORKLOADS["short"])
    caps = {scenario.urls[0]: [(0.0, 8), (50.0, 90), (61.0, 120), (100.0, 200), (120.0, 2)]}
    assert (120, 200) == Outcome("auto", left_s=110, caps=caps).cap_range(scenario)
