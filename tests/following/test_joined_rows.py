"""`follow` and the trainer's source on a run with partitions: one order, whatever ends when."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from streamsyn.errors import RunReplaced
from streamsyn.following.follow import follow
from streamsyn.following.joined_rows import JoinedRows
from streamsyn.sink.partitions import begin_partitions
from streamsyn.sink.rundir import RunDirectory
from streamsyn.trainer.sources.run_samples import RunSamples
from tests.builders import context, opened, sample, sink


def write(root: Path, at: int, count: int, *, finish: bool = False) -> None:
    """Have partition `at` write samples, each of one context."""
    part = root / f"partition-{at:03d}"
    directory = RunDirectory(part)
    directory.save({}, {})
    directory.close()
    with opened(part, sink()) as log:
        first = log.samples.rows
        for number in range(first, first + count):
            name = f"seed-{at}-{number}"
            log.append([context(number, seed_id=name, context=f"text of {name}")])
            log.samples.append([sample(number, seed_id=name, context_seqs=[number], relevant_index=0)])
        if finish:
            log.seal_outcomes()
            log.finish()


def names(rows: Any) -> list[str]:
    """Partition and number there of each row; its number is its place."""
    found = list(rows)
    assert [row["seq"] for row in found] == list(range(found[0]["seq"], found[0]["seq"] + len(found)))
    assert all(row["seed_id"] == f"seed-{row['partition']}-{row['partition_seq']}" for row in found)
    return [f"{row['partition']}:{row['partition_seq']}" for row in found]


def test_partitions_are_followed_as_one_while_they_are_written(tmp_path: Path) -> None:
    """In turn, waiting for those that are behind; numbers hold when the run is taken up again."""
    partitions = begin_partitions(tmp_path, 3)
    write(tmp_path, 0, 3)
    write(tmp_path, 2, 1)
    rows = JoinedRows(tmp_path)
    assert ["0:0"] == names(rows.rows(0, 9))

    write(tmp_path, 1, 1, finish=True)
    assert ["0:0", "1:0", "2:0", "0:1"] == names(rows.rows(0, 9))
    partitions = partitions.with_ended(1)
    assert ["2:0", "0:1"] == names(rows.rows(2, 9))
    assert rows.total() is None
    write(tmp_path, 2, 1, finish=True)
    write(tmp_path, 0, 0, finish=True)
    partitions = partitions.with_ended(2).with_ended(0)
    whole = ["0:0", "1:0", "2:0", "0:1", "2:1", "0:2"]
    assert whole == names(follow(tmp_path))
    assert ["2:1", "0:2"] == names(follow(tmp_path, after=3))

    partitions.with_next_round(ended=[0])
    write(tmp_path, 1, 2)
    assert [*whole, "1:1"] == names(rows.rows(0, 7))
    assert [] == rows.rows(7, 9), "the third partition may get more"


def test_a_follower_waits_for_partitions_that_are_to_come(tmp_path: Path) -> None:
    """For the directory, for each partition, and until all have ended."""
    out = tmp_path / "out"

    def run() -> None:
        partitions = begin_partitions(out, 2)
        for at in range(2):
            write(out, at, 70 + at, finish=True)
            partitions = partitions.with_ended(at)

    writer = threading.Thread(target=run)
    follower = follow(out, wait=True)
    writer.start()

    async def read() -> list[Any]:
        return [row async for row in follower]

    found = asyncio.run(read())
    writer.join()
    assert 141 == len(names(found))
    assert begin_partitions(out, 2).created_at == follower.run


def test_different_partitions_in_the_same_place_are_noticed(tmp_path: Path) -> None:
    """As a different run is."""
    begin_partitions(tmp_path, 2)
    write(tmp_path, 0, 1)
    rows = JoinedRows(tmp_path)
    rows.rows(0, 1)
    (tmp_path / "partitions.json").unlink()
    for part in ("partition-000", "partition-001"):
        (tmp_path / part).rename(tmp_path / f".{part}") if (tmp_path / part).exists() else None
    begin_partitions(tmp_path, 2)

    with pytest.raises(RunReplaced):
        rows.rows(1, 1)


def test_a_training_reads_partitions_as_one(tmp_path: Path) -> None:
    """By their numbers in the order of all; contexts are those of the sample's partition."""
    partitions = begin_partitions(tmp_path, 2)
    for at in range(2):
        write(tmp_path, at, 3 + at, finish=True)
        partitions = partitions.with_ended(at)
    source = RunSamples(tmp_path)

    rows: list[Any] = source.fetch(0, 100)
    assert ["0:0", "1:0", "0:1", "1:1", "0:2", "1:2", "1:3"] == names(rows)
    assert 7 == source.total()
    picked: list[Any] = list(source.pick([3, 6]))
    assert ["1:1", "1:3"] == [f"{row['partition']}:{row['partition_seq']}" for row in picked]
    last = rows[-1]
    assert last is not None
    assert ["text of seed-1-3"] == source.contexts(last, last["context_seqs"])
    source.close()
