"""How well a text answers a question: F1 of words, ROUGE-L."""

import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from rapidfuzz.distance import LCSseq

from streamsyn.assembly.sample_prompts import KNOWN_TASKS

Metric: TypeAlias = Literal["f1", "rouge_l"]


_FAMILIES: Final[dict[str, Metric]] = {
    "single_doc_qa": "f1",
    "multi_doc_qa": "f1",
    "summary": "rouge_l",
    "meeting_query": "rouge_l",
}


_SHORT_WORDS: Final = 30
"""A gold answer of an unknown task is compared as one to a question when it has no more words."""


_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


_ARTICLE: Final = re.compile(r"\b(?:a|an|the)\b")


_ASCII_WORD: Final = re.compile(r"[a-z0-9]+")


_WORD: Final = re.compile(r"\w+")


def metric_of(task: str, gold: str) -> Metric:
    """What answers of a task are measured by; for an unknown one the gold answer's length decides."""
    family = KNOWN_TASKS.get(task.lower(), "general")
    return _FAMILIES.get(family) or ("f1" if len(gold.split()) <= _SHORT_WORDS else "rouge_l")


def measured(metric: Metric, said: str, gold: str) -> float:
    """`said` beside `gold` by the metric of that name."""
    return _METRICS[metric](said, gold)


def f1(said: str, gold: str) -> float:
    """F1 of the words that both have, each as often as both have it; case, articles and punctuation aside."""
    words, golden = _plain_words(said), _plain_words(gold)
    common = (Counter(words) & Counter(golden)).total()
    return 2 * common / (len(words) + len(golden)) if common else 0.0


def rouge_l(said: str, gold: str) -> float:
    """F-measure of the longest run of words that both have in this order, gaps allowed.

    Words are of the letters a to z and of digits; where `gold` has none of these, of any letters.
    """
    word = _ASCII_WORD if _ASCII_WORD.search(gold.lower()) else _WORD
    words, golden = word.findall(said.lower()), word.findall(gold.lower())
    if not words or not golden:
        return 0.0
    return 2 * LCSseq.similarity(words, golden) / (len(words) + len(golden))


def _plain_words(text: str) -> list[str]:
    return _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split()


_METRICS: Final[dict[Metric, Callable[[str, str], float]]] = {"f1": f1, "rouge_l": rouge_l}
