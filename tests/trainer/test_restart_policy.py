"""What becomes of a trainer that has ended."""

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.trainer.supervisor import GiveUp, Restart, RestartPolicy, TrainerExit
from tests.examples import in_turn

KILLED = TrainerExit(-9)


@in_turn("code", [0, 2, 75])
@in_turn("stopping", [True, False])
def test_a_regular_end_is_final(code: int, stopping: bool) -> None:
    """Finished, refused or stopped, by its own decision or not, told to stop or not."""
    assert GiveUp(code) == RestartPolicy(None).after(TrainerExit(code), None, stopping=stopping)


def test_a_failure_by_its_own_decision_is_not_tried_again() -> None:
    """A stream without a sample is as empty the second time."""
    assert GiveUp(1) == RestartPolicy(None).after(TrainerExit(1, decided=True), None, stopping=False)


def test_a_trainer_that_dies_is_restarted_three_times_in_a_row() -> None:
    """After pauses that double; then no more."""
    restarts = RestartPolicy(None, pause_s=0.5)
    found = [restarts.after(KILLED, None, stopping=False) for _ in range(4)]

    assert [Restart(0.5, 1), Restart(1.0, 2), Restart(2.0, 3), GiveUp(1)] == found


def test_a_new_checkpoint_resets_the_count() -> None:
    """A trainer that makes progress is restarted for as long as it does; one checkpoint counts once."""
    restarts = RestartPolicy("step-1", max_restarts=1)

    assert Restart(1.0, 1) == restarts.after(KILLED, "step-2", stopping=False)
    assert Restart(1.0, 1) == restarts.after(KILLED, "step-3", stopping=False)
    assert GiveUp(1) == restarts.after(KILLED, "step-3", stopping=False)


@given(st.integers(-64, 255), st.booleans())
def test_a_trainer_that_was_told_to_stop_is_not_restarted(code: int, decided: bool) -> None:
    """However it ended; a death while it stops leaves a training that can be resumed."""
    found = RestartPolicy(None).after(TrainerExit(code, decided=decided), None, stopping=True)

    assert GiveUp(code if code in (0, 2, 75) else 75) == found


def test_an_end_is_described() -> None:
    """By its code or its signal."""
    assert "it was ended by signal 9" == KILLED.in_words
    assert "it exited with 1" == TrainerExit(1).in_words
