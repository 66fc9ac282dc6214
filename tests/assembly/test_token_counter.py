"""Counts pieced together are those of the whole text, whatever the tokenizer, the passages and the glue."""

import random
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from streamsyn.assembly.pre_tokenizer import Unreadable, reach_of
from streamsyn.assembly.token_counter import IncrementalTokenCounter
from streamsyn.assembly.window import Passage
from tests.assembly.tokenizers_made import SPLICED, WHOLE, made

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
    """Many fragments for few choices: hypothesis draws what varies, chance repeats it."""
    some = draw(st.lists(st.sampled_from(fragments), min_size=1, max_size=8))
    size = draw(st.integers(0, most))
    chance = random.Random(draw(st.integers(0, 2**32)))
    return "".join(chance.choice(some) for _ in range(size))


@st.composite
def cases(
    draw: st.DrawFn, kinds: dict[str, Any], bodies: list[list[str]], edges: list[list[str]]
) -> tuple[IncrementalTokenCounter, Any, str, list[str]]:
    """A tokenizer and passages that stand in a text. It has learnt that text by heart, or a little of it."""
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
    splicer = IncrementalTokenCounter(tokenizer, settle_chars=draw(st.sampled_from([1, 24])))
    return splicer, tokenizer, whole, inside


FAR = {kind: SPLICED[kind] for kind in ("looks ahead", "fours", "gpt2")}


@settings(max_examples=300, deadline=None)
@given(
    cases(SPLICED, [FRAGMENTS, FEW], [FRAGMENTS, FEW, AHEAD]) | cases(FAR, [AHEAD, [*AHEAD, " "]], [AHEAD])
)
def test_what_is_pieced_together_is_exact(case: tuple[IncrementalTokenCounter, Any, str, list[str]]) -> None:
    """The heart of exact lengths: tails, glue and heads give what encoding all of the text gives."""
    splicer, tokenizer, whole, inside = case
    pieces = passages_of(inside)
    cut = sum(splicer.cuts(piece).head >= 0 for piece in pieces)
    event(f"{cut} of {len(pieces)} passages cut")

    assert splicer.is_splicing
    assert tokenizer.count(whole) == splicer.count(whole, pieces)
    assert [tokenizer.count(text.strip()) for text in inside] == [splicer.alone(piece) for piece in pieces]


@pytest.mark.parametrize("kind", [kind for kind in SPLICED if kind not in ("looks ahead", "fours")])
def test_most_of_a_long_text_is_not_encoded_again(kind: str) -> None:
    """A passage of a few hundred words is cut near both ends, whatever the kind of tokenizer."""
    chance = random.Random(2)
    text = "\n".join(" ".join(chance.choices(["abba", "Ab", "b", "a"], k=12)) + ". " for _ in range(30))
    # Where spaces are dropped, so may be characters that are not known, and one could not tell.
    model = "wordpiece" if kind == "words" else "bpe"
    splicer = IncrementalTokenCounter(made(SPLICED[kind], [text], model=model))
    cuts = splicer.cuts(*passages_of([text]))

    assert 0 < cuts.head < 120
    assert len(text.strip()) - 120 < cuts.tail
    assert 0 < cuts.between < cuts.total


@pytest.mark.parametrize("kind", WHOLE)
def test_what_cannot_be_pieced_together_is_counted_whole(kind: str) -> None:
    """Tokenizers that look back, or do not split, or of which one cannot say."""
    tokenizer = made(WHOLE[kind], ["ab ab. 123 1234567"])
    pieces = passages_of(["ab " * 50, "1234 " * 50])
    whole = "\n".join(piece.text for piece in pieces)
    splicer = IncrementalTokenCounter(tokenizer)

    assert not splicer.is_splicing
    assert tokenizer.count(whole) == splicer.count(whole, pieces)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_take_their_surroundings_along_are_counted_whole(flag: str) -> None:
    """Such as a mask that swallows the space before it."""
    tokenizer = made(SPLICED["gpt2"], ["ab ab"], added=[AddedToken("<x>", **{flag: True})])

    assert not IncrementalTokenCounter(tokenizer).is_splicing


def test_passages_that_are_not_in_the_text_do_not_matter() -> None:
    """A template may do anything with them: upper case, or leave them out."""
    tokenizer = made(SPLICED["gpt2"], ["ab ab. AB AB."])
    pieces = passages_of(["ab ab. " * 30, "ba. " * 30])
    splicer = IncrementalTokenCounter(tokenizer)
    texts = ["", pieces[0].text.upper(), pieces[1].text + pieces[0].text, pieces[0].text]

    assert [tokenizer.count(text) for text in texts] == [splicer.count(text, pieces) for text in texts]


@pytest.mark.parametrize(
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
    """What looks back, and what this reader does not know."""
    with pytest.raises(Unreadable):
        reach_of(pattern)


@pytest.mark.parametrize(
    ("pattern", "classes", "walls"),
    [
        (r"\s+(?!\S)|\s+", {r"\s"}, 2),
        (r"a{2,5}b?|\p{N}{1,3}", set(), 6),
        (r" ?[^\s\p{L}[:punct:]]+[\r\n]*", {r"[^\s\p{L}[:punct:]]", r"[\r\n]"}, 3),
        (r"(?i:'s|'ll)?x{2,}", {"x"}, 4),
        (r"a{2}+b++c*?", {"a", "b", "c"}, 3),
    ],
)
def test_the_reach_of_a_pattern(pattern: str, classes: set[str], walls: int) -> None:
    """Its unbounded classes, and how many steps besides their runs its longest alternative takes."""
    assert (classes, walls) == (set(reach_of(pattern).classes), reach_of(pattern).walls)
