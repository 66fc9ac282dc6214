"""Texts, cut and marked."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.report.excerpts import answer_spans, excerpt, shortened, visible
from streamsyn.report.reader_samples import BottomK, drawn

spans = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)).map(sorted).map(tuple), max_size=4)


@given(st.text(max_size=300), st.text(max_size=40), spans)
def test_a_short_text_is_whole(text: str, answer: str, facts: list[tuple[int, int]]) -> None:
    """Pieces of a short text are the text, whatever is marked in it."""
    assert visible(text) == "".join(piece.text for piece in excerpt(text, answer, facts))


@given(st.text("ab\n", min_size=200, max_size=3000), spans)
def test_what_is_cut_is_counted(text: str, facts: list[tuple[int, int]]) -> None:
    """The characters shown and those said to be left out are all there are."""
    pieces = excerpt(text, "", facts, long_chars=200)
    cut = sum(int(piece.text.split()[0].replace(",", "")) for piece in pieces if piece.kind == "cut")

    assert len(text) == cut + sum(len(piece.text) for piece in pieces if piece.kind != "cut")


def test_a_long_text_keeps_what_matters() -> None:
    """Start, end, the facts and the answer stay; the middle of nothing goes."""
    filler = "word " * 4000
    text = f"START {filler}FACTS here {filler}the Blue Lantern {filler} END"
    at = text.index("FACTS")
    shown = excerpt(text, "blue lantern", [(at, at + 10)])

    assert ["Blue Lantern"] == [piece.text for piece in shown if piece.kind == "answer"]
    assert ["FACTS here"] == [piece.text for piece in shown if piece.in_facts]
    assert shown[0].text.startswith("START")
    assert shown[-1].text.endswith("END")
    assert 3 == sum(piece.kind == "cut" for piece in shown)
    assert sum(len(piece.text) for piece in shown) < 6000


@pytest.mark.parametrize(
    ("text", "answer", "marked"),
    [
        ("He was the Georgia\n peach.", "The Georgia Peach", ["the Georgia\n peach"]),
        ("Both yes and yesterday.", "yes", ["yes"]),
        ("Born 24 May 1923 in Mayo.", "on 24 of May, 1923", ["24", "1923"]),
        ("Either (a+)+$ here", "(a+)+$", ["(a+)+$"]),
        ("anything", "", []),
    ],
)
def test_words_of_the_answer(text: str, answer: str, marked: list[str]) -> None:
    """The whole answer where it stands, else its telling words; never parts of words."""
    assert marked == [text[start:end] for start, end in answer_spans(text, answer)]


def test_no_control_character_gets_through() -> None:
    """Signs stand for what is not to be seen, but for line ends and tabs."""
    everything = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x202E, 0x2066)))

    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e\u2066]", visible(everything))
    assert "\t\n" in visible("\t\n")


def test_what_is_shortened_says_so() -> None:
    """A text that is cut tells how much is missing."""
    assert "abc" == shortened("abc", 3)
    assert "abc \u2026 (2 characters left out)" == shortened("abcde", 3)
    assert "abc \u2026" == shortened("abcde", 3, is_told=False)


@given(st.lists(st.text(), unique=True, max_size=60), st.randoms())
def test_a_draw_does_not_depend_on_order(names: list[str], rng: "object") -> None:
    """The same names in another order are drawn the same; only what is kept is made."""
    ours, theirs = BottomK[str](5), BottomK[str](5)
    for name in names:
        ours.offer(drawn("x", name), lambda name=name: name)  # type: ignore[misc]
    for name in sorted(names):
        theirs.offer(drawn("x", name), lambda name=name: name)  # type: ignore[misc]

    assert ours.items == theirs.items
    assert min(5, len(names)) == len(ours.items)
