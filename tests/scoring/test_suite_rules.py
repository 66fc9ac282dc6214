"""RULER, HELMET's recall, MRCR and GraphWalks: rows of their files, and scores by their rules."""

import json
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import ConfigError
from streamsyn.scoring.suites.graphwalks_suite import nodes_f1
from streamsyn.scoring.suites.mrcr_suite import similarity
from streamsyn.scoring.suites.suite_files import read_suites
from streamsyn.scoring.suites.suite_question import SuiteQuestion, size_class
from tests.examples import examples

RULER: dict[str, Any] = {
    "index": 0,
    "input": "A special magic number is hidden below.\nThe keeper sleeps.\nWhat is it?",
    "outputs": ["4021553", "8813904"],
    "length": 4000,
    "answer_prefix": " The special magic number is",
}
JSON_KV: dict[str, Any] = {
    "context": '{"9f-a1": "0c-77", "3e-b2": "5d-10"}',
    "question": "9f-a1",
    "answer": "0c-77",
    "demos": [["k1", "v1"], ["k2", "v2"], ["k3", "v3"]],
    "num_kvs": 2,
}
NEEDLES: dict[str, Any] = {
    "context": "One of the special magic numbers for lamp is: 41.",
    "query": "lamp",
    "type_needle_v": "numbers",
    "outputs": ["41", "Mill"],
}
TALK = [
    {"role": "user", "content": "Write a poem about lamps."},
    {"role": "assistant", "content": "A lamp at night."},
    {"role": "user", "content": "Prepend Xy7 to the 1st poem about lamps."},
]
MRCR: dict[str, Any] = {
    "prompt": json.dumps(TALK),
    "answer": "Xy7A lamp at night.",
    "random_string_to_prepend": "Xy7",
    "n_needles": 2,
    "desired_msg_index": 1,
    "total_messages": 3,
    "n_chars": 16385,
}
WALK: dict[str, Any] = {
    "prompt": "The graph has the following edges:\na -> b\nPerform a BFS from node a with depth 1.",
    "answer_nodes": ["b", "c"],
    "prompt_chars": 2638,
    "problem_type": "BFS",
    "date_added": "04-12-2025",
}


def read(path: Path, *rows: Any, **options: Any) -> list[SuiteQuestion]:
    """The questions of a file with these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_suites([str(path)], **options))


@pytest.mark.parametrize(
    ("place", "task", "tokens"),
    [
        ("niah_single_1/validation.jsonl", "niah_single_1", 128),
        ("vt.jsonl", "vt", 30),
        ("4096/data/cwe/validation.jsonl", "cwe", 120),
        ("fwe/test.jsonl", "fwe", 50),
        ("qa_2/validation_4096.jsonl", "qa_2", 32),
    ],
)
def test_the_task_of_ruler_is_the_name_of_the_file_or_its_folder(
    tmp_path: Path, place: str, task: str, tokens: int
) -> None:
    """With the published tokens to generate; the beginning of the answer is the end of the prompt."""
    (question,) = read(tmp_path / place, RULER)

    assert ("ruler", task, tokens, "up to 4k") == (
        question.suite,
        question.part,
        question.max_tokens,
        question.also,
    )
    assert question.prompt == RULER["input"] + RULER["answer_prefix"]


@pytest.mark.parametrize(
    ("task", "answer", "score"),
    [
        ("niah_multivalue", "4021553", 0.5),
        ("niah_multivalue", "8813904 and\x0b4021553.", 1.0),
        ("niah_multivalue", "", 0.0),
        ("qa_1", "it is 8813904", 1.0),
        ("qa_1", "40215", 0.0),
    ],
)
def test_ruler_counts_all_or_any(tmp_path: Path, task: str, answer: str, score: float) -> None:
    """The share of the references in the answer; for questions, one of them is enough."""
    (question,) = read(tmp_path / task / "validation.jsonl", RULER)

    assert score == question.rule(answer)


def test_ruler_is_blind_to_case(tmp_path: Path) -> None:
    """As published."""
    (question,) = read(tmp_path / "vt.jsonl", {**RULER, "outputs": ["ABCDE", "fghij"]})

    assert 1.0 == question.rule("abcde FGHIJ")


def test_recall_of_helmet(tmp_path: Path) -> None:
    """Two examples are shown; marks and articles do not count. Needles count by their share."""
    (pairs,) = read(tmp_path / "json_kv" / "test_k2_dep6.jsonl", JSON_KV)
    (needles,) = read(tmp_path / "niah_multivalue" / "validation_131072.jsonl", NEEDLES)

    assert ("helmet_recall", "json_kv", 100) == (pairs.suite, pairs.part, pairs.max_tokens)
    assert "Key: k2\nCorresponding value: v2\n\nKey: 9f-a1\nCorresponding value:" in pairs.prompt
    assert "k3" not in pairs.prompt
    assert [1.0, 1.0, 0.0] == [pairs.rule(one) for one in ("It is the 0C-77.", "0c77", "0c-78")]
    assert ("helmet_recall", "niah_multivalue", 50) == (needles.suite, needles.part, needles.max_tokens)
    assert [1.0, 0.5, 0.0] == [needles.rule(one) for one in ("mill, 41", "41", "")]


def test_prompts_and_limits_of_the_user(tmp_path: Path) -> None:
    """Prompts by task, tokens of answers, and contexts cut in the middle."""
    (tmp_path / "prompts.json").write_text(json.dumps({"json_kv": "{demos}{context} Key: {question}"}))
    (asked,) = read(tmp_path / "a.jsonl", JSON_KV, prompts=tmp_path / "prompts.json", max_tokens=7)
    (cut,) = read(tmp_path / "a.jsonl", {**JSON_KV, "context": "x" * 900}, prompt_chars=400)

    assert asked.prompt.endswith(f"{JSON_KV['context']} Key: 9f-a1")
    assert 7 == asked.max_tokens
    assert 400 == len(cut.prompt)


def test_mrcr(tmp_path: Path) -> None:
    """The whole conversation is asked; without the random string at its beginning an answer is worth 0."""
    (question,) = read(tmp_path / "a.jsonl", MRCR)

    assert [*question.messages] == TALK
    assert ("mrcr", "2 needles", "up to 32k chars") == (question.suite, question.part, question.also)
    assert [1.0, 0.0, 0.0] == [
        question.rule(one) for one in ("Xy7A lamp at night.", "A lamp at night.", "So: Xy7A lamp at night.")
    ]
    assert SequenceMatcher(None, "A lamp.", "A lamp at night.").ratio() == question.rule("Xy7A lamp.")


@examples(30)
@given(st.text(), st.text(), st.text(max_size=5))
def test_the_similarity_is_a_share(answer: str, right: str, prefix: str) -> None:
    """1 for the answer itself, whatever it is made of."""
    assert 0 <= similarity(answer, prefix + right, prefix) <= 1
    assert 1.0 == similarity(prefix + right, prefix + right, prefix)


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("Thus:\nFinal Answer: [b, c]", ["b", "c"], 1.0),
        ("Final Answer:[c,b,b]\n", ["b", "c"], 1.0),
        ("Final Answer: [b, x, y]", ["b", "c"], 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("Final Answer: []", ["b"], 0.0),
        ("Final Answer: []", [], 1.0),
        ("Final Answer: [b]", [], 0.0),
        ("[b, c]", ["b", "c"], 0.0),
        ("Final Answer: [b, c]\nThat was it.", ["b", "c"], 0.0),
        ("", [], 0.0),
    ],
)
def test_graphwalks(answer: str, right: list[str], score: float) -> None:
    """F1 of the nodes in the last line."""
    assert score == pytest.approx(nodes_f1(answer, right))


def test_rows_of_graphwalks(tmp_path: Path) -> None:
    """They count by the kind of problem and by length; an empty set of nodes is an answer."""
    one, other = read(tmp_path / "a.jsonl", WALK, {**WALK, "answer_nodes": [], "problem_type": "parents"})

    assert ("graphwalks", "bfs", "up to 4k chars") == (one.suite, one.part, one.also)
    assert WALK["prompt"] == one.prompt
    assert ("parents", 1.0) == (other.part, other.rule("Final Answer: []"))


@pytest.mark.parametrize(
    ("size", "label"), [(1, "up to 1k"), (1024, "up to 1k"), (1025, "up to 2k"), (131_072, "up to 128k")]
)
def test_sizes(size: int, label: str) -> None:
    """Powers of two; the bound belongs to the smaller class."""
    assert label == size_class(size)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            RULER,
            r"a\.jsonl:1 is of no task of RULER: the file or its folder must have the name of one: niah_s",
        ),
        ({**RULER, "outputs": []}, r"a\.jsonl:1 is of no task"),
        ({**RULER, "task": "vt", "outputs": []}, r"a\.jsonl:1: `outputs` is not a list of texts"),
        ({**RULER, "task": "vt", "input": 3}, r"a\.jsonl:1: `input` is missing or not a text"),
        ({**JSON_KV, "demos": ["k"]}, r"a\.jsonl:1: `demos` is not a list of pairs"),
        ({**JSON_KV, "context": None}, r"a\.jsonl:1: `context` is missing"),
        (NEEDLES, r"a\.jsonl:1 is of no needle task"),
        ({**MRCR, "prompt": "hello"}, r"a\.jsonl:1: `prompt` is not a JSON list of messages"),
        ({**MRCR, "prompt": "[1]"}, r"a\.jsonl:1: `prompt` is not a JSON list of messages"),
        ({**WALK, "answer_nodes": "b"}, r"a\.jsonl:1: `answer_nodes` is not a list of texts"),
        ({"question": "?"}, r"a\.jsonl:1 is not a question of a known suite: LongBench \(`dataset`\)"),
    ],
)
def test_wrong_rows_are_refused_in_one_line(tmp_path: Path, row: Any, message: str) -> None:
    """With the file and the line."""
    with pytest.raises(ConfigError, match=message) as refused:
        read(tmp_path / "a.jsonl", row)

    assert "\n" not in str(refused.value)
