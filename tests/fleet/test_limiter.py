"""The fixed cap of a server and its holds."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.fleet.limiter import Limiter

SHORTEST_S, LONGEST_S = 0.05, 5.0


def test_room_up_to_the_cap() -> None:
    """There is room for as many requests as the cap."""
    limiter = Limiter(cap=2)
    room = []
    for in_flight in range(4):
        limiter.in_flight = in_flight
        room.append(limiter.has_room(0.0))
    assert [True, True, False, False] == room


def test_a_full_queue_holds_the_server() -> None:
    """There is no room before the end of the hold."""
    limiter = Limiter(cap=2)
    limiter.busy(now=10.0, jitter=0.0)
    assert [False, False, True] == [limiter.has_room(now) for now in (10.0, 10.049, 10.05)]


def test_holds_grow_until_the_server_answers() -> None:
    """Each hold is twice the one before, up to a maximum; an answer resets it."""
    limiter, now, holds = Limiter(cap=1), 0.0, []
    for _ in range(8):
        limiter.busy(now, jitter=1.0)
        holds.append(round(limiter.held_until - now, 3))
        now = limiter.held_until
    assert [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0] == holds
    limiter.answered(now, 1.0, 1)
    limiter.busy(now, jitter=1.0)
    assert 0.1 == round(limiter.held_until - now, 3)


def test_those_that_were_under_way_do_not_lengthen_a_hold() -> None:
    """A hundred refusals from the same full queue are one event."""
    limiter = Limiter(cap=100)
    limiter.busy(0.0, 0.5)
    held_until = limiter.held_until
    for number in range(1, 100):
        limiter.busy(number / 10_000, 0.9)
    assert held_until == limiter.held_until
    limiter.busy(held_until, 1.0)
    assert 0.2 == round(limiter.held_until - held_until, 3)


@given(st.lists(st.tuples(st.sampled_from(["busy", "answered"]), st.floats(0, 10), st.floats(0, 0.999))))
def test_holds_are_bounded(events: list[tuple[str, float, float]]) -> None:
    """In any order of events no hold exceeds the maximum or becomes shorter."""
    limiter, now, ends = Limiter(cap=1), 0.0, [0.0]
    for name, later, jitter in events:
        now += later
        if name == "answered":
            limiter.answered(now, 1.0, 1)
            continue
        was_held = now < limiter.held_until
        limiter.busy(now, jitter)
        ends.append(limiter.held_until)
        assert not limiter.has_room(now)
        assert was_held or SHORTEST_S * 0.99 <= limiter.held_until - now <= LONGEST_S * 1.01
    assert all(earlier <= later for earlier, later in pairwise(ends))
