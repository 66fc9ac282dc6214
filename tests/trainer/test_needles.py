"""Needle questions: the questions, the lengths of prompts, and grading."""

import random
import re
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.config.command_sections import NeedleKind, NeedlesSection
from streamsyn.errors import ConfigError
from streamsyn.scoring.suites.needle_suite import (
    ANSWER_TOKENS,
    measured,
    needle_count,
    needle_questions,
    sentences,
)
from streamsyn.trainer.evaluation.exam import Chat, Question, rendered
from tests.examples import examples
from tests.trainer import tiny

KINDS: tuple[NeedleKind, ...] = ("single", "multi_key", "multi_value", "multi_query")


@cache
def chat() -> Chat:
    """The tiny model's chat: a token for each byte."""
    return Chat(tiny.tokenizer())


def asked(seed: int = 0, positions: int | None = None, **given: object) -> list[Question]:
    """The questions of a section."""
    made = needle_questions(NeedlesSection.model_validate(given), seed, chat(), positions)
    return [rendered(one, chat()) for one in made]


def text_of(question: Question) -> str:
    """The text of the prompt."""
    return chat().decode(question.prompt.tokens.tolist())


@examples(25)
@given(
    kind=st.sampled_from(KINDS),
    length=st.integers(700, 3000),
    samples=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_prompts_are_as_long_as_asked_and_hold_what_is_wanted(
    kind: NeedleKind, length: int, samples: int, seed: int
) -> None:
    """Never longer, slightly shorter at most; each wanted number occurs once; depths are evenly spread."""
    questions = asked(seed, lengths=(length,), kinds=(kind,), samples=samples)

    assert samples == len(questions)
    for number, question in enumerate(questions):
        assert 0.97 * length <= len(question.prompt.tokens) <= length
        assert (f"needle_{kind}_{length}", str(number)) == (question.part, question.id)
        text = text_of(question)
        assert (1 if kind in {"single", "multi_key"} else 4) == len(set(question.wanted))
        assert all(1 == text.count(one) for one in question.wanted)
        shown = set(re.findall(r"\d{7}", text))
        assert (1 if kind == "single" else 4) == len(shown)
        hay = re.search(r"\n\n(.*)\n\nThat was the text\.", text, re.DOTALL)
        assert hay is not None
        depth = number / (samples - 1) if samples > 1 else 0.5
        needle = re.search(rf"The locker number of \S+ is {question.wanted[0]}\.", hay[1])
        assert needle is not None
        without = re.sub(r"The locker number of \S+ is \d+\. ?", "", hay[1])
        before = re.sub(r"The locker number of \S+ is \d+\. ?", "", hay[1][: needle.start()])
        assert abs(depth - len(before) / len(without)) < 150 / len(without)  # half of the longest sentence


def test_only_the_key_that_is_asked_for_has_the_wanted_number() -> None:
    """With distractors, each number belongs to one key, and the question names that of the wanted one."""
    for question in asked(lengths=(1500,), kinds=("multi_key",), samples=4):
        text = text_of(question)
        pairs = dict(re.findall(r"The locker number of (\S+) is (\d+)\.", text))
        (key,) = re.findall(r"What is the locker number of (\S+)\?", text)

        assert 4 == len(pairs)
        assert question.wanted == (pairs[key],)


def test_several_values_belong_to_one_key_and_several_keys_are_asked_for() -> None:
    """`multi_value`: one key, all its numbers. `multi_query`: as many keys as numbers, all of them named."""
    (values, queries) = asked(lengths=(1500,), kinds=("multi_value", "multi_query"), samples=1)
    pairs = re.findall(r"The locker number of (\S+) is (\d+)\.", text_of(values))
    assert 1 == len({key for key, _ in pairs})
    assert {number for _, number in pairs} == set(values.wanted)

    text = text_of(queries)
    pairs = re.findall(r"The locker number of (\S+) is (\d+)\.", text)
    request = text.split("That was the text.")[1]
    assert {number for _, number in pairs} == set(queries.wanted)
    assert all(key in request for key, _ in pairs)


def test_questions_depend_on_the_seed_alone() -> None:
    """The same seed gives the same prompts, a different seed different ones."""
    given: dict[str, Any] = {"lengths": (800, 1600), "samples": 2}
    first, again, other = (asked(seed, **given) for seed in (3, 3, 4))

    assert [one.prompt.tokens.tolist() for one in first] == [one.prompt.tokens.tolist() for one in again]
    assert not {one.wanted for one in first} & {one.wanted for one in other}
    parts = list(dict.fromkeys(one.part for one in first))
    assert [f"needle_{kind}_{length}" for kind in KINDS for length in (800, 1600)] == parts


def test_the_prompt_leaves_positions_for_the_answer() -> None:
    """Also if the length is the model's number of positions."""
    (question,) = asked(positions=2048, lengths=(2048,), kinds=("single",), samples=1)

    assert len(question.prompt.tokens) <= 2048 - ANSWER_TOKENS


@pytest.mark.parametrize(
    ("more", "lengths", "said"),
    [
        ({"positions": 2048}, (4096,), r"train\.needles\.lengths: 4096 is more than the 2048 positions"),
        ({}, (300,), r"train\.needles\.lengths: 300 tokens are too few for the needles of multi_key"),
    ],
)
def test_impossible_lengths_are_refused(more: dict[str, int], lengths: tuple[int, ...], said: str) -> None:
    """With the key, the length and the reason."""
    with pytest.raises(ConfigError, match=said):
        asked(**more, lengths=lengths)


def test_filler_has_no_numbers_and_many_sentences() -> None:
    """It has no digits, and does not repeat itself."""
    made = sentences(random.Random(0))
    some = [next(made) for _ in range(2000)]

    assert not re.search(r"\d|locker", " ".join(some))
    assert len(set(some)) > 1900


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [
        ("It is 1234567.", ("1234567",), 1.0),
        ("1234567 and 7654321", ("1234567", "7654321", "1111111", "2222222"), 0.5),
        ("", ("1234567",), 0.0),
        ("<think>1234567?</think>I do not know.", ("1234567",), 0.0),
    ],
)
def test_the_share_of_wanted_numbers_counts(said: str, wanted: tuple[str, ...], score: float) -> None:
    """The share of wanted values in the answer, whatever else it has; reasoning does not count."""
    question = Question("needles", "p", "0", chat().prompt("?", 4), wanted, "recall")

    assert score == question.score(said)


async def test_lengths_are_measured_where_there_is_no_tokenizer() -> None:
    """By two prompts, of a model with 0.3 tokens per character and 11 around a message."""

    async def prompt_tokens(text: str) -> int:
        return round(11 + 0.3 * len(text))

    lengths = await measured(prompt_tokens)
    section = NeedlesSection(lengths=(512, 2048), samples=2)
    made = list(needle_questions(section, 0, lengths))

    assert [11, 0.3] == pytest.approx([lengths.around, lengths.per_char], abs=1e-3, rel=0.2)
    assert needle_count(section) == len(made) == 16
    for one in made:
        length = int(one.part.rpartition("_")[2])
        assert 0.96 * length <= await prompt_tokens(one.prompt) <= 1.01 * length
        assert 1.0 == one.rule(f"They are {' and '.join(one.wanted)}.")
