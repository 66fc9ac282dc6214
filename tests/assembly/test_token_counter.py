"""Incremental token counts equal the count of the whole text, for every tokenizer, passage and separator."""

import random
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from tokenizers import AddedToken

from streamsyn.assembly.pre_tokenizer import UnsupportedPattern, lookahead_of
from streamsyn.assembly.token_counter import IncrementalTokenCounter
from streamsyn.assembly.window import Passage
from tests.assembly.tokenizers_made import SUPPORTED, UNSUPPORTED, made
from tests.examples import examples, in_turn

FRAGMENTS = [
    *(" ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u3000", " " * 9),
    *("a", "b", "ab", "abba", "A", "Ab", "ABa", "é", "e\u0301", "\u0301", "中", "文字", "の"),
    *("'", "'s", "'S", "'ll", "\u2019s", ".", "...", ",", "!?", "/", "-", "<", ">", "▁", "\x1d", "😀"),
    *("1", "12", "123", "1234567", "٣", "<s>", "</s>", "<x>", "<x>y", "<x", "s>"),
]
AHEAD = ["ab", ".", "1"]
ADDED = ["<x>", "<x>y", "a b", "ab\n", ". ", "a  a  a  a  a  a", "ab.1.1.1ab", "ab.1a"]
FEW = ["a", "b", " ", "\n", ".", "1", "'s", "  "]


def passages_of(texts: list[str]) -> list[Passage]:
    return [Passage(seq, "", "", "", "", "", text, 0) for seq, text in enumerate(texts)]


@st.composite
def texts(draw: st.DrawFn, fragments: list[str], most: int) -> str:
    """Long texts with few draws: hypothesis draws some fragments, and a seeded rng repeats them."""
    some = draw(st.lists(st.sampled_from(fragments), min_size=1, max_size=8))
    size = draw(st.integers(0, most))
    chance = random.Random(draw(st.integers(0, 2**32)))
    return "".join(chance.choice(some) for _ in range(size))


@st.composite
def cases(
    draw: st.DrawFn, kinds: dict[str, Any], bodies: list[list[str]], edges: list[list[str]]
) -> tuple[IncrementalTokenCounter, Any, str, list[str]]:
    """A tokenizer, trained on the text or on a little of it, and passages of that text."""
    kind = draw(st.sampled_from(sorted(kinds)))
    body = draw(st.sampled_from(bodies))
    edge = draw(st.sampled_from(edges))
    inside = []
    for _ in range(draw(st.integers(1, 4))):
        parts = [draw(texts(edge, 8)), draw(texts(body, 80)), draw(texts(edge, 8))]
        inside.append("".join(parts).strip())
    glue = [draw(texts(edge, 6)) for _ in range(len(inside) + 1)]
    whole = glue[0] + "".join(text + between for text, between in zip(inside, glue[1:], strict=True))
    added = draw(st.lists(st.sampled_from(ADDED), max_size=3, unique=True))
    tokenizer = made(
        kinds[kind],
        draw(st.sampled_from([[whole, *inside], ["ab a. 1"]])),
        vocabulary=draw(st.sampled_from([270, 320, 3000])),
        added=[AddedToken(token, normalized=draw(st.booleans())) for token in added],
        nfc=draw(st.booleans()),
        model=draw(st.sampled_from(["bpe", "bpe", "wordpiece"])),
        alphabet=draw(st.booleans()),
    )
    counter = IncrementalTokenCounter(tokenizer, settle_chars=draw(st.sampled_from([1, 24])))
    return counter, tokenizer, whole, inside


FAR = {kind: SUPPORTED[kind] for kind in ("looks ahead", "fours", "gpt2")}


@examples(300)
@given(
    cases(SUPPORTED, [FRAGMENTS, FEW], [FRAGMENTS, FEW, AHEAD]) | cases(FAR, [AHEAD, [*AHEAD, " "]], [AHEAD])
)
def test_incremental_counts_are_exact(case: tuple[IncrementalTokenCounter, Any, str, list[str]]) -> None:
    """Passages and seams add up to what encoding the whole text gives."""
    counter, tokenizer, whole, inside = case
    pieces = passages_of(inside)
    cut = sum(counter.split_points(piece).head >= 0 for piece in pieces)
    event(f"{cut} of {len(pieces)} passages cut")

    assert counter.is_incremental
    assert tokenizer.count(whole) == counter.count(whole, pieces)
    assert [tokenizer.count(text.strip()) for text in inside] == [
        counter.count_piece(piece) for piece in pieces
    ]


@in_turn("kind", [kind for kind in SUPPORTED if kind not in ("looks ahead", "fours")])
def test_most_of_a_long_text_is_not_encoded_again(kind: str) -> None:
    """A passage of a few hundred words is split near both ends, with every kind of tokenizer."""
    chance = random.Random(2)
    text = "\n".join(" ".join(chance.choices(["abba", "Ab", "b", "a"], k=12)) + ". " for _ in range(30))
    # Where spaces are dropped, unknown characters may be dropped as well, unnoticed.
    model = "wordpiece" if kind == "words" else "bpe"
    counter = IncrementalTokenCounter(made(SUPPORTED[kind], [text], model=model))
    points = counter.split_points(*passages_of([text]))

    assert 0 < points.head < 120
    assert len(text.strip()) - 120 < points.tail
    assert 0 < points.between < points.total


@in_turn("kind", UNSUPPORTED)
def test_unsupported_tokenizers_count_the_whole_text(kind: str) -> None:
    """Tokenizers that look back, do not split, or have patterns that are not understood."""
    tokenizer = made(UNSUPPORTED[kind], ["ab ab. 123 1234567"])
    pieces = passages_of(["ab " * 50, "1234 " * 50])
    whole = "\n".join(piece.text for piece in pieces)
    counter = IncrementalTokenCounter(tokenizer)

    assert not counter.is_incremental
    assert tokenizer.count(whole) == counter.count(whole, pieces)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_strip_spaces_count_the_whole_text(flag: str) -> None:
    """Such as a mask token that includes the space before it."""
    tokenizer = made(SUPPORTED["gpt2"], ["ab ab"], added=[AddedToken("<x>", **{flag: True})])

    assert not IncrementalTokenCounter(tokenizer).is_incremental


def test_passages_that_are_not_in_the_text_do_not_matter() -> None:
    """A template may do anything with them: upper case, or leave them out."""
    tokenizer = made(SUPPORTED["gpt2"], ["ab ab. AB AB."])
    pieces = passages_of(["ab ab. " * 30, "ba. " * 30])
    counter = IncrementalTokenCounter(tokenizer)
    texts = ["", pieces[0].text.upper(), pieces[1].text + pieces[0].text, pieces[0].text]

    assert [tokenizer.count(text) for text in texts] == [counter.count(text, pieces) for text in texts]


@in_turn(
    "pattern",
    [
        *(
            r"(?<=a)b",
            r"(?<!a)b",
            r"\bab",
            r"^a",
            r"a$",
            r"\Ga",
            r"(a)\1",
            r"(?:ab)+",
            r"[a-z",
            r"(ab",
            r"a)",
        ),
        *(r"(?i:[a-z]+)", r"(?i)ab", r"[]a]", r"{2}", r"\K", r"(?#c)a"),
    ],
)
def test_patterns_that_are_not_understood_are_refused(pattern: str) -> None:
    """Patterns that look back, and syntax that the parser does not know."""
    with pytest.raises(UnsupportedPattern):
        lookahead_of(pattern)


@in_turn(
    ("pattern", "classes", "breaks"),
    [
        (r"\s+(?!\S)|\s+", {r"\s"}, 2),
        (r"a{2,5}b?|\p{N}{1,3}", set(), 6),
        (r" ?[^\s\p{L}[:punct:]]+[\r\n]*", {r"[^\s\p{L}[:punct:]]", r"[\r\n]"}, 3),
        (r"(?i:'s|'ll)?x{2,}", {"x"}, 4),
        (r"a{2}+b++c*?", {"a", "b", "c"}, 3),
    ],
)
def test_the_lookahead_of_a_pattern(pattern: str, classes: set[str], breaks: int) -> None:
    """Its unbounded classes, and the class breaks that its longest alternative can cross."""
    assert (classes, breaks) == (set(lookahead_of(pattern).classes), lookahead_of(pattern).breaks)
