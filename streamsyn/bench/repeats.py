"""Repeats of a measurement, until their median is known well enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import Final

CONFIDENCE: Final = 0.95
NARROW: Final = 0.03
"""Width of the confidence interval, as a share of the median, that ends the repeats."""


@dataclass(frozen=True, slots=True)
class MedianInterval:
    """The median of repeated measurements and its confidence interval.

    Attributes:
        median: The median.
        low: Lower end of the interval; None if there are too few values for the confidence.
        high: Upper end.
    """

    median: float
    low: float | None
    high: float | None

    @property
    def width(self) -> float | None:
        """Width of the interval as a share of the median; None without an interval."""
        if self.low is None or self.high is None or not self.median:
            return None
        return (self.high - self.low) / abs(self.median)

    @property
    def is_narrow(self) -> bool:
        """Whether further repeats are not needed."""
        return self.width is not None and self.width < NARROW


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> MedianInterval:
    """Return the median of `values` and its confidence interval, which assumes no distribution.

    The interval is that of the order statistics: the k-th lowest and the k-th highest value, where the median
    is outside with the probability 2 * P(Binomial(n, 1/2) < k). From 6 values on there is one at 95 %.

    Source: Conover, "Practical Nonparametric Statistics", 3.2.

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("no values")
    ordered, number = sorted(values), len(values)
    outside, k = 0.0, 0
    while True:
        outside += 2 * comb(number, k) / 2**number
        if outside > 1 - confidence or k >= number // 2:
            break
        k += 1
    if k == 0:
        return MedianInterval(median(ordered), None, None)
    return MedianInterval(median(ordered), ordered[k - 1], ordered[number - k])
