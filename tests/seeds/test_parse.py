"""From a line to a seed: what is wrong with a line is said, with its place; no line stops a run."""

import datetime
import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsyn.config.sections import FieldsSection
from streamsyn.io.rows import Line
from streamsyn.records import BadSeed, Entry, RejectReason, Seed, digest
from streamsyn.seeds.parse import SeedParser
from tests.examples import examples, in_turn

TEXT = st.text(st.characters(codec="utf-8"))
WORDS = TEXT.filter(str.strip)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(TEXT, below, max_size=3),
    max_leaves=10,
)
TAKEN = {"instruction", "answer", "id", "task"}


def parse(text: bytes, number: int = 17, fields: FieldsSection | None = None) -> Entry | None:
    parser = SeedParser(fields or FieldsSection())
    return parser.line(Line(number, text, len(text)), "seeds.jsonl", "seeds", 1 << 20)


def seed_in(row: dict[str, Any], fields: FieldsSection | None = None) -> Seed:
    entry = parse(json.dumps(row).encode(), fields=fields)
    assert isinstance(entry, Seed)
    return entry


def bad_in(text: bytes) -> BadSeed:
    entry = parse(text)
    assert isinstance(entry, BadSeed)
    return entry


@settings(deadline=None)
@given(
    instruction=WORDS,
    answer=WORDS,
    seed_id=TEXT.filter(bool) | st.integers(0, 2**63),
    task=TEXT.filter(bool),
    metadata=st.dictionaries(TEXT.filter(lambda name: name not in TAKEN), JSON_VALUES, max_size=4),
)
def test_a_seed_comes_through_unchanged(
    instruction: str, answer: str, seed_id: str | int, task: str, metadata: dict[str, Any]
) -> None:
    """Texts are taken as they are; other fields travel along."""
    row = {"instruction": instruction, "answer": answer, "id": seed_id, "task": task, **metadata}

    expected = Seed(str(seed_id), task, instruction, answer, "seeds.jsonl:17", metadata)

    assert expected == parse(orjson.dumps(row))


def test_id_and_task_have_defaults() -> None:
    """The id is a hash of the content, the task the source's; null and "" count as left out."""
    content = digest("Who?", "Ada.").hex()
    rows: list[dict[str, Any]] = [{}, {"id": None, "task": None}, {"id": "", "task": ""}]

    seeds = [seed_in({"instruction": "Who?", "answer": "Ada.", **row}) for row in rows]

    assert [(content, "seeds")] * 3 == [(seed.id, seed.task) for seed in seeds]


def test_the_same_content_has_the_same_id() -> None:
    """Order of fields, spaces, place and other fields do not count; the text does."""
    lines = [
        b'{"instruction": "Who?", "answer": "Ada."}',
        b'{"answer":"Ada.","instruction":"Who?","source":"web"}',
        b'{"messages":[{"role":"user","content":"Who?"},{"role":"assistant","content":"Ada."}]}',
    ]
    entries = [parse(line, number) for number, line in enumerate(lines)]
    other = seed_in({"instruction": "Who?A", "answer": "da."})

    ids = {entry.id for entry in entries if isinstance(entry, Seed)}
    assert {digest("Who?", "Ada.").hex()} == ids
    assert other.id not in ids


@pytest.mark.parametrize(("value", "expected"), [("a-1", "a-1"), (7, "7"), (0, "0"), (-1, "-1")])
def test_an_id_is_text_or_a_whole_number(value: str | int, expected: str) -> None:
    """Numbers are common as ids; they become text."""
    assert expected == seed_in({"instruction": "Who?", "answer": "Ada.", "id": value}).id


def test_fields_may_have_other_names() -> None:
    """Mapped names take the place of ours; what has our names is metadata then."""
    fields = FieldsSection(instruction="question", answer="gold", id="key", task="kind", messages="chat")
    row = {"question": "Who?", "gold": "Ada.", "key": 3, "kind": "qa", "answer": "?", "messages": []}

    seed = seed_in(row, fields)

    expected = Seed("3", "qa", "Who?", "Ada.", "seeds.jsonl:17", {"answer": "?", "messages": []})
    assert expected == seed


def chat(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    "messages",
    [
        chat(("user", "Who?"), ("assistant", "Ada.")),
        chat(("system", "Be brief."), ("user", "Who?"), ("assistant", "Ada.")),
    ],
)
def test_a_chat_pair_is_a_seed(messages: list[dict[str, Any]]) -> None:
    """One question and its answer, behind the system message; the chat is no metadata."""
    seed = seed_in({"messages": messages, "lang": "en"})
    asked = "Who?" if len(messages) == 2 else "Be brief.\n\nWho?"

    assert (asked, "Ada.", {"lang": "en"}) == (seed.instruction, seed.answer, seed.metadata)
    assert digest("Who?", "Ada.").hex() == seed.id  # of runs that left the system message aside


def test_named_fields_win_over_a_chat() -> None:
    """Where there are an instruction and an answer, `messages` is metadata."""
    messages = chat(("user", "No?"), ("assistant", "No."))

    seed = seed_in({"instruction": "Who?", "answer": "Ada.", "messages": messages})

    assert ("Who?", "Ada.", {"messages": messages}) == (seed.instruction, seed.answer, seed.metadata)


@pytest.mark.parametrize("text", [b"", b"  ", b"\t", b" \r"])
def test_blank_lines_are_skipped(text: bytes) -> None:
    """They are neither seeds nor rejects."""
    assert parse(text) is None


QA = b'"instruction":"Who?","answer":"Ada."'


@in_turn(
    ("text", "detail"),
    [
        (b'{"instruction": "Who?"', "unexpected end of data"),
        (b"{} {}", "at column 4"),
        (b"Who? Ada.", "at column 1: 'Who? Ada.'"),
        (b'{"instruction": "\\ud800", "answer": "a"}', "surrogate"),
        (b"[" * 100_000, "at column"),
    ],
)
def test_what_is_no_json_is_said_with_its_column(text: bytes, detail: str) -> None:
    """The message names the column, and quotes only the start of the line."""
    bad = bad_in(text)

    assert (RejectReason.INVALID_JSON, "seeds.jsonl:17") == (bad.reason, bad.origin)
    assert detail in bad.detail
    assert len(bad.detail) < 300


@pytest.mark.parametrize(
    ("text", "offset"),
    [
        (b'{"instruction": "\xff"}', 17),
        (b'{"instruction": "caf\xe9", "answer": "latin-1"}', 20),
        (b'{"instruction": "\xed\xa0\x80"}', 17),
        ('{"instruction": "Who?"}'.encode("utf-16"), 0),
    ],
)
def test_what_is_no_utf8_is_said_with_its_byte(text: bytes, offset: int) -> None:
    """A wrong encoding has a reason of its own, because it is repaired differently from broken JSON."""
    bad = bad_in(text)

    assert (RejectReason.INVALID_UTF8, "seeds.jsonl:17") == (bad.reason, bad.origin)
    assert bad.detail.startswith(f"invalid UTF-8 at byte {offset}: ")


@in_turn(
    ("text", "detail"),
    [
        (b"[]", "not a JSON object but list"),
        (b'"Who?"', "not a JSON object but str"),
        (b"null", "not a JSON object but NoneType"),
        (b"{}", "field 'instruction' is missing; fields: none"),
        (
            b'{"ask":"Who?","answer":"Ada."}',
            "'instruction' is missing; fields: answer, ask; set",
        ),
        (b'{"instruction":"Who?"}', "field 'answer' is missing"),
        (b'{"instruction":"Who?","answer":null}', "field 'answer' is missing"),
        (b'{"instruction":"Who?","answer":""}', "field 'answer' is empty"),
        (b'{"instruction":" \\n","answer":"Ada."}', "field 'instruction' is empty"),
        (b'{"instruction":"Who?","answer":[" ", null]}', "field 'answer' is empty"),
        (
            b'{"instruction":"Who?","answer":{"a": 1}}',
            "field 'answer' holds no text, number or list of these but dict",
        ),
        (b'{"instruction":7,"answer":"Ada."}', "field 'instruction' is not a string but int"),
        (b'{"messages":"Who?"}', "field 'messages' is not a list of messages"),
        (b'{"messages":["Who?"]}', "field 'messages' is not a list of messages"),
        (b'{"messages":[]}', "field 'instruction' is missing; fields: messages"),
        (b'{"messages":[{"role":"user","content":"Who?"}]}', "(roles: user)"),
        (b'{"messages":[{"role":"user"},{"role":"assistant"}]}', "(roles: user, assistant)"),
        (
            orjson.dumps({"messages": chat(("user", [{"type": "image_url"}]), ("assistant", "Ada."))}),
            "field 'content' has a part that is not text but 'image_url'",
        ),
        (orjson.dumps({"messages": chat(("assistant", "a"), ("user", "b"))}), "(roles: assistant, user)"),
    ],
)
def test_what_is_no_seed_is_said(text: bytes, detail: str) -> None:
    """The message names the field and what is wrong with it."""
    bad = bad_in(text)

    assert (RejectReason.NOT_A_SEED, "seeds.jsonl:17") == (bad.reason, bad.origin)
    assert detail in bad.detail


def test_a_line_too_long_is_said_with_its_size() -> None:
    """The message names the key of the limit."""
    entry = SeedParser(FieldsSection()).line(Line(3, None, 50), "seeds.jsonl", "seeds", 10)

    assert isinstance(entry, BadSeed)
    assert (RejectReason.LINE_TOO_LONG, "seeds.jsonl:3") == (entry.reason, entry.origin)
    assert "50 bytes, more than seeds.max_line_bytes = 10" == entry.detail


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**100])
def test_numbers_beyond_64_bits_are_kept_as_text(number: int) -> None:
    """JSON does not limit numbers, the log does: no digit is lost."""
    seed = seed_in({"instruction": "Who?", "answer": "Ada.", "big": number, "most": 2**64 - 1})

    assert {"big": str(number), "most": 2**64 - 1} == orjson.loads(orjson.dumps(seed.metadata))


@in_turn(
    ("value", "expected"),
    [
        (2**64, "18446744073709551616"),
        (b"\xff", "b'\\xff'"),
        (float("nan"), "NaN"),
        (float("-inf"), "-Infinity"),
        (Decimal("1.50"), "1.50"),
        (datetime.datetime(2024, 2, 29, 12), "2024-02-29T12:00:00"),
        (datetime.timedelta(days=1), "1 day, 0:00:00"),
        ("a\udfff", "a\\udfff"),
        ({1: (1, {2})}, {"1": [1, [2]]}),
        (object, "<class 'object'>"),
    ],
)
def test_no_value_of_another_field_costs_a_pair(value: Any, expected: Any) -> None:
    """What JSON cannot hold travels as text."""
    row = {"instruction": "Who?", "answer": "Ada.", "other": value}

    entry = SeedParser(FieldsSection()).row(row, "table.parquet:1", "table", b"row")

    assert isinstance(entry, Seed)
    assert {"other": expected} == entry.metadata == orjson.loads(orjson.dumps(entry.metadata))


def test_nan_and_lone_surrogates_beside_a_pair_are_text() -> None:
    """In JSON lines that Python or pandas has written, too."""
    entry = parse(b"{" + QA + b', "score": NaN, "least": -Infinity, "odd": "\\ud800", "far": 1e999}')

    assert isinstance(entry, Seed)
    assert {"score": "NaN", "least": "-Infinity", "odd": "\\ud800", "far": "1e999"} == entry.metadata


@pytest.mark.parametrize(("value", "expected"), [(1.0, "1"), (1.5, "1.5"), (2**70, str(2**70))])
def test_an_id_may_be_any_number(value: float, expected: str) -> None:
    """As tables have them."""
    assert expected == seed_in({"instruction": "Who?", "answer": "Ada.", "id": value}).id


@pytest.mark.parametrize("value", [True, ["a"], {"a": 1}, float("nan")])
def test_what_cannot_be_an_id_or_a_task_is_another_field(value: Any) -> None:
    """The seed has the id of its content and the task of its source, as without these fields."""
    row = {"instruction": "Who?", "answer": "Ada.", "id": value, "task": value}
    entry = SeedParser(FieldsSection()).row(row, "table.parquet:1", "table", b"row")

    assert isinstance(entry, Seed)
    assert (digest("Who?", "Ada.").hex(), "table") == (entry.id, entry.task)
    assert {"id", "task"} == entry.metadata.keys()


@pytest.mark.parametrize("value", [None, "", []])
def test_an_id_or_task_that_holds_nothing_is_not_kept(value: Any) -> None:
    """Neither as an id nor as another field."""
    seed = seed_in({"instruction": "Who?", "answer": "Ada.", "id": value, "task": value})

    assert (digest("Who?", "Ada.").hex(), "seeds", {}) == (seed.id, seed.task, seed.metadata)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OverflowError("year 10000"), RejectReason.NOT_A_SEED),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), RejectReason.INVALID_UTF8),
    ],
)
def test_a_value_that_python_cannot_hold_costs_the_row_if_the_seed_needs_it(
    error: Exception, reason: RejectReason
) -> None:
    """In another field the text that stands for it is kept."""
    row = {"instruction": "Who?", "answer": "10000-01-01", "at": "10000-01-01"}
    parser = SeedParser(FieldsSection())

    bad = parser.row(row, "table.parquet:1", "table", b"row", {"answer": error})
    assert isinstance(bad, BadSeed)
    assert (reason, f"the row cannot be read: {error}") == (bad.reason, bad.detail)
    assert isinstance(parser.row(row, "table.parquet:1", "table", b"row", {"at": error}), Seed)


@in_turn("depth", [190, 199, 200, 230, 1000, 1023, 1024, 5000])
def test_a_seed_that_is_taken_can_be_written_wherever_it_goes(depth: int) -> None:
    """A log line nests other fields deeper than the seed did: that still has to be possible."""
    entry = parse(b"{" + QA + b',"deep":' + b"[" * depth + b"]" * depth + b"}")

    if isinstance(entry, Seed):
        assert orjson.dumps({"seed": entry, "more": [[[entry.metadata]]]})
    else:
        assert depth > 1000  # which is not valid JSON for the decoder


@examples(300)
@given(
    text=st.binary()
    | JSON_VALUES.map(orjson.dumps)
    | st.dictionaries(
        st.sampled_from(["instruction", "answer", "id", "task", "messages", "x"]), JSON_VALUES
    ).map(orjson.dumps)
)
def test_no_line_breaks_the_parser(text: bytes) -> None:
    """Whatever a line holds: a seed, a bad seed that names its place, or nothing; all can be written."""
    entry = parse(text)

    if entry is None:
        assert not text.strip()
    else:
        assert "seeds.jsonl:17" == entry.origin
        assert orjson.dumps(entry, default=bytes.hex)


def test_a_bad_line_is_known_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its key identifies the absolute path, the line number and the bytes."""
    path = tmp_path / "seeds.jsonl"
    parser = SeedParser(FieldsSection())

    def key(source: str, number: int, text: bytes) -> bytes:
        entry = parser.line(Line(number, text, len(text)), source, "seeds", 100)
        assert isinstance(entry, BadSeed)
        return entry.key

    first, piped = key(str(path), 1, b"nix"), key("-", 1, b"nix")
    others = {key(str(path), 2, b"nix"), key(str(path), 1, b"nox"), key("other.jsonl", 1, b"nix"), piped}
    monkeypatch.chdir(tmp_path)

    assert first == key("seeds.jsonl", 1, b"nix")
    assert piped == key("-", 1, b"nix")
    assert first not in others
    assert 4 == len(others)


def test_memory_of_a_bad_line_is_bounded() -> None:
    """A detail shows the start of a long line, not all of it."""
    bad = bad_in(b"x" * 1_000_000)

    assert sys.getsizeof(bad.detail) < 1000
