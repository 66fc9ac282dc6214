"""Excerpts: cut texts with marked answers, and bottom-k samples."""

import re

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.report.report_examples import BottomK, answer_spans, draw_key, excerpt, shortened, visible
from tests.examples import in_turn

spans = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)).map(sorted).map(tuple), max_size=4)


@given(st.text(max_size=300), st.text(max_size=40), spans)
def test_a_short_text_is_whole(text: str, answer: str, facts: list[tuple[int, int]]) -> None:
    """The segments of a short text are the text, whatever is marked in it."""
    assert visible(text) == "".join(segment.text for segment in excerpt(text, answer, facts))


@given(st.text("ab\n", min_size=200, max_size=3000), spans)
def test_what_is_cut_is_counted(text: str, facts: list[tuple[int, int]]) -> None:
    """The characters shown and the number left out add up to the whole text."""
    segments = excerpt(text, "", facts, long_chars=200)
    cut = sum(int(segment.text.split()[0].replace(",", "")) for segment in segments if segment.kind == "cut")

    assert len(text) == cut + sum(len(segment.text) for segment in segments if segment.kind != "cut")


def test_a_long_text_keeps_answer_and_facts() -> None:
    """Start, end, facts and answer are kept; the rest is cut."""
    filler = "word " * 4000
    text = f"START {filler}FACTS here {filler}the Blue Lantern {filler} END"
    at = text.index("FACTS")
    shown = excerpt(text, "blue lantern", [(at, at + 10)])

    assert ["Blue Lantern"] == [segment.text for segment in shown if segment.kind == "answer"]
    assert ["FACTS here"] == [segment.text for segment in shown if segment.in_facts]
    assert shown[0].text.startswith("START")
    assert shown[-1].text.endswith("END")
    assert 3 == sum(segment.kind == "cut" for segment in shown)
    assert sum(len(segment.text) for segment in shown) < 6000


@in_turn(
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
    """The whole answer if the text has it, else its distinctive words; never parts of words."""
    assert marked == [text[start:end] for start, end in answer_spans(text, answer)]


def test_no_control_character_gets_through() -> None:
    """Invisible characters are substituted, except line ends and tabs."""
    everything = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x202E, 0x2066)))

    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e\u2066]", visible(everything))
    assert "\t\n" in visible("\t\n")


def test_a_shortened_text_says_how_much_is_missing() -> None:
    """A short text is unchanged."""
    assert "abc" == shortened("abc", 3)
    assert "abc \u2026 (2 characters left out)" == shortened("abcde", 3)
    assert "abc \u2026" == shortened("abcde", 3, show_rest=False)


@given(st.lists(st.text(), unique=True, max_size=60), st.randoms())
def test_a_draw_does_not_depend_on_order(names: list[str], rng: "object") -> None:
    """The same names in a different order give the same sample."""
    ours, theirs = BottomK[str](5), BottomK[str](5)
    for name in names:
        ours.offer(draw_key("x", name), lambda name=name: name)  # type: ignore[misc]
    for name in sorted(names):
        theirs.offer(draw_key("x", name), lambda name=name: name)  # type: ignore[misc]

    assert ours.items == theirs.items
    assert min(5, len(names)) == len(ours.items)
