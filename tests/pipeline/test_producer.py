"""The producer: what has no outcome yet is put on the work queue, once, and all of it is counted."""

import asyncio
import gzip
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest

from streamsyn.config.loading import Config, load
from streamsyn.errors import ConfigError
from streamsyn.pipeline.producer import Producer
from streamsyn.queues import BoundedQueue
from streamsyn.records import Draft, Entry, Reject, RejectReason, Seed, Work, draft_key
from streamsyn.seeds.reader import SeedReader
from streamsyn.sink.completed_keys import Claims
from streamsyn.sink.log import RunLog
from streamsyn.sink.rundir import RunDirectory
from streamsyn.telemetry import Counters


def lines(*names: str) -> bytes:
    """A seed a line; their ids are `names`."""
    return b"".join(
        orjson.dumps({"id": name, "instruction": f"i {name}", "answer": f"a {name}"}) + b"\n"
        for name in names
    )


def outcome(seed_id: str, number: int = 0) -> Reject:
    """An outcome of an earlier run."""
    key = draft_key(seed_id, number)
    return Reject(key=key, reason=RejectReason.EMPTY, detail="", origin="", seed_id=seed_id, draft=number)


@dataclass
class Produced:
    """What a producer did."""

    names: list[str]
    counters: Counters
    error: ConfigError | None


Produce = Callable[..., Produced]


@pytest.fixture
def produce(tmp_path: Path) -> Produce:
    """Runs a producer over files with these contents, in a directory that holds the outcomes `before`."""

    def run(
        *contents: bytes,
        suffix: str = ".jsonl",
        before: Sequence[Reject] = (),
        group_of: Callable[[Seed], str] = lambda _: "",
        **keys: Any,
    ) -> Produced:
        paths = [tmp_path / f"seeds-{number}{suffix}" for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        settings = [(key.replace("__", "."), value) for key, value in keys.items()]
        config = load(None, [("seeds.sources", [{"path": str(path)} for path in paths]), *settings])
        with closing(RunDirectory(tmp_path / "out")), closing(RunLog(tmp_path / "out", config.sink)) as log:
            log.append(before)
            log.seal_outcomes()
            with closing(log.claims()) as claims:
                reader, counters = SeedReader(config.seeds, 0, tmp_path / "spool"), Counters()
                producer = Producer(reader, claims, config, counters, group_of)
                return asyncio.run(drained(producer, counters))

    return run


async def drained(producer: Producer, counters: Counters) -> Produced:
    """Run `producer` beside a reader of its queue, which holds two items."""
    work = BoundedQueue[Work](2)
    error: ConfigError | None = None

    async def taken() -> list[str]:
        return [item.id if isinstance(item, Draft) else Path(item.origin).name async for item in work]

    async with asyncio.timeout(50), asyncio.TaskGroup() as group:
        taking = group.create_task(taken())
        try:
            await producer.run(work)
        except ConfigError as raised:
            error = raised
        work.close()
    return Produced(taking.result(), counters, error)


def test_all_seeds_in_order(produce: Produce) -> None:
    """Sources one after the other; each seed once, and the end is recorded."""
    done = produce(lines("a", "b"), lines("c"))
    assert ["a", "b", "c"] == done.names
    assert (3, 3, 0, 0, True) == figures(done)


def figures(done: Produced) -> tuple[int, int, int, int, bool]:
    """Lines read, drafts they come to, those finished before, repeated ids, and whether reading ended."""
    counted = done.counters
    return (
        counted.seeds_read,
        counted.drafts_read,
        counted.finished_before,
        counted.repeated,
        counted.reading_done,
    )


def test_what_is_finished_is_skipped(produce: Produce) -> None:
    """And counted, so that a resume shows how far the run was."""
    done = produce(lines("a", "b", "c"), before=[outcome("a"), outcome("c")])
    assert ["b"] == done.names
    assert (3, 3, 2, 0, True) == figures(done)


def test_a_repeated_id_is_skipped(produce: Produce) -> None:
    """Within a source and across sources; a finished one counts as finished each time."""
    done = produce(lines("a", "b", "a"), lines("b", "c", "c"), before=[outcome("b")])
    assert ["a", "c"] == done.names
    assert (6, 4, 2, 2, True) == figures(done)


def test_drafts_of_a_seed(produce: Produce) -> None:
    """Each of `recipe.contexts_per_seed` is a unit with an id of its own."""
    done = produce(lines("a", "b"), recipe__contexts_per_seed=3)
    assert ["a", "a#1", "a#2", "b", "b#1", "b#2"] == done.names
    assert (2, 6, 0, 0, True) == figures(done)


def test_a_seed_that_is_finished_in_part(produce: Produce) -> None:
    """Only its unfinished drafts are put on the queue."""
    done = produce(
        lines("a", "b", "c"),
        recipe__contexts_per_seed=3,
        before=[outcome("a", 1), outcome("b", 0), outcome("b", 2), *(outcome("c", n) for n in range(3))],
    )
    assert ["a", "a#2", "b#1"] == done.names
    assert (3, 9, 6, 0, True) == figures(done)


def test_bad_lines_flow_through(produce: Produce) -> None:
    """Each is one item of work, however many drafts a seed has; blank lines are skipped."""
    done = produce(b"no json\n\n" + lines("a") + b'{"instruction": 1}\n', recipe__contexts_per_seed=2)
    assert ["seeds-0.jsonl:1", "a", "a#1", "seeds-0.jsonl:4"] == done.names
    assert (3, 4, 0, 0, True) == figures(done)


def test_a_limit_counts_seeds(produce: Produce) -> None:
    """Bad lines and repeated ids do not count; nothing after the limit is taken."""
    done = produce(b"bad\n" + lines("a", "a", "b", "c", "d"), seeds__limit=2)
    assert ["seeds-0.jsonl:1", "a", "b"] == done.names
    assert (4, 3, 0, 1, True) == figures(done)


def test_a_limit_counts_finished_seeds_too(produce: Produce) -> None:
    """The first N are the same N when the run is resumed."""
    assert ["b"] == produce(lines("a", "b", "c"), seeds__limit=2, before=[outcome("a")]).names


def test_a_source_that_breaks_half_way(produce: Produce) -> None:
    """What was read is on the queue, the message names the file, and the end is not recorded."""
    names = [f"s{number}" for number in range(12_000)]
    whole = gzip.compress(lines(*names), compresslevel=1)
    done = produce(whole[: len(whole) // 2], suffix=".jsonl.gz")
    assert done.names == names[: len(done.names)]
    assert len(names) // 4 < len(done.names) < len(names)
    assert "seeds-0.jsonl.gz cannot be read to its end" in str(done.error)
    assert (len(done.names), False) == (done.counters.seeds_read, done.counters.reading_done)


def grouped(seed: Seed) -> str:
    """Seeds of a group have the first letter of their names in common."""
    return seed.id[0] if seed.id[0] in "xy" else ""


def test_groups_of_seeds_follow_each_other(produce: Produce) -> None:
    """Within `seeds.group_window`; bad lines and the others keep their places."""
    content = lines("x1", "a", "y1") + b"bad\n" + lines("x2", "y2", "b", "x3")
    done = produce(content, group_of=grouped)
    assert ["x1", "x2", "x3", "a", "y1", "y2", "seeds-0.jsonl:4", "b"] == done.names
    assert (8, 8, 0, 0, True) == figures(done)
    unmoved = produce(content, group_of=grouped, seeds__group_window=0)
    assert ["x1", "a", "y1", "seeds-0.jsonl:4", "x2", "y2", "b", "x3"] == unmoved.names


def test_hard_tasks_come_first(produce: Produce, tmp_path: Path) -> None:
    """By the file of losses, groups in one piece, each once; without the file, in the order of reading."""
    content = b"".join(
        orjson.dumps({"id": f"{group}{n}", "instruction": "i", "answer": "a", "task": task}) + b"\n"
        for n in range(40)
        for group, task in (("a", "easy"), ("x", "hard" if n % 2 else "easy"), ("h", "hard"))
    )
    path = tmp_path / "task_losses.json"
    before = produce(content, seeds__task_losses=str(path))
    path.write_bytes(orjson.dumps({"tasks": {"easy": {"loss": 0.01}, "hard": {"loss": 5.0}}}))
    done = produce(content, group_of=grouped, seeds__task_losses=str(path), seeds__limit=90)

    assert [f"{group}{n}" for n in range(40) for group in "axh"] == before.names
    assert sorted(before.names[:90]) == sorted(done.names)
    places = [place for place, name in enumerate(done.names) if name[0] == "x"]
    assert list(range(places[0], places[0] + 30)) == places
    hard, easy = ([place for place, name in enumerate(done.names) if name[0] == letter] for letter in "ha")
    assert sum(hard) / len(hard) + 15 < sum(easy) / len(easy)
    assert (90, 90, 0, 0, True) == figures(done)


async def test_groups_are_found_across_batches(tmp_path: Path) -> None:
    """While the queue is full the producer reads ahead, one batch for each item taken."""
    names: list[str] = []

    class Ahead(SeedReader):
        """Batches with one seed each of the same group; says how many were asked for."""

        asked = 0

        def batches(self, *_: object) -> Iterator[list[Entry]]:
            for batch in range(20):
                yield [Seed(f"{'a' if n else 'x'}{batch}-{n}", "qa", "i", "a", "f") for n in range(10)]
                self.asked += 1

    config = load(None, [])
    reader = Ahead(config.seeds, 0, None)
    claims = await asyncio.to_thread(Claims, None, tmp_path / "read.sqlite")
    producer, work = Producer(reader, claims, config, Counters(), grouped), BoundedQueue[Work](1)
    async with asyncio.timeout(50), asyncio.TaskGroup() as group:
        producing = group.create_task(producer.run(work))
        producing.add_done_callback(lambda _: work.close())
        async for item in work:
            assert isinstance(item, Draft)
            names.append(item.id)
            for _ in range(50):  # a slow worker: meanwhile the next batch is read
                if reader.asked >= min(20, len(names)):
                    break
                await asyncio.to_thread(int)  # a turn of the loop alone gives the reader's thread no time
    await asyncio.to_thread(claims.close)
    assert 200 == len(set(names)) == len(names)
    assert 3 < sum(before[0] == after[0] == "x" for before, after in pairwise(names))


def test_a_source_that_breaks_gives_what_is_held_first(produce: Produce) -> None:
    """What was read ahead before the error is on the queue too."""
    names = [f"{'x' if number % 2 else 'a'}{number}" for number in range(60_000)]
    whole = gzip.compress(lines(*names), compresslevel=1)
    done = produce(whole[: len(whole) // 2], suffix=".jsonl.gz", group_of=grouped)
    assert "cannot be read to its end" in str(done.error)
    assert (len(done.names), False) == (done.counters.seeds_read, done.counters.reading_done)
    assert sorted(names[: len(done.names)]) == sorted(done.names)


async def test_what_comes_in_is_not_held_back(tmp_path: Path) -> None:
    """Seeds from a pipe go to work as they come, groups or not: nothing waits for the window to fill."""
    taken: list[str] = []

    class Pipe(SeedReader):
        """Gives the next seed once the one before has been taken."""

        def batches(self, *_: object) -> Iterator[list[Entry]]:
            for number in range(5):
                yield [Seed(f"x{number}", "qa", "i", "a", "pipe")]
                assert gone.wait(5), "the seed was held back"
                gone.clear()

    gone, config = threading.Event(), load(None, [])
    reader = Pipe(config.seeds, 0, None)
    claims = await asyncio.to_thread(Claims, None, tmp_path / "read.sqlite")
    producer, work = Producer(reader, claims, config, Counters(), grouped), BoundedQueue[Work](100)
    async with asyncio.timeout(50), asyncio.TaskGroup() as group:
        producing = group.create_task(producer.run(work))
        producing.add_done_callback(lambda _: work.close())
        async for item in work:
            assert isinstance(item, Draft)
            taken.append(item.id)
            gone.set()
    await asyncio.to_thread(claims.close)
    assert [f"x{number}" for number in range(5)] == taken


def test_a_slow_reader_holds_the_producer(tmp_path: Path) -> None:
    """With nobody taking from the queue, no more than a batch or two are read of ten thousand seeds."""
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(lines(*(f"{number:0>100}" for number in range(10_000))))
    config = load(None, [("seeds.sources", [{"path": str(path)}])])
    counters, work = Counters(), BoundedQueue[Work](4)

    async def run(producer: Producer) -> None:
        async with asyncio.timeout(50), asyncio.TaskGroup() as group:
            producing = group.create_task(producer.run(work))
            while len(work) < 4:  # noqa: ASYNC110 - what is waited for sets no event
                await asyncio.sleep(0)
            for _ in range(100):
                await asyncio.sleep(0)
            producing.cancel()

    with closing(RunDirectory(tmp_path / "out")), closing(RunLog(tmp_path / "out", Config().sink)) as log:
        claims = log.claims()
        asyncio.run(run(Producer(SeedReader(config.seeds, 0, None), claims, config, counters)))
        claims.close()
    assert 4 <= counters.seeds_read < 3_000
    assert not counters.reading_done


def in_partitions(produce: Produce, *contents: bytes, **given: Any) -> list[Produced]:
    """What the producers of three partitions do with the same files."""
    return [produce(*contents, seeds__partition=f"{at}/3", **given) for at in range(3)]


def test_each_seed_belongs_to_one_partition(produce: Produce) -> None:
    """Bad lines, too. The others are counted apart, and repeated ids by the partition they belong to."""
    names = [f"s{number}" for number in range(60)]
    content = lines(*names, "s1", "s2") + b"no seed\n"
    done = in_partitions(produce, content)

    assert sorted([*names, "seeds-0.jsonl:63"]) == sorted(name for one in done for name in one.names)
    assert all(len(one.names) > 9 for one in done)
    assert [61] * 3 == [len(one.names) + one.counters.other_partitions for one in done]
    assert 2 == sum(one.counters.repeated for one in done)


def test_a_prefix_group_is_not_split(produce: Produce) -> None:
    """Nor is a repeated id written twice where its second group belongs to a different partition."""
    shared = {f"s{number}": f"document {number % 5}" for number in range(40)}
    groups: Iterator[str] = iter(())

    def group_of(seed: Seed) -> str:
        return next(groups, "") if seed.id == "twice" else shared[seed.id]

    done = in_partitions(produce, lines(*shared), group_of=group_of)
    found = [{shared[name] for name in one.names} for one in done]
    assert 5 == sum(map(len, found))
    assert 40 == sum(len(one.names) for one in done)

    twice = lines("twice", "twice")
    for at in range(3):
        groups = iter(["document 0", "document 1"])
        done[at] = produce(twice, group_of=group_of, seeds__partition=f"{at}/3")
    assert ["twice"] == [name for one in done for name in one.names]


def test_the_limit_counts_the_seeds_of_all_partitions(produce: Produce) -> None:
    """They read the same seeds, those that one partition would."""
    names = [f"s{number}" for number in range(30)]
    done = in_partitions(produce, lines(*names), seeds__limit=10)

    assert sorted(names[:10]) == sorted(name for one in done for name in one.names)


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "1/"])
def test_a_partition_is_checked(text: str) -> None:
    """Before anything is read."""
    with pytest.raises(ConfigError, match=r"seeds\.partition"):
        load(None, [("seeds.partition", text)])
