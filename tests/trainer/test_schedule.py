"""The learning rate over a training."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.config.command_sections import TrainSection
from streamsyn.trainer.loop import Schedule


def section(**given: object) -> TrainSection:
    return TrainSection.model_validate({"learning_rate": 1.0, "warmup_steps": 4, "decay_steps": 5, **given})


def test_with_a_total_it_is_a_cosine() -> None:
    """Linear warm-up, then down to 0 at `total_steps`, and 0 after it."""
    schedule = Schedule(section(total_steps=14))
    rates = [schedule.rate(step, None) for step in range(16)]

    assert [0.25, 0.5, 0.75, 1.0] == rates[:4]
    expected = [(1 + math.cos(math.pi * done / 10)) / 2 for done in range(10)]
    assert pytest.approx(expected) == rates[4:14]
    assert [0, 0] == rates[14:]


def test_an_open_stream_is_held_until_its_end_is_near() -> None:
    """Constant while the end is not known; over the last `decay_steps` a linear decay, whose last rate is
    above 0.
    """
    schedule = Schedule(section())
    unknown = [schedule.rate(step, None) for step in range(10)]
    known = [schedule.rate(10 + done, 8 - done) for done in range(8)]

    assert [1.0] * 6 == unknown[4:]
    assert pytest.approx([1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]) == known


def test_a_stream_that_continues_after_its_end_is_open_again() -> None:
    """For example a pipe whose writer died: the rate is what it was, and falls again at the next end."""
    first = Schedule(section(warmup_steps=0))
    assert [1.0, 0.5] == [first.rate(step, left) for step, left in enumerate([2, 1])]
    first.reopen()
    later = Schedule(section(warmup_steps=0), first.state())

    assert [1.0, 1.0, 0.5] == [later.rate(2 + step, left) for step, left in enumerate([None, 2, 1])]


def test_an_end_that_comes_sooner_is_spread_over_what_is_left() -> None:
    """With fewer than `decay_steps` left when the end is first known, the rate falls over those."""
    schedule = Schedule(section(warmup_steps=0))

    assert [1.0, 1.0, 0.5] == [schedule.rate(0, None), schedule.rate(1, 2), schedule.rate(2, 1)]


@given(st.lists(st.none() | st.integers(1, 30), max_size=40), st.integers(0, 40))
def test_it_resumes_and_never_rises_again(lefts: list[int | None], kill: int) -> None:
    """From any state on, rates are as without an interruption; after warm-up none is higher than the one
    before.
    """
    whole, first = Schedule(section()), Schedule(section())
    expected = [whole.rate(step, left) for step, left in enumerate(lefts)]
    rates = [first.rate(step, left) for step, left in enumerate(lefts[:kill])]
    later = Schedule(section(), first.state())
    rates += [later.rate(step, left) for step, left in enumerate(lefts) if step >= kill]

    assert expected == rates
    assert sorted(expected[4:], reverse=True) == expected[4:]
    assert all(0 < rate <= 1 for rate in expected)
