"""`Retry-After`: seconds, dates, and whatever else a server may send."""

from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.fleet.retry_after import LONGEST_S, retry_after_s
from tests.examples import examples

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("value", "pause_s"),
    [
        ("3", 3.0),
        (" 0 ", 0.0),
        ("0.25", 0.25),
        (str(10 * LONGEST_S), LONGEST_S),
        (formatdate(NOW + 90, usegmt=True), 90.0),
        (formatdate(NOW - 90, usegmt=True), 0.0),
        (formatdate(NOW + 86_400, usegmt=True), LONGEST_S),
        ("", None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("Sun, 99 Nov 9999 99:99:99 GMT", None),
    ],
)
def test_the_pause(value: str, pause_s: float | None) -> None:
    """Whole seconds, fractions and dates; nothing else, and at most `LONGEST_S`."""
    assert pause_s == retry_after_s({"Retry-After": value}, NOW)


def test_no_header() -> None:
    """Without the header there is no pause."""
    assert retry_after_s({}, NOW) is None


def test_a_date_is_compared_with_the_servers_clock() -> None:
    """A client whose clock is an hour late does not wait for an hour."""
    headers = {"Retry-After": formatdate(NOW + 5, usegmt=True), "Date": formatdate(NOW, usegmt=True)}
    assert 5.0 == retry_after_s(headers, NOW - 3600)


@examples(200)
@given(st.dictionaries(st.sampled_from(["Retry-After", "Date"]), st.text()))
def test_any_header(headers: dict[str, str]) -> None:
    """Whatever a server sends is a pause within bounds, or none."""
    pause_s = retry_after_s(headers, NOW)
    assert pause_s is None or 0 <= pause_s <= LONGEST_S
