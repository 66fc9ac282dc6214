"""`follow` on a run directory."""

import asyncio
import gc
import shutil
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import structlog

from streamsyn.errors import ConfigError, RunReplaced
from streamsyn.following.follow import Follower, follow
from streamsyn.sink.log import RunLog
from streamsyn.sink.rundir import RunDirectory
from tests.builders import COMPRESSIONS, context, opened, outcome, rows, sample, sink


def begin(root: Path, count: int, *, finish: bool = False, **given: Any) -> None:
    """Start a run, or resume it, and have it write samples."""
    directory = RunDirectory(root)
    directory.save({}, {})
    directory.close()
    with opened(root, sink(**given)) as log:
        add(log, count)
        if finish:
            log.finish()


def add(log: RunLog, count: int) -> None:
    """Have a run write samples."""
    log.samples.append([sample(at) for at in range(log.samples.rows, log.samples.rows + count)])


def read_sync(follower: Follower) -> list[int]:
    return [row["seq"] for row in follower]


def read_async(follower: Follower) -> list[int]:
    async def read() -> list[int]:
        return [row["seq"] async for row in follower]

    return asyncio.run(read())


BOTH = pytest.mark.parametrize("read", [read_sync, read_async])


@pytest.mark.parametrize("compression", COMPRESSIONS)
@BOTH
def test_a_live_run_is_followed_to_its_end(
    read: Callable[[Follower], list[int]], compression: str, tmp_path: Path
) -> None:
    """Every row once, in order, while it is written; a later one begins behind `after`."""
    begin(tmp_path, 0, compression=compression)

    def write() -> None:
        with opened(tmp_path, sink(compression=compression)) as log:
            for _ in range(40):
                add(log, 5)
            log.finish()

    writer = threading.Thread(target=write)
    writer.start()
    follower = follow(tmp_path)
    seqs = read(follower)
    writer.join()

    assert list(range(200)) == seqs
    assert 199 == follower.seq
    assert list(range(151, 200)) == read(follow(str(tmp_path), after=150))
    assert [] == read(follow(tmp_path, after=199))


@pytest.mark.parametrize("kind", ["contexts", "rejects"])
def test_other_kinds_are_followed_too(kind: Any, tmp_path: Path) -> None:
    """As they stand in the log."""
    with opened(tmp_path, sink()) as log:
        log.append([outcome(number) for number in range(40)])
        log.seal_outcomes()
        log.finish()

    assert rows(tmp_path, kind) == list(follow(tmp_path, kind=kind))


def test_a_run_that_was_taken_up_again_goes_on(tmp_path: Path) -> None:
    """Behind `final`: rows that are there before the end was seen follow; `after` continues later ones."""
    begin(tmp_path, 3, finish=True)
    first = follow(tmp_path)
    assert [0, 1, 2] == [row["seq"] for row in islice(first, 3)]
    with opened(tmp_path, sink(shard_bytes=10**6)) as log:
        log.append([context(0)])  # a retry's, say; its sample comes later
        reading = threading.Thread(target=lambda: seen.extend(read_sync(first)))
        seen: list[int] = []
        reading.start()
        add(log, 2)
        log.seal_outcomes()
        log.finish()
        reading.join()

    assert [3, 4] == seen
    assert [] == list(first)
    begin(tmp_path, 1, finish=True)
    assert [5] == read_sync(follow(tmp_path, after=first.seq))


@BOTH
def test_a_run_in_the_place_of_another_is_followed_from_its_first_row(
    read: Callable[[Follower], list[int]], tmp_path: Path
) -> None:
    """It is logged, and `run` tells it from the first one."""
    root = tmp_path / "run"
    begin(root, 5)
    follower = follow(root)
    assert 0 == next(follower)["seq"]
    run = follower.run
    assert [1, 2, 3, 4] == [row["seq"] for row in islice(follower, 4)]
    shutil.rmtree(root)
    begin(root, 3, finish=True)
    with structlog.testing.capture_logs() as logged:
        seqs = read(follower)

    assert [0, 1, 2] == seqs
    assert run != follower.run
    assert ["follow.replaced"] == [line["event"] for line in logged]


def test_a_run_in_the_place_of_another_can_be_an_error(tmp_path: Path) -> None:
    """Also when the first one was read by an earlier process."""
    root = tmp_path / "run"
    begin(root, 5)
    follower = follow(root, on_replaced="raise")
    assert 0 == next(follower)["seq"]
    seen = follower.run
    shutil.rmtree(root)
    begin(root, 9, finish=True)

    with pytest.raises(RunReplaced, match=f"{root} now holds a different run"):
        list(follower)
    with pytest.raises(RunReplaced):
        list(follow(root, after=0, run=seen, on_replaced="raise"))
    assert list(range(9)) == read_sync(follow(root, after=0, run=seen))
    assert list(range(1, 9)) == read_sync(follow(root, after=0, run=follow(root).run or None))


def test_a_directory_that_does_not_exist_is_waited_for_if_asked(tmp_path: Path) -> None:
    """Otherwise it is a mistake, as is one that holds something else."""
    root = tmp_path / "run"
    (tmp_path / "file").touch()
    waiting = follow(root, wait=True)

    with pytest.raises(ConfigError, match="does not exist; use `wait`"):
        next(follow(root))
    with pytest.raises(ConfigError, match="does not hold a run"):
        next(follow(tmp_path))
    with pytest.raises(ConfigError, match="not a run directory but a file"):
        next(follow(tmp_path / "file", wait=True))
    writer = threading.Thread(target=begin, args=[root, 3], kwargs={"finish": True})
    writer.start()
    assert [0, 1, 2] == read_sync(waiting)
    writer.join()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"after": -2}, "after=-2: expected the seq"),
        ({"after": "2"}, "after='2': expected the seq"),
        ({"kind": "sample"}, "kind='sample': expected contexts, rejects, samples"),
        ({"on_replaced": "wait"}, "expected 'follow' or 'raise'"),
    ],
)
def test_wrong_arguments_are_refused(given: dict[str, Any], why: str, tmp_path: Path) -> None:
    """At once, with what was expected."""
    with pytest.raises(ConfigError, match=why):
        follow(tmp_path, wait=True, **given)


def test_a_position_behind_the_end_is_refused(tmp_path: Path) -> None:
    """It can only belong to a different run."""
    begin(tmp_path, 3, finish=True)

    with pytest.raises(ConfigError, match="has ended with 3 rows, but `after` is 7"):
        list(follow(tmp_path, after=7))


@pytest.fixture
def open_files() -> Iterator[None]:
    """Fails if the test leaves open files."""
    gc.collect()
    before = sorted(Path("/proc/self/fd").iterdir())
    yield
    gc.collect()
    assert before == sorted(Path("/proc/self/fd").iterdir())


def test_breaking_out_leaves_nothing_open(open_files: None, tmp_path: Path) -> None:
    """However it is left: at once, by `with`, or half read."""
    begin(tmp_path, 5)
    for row in follow(tmp_path):
        if row["seq"] == 3:
            break
    with follow(tmp_path) as follower:
        next(follower)
    follow(tmp_path).close()

    assert [] == list(follower)


async def test_a_wait_that_was_cancelled_loses_no_row(tmp_path: Path) -> None:
    """The next call goes on where the last row was."""
    await asyncio.to_thread(begin, tmp_path, 2)
    async with follow(tmp_path) as follower:
        seqs = [(await anext(follower))["seq"] for _ in range(2)]
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await anext(follower)
        await asyncio.to_thread(begin, tmp_path, 3, finish=True)
        seqs += [row["seq"] async for row in follower]

    assert list(range(5)) == seqs
