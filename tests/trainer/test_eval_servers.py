"""`train.eval_servers`: servers load published weights, and are asked while the training goes on."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from streamsyn.config.command_sections import TrainSection
from streamsyn.config.sections import FleetSection
from streamsyn.scoring.suites.suite_question import SuiteQuestion, as_user
from streamsyn.simulator.app import running
from streamsyn.simulator.settings import Fault, SimulatorConfig
from streamsyn.trainer.evaluation.eval_servers import EvalServers, ServerEvaluation
from tests.trainer.conftest import Start, lines
from tests.trainer.test_command import write_run

Script = Callable[[int, dict[str, Any]], Fault | None]

NEEDLES = {"lengths": [512], "samples": 1}
FLEET = {"backoff_base_s": 0.01, "connect_timeout_s": 1, "max_attempts": 2, "give_up_s": 1}
NOWHERE = "http://127.0.0.1:9"


def questions() -> list[SuiteQuestion]:
    """Four, in three parts of two exams; every answer is right but that of `q1`."""
    parts = [("needles", "needle_a"), ("needles", "needle_a"), ("needles", "needle_b"), ("longbench", "lb")]
    rules = [partial(lambda score, _: score, score) for score in (1.0, 0.0, 1.0, 1.0)]
    return [
        SuiteQuestion(exam, part, f"q{n}", as_user(f"Question {n}?"), 16, ("w",), rules[n])
        for n, (exam, part) in enumerate(parts)
    ]


def published(tmp_path: Path, step: int) -> Path:
    """A directory that looks like a publication."""
    folder = tmp_path / "weights" / f"step_{step}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@asynccontextmanager
async def asking(out: Path, *urls: str, **keys: Any) -> AsyncIterator[EvalServers]:
    """The thread that asks the servers with these URLs."""
    given = {"eval_servers": urls, "publish": {"timeout_s": 20}, "needles": NEEDLES, **keys}
    section, fleet = TrainSection.model_validate(given), FleetSection.model_validate(FLEET)
    servers = EvalServers(section, fleet, questions(), out, {})
    await asyncio.to_thread(servers.__enter__)
    try:
        yield servers
    finally:
        await asyncio.to_thread(servers.__exit__)


async def finished(servers: EvalServers) -> list[ServerEvaluation]:
    """All results, once the last one is there."""
    async with asyncio.timeout(20):
        await asyncio.to_thread(servers.finish)
    return servers.results()


async def test_servers_that_have_the_weights_are_asked_all_questions(tmp_path: Path) -> None:
    """By their own version; parts and exams have their means; each answer is in a file."""
    folder = await asyncio.to_thread(published, tmp_path, 7)
    async with running(SimulatorConfig(words=8)) as one, running(SimulatorConfig(words=8)) as other:
        async with asking(tmp_path, one.url, other.url) as servers:
            servers.offer(folder)
            (result,) = await finished(servers)
        assert ["step_7"] * 2 == [server.simulation.weights.version for server in (one, other)]
    written = await asyncio.to_thread((tmp_path / "answers" / "servers-0000007.jsonl").read_text)
    rows = [json.loads(line) for line in written.splitlines()]

    assert 7 == result.step
    found = dict(result.found)
    assert found.pop("seconds") > 0
    assert {
        "version": "step_7",
        "servers": 2,
        "questions": 4,
        "answered": 4,
        "needle_a": 0.5,
        "needle_b": 1.0,
        "needles": 0.75,
        "lb": 1.0,
        "longbench": 1.0,
    } == found
    assert [f"q{n}" for n in range(4)] == [row["id"] for row in rows]
    assert all(row["answer"] and row["error"] is None for row in rows)


async def test_a_server_that_fails_is_left_out_and_named(tmp_path: Path) -> None:
    """The others answer; without any, the result says so."""
    first = await asyncio.to_thread(published, tmp_path, 1)
    async with running(SimulatorConfig(words=8)) as good, asking(tmp_path, NOWHERE, good.url) as servers:
        servers.offer(first)
        (result,) = await finished(servers)
    async with asking(tmp_path, NOWHERE) as servers:
        servers.offer(first)
        (nobody,) = await finished(servers)

    assert (1, 4, [NOWHERE]) == tuple(
        result.found[name] for name in ("servers", "answered", "failed_servers")
    )
    assert 0.75 == result.found["needles"]
    assert "no server has loaded the weights" == nobody.found["problem"]
    assert nobody.found["partial"]
    assert "needles" not in nobody.found


async def test_a_question_without_an_answer_leaves_its_part_without_a_score(tmp_path: Path) -> None:
    """And its exam; the others have theirs."""

    def refuse(_: int, body: dict[str, Any]) -> Fault | None:
        return Fault.REFUSE if "Question 2?" in body["messages"][0]["content"] else None

    folder = await asyncio.to_thread(published, tmp_path, 1)
    async with (
        running(SimulatorConfig(words=8), script=refuse) as server,
        asking(tmp_path, server.url) as servers,
    ):
        servers.offer(folder)
        (result,) = await finished(servers)

    assert (3, True) == (result.found["answered"], result.found["partial"])
    assert result.found["problem"]
    assert {"needle_a": 0.5, "lb": 1.0, "longbench": 1.0}.items() <= result.found.items()
    assert not {"needle_b", "needles"} & result.found.keys()


async def test_answers_of_other_weights_do_not_count(tmp_path: Path) -> None:
    """Somebody else has updated the server meanwhile."""
    folder = await asyncio.to_thread(published, tmp_path, 1)

    def change(_: int, __: dict[str, Any]) -> Fault | None:
        server.simulation.weights.change("elsewhere", "strange")
        return None

    async with (
        running(SimulatorConfig(words=8), script=change) as server,
        asking(tmp_path, server.url) as servers,
    ):
        servers.offer(folder)
        (result,) = await finished(servers)

    assert 0 == result.found["answered"]
    assert "strange, not step_1" in result.found["problem"]


async def test_the_newest_weights_wait_and_those_between_are_skipped(tmp_path: Path) -> None:
    """While the servers are asked about the first ones, two more are published."""
    made = [await asyncio.to_thread(published, tmp_path, step) for step in (1, 2, 3)]

    def publish_more(number: int, _: dict[str, Any]) -> Fault | None:
        if number == 1:
            for folder in made[1:]:
                servers.offer(folder)
        return None

    async with (
        running(SimulatorConfig(words=8), script=publish_more) as server,
        asking(tmp_path, server.url) as servers,
    ):
        servers.offer(made[0])
        results = {one.step: one.found for one in await finished(servers)}

    assert [1, 2, 3] == sorted(results)
    assert {"version": "step_2", "skipped": "newer weights were published before it could begin"} == results[
        2
    ]
    assert [4, 4] == [results[step]["answered"] for step in (1, 3)]
    assert set() == servers.in_use


@pytest.mark.parametrize("by", ["signal", "limit"])
async def test_the_end_does_not_wait_for_long(tmp_path: Path, by: str) -> None:
    """A stop, or `train.eval_wait_s`, ends an evaluation whose server does not answer any more."""
    made = [await asyncio.to_thread(published, tmp_path, step) for step in (1, 2)]
    begun = asyncio.Event()

    def stall(_: int, __: dict[str, Any]) -> Fault | None:
        begun.set()
        return Fault.STALL

    async with (
        running(SimulatorConfig(words=8), script=stall) as server,
        asking(tmp_path, server.url, eval_wait_s=0.1) as servers,
    ):
        servers.offer(made[0])
        async with asyncio.timeout(20):
            await begun.wait()
        servers.offer(made[1])
        if by == "signal":
            servers.hurry()
        results = {one.step: one.found for one in await finished(servers)}

    assert 0 == results[1]["answered"]
    assert "the training ended before all questions were answered" == results[1]["problem"]
    assert "the training ended before it could begin" == results[2]["skipped"]


async def test_a_training_records_what_servers_answered(start: Start, tmp_path: Path) -> None:
    """With the step of the weights; the last ones are waited for, and in process the questions are asked at
    the beginning and at the end.
    """
    row = {"input": "Who?", "context": "Ada kept it.", "answers": ["Ada"], "dataset": "hotpotqa", "_id": "a"}
    run, out = await asyncio.to_thread(write_run, tmp_path / "run", range(40)), tmp_path / "out"
    await asyncio.to_thread((tmp_path / "rows.jsonl").write_text, json.dumps(row))
    async with running(SimulatorConfig(words=8)) as server:
        keys: dict[str, Any] = {
            "eval_servers": json.dumps([server.url]),
            "publish": "{every_steps = 3}",
            "longbench": json.dumps(str(tmp_path / "rows.jsonl")).join(("{path = ", "}")),
            "max_steps": 6,
            "seq_len": 512,
            "eval_every_steps": 2,
            "holdout": 0,
        }
        training = await asyncio.to_thread(lambda: start(run, out, **keys))
        assert 0 == await asyncio.to_thread(training.wait), training.stderr()

    def recorded() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return lines(out, "server_evaluation"), lines(out, "evaluation")

    asked, in_process = await asyncio.to_thread(recorded)
    assert [3, 6] == sorted(line["step"] for line in asked)
    last = next(line for line in asked if line["step"] == 6)
    assert (6, 1, 1, "step_6") == tuple(last[name] for name in ("at_step", "servers", "answered", "version"))
    assert 0 <= last["longbench"] <= 1
    assert [0, 6] == [line["step"] for line in in_process if "longbench" in line]
