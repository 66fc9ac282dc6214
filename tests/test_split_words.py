"""Splitting text into words: hashes of words and n-grams do not depend on case, punctuation or machine."""

import subprocess
import sys
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.shingles import split_words

WORDS = st.lists(st.sampled_from(["river", "ÉTÉ", "x", "2024", "straße", "ab", "abc", "bab"]), max_size=30)
GAPS = st.sampled_from([" ", ", ", "\n\n", " -- ", ". ", "\u00a0", "\u2014", "\u3000"])


def test_case_punctuation_and_apostrophes_do_not_count() -> None:
    """Words are lower case, without punctuation; an apostrophe does not split one."""
    words = split_words(
        "\u201cIt\u2019s\u201d a U.S.-wide  TEST\u2014na\u00efve, \ufb01ne; co\u00adop's\n3.14%"
    )

    assert "its a u s wide test na\u00efve fine coops 3 14" == words.text(0, len(words))
    assert "a u" == words.text(1, 3)


def test_characters_are_words_where_no_spaces_are_put() -> None:
    """Chinese, Japanese and Thai are split by character, words in Latin letters among them are kept."""
    words = split_words("\u4e2d\u6587\u5b57\u3002Python\u306e\u30c6\u30b9\u30c8 \u0e44\u0e17\u0e22")

    split = "\u4e2d \u6587 \u5b57 python \u306e \u30c6 \u30b9 \u30c8 \u0e44 \u0e17 \u0e22"
    assert split == words.text(0, len(words))


@given(words=WORDS, data=st.data())
def test_what_stands_between_words_does_not_change_their_runs(words: list[str], data: st.DataObject) -> None:
    """Runs depend on the words and their order alone."""
    mixed = "".join(data.draw(GAPS) + data.draw(st.sampled_from([word, word.upper()])) for word in words)

    for length in (1, 3, 13):
        expected = split_words(" ".join(words)).ngrams(length).tolist()
        assert expected == split_words(mixed).ngrams(length).tolist()
        assert max(0, len(words) - length + 1) == len(expected)


@given(first=WORDS, second=WORDS)
def test_different_words_have_different_numbers(first: list[str], second: list[str]) -> None:
    """Two runs have one number only if they are of the same words."""

    def numbers(words: list[str]) -> dict[int, tuple[str, ...]]:
        folded = [word.casefold() for word in words]
        runs = split_words(" ".join(words)).ngrams(2).tolist()
        return dict(zip(runs, pairwise(folded), strict=True))

    one, other = numbers(first), numbers(second)

    assert all(one[number] == other[number] for number in one.keys() & other.keys())
    assert len(set(one.values())) == len(one)
    assert (set(one.values()) & set(other.values()) == set()) == (one.keys().isdisjoint(other))


@given(text=st.text())
def test_any_text_can_be_split(text: str) -> None:
    """Whatever characters there are, each word has a text and a number."""
    words = split_words(text)
    texts = [words.text(number, number + 1) for number in range(len(words))]

    assert all(texts)
    assert not any(" " in word for word in texts)
    assert " ".join(texts) == words.text(0, len(words))
    assert words.hashes.tolist() == words.ngrams(1).tolist()


@given(text=st.text(st.characters(max_codepoint=0x2E7F)))
def test_simple_characters_are_split_as_any_others(text: str) -> None:
    """A rare ideograph has a text normalised as a whole; its words are those found character by character."""
    whole = split_words(f"{text}\n\U00020000")
    words = split_words(text)

    assert whole.hashes.tolist()[:-1] == words.hashes.tolist()
    assert whole.text(0, len(words)) == words.text(0, len(words))


def test_numbers_are_the_same_everywhere() -> None:
    """No process-wide hash seed and no machine plays a part: these numbers are fixed."""
    text = "The quick brown fox jumps over \u4e2d\u6587 and the na\u00efve dog"
    code = f"from streamsyn.shingles import split_words; print(split_words({text!r}).ngrams(5).tolist())"
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout.decode()
        for seed in ("1", "2")
    }

    assert {f"{split_words(text).ngrams(5).tolist()}\n"} == said
    assert 2675416862814903473 == split_words(text).ngrams(5).tolist()[0]
