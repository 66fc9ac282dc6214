"""Near-duplicates of a run: found once, also after a kill, and never at the run's cost."""

import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from streamsyn.scoring.duplicates import Duplicates, Match
from tests.builders import disk_full_beyond
from tests.examples import examples

WORDS = [f"word{number}" for number in range(3000)]


def text(seed: int, words: int = 300) -> str:
    """A made-up text."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def near(seed: int, changed: int = 3) -> str:
    """The same with a few words added at its end: similar by 1 - changed / 300 or so."""
    return text(seed) + " and" * changed


def row(seq: int, seed: int | None = None, **checks: Any) -> dict[str, Any]:
    """A row of the log."""
    return {
        "seq": seq,
        "id": f"draft-{seq}",
        "context": text(seq if seed is None else seed),
        "checks": checks,
    }


@pytest.fixture
def duplicates(tmp_path: Path) -> Iterator[Duplicates]:
    opened = Duplicates(tmp_path / "index" / "duplicates.sqlite", 0.8)
    yield opened
    opened.close()


def test_a_near_duplicate_names_the_original(duplicates: Duplicates) -> None:
    """The first of two similar texts is an original; the second is a duplicate of the first."""
    assert duplicates.check_and_add("a", text(1)) is None
    assert duplicates.check_and_add("b", text(2)) is None

    match = duplicates.check_and_add("c", near(1).upper())

    assert match is not None
    assert "a" == match.id
    assert 0.9 < match.similarity < 1.0
    assert Match("b", 1.0) == duplicates.check_and_add("d", text(2))


def test_the_most_similar_original_is_named(tmp_path: Path) -> None:
    """Of several that are similar enough the closest counts."""
    duplicates = Duplicates(tmp_path / "d.sqlite", 0.9)
    half = text(1, 150)
    duplicates.check_and_add("far", f"{half} {text(2, 20)}")
    duplicates.check_and_add("close", f"{half} {text(3, 20)}")

    match = duplicates.check_and_add("new", f"{half} {text(3, 20)} more")

    assert match is not None
    assert "close" == match.id
    duplicates.close()


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_pairs_are_found_at_any_threshold(tmp_path: Path, similarity: float) -> None:
    """Of pairs that are a little more alike than is asked nearly all are found, and none far below."""
    duplicates = Duplicates(tmp_path / "d.sqlite", similarity)
    found = wrong = 0
    for number in range(60):
        # Jaccard similarity s: two texts share 2 s / (1 + s) of their runs.
        alike = min(1.0, similarity + 0.12)
        unlike = similarity - 0.2
        for kind, wanted in (("alike", alike), ("unlike", unlike)):
            seed = 1000 * number + (kind == "alike")
            shared = round(600 * 2 * wanted / (1 + wanted))
            common = text(seed, shared)
            one, other = text(seed + 10, 600 - shared), text(seed + 20, 600 - shared)
            duplicates.check_and_add(f"{kind}-{number}", f"{common} {one}")
            match = duplicates.check_and_add(f"{kind}-{number}-again", f"{common} {other}")
            found += match is not None and kind == "alike"
            wrong += match is not None and kind == "unlike"

    assert found >= 57
    assert 0 == wrong
    duplicates.close()


def test_a_draft_that_is_written_again_takes_its_own_place(duplicates: Duplicates) -> None:
    """An id never matches itself, and what it was before is forgotten."""
    duplicates.check_and_add("a", text(1))

    assert duplicates.check_and_add("a", near(1)) is None
    assert duplicates.check_and_add("a", text(2)) is None
    assert duplicates.check_and_add("b", text(1)) is None
    assert Match("a", 1.0) == duplicates.check_and_add("c", text(2))


def test_drafts_of_one_seed_are_duplicates_of_each_other(duplicates: Duplicates) -> None:
    """Each draft has its own id, so a second draft of the same seed can be a duplicate of the first."""
    duplicates.check_and_add("seed", text(1))

    assert Match("seed", 1.0) == duplicates.check_and_add("seed#1", text(1))


def test_a_duplicate_does_not_become_an_original(duplicates: Duplicates) -> None:
    """Of a chain of texts, each similar to the one before, each is compared with the first."""
    whole = text(1, 1000).split()
    chain = [" ".join(whole[start : start + 500]) for start in (0, 40, 80, 120)]

    found = [duplicates.check_and_add(f"{number}", link) for number, link in enumerate(chain)]

    assert [None, "0", None, "2"] == [match and match.id for match in found]


def test_a_forgotten_text_is_not_an_original(duplicates: Duplicates) -> None:
    """A text that did not become a context leaves room for the next like it."""
    duplicates.check_and_add("a", text(1))
    duplicates.forget("a")
    duplicates.forget("never-seen")

    assert duplicates.check_and_add("b", text(1)) is None


def rows_in(path: Path) -> dict[str, int]:
    """The number of rows in each table of the file."""
    with closing(sqlite3.connect(path)) as db:
        tables = ("originals", "bands")
        return {name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}


def test_forgotten_texts_leave_nothing_behind(duplicates: Duplicates) -> None:
    """Neither in the file nor in memory, however many drafts are rejected later."""
    for number in range(50):
        duplicates.check_and_add(f"{number}", text(number))
        duplicates.forget(f"{number}")
    duplicates.check_and_add("kept", text(50))
    duplicates.logged(0, "kept")
    duplicates.close()

    assert {"originals": 1, "bands": 128 // duplicates._rows} == rows_in(duplicates.path)
    assert not duplicates._pending._texts
    assert not duplicates._pending._by_key


def test_the_file_is_the_same_whether_it_followed_the_run_or_was_made_from_the_log(tmp_path: Path) -> None:
    """Checked in a different order than logged, some rejected, some repeats, and killed in between."""
    rng, path = random.Random(3), tmp_path / "followed.sqlite"
    log: list[dict[str, Any]] = []
    followed = Duplicates(path, 0.8)
    for part in range(4):
        waiting: list[tuple[str, int, Match | None]] = []
        for number in range(30):
            seed = rng.randrange(20)
            match = followed.check_and_add(f"{part}-{number}", text(seed))
            waiting.append((f"{part}-{number}", seed, match))
        rng.shuffle(waiting)
        for draft_id, seed, match in waiting[:20]:
            checks = {"near_duplicate": {"id": match.id}} if match else {}
            log.append({"seq": len(log), "id": draft_id, "context": text(seed), "checks": checks})
            followed.logged(log[-1]["seq"], draft_id)
        for draft_id, _, _ in waiting[20:]:
            followed.forget(draft_id)
        followed.close()
        followed = Duplicates(path, 0.8)
        assert len(log) == followed.next_seq
    followed.close()
    made = Duplicates(tmp_path / "made.sqlite", 0.8)
    made.catch_up(log)
    made.close()

    with closing(sqlite3.connect(path)) as one, closing(sqlite3.connect(made.path)) as other:
        assert [*one.iterdump()] == [*other.iterdump()]


def test_of_texts_that_come_at_once_exactly_one_is_the_original(duplicates: Duplicates) -> None:
    """Look-up and insertion are one act, whatever the threads do."""
    threads = 8
    for number in range(20):
        barrier = Barrier(threads)

        def check(mine: int, number: int = number, barrier: Barrier = barrier) -> Match | None:
            barrier.wait()
            return duplicates.check_and_add(f"{number}-{mine}", near(number, mine % 3))

        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(check, range(threads)))

        originals = [f"{number}-{mine}" for mine in range(threads) if found[mine] is None]
        assert 1 == len(originals)
        assert {originals[0]} == {match.id for match in found if match}


def test_a_later_run_goes_on_where_the_log_ends(tmp_path: Path) -> None:
    """What came into the log is known to the next run, and is read only once more."""
    path = tmp_path / "d.sqlite"
    first = Duplicates(path, 0.8)
    assert first.catch_up([])
    first.check_and_add("draft-0", text(0))
    first.close()
    read: list[int] = []

    def log(rows: int, start: int) -> Iterator[dict[str, Any]]:
        for seq in range(start, rows):
            read.append(seq)
            yield row(seq)

    second = Duplicates(path, 0.8)
    assert second.catch_up(log(3, second.next_seq))
    assert Match("draft-0", 1.0) == second.check_and_add("x", text(0))
    assert Match("draft-2", 1.0) == second.check_and_add("y", text(2))
    second.close()

    third = Duplicates(path, 0.8)
    assert third.catch_up(log(3, third.next_seq))
    assert [0, 1, 2] == read
    assert Match("draft-1", 1.0) == third.check_and_add("z", text(1))
    third.close()


def test_what_a_kill_kept_from_the_log_is_forgotten(tmp_path: Path) -> None:
    """A text that is in the file but not in the log does not make a different context a duplicate."""
    path = tmp_path / "d.sqlite"
    killed = Duplicates(path, 0.8)
    killed.catch_up([row(0)])
    killed.check_and_add("draft-1", text(1))
    killed.check_and_add("ghost", text(7))
    killed.close()

    resumed = Duplicates(path, 0.8)
    resumed.catch_up([row(0), row(1)])

    assert resumed.check_and_add("new", text(7)) is None
    assert Match("draft-1", 1.0) == resumed.check_and_add("other", text(1))
    resumed.close()


def test_a_kill_costs_nothing_that_the_log_has(tmp_path: Path) -> None:
    """SIGKILL before anything was written to disk: the next run reads it from the log."""
    path = tmp_path / "d.sqlite"
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from streamsyn.scoring.duplicates import Duplicates\n"
        "from tests.scoring.test_duplicates import text\n"
        f"duplicates = Duplicates(Path({str(path)!r}), 0.8)\n"
        "for number in range(5):\n"
        "    duplicates.check_and_add(f'draft-{number}', text(number))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert -9 == killed.returncode

    resumed = Duplicates(path, 0.8)
    resumed.catch_up([row(seq) for seq in range(3)])

    found = [resumed.check_and_add(f"new-{seq}", near(seq)) for seq in range(5)]
    assert ["draft-0", "draft-1", "draft-2", None, None] == [match and match.id for match in found]
    resumed.close()


def test_logged_duplicates_do_not_become_originals(duplicates: Duplicates) -> None:
    """Built from the log the index is what it was when the contexts were written."""
    duplicates.catch_up([row(0), row(1, near_duplicate={"id": "x", "similarity": 0.9}), row(2)])

    assert duplicates.check_and_add("new", text(1)) is None
    assert Match("draft-2", 1.0) == duplicates.check_and_add("other", text(2))


def test_a_missing_file_is_made_anew_with_one_warning(tmp_path: Path) -> None:
    """From the log alone; a run that begins with nothing is not warned."""
    with capture_logs() as logs:
        fresh = Duplicates(tmp_path / "fresh.sqlite", 0.8)
        fresh.catch_up([])
        fresh.close()
        assert [] == logs
        duplicates = Duplicates(tmp_path / "d.sqlite", 0.8)
        duplicates.catch_up([row(seq) for seq in range(1200)])

    assert ["duplicates.rebuilt"] == [entry["event"] for entry in logs]
    assert Match("draft-1100", 1.0) == duplicates.check_and_add("new", text(1100))
    duplicates.close()


@pytest.mark.parametrize("offset", [0, 20, 4096, 3 * 4096, -4096])
def test_a_damaged_file_is_made_anew_with_one_warning(tmp_path: Path, offset: int) -> None:
    """Wherever the damage is: found when it is opened, or when it is read."""
    path = tmp_path / "d.sqlite"
    rows = [row(seq) for seq in range(300)]
    whole = Duplicates(path, 0.8)
    whole.catch_up(rows)
    whole.close()
    spoilt = bytearray(path.read_bytes())
    place = offset % len(spoilt)
    spoilt[place : place + 4096] = b"\xff" * 4096
    path.write_bytes(spoilt)

    with capture_logs() as logs:
        duplicates = Duplicates(path, 0.8)
        while not duplicates.catch_up(rows[duplicates.next_seq :]):
            pass
        found = [duplicates.check_and_add(f"new-{seq}", near(seq)) for seq in range(300)]
        if None in found:  # it was found only now: the next start mends it
            duplicates.close()
            duplicates = Duplicates(path, 0.8)
            assert 0 == duplicates.next_seq
            assert duplicates.catch_up(rows)
            found = [duplicates.check_and_add(f"new-{seq}", near(seq)) for seq in range(300)]

    assert [f"draft-{seq}" for seq in range(300)] == [match and match.id for match in found]
    assert "duplicates.rebuilt" == logs[0]["event"]
    assert {"duplicates.rebuilt"} == {entry["event"] for entry in logs}
    duplicates.close()


def test_a_file_whose_schema_is_not_text_is_made_anew(tmp_path: Path) -> None:
    """SQLite quotes it in its error."""
    path = tmp_path / "d.sqlite"
    whole = Duplicates(path, 0.8)
    whole.catch_up([row(0)])
    whole.close()
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE", b"CREATE \xff\xff\xff\xff\xff"))

    with capture_logs() as logs:
        duplicates = Duplicates(path, 0.8)
        assert 0 == duplicates.next_seq
        assert duplicates.catch_up([row(0)])

    assert ["duplicates.rebuilt"] == [entry["event"] for entry in logs]
    assert Match("draft-0", 1.0) == duplicates.check_and_add("new", text(0))
    duplicates.close()


def test_a_file_for_another_threshold_is_made_anew(tmp_path: Path) -> None:
    """Its bands cannot be compared, so all contexts are read again."""
    path = tmp_path / "d.sqlite"
    strict = Duplicates(path, 0.95)
    strict.catch_up([row(0)])
    strict.close()

    loose = Duplicates(path, 0.5)

    assert 0 == loose.next_seq
    loose.catch_up([row(0)])
    assert Match("draft-0", 1.0) == loose.check_and_add("new", text(0))
    loose.close()


def test_a_full_disk_ends_the_comparison_and_not_the_run(tmp_path: Path) -> None:
    """One warning, and from then on nothing is a duplicate."""
    duplicates = Duplicates(tmp_path / "d.sqlite", 0.8)
    duplicates.check_and_add("a", text(1))

    with capture_logs() as logs:
        with disk_full_beyond(50_000):
            assert duplicates.catch_up([row(seq) for seq in range(1, 600)])

        assert duplicates.check_and_add("again", text(1)) is None
        assert duplicates.catch_up([row(0)])
        duplicates.forget("a")
        duplicates.close()

    assert ["duplicates.off"] == [entry["event"] for entry in logs]


def test_a_place_that_cannot_be_written_switches_it_off(tmp_path: Path) -> None:
    """A file where the folder should be: one warning, no error."""
    (tmp_path / "index").write_text("a file")

    with capture_logs() as logs:
        duplicates = Duplicates(tmp_path / "index" / "d.sqlite", 0.8)
        assert duplicates.check_and_add("a", text(1)) is None
        assert duplicates.catch_up([row(0)])
        duplicates.close()

    assert ["duplicates.off"] == [entry["event"] for entry in logs]


@examples(25)
@given(steps=st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_the_index_says_what_the_log_says(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool, bool]]
) -> None:
    """However often a run is killed, each text is a duplicate if and only if an original is in the log.

    Each step writes one of six texts; it may be kept from the log by a kill.
    """
    path = tmp_path_factory.mktemp("model") / "d.sqlite"
    logged: list[dict[str, Any]] = []
    duplicates = Duplicates(path, 0.8)
    duplicates.catch_up([])
    for number, (seed, killed, lost) in enumerate(steps):
        originals = {r["context"]: r["id"] for r in logged if not r["checks"]}
        match = duplicates.check_and_add(f"{number}", text(seed))
        assert originals.get(text(seed)) == (match and match.id)
        if not (killed and lost):
            checks = {"near_duplicate": {"id": match.id}} if match else {}
            logged.append({"seq": len(logged), "id": f"{number}", "context": text(seed), "checks": checks})
        if killed:
            duplicates.close()
            duplicates = Duplicates(path, 0.8)
            duplicates.catch_up(logged[duplicates.next_seq :])
    duplicates.close()
