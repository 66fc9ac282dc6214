"""What part of all requests each server should have."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.fleet.models import fair


@dataclass(frozen=True)
class Part:
    """A server as far as it matters here."""

    cap: int
    weight: float = 1.0


@pytest.mark.parametrize(
    ("parts", "total", "expected"),
    [
        ([Part(8), Part(100)], 10, [5, 5]),  # caps that nothing presses say nothing
        ([Part(8), Part(100)], 40, [8, 32]),  # the small one is full
        ([Part(8), Part(100)], 128, [18, 110]),  # both are, and what waits is spread evenly
        ([Part(100, 3), Part(100)], 40, [30, 10]),
        ([Part(10, 3), Part(100)], 40, [10, 30]),
        ([Part(5), Part(5), Part(50)], 30, [5, 5, 20]),
    ],
)
def test_by_weight_up_to_the_caps(parts: list[Part], total: int, expected: list[float]) -> None:
    """Even shares, none above its cap as long as there is room elsewhere."""
    assert expected == fair(parts, total)


PARTS = st.lists(st.builds(Part, st.integers(1, 500), st.floats(0.1, 10)), min_size=1, max_size=20)


@given(PARTS, st.integers(1, 5000))
def test_all_of_it_is_shared_out(parts: list[Part], total: int) -> None:
    """Nothing is lost, and a server above its cap means that all of them are full."""
    shares = fair(parts, total)
    assert total == pytest.approx(sum(shares))
    full = total >= sum(part.cap for part in parts)
    assert full or all(share <= part.cap + 1e-6 for share, part in zip(shares, parts, strict=True))
