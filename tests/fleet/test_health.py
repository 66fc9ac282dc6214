"""Whether a server is ejected: a state machine."""

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.fleet.health import Health, RateLimit


def test_failures_in_a_row_eject() -> None:
    """The last failure in the row ejects the server, once."""
    health = Health(eject_after=3)
    assert [False, False, True, False] == [health.failed() for _ in range(4)]
    assert health.ejected


def test_an_answer_ends_the_row() -> None:
    """An answer resets the count of failures."""
    health = Health(eject_after=2)
    for _ in range(5):
        assert not health.failed()
        health.answered()
    assert not health.ejected


def test_an_unreachable_server_is_ejected_at_once() -> None:
    """One failed connection ejects the server."""
    health = Health(eject_after=3)
    assert health.failed(reachable=False)
    assert not health.failed(reachable=False)


def test_a_late_answer_does_not_readmit() -> None:
    """Only a probe readmits: an answer may have been sent before the server died."""
    health = Health(eject_after=1)
    health.failed()
    health.answered()
    assert health.ejected


def test_a_readmitted_server_begins_anew() -> None:
    """Failures from before the ejection do not count."""
    health = Health(eject_after=2)
    health.failed()
    health.failed()
    health.readmit()
    assert not health.ejected
    assert [False, True] == [health.failed(), health.failed()]


@given(eject_after=st.integers(1, 5), events=st.lists(st.sampled_from(["answered", "failed", "readmit"])))
def test_ejections_and_readmissions_alternate(eject_after: int, events: list[str]) -> None:
    """Ejection and readmission alternate, so that one probe runs at a time."""
    health, is_in = Health(eject_after), True
    for event in events:
        if event == "failed":
            if health.failed():
                assert is_in
                is_in = False
        else:
            getattr(health, event)()
            is_in = is_in or event == "readmit"
        assert is_in is not health.ejected


def test_refusals_in_a_row_concern_the_server() -> None:
    """Four of them, or an eighth of a large cap; an answer ends the row."""
    limit = RateLimit()
    assert [False, False, False, True] == [limit.refused(8) for _ in range(4)]
    limit.answered()
    assert [False] * 7 + [True] == [limit.refused(64) for _ in range(8)]


def test_warnings_are_rare() -> None:
    """There is one at the first refusal, and later one in five minutes."""
    limit = RateLimit()
    assert [True, False, False, True, False] == [limit.take_warning(now) for now in (5, 6, 304, 305, 306)]
