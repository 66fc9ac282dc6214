"""Answerability: what the model answers with the context, and what it knows without."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from streamsyn.errors import ConfigError
from streamsyn.scoring.answer_metrics import f1
from streamsyn.scoring.measures import AnswerPrompt, Answers, Question, ScoringClient, other_answers
from streamsyn.simulator.settings import Fault
from tests.scoring.conftest import HELPS, PROMPT, QUESTION, UNRELATED, fleet_at


async def test_an_answer_is_found_in_the_context_that_holds_it() -> None:
    """Its score is the metric of the model's answer; without the context the model does not know it."""
    async with fleet_at() as (fleet, _):
        answers, client = Answers(PROMPT, 64), ScoringClient(fleet, fleet.models[0])
        found = await answers.measure(client, QUESTION, HELPS)
        lost = await answers.measure(client, QUESTION, UNRELATED)

    assert "f1" == found["answer_metric"]
    assert "Amund Tarn" in found["model_answer"]
    assert f1(found["model_answer"], QUESTION.answer) == pytest.approx(found["answer_score"], abs=1e-4)
    assert found["answer_score"] > 0.3 > lost["answer_score"]
    assert found["closed_book_score"] < 0.3
    assert found["closed_book_answer"] == lost["closed_book_answer"]


async def test_closed_book_is_asked_once_and_greedily() -> None:
    """Four drafts of a seed: four requests with a context, one without, all at temperature 0."""
    asked: list[dict[str, Any]] = []

    def note(_: int, body: dict[str, Any]) -> Fault | None:
        asked.append(body)
        return None

    async with fleet_at(note) as (fleet, _):
        answers = Answers(PROMPT, 12)
        async with asyncio.TaskGroup() as group:
            for number in range(4):
                client = ScoringClient(fleet, fleet.models[0])
                group.create_task(answers.measure(client, QUESTION, f"{number}. {HELPS}"))

    assert 5 == len(asked)
    assert {(0, 12)} == {(body["temperature"], body["max_tokens"]) for body in asked}
    assert 1 == sum(HELPS not in body["messages"][0]["content"] for body in asked)


def test_any_right_answer_counts() -> None:
    """The closest one; the first decides the metric."""
    question = Question("Who?", "Ada Brown", "qa", ("Brown", "A. Brown of Velmora"))

    assert [1.0, 1.0, 1.0, 0.0] == [
        question.score(said) for said in ("Ada Brown", "brown", "A Brown of Velmora.", "Tarn")
    ]
    assert ("Tarn", "7") == other_answers({"answers": ["Tarn", " ", 3, "7"]})
    assert () == other_answers({"answers": "Tarn"}) == other_answers({})


def test_a_user_template_replaces_the_packaged_one(tmp_path: Path) -> None:
    """Its variables are the instruction, the task, the kind of answer, and the context or an empty string."""
    path = tmp_path / "ask.j2"
    path.write_text("{{ task }}|{{ kind }}|{{ context }}|{{ instruction }}")
    prompt, summary = AnswerPrompt(path), Question("Sum up.", "word " * 40, "mine")

    assert "narrativeqa|question||" + QUESTION.instruction == prompt.messages(QUESTION)[0]["content"]
    assert "mine|summary|c|Sum up." == prompt.messages(summary, "c")[0]["content"]
    assert prompt.digest != PROMPT.digest


def test_a_template_with_a_wrong_variable_is_refused(tmp_path: Path) -> None:
    """Before any request, with the variable's name."""
    path = tmp_path / "ask.j2"
    path.write_text("{{ document }}")

    with pytest.raises(ConfigError, match=r"ask\.j2.*document"):
        AnswerPrompt(path)
