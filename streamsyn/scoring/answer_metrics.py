"""How close an answer is to the gold answer, from 0 to 1: F1 of words, or ROUGE-L.

Sources: the normalisation and F1 are those of SQuAD's evaluation script (Rajpurkar et al., arXiv 1606.05250),
which LongBench (arXiv 2308.14508) uses for its questions. ROUGE-L is from Lin, "ROUGE: A Package for
Automatic Evaluation of Summaries", 2004; words and F-measure are those of the package `rouge_score` without
stemming.
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from rapidfuzz.distance import LCSseq

from streamsyn.assembly.sample_prompts import KNOWN_TASKS
from streamsyn.words import unspaced_letters, word_count, words_of

Metric: TypeAlias = Literal["f1", "rouge_l"]

_FAMILIES: Final[dict[str, Metric]] = {
    "single_doc_qa": "f1",
    "multi_doc_qa": "f1",
    "summary": "rouge_l",
    "meeting_query": "rouge_l",
}
_SHORT_WORDS: Final = 30
"""Gold answers of unknown tasks with at most this many words are compared by F1."""
_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)
_ARTICLE: Final = re.compile(r"\b(?:a|an|the)\b")
_ASCII_WORD: Final = re.compile(r"[a-z0-9]+")
_WORD: Final = re.compile(r"\w+")


def metric_of(task: str, gold: str) -> Metric:
    """The metric for answers of a task. For unknown tasks the length of the gold answer decides."""
    family = KNOWN_TASKS.get(task.lower(), "general")
    return _FAMILIES.get(family) or ("f1" if word_count(gold) <= _SHORT_WORDS else "rouge_l")


def answer_score(metric: Metric, answer: str, gold: str) -> float:
    """The score of an answer against the gold answer."""
    return _METRICS[metric](answer, gold)


def f1(answer: str, gold: str) -> float:
    """F1 of the multisets of words, ignoring case, articles and punctuation."""
    words, gold_words = _plain_words(answer), _plain_words(gold)
    common = (Counter(words) & Counter(gold_words)).total()
    return 2 * common / (len(words) + len(gold_words)) if common else 0.0


def rouge_l(answer: str, gold: str) -> float:
    """F-measure of the longest common subsequence of words.

    Words consist of ASCII letters and digits; of any letters if `gold` has none of these, or has more letters
    of scripts without spaces.
    """
    in_ascii = len(_ASCII_WORD.findall(gold.lower()))
    if in_ascii and in_ascii >= unspaced_letters(gold):
        words, gold_words = _ASCII_WORD.findall(answer.lower()), _ASCII_WORD.findall(gold.lower())
    else:
        words, gold_words = _any_words(answer), _any_words(gold)
    if not words or not gold_words:
        return 0.0
    return 2 * LCSseq.similarity(words, gold_words) / (len(words) + len(gold_words))


def _plain_words(text: str) -> list[str]:
    plain = text.lower().translate(_PUNCTUATION)
    if unspaced_letters(plain):
        plain = " ".join(_WORD.findall(plain))  # the table has ASCII punctuation alone
    return words_of(_ARTICLE.sub(" ", plain))


def _any_words(text: str) -> list[str]:
    return [word for letters in _WORD.findall(text.lower()) for word in words_of(letters)]


_METRICS: Final[dict[Metric, Callable[[str, str], float]]] = {"f1": f1, "rouge_l": rouge_l}
