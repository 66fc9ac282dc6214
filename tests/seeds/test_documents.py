"""Seeds that are documents, from every kind of source."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import datasets
import orjson
import pyarrow
import pyarrow.parquet
import pytest

from streamsyn.config.sections import FieldsSection, SeedsSection, SourceSection
from streamsyn.io.rows import Line
from streamsyn.records import BadSeed, Entry, RejectReason, Seed, digest
from streamsyn.seeds.parse import SeedParser
from streamsyn.seeds.reader import SeedReader
from streamsyn.seeds.stdin import SeedSpool, StdinSource

pytestmark = pytest.mark.timeout(30)

ROWS: list[dict[str, Any]] = [
    {"context": f"Document {number} is  long.\n\nIt ends.", "id": f"d{number}", "year": number}
    for number in range(40)
]


def parse(row: dict[str, Any], fields: FieldsSection | None = None) -> Entry | None:
    text = orjson.dumps(row)
    parser = SeedParser(fields or FieldsSection(), takes_documents=True)
    return parser.line(Line(17, text, len(text)), "docs.jsonl", "docs", 1 << 20)


def read(path: Path) -> list[Entry]:
    section = SeedsSection(sources=(SourceSection(path=str(path)),))
    reader = SeedReader(section, 0, None, takes_documents=True)
    return [entry for batch in reader.batches(lambda _: False) for entry in batch]


def expected(task: str, origin: str) -> list[Seed]:
    return [
        Seed(row["id"], task, "", "", f"{origin}:{number}", {"year": row["year"]}, row["context"])
        for number, row in enumerate(ROWS, 1)
    ]


def test_a_document_is_a_seed() -> None:
    """Its text is the context alone; the id is a hash of it."""
    seed = parse({"context": " Some text.\n", "lang": "en"})
    text = " Some text.\n"
    assert Seed(digest(text).hex(), "docs", "", "", "docs.jsonl:17", {"lang": "en"}, text) == seed


def test_a_pair_beside_a_document_is_metadata() -> None:
    """It may be looked at later, and is not what is asked for."""
    row = {"context": "Text.", "id": 3, "task": "qa", "instruction": "Who?", "answer": "Ada.", "messages": []}
    others = {"instruction": "Who?", "answer": "Ada.", "messages": []}
    assert Seed("3", "qa", "", "", "docs.jsonl:17", others, "Text.") == parse(row)


def test_the_field_may_have_another_name() -> None:
    """Then a field with our name is metadata."""
    seed = parse({"text": "A text.", "context": "where it is from"}, FieldsSection(context="text"))
    assert isinstance(seed, Seed)
    assert ("A text.", {"context": "where it is from"}) == (seed.context, seed.metadata)


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        (
            {"instruction": "Who?", "answer": "Ada."},
            "field 'context' is missing; fields: answer, instruction",
        ),
        ({}, "field 'context' is missing; fields: none; set seeds.fields.context"),
        ({"context": None}, "field 'context' is missing"),
        ({"context": ""}, "field 'context' is empty"),
        ({"context": " \n"}, "field 'context' is empty"),
        ({"context": ["a", "b"]}, "field 'context' is not a string but list"),
    ],
)
def test_a_line_without_a_document_is_a_bad_seed(row: dict[str, Any], detail: str) -> None:
    """Named by file and line, like any bad line."""
    bad = parse(row)
    assert isinstance(bad, BadSeed)
    assert (RejectReason.NOT_A_SEED, "docs.jsonl:17") == (bad.reason, bad.origin)
    assert bad.detail.startswith(detail)


def test_a_context_beside_a_pair_stays_metadata() -> None:
    """For recipes that take pairs nothing has changed."""
    text = b'{"instruction": "Who?", "answer": "Ada.", "context": "A text."}'
    seed = SeedParser(FieldsSection()).line(Line(1, text, len(text)), "f", "t", 1000)
    assert Seed(digest("Who?", "Ada.").hex(), "t", "Who?", "Ada.", "f:1", {"context": "A text."}) == seed


def test_documents_in_files(tmp_path: Path) -> None:
    """Lines, Parquet and a saved dataset hold the same ones."""
    lines, table, saved = tmp_path / "books.jsonl", tmp_path / "books.parquet", tmp_path / "books"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(saved))
    for path in (lines, table, saved):
        assert expected("books", str(path)) == read(path)


def test_documents_through_a_pipe(tmp_path: Path) -> None:
    """They are spooled whole, and replayed as they were, however long they are."""
    rows = [{**row, "context": row["context"] * 2000} for row in ROWS]
    reading, writing = os.pipe()
    spool, path = SeedSpool(tmp_path / "spool"), tmp_path / "rows"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = StdinSource(reading, None, SeedsSection(), takes_documents=True)

    def feed() -> None:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(path.read_bytes())

    feeding = threading.Thread(target=feed)
    feeding.start()
    piped = [entry for batch in spool.follow(source.batches(), lambda _: False) for entry in batch]
    feeding.join()
    os.close(reading)
    batches = list(spool.replay())
    assert [row["context"] for row in rows] == [entry.context for entry in piped if isinstance(entry, Seed)]
    assert piped == [entry for batch in batches for entry in batch]
    assert max(len(batch) for batch in batches) < 20  # batches are bounded by their bytes, too
