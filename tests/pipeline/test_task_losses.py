"""Hard tasks first, by their losses: nothing is lost, and no item waits without end."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from streamsyn.pipeline.producer import FLOOR, PATIENCE, TaskLosses, TaskOrder, task_weights

ITEMS = st.lists(st.tuples(st.sampled_from(["", "", "g", "h"]), st.sampled_from("abc")), max_size=80)
LOSSES = st.dictionaries(st.sampled_from("abcd"), st.floats(0, 20), max_size=4)
Item = tuple[str, str, int]
"""Group, task, number."""


def by_task(losses: dict[str, float], window: int, exponent: float = 1.0, seed: int = 0) -> TaskOrder[Item]:
    """An order over items, as a trainer with these losses would have it."""
    known = TaskLosses(Path("none"))
    known.losses = losses
    return TaskOrder[Item](lambda item: item[1], known, window, exponent, seed)


def given_out(items: list[tuple[str, str]], held: TaskOrder[Item]) -> list[tuple[Item, int]]:
    """Items in the order in which they are given out, each with how many went while it was held; reads on,
    five at a time, while there is room.
    """
    left = [(group, (group, task, number)) for number, (group, task) in enumerate(items)]
    out: list[tuple[Item, int]] = []
    since: dict[int, int] = {}
    while left or held:
        while left and held.has_room:
            batch, left = left[:5], left[5:]
            since |= {item[2]: len(out) for _, item in batch}
            held.add(batch)
        item = held.take()
        out.append((item, len(out) - since[item[2]]))
    return out


@given(items=ITEMS, losses=LOSSES, window=st.integers(1, 30), exponent=st.floats(0, 4))
def test_each_once_and_none_waits_without_end(
    items: list[tuple[str, str]], losses: dict[str, float], window: int, exponent: float
) -> None:
    """Nothing is lost or doubled, and the wait of every item is bounded."""
    out = given_out(items, by_task(losses, window, exponent))

    assert list(range(len(items))) == sorted(item[2] for item, _ in out)
    assert all(waited < PATIENCE * window + window + 5 for _, waited in out)


@given(items=ITEMS, losses=LOSSES, seed=st.integers(0, 3))
def test_the_same_losses_and_seed_give_the_same_order(
    items: list[tuple[str, str]], losses: dict[str, float], seed: int
) -> None:
    """And items of the same task and group keep their order."""
    first, again = (given_out(items, by_task(losses, 100, seed=seed)) for _ in range(2))

    assert first == again
    for kind in set(items):
        numbers = [number for (group, task, number), _ in first if (group, task) == kind]
        assert sorted(numbers) == numbers


@given(items=ITEMS, losses=LOSSES)
def test_groups_stay_together(items: list[tuple[str, str]], losses: dict[str, float]) -> None:
    """A group that is held whole is handed out in one piece."""
    groups = [group for (group, _, _), _ in given_out(items, by_task(losses, 1000))]

    for name in ("g", "h"):
        places = [place for place, group in enumerate(groups) if group == name]
        assert places == list(range(places[0], places[0] + len(places))) if places else True


def test_a_group_without_end_does_not_hold_up_the_others() -> None:
    """An item that has waited for PATIENCE windows of others is next."""
    held = by_task({"a": 1.0, "b": 1.0}, 5)
    held.add([("g", ("g", "a", 0))])
    assert 0 == held.take()[2]
    held.add([("", ("", "b", 1))])
    out = []
    for number in range(2, 60):
        held.add([("g", ("g", "a", number))])
        out.append(held.take()[2])

    assert PATIENCE * 5 == out.index(1)


def test_without_losses_it_is_the_order_of_reading() -> None:
    """As before a trainer has written any losses."""
    items = [("", task) for task in "abcabbca"]

    assert list(range(8)) == [item[2] for item, _ in given_out(items, by_task({}, 50))]


def test_draws_follow_the_losses() -> None:
    """While seeds of all tasks are held, each task is drawn in proportion to its loss."""
    items = [("", task) for task in "abc" * 1000]

    drawn = given_out(items, by_task({"a": 4.0, "b": 2.0}, 3000))[:1500]

    counted = Counter(task for (_, task, _), _ in drawn)
    expected = {"a": 4 / 9, "b": 2 / 9, "c": 3 / 9}  # c is not known, and has the mean
    assert all(counted[task] / 1500 == pytest.approx(share, abs=0.04) for task, share in expected.items())


def test_no_task_starves() -> None:
    """The lightest task weighs a tenth of the heaviest, whatever the losses; the exponent is a power."""
    assert {"a": 1.0, "b": FLOOR} == task_weights("ab", {"a": 100.0, "b": 0.001}, 1.0)
    assert {"a": 1.0, "b": 0.25} == task_weights("ab", {"a": 2.0, "b": 1.0}, 2.0)
    assert {"a": 1.0, "b": 1.0} == task_weights("ab", {"a": 0.0, "b": 0.0}, 1.0)


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    """Missing: no losses. Damaged: the old losses stay, and one line is logged. Replaced: read."""
    path = tmp_path / "task_losses.json"
    losses = TaskLosses(path)

    def written(text: str) -> tuple[dict[str, float], list[str]]:
        aside = tmp_path / "aside"
        aside.write_text(text)
        aside.replace(path)
        with capture_logs() as logs:
            losses.refresh()
            losses.refresh()
        return dict(losses.losses), [line["event"] for line in logs]

    losses.refresh()
    assert {} == losses.losses
    tasks = {"qa": {"loss": 2.0, "examples": 3}, "none": {"loss": None, "examples": 0}}
    assert ({"qa": 2.0}, ["seeds.task_losses"]) == written(json.dumps({"step": 1, "tasks": tasks}))
    for damaged in ('{"step": 1, "tas', "[]", '{"tasks": {"qa": 3}}', '{"tasks": {"qa": {"loss": -1}}}'):
        assert ({"qa": 2.0}, ["seeds.task_losses_unreadable"]) == written(damaged)
    assert ({"qa": 9.0}, ["seeds.task_losses"]) == written('{"tasks": {"qa": {"loss": 9}}}')
