"""The index of finished drafts: derived from the log, made anew when it is missing, damaged or behind."""

import itertools
import random
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from streamsyn.errors import SinkError
from streamsyn.records import Draft, Seed
from streamsyn.sink.completed_keys import Claim, Claims, CompletedKeys
from streamsyn.sink.log import RunLog
from streamsyn.sink.manifest import Manifest
from tests.builders import context, opened, outcome, reject, sink

KEYS = [b"%016d" % number for number in range(8)]


def finished_run(root: Path, outcomes: int = 30) -> Path:
    """A run directory with several sealed shards, and open ones; the path of its index."""
    with opened(root, sink()) as log:
        for number in range(outcomes):
            log.append([outcome(number)])
            log.sync()
        assert len(log.manifest.shards) > 3
    return root / "index" / "finished.sqlite"


def known(root: Path, outcomes: int = 30) -> list[Claim]:
    """The claims of a resumed run for each draft, and for one that is not finished."""
    with opened(root, sink()) as log:
        claims = log.claims()
        with claims.batch():
            answers = [claims.claim(outcome(number).key) for number in range(outcomes + 1)]
        claims.close()
    return answers


ALL_FINISHED = [Claim.FINISHED] * 30 + [Claim.NEW]


def test_a_key_is_new_once(tmp_path: Path) -> None:
    """The first claim of a key in a run is NEW; later ones are REPEATED."""
    claims = Claims(None, tmp_path / "read.sqlite")

    assert [Claim.NEW, Claim.NEW, Claim.REPEATED, Claim.NEW, Claim.REPEATED] == [
        claims.claim(KEYS[number]) for number in (0, 1, 0, 2, 1)
    ]
    assert [False, False] == [claims.is_known([key]) for key in KEYS[2:4]]
    assert set() == claims.finished(KEYS)
    claims.close()


def test_a_finished_key_is_finished_once(tmp_path: Path) -> None:
    """A seed that an earlier run finished is FINISHED, and REPEATED when it comes again."""
    finished = CompletedKeys(tmp_path / "finished.sqlite")
    finished.catch_up(Manifest(tmp_path / "none"), tmp_path, KEYS[:2])
    claims = Claims(finished.path, tmp_path / "read.sqlite")

    assert [Claim.FINISHED, Claim.REPEATED, Claim.NEW] == [claims.claim(KEYS[n]) for n in (0, 0, 2)]
    assert [True, True, False, False] == [claims.is_known([key]) for key in KEYS[:4]]
    assert set(KEYS[:2]) == claims.finished(KEYS)
    claims.close()
    finished.close()


def test_an_entry_is_known_when_no_later_run_has_to_read_it(tmp_path: Path) -> None:
    """Its drafts are all finished, or the spool has it. One draft or a claim of a file does not do."""
    finished = CompletedKeys(tmp_path / "finished.sqlite")
    finished.catch_up(Manifest(tmp_path / "none"), tmp_path, KEYS[:3])
    claims = Claims(finished.path, tmp_path / "read.sqlite")
    claims.claim(KEYS[4])
    claims.claim(KEYS[6], spooled=True)

    entries = [KEYS[:2], KEYS[2:4], KEYS[4:6], KEYS[6:8], [KEYS[0], KEYS[0]]]
    assert [True, False, False, True, True] == [claims.is_known(keys) for keys in entries]
    claims.close()
    finished.close()


def test_any_number_of_keys_may_be_asked_for_at_once(tmp_path: Path) -> None:
    """More than one query can hold, with repeats, or none."""
    keys = [b"%016d" % number for number in range(5000)]
    finished = CompletedKeys(tmp_path / "finished.sqlite")
    finished.catch_up(Manifest(tmp_path / "none"), tmp_path, keys[::3])
    claims = Claims(finished.path, tmp_path / "read.sqlite")

    assert set(keys[::3]) == claims.finished([*keys, *keys])
    assert set() == claims.finished([])
    claims.close()
    finished.close()


def test_what_was_read_is_forgotten_between_runs(tmp_path: Path) -> None:
    """The scratch file is deleted after a run, and one that a kill left is not used."""
    scratch = tmp_path / "read.sqlite"
    killed = Claims(None, scratch)
    killed.claim(KEYS[0])
    left_behind = scratch.exists()
    claims = Claims(None, scratch)

    assert left_behind
    assert Claim.NEW == claims.claim(KEYS[0])
    claims.close()
    assert not scratch.exists()
    killed.close()


def test_the_key_of_a_draft_is_found_in_its_row(tmp_path: Path) -> None:
    """Each draft of a seed, and each bad line, is found again by its row in the log."""
    seed = Seed("seed", "qa", "i", "a", "file:1")
    drafts = [context(number, seed_id="seed", draft=number) for number in range(3)]
    with opened(tmp_path, sink()) as log:
        log.append([*drafts, reject(7)])
        log.seal_outcomes()
    (tmp_path / "index" / "finished.sqlite").unlink()

    with opened(tmp_path, sink()) as log:
        claims = log.claims()
        keys = [*(Draft(seed, number).key for number in range(4)), reject(7).key, reject(8).key]
        assert {*keys[:3], keys[4]} == claims.finished(keys)
        claims.close()


def test_the_index_is_made_anew_when_it_is_gone(tmp_path: Path) -> None:
    """Without the file, the shards are read again: also when its write-ahead log is still there."""
    index = finished_run(tmp_path)
    index.unlink()
    index.with_name(index.name + "-wal").write_bytes(b"left behind" * 1000)

    assert ALL_FINISHED == known(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 99, 1000, 4096, 4100, 9000])
def test_the_index_is_made_anew_when_it_is_cut_off(tmp_path: Path, size: int) -> None:
    """A file that is too short, at any length, does not make a draft run twice."""
    index = finished_run(tmp_path)
    index.write_bytes(index.read_bytes()[:size])

    assert ALL_FINISHED == known(tmp_path)


@pytest.mark.parametrize("at", [0, 16, 40, 90, 110, 3900, 4096, 8192])
def test_the_index_is_made_anew_when_it_is_garbage(tmp_path: Path, at: int) -> None:
    """Garbage anywhere in the file is noticed, and the index is made again from the log."""
    index = finished_run(tmp_path)
    data = index.read_bytes()
    garbage = random.Random(at).randbytes(200)
    index.write_bytes(data[:at] + garbage + data[at + 200 :])

    assert ALL_FINISHED == known(tmp_path)


def test_the_index_is_made_anew_when_its_schema_is_no_text(tmp_path: Path) -> None:
    """SQLite quotes it in its error."""
    index = finished_run(tmp_path)
    index.write_bytes(index.read_bytes().replace(b"CREATE TABLE", b"CREATE \xff\xff\xff\xff\xff"))

    assert ALL_FINISHED == known(tmp_path)


def test_a_text_file_in_place_of_the_index_is_replaced(tmp_path: Path) -> None:
    """A file that is not SQLite is replaced."""
    index = finished_run(tmp_path)
    index.write_text("this is no database\n" * 1000)

    assert ALL_FINISHED == known(tmp_path)


def test_a_shard_that_was_not_indexed_is_caught_up_with(tmp_path: Path) -> None:
    """A kill between the manifest's line and the index: the next run reads that shard."""
    index = finished_run(tmp_path)
    with opened(tmp_path, sink()) as log:
        log.seal_outcomes()
        last = log.manifest.shards[-1].path
        with closing(sqlite3.connect(index, isolation_level=None)) as db:
            db.execute("DELETE FROM shards WHERE path = ?", (last,))
            db.execute("DELETE FROM finished")

    finished = CompletedKeys(index)
    with opened(tmp_path, sink()) as log:
        finished.catch_up(log.manifest, tmp_path, [])
    finished.close()
    with closing(sqlite3.connect(index)) as db:
        count, shards = (
            db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("finished", "shards")
        )

    assert (
        next(shard.rows for shard in log.manifest.shards if shard.path == last),
        len(log.manifest.shards),
    ) == (
        count,
        shards,
    )


@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_an_index_is_not_made_from_a_damaged_shard(tmp_path: Path, damage: str) -> None:
    """A sealed shard whose rows cannot all be read is named: else its drafts would be done twice."""
    index = finished_run(tmp_path)
    index.unlink()
    shard = tmp_path / "contexts" / "part-000001.jsonl"
    data = shard.read_bytes()
    match damage:
        case "missing":
            shard.unlink()
        case "cut":
            shard.write_bytes(data[:-9])
        case "changed":
            shard.write_bytes(data.replace(b'"seed_id"', b'"seed-id"', 1))

    with pytest.raises(SinkError, match=r"contexts/part-000001\.jsonl .*; restore it from a copy"):
        RunLog(tmp_path, sink())
    shard.write_bytes(data)
    assert ALL_FINISHED == known(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """SQLite's error becomes one line that names the file."""
    with pytest.raises(SinkError, match=r"read\.sqlite: unable to open"):
        Claims(None, tmp_path / "nowhere" / "read.sqlite")


def test_closed_while_it_is_used(tmp_path: Path) -> None:
    """A stopped run closes it while a reader still uses it: closing waits for the call in progress, and the
    reader gets an error. (SQLite would crash the process.)"""
    claims = Claims(None, tmp_path / "read.sqlite")
    began = threading.Event()

    def read() -> int:
        for number in itertools.count():
            with claims.batch():
                for part in range(200):
                    claims.claim(b"%08d%08d" % (number, part))
            began.set()
        raise AssertionError

    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(read)
        began.wait()
        claims.close()
        with pytest.raises(SinkError, match="closed"):
            reading.result(10)
