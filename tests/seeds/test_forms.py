"""The forms in which people have pairs: found for each row, without any setting."""

from typing import Any

import orjson
import pytest

from streamsyn.config.sections import FieldsSection, SeedFormat
from streamsyn.io.rows import Line
from streamsyn.records import BadSeed, Entry, Seed, digest
from streamsyn.seeds.forms import FormsSeen
from streamsyn.seeds.parse import SeedParser
from tests.examples import in_turn


def parse(row: dict[str, Any], fields: FieldsSection | None = None, form: SeedFormat = "auto") -> Entry:
    text = orjson.dumps(row)
    entry = SeedParser(fields or FieldsSection(), form=form).line(
        Line(1, text, len(text)), "a.jsonl", "a", 2**20
    )
    assert entry is not None
    return entry


def pair(row: dict[str, Any], **options: Any) -> tuple[str, str]:
    entry = parse(row, **options)
    assert isinstance(entry, Seed), entry
    return entry.instruction, entry.answer


def said(*turns: tuple[str, Any], names: tuple[str, str] = ("role", "content")) -> list[dict[str, Any]]:
    return [dict(zip(names, turn, strict=True)) for turn in turns]


CHAT = said(("user", "Who?"), ("assistant", "Ada."))
SHAREGPT = said(("human", "Who?"), ("gpt", "Ada."), names=("from", "value"))
PARTS = said(("user", [{"type": "text", "text": "Who?"}]), ("assistant", [{"type": "text", "text": "Ada."}]))


@in_turn(
    "row",
    [
        {"instruction": "Who?", "output": "Ada."},
        {"instruction": "Who?", "input": "", "output": "Ada."},
        {"instruction": "Who?", "response": "Ada.", "context": ""},
        {"messages": CHAT},
        {"messages": PARTS},
        {"conversations": SHAREGPT},
        {"conversations": CHAT},
        {"messages": SHAREGPT},
        {"prompt": "Who?", "completion": "Ada."},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"input": "Who?", "output": "Ada."},
        {"question": "Who?", "answer": "Ada."},
        {"question": "Who?", "answers": ["Ada.", "A. L."], "context": "Ada did."},
        {"question": "Who?", "answers": {"text": ["Ada.", "A. L."], "answer_start": [0, 0]}},
        {"question": "Who?", "answer": {"value": "Ada.", "aliases": ["A. L."]}},
        {"input": "Who?", "answers": ["Ada."], "context": "Ada did.", "length": 2},
        {"query": "Who?", "response": "Ada."},
        {"instruction": "Who?", "answer": ["Ada.", "A. L."]},
        {"instruction": None, "answer": None, "messages": CHAT},
        {"instruction": "", "answer": "", "messages": CHAT},
        {"messages": None, "instruction": "Who?", "answer": "Ada."},
    ],
)
def test_a_row_is_read_by_its_fields(row: dict[str, Any]) -> None:
    """The pair is the same in every form, and so is its id."""
    entry = parse(row)

    assert isinstance(entry, Seed)
    assert ("Who?", "Ada.", digest("Who?", "Ada.").hex()) == (entry.instruction, entry.answer, entry.id)


@in_turn(("answer", "expected"), [(42, "42"), (0, "0"), (1.5, "1.5"), (True, "true"), ([7], "7")])
def test_a_number_is_an_answer(answer: Any, expected: str) -> None:
    """As text."""
    assert ("How many?", expected) == pair({"instruction": "How many?", "answer": answer})


def test_the_input_of_alpaca_is_a_part_of_the_question() -> None:
    """Also where the output was mapped; templates still find it by itself."""
    row = {"instruction": "Name the colour.", "input": "It was red.", "output": "red", "source": "x"}
    mapped = FieldsSection(answer="output")

    entries = [parse(row), parse(row, mapped)]

    assert [("Name the colour.\n\nIt was red.", "red")] * 2 == [pair(row), pair(row, fields=mapped)]
    assert [{"source": "x", "input": "It was red."}] * 2 == [
        entry.metadata for entry in entries if isinstance(entry, Seed)
    ]


def test_a_field_of_that_name_beside_a_pair_stays_metadata() -> None:
    """The ids and the instructions of earlier runs do not change."""
    entry = parse({"instruction": "Who?", "answer": "Ada.", "input": "It was red."})

    assert isinstance(entry, Seed)
    assert ("Who?", {"input": "It was red."}, digest("Who?", "Ada.").hex()) == (
        entry.instruction,
        entry.metadata,
        entry.id,
    )


def test_all_of_several_answers_are_kept() -> None:
    """The first is the gold answer; doubles and blanks are left out."""
    entry = parse({"question": "Who?", "answers": ["Ada Brown", " ", "Brown", "Ada Brown", None, 7]})

    assert isinstance(entry, Seed)
    assert ("Ada Brown", ["Ada Brown", "Brown", "7"]) == (entry.answer, entry.metadata["answers"])


def test_what_stands_before_the_last_question_is_in_the_instruction() -> None:
    """System turns first, then each turn with its speaker; what follows the last answer is not."""
    turns = (
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "Ada."),
        ("tool", "a page"),
        ("user", "When?"),
        ("assistant", None),
        ("assistant", "In 1843."),
        ("user", "Thanks."),
    )
    whole = "Be brief.\n\nUser: Who?\n\nAssistant: Ada.\n\nTool: a page\n\nUser: When?"

    assert (whole, "In 1843.") == pair({"messages": said(*turns)})
    assert (whole, "In 1843.") == pair({"conversations": said(*turns, names=("from", "value"))})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*said(("developer", "Be brief.")), *CHAT]},
        {"conversations": SHAREGPT, "system": "Be brief."},
        {"instruction": "Who?", "output": "Ada.", "system": "Be brief."},
        {"system_prompt": "Be brief.", "question": "Who?", "response": "Ada."},
    ],
)
def test_a_system_prompt_is_a_part_of_the_instruction(row: dict[str, Any]) -> None:
    """Wherever the form has it."""
    assert ("Be brief.\n\nWho?", "Ada.") == pair(row)


def test_the_form_can_be_fixed() -> None:
    """Rows of other forms are no seeds then; names that are mapped are the only ones for a pair."""
    both = {
        "prompt": "Who?",
        "completion": "Ada.",
        "messages": said(("user", "When?"), ("assistant", "1843.")),
    }

    assert ("When?", "1843.") == pair(both)
    assert ("Who?", "Ada.") == pair(both, form="prompt_completion")
    other = parse(both, form="alpaca")
    assert isinstance(other, BadSeed)
    assert (
        "seeds.format = 'alpaca', and the row is not of this form; fields: completion, messages"
        in other.detail
    )
    mapped = parse({"question": "Who?", "answer": "Ada."}, fields=FieldsSection(instruction="ask"))
    assert isinstance(mapped, BadSeed)
    assert "field 'ask' is missing; fields: answer, question" in mapped.detail


def test_the_forms_of_a_source_are_counted() -> None:
    """A union of data sets has several; each is described once, the most frequent first."""
    seen = FormsSeen("a.jsonl")
    parser = SeedParser(FieldsSection(), seen=seen)
    rows: list[dict[str, Any]] = [{"instruction": "Who?", "input": "x", "output": "y"}] * 2
    for row in ({"messages": CHAT}, *rows):
        parser.row(row, "a.jsonl:1", "a", b"")

    alpaca, messages = seen.lines()
    assert "a.jsonl: form alpaca (2): instruction = instruction + input; answer = output" == alpaca
    assert "form messages (1): instruction = last question of messages; answer = last answer" in messages
