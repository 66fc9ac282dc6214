import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.trainer.examples import PackedRow
from streamsyn.trainer.stream.packing import Packer, balanced, cost, one_a_row
from tests.trainer.streams import example

lengths = st.lists(st.integers(1, 100), max_size=60)


def packer(given_lengths: Sequence[int], rows: int = 2, *, size: int = 8, seed: int = 0) -> Packer:
    """A packer of rows of 100 tokens that holds examples of these lengths."""
    made = Packer(rows, 100, seed, size)
    for number, length in enumerate(given_lengths):
        made.put(example(length, number))
    return made


def rest(of: Packer) -> list[list[PackedRow]]:
    """All steps of what is held; the last one is not full."""
    steps = []
    while (rows := of.take()) is not None:
        steps.append(rows)
    return [*steps, of.flush()]


def numbers(steps: Sequence[Sequence[PackedRow]]) -> list[list[list[int]]]:
    """Which examples are in which row."""
    return [[[one.key.seq for one in row] for row in rows] for rows in steps]


def tokens(row: PackedRow) -> int:
    return sum(one.length for one in row)


@given(lengths=lengths, rows=st.integers(1, 5))
def test_rows_hold_whole_examples_and_no_more_than_their_length(lengths: list[int], rows: int) -> None:
    """No row is too long, none is empty in a full step, and each example is whole in one row."""
    steps = rest(packer(lengths, rows))

    assert all(rows == len(step) for step in steps)
    assert all(tokens(row) <= 100 for step in steps for row in step)
    assert all(all(step) for step in steps[:-1])
    assert list(range(len(lengths))) == sorted(n for step in numbers(steps) for row in step for n in row)
    found = {one.key.seq: one.length for step in steps for row in step for one in row}
    assert dict(enumerate(lengths)) == found


@given(lengths=lengths, rows=st.integers(1, 5), at=st.integers(0, 60))
def test_a_packer_is_restored(lengths: list[int], rows: int, at: int) -> None:
    """Stopped after any step, a packer that holds the same in the same order packs the same steps."""
    examples = [example(length, number) for number, length in enumerate(lengths)]
    stopped, other = (packer(lengths, rows) for _ in range(2))
    for _ in range(at % 5):
        if stopped.take() is None:
            break
    other.restore([examples[key.seq] for key in stopped.layout()], stopped.draws)

    assert stopped.tokens == other.tokens
    assert numbers(rest(stopped)) == numbers(rest(other))


@given(lengths=lengths, rows=st.integers(1, 3), size=st.integers(1, 20))
def test_what_is_full_fills_a_step(lengths: list[int], rows: int, size: int) -> None:
    """A packer that reads until it is full can always pack a step, and holds no more than that takes."""
    made = packer([], rows, size=size)
    for number, length in enumerate(lengths):
        if made.is_full:
            break
        made.put(example(length, number))

    assert len(made) <= max(size, 100 * rows + 1)
    assert made.tokens <= max(size, 1) * 100 + rows * 100
    if made.is_full:
        assert made.take() is not None


def test_the_seed_decides_what_is_taken() -> None:
    """The same seed takes the same, a different one something else; none takes them in their order."""
    taken = [numbers(rest(packer([10] * 64, seed=seed))) for seed in (1, 1, 2)]

    assert taken[0] == taken[1]
    assert taken[0] != taken[2]
    assert list(range(64)) != [n for step in taken[0] for row in step for n in row]


def test_examples_of_one_length_are_taken_evenly() -> None:
    """Whatever their place, all are about as often in the first step."""
    first = [0] * 8
    for seed in range(1000):
        for row in packer([25] * 8, 1, seed=seed).take() or ():
            for one in row:
                first[one.key.seq] += 1

    assert all(400 < count < 600 for count in first)


def test_rows_are_filled_from_all_that_is_held() -> None:
    """Pairs that fill a row exactly find each other, in whatever order they came."""
    mixed = [*range(51, 91), *range(10, 50)]
    random.Random(3).shuffle(mixed)
    steps = rest(packer(mixed, 4))[:-1]

    assert 9 == len(steps)
    assert {100} == {tokens(row) for step in steps for row in step}


def test_rows_of_a_step_cost_about_the_same() -> None:
    """Rows with one long example are in steps of their own, as far as there are enough of them."""
    steps = rest(packer([100] * 8 + [20] * 40, 4))[:-1]
    costs = [[cost(row) for row in step] for step in steps]

    assert [[400 * 5] * 4] * 1 + [[10_000] * 4] * 2 == sorted(costs)


@given(lengths=lengths, ranks=st.sampled_from([1, 2, 4]))
def test_rows_of_one_sample_are_batched_by_length(lengths: list[int], ranks: int) -> None:
    """Each sample has its own row; ranks get equally many, and those of a pass are neighbours in length."""
    rows = [tuple(example(length, at) for at, length in enumerate(lengths)), ()]
    singles = balanced(one_a_row(rows, ranks), ranks)
    passes = [sorted(map(tokens, singles[begin : begin + ranks])) for begin in range(0, len(singles), ranks)]

    assert len(lengths) + -len(lengths) % ranks == len(singles)
    assert sorted(lengths) == sorted(tokens(row) for row in singles if len(row) == 1)
    assert all(before[0] >= after[-1] for before, after in pairwise(passes))


@given(lengths=st.lists(st.integers(0, 100), min_size=8, max_size=8), ranks=st.sampled_from([1, 2, 4, 8]))
def test_balanced_rows_are_the_same_rows(lengths: list[int], ranks: int) -> None:
    """Nothing is lost; each pass has the heaviest rows left, and no rank much more than another."""
    rows = [(example(length, at),) if length else () for at, length in enumerate(lengths)]
    ordered = balanced(rows, ranks)
    loads = [sum(map(cost, ordered[rank::ranks])) for rank in range(ranks)]
    passes = [sorted(map(cost, ordered[begin : begin + ranks])) for begin in range(0, 8, ranks)]

    assert sorted(map(cost, rows)) == sorted(map(cost, ordered))
    assert sorted(one.key for row in rows for one in row) == sorted(one.key for row in ordered for one in row)
    assert max(loads) - min(loads) <= max(map(cost, rows))
    assert all(before[0] >= after[-1] for before, after in pairwise(passes))


@pytest.mark.parametrize(
    ("given_lengths", "expected"),
    [((90, 88, 10, 12), (90, 88, 10, 12)), ((90, 50, 80, 10), (90, 80, 10, 50))],
)
def test_ranks_share_heavy_rows(given_lengths: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Two heavy rows are worked on at the same time; the rank that had less then gets more."""
    rows = [(example(length, at),) for at, length in enumerate(given_lengths)]

    assert expected == tuple(row[0].length for row in balanced(rows, 2))
