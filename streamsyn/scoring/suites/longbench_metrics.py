"""The published metrics of LongBench (arXiv 2308.14508), version 1, from 0 to 1.

The rules are those of its evaluation (github.com/THUDM/LongBench) and of the packages that it uses:

    f1, f1_zh          SQuAD's F1 of words; Chinese words as `jieba` cuts them
    rouge, rouge_zh    ROUGE-L as the package `rouge` 1.0.1 defines it: over the sets of words that the
                       longest common subsequences of sentences hold
    classes            1 / the number of classes named, if the right one is among them
    paragraph, count   the share of the numbers in the answer that are the right one
    code               similarity of the first line of code, in whole percent: fuzzywuzzy's ratio, which is
                       difflib's where python-Levenshtein is not installed, and LongBench does not ask for it

On 1,260 pairs of an answer and right answers of all data sets, they are equal to what its own code returns.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from importlib import import_module
from itertools import chain
from typing import Any, Final

from streamsyn.errors import ConfigError

_CHINESE_MARKS: Final = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"  # noqa: RUF001
    "〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
_MARKS: Final = str.maketrans("", "", string.punctuation + _CHINESE_MARKS)
_ASCII_MARKS: Final = str.maketrans("", "", string.punctuation)
_ARTICLE: Final = re.compile(r"\b(?:a|an|the)\b")
_NUMBER: Final = re.compile(r"\d+")
_FIRST_LINE: Final = frozenset({"trec", "triviaqa", "samsum", "lsht"})
"""Data sets with examples in the prompt, which models continue: only the first line is the answer."""

METRICS: Final = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), "f1"
    ),
    "multifieldqa_zh": "f1_zh",
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), "rouge"),
    **dict.fromkeys(("dureader", "vcsum"), "rouge_zh"),
    **dict.fromkeys(("trec", "lsht"), "classes"),
    "passage_retrieval_en": "paragraph",
    "passage_retrieval_zh": "paragraph_zh",
    "passage_count": "count",
    **dict.fromkeys(("lcc", "repobench-p"), "code"),
}
"""The metric of each data set."""


def longbench_score(dataset: str, answer: str, wanted: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The score of an answer: that of the alternative that it is closest to.

    Args:
        dataset: A key of `METRICS`.
        answer: The model's answer.
        wanted: Alternative right answers.
        classes: All classes, for data sets that are classified.

    Raises:
        ConfigError: The data set is Chinese and jieba is not installed.
    """
    if dataset in _FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    if METRICS[dataset] == "classes":
        return max(named_classes(answer, one, classes) for one in wanted)
    metric = _FUNCTIONS[METRICS[dataset]]
    return max(metric(answer, one) for one in wanted)


def check_metric(dataset: str) -> None:
    """Check that what the metric of a data set needs is installed.

    Raises:
        ConfigError: It is not.
    """
    if METRICS[dataset] in ("f1_zh", "rouge_zh"):
        chinese_words("")


def f1(answer: str, gold: str) -> float:
    """F1 of the multisets of words, ignoring case, articles and punctuation."""
    return _f1_of(Counter(normalized_words(answer)), Counter(normalized_words(gold)))


def normalized_words(text: str) -> list[str]:
    """The words of a text in lower case, without articles and punctuation, as SQuAD's evaluation has them."""
    return _ARTICLE.sub(" ", text.lower().translate(_ASCII_MARKS)).split()


def f1_zh(answer: str, gold: str) -> float:
    """F1 of the multisets of Chinese words, without punctuation and blanks."""
    words, gold_words = (
        Counter(
            filter(None, ("".join(word.lower().translate(_MARKS).split()) for word in chinese_words(text)))
        )
        for text in (answer, gold)
    )
    return _f1_of(words, gold_words)


def rouge(answer: str, gold: str) -> float:
    """ROUGE-L of sentences that end at full stops, over sets of words."""
    said, right = ([" ".join(part.split()) for part in text.split(".") if part] for text in (answer, gold))
    if not said or not right:
        return 0.0
    union: set[str] = set()
    for sentence in right:
        words = sentence.split(" ")
        for other in said:
            union.update(_common(words, other.split(" ")))
    sizes = [len(set(chain.from_iterable(one.split(" ") for one in side))) for side in (said, right)]
    precision, recall = (len(union) / size for size in sizes)
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_zh(answer: str, gold: str) -> float:
    """`rouge` of Chinese words."""
    return rouge(" ".join(chinese_words(answer)), " ".join(chinese_words(gold)))


def named_classes(answer: str, gold: str, classes: Sequence[str]) -> float:
    """1 / the number of classes that the answer names, without those that are a part of the right one."""
    named = [one for one in classes if one in answer]
    # Removing from the list that is walked skips the next class, as LongBench's own loop does.
    for one in named:
        if one in gold and one != gold:
            named.remove(one)
    return 1 / len(named) if gold in named else 0.0


def right_numbers(answer: str, gold: str) -> float:
    """The share of the numbers in the answer that are `gold`."""
    numbers = _NUMBER.findall(answer)
    return numbers.count(gold) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, gold: str) -> float:
    """Similarity of the first line that is neither a comment nor a fence."""
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, code, gold).ratio()) / 100


def chinese_words(text: str) -> list[str]:
    """The words that jieba cuts a text into.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        jieba: Any = import_module("jieba")
    except ImportError as error:
        raise ConfigError(
            "--suite: LongBench's Chinese metrics need the package jieba: pip install jieba"
        ) from error
    return [*jieba.cut(text, cut_all=False)]


def _f1_of(words: "Counter[str]", gold_words: "Counter[str]") -> float:
    common = (words & gold_words).total()
    return 2 * common / (words.total() + gold_words.total()) if common else 0.0


def _in_paragraph(pattern: str) -> Callable[[str, str], float]:
    number = re.compile(pattern)

    def score(answer: str, gold: str) -> float:
        found = number.search(gold)
        return right_numbers(answer, found[1]) if found else 0.0

    return score


def _common(words: Sequence[str], others: Sequence[str]) -> Iterator[str]:
    """The words of a longest common subsequence; of several, the one that `rouge` finds."""
    table = [[0] * (len(others) + 1)]
    for word in words:
        above, row = table[-1], [0]
        for at, other in enumerate(others):
            row.append(above[at] + 1 if word == other else max(above[at + 1], row[at]))
        table.append(row)
    row_at, at = len(words), len(others)
    while row_at and at:
        if words[row_at - 1] == others[at - 1]:
            yield words[row_at - 1]
            row_at, at = row_at - 1, at - 1
        elif table[row_at - 1][at] > table[row_at][at - 1]:
            row_at -= 1
        else:
            at -= 1


_FUNCTIONS: Final[dict[str, Callable[[str, str], float]]] = {
    "f1": f1,
    "f1_zh": f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "paragraph": _in_paragraph(r"Paragraph (\d+)"),
    "paragraph_zh": _in_paragraph(r"段落(\d+)"),
    "count": right_numbers,
    "code": code_similarity,
}
