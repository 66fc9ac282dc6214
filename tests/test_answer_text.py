"""Answers end at control tokens and come without their thoughts, unless the text is about such marks."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.answer_text import (
    FORMS,
    Form,
    first_turn,
    has_control_tokens,
    has_marks,
    opens_thought,
    split_thought,
    thought_tokens,
    without_thought,
)
from tests.examples import examples, in_turn

TEXT = "The mill closed in 1931."


@in_turn(
    "behind",
    [
        "<|im_end|>\n<|im_start|>assistant\nAnother answer.",
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?",
        "<|im_end|>",
        " </s>",
        "</s><s>[INST] Why? [/INST]",
        "<|end|><|start|>assistant<|channel|>final<|message|>More.",
        "<end_of_turn>\n<start_of_turn>model\nMore.",
        "<|endoftext|>A text about something else.",
        "<|eot_id|>\nassistant\n\nMore.",
        "\n<|user|>\nWhy?",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<|return|>",
        "<|im_end|></s>\n",
        "\n<|im_start|>user\nWhy?",
        "<|fim_middle|>",
    ],
)
def test_a_text_ends_where_its_turn_ends(behind: str) -> None:
    """At the token, whatever follows it."""
    text, was_cut = first_turn(TEXT + behind)

    assert text.rstrip() == TEXT
    assert was_cut


@pytest.mark.parametrize(
    "before", ["<s>", "<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"]
)
def test_tokens_before_a_text_are_removed(before: str) -> None:
    """The text is whole: it was not cut."""
    assert first_turn(before + TEXT) == (TEXT, False)


@in_turn(
    "text",
    [
        TEXT,
        f"{TEXT}  \n",
        "A turn ends with <|im_end|> and <|im_start|>assistant opens the next.",
        'Llama writes "<|eot_id|>" there.',
        "It is struck out: <s>1930</s>1931.",
        "A template:\n```\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n```\nThat is all.",
    ],
)
def test_a_text_about_tokens_is_kept(text: str) -> None:
    """In sentences, in quotes, in code blocks, in HTML."""
    assert first_turn(text) == (text, False)


def test_tokens_in_a_text_are_found() -> None:
    """Known ones, and others of the common form."""
    assert has_control_tokens("ends with <|im_end|> there")
    assert has_control_tokens("<|vision_start|>")
    assert not has_control_tokens("a < b | c > d, <b>bold</b>, <|>")


@given(
    st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "assistant", "\n", " ", "w", "</s>", "`", "```\n"])
    ).map("".join)
)
@examples(200)
def test_what_is_kept_stands_in_the_text(text: str) -> None:
    """Nothing is changed within it, and a second pass finds nothing more to cut."""
    kept, was_cut = first_turn(text)

    assert kept in text
    assert was_cut or text.endswith(kept)


@pytest.mark.parametrize(
    "piece", ["word ", "<|im_end|> a ", "</s>", "\n", "`<|im_start|>` ", "<|x|>", "```\n<|im_end|>"]
)
def test_a_long_text_takes_little_time(piece: str) -> None:
    """Linear in its length: an event loop waits for it."""
    text = piece * (500_000 // len(piece))
    started = time.process_time()
    first_turn(text)

    assert time.process_time() - started < 10  # quadratic, it takes minutes


PLAN = "I plan: SECRET. First the river,\n\nthen the mill."
DOCUMENT = "The mill closed in 1931.\n\nIts ledger was sold."


def form_id(form: Form) -> str:
    return form.opening


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_a_thought_in_its_marks_is_removed(form: Form) -> None:
    """With white space around it, and with none."""
    assert without_thought(f"{form.opening}{PLAN}{form.closing}{DOCUMENT}") == DOCUMENT
    assert without_thought(f"\n{form.opening}\n{PLAN}\n{form.closing}\n\n{DOCUMENT}\n") == DOCUMENT


@pytest.mark.parametrize("form", [form for form in FORMS if not form.needs_opening], ids=form_id)
def test_a_thought_that_was_opened_in_the_prompt_is_removed(form: Form) -> None:
    """Only its closing mark is in the answer."""
    assert without_thought(f"{PLAN}\n{form.closing}\n\n{DOCUMENT}") == DOCUMENT
    assert without_thought(f"{PLAN}{form.closing}{DOCUMENT}") == DOCUMENT


@pytest.mark.parametrize("form", [form for form in FORMS if not form.needs_closing], ids=form_id)
def test_a_thought_that_was_cut_leaves_no_answer(form: Form) -> None:
    """All of it is thought."""
    assert split_thought(f"{form.opening}\n{PLAN}") == (f"{form.opening}\n{PLAN}", "")


@pytest.mark.parametrize("form", [form for form in FORMS if not form.needs_opening], ids=form_id)
def test_a_prompt_that_ends_with_an_opening_mark_opens_a_thought(form: Form) -> None:
    """With a line break behind it, as templates write it, or without; not one in the middle."""
    assert opens_thought(f"<|im_start|>assistant\n{form.opening}\n") is form
    assert opens_thought(f"<|im_start|>assistant{form.opening}") is form
    assert opens_thought(f"Explain {form.opening} to me. Assistant:") is None


@in_turn(
    "answer",
    [
        DOCUMENT,
        "He wrote </think> on the board. What did he write?",
        "The tag `</think>` ends a thought, and `[/THINK]` does, too.",
        "Models write <think> and then </think>.\n\nThe text follows.",
        "A log:\n\n```\n<think>\nHm.\n</think>\nYes.\n```\n\nSo it was.",
        "An example:\n<think>\nHm.\n</think>\nYes.",
        "analysis of the ledger shows that nobody paid.",
        "Analysis: the clerk said so. assistantfinal",
        "The board writes its reasoning down in (</reasoning>) marks.",
    ],
)
def test_a_text_that_mentions_marks_is_kept(answer: str) -> None:
    """Marks within a sentence, and pairs in the middle of the text."""
    assert split_thought(answer) == ("", answer)


@in_turn(
    ("answer", "text"),
    [
        ("<think>one</think>\n<think>two</think>\nText", "Text"),
        ("plan\n</think>\n\n<thinking>more</thinking>Text", "Text"),
        ("<think>The tag </think> ends it.\n</think>\n\nText", "Text"),
        ("<think>plan</thinking>\n\nText", "Text"),
        ("<THINK>plan</Think>Text", "Text"),
        ("assistant\n<think>plan</think>Text", "Text"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n<think>plan</think>Text", "Text"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>Text", "Text"),
        ("<|channel|>final<|message|>Text", "Text"),
        ("<think>\nplan\n</think>\n<answer>\nText\n</answer>", "Text"),
        (
            "<|begin_of_thought|>a<|end_of_thought|>\n<|begin_of_solution|>Text<|end_of_solution|>",
            "Text",
        ),
        ("<think></think>Text about <think> and </think> marks.", "Text about <think> and </think> marks."),
        ("<answer>\nText\n</answer>", "<answer>\nText\n</answer>"),
    ],
)
def test_what_models_write_around_thoughts(answer: str, text: str) -> None:
    """Several thoughts, marks of two forms, roles, and marks around the answer."""
    assert without_thought(answer) == text


def test_the_tokens_of_a_thought_are_estimated_by_its_characters() -> None:
    """No more than all of the answer's, and at least one."""
    assert thought_tokens("t" * 300, "t" * 100, 80) == 60
    assert thought_tokens("t", "t" * 1000, 80) == 1
    assert thought_tokens("t", "", 80) == 80
    assert thought_tokens("", "text", 80) == 0 == thought_tokens("t", "", 0)


def test_an_answer_to_a_prompt_that_opens_a_thought_is_all_thought_without_a_closing_mark() -> None:
    """With one, an opening mark before it does not matter."""
    assert split_thought(PLAN, is_open=True) == (PLAN, "")
    assert split_thought(f"A <think>\nis a tag.\n</think>\n\n{DOCUMENT}", is_open=True)[1] == DOCUMENT


@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", "[/THINK]", "\n", " ", "word", "```", "`", "<answer>"])
    ).map("".join)
)
@examples(200)
def test_no_text_is_lost_or_made(answer: str) -> None:
    """Thought and text together are the answer, marks around the text aside."""
    thought, text = split_thought(answer)

    assert answer.startswith(thought + text)
    assert answer[len(thought + text) :].strip() in ("", "</answer>")


@pytest.mark.parametrize("piece", ["word ", "<think> </think> ", "</think> ", " ", "```\n</think>`"])
def test_a_long_answer_takes_little_time(piece: str) -> None:
    """Linear in its length: an event loop waits for it."""
    answer = piece * (500_000 // len(piece))
    started = time.process_time()
    split_thought(answer)
    has_marks(answer)

    assert time.process_time() - started < 10  # quadratic, it takes minutes
