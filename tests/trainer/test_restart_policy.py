"""What becomes of a trainer that has ended."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.trainer.supervisor import GiveUp, Restart, RestartPolicy, TrainerExit

KILLED = TrainerExit(-9)


@pytest.mark.parametrize("code", [0, 2, 75])
@pytest.mark.parametrize("stopping", [True, False])
def test_what_ends_as_it_should_is_left_at_that(code: int, stopping: bool) -> None:
    """Trained to the end, refused, stopped: whoever says so and whoever wanted it."""
    assert GiveUp(code) == RestartPolicy(None).after(TrainerExit(code), None, stopping=stopping)


def test_a_failure_by_its_own_decision_is_not_tried_again() -> None:
    """A stream without a sample is as empty the second time."""
    assert GiveUp(1) == RestartPolicy(None).after(TrainerExit(1, decided=True), None, stopping=False)


def test_what_dies_is_started_again_three_times_in_a_row() -> None:
    """After pauses that double; then no more."""
    restarts = RestartPolicy(None, pause_s=0.5)
    found = [restarts.after(KILLED, None, stopping=False) for _ in range(4)]

    assert [Restart(0.5, 1), Restart(1.0, 2), Restart(2.0, 3), GiveUp(1)] == found


def test_a_new_checkpoint_begins_a_new_row() -> None:
    """A trainer that gets on is kept up for as long as it does; one checkpoint counts once."""
    restarts = RestartPolicy("step-1", most=1)

    assert Restart(1.0, 1) == restarts.after(KILLED, "step-2", stopping=False)
    assert Restart(1.0, 1) == restarts.after(KILLED, "step-3", stopping=False)
    assert GiveUp(1) == restarts.after(KILLED, "step-3", stopping=False)


@given(st.integers(-64, 255), st.booleans())
def test_what_was_told_to_stop_is_never_started_again(code: int, decided: bool) -> None:
    """However it ended; a death while it stops leaves a training that can be resumed."""
    found = RestartPolicy(None).after(TrainerExit(code, decided=decided), None, stopping=True)

    assert GiveUp(code if code in (0, 2, 75) else 75) == found


def test_an_end_is_told_in_words() -> None:
    """By its code or its signal."""
    assert "it was ended by signal 9" == KILLED.in_words
    assert "it exited with 1" == TrainerExit(1).in_words
