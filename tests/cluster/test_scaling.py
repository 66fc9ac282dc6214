"""How many servers there should be."""

from math import inf

import pytest

from streamsyn.cluster.scaling import Scaling


@pytest.mark.parametrize(
    ("work", "wanted"), [(0, 2), (100, 2), (101, 2), (201, 3), (350, 4), (100_000, 8), (inf, 8)]
)
def test_more_are_wanted_at_once_between_the_bounds(work: float, wanted: int) -> None:
    """As many as the work needs, each with 100 requests in flight."""
    assert wanted == Scaling(2, 8, idle_s=60).wanted(2, work, room=100, now=0)


def test_one_at_a_time_goes_after_a_while() -> None:
    """What is not needed for `idle_s` is stopped, one by one; work in between begins the time anew."""
    scaling = Scaling(1, 8, idle_s=60)
    asked = [(4, 50, 0), (4, 50, 59), (4, 50, 60), (3, 50, 119), (3, 250, 121), (3, 50, 122), (3, 50, 182)]
    assert [4, 4, 3, 3, 3, 3, 2] == [scaling.wanted(running, work, 100, now) for running, work, now in asked]
