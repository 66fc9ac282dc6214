"""Which partition a seed belongs to, and the order of the rows of several partitions as one."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import ConfigError, SinkError, TakenOver
from streamsyn.sink.partitions import (
    begin_partitions,
    claimed_partitions,
    in_turn,
    partition_of,
    place_of,
    read_partitions,
    run_directories,
)
from tests.builders import context, new_run, opened, sink
from tests.examples import examples


def test_a_key_belongs_to_the_same_partition_for_good() -> None:
    """The numbers are those of a run that has begun: another hash would write its seeds twice."""
    assert [0, 2, 2, 0, 1] == [partition_of(key, 3) for key in ("", "a", "b", "c", "\udc80")]
    shares = [partition_of(f"seed-{number}", 4) for number in range(4000)]
    assert all(900 < shares.count(at) < 1100 for at in range(4))


@examples(200)
@given(
    grown=st.integers(1, 4).flatmap(
        lambda number: st.lists(
            st.lists(st.integers(0, 5), min_size=number, max_size=number), min_size=1, max_size=3
        )
    )
)
def test_the_order_of_rows_is_found_from_their_numbers(grown: list[list[int]]) -> None:
    """`place_of` inverts `in_turn`; the rows of a round that has ended keep their numbers ever after."""
    ends = [[sum(column) for column in zip(*grown[: at + 1], strict=True)] for at in range(len(grown))]
    totals = ends.pop()
    order = list(in_turn([range(total) for total in totals], ends))

    assert sum(totals) == len(order)
    places = [place_of(row, ends, totals) for row in range(len(order) + 1)]
    assert [*order, None] == places
    if ends:
        before = [place_of(row, ends[:-1], ends[-1]) for row in range(sum(ends[-1]))]
        assert before == places[: len(before)]


@examples(100)
@given(totals=st.lists(st.integers(0, 5), min_size=1, max_size=4), live=st.sets(st.integers(0, 3)))
def test_rows_have_their_numbers_before_the_others_have_ended(totals: list[int], live: set[int]) -> None:
    """A partition that may get more rows is waited for: no number is given that a later row would get."""
    known = [None if at in live else total for at, total in enumerate(totals)]
    final = [place_of(row, (), totals) for row in range(sum(totals))]
    for row, there in enumerate(final):
        place = place_of(row, (), known)
        if place is not None and place[1] >= totals[place[0]]:
            return  # it is waited for
        assert there == place


def test_the_first_run_fixes_the_number_of_partitions(tmp_path: Path) -> None:
    """A different number is refused, and so is a directory that holds something else."""
    out = tmp_path / "out"
    made = begin_partitions(out, 3)
    plain = new_run(tmp_path / "plain")
    (plain / "run.json").touch()

    assert made == begin_partitions(out, 3) == read_partitions(out)
    assert [out / f"partition-00{at}" for at in range(3)] == run_directories(out)
    with pytest.raises(
        ConfigError, match="has 3 partitions, which its first run has fixed; pass --partitions 3"
    ):
        begin_partitions(out, 4)
    with pytest.raises(ConfigError, match="holds a run without partitions"):
        begin_partitions(plain, 2)
    (tmp_path / "disk").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "partition-001").symlink_to(tmp_path / "disk")  # before the first run
    assert 2 == begin_partitions(tmp_path / "linked", 2).number
    (tmp_path / "thesis").touch()
    with pytest.raises(ConfigError, match=r"cannot make the run directory .*: Not a directory"):
        begin_partitions(tmp_path / "thesis" / "out", 2)
    with pytest.raises(ConfigError, match="is not empty"):
        begin_partitions(tmp_path, 2)
    assert [tmp_path] == run_directories(tmp_path)


def test_of_two_processes_the_newer_one_writes_the_file(tmp_path: Path) -> None:
    """The older one has found that a partition has ended: too late, and it starts no coordinator either."""
    with (
        claimed_partitions(tmp_path, 2, takes_over=False) as older,
        claimed_partitions(tmp_path, 2, takes_over=True) as newer,
    ):
        for directory in newer.directories:
            with opened(directory, sink()) as log:
                log.append([context(0)])
                log.seal_outcomes()
                log.finish()
        written = newer.with_ended(0)
        with pytest.raises(TakenOver):
            older.with_ended(1)
        with pytest.raises(TakenOver):
            older.check()
        assert written == read_partitions(tmp_path)
        assert written.with_ended(1) == read_partitions(tmp_path)
    with (
        pytest.raises(ConfigError, match="has 2 partitions"),
        claimed_partitions(tmp_path, 3, takes_over=True),
    ):
        pass


def test_rounds_are_recorded(tmp_path: Path) -> None:
    """The rows of each partition as it ends; and of all, when they are taken up again."""
    partitions = begin_partitions(tmp_path, 2)
    with opened(new_run(tmp_path / "partition-000"), sink()) as log:
        log.append([context(1)])
        with pytest.raises(SinkError, match="has no final line"):
            partitions.with_ended(0)
        log.seal_outcomes()
        log.finish()
    with opened(new_run(tmp_path / "partition-001"), sink()) as log:
        log.finish()
    partitions = partitions.with_ended(0)

    assert not partitions.has_ended
    assert [1, None] == partitions.totals("contexts")
    partitions = partitions.with_ended(1)
    assert partitions.has_ended
    partitions = partitions.with_next_round(ended=[1])
    assert read_partitions(tmp_path) == partitions
    assert [[1, 0]] == partitions.ends("contexts")
    assert [None, 0] == partitions.totals("contexts")


NONE = {"contexts": 0, "rejects": 0, "samples": 0}
EMPTY = {"contexts": [0], "rejects": [0], "samples": [0]}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "hash": "blake2b-64"}'])
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    """By its name."""
    (tmp_path / "partitions.json").write_text(text)

    with pytest.raises(ConfigError, match=r"partitions\.json"):
        run_directories(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"partitions": 0},
        {"partitions": "all"},
        {"created_at": None},
        {"rounds": [{"contexts": [0, 0]}]},
        {"rounds": [EMPTY]},
        {"rounds": [0]},
        {"ended": {"2": NONE}},
        {"ended": {"1": {"contexts": 1}}},
        {"ended": []},
    ],
)
def test_a_file_that_does_not_fit_is_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    """What its readers rely on is checked once, where it is read."""
    begin_partitions(tmp_path, 2)
    path = tmp_path / "partitions.json"
    path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | damage))

    with pytest.raises(ConfigError, match=r"partitions\.json cannot be read"):
        run_directories(tmp_path)
