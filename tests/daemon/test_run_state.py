"""What a hosted run may do in each state."""

import pytest

from streamsyn.daemon.run_record import STATES, Refused, RunState, State
from tests.examples import in_turn


@in_turn(
    ("before", "action", "after"),
    [
        ("running", "pause", "paused"),
        ("paused", "pause", "paused"),
        ("running", "drain", "stopped"),
        ("paused", "drain", "stopped"),
        ("stopped", "drain", "stopped"),
        ("running", "resume", "running"),
        ("paused", "resume", "running"),
        ("stopped", "resume", "running"),
        ("failed", "resume", "running"),
        ("finished", "resume", "running"),
        ("finished", "retry", "running"),
        ("failed", "retry", "running"),
        ("paused", "retry", "running"),
        ("stopped", "pause", None),
        ("finished", "pause", None),
        ("failed", "pause", None),
        ("finished", "drain", None),
        ("failed", "drain", None),
    ],
)
def test_what_follows(before: State, action: str, after: State | None) -> None:
    """Each action leads to one state, or is refused with the state in the message and nothing changed."""
    run = RunState(before, error="it broke" if before == "failed" else None)

    if after is None:
        with pytest.raises(Refused, match=before):
            getattr(run, action)()
    else:
        getattr(run, action)()

    assert run.state == (after or before)
    assert (run.error is None) == (run.state != "failed")


@in_turn("state", STATES)
def test_seeds_are_accepted_only_while_they_will_be_used(state: State) -> None:
    """Running and paused runs accept seeds until they are closed; the others say why they do not."""
    run = RunState(state, error="it broke" if state == "failed" else None)

    assert run.accepting == (state in {"running", "paused"})
    assert state in run.why_not_accepting or run.accepting

    run.close()
    assert not run.accepting


def test_a_run_finishes_once_closed_and_reopens() -> None:
    """All outcomes of an open run are not its end; a finished run that is resumed accepts seeds again."""
    run = RunState()
    run.finished()
    assert run.state == "running"

    run.close()
    run.finished()
    assert (run.state, run.accepting) == ("finished", False)

    run.resume()
    assert (run.state, run.accepting) == ("running", True)


def test_a_retry_of_a_finished_run_stays_closed() -> None:
    """Its rejects are asked again; it accepts no new seeds, and finishes again."""
    run = RunState("finished", is_closed=True)
    run.retry()
    assert (run.state, run.accepting) == ("running", False)
    run.finished()
    assert run.state == "finished"
