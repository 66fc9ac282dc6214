from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.trainer.examples import Example, PackedRow
from streamsyn.trainer.stream.packing import Packer, balanced, cost
from tests.trainer.streams import example

lengths = st.lists(st.integers(1, 100), max_size=60)


def packed(packer: Packer, examples: Sequence[Example]) -> list[list[PackedRow]]:
    """The steps that examples fill; the last one is the rest."""
    steps = [full for one in examples if (full := packer.add(one))]
    return [*steps, packer.flush()]


def numbers(steps: Sequence[Sequence[PackedRow]]) -> list[list[list[int]]]:
    """Which examples are in which row."""
    return [[[one.key.seq for one in row] for row in rows] for rows in steps]


@given(lengths=lengths, rows=st.integers(1, 5))
def test_rows_hold_whole_examples_and_no_more_than_their_length(lengths: list[int], rows: int) -> None:
    """No row is too long, none is empty in a full step, and each example is whole in one row."""
    steps = packed(Packer(rows, 100), [example(length, at) for at, length in enumerate(lengths)])

    assert all(rows == len(step) for step in steps)
    assert all(sum(one.length for one in row) <= 100 for step in steps for row in step)
    assert all(all(step) for step in steps[:-1])
    assert list(range(len(lengths))) == sorted(n for step in numbers(steps) for row in step for n in row)
    assert lengths == [
        one.length
        for one in sorted((one for step in steps for row in step for one in row), key=lambda one: one.key)
    ]


@given(lengths=lengths, rows=st.integers(1, 5), at=st.integers(0, 60))
def test_a_packer_is_restored(lengths: list[int], rows: int, at: int) -> None:
    """Stopped after any example, a packer with the same layout fills the same rows."""
    examples = [example(length, number) for number, length in enumerate(lengths)]
    stopped, other = Packer(rows, 100), Packer(rows, 100)
    before = [full for one in examples[:at] if (full := stopped.add(one))]
    restored = other.restore([[examples[key.seq] for key in row] for row in stopped.layout()])

    assert restored
    assert numbers(packed(Packer(rows, 100), examples)) == numbers([*before, *packed(other, examples[at:])])


@pytest.mark.parametrize(("rows", "seq_len"), [(3, 100), (2, 50)])
def test_a_different_shape_is_not_restored(rows: int, seq_len: int) -> None:
    """A layout with a different number of rows, or longer rows, is refused and changes nothing."""
    packer = Packer(rows, seq_len)

    assert not packer.restore([[example(60)], []])
    assert 0 == packer.tokens


def test_an_example_goes_where_it_fits_best() -> None:
    """The row with the least room left gets it; between equals, the one with less attention."""
    best = Packer(2, 100)
    alike = Packer(2, 100)
    for length in (60, 70, 25):  # 25 fits behind either; behind 70 it leaves less
        best.add(example(length, length))
    for length in (60, 60):
        alike.add(example(length, length))
    assert alike.restore([[example(60, 0)], [example(30, 1), example(30, 2)]])
    alike.add(example(40, 3))

    assert [[[60], [70, 25]]] == numbers([best.flush()])
    assert [[[0], [1, 2, 3]]] == numbers([alike.flush()])


@given(lengths=st.lists(st.integers(0, 100), min_size=8, max_size=8), ranks=st.sampled_from([1, 2, 4, 8]))
def test_balanced_rows_are_the_same_rows(lengths: list[int], ranks: int) -> None:
    """Nothing is lost; no rank has more than the least loaded one by more than the heaviest row."""
    rows = [(example(length, at),) if length else () for at, length in enumerate(lengths)]
    ordered = balanced(rows, ranks)
    loads = [sum(map(cost, ordered[rank::ranks])) for rank in range(ranks)]

    assert sorted(map(cost, rows)) == sorted(map(cost, ordered))
    assert sorted(one.key for row in rows for one in row) == sorted(one.key for row in ordered for one in row)
    assert max(loads) - min(loads) <= max(map(cost, rows))


def test_ranks_share_heavy_rows() -> None:
    """Two heavy rows and two light ones: each of two ranks gets one of each, at the same time."""
    rows = [(example(length, at),) for at, length in enumerate((90, 88, 10, 12))]

    assert [(90,), (88,), (10,), (12,)] == [tuple(one.length for one in row) for row in balanced(rows, 2)]
