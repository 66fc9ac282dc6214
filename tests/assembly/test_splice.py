"""Counts pieced together are those of the whole text, whatever the tokenizer, the passages and the glue."""

import random
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from streamsyn.assembly.passages import Passage
from streamsyn.assembly.splice import Splicer
from tests.assembly.tokenizers_made import SPLICED, WHOLE, made

FRAGMENTS = [
    *(" ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u3000", " " * 9),
    *("a", "b", "ab", "abba", "A", "Ab", "ABa", "é", "e\u0301", "\u0301", "中", "文字", "の"),
    *("'", "'s", "'S", "'ll", "’s", ".", "...", ",", "!?", "/", "-", "<", ">", "▁", "\x1d", "😀"),
    *("1", "12", "123", "1234567", "٣", "<s>", "</s>", "<x>", "<x>y", "<x", "s>"),
]
SPACES = [" ", "\n", "\r\n", "a"]
ADDED = ["<x>", "<x>y", "a b", "ab\n", ". ", "a  a  a  a  a  a", "1\n1\n1\n1\n1\n1"]
FEW = ["a", "b", " ", "\n", ".", "1", "'s", "  "]


def passages_of(texts: list[str]) -> list[Passage]:
    return [Passage(seq, "", "", "", "", "", text, 0) for seq, text in enumerate(texts)]


@st.composite
def texts(draw: st.DrawFn, fragments: list[str], most: int) -> str:
    """Many fragments for few choices: hypothesis draws what varies, chance repeats it."""
    some = draw(st.lists(st.sampled_from(fragments), min_size=1, max_size=8))
    size = draw(st.integers(0, most))
    chance = random.Random(draw(st.integers(0, 2**32)))
    return "".join(chance.choice(some) for _ in range(size))


@st.composite
def cases(draw: st.DrawFn, kinds: dict[str, Any]) -> tuple[Splicer, Any, str, list[str]]:
    """A tokenizer and passages that stand in a text. It has learnt that text by heart, or a little of it."""
    kind = draw(st.sampled_from(sorted(kinds)))
    body = draw(st.sampled_from([FRAGMENTS, FEW]))
    edge = draw(st.sampled_from([FRAGMENTS, FEW, SPACES]))
    inside = []
    for _ in range(draw(st.integers(1, 4))):
        parts = [draw(texts(edge, 8)), draw(texts(body, 200)), draw(texts(edge, 8))]
        inside.append("".join(parts).strip(draw(st.sampled_from([" ", None]))))
    glue = [draw(texts(edge, 6)) for _ in range(len(inside) + 1)]
    whole = glue[0] + "".join(text + between for text, between in zip(inside, glue[1:], strict=True))
    added = draw(st.lists(st.sampled_from(ADDED), max_size=3, unique=True))
    tokenizer = made(
        kinds[kind],
        [whole, *inside, "ab a. 1"],
        vocabulary=draw(st.sampled_from([270, 320, 3000])),
        added=[AddedToken(token, normalized=draw(st.booleans())) for token in added],
        nfc=draw(st.booleans()),
        model=draw(st.sampled_from(["bpe", "bpe", "wordpiece"])),
    )
    splicer = Splicer(tokenizer, settle_chars=draw(st.sampled_from([1, 24])))
    return splicer, tokenizer, whole, inside


@settings(max_examples=400, deadline=None)
@given(cases(SPLICED))
def test_what_is_pieced_together_is_exact(case: tuple[Splicer, Any, str, list[str]]) -> None:
    """The heart of exact lengths: tails, glue and heads give what encoding all of the text gives."""
    splicer, tokenizer, whole, inside = case
    pieces = passages_of(inside)
    cut = sum(splicer.cuts(piece).head >= 0 for piece in pieces)
    event(f"{cut} of {len(pieces)} passages cut")

    assert splicer.is_splicing
    assert tokenizer.count(whole) == splicer.count(whole, pieces)
    assert [tokenizer.count(text.strip()) for text in inside] == [splicer.alone(piece) for piece in pieces]
