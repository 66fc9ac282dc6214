"""Splits: each seed is in one split, shares are kept, and names are valid for `datasets`."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import ConfigError
from streamsyn.export.splits import MAX_TASKS, Split, Splits, TaskNames
from tests.examples import in_turn


@given(task=st.text(), seed_id=st.text(), seed=st.integers(0, 2**63))
def test_a_seed_is_in_one_split(task: str, seed_id: str, seed: int) -> None:
    """It depends on its id and the split seed alone, not on the task."""
    splits = Splits(["a=0.5,b=0.5"], seed)

    assert splits.of(task, seed_id) == splits.of("other", seed_id)
    assert Split(None, "train") == Splits([], seed).of(task, seed_id)
    assert Split(task, splits.of(task, seed_id).name) == Splits(["task", "a=0.5,b=0.5"], seed).of(
        task, seed_id
    )


def test_shares_are_kept_approximately() -> None:
    """With 4,000 seeds they are within 3 %; a different split seed splits differently."""
    names = [Splits(["a=0.9,b=0.08,c=0.02"], 0).of("t", str(n)).name for n in range(4000)]
    others = [Splits(["a=0.9,b=0.08,c=0.02"], 1).of("t", str(n)).name for n in range(4000)]

    for name, share in (("a", 0.9), ("b", 0.08), ("c", 0.02)):
        assert abs(names.count(name) / 4000 - share) < 0.03
        assert names.count(name)
    assert names != others


@in_turn(
    "given_splits",
    [
        ["tasks"],
        ["train"],
        ["train=0.5"],
        ["train=0.5,test=0.6"],
        ["train=0.5,train=0.5"],
        ["train=2,test=-1"],
        ["train=nan,test=1"],
        ["train=x"],
        ["tr-ain=1"],
        ["all=1"],
        ["a/b=1"],
        [""],
        ["a=1", "b=1"],
        ["task", "task"],
    ],
)
def test_an_invalid_split_is_refused(given_splits: list[str]) -> None:
    """One line that names the option."""
    with pytest.raises(ConfigError, match="--split"):
        Splits(given_splits, 0)


@given(tasks=st.lists(st.text(max_size=20), max_size=30))
def test_tasks_have_distinct_names(tasks: list[str]) -> None:
    """Valid as folder, configuration and split, also on file systems that ignore case."""
    name = TaskNames()
    names = {task: name(task) for task in tasks}

    assert len(names) == len({one.casefold() for one in names.values()})
    assert all(re.fullmatch(r"[A-Za-z0-9_]+", one) for one in names.values())
    assert names == {task: name(task) for task in tasks}


def test_valid_names_are_kept() -> None:
    """Only invalid characters are changed."""
    name = TaskNames()

    assert ["qasper", "2wikimqa", "a_b"] == [name("qasper"), name("2wikimqa"), name("a b")]
    assert name("default").startswith("default_")


def test_too_many_tasks_are_refused() -> None:
    """Each task keeps a file open."""
    name = TaskNames()
    for number in range(MAX_TASKS):
        name(f"task-{number}")

    with pytest.raises(ConfigError, match=str(MAX_TASKS)):
        name("one more")
