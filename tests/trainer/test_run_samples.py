import asyncio
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from streamsyn.errors import ConfigError, SinkError
from streamsyn.sink import shards
from streamsyn.sink.log import RunLog
from streamsyn.sink.rundir import RunDirectory
from streamsyn.sink.shards import OPEN_SUFFIX
from streamsyn.trainer.examples import BadRow, Dropped, Example, Idle, Key, Row, StepPlan
from streamsyn.trainer.sources.run_samples import RunSamples
from streamsyn.trainer.sources.source import Sources
from tests.builders import COMPRESSIONS, new_run, opened, sample, sink
from tests.examples import examples
from tests.trainer.streams import Lengths, keys, planner, plans


def written(first: int, end: int) -> list[Any]:
    """Samples as a run assembles them: the same each time."""
    return [sample(number, task="qa" * (number % 7)) for number in range(first, end)]


def read_all(source: RunSamples, first: int = 0, limit: int = 7) -> list[int]:
    """The numbers of the rows that are there from `first` on."""
    seqs: list[int] = []
    while rows := source.fetch(first + len(seqs), limit):
        assert len(rows) <= limit
        seqs += numbers(rows)
    return seqs


def numbers(rows: Iterable[Row]) -> list[int]:
    """The numbers of rows that `written` has made, by their content."""
    return [int(row["seed_id"].removeprefix("seed-")) for row in rows if not isinstance(row, BadRow)]


def shard_files(root: Path) -> list[Path]:
    """All shards of samples, in order."""
    return sorted((root / "samples").glob("part-*"))


@pytest.fixture(params=COMPRESSIONS)
def compression(request: pytest.FixtureRequest) -> str:
    """The compression of the run's log."""
    return str(request.param)


class Alike(Lengths):
    """Rendering: every row has thirty tokens."""

    def __init__(self) -> None:
        super().__init__(100)

    def render_batch(self, rows: Sequence[tuple[dict[str, Any], Key]]) -> list[Example | Dropped]:
        return super().render_batch([({**value, "length": 30}, key) for value, key in rows])


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 40)),
        st.tuples(st.just("read"), st.integers(1, 50)),
        st.tuples(st.sampled_from(["seal", "finish", "stop"]), st.just(0)),
        st.tuples(st.just("kill"), st.integers(0, 3000)),
    ),
    max_size=25,
)


@examples(60)
@example(steps=[("append", 1), ("read", 1), ("kill", 1), ("append", 2)], compression="zstd")
@given(steps=steps, compression=st.sampled_from(COMPRESSIONS))
def test_each_row_is_read_once_whatever_the_run_does(
    steps: list[tuple[str, int]], compression: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rows come in order, none left out, none twice, through seals, stops, and kills that cost rows."""
    root = new_run(tmp_path_factory.mktemp("run"))
    source = RunSamples(root)
    log = RunLog(root, sink(compression=compression))
    read = 0
    for what, number in [*steps, ("finish", 0)]:
        if what == "append":
            log.samples.append(written(log.samples.rows, log.samples.rows + number))
        elif what == "read":
            rows = source.fetch(read, number)
            assert list(range(read, read + len(rows))) == numbers(rows)
            read += len(rows)
            assert len(rows) == number or read >= log.samples.rows
        elif what == "seal":
            log.samples.seal()
        elif what == "finish":
            # A run that was killed writes again what it had written, before it ends.
            log.samples.append(written(log.samples.rows, max(read, log.samples.rows)))
            log.finish()
        else:
            log.close()
            if what == "kill" and (
                unsealed := [path for path in shard_files(root) if path.suffix == OPEN_SUFFIX]
            ):
                os.truncate(unsealed[0], max(0, unsealed[0].stat().st_size - number))
            log = RunLog(root, sink(compression=compression))
    rest = read_all(source, read)
    total = source.total()
    log.close()
    source.close()

    assert list(range(read, log.samples.rows)) == rest
    assert total == read + len(rest)


def test_a_reader_beside_a_writer_loses_nothing(compression: str, tmp_path: Path) -> None:
    """While a thread appends and seals as fast as it can, the rows read are dense, up to `final`."""
    source = RunSamples(tmp_path)
    seqs: list[int] = []

    def write() -> None:
        with opened(tmp_path, sink(compression=compression)) as log:
            for first in range(0, 1500, 10):
                log.samples.append(written(first, first + 10))
            log.finish()

    writer = threading.Thread(target=write)
    writer.start()
    while source.total() is None or len(seqs) < (source.total() or 0):
        seqs += read_all(source, len(seqs), 64)
    writer.join()

    assert list(range(1500)) == seqs
    assert len(shard_files(tmp_path)) > 25


def test_the_end_is_the_last_line_of_the_manifest(tmp_path: Path) -> None:
    """A run that is continued has no end again until it is finished."""
    source = RunSamples(tmp_path)
    totals = [source.total()]
    with opened(tmp_path, sink()) as log:
        log.samples.append(written(0, 3))
        totals.append(source.total())
        log.finish()
        totals.append(source.total())
        log.samples.append(written(3, 40))
        totals.append(source.total())
        log.finish()
        totals.append(source.total())

    assert [None, None, 3, None, 40] == totals


def test_a_torn_row_is_not_there_yet(compression: str, tmp_path: Path) -> None:
    """Half a row is not read; it is read once the rest has come."""
    source = RunSamples(tmp_path)
    with opened(tmp_path, sink(compression=compression, shard_bytes=10**6)) as log:
        log.samples.append(written(0, 5))
        log.samples.append(written(5, 9))
    [path] = shard_files(tmp_path)
    whole = path.read_bytes()
    seen: list[int] = []
    for end in range(0, len(whole) + 1, 37):
        path.write_bytes(whole[:end])
        seen += read_all(source, len(seen))
    path.write_bytes(whole)
    seen += read_all(source, len(seen))

    assert list(range(9)) == seen


def damage(path: Path, what: str) -> None:
    """Damage a sealed shard."""
    if what == "missing":
        path.unlink()
    elif what == "short":
        os.truncate(path, path.stat().st_size // 2)
    elif what == "garbled":
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 40] = b"#" * 40
        path.write_bytes(data)
    else:  # a row is left out
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:2] + lines[3:]))


@pytest.mark.parametrize(
    ("what", "compression"),
    [(what, form) for what in ("missing", "short", "garbled") for form in COMPRESSIONS] + [("gap", "none")],
)
def test_a_damaged_sealed_shard_stops_the_reader(what: str, compression: str, tmp_path: Path) -> None:
    """Whatever a manifest lists must be there: the error names the shard and the row."""
    with opened(tmp_path, sink(compression=compression)) as log:
        for first in range(0, 60, 3):
            log.samples.append(written(first, first + 3))
    sealed = shard_files(tmp_path)[0]
    damage(sealed, what)

    with pytest.raises(SinkError, match=rf"{sealed.name}: (row \d+|No such file)"):
        read_all(RunSamples(tmp_path))


def test_a_gap_in_the_open_shard_stops_the_reader(tmp_path: Path) -> None:
    """A row that is missing between two others will never come."""
    with opened(tmp_path, sink(shard_bytes=10**6)) as log:
        log.samples.append(written(0, 6))
    [path] = shard_files(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))
    source = RunSamples(tmp_path)

    assert [0, 1, 2] == numbers(source.fetch(0, 3))
    with pytest.raises(SinkError, match="row 3 is missing: row 4 comes in its place"):
        source.fetch(3, 3)


@pytest.mark.parametrize(
    ("lost", "why"), [(0, "row 0 is missing"), (2, "row {first_seq} is missing"), (-1, "does not list all")]
)
def test_a_manifest_that_lost_a_shard_is_refused(lost: int, why: str, tmp_path: Path) -> None:
    """`final` counts the samples, and rows have no gaps: no row is skipped, and the reader does not wait for
    ever.
    """
    with opened(tmp_path, sink()) as log:
        log.samples.append(written(0, 40))
        log.finish()
    path = tmp_path / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    gone = json.loads(lines.pop(lost if lost >= 0 else -2))  # the last line says `final`
    path.write_bytes(b"".join(lines))

    with pytest.raises(SinkError, match=why.format(**gone)):
        read_all(RunSamples(tmp_path))


def test_rows_are_found_again_by_number(compression: str, tmp_path: Path) -> None:
    """Any rows, from sealed shards and the open one; rows that do not exist are left out."""
    with opened(tmp_path, sink(compression=compression)) as log:
        for first in range(0, 100, 4):
            log.samples.append(written(first, first + 4))
    source = RunSamples(tmp_path)

    assert [0, 3, 50, 51, 99] == numbers(source.pick([0, 3, 50, 51, 99]))
    assert [98] == numbers(source.pick([98, 100]))


def test_rows_of_a_frame_are_not_decompressed_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the rows are scattered, a frame is read once or twice, sealed or open."""
    with opened(tmp_path, sink(compression="zstd", shard_bytes=8000)) as log:
        for first in range(0, 400, 50):
            log.samples.append(written(first, first + 50))
    number = sum(1 for path in shard_files(tmp_path) for _ in shards.scan(path))
    assert number < 50
    assert shard_files(tmp_path)[-1].suffix == OPEN_SUFFIX
    made: list[int] = []
    real = zstandard.ZstdDecompressor

    def counted() -> Any:
        made.append(1)
        return real()

    monkeypatch.setattr(zstandard, "ZstdDecompressor", counted)
    wanted = sorted({*range(0, 400, 3), *range(50, 75), 399})
    found = list(RunSamples(tmp_path).pick(wanted))

    assert wanted == numbers(found)
    assert len(made) < 2 * number


@pytest.mark.parametrize(
    ("text", "why"),
    [('{"format": 99}', "has format 99; this streamsyn reads"), ("{", "run.json cannot be read")],
)
def test_a_run_of_an_unknown_format_is_not_followed(text: str, why: str, tmp_path: Path) -> None:
    """It is refused, as `verify` and `export` do; also when it comes later."""
    source = RunSamples(tmp_path)
    assert [] == source.fetch(0, 5)
    with opened(tmp_path, sink()) as log:
        log.samples.append(written(0, 2))
    (tmp_path / "run.json").write_text(text)

    with pytest.raises(ConfigError, match=why):
        source.fetch(0, 5)
    with pytest.raises(ConfigError, match=why):
        RunSamples(tmp_path).total()


def test_a_directory_may_come_later(tmp_path: Path) -> None:
    """A run that has not started has no rows yet; once it has, they are found."""
    source = RunSamples(tmp_path / "run")
    before = source.fetch(0, 5)
    with opened(tmp_path / "run", sink()) as log:
        log.samples.append(written(0, 2))

    assert [] == before
    assert [0, 1] == read_all(source)


def begin(root: Path, numbers: range) -> None:
    """Start a run, or resume it, and have it write samples."""
    directory = RunDirectory(root)
    directory.save({}, {})
    directory.close()
    with opened(root, sink()) as log:
        log.samples.append(written(numbers.start, numbers.stop))


def test_a_different_run_in_its_place_is_not_followed(tmp_path: Path) -> None:
    """A resumed run is the same; a new one in its directory is an error, until the first one is back."""
    root, old = tmp_path / "run", tmp_path / "old"
    begin(root, range(5))
    source = RunSamples(root)
    seen = read_all(source)
    begin(root, range(5, 9))
    seen += read_all(source, len(seen))
    root.rename(old)
    begin(root, range(12))

    assert list(range(9)) == seen
    for look in (source.total, lambda: source.fetch(9, 3), lambda: list(source.pick([0]))):
        with pytest.raises(SinkError, match=f"{root} now holds a different run"):
            look()
    shutil.rmtree(root)
    old.rename(root)
    begin(root, range(9, 10))
    assert [9] == read_all(source, 9)


def test_a_run_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were read after the directory became a different run's are not returned."""
    root = tmp_path / "run"
    begin(root, range(5))
    source = RunSamples(root)
    read_all(source)
    rows = source._samples.part(None)
    read = rows._read

    def late(*given: Any) -> Any:
        root.rename(tmp_path / "old")
        begin(root, range(12))
        monkeypatch.undo()
        return read(*given)

    monkeypatch.setattr(rows, "_read", late)
    with pytest.raises(SinkError, match="now holds a different run"):
        source.fetch(5, 3)


def test_a_run_that_is_deleted_is_logged_once(tmp_path: Path) -> None:
    """Once each time it disappears; not for a run that has not come yet."""
    root = tmp_path / "run"
    with structlog.testing.capture_logs() as logged:
        source = RunSamples(root)
        source.total()
        begin(root, range(5))
        read_all(source)
        for _ in range(2):
            root.rename(tmp_path / "away")
            assert [] == [*source.fetch(5, 3), *source.fetch(5, 3)]
            (tmp_path / "away").rename(root)
            source.total()

    assert [("stream.gone", "warning")] * 2 == [(line["event"], line["log_level"]) for line in logged]


@pytest.fixture
def following(tmp_path: Path) -> Iterator[tuple[RunSamples, RunLog]]:
    """A source, and the log that it follows."""
    source = RunSamples(tmp_path)
    with opened(tmp_path, sink()) as log:
        yield source, log
    source.close()


async def test_a_write_ends_the_wait(following: tuple[RunSamples, RunLog]) -> None:
    """With notifications from the kernel, nothing waits for the next look."""
    source, log = following
    await asyncio.to_thread(log.samples.append, written(0, 1))
    await asyncio.to_thread(source.fetch, 0, 5)
    loop = asyncio.get_running_loop()
    woken = []

    async def wait() -> None:
        for _ in range(20):
            await source.changed(30.0)
            woken.append(loop.time())

    began = loop.time()
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        waiting = group.create_task(wait(), name="waiting")
        number = 1
        while not waiting.done():
            await asyncio.to_thread(log.samples.append, written(number, number + 1))
            number += 1

    assert woken[-1] - began < 5  # twenty looks without a hint take ten seconds


async def test_a_wait_ends_without_a_write(tmp_path: Path) -> None:
    """Without a notification, a wait ends soon, and never later than asked."""
    source = RunSamples(tmp_path / "nowhere")
    loop = asyncio.get_running_loop()
    times = [loop.time()]
    for timeout_s in (0.01, 3600.0):
        await source.changed(timeout_s)
        times.append(loop.time())
    source.close()

    assert times[1] - times[0] < 0.4
    assert 0.4 < times[2] - times[1] < 5


def test_rows_that_a_kill_took_back_are_waited_for(tmp_path: Path) -> None:
    """Rows that a checkpoint holds and the run's machine lost are written again: the trainer continues
    then."""
    with opened(tmp_path, sink(shard_bytes=10**6)) as log:
        log.samples.append(written(0, 60))
    first = planner(Sources(RunSamples(tmp_path)), rendering=Alike(), max_wait_s=1e6, shuffle_min=8)
    step = asyncio.run(first.next(5))
    assert isinstance(step, StepPlan)
    first.close()
    [path] = shard_files(tmp_path)
    whole = path.read_bytes()
    os.truncate(path, 100)

    async def go_on() -> tuple[Any, list[StepPlan]]:
        later = planner(Sources(RunSamples(tmp_path)), step.state, rendering=Alike())
        idle = await later.next(0.05)
        await asyncio.to_thread(path.write_bytes, whole)
        await asyncio.to_thread(finish)
        return idle, await plans(later)

    def finish() -> None:
        with opened(tmp_path, sink()) as log:
            log.finish()

    idle, rest = asyncio.run(go_on())

    assert isinstance(idle, Idle)
    assert list(range(60)) == sorted(key.seq for key in keys([step, *rest]))


def test_a_checkpoint_of_a_longer_run_is_refused(tmp_path: Path) -> None:
    """A finished run with fewer rows than were read is a different run."""
    for name, count in (("a", 60), ("b", 5)):
        with opened(tmp_path / name, sink()) as log:
            log.samples.append(written(0, count))
            log.finish()
    [step, *_] = asyncio.run(plans(planner(Sources(RunSamples(tmp_path / "a")), rendering=Alike())))

    with pytest.raises(ConfigError, match="run has 5 rows, but the checkpoint has read"):
        asyncio.run(plans(planner(Sources(RunSamples(tmp_path / "b")), step.state, rendering=Alike())))
