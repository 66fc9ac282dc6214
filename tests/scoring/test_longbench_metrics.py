"""LongBench's metrics: values worked out by hand, and those that its own code returned for the same pairs."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamsyn.errors import ConfigError
from streamsyn.scoring.suites.longbench_metrics import METRICS, check_metric, longbench_score

PUBLISHED: dict[str, Any] = json.loads(
    Path(__file__).with_name("longbench_published.json").read_text("utf-8")
)
"""`examples`: pairs of our own sentences with the score that LongBench's code (github.com/THUDM/LongBench,
metrics.py and eval.py, with rouge 1.0.1, fuzzywuzzy 0.18.0 and jieba 0.42.1) returns. `words`: how jieba cuts
the Chinese ones."""
CLASSES = ["City", "Other location", "State", "Country", "Individual", "location"]


@pytest.mark.parametrize(
    ("dataset", "answer", "wanted", "expected"),
    [
        ("hotpotqa", "The Ada Brown, of Velmora", ["ada brown"], 2 * 2 / (4 + 2)),
        ("hotpotqa", "an answer", ["No.", "the answer!"], 1.0),
        ("triviaqa", "\nTarn\nPassage: more", ["Tarn"], 1.0),
        ("narrativeqa", "", ["Tarn"], 0.0),
        # 4 words said, 3 right, 2 in the longest common subsequence.
        ("gov_report", "the old house burns", ["the house fell"], 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
        # Sets of words: what is said again counts once. Sentences are compared one by one, and joined.
        ("qmsum", "a b a b", ["a b"], 1.0),
        ("multi_news", "c d. a b", ["a b. c d."], 1.0),
        ("multi_news", "...", ["a b"], 0.0),
        ("passage_count", "There are 7 of 12, so 7", ["7"], 2 / 3),
        ("passage_count", "seven", ["7"], 0.0),
        ("passage_retrieval_en", "Paragraph 15", ["Paragraph 15"], 1.0),
        ("passage_retrieval_en", "Paragraph 1 or 15", ["Paragraph 15"], 0.5),
        ("passage_retrieval_zh", "段落3", ["段落3"], 1.0),
        # Of `x = 1234` and `x = 134`, 7 characters match: 2 * 7 / (8 + 7) = 93 %.
        ("lcc", "\n# a comment\n```python\nx = 1234\ny", ["x = 134"], 0.93),
        ("repobench-p", "// only a comment", ["x = 1"], 0.0),
    ],
)
def test_published_rules(dataset: str, answer: str, wanted: list[str], expected: float) -> None:
    """Of several right answers the closest counts."""
    assert expected == pytest.approx(longbench_score(dataset, answer, wanted), abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("City", "City", 1.0),
        ("City or State", "City", 0.5),
        ("Other location", "Other location", 1.0),  # `location` is a part of it and is not counted
        ("Country\nCity", "City", 0.0),  # only the first line is the answer
        ("none of them", "City", 0.0),
    ],
)
def test_classes(answer: str, gold: str, expected: float) -> None:
    """One over the number of classes that are named."""
    assert expected == longbench_score("trec", answer, [gold], CLASSES)


def test_scores_are_those_of_the_published_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs of each data set, none of them right or wrong altogether."""
    cut = SimpleNamespace(cut=lambda text, cut_all: [] if cut_all else PUBLISHED["words"][text])
    monkeypatch.setitem(sys.modules, "jieba", cut)
    examples = PUBLISHED["examples"]
    found = [
        longbench_score(one["dataset"], one["answer"], one["wanted"], one["classes"]) for one in examples
    ]

    assert METRICS.keys() == {one["dataset"] for one in examples}
    assert all(0 < one["score"] < 1 for one in examples)
    assert [one["score"] for one in examples] == pytest.approx(found, abs=1e-12)


def test_chinese_words_come_from_jieba(monkeypatch: pytest.MonkeyPatch) -> None:
    """F1 leaves out marks and blanks; ROUGE-L takes all words."""
    cut = SimpleNamespace(cut=lambda text, cut_all: text.split("|") if not cut_all else [])
    monkeypatch.setitem(sys.modules, "jieba", cut)

    assert 0.8 == pytest.approx(longbench_score("multifieldqa_zh", "灯塔|，|看守| |人", ["灯塔|看守。"]))  # noqa: RUF001
    assert 0.8 == pytest.approx(longbench_score("vcsum", "会议|开始|了", ["会议|开始"]), abs=1e-6)


def test_without_jieba_chinese_data_sets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line that names the package; the others need nothing."""
    monkeypatch.setitem(sys.modules, "jieba", None)
    refused = set()
    for dataset in METRICS:
        try:
            check_metric(dataset)
        except ConfigError as error:
            assert "pip install jieba" in str(error)  # noqa: PT017
            refused.add(dataset)
    assert {"multifieldqa_zh", "dureader", "vcsum"} == refused
