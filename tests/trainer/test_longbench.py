"""Questions from LongBench rows: prompts, truncation, grading, and bad rows."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from streamsyn.config.command_sections import LongBenchSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.evaluation.exam import Chat, Question
from streamsyn.trainer.evaluation.longbench import longbench_questions
from tests.examples import examples
from tests.trainer import tiny


@cache
def chat() -> Chat:
    """The tiny model's chat: a token for each byte."""
    return Chat(tiny.tokenizer())


def row(**given: Any) -> dict[str, Any]:
    """A row in LongBench's format."""
    return {
        "input": "Who built the bridge?",
        "context": "The bridge was built by Ada Brown.",
        "answers": ["Ada Brown", "Brown"],
        "length": 7,
        "dataset": "qasper",
        "language": "en",
        "all_classes": None,
        "_id": "a1",
        **given,
    }


def read(tmp_path: Path, *rows: Any, longest: int = 8192, **given: Any) -> list[Question]:
    """The questions of a file."""
    path = tmp_path / "test.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return longbench_questions(LongBenchSection(path=str(path), **given), chat(), longest)


def text_of(question: Question) -> str:
    """The text of the prompt."""
    return chat().decode(question.prompt.tokens.tolist())


@pytest.mark.parametrize(
    ("dataset", "tokens", "grading", "part"),
    [
        ("narrativeqa", 128, "f1", "longbench_narrativeqa"),
        ("qasper", 128, "f1", "longbench_qasper"),
        ("qasper_e", 128, "f1", "longbench_qasper"),
        ("hotpotqa", 32, "f1", "longbench_hotpotqa"),
        ("2wikimqa", 32, "f1", "longbench_2wikimqa"),
        ("musique", 32, "f1", "longbench_musique"),
        ("gov_report", 512, "rouge_l", "longbench_gov_report"),
        ("qmsum", 512, "rouge_l", "longbench_qmsum"),
        ("multi_news", 512, "rouge_l", "longbench_multi_news"),
        ("my_own", 128, "f1", "longbench_my_own"),
    ],
)
def test_a_data_set_says_how_it_is_asked(
    tmp_path: Path, dataset: str, tokens: int, grading: str, part: str
) -> None:
    """Answer length and metric are LongBench's; unknown names are asked as a question."""
    (question,) = read(tmp_path, row(dataset=dataset))

    assert (tokens, grading, part) == (question.prompt.max_new_tokens, question.grading, question.part)
    text = text_of(question)
    assert "Who built the bridge?" in text
    assert "built by Ada Brown." in text
    assert text.startswith("<|user|>")
    assert text.endswith("<|end|><|assistant|>")


def test_without_an_input_a_summary_is_asked_for(tmp_path: Path) -> None:
    """Reports have no question; unknown data sets may have none either."""
    for dataset in ("gov_report", "my_own"):
        (question,) = read(tmp_path, row(dataset=dataset, input=""))
        assert "summary" in text_of(question)
        assert "rouge_l" == question.grading


def test_passages_are_counted_once(tmp_path: Path) -> None:
    """LongBench numbers passages, and so does our template: one of the two is removed."""
    context = "Passage 1:\nAbove.\n\nPassage 2:\nBelow."
    (question,) = read(tmp_path, row(dataset="hotpotqa", context=context))

    text = text_of(question)
    assert [1, 1] == [text.count(f"Passage {n}:") for n in (1, 2)]
    assert text.index("Above.") < text.index("Passage 2:") < text.index("Below.")


@examples(30)
@given(
    words=st.integers(300, 2000),
    limit=st.integers(500, 1500),
    dataset=st.sampled_from(["qasper", "hotpotqa"]),
)
def test_long_contexts_are_cut_in_their_middle(
    tmp_path_factory: pytest.TempPathFactory, words: int, limit: int, dataset: str
) -> None:
    """The prompt is never too long, and slightly shorter at most; both ends and the question stay."""
    context = " ".join(f"w{n}" for n in range(words)) + " \u00e4\u00f6\u00fc end"
    folder = tmp_path_factory.mktemp("longbench")
    whole = len(read(folder, row(context=context, dataset=dataset), longest=100_000)[0].prompt.tokens)
    (question,) = read(folder, row(context=context, dataset=dataset), prompt_tokens=limit)

    tokens = len(question.prompt.tokens)
    assert min(whole, limit - 16) <= tokens <= limit
    text = text_of(question)
    assert "w0 w1 " in text
    assert " end" in text
    assert 1 == text.count("Question: Who built the bridge?")


def test_prompts_leave_room_for_answers(tmp_path: Path) -> None:
    """Prompt and answer together fit into a row, whatever `prompt_tokens` is."""
    (question,) = read(tmp_path, row(context="word " * 2000), longest=1024, prompt_tokens=5000)

    assert 1024 - 128 - 16 <= len(question.prompt.tokens) <= 1024 - 128


def test_the_best_of_the_answers_counts(tmp_path: Path) -> None:
    """F1 for questions, ROUGE-L for summaries, over all right answers; without reasoning."""
    report, asked = read(tmp_path, row(), row(dataset="gov_report", answers=["a b c d", "x y"]))

    assert 1.0 == asked.score("brown")
    assert 1.0 == asked.score("<think>Who?</think> The Ada Brown!")
    assert 0.0 == asked.score("nobody")
    assert 0.8 == pytest.approx(report.score("x y z"))


def test_questions_are_limited_for_each_data_set(tmp_path: Path) -> None:
    """The first ones of each, data set by data set."""
    rows = [row(dataset=name, _id=f"{name}{n}") for n in range(4) for name in ("qasper", "musique")]
    found = read(tmp_path, *rows, samples=2)

    assert ["musique0", "musique1", "qasper0", "qasper1"] == [one.id for one in found]


BAD = {
    "no JSON": "{broken",
    "no object": "[1]",
    "no context": {"input": "?", "answers": ["a"], "dataset": "qasper"},
    "empty context": row(context="  "),
    "no right answers": row(answers=None),
    "answers of objects": row(answers=[{"a": 1}]),
    "no answers": row(answers=[]),
    "blank answers": row(answers=[" "]),
    "no input": row(input=None),
    "no data set": row(dataset=None),
    "odd data set": row(dataset="a/b"),
    "question too long": row(input="why " * 3000),
}


@pytest.mark.parametrize(("answers", "expected"), [("a", ("a",)), ([1, "one"], ("1", "one")), (7, ("7",))])
def test_answers_may_be_one_or_numbers(tmp_path: Path, answers: Any, expected: tuple[str, ...]) -> None:
    """As in seeds."""
    [question] = read(tmp_path, row(answers=answers))

    assert expected == question.wanted


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_row_is_skipped_and_logged(tmp_path: Path, bad: Any) -> None:
    """With file and line; the other rows are used."""
    with capture_logs() as logs:
        found = read(tmp_path, row(), bad, row())

    assert 2 == len(found)
    (said,) = (line for line in logs if line["event"] == "longbench.bad_row")
    assert said["at"].endswith("test.jsonl:2")
    assert said["why"]
    assert 1 == next(line["count"] for line in logs if line["event"] == "longbench.bad_rows")


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    """With the key, the path and the reason; so is a missing file."""
    with pytest.raises(
        ConfigError, match=r"train\.longbench\.path: .*test\.jsonl.* field 'answers' is empty \(2\)"
    ):
        read(tmp_path, row(answers=[]), row(answers=[]))
    with pytest.raises(ConfigError, match=r"train\.longbench\.path"):
        longbench_questions(LongBenchSection(path=str(tmp_path / "none.jsonl")), chat(), 8192)


def test_unknown_data_sets_are_logged(tmp_path: Path) -> None:
    """Once, with its name: its figures are ours, not LongBench's."""
    with capture_logs() as logs:
        read(tmp_path, row(dataset="trec"), row(dataset="trec"), row())

    assert [["trec"]] == [line["names"] for line in logs if line["event"] == "longbench.unknown_datasets"]
