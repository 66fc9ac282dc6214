"""From an answer to the document in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.recipes.parsing import document_text
from tests.examples import in_turn

TEXT = "The mill of Aldersby stood by the river.\n\nIt burned in 1847."


@in_turn(
    "before",
    [
        "Context:",
        "context :\n",
        "Context\n",
        "**Context:** ",
        "**Context**: ",
        "**Context**\n\n",
        "__Document__\n",
        "## Context\n\n",
        "# The Lost Document\n",
        "#Background:\n",
        "Here is the document:\n\n",
        "Here's the context:\n",
        "Below is the missing document:\n",
        "Text: ",
        "The written context document:\n",
        "\n\n  ",
    ],
)
def test_what_is_put_before_a_document_goes(before: str) -> None:
    """A label in its many forms, white space."""
    assert TEXT == document_text(before + TEXT)


@in_turn(
    ("before", "behind"),
    [
        ("```\n", "\n```"),
        ("```markdown\n", "\n```\n"),
        ("<context>\n", "\n</context>"),
        ("<document>", "</document>\n"),
        ("Context:\n```text\n", "\n```"),
        ("```\nContext: ", "```"),
        ("```\n<context>\nContext:\n", "\n</context>\n```"),
        ("```\n", ""),
    ],
)
def test_what_is_put_round_a_document_goes(before: str, behind: str) -> None:
    """Fences and tags, one in another, and a fence that was cut before it was closed."""
    assert TEXT == document_text(before + TEXT + behind)


@in_turn(
    "text",
    [
        TEXT,
        "Context matters in the study of rivers.",
        "Context, as Hale wrote, is everything: a mill without its river is a shed.",
        "Contextual notes: none.",
        "The document that follows was found in 1903.",
        "The text of the treaty runs to nine pages: here they are.",
        "Background noise filled the hall.",
        "Documentary evidence: slim.",
        "This is the background against which the council met.",
        "Here is where the river turns.",
        "```python\nprint('geese')\n```\n\nThis prints geese.",
        "He wrote <think> on the board.",
        "# The Mill of Aldersby\n\nIt burned.",
        "**Aldersby**, a village, lies by the river.",
        "5 < 7 and 7 > 5",
    ],
)
def test_a_document_keeps_its_own_words(text: str) -> None:
    """What only looks like a label or a fence belongs to it."""
    assert text == document_text(text)


@pytest.mark.parametrize("answer", ["", "  \n", "```\n```", "Context:\n"])
def test_an_answer_without_a_document(answer: str) -> None:
    """Nothing is left, and a check says so."""
    assert "" == document_text(answer)


PIECES = st.lists(
    st.sampled_from(
        [
            "Context:",
            "```",
            "```text\n",
            "\n",
            "<context>",
            "</context>",
            "mill ",
            "# ",
        ]
    ),
    max_size=9,
)


@given(PIECES)
def test_any_answer_can_be_parsed(pieces: list[str]) -> None:
    """It ends, and what comes out is a stripped part of what went in."""
    text = document_text("".join(pieces))
    assert text == text.strip()
    assert text in "".join(pieces)
