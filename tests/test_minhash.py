"""MinHash signatures: good estimates, and the same everywhere."""

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.shingles import (
    BAND_ROWS,
    PERMUTATIONS,
    band_keys,
    share_keys,
    signature,
    signatures,
    similarity,
)
from tests.examples import examples

VOCABULARY = ["".join(random.Random(number).choices("abcdefghij", k=6)) for number in range(3000)]


def writing(seed: int, words: int) -> list[str]:
    """Words of a made-up text."""
    return random.Random(seed).choices(VOCABULARY, k=words)


def jaccard(one: list[str], other: list[str]) -> float:
    """The true similarity of two texts' runs of five words."""
    first, second = (set(zip(*(text[n:] for n in range(5)), strict=False)) for text in (one, other))
    return len(first & second) / len(first | second)


def changed(text: list[str], share: float, seed: int) -> list[str]:
    """The text with a share of its words replaced."""
    chance = random.Random(seed)
    return [chance.choice(VOCABULARY) if chance.random() < share else word for word in text]


def test_the_estimate_is_as_good_as_128_numbers_allow() -> None:
    """Over 300 pairs of all similarities: no bias, a standard error below 0.045, none off by 0.2."""
    errors = []
    for number in range(300):
        one = writing(number, 400)
        other = changed(one, (number % 30) / 100, number)
        estimate = similarity(signature(" ".join(one)), signature(" ".join(other)))
        errors.append(estimate - jaccard(one, other))

    assert abs(sum(errors) / len(errors)) < 0.01
    assert (sum(error**2 for error in errors) / len(errors)) ** 0.5 < 0.045
    assert max(map(abs, errors)) < 0.2


def test_similar_texts_share_a_band_and_others_do_not() -> None:
    """Of pairs with similarity 0.8 nearly all share a key, of unrelated ones none."""
    shared = unrelated = 0
    for number in range(200):
        one = writing(number, 500)
        other = one[50:] + writing(-number - 1, 4)
        assert jaccard(one, other) == pytest.approx(0.89, abs=0.02)
        first = set(signature(" ".join(one)).bands)
        shared += not first.isdisjoint(signature(" ".join(other)).bands)
        unrelated += not first.isdisjoint(signature(" ".join(writing(number + 1000, 500))).bands)

    assert 200 == shared
    assert 0 == unrelated


@given(st.lists(st.sampled_from(["alpha", "beta gamma", "delta", "Epsilon."]), max_size=40))
@examples(30)
def test_case_and_punctuation_do_not_count(parts: list[str]) -> None:
    """The same words in the same order are the same text."""
    text = " ".join(parts)

    assert signature(text) == signature(text.upper().replace(" ", ", "))


def test_the_order_of_paragraphs_does_not_count() -> None:
    """Only the runs across the seams differ when paragraphs are exchanged."""
    first, second = " ".join(writing(1, 500)), " ".join(writing(2, 500))

    assert similarity(signature(f"{first}\n\n{second}"), signature(f"{second}\n\n{first}")) > 0.95


def test_short_texts_are_one_run() -> None:
    """Below five words a text is like itself alone; texts without words are all alike."""
    assert 1.0 == similarity(signature("Yes, it is."), signature("yes it is"))
    assert similarity(signature("Yes, it is."), signature("No, it is not.")) < 0.1
    assert 1.0 == similarity(signature(""), signature(" ?! "))
    assert similarity(signature(""), signature("yes")) < 0.1


def test_texts_without_spaces_have_runs_too() -> None:
    """Of a Chinese text with one sentence changed most is still the same."""
    chance = random.Random(3)
    text = "".join(chr(chance.randrange(0x4E00, 0x9000)) for _ in range(500))

    assert 0.85 < similarity(signature(text), signature(text[:480] + "\u4e00" * 20)) < 1.0


@given(st.lists(st.text(st.sampled_from("ab c\u00e9\u2019\u0301\u4e2d\n."), max_size=40), max_size=6))
@examples(60)
def test_texts_signed_together_have_the_signatures_of_each_alone(texts: list[str]) -> None:
    """A text's n-grams end with it, whatever characters are left out of it or of those before it."""
    assert [signature(text) for text in texts] == signatures(texts)


def test_any_number_of_rows_makes_bands() -> None:
    """A band's key stands for its numbers and its place."""
    values = signature("one two three four five six").values

    assert 4 * PERMUTATIONS == len(values)
    assert signature("one two three four five six").bands == band_keys(values, BAND_ROWS)
    assert [128, 42, 16, 1] == [len(set(band_keys(values, rows))) for rows in (1, 3, 8, 128)]
    assert all(-(2**63) <= key < 2**63 for key in band_keys(values, 1))


def test_a_signature_is_the_same_everywhere() -> None:
    """Neither the process nor its hash seed plays a part; a change would spoil every index on disk."""
    text = "The quick brown fox jumps over the lazy dog, and then some more."
    code = f"from streamsyn.shingles import signature; print(signature({text!r}).bands[:2])"
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout.decode()
        for seed in ("1", "2")
    }

    assert {f"{signature(text).bands[:2]}\n"} == said
    assert (2915088870176561790, 594895024713841293) == signature(text).bands[:2]


def test_signatures_of_texts_share_keys_if_any_two_do() -> None:
    """However many there are, and wherever in the list the two are."""
    one = writing(1, 200)
    signed = [signature(" ".join(writing(number, 200))) for number in range(2, 12)]
    near = signature(" ".join([*one[20:], "end"]))

    assert not share_keys([*signed, near])
    assert share_keys([near, *signed, signature(" ".join(one))])
    assert not share_keys([near])
