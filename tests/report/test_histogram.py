"""Histograms in bounded memory."""

import math
import random
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.report.charts import Histogram, round_width, ticks
from tests.examples import in_turn

values = st.lists(st.floats(-1e9, 1e9) | st.integers(-(10**6), 10**6), min_size=1, max_size=200)


def filled(numbers: list[float], **given: float) -> Histogram:
    histogram = Histogram(given.get("step", 1.0), int(given.get("max_cells", 64)))
    for number in numbers:
        histogram.add(number)
    return histogram


@given(values, st.randoms())
def test_order_does_not_matter(numbers: list[float], rng: random.Random) -> None:
    """The same values in a different order give the same columns and quantiles."""
    other = list(numbers)
    rng.shuffle(other)
    ours, theirs = filled(numbers), filled(other)

    assert ours.bins() == theirs.bins()
    assert [ours.quantile(share / 10) for share in range(11)] == [
        theirs.quantile(share / 10) for share in range(11)
    ]


@given(values)
def test_every_value_is_in_a_column(numbers: list[float]) -> None:
    """Columns hold all values, outliers too; they are few, adjacent, and of one width."""
    bins = filled(numbers).bins(at_most=20)

    assert len(numbers) == sum(one.count for one in bins)
    assert len(bins) <= 23
    assert all(math.isclose(left.high, right.low) for left, right in pairwise(bins))


@given(values)
def test_memory_is_bounded(numbers: list[float]) -> None:
    """No more cells than allowed are kept, whatever the values are."""
    assert len(filled(numbers, max_cells=16)._cells) <= 16


@given(st.lists(st.integers(-500, 500), min_size=1, max_size=300), st.floats(0, 1))
def test_quantiles_of_whole_numbers_are_exact(numbers: list[int], share: float) -> None:
    """As long as cells have their first width, a quantile is one of the values, and the right one."""
    place = max(1, math.ceil(share * len(numbers))) - 1

    assert sorted(numbers)[place] == filled(list(numbers), max_cells=4096).quantile(share)


def test_anything_but_a_finite_number_is_ignored() -> None:
    """No value in the log makes a histogram fail."""
    histogram = Histogram()
    strange: list[Any] = [None, "5", True, float("nan"), float("inf"), [1], {}]
    for value in strange:
        histogram.add(value)

    assert (0, [], 0.0) == (histogram.count, histogram.bins(), histogram.median)


def test_an_outlier_does_not_flatten_the_rest() -> None:
    """One value a thousand times as large does not put all others into one column."""
    bins = filled([*map(float, range(1000)), 1e6], max_cells=4096).bins()

    assert len([one for one in bins if one.count]) > 10
    assert 1001 == sum(one.count for one in bins)


def test_a_target_is_within_the_range() -> None:
    """The columns reach a target that no value does."""
    bins = filled([90.0, 110.0]).bins(also=(1000.0,))

    assert bins[0].low <= 90
    assert bins[-1].high >= 1000


@in_turn(("width", "rounded"), [(0.3, 1), (1.2, 2), (3, 5), (7, 10), (130, 200), (5, 5)])
def test_widths_are_round(width: float, rounded: float) -> None:
    """1, 2 or 5 times a power of ten, and at least one."""
    assert rounded == round_width(width, 1.0)


def test_ticks_are_round_and_within() -> None:
    """Ticks are few, and none is outside."""
    assert [0.0, 500.0, 1000.0] == ticks(-3, 1200, 3)
    assert [5.0] == ticks(5.0, 5.0)
