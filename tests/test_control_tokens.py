"""Control tokens in a text: the turn ends at them, unless the text is about them."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.control_tokens import first_turn, has_control_tokens
from tests.examples import examples

TEXT = "The mill closed in 1931."


@pytest.mark.parametrize(
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


@pytest.mark.parametrize(
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

    assert time.process_time() - started < 0.5
