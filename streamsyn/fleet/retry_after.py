"""`Retry-After`: how long a server asks its clients to wait. Source: RFC 9110, section 10.2.3."""

import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

LONGEST_S = 600.0
"""Longest pause in seconds: a server that asks for more is asked again after this time."""


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Return the pause in seconds that the headers of an answer ask for; None without a valid one.

    Args:
        headers: Those of the answer. A date is compared with its `Date`, so that clocks need not agree.
        now: Unix time in seconds, used if `Date` is missing or invalid.
    """
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)  # the standard has whole seconds; some servers send fractions
    except ValueError:
        at, sent = _unix_time(value), _unix_time(headers.get("Date", ""))
        if at is None:
            return None
        seconds = max(0.0, at - (now if sent is None else sent))
    return min(seconds, LONGEST_S) if seconds >= 0 and math.isfinite(seconds) else None


def _unix_time(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
