"""The spool of a pipe: entries are on disk before they are acted on, and are replayed after a kill."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import SinkError
from streamsyn.io.spool import BATCH_BYTES, BATCH_ENTRIES, Spool


def decode(line: bytes) -> str | None:
    """Entries are words in lower case."""
    text = line.decode(errors="replace").rstrip("\n")
    return text if text.isalpha() and text.islower() else None


def encode(*entries: str) -> bytes:
    return "".join(entry + "\n" for entry in entries).encode()


@pytest.fixture
def spool(tmp_path: Path) -> Spool[str]:
    """One in a folder that is not there yet."""
    return Spool(tmp_path / "spool" / "words.txt", decode)


def replayed(spool: Spool[str]) -> list[str]:
    return [entry for batch in spool.replay() for entry in batch]


def test_what_was_appended_is_replayed(spool: Spool[str]) -> None:
    """By this run or an earlier one; looking for a file that is not there leaves no trace."""
    before = (spool.exists(), replayed(spool), spool.path.parent.exists())
    for entries in (["a", "b"], ["c"]):
        with spool:
            spool.append(encode(*entries))

    assert (False, [], False) == before
    assert ["a", "b", "c"] == replayed(spool)
    assert [b"b\n", b"c\n"] == list(spool.lines(2))


def test_batches_are_bounded(spool: Spool[str]) -> None:
    """By their number of entries and by their bytes."""
    long = "x" * (BATCH_BYTES // 4)
    with spool:
        spool.append(encode(*["a"] * 1000, *[long] * 20))

    batches = list(spool.replay())

    assert 1020 == sum(map(len, batches))
    assert max(map(len, batches)) <= BATCH_ENTRIES
    assert max(sum(map(len, batch)) for batch in batches) <= BATCH_BYTES + len(long)


@given(cut=st.integers(0, 13), tail=st.sampled_from([b"", b"\0" * 50, b"\0" * 50 + b"\n", b"NO\n", b"half"]))
def test_a_torn_end_is_cut_off(tmp_path_factory: pytest.TempPathFactory, cut: int, tail: bytes) -> None:
    """Wherever a kill tore it: whole lines are replayed, and what is appended next follows them."""
    spool = Spool(tmp_path_factory.mktemp("torn") / "words.txt", decode)
    whole = encode("one", "two", "three")
    kept = whole[:cut]
    spool.path.write_bytes(kept + (tail if kept.endswith(b"\n") or not kept else b""))
    expected = ["one", "two", "three"][: kept.count(b"\n")]

    found = replayed(spool)
    with spool:
        spool.append(encode("next"))

    assert expected == found
    assert encode(*expected, "next") == spool.path.read_bytes()


@pytest.mark.parametrize("damaged", [b"\0" * 100, b"NO\n", b"\n"])
def test_a_damaged_line_among_others_is_named(spool: Spool[str], damaged: bytes) -> None:
    """What follows it was acted on and cannot be piped again: nothing is cut."""
    spoiled = encode("a", "b") + damaged + encode("c", "d")
    spool.path.parent.mkdir()
    spool.path.write_bytes(spoiled)

    with pytest.raises(SinkError) as raised:
        replayed(spool)

    assert f"{spool.path}:3 is damaged; repair or delete that line" == str(raised.value)
    assert spoiled == spool.path.read_bytes()


@pytest.mark.parametrize("batch", [encode(*["next"] * 5000), encode("x" * 30_000, *["next"] * 1000)])
@pytest.mark.parametrize("lost", [{0}, {1}, {0, 2}, {1, 3}, {5}])
def test_pages_that_a_loss_of_power_took_are_cut_off(spool: Spool[str], batch: bytes, lost: set[int]) -> None:
    """The last batch was written and not synced: some of its pages are there, others read as zeros."""
    synced = encode(*["synced"] * 1000)
    spool.path.parent.mkdir()
    data = bytearray(synced + batch)
    for page in lost:
        begin, end = max(len(synced), 4096 * (page + 1)), 4096 * (page + 2)
        data[begin:end] = bytes(end - begin)
    spool.path.write_bytes(data)

    found = replayed(spool)
    with spool:
        spool.append(encode("later"))

    assert ["synced"] * 1000 == found[:1000]
    assert set(found[1000:]) <= {"next", "x" * 30_000}
    assert [*found, "later"] == replayed(spool)


def test_a_new_spool_survives_a_loss_of_power(spool: Spool[str], synced: list[Path]) -> None:
    """The folder is synced in its parent, the file in its folder; what is replayed is synced before."""
    with spool:
        spool.append(encode("a"))
    before = set(synced)
    synced.clear()
    batches = spool.replay()
    next(batches)

    assert {spool.path.parent.parent, spool.path.parent, spool.path} == before
    assert [spool.path] == synced


def fill_disk(folder: Path) -> None:
    folder.mkdir()
    (folder / "words.txt").symlink_to("/dev/full")


def put_file_in_the_way(folder: Path) -> None:
    folder.write_text("")


@pytest.mark.parametrize("spoil", [fill_disk, put_file_in_the_way])
def test_a_spool_that_cannot_be_written_is_named(spool: Spool[str], spoil: Callable[[Path], None]) -> None:
    """A full disk, a file in place of the folder."""
    spoil(spool.path.parent)

    with pytest.raises(SinkError) as raised, spool:
        spool.append(encode("a"))

    assert str(raised.value).startswith(f"cannot write {spool.path}: ")


def test_a_spool_that_cannot_be_read_is_named(spool: Spool[str]) -> None:
    """A directory in its place."""
    spool.path.mkdir(parents=True)

    with pytest.raises(SinkError, match=r"cannot read .*words\.txt: "):
        replayed(spool)
