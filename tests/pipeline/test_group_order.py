"""The order of work: groups stay together, no item waits for long, and nothing is waited for."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.pipeline.producer import GroupOrder

GROUPS = st.lists(st.sampled_from(["", "a", "b", "c", "d"]), max_size=60)


def given_out(groups: list[str], window: int, takes: list[int] | None = None) -> list[int]:
    """Numbers in the order in which they are handed out; `takes` are taken between additions of five."""
    held, out = GroupOrder[int](window), list[int]()
    items = list(enumerate(groups))
    for step, start in enumerate(range(0, len(items), 5)):
        held.add((group, number) for number, group in items[start : start + 5])
        for _ in range(takes[step % len(takes)] if takes else 0):
            if held:
                out.append(held.take())
    while held:
        out.append(held.take())
    return out


@given(groups=GROUPS, window=st.integers(0, 70), takes=st.lists(st.integers(0, 7), min_size=1))
def test_a_bounded_permutation(groups: list[str], window: int, takes: list[int]) -> None:
    """Each item once, none moved by more than the window, and each group in the order of reading."""
    out = given_out(groups, window, takes)
    assert list(range(len(groups))) == sorted(out)
    assert all(abs(place - number) < max(1, window) for place, number in enumerate(out))
    for group in {*groups} - {""}:
        members = [number for number in out if groups[number] == group]
        assert sorted(members) == members


@given(groups=GROUPS)
def test_groups_that_fit_are_together(groups: list[str]) -> None:
    """When the window holds all items, each group is in one piece, in the order of its first item."""
    out = given_out(groups, window=max(2, len(groups)))
    pieces = [group for group, _ in groupby(groups[number] for number in out) if group]
    assert list(dict.fromkeys(group for group in groups if group)) == pieces


@given(groups=GROUPS, window=st.integers(0, 1))
def test_without_a_window_it_is_a_queue(groups: list[str], window: int) -> None:
    """A window below 2, or items without groups, keep the order."""
    assert list(range(len(groups))) == given_out(groups, window) == given_out([""] * len(groups), 50)


def test_a_group_without_end_does_not_hold_up_the_others() -> None:
    """An item is handed out after at most `window` others."""
    held, out = GroupOrder[int](10), list[int]()
    held.add([("a", 0), ("b", 1)])
    for number in range(2, 60):
        held.add([("a", number)])
        out.append(held.take())
    assert 10 == out.index(1)


def test_room() -> None:
    """It reads ahead while there are groups to complete, and when it is empty."""
    held = GroupOrder[int](3)
    room = [held.has_room]
    for number, group in enumerate(["", "a", "a"]):
        held.add([(group, number)])
        room.append(held.has_room)
    assert [True, False, True, False] == room
    assert [0, 1, 2] == [held.take() for _ in range(3)]
    with pytest.raises(LookupError):
        held.take()
