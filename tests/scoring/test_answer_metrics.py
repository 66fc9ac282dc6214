"""F1 and ROUGE-L equal the reference implementations."""

import re
import string
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

from streamsyn.scoring.answer_metrics import answer_score, f1, metric_of, rouge_l
from streamsyn.words import unspaced_letters
from tests.examples import in_turn

TEXTS = st.one_of(
    st.lists(st.sampled_from(["the", "A", "cat", "Cat.", "sat", "on", "1915", "mat,", "an"])).map(" ".join),
    st.text(st.characters(codec="utf-8"), max_size=60).filter(lambda text: not unspaced_letters(text)),
)


def reference_f1(said: str, gold: str) -> float:
    """SQuAD's definition, step by step: lower case, no punctuation, no articles, then bags of words."""

    def words(text: str) -> list[str]:
        text = "".join(char for char in text.lower() if char not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split()

    common = sum((Counter(words(said)) & Counter(words(gold))).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(words(said)), common / len(words(gold))
    return 2 * precision * recall / (precision + recall)


@given(TEXTS, TEXTS)
def test_f1_is_that_of_squad_and_longbench(said: str, gold: str) -> None:
    """Random texts score as by the definition."""
    assert reference_f1(said, gold) == pytest.approx(f1(said, gold))


@given(TEXTS, TEXTS.filter(lambda text: re.search("[a-z0-9]", text.lower())))
@example("İ", "i")
def test_rouge_l_is_that_of_rouge_score(said: str, gold: str) -> None:
    """Random texts score as by the package `rouge_score` without stemming."""
    expected = RougeScorer(["rougeL"], use_stemmer=False).score(gold, said)["rougeL"].fmeasure

    assert expected == pytest.approx(rouge_l(said, gold))


@pytest.mark.parametrize(
    ("said", "gold", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1: S1 and S2
        ("the gunman kill police", "police killed the gunman", 2 / 4),  # S1 and S3
        ("the gunman police killed", "police killed the gunman", 2 / 4),  # S1 and S4
        # the README of rouge_score: precision 0.625, recall 0.5555
        (
            "The quick brown dog jumps on the log.",
            "The quick brown fox jumps over the lazy dog",
            2 * 0.625 * (5 / 9) / (0.625 + 5 / 9),
        ),
    ],
)
def test_rouge_l_of_published_examples(said: str, gold: str, expected: float) -> None:
    """The examples of the paper and of the package have the published scores."""
    assert expected == pytest.approx(rouge_l(said, gold))


def test_rouge_l_of_other_scripts() -> None:
    """If the gold answer has no ASCII word, words of any letters are compared."""
    assert rouge_l("смотритель маяка спит", "Смотритель маяка.") == pytest.approx(4 / 5)
    assert rouge_l("смотритель", "...") == 0.0


@in_turn(
    ("said", "gold", "expected"),
    [
        ("The Georgia Peach.", "georgia peach", 1.0),  # articles, case and punctuation do not count
        ("It was the Georgia Peach", "The Georgia Peach", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("yes yes", "yes", 2 / 3),  # a word counts as often as both have it
        ("", "yes", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_f1_worked_by_hand(said: str, gold: str, expected: float) -> None:
    """Small cases that can be checked by hand."""
    assert expected == pytest.approx(answer_score("f1", said, gold))


def test_the_metric_goes_by_the_task() -> None:
    """F1 for questions, ROUGE-L for summaries; for unknown tasks the length of the gold answer decides."""
    long = "word " * 31
    assert ["f1", "f1", "rouge_l", "rouge_l"] == [
        metric_of(task, long) for task in ("HotpotQA", "narrativeqa", "govreport", "qmsum")
    ]
    assert ["f1", "rouge_l"] == [metric_of("mine", "word " * 30), metric_of("mine", long)]


def test_answers_in_scripts_without_spaces_are_compared_by_character() -> None:
    """Part of a Chinese answer scores in between, also beside Latin words; long ones get ROUGE-L."""
    gold, mixed = "\u5317\u4eac\u5e02", "Python \u7531\u5409\u591a\u521b\u5efa"
    said = (f"{gold}\u3002", gold[:2], "\u4e0a\u6d77")

    assert [1.0, 0.8, 0.0] == [f1(answer, gold) for answer in said]
    assert [1.0, 0.8] == [pytest.approx(rouge_l(answer, mixed)) for answer in (mixed, mixed[:-2])]
    assert ["f1", "rouge_l"] == [metric_of("own", "\u5317" * count) for count in (30, 31)]
