"""SQLite files that can be made again: made when missing, deleted when damaged, kept when the disk fails."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamsyn.io.derived import SQLITE_ERRORS, DerivedDatabase, is_disk_error, open_scratch
from tests.builders import disk_full_beyond

SCHEMA = "CREATE TABLE IF NOT EXISTS one (n INTEGER); CREATE TABLE IF NOT EXISTS two (t TEXT);"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[DerivedDatabase]:
    """One in a folder that is not there yet."""
    made = DerivedDatabase(tmp_path / "index" / "d.sqlite", SCHEMA, pragmas=["auto_vacuum = FULL"])
    yield made
    made.close()


def fill(database: DerivedDatabase) -> None:
    """Rows over several pages, in the file itself."""
    database.connect().executemany("INSERT INTO two VALUES (?)", [("x" * 500,)] * 100)
    database.close()


def rows(database: DerivedDatabase) -> int:
    return int(database.connect().execute("SELECT count(*) FROM two").fetchone()[0])


def test_it_is_made_by_its_first_use_and_kept(database: DerivedDatabase) -> None:
    """With its folder, a write-ahead log and the pragmas; closing forgets nothing."""
    was_there = database.path.exists()
    pragmas = [
        database.connect().execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "auto_vacuum")
    ]
    fill(database)

    assert not was_there
    assert ["wal", 1] == pragmas
    assert 100 == rows(database)
    assert database.connect() is database.connect()


@pytest.mark.parametrize("spoil", [b"no database at all " * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_damaged_file_is_deleted_with_its_log(database: DerivedDatabase, spoil: bytes) -> None:
    """The next use makes an empty one."""
    fill(database)
    database.path.write_bytes(spoil)
    database.path.with_name(database.path.name + "-wal").write_bytes(b"left behind")

    with pytest.raises(SQLITE_ERRORS) as raised:
        rows(database)
    assert not is_disk_error(raised.value)
    database.discard(raised.value)

    assert [] == list(database.path.parent.iterdir())
    assert 0 == rows(database)


def test_a_schema_that_is_not_text_is_damage(database: DerivedDatabase) -> None:
    """SQLite quotes it in its error, and Python cannot decode that."""
    fill(database)
    data = database.path.read_bytes()
    database.path.write_bytes(data.replace(b"CREATE TABLE", b"CREATE \xff\xff\xff\xff\xff"))

    with pytest.raises(SQLITE_ERRORS) as raised:
        rows(database)
    database.discard(raised.value)

    assert 0 == rows(database)


def test_nothing_is_deleted_when_the_disk_is_full(database: DerivedDatabase) -> None:
    """The error is raised again; what was committed is still there."""
    fill(database)
    with disk_full_beyond(50_000), pytest.raises(sqlite3.Error) as raised:
        database.connect().execute("INSERT INTO two VALUES (?)", ("x" * 200_000,))

    with pytest.raises(sqlite3.Error) as again:
        database.discard(raised.value)
    database.close()

    assert raised.value is again.value
    assert is_disk_error(raised.value)
    assert 100 == rows(database)


def test_a_folder_that_cannot_be_made_is_the_disks_fault(tmp_path: Path) -> None:
    """A file in its place."""
    (tmp_path / "index").write_text("a file")
    database = DerivedDatabase(tmp_path / "index" / "d.sqlite", SCHEMA)

    with pytest.raises(OSError, match="index") as raised:
        database.connect()

    assert is_disk_error(raised.value)


def test_a_scratch_file_begins_empty(tmp_path: Path) -> None:
    """Whatever a kill has left in its place."""
    path = tmp_path / "scratch.sqlite"
    path.write_bytes(b"left behind" * 1000)
    db = open_scratch(path, SCHEMA, busy_timeout_s=1.0)
    count = db.execute("SELECT count(*) FROM one").fetchone()[0]
    db.close()

    assert 0 == count
