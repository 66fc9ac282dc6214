"""Ids that begin anew in each file: no pair is lost, and a resumed run gives the same ids."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.config.sections import SeedsSection, SourceSection
from streamsyn.errors import SinkError
from streamsyn.io.derived import SQLITE_ERRORS
from streamsyn.records import BadSeed, Entry, RejectReason, Seed, digest
from streamsyn.seeds.id_owners import IdOwners
from streamsyn.seeds.reader import SeedReader
from tests.examples import examples


def seed(name: str, number: int, text: str) -> Seed:
    """A seed of the file `name`, with the id and the pair that are given."""
    return Seed(str(number), "task", text, "Ada.", f"d/{name}.jsonl:{number + 1}")


def ids(path: Path, *entries: Entry) -> list[str]:
    owners = IdOwners(path)
    found = [entry.id for entry in owners.own(entries) if isinstance(entry, Seed)]
    owners.close()
    return found


A, B, C = seed("a", 0, "Who?"), seed("b", 0, "When?"), seed("c", 0, "When?")


def test_a_different_pair_gets_an_id_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named after its file; the same pair under the same id stays a duplicate, wherever it is."""
    owned = ids(tmp_path / "ids.sqlite", A, B, C, A)

    assert ["0", owned[1], owned[1], "0"] == owned
    assert owned[1].startswith("0@b-")
    assert "seeds.id_taken" in capsys.readouterr().out


@pytest.mark.parametrize("read_before", [(), (A,), (A, B)])
def test_the_order_of_files_does_not_matter_to_a_resumed_run(
    tmp_path: Path, read_before: Sequence[Seed]
) -> None:
    """Who owned an id before a kill owns it afterwards."""
    first = ids(tmp_path / "ids.sqlite", *read_before)
    resumed = ids(tmp_path / "ids.sqlite", B, A)

    assert first == [*reversed(resumed)][: len(first)]
    assert 2 == len({*resumed})


@examples(100)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.sampled_from(["Who?", "When?", "Why?"])))
)
def test_an_id_stands_for_one_pair(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int, str]]
) -> None:
    """And a pair that came under one id has one id, read in one batch or one by one, and again."""
    path = tmp_path_factory.mktemp("ids")
    seeds = [seed(*row) for row in rows]
    at_once = ids(path / "a.sqlite", *seeds)
    one_by_one = [name for one in seeds for name in ids(path / "b.sqlite", one)]

    assert at_once == one_by_one == ids(path / "a.sqlite", *seeds)
    pairs = {(one.id, one.instruction) for one in seeds}
    assert len(pairs) == len(set(at_once))


def test_content_hashes_and_bad_lines_need_no_owner(tmp_path: Path) -> None:
    """The file is not even made for them."""
    hashed = Seed(digest("Who?", "Ada.").hex(), "task", "Who?", "Ada.", "a.jsonl:1")
    document = Seed(digest("Text.").hex(), "task", "", "", "a.jsonl:2", context="Text.")
    bad = BadSeed("a.jsonl:3", RejectReason.INVALID_JSON, "nix", b"k" * 16)
    path = tmp_path / "index" / "ids.sqlite"

    assert [hashed, document, bad] == IdOwners(path).own([hashed, document, bad])
    assert not path.exists()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_chat_with_and_without_a_system_message_are_two_seeds(
    tmp_path: Path, first: int, batches: int
) -> None:
    """They have the same hash: the one that is read first keeps it, in this run and when it is resumed."""
    name = digest("Who?", "Ada.").hex()
    bare = Seed(name, "task", "Who?", "Ada.", "a.jsonl:1")
    both = [bare, Seed(name, "task", "Be brief.\n\nWho?", "Ada.", "a.jsonl:2")]
    both = both[::-1] if first else both
    parts = [both] if batches == 1 else [[one] for one in both]

    def read() -> list[str]:
        owners = IdOwners(tmp_path / "ids.sqlite")
        found: list[str] = []

        def is_taken(seed_id: str) -> bool:
            return seed_id in found

        for part in parts:
            owned = owners.own(part, is_taken)
            found += [entry.id for entry in owned if isinstance(entry, Seed)]
        owners.close()
        return found

    ids_first = read()
    assert name == ids_first[0]
    assert 2 == len(set(ids_first))
    assert ids_first == read()


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    """Ids belong to the pairs that are read first from then on."""
    path = tmp_path / "ids.sqlite"
    path.write_bytes(b"not SQLite" * 1000)

    assert ["0"] == ids(path, B)
    assert ["0"] == ids(path, B)


def test_a_full_disk_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops, and can be resumed."""
    owners = IdOwners(tmp_path / "ids.sqlite")
    assert issubclass(sqlite3.Error, SQLITE_ERRORS)
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL

    def fails(*_: object) -> list[Entry]:
        raise full

    monkeypatch.setattr(owners, "_own", fails)

    with pytest.raises(SinkError, match=r"ids\.sqlite: database or disk is full; make room"):
        owners.own([A])


def test_two_files_with_the_same_ids_are_read_whole(tmp_path: Path) -> None:
    """Through the reader, with a note for the summary."""
    for name in "ab":
        rows = (f'{{"id": {n}, "instruction": "{name} {n}?", "answer": "x"}}\n' for n in range(3))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    section = SeedsSection(sources=(SourceSection(path=str(tmp_path)),))
    reader = SeedReader(section, 0, None, ids=tmp_path / "out" / "ids.sqlite")

    entries = [entry for batch in reader.batches(lambda _: False) for entry in batch]
    found = [entry.id for entry in entries if isinstance(entry, Seed)]

    assert 6 == len(set(found))
    assert ["0", "1", "2"] == found[:3]
    assert ["3 with the id of a different pair, kept as ID@FILE-HASH"] == list(reader.notes())
