"""Words in every script: as `str.split` finds them where spaces are written, and by letters elsewhere."""

import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.assembly.corpus import cut
from streamsyn.config.sections import ChecksSection
from streamsyn.recipes.checks import Checks
from streamsyn.recipes.instruction import draw_window
from streamsyn.words import (
    normalised,
    unspaced_letters,
    word_count,
    word_starts,
    words_and_filler,
    words_of,
)
from tests.examples import examples, in_turn

SPACES = st.text(st.sampled_from([chr(code) for code in range(0x3005) if chr(code).isspace()] + ["a"]))
CHINESE = "\u5929\u5730\u7384\u9ec4\uff0c\u5b87\u5b99\u6d2a\u8352\u3002"
"""Eight characters with their punctuation."""
THAI = (
    "\u0e21\u0e19\u0e38\u0e29\u0e22\u0e4c\u0e17\u0e31\u0e49\u0e07\u0e2b\u0e25\u0e32\u0e22\u0e40\u0e01\u0e34\u0e14"
    "\u0e21\u0e32\u0e21\u0e35\u0e2d\u0e34\u0e2a\u0e23\u0e30\u0e41\u0e25\u0e30\u0e40\u0e2a\u0e21\u0e2d\u0e20\u0e32"
    "\u0e04\u0e01\u0e31\u0e19\u0e43\u0e19\u0e40\u0e01\u0e35\u0e22\u0e23\u0e15\u0e34\u0e28\u0e31\u0e01\u0e14\u0e34"
    "\u0e4c\u0e41\u0e25\u0e30\u0e2a\u0e34\u0e17\u0e18\u0e34"
)
"""The first sentence of the declaration of human rights: 13 words."""


@given((st.text() | SPACES).filter(lambda text: not unspaced_letters(text)))
def test_words_are_those_of_split_where_spaces_are_written(text: str) -> None:
    """With any white space; punctuation belongs to its word."""
    assert text.split() == words_of(text)
    assert len(text.split()) == word_count(text)


@examples(200)
@given(st.text(st.characters(codec="utf-8") | st.sampled_from(CHINESE + THAI + " a")))
def test_no_character_is_lost(text: str) -> None:
    """In any script, all that is not white space is in a word; and a text may be cut where a word begins."""
    starts = [int(start) for start in word_starts(text)]

    assert "".join(text.split()) == "".join("".join(words_of(text)).split())
    assert word_count(text) == len(starts)
    for start in starts[:3]:
        assert [at - start for at in starts if at >= start] == word_starts(text[start:]).tolist()


@given(st.sampled_from(["", "b", "b" * 300, "\u4e2d" * 300]), (st.text() | SPACES))
def test_normalised_texts_have_one_space_between_words(before: str, text: str) -> None:
    """In texts of any length and script; upper case and lower case are the same."""
    assert " ".join((before + text).casefold().split()) == normalised(before + text)


def test_no_character_beyond_the_table_is_white_space() -> None:
    """As Unicode has it today; another Python may have more."""
    assert [] == [code for code in range(0x20000, 0x110000) if chr(code).isspace()]


@in_turn(
    ("text", "expected"),
    [
        (CHINESE, 8),
        ("\u7528Python\u5199\u3002Hello", 4),
        ("\u3072\u3089\u304c\u306a\u3068\u30ab\u30bf\u30ab\u30ca", 9),
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", 2),
        ("\U00020000\U00020001", 2),
        ("2024\u5e745\u6708", 4),
    ],
)
def test_each_ideograph_and_kana_is_a_word(text: str, expected: int) -> None:
    """Punctuation is not, Latin words among them are kept whole, and Korean has spaces."""
    assert expected == word_count(text)


def test_thai_has_about_as_many_words_as_a_dictionary_finds() -> None:
    """Without one; equal text is divided in the same way wherever it stands."""
    assert 9 <= word_count(THAI) <= 17
    once, twice = words_of(THAI), words_of(f"x {THAI}{THAI}")
    assert twice[1 : len(once)] == once[:-1]


@pytest.mark.parametrize("sentence", [CHINESE, THAI, "The mill wheel goes round. "])
def test_a_loop_is_repetition_in_every_script(sentence: str) -> None:
    """The same sentence 300 times."""
    assert Checks(ChecksSection()).measure(sentence * 300)["repetition"] > 0.95


@pytest.mark.parametrize("filler", ["\n" * 3000, "\n \n" * 1500, "=" * 6000, "\u3002" * 6000])
def test_filler_is_repetition(filler: str) -> None:
    """Runs of blank lines and of one character; a ruler or two, and paragraphs, are not."""
    prose = " ".join(f"word{number}" for number in range(300))
    ruled = f"{prose}\n\n{'-' * 80}\n\n{prose.upper()}\n\n{'-' * 80}\n"

    assert Checks(ChecksSection()).measure(f"{prose}{filler} end")["repetition"] > 0.6
    assert Checks(ChecksSection()).measure(ruled)["repetition"] < 0.05
    assert prose.split() == words_and_filler(prose.replace(" ", "\n\n"))[1]


RUNS = st.builds(
    lambda character, times: character * times,
    st.sampled_from(["=", "a", "\u3002", "\u5929", "\n", "\n ", " ", "word ", "\U0001f600"]),
    st.sampled_from([1, 2, 3, 22, 23, 24, 25, 48]),
)


@examples(200)
@given(st.lists(RUNS | st.text(max_size=5), max_size=6).map("".join))
def test_filler_is_found_wherever_it_is(text: str) -> None:
    """Filler adds words where a run of a character or blank lines are, and only there."""
    words, with_filler = words_and_filler(text)

    has_run = any(len(set(text[at : at + 24])) == 1 for at in range(len(text) - 23) if text[at].strip())
    has_blank_lines = re.search(r"\n[^\S\n]*\n[^\S\n]*\n", text) is not None
    assert words == words_of(text)
    assert (has_run or has_blank_lines) == (with_filler != words)


@pytest.mark.parametrize("sentence", [CHINESE, THAI])
def test_windows_and_passages_are_cut_in_every_script(sentence: str) -> None:
    """To the words that were asked for; a passage ends with a sentence where one is near."""
    document = sentence * 500
    window = draw_window(document, 300, Random(1))
    passages = list(cut([document], 300))

    assert 300 == window.words == word_count(window.text)
    assert document == "".join(passages)
    assert all(word_count(passage) <= 300 for passage in passages)
    if sentence == CHINESE:
        assert all(passage.endswith("\u3002") for passage in passages)


def test_words_are_counted_by_this_module_alone() -> None:
    """Nothing else counts what `str.split` returns."""
    package = Path(__file__).parent.parent / "streamsyn"
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        if path.name != "words.py"
        for line in path.read_text("utf-8").splitlines()
        if "len(" in line and ".split())" in line
    ]

    assert [] == found
