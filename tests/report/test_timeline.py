"""Timelines: sums over time, with stops left out."""

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.report.charts import over_time, time_axis
from streamsyn.report.traffic import MEASURES, Timeline

times = st.lists(st.floats(1, 2e9), min_size=1, max_size=150)


def filled(moments: list[float]) -> Timeline:
    timeline = Timeline()
    for at in moments:
        timeline.add(at, "contexts")
    return timeline


@given(times)
def test_nothing_is_lost_and_columns_are_few(moments: list[float]) -> None:
    """Everything is counted once, in order, in a bounded number of columns."""
    stretches = filled(moments).stretches()
    columns = [column for stretch in stretches for column in stretch.columns]

    assert len(moments) == sum(column.sums[0] for column in columns)
    assert sorted(columns, key=lambda column: column.at) == columns
    assert len(columns) <= 121 + len(stretches)


@given(times)
def test_order_does_not_matter(moments: list[float]) -> None:
    """The same times in reverse order give the same stretches."""
    assert filled(moments).stretches() == filled(moments[::-1]).stretches()


def test_a_stop_separates_stretches() -> None:
    """Two minutes of work with a week between them: two stretches with a column per second, and the week."""
    first, week = list(range(1000, 1060)), 7 * 86400
    stretches = filled([float(at) for at in (*first, *(at + week for at in first))]).stretches()

    assert [60, 60] == [len(stretch.columns) for stretch in stretches]
    assert [0, week - 60] == [stretch.pause_s for stretch in stretches]


def test_a_slow_run_has_no_stops() -> None:
    """Outcomes a minute apart form one stretch."""
    assert 1 == len(filled([1000.0 + 60 * number for number in range(100)]).stretches())


def test_cells_are_bounded() -> None:
    """A year of hourly outcomes takes few cells."""
    timeline = filled([float(hour * 3600 + 5) for hour in range(1, 8760)])

    assert len(timeline._cells) <= 2048
    assert 8759 == sum(column.sums[0] for part in timeline.stretches() for column in part.columns)


def test_charts_of_time() -> None:
    """Rates have the given unit, stops are labelled, and a measure without values is not drawn."""
    stretches = filled([1000.0, 1000.5, 1001.0, *(5000.0 + at for at in range(20))]).stretches()

    assert "at most 120" in over_time(stretches, "contexts", 60, "Contexts a minute")
    assert "stopped for 1 h 06 min" in over_time(stretches, "contexts", 60, "Contexts a minute")
    assert "stopped for 1 h 06 min" in time_axis(stretches)
    assert not over_time(stretches, "rejects", 60, "Rejects")


def test_a_pause_of_a_run_that_goes_on_is_not_a_stop() -> None:
    """The next outcome was asked for before the pause, or early in it."""
    timeline = filled([1000.0 + at for at in range(60)])
    timeline.add(9000.0, "contexts", asked_at=1030.0)
    for at in range(60):
        timeline.add(20_000.0 + at, "contexts", asked_at=19_990.0 + at)
    axis = time_axis(timeline.stretches())
    assert [False, True, False] == [stretch.was_running for stretch in timeline.stretches()]
    assert "no outcomes for 2 h 12 min" in over_time(timeline.stretches(), "contexts", 60, "Contexts")
    assert "stopped for 3 h 03 min" in axis
    assert not time_axis([])
    assert "contexts" in MEASURES
