"""Seeds from a pipe: they arrive as they come, and are on disk before anything is made of them."""

import gc
import gzip
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsyn.config.sections import SeedsSection
from streamsyn.errors import ConfigError, SinkError
from streamsyn.records import BadSeed, Entry, RejectReason, Seed
from streamsyn.seeds.stdin import SeedSpool, StdinSource

pytestmark = pytest.mark.timeout(20)


def line(number: int) -> bytes:
    return orjson.dumps({"instruction": f"What is {number}?", "answer": f"{number}.", "id": number}) + b"\n"


def seed(number: int) -> Seed:
    return Seed(str(number), "stdin", f"What is {number}?", f"{number}.", f"-:{number}", {"n": number})


def bad(number: int) -> BadSeed:
    return BadSeed(f"-:{number}", RejectReason.INVALID_JSON, "nix", number.to_bytes(16, "little"))


def ids(batches: Iterator[list[Entry]] | list[list[Entry]]) -> list[str]:
    """What the batches hold: ids of seeds, origins of bad lines."""
    return [entry.id if isinstance(entry, Seed) else entry.origin for batch in batches for entry in batch]


def nothing_known(_: Entry) -> bool:
    return False


class Pipe:
    """Both ends of a pipe; the writer's end can be closed on its own."""

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe()
        self._writer = os.fdopen(self._write_fd, "wb", buffering=0)

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def end(self) -> None:
        self._writer.close()

    def close(self) -> None:
        self.end()
        os.close(self.read_fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A pipe, as between two programs."""
    pipe = Pipe()
    yield pipe
    pipe.close()


def source_of(pipe: Pipe, max_line_bytes: int = 1 << 20) -> StdinSource:
    return StdinSource(pipe.read_fd, None, SeedsSection(max_line_bytes=max_line_bytes))


def test_all_lines_are_read_to_the_end(pipe: Pipe) -> None:
    """The last one may lack its line end; bad ones are named by their number."""
    pipe.write(line(1) + b"\nnix\n" + line(4) + b"{}\r\n" + b"x" * 200 + b"\n" + line(7).rstrip())
    pipe.end()
    source = source_of(pipe, max_line_bytes=100)

    read = [entry for batch in source.batches() for entry in batch]

    reasons = {entry.origin: entry.reason for entry in read if isinstance(entry, BadSeed)}
    assert ["1", "-:3", "4", "-:5", "-:6", "7"] == ids([read])
    assert {"-:3": "invalid_json", "-:5": "not_a_seed", "-:6": "line_too_long"} == reasons
    assert {"stdin"} == {entry.task for entry in read if isinstance(entry, Seed)}
    assert source.fraction() is None


def test_seeds_arrive_as_they_come(pipe: Pipe) -> None:
    """A line is handed on when it is there: nothing waits for a batch to fill or the pipe to end."""
    batches = source_of(pipe).batches()
    arrived = []

    for number in range(5):
        pipe.write(line(number))  # the writer's end stays open: reading on would wait for ever
        arrived.append(ids([next(batches)]))

    assert [["0"], ["1"], ["2"], ["3"], ["4"]] == arrived


def test_a_line_that_comes_in_parts_waits_for_its_end(pipe: Pipe) -> None:
    """Half a line is neither a seed nor a bad line."""
    batches = source_of(pipe).batches()
    arrived = []

    for part in (line(1)[:10], line(1)[10:] + line(2)[:5], line(2)[5:]):
        pipe.write(part)
        arrived.append(ids([next(batches)]))

    assert [[], ["1"], ["2"]] == arrived


def test_a_file_may_stand_in_for_a_pipe(tmp_path: Path) -> None:
    """`< seeds.jsonl` is read to its end too."""
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(b"".join(line(number) for number in range(10_000)))

    with path.open("rb") as file:
        source = StdinSource(file.fileno(), "given", SeedsSection())
        read = [entry for batch in source.batches() for entry in batch]

    assert [str(number) for number in range(10_000)] == ids([read])
    assert {"given"} == {entry.task for entry in read if isinstance(entry, Seed)}


def test_stop_ends_a_read_that_waits(pipe: Pipe) -> None:
    """From a different thread; half a line is not taken for a line."""
    source = source_of(pipe)
    arrived: queue.Queue[list[str] | None] = queue.Queue()

    def read() -> None:
        for batch in source.batches():
            arrived.put(ids([batch]))
        arrived.put(None)

    reading = threading.Thread(target=read, name="reader")
    reading.start()
    pipe.write(line(1) + b"half a li")
    first = arrived.get(timeout=10)
    source.stop()
    end = arrived.get(timeout=10)
    reading.join(10)

    assert (["1"], None) == (first, end)
    assert not reading.is_alive()


def test_stop_comes_before_what_could_still_be_read(pipe: Pipe) -> None:
    """What is in the pipe and was not acted on is left there; stopping twice is harmless."""
    source = source_of(pipe)
    pipe.write(line(1))
    source.stop()
    source.stop()

    assert [] == ids(source.batches())


def test_entries_are_on_disk_before_they_are_yielded(tmp_path: Path) -> None:
    """A kill after any entry was seen finds it in the spool."""
    spool = SeedSpool(tmp_path / "spool")
    path = tmp_path / "spool" / "stdin.jsonl"
    batches: list[list[Entry]] = [[seed(1), seed(2)], [], [bad(3)], [seed(4)]]
    seen: list[str] = []

    for batch in spool.follow(iter(batches), nothing_known):
        seen += ids([batch])

        assert seen == ids([[entry for row in path.read_bytes().splitlines() for entry in decoded(row)]])

    assert ["1", "2", "-:3", "4"] == seen


def decoded(row: bytes) -> list[Entry]:
    fields = orjson.loads(row)
    return [Seed(**fields["seed"])] if "seed" in fields else [BadSeed(**fields["bad"])]


def test_the_spool_gives_back_what_was_put_in(tmp_path: Path) -> None:
    """Seeds with all their fields, and bad lines with reason, detail and key, in order, in batches."""
    entries: list[Entry] = [bad(number) if number % 7 == 0 else seed(number) for number in range(1000)]
    list(SeedSpool(tmp_path).follow(iter([entries]), nothing_known))

    batches = list(SeedSpool(tmp_path).replay())

    assert entries == [entry for batch in batches for entry in batch]
    assert max(map(len, batches)) <= 256


def test_known_entries_are_not_spooled_again(tmp_path: Path) -> None:
    """They are passed on all the same: whoever takes them counts them."""
    known = {"1", "-:3"}

    def is_known(entry: Entry) -> bool:
        return ids([[entry]])[0] in known

    passed = ids(
        SeedSpool(tmp_path).follow(iter([[seed(1), seed(2)], [bad(3), bad(4)], [seed(1)]]), is_known)
    )

    assert ["1", "2", "-:3", "-:4", "1"] == passed
    assert ["2", "-:4"] == ids(SeedSpool(tmp_path).replay())


def test_without_a_spool_there_is_nothing_to_replay(tmp_path: Path) -> None:
    """Looking for one leaves no trace."""
    assert [] == list(SeedSpool(tmp_path / "spool").replay())
    assert not (tmp_path / "spool").exists()


ENTRIES: list[Entry] = [seed(1), bad(2), seed(3)]


@pytest.fixture(scope="module")
def spooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spool with three entries; its folder."""
    folder = tmp_path_factory.mktemp("spooled")
    list(SeedSpool(folder).follow(iter([ENTRIES]), nothing_known))
    return folder


@settings(deadline=None)
@given(data=st.data())
def test_a_torn_last_line_is_cut_off(spooled: Path, data: st.DataObject) -> None:
    """Wherever a kill cut the file: whole lines are replayed, and what is read next follows them."""
    whole = b"".join(_lines(ENTRIES, spooled.parent / "whole"))
    end = data.draw(st.integers(0, len(whole)))
    path = spooled / "stdin.jsonl"
    path.write_bytes(whole[:end])
    kept = ENTRIES[: whole[:end].count(b"\n")]

    replayed = [entry for batch in SeedSpool(spooled).replay() for entry in batch]
    list(SeedSpool(spooled).follow(iter([[seed(9)]]), nothing_known))

    assert kept == replayed
    assert [*kept, seed(9)] == [entry for batch in SeedSpool(spooled).replay() for entry in batch]


def _lines(entries: list[Entry], folder: Path) -> list[bytes]:
    path = folder / "stdin.jsonl"
    if not path.exists():
        list(SeedSpool(folder).follow(iter([entries]), nothing_known))
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    "tail",
    [
        b"\0" * 100,
        b"\0" * 100 + b"\n",
        b"{}\n",
        b"[]\n",
        b"5\n",
        b'{"seed":5}\n',
        b'{"seed":{"id":"1"}}\n',
        b'{"bad":{"origin":"-:1"}}\n',
        b'{"bad":{"origin":"-:1","reason":"nix","detail":"","key":""}}\n',
    ],
)
def test_a_last_line_that_makes_no_sense_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    """After a power cut a file may end in anything."""
    list(SeedSpool(tmp_path).follow(iter([ENTRIES]), nothing_known))
    path = tmp_path / "stdin.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + tail)

    replayed = [entry for batch in SeedSpool(tmp_path).replay() for entry in batch]

    assert ENTRIES == replayed
    assert good == path.read_bytes()


@pytest.mark.parametrize("damaged", [b"\0" * 100, b"{}\n", b"\n", b'{"seed":{"id":"1"}}\n'])
def test_a_damaged_line_among_others_stops_the_run(tmp_path: Path, damaged: bytes) -> None:
    """What follows it was acted on and cannot be piped again: the line is named, and nothing is cut."""
    list(SeedSpool(tmp_path).follow(iter([ENTRIES]), nothing_known))
    path = tmp_path / "stdin.jsonl"
    spoiled = path.read_bytes() + damaged + path.read_bytes()
    path.write_bytes(spoiled)

    with pytest.raises(SinkError) as raised:
        list(SeedSpool(tmp_path).replay())

    assert f"{path}:4 is damaged; repair or delete that line" == str(raised.value)
    assert spoiled == path.read_bytes()


def test_a_stdin_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    """As with a file that is open for writing alone."""
    with (tmp_path / "file").open("wb") as file, pytest.raises(ConfigError) as raised:
        list(StdinSource(file.fileno(), None, SeedsSection()).batches())

    assert "stdin cannot be read: Bad file descriptor" == str(raised.value)


def fill_disk(folder: Path) -> None:
    (folder / "stdin.jsonl").symlink_to("/dev/full")


def put_file_in_the_way(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("")


@pytest.mark.parametrize("spoil", [fill_disk, put_file_in_the_way])
def test_a_spool_that_cannot_be_written_stops_the_run(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """What is not on disk must not be acted on; the message names the file."""
    folder = tmp_path / "spool"
    folder.mkdir()
    spoil(folder)
    yielded: list[list[Entry]] = []

    with pytest.raises(SinkError) as raised:
        yielded.extend(SeedSpool(folder).follow(iter([[seed(1)]]), nothing_known))

    assert [] == yielded
    assert str(raised.value).startswith(f"cannot write {folder / 'stdin.jsonl'}: ")


def test_a_source_leaves_no_file_open(pipe: Pipe) -> None:
    """A process that makes many runs reads from many pipes."""
    source = source_of(pipe)
    gc.collect()  # what earlier tests left
    before = len(list(Path("/proc/self/fd").iterdir()))
    del source
    gc.collect()

    assert before - 2 == len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'[\n{"instruction": "Who?"', "stdin is a JSON array; give the file with --seeds PATH"),
        (gzip.compress(b'{"instruction": "Who?"}\n', mtime=0), "stdin is compressed; unpack it first"),
        ('{"instruction": "Who?"}\n'.encode("utf-16"), "stdin is UTF-16, not UTF-8"),
        (b'{"instruction": "Caf\xc3', None),  # a chunk that ends within a character
        (b"[1]\n", None),
    ],
)
def test_what_is_not_one_object_a_line_is_refused_at_once(
    pipe: Pipe, data: bytes, problem: str | None
) -> None:
    """Before it becomes one reject a line."""
    pipe.write(data)
    pipe.end()
    batches = source_of(pipe).batches()

    if problem is None:
        assert 1 == len([entry for batch in batches for entry in batch])
    else:
        with pytest.raises(ConfigError, match=problem):
            list(batches)
