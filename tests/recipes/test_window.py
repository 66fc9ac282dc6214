"""Windows of documents: the words that they say, in their own white space, evenly from all over."""

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.recipes.instruction import Window, draw_window
from streamsyn.words import words_of

WORD = st.text(st.sampled_from("ab.?!'\u00e9\u4e2d"), min_size=1, max_size=5)
SPACE = st.text(st.sampled_from(" \n\t\u3000\x85"), min_size=1, max_size=4)
DOCUMENT = st.tuples(st.just("") | SPACE, st.lists(st.tuples(WORD, SPACE), min_size=1, max_size=120)).map(
    lambda parts: parts[0] + "".join(word + space for word, space in parts[1])
)
BOOK = "\n\n".join(" ".join(f"This is {part}-{n}, of the tale." for n in range(30)) for part in range(40))
"""40 paragraphs of 180 words, in sentences of 6."""


@given(DOCUMENT, st.integers(1, 130), st.integers(0, 999))
def test_a_window_is_a_part_of_its_document(document: str, words: int, seed: int) -> None:
    """As many words as were asked for, those from `first` on, cut out as they stand."""
    window = draw_window(document, words, Random(seed))
    all_words = words_of(document)
    assert (min(words, len(all_words)), len(all_words)) == (window.words, window.of)
    assert all_words[window.first : window.first + window.words] == words_of(window.text)
    assert window.text in document
    assert window.text.strip() == window.text
    assert window.is_whole == (words >= len(all_words))


@given(DOCUMENT, st.integers(1, 50), st.integers(0, 999))
def test_the_same_draw_gives_the_same_window(document: str, words: int, seed: int) -> None:
    """Nothing but the document and the draw decides."""
    assert draw_window(document, words, Random(seed)) == draw_window(document, words, Random(seed))


def test_a_document_that_is_short_enough_is_taken_whole() -> None:
    """Also where no length is asked for; only the white space round it goes."""
    for words in (None, 2, 3):
        assert Window("two  words", 0, 2, 2) == draw_window("\n two  words \n", words, Random(0))


def test_a_window_begins_where_something_begins() -> None:
    """With a paragraph where one is near, else with a sentence; the place drawn is all over the document."""
    windows = [draw_window(BOOK, 400, Random(seed)) for seed in range(300)]
    assert {0} == {window.first % 6 for window in windows if window.first < 40 * 180 - 400}
    paragraphs = sum(window.first % 180 == 0 for window in windows)
    assert paragraphs > 290  # 100 words either way reach one, but at the very end
    sentences = [draw_window(BOOK, 20, Random(seed)).first for seed in range(300)]
    assert {0} == {first % 6 for first in sentences}
    assert len(set(sentences)) > 200


def test_windows_lie_evenly() -> None:
    """Each quarter of a book has about a quarter of the draws, the ends too."""
    plain = " ".join(str(number) for number in range(4000))
    firsts = [draw_window(plain, 100, Random(seed)).first for seed in range(2000)]
    quarters = Counter(first * 4 // 3901 for first in firsts)
    assert all(400 < quarters[quarter] < 600 for quarter in range(4))
    assert min(firsts) < 20
    assert max(firsts) > 3880
