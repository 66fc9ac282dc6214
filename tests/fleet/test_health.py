"""In or ejected: a plain state machine."""

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.fleet.health import Health


def test_failures_in_a_row_eject() -> None:
    """The last one of them says so, once."""
    health = Health(eject_after=3)
    assert [False, False, True, False] == [health.failed() for _ in range(4)]
    assert health.ejected


def test_an_answer_ends_the_row() -> None:
    """Failures with answers in between do not add up."""
    health = Health(eject_after=2)
    for _ in range(5):
        assert not health.failed()
        health.answered()
    assert not health.ejected


def test_a_server_that_is_not_there_is_ejected_at_once() -> None:
    """A connection that cannot be made needs no second opinion."""
    health = Health(eject_after=3)
    assert health.failed(reachable=False)
    assert not health.failed(reachable=False)


def test_a_late_answer_does_not_readmit() -> None:
    """Only a probe does: an answer may have been on its way when the server died."""
    health = Health(eject_after=1)
    health.failed()
    health.answered()
    assert health.ejected


def test_a_readmitted_server_begins_anew() -> None:
    """What it did before it was ejected is forgotten."""
    health = Health(eject_after=2)
    health.failed()
    health.failed()
    health.readmit()
    assert not health.ejected
    assert [False, True] == [health.failed(), health.failed()]


@given(eject_after=st.integers(1, 5), events=st.lists(st.sampled_from(["answered", "failed", "readmit"])))
def test_ejections_and_readmissions_alternate(eject_after: int, events: list[str]) -> None:
    """A server is said to be ejected just when it was in: so one probe runs at a time."""
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
