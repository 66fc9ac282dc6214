"""Suites of questions: their files, their scores with intervals, and `streamsyn evaluate`."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from streamsyn.cli.main import cli
from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError
from streamsyn.scoring.suites.longbench_suite import chosen
from streamsyn.scoring.suites.suite_files import read_suites
from streamsyn.scoring.suites.suite_question import SuiteQuestion, as_user
from streamsyn.scoring.suites.suite_run import Answered, SuiteRun, suite_table
from streamsyn.simulator.app import running
from streamsyn.simulator.settings import Fault, SimulatorConfig
from tests.scoring.conftest import HELPS, QUICK

V1: dict[str, Any] = {
    "input": "Who keeps the {context} lighthouse?",
    "context": HELPS,
    "answers": ["Amund Tarn", "Tarn"],
    "length": 40,
    "dataset": "hotpotqa_e",
    "language": "en",
    "all_classes": None,
    "_id": "a",
}
V2: dict[str, Any] = {
    "_id": "b",
    "domain": "Single-Document QA",
    "difficulty": "hard",
    "length": "short",
    "question": "Who?",
    "choice_A": "Brown",
    "choice_B": "Tarn",
    "choice_C": "Rye",
    "choice_D": "Nobody",
    "answer": "B",
    "context": HELPS,
}


def written(path: Path, *rows: Any) -> str:
    """A file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_both_versions_are_read(tmp_path: Path) -> None:
    """From one file or several; the published prompts replace ours, and braces in a text stay."""
    path = written(tmp_path / "all.jsonl", V1, V2)
    (tmp_path / "prompts.json").write_text(json.dumps({"hotpotqa": "Read: {context}\nAsk: {input}"}))
    first, second = read_suites([path], tmp_path / "prompts.json")

    assert ("longbench", "hotpotqa", "a", 32) == (first.suite, first.part, first.id, first.max_tokens)
    assert first.prompt == f"Read: {HELPS}\nAsk: Who keeps the {{context}} lighthouse?"
    assert ("longbench_v2", "short", "hard") == (second.suite, second.part, second.also)
    assert "(B) Tarn" in second.prompt
    assert [1.0, 0.0] == [second.rule(f"**The correct answer is ({one})**") for one in "BA"]


def test_long_contexts_are_cut_in_the_middle(tmp_path: Path) -> None:
    """Both ends stay, and so does the question."""
    (cut,) = read_suites([written(tmp_path / "a.jsonl", V1)], prompt_chars=250)

    assert 250 == len(cut.prompt)
    assert cut.prompt.startswith(HELPS[:10])
    assert HELPS[-10:] in cut.prompt
    assert V1["input"] in cut.prompt


def test_at_most_so_many_of_a_part(tmp_path: Path) -> None:
    """The first ones of each."""
    path = written(tmp_path / "a.jsonl", V1, V2, {**V1, "_id": "c"}, {**V1, "dataset": "qasper"})

    assert ["a", "b", "a"] == [one.id for one in read_suites([path], limit=1)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**V1, "dataset": "mine"}, r"a.jsonl:1: 'mine' is not a data set of LongBench: narrativeqa"),
        ({**V1, "answers": []}, r"a.jsonl:1: `answers` is not a list of texts"),
        ({**V2, "answer": "E"}, r"a.jsonl:1: `answer` is 'E', and must be A, B, C or D"),
        ({**V2, "choice_C": 3}, r"a.jsonl:1: `choice_C` is missing or not a text"),
        ({"messages": []}, r"a.jsonl:1 is not a question of a known suite: LongBench"),
        ([1], r"a.jsonl:1 cannot be read: not a JSON object"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, row: Any, message: str) -> None:
    """With the file and the line."""
    with pytest.raises(ConfigError, match=message):
        list(read_suites([written(tmp_path / "a.jsonl", row)]))


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (C).", "C"),
        ("**The correct answer is D**", "D"),
        ("The correct answer is A, not (B). The correct answer is (B)", "B"),
        ("C", None),
    ],
)
def test_the_choice_is_found_by_the_published_rule(answer: str, letter: str | None) -> None:
    """The form with parentheses comes first."""
    assert letter == chosen(answer)


def answered(suite: str, part: str, scores: list[float], also: str = "") -> list[Answered]:
    """Answers of one part."""
    return [Answered(asked(suite, part, str(n), also), score=score) for n, score in enumerate(scores)]


def asked(suite: str, part: str, name: str, also: str = "") -> SuiteQuestion:
    """A question that no answer is right for."""
    return SuiteQuestion(suite, part, name, as_user(""), 1, ("",), lambda _: 0.0, also)


def test_the_table_has_means_and_intervals() -> None:
    """All of version 1 is the mean over data sets, all of version 2 over questions; failures are left out."""
    some = [
        *answered("longbench", "qasper", [1.0, 0.0, 1.0, 0.0] * 25),
        *answered("longbench", "hotpotqa", [1.0] * 10),
        *answered("longbench_v2", "short", [1.0, 1.0, 1.0], "easy"),
        *answered("longbench_v2", "long", [0.0], "hard"),
        Answered(asked("longbench", "qasper", "x"), error="too long"),
    ]
    rows = {(row.suite, row.part): row for row in suite_table(some)}

    assert {(name, round(row.score, 6), row.questions) for (_, name), row in rows.items()} == {
        ("qasper", 50.0, 100),
        ("hotpotqa", 100.0, 10),
        ("overall", 75.0, 110),
        ("short", 100.0, 3),
        ("long", 0.0, 1),
        ("easy", 100.0, 3),
        ("hard", 0.0, 1),
        ("overall", 75.0, 4),
    }
    # The standard error of 100 answers, half of them right, is 5 points: the interval is 1.96 times that.
    qasper = rows["longbench", "qasper"]
    assert [40.2, 59.8] == pytest.approx([qasper.low, qasper.high], abs=1.5)
    assert suite_table(some) == suite_table(some[::-1])
    assert (100.0, 100.0) == (rows["longbench", "hotpotqa"].low, rows["longbench", "hotpotqa"].high)


async def test_a_question_that_a_server_refuses_ends_no_other(tmp_path: Path) -> None:
    """It is kept with its error; the others have answers and their scores."""
    path = written(tmp_path / "a.jsonl", V1, {**V1, "_id": "long", "input": "refuse me"}, V2)
    rows: list[dict[str, Any]] = []

    def refuse(_: int, body: dict[str, Any]) -> Fault | None:
        return Fault.REFUSE if "refuse me" in body["messages"][0]["content"] else None

    async with asyncio.timeout(20), running(SimulatorConfig(), script=refuse) as server:
        section = FleetSection.model_validate({"servers": [server.url], **QUICK})
        run = SuiteRun(
            questions=read_suites([path]),
            total=3,
            fleet=section,
            on_answer=lambda found: rows.append(found.row()),
        )
        found = {one.question.id: one for one in await run.run()}

    assert {"a", "long", "b"} == found.keys()
    assert found["long"].error
    assert [None, None] == [found[name].error for name in "ab"]
    assert all(found[name].answer for name in "ab")
    assert found["a"].score == found["a"].question.rule(found["a"].answer)
    assert {"a", "long", "b"} == {row["id"] for row in rows}


async def test_the_command_prints_a_table(tmp_path: Path) -> None:
    """And writes each answer."""
    path = written(tmp_path / "a.jsonl", V1, V2)
    out = tmp_path / "answers.jsonl"
    async with asyncio.timeout(20), running(SimulatorConfig()) as server:
        argv = ["evaluate", "--server", server.url, "--suite", path, "--out", str(out)]
        done = await asyncio.to_thread(CliRunner().invoke, cli, argv)

    assert 0 == done.exit_code, done.output
    for name in ("hotpotqa", "short", "hard", "overall", "95 % interval"):
        assert name in done.output
    assert {"a", "b"} == {json.loads(line)["id"] for line in out.read_text().splitlines()}


async def test_needles_are_asked_of_servers(tmp_path: Path) -> None:
    """Generated to the lengths of the model that is served, and beside the questions of files."""
    path, out = written(tmp_path / "a.jsonl", V1), tmp_path / "answers.jsonl"
    keys = ("lengths=[512,1024]", 'kinds=["single","multi_value"]', "samples=2")
    settings = [part for key in keys for part in ("--set", f"train.needles.{key}")]
    async with asyncio.timeout(20), running(SimulatorConfig()) as server:
        argv = ["evaluate", "--server", server.url, "--suite", "needles", "--suite", path, "--out", str(out)]
        done = await asyncio.to_thread(CliRunner().invoke, cli, [*argv, *settings])

    assert 0 == done.exit_code, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    parts = {f"needle_{kind}_{length}" for kind in ("single", "multi_value") for length in (512, 1024)}
    assert parts | {"hotpotqa"} == {row["part"] for row in rows}
    assert 9 == len(rows)
    assert parts <= set(done.output.split())


def test_a_bad_file_is_refused_before_a_server_is_asked(tmp_path: Path) -> None:
    """Nothing listens at the server's address."""
    path = written(tmp_path / "a.jsonl", V1, {**V1, "dataset": "mine"})
    with pytest.raises(ConfigError, match=r"a\.jsonl:2"):
        CliRunner().invoke(
            cli, ["evaluate", "--server", "http://127.0.0.1:9", "--suite", path], catch_exceptions=False
        )
