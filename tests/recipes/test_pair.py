"""From an answer to the question and the answer in it, in the forms in which models give them."""

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamsyn.recipes.parsing import WrittenPair, first_pair
from tests.examples import in_turn

ASKED = "Who kept the light of Aldersby in 1847?"
SAID = "Ada Marsh kept it,\nand her brother after her."
LINES = "- The keeper.\n- Her brother.\n\nBoth of them."


def pair_in(text: str) -> tuple[str, str]:
    found = first_pair(text)
    assert found is not None, text
    return found.question, found.answer


@in_turn(
    "form",
    [
        "Question: {q}\nAnswer: {a}",
        "question : {q}\n\nanswer : {a}\n",
        "QUESTION: {q}\nANSWER:\n{a}",
        "Question:\n{q}\n\nAnswer:\n{a}",
        "**Question:** {q}\n**Answer:** {a}",
        "**Question**: {q}\n\n**Answer**: {a}",
        "**Question: {q}**\n\n**Answer: {a}**",
        "**Question**\n{q}\n\n**Answer**\n{a}",
        "### Question\n{q}\n\n### Answer\n{a}",
        "## Question: {q}\n## Answer: {a}",
        "1. **Question:** {q}\n   **Answer:** {a}",
        "1. Question: {q}\n2. Answer: {a}",
        "- Question: {q}\n- Answer: {a}",
        "> Question: {q}\n> Answer: {a}",
        "Question 1: {q}\nAnswer 1: {a}",
        "Question #1: {q}\nAnswer #1: {a}",
        "Question 1. {q}\nAnswer 1. {a}",
        "Question (1): {q}\nAnswer (1): {a}",
        "__Question__: {q}\n__Answer__: {a}",
        "Q: {q}\nA: {a}",
        "**Q:** {q}\n**A:** {a}",
        "Q1: {q}\nA1: {a}",
        "Q: {q}\nAnswer: {a}",
        "Query: {q}\nResponse: {a}",
        "Instruction: {q}\nAnswer: {a}",
        "Question\uff1a{q}\nAnswer\uff1a{a}",
        "Question: {q} Answer: {a}",
        'Question: "{q}"\nAnswer: {a}',
        "Sure! Here is one.\n\nQuestion: {q}\nAnswer: {a}",
        "Here is a question and its answer:\n\n```\nQuestion: {q}\nAnswer: {a}\n```",
        "```text\nQuestion: {q}\nAnswer: {a}\n```",
        "<question>{q}</question>\n<answer>{a}</answer>",
        "<Question>\n{q}\n</Question>\n\n<Answer>\n{a}",
        "{q}\nAnswer: {a}",
        "Here is one on the light:\n\n{q}\n\n**Answer:** {a}",
        "Here is one:\n{q}\nAnswer: {a}",
        "Question: {q}\nAnswer: {a}\n\nQuestion: And who came after?\nAnswer: Nobody.",
        "1. Question: {q}\nAnswer: {a}\n\n2. Question: And who came after?\nAnswer: Nobody.",
        "**Question 1**\n{q}\n**Answer 1**\n{a}\n\n---\n\n**Question 2**\nAnd who?",
        "Question: {q}\nAnswer: {a}\n\n***\n",
        "Q: {q}\nA: {a}\nQ: And who came after?",
        "Question:\nQuestion: {q}\nAnswer: {a}",
        "The question:\n{q}\n\nThe answer:\n{a}",
        "Here's a question:\n\n{q}\n\nHere is the answer: {a}",
    ],
)
def test_each_form_is_read(form: str) -> None:
    """Labels with markdown, numbers, fences or thoughts round them; the first pair of several."""
    assert (ASKED, SAID) == pair_in(form.replace("{q}", ASKED).replace("{a}", SAID))


@in_turn(
    "form",
    [
        '{"question": %s, "answer": %s}',
        '{"Answer": %s, "Question": %s}',
        '```json\n{"question": %s, "answer": %s}\n```',
        'Here it is:\n{"instruction": %s, "response": %s}\nI hope that helps.',
        '[{"question": %s, "answer": %s}, {"question": "b", "answer": "c"}]',
        '{"pairs": [{"q": %s, "a": %s}]}',
        '{"question": %s,\n "answer": %s} Question: And another? Answer: No.',
    ],
)
@in_turn("raw_lines", [False, True])
def test_json_is_read(form: str, raw_lines: bool) -> None:
    """Alone, in a fence or in prose; also with line breaks in strings, which JSON does not allow."""
    asked, said = json.dumps(ASKED), json.dumps(SAID)
    said = said.replace("\\n", "\n") if raw_lines else said
    swapped = form.startswith('{"Answer"')
    text = form % ((said, asked) if swapped else (asked, said))
    assert WrittenPair(ASKED, SAID, is_whole=True) == first_pair(text)


@pytest.mark.parametrize(
    ("value", "text"), [("1847", "1847"), ("18.5", "18.5"), ("true", "yes"), ('["a", "b"]', "a\nb")]
)
def test_an_answer_in_json_need_not_be_text(value: str, text: str) -> None:
    """Numbers, truth values and lists of texts are read as such."""
    assert ("When?", text) == pair_in(f'{{"question": "When?", "answer": {value}}}')


@in_turn(
    "text",
    [
        "",
        "The light of Aldersby burned.",
        ASKED,
        f"Question: {ASKED}",
        f"Answer: {SAID}\nQuestion: {ASKED}",
        "Question:\nAnswer:",
        "Question: \n\nAnswer: Ada.",
        f"Answer: {SAID}",
        "The keeper was Ada.\n\nAnswer: Ada.",
        '{"question": "Who?", "answer": ',
        '{"question": "Who?"}',
        '{"question": {"a": 1}, "answer": null}',
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
)
def test_where_there_is_no_pair(text: str) -> None:
    """A question without an answer is none, nor is an answer without a question."""
    assert first_pair(text) is None


def test_an_answer_of_several_lines_stays_as_it_is() -> None:
    """Lists, paragraphs and code belong to it, and so does what only looks like a label."""
    code = "```python\nprint(1)\n```"
    for answer in (
        LINES,
        code,
        f"Do this:\n{code}",
        "A: x\nB: y",
        "**Ada** did, and **Bob** too.",
        '"So" and "so"',
    ):
        assert (ASKED, answer) == pair_in(f"Question: {ASKED}\nAnswer: {answer}")


def test_choices_belong_to_the_question() -> None:
    """`A:` and `A)` are no answers where the question is not called `Q`."""
    asked = "Who kept the light?\nA: Ada\nB) Bob"
    assert (asked, "B") == pair_in(f"Question: {asked}\nAnswer: B")
    asked = "What is vitamin A: a fat or a salt?"
    assert (asked, "A fat.") == pair_in(f"Question: {asked} Answer: A fat.")
    assert ("Who?", "Ada.") == pair_in("Q: Who? A: Ada.")


def test_what_stands_behind_a_pair_shows_that_it_is_whole() -> None:
    """So a text that was cut later on cost it nothing."""
    first = f"Question: {ASKED}\nAnswer: {SAID}"
    found = [first_pair(text) for text in (first, f"{first}\n\nQuestion: And wh")]
    assert [WrittenPair(ASKED, SAID, is_whole=False), WrittenPair(ASKED, SAID, is_whole=True)] == found
    assert ("Who?", "") == pair_in("Question: Who?\nAnswer:")


@given(
    st.lists(
        st.sampled_from(
            [
                "Question",
                "Answer",
                "Q",
                "A",
                ":",
                "**",
                "\n",
                " ",
                "1.",
                "#",
                "```",
                "{",
                '"',
                "}",
                "[",
                "---",
                "x?",
            ]
        ),
        max_size=60,
    ).map("".join)
)
@example("**Question**" * 30)
def test_no_answer_breaks_it(text: str) -> None:
    """Whatever comes: a pair whose question holds something, or none."""
    found = first_pair(text)
    assert found is None or isinstance(found.answer, str)


@pytest.mark.parametrize(
    "part",
    [
        "Question: ",
        "**",
        "\n",
        " \t",
        "#" * 6,
        "Answer 1",
        "[{",
        "A: ",
        "---\n",
        "1. ",
        "> ",
        "<question>",
        "a ",
        ": ",
        "```\n",
        "answer",
    ],
)
def test_long_answers_are_read_quickly(part: str) -> None:
    """No form makes it slow: time grows with length, not with its square."""
    begun = time.perf_counter()
    many = part * (60_000 // len(part))
    for text in (
        f"x{many}y",
        f"x\n{many}y",
        f"Question: x{many}y\nAnswer: z",
        f"x?\nAnswer: {many}y\nAnswer: z",
    ):
        first_pair(text)
    assert time.perf_counter() - begun < 5
