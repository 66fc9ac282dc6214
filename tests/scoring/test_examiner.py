"""The examiner: findings are in the checks, and flags and rejects follow the configuration."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from streamsyn.config.sections import ChecksSection, ScoringSection
from streamsyn.fleet.fleet import Fleet
from streamsyn.recipes.recipe import RejectedDraft
from streamsyn.records import Document, Draft, RejectReason, Seed
from streamsyn.scoring.contamination import EvalSets
from streamsyn.scoring.duplicates import Duplicates
from streamsyn.scoring.examiner import Examiner, Findings, Scores
from streamsyn.scoring.measures import Question
from streamsyn.simulator.app import RunningSimulator
from streamsyn.simulator.settings import Fault, Script
from streamsyn.telemetry import Counters
from tests.scoring.conftest import HELPS, PROMPT, QUESTION, UNRELATED, fleet_at

SCORES = {"context_gain": True, "answerable": True}


def draft(name: str = "a") -> Draft:
    """A draft of the question's seed."""
    return Draft(Seed(name, QUESTION.task, QUESTION.instruction, QUESTION.answer, "f:1"))


def document(text: str = HELPS, **given: Any) -> Document:
    """A document as a recipe returns it."""
    return Document(text, {"words": len(text.split()), "flags": ["truncated"]}, [], **given)


@dataclass(frozen=True, slots=True)
class Set:
    """An examiner with a simulated server, and the counters."""

    examiner: Examiner
    fleet: Fleet
    server: RunningSimulator
    counters: Counters


@asynccontextmanager
async def examining(
    script: Script = (), section: dict[str, Any] | None = None, **checks: Any
) -> AsyncIterator[Set]:
    """An examiner that asks servers."""
    wanted, counters = ChecksSection(**SCORES | checks), Counters()
    async with fleet_at(script, **section or {}) as (fleet, server):
        scores = Scores(wanted, ScoringSection(), PROMPT, fleet, fleet.models[0], counters)
        yield Set(Examiner(wanted, scores=scores), fleet, server, counters)


async def test_scores_are_in_the_checks() -> None:
    """Gain, answers and their cost beside the recipe's checks; no flags."""
    async with examining() as here:
        examined = await here.examiner.examine(draft(), document())

    checks = examined.checks
    assert (HELPS, ["truncated"], len(HELPS.split())) == (examined.text, checks["flags"], checks["words"])
    assert checks["context_gain"] == pytest.approx(checks["nll_without"] - checks["nll_with"], abs=2e-4)
    assert ("f1", True) == (checks["answer_metric"], checks["answer_score"] > 0.3)
    assert {"prompt_tokens", "cached_tokens", "completion_tokens"} == checks["scoring"].keys()
    stats = here.server.simulation.stats
    assert stats.prompt_tokens == checks["scoring"]["prompt_tokens"] == here.counters.scoring_prompt_tokens
    assert stats.completion_tokens == checks["scoring"]["completion_tokens"] == here.counters.scoring_tokens
    assert (1, 0) == (here.counters.scored, here.counters.unscored)


async def test_a_context_without_the_answer_is_flagged() -> None:
    """By default no score rejects."""
    async with examining(flag_gain_below=0.5) as here:
        examined = await here.examiner.examine(draft(), document(UNRELATED))

    assert ["truncated", "low_context_gain", "not_answerable"] == examined.checks["flags"]


async def test_an_answer_that_the_model_knows_is_flagged() -> None:
    """If the closed-book answer scores above the threshold."""
    async with examining(flag_known_above=0.0) as here:
        seed = Seed("b", "qa", "Who?", "the committee of Ashamora near the harbour in early spring", "f:1")
        examined = await here.examiner.examine(Draft(seed), document())
        unknown = await here.examiner.examine(draft(), document())

    assert examined.checks["closed_book_score"] > 0 == unknown.checks["closed_book_score"]
    assert "known_answer" in examined.checks["flags"]
    assert "known_answer" not in unknown.checks["flags"]


@pytest.mark.parametrize(
    ("checks", "reason"),
    [
        ({"reject_gain_below": 0.5}, RejectReason.LOW_CONTEXT_GAIN),
        ({"reject_answer_below": 0.9}, RejectReason.NOT_ANSWERABLE),
    ],
)
async def test_thresholds_reject(checks: dict[str, Any], reason: RejectReason) -> None:
    """The detail has the scores; a low gain saves the request for an answer; the cost is counted."""
    async with examining(**checks) as here:
        with pytest.raises(RejectedDraft) as rejected:
            await here.examiner.examine(draft(), document(UNRELATED))
        routes = here.server.simulation.stats.by_route

    assert reason == rejected.value.reason
    assert any(str(limit) in rejected.value.detail for limit in checks.values())
    assert (reason == RejectReason.NOT_ANSWERABLE) == bool(routes["/v1/chat/completions"])
    assert here.counters.scoring_prompt_tokens > 0


async def test_no_threshold_no_flag() -> None:
    """Each threshold can be switched off."""
    async with examining(flag_gain_below=None, flag_answer_below=None, flag_known_above=None) as here:
        examined = await here.examiner.examine(draft(), document(UNRELATED))

    assert ["truncated"] == examined.checks["flags"]


async def test_a_failed_scoring_keeps_the_context() -> None:
    """If servers refuse, or fail too often, the context is flagged `unscored`, with the error."""
    async with examining([Fault.REFUSE]) as here:
        examined = await here.examiner.examine(draft(), document())
    assert ["truncated", "unscored"] == examined.checks["flags"]
    assert "refuses" in examined.checks["scoring"]["error"]
    assert "context_gain" not in examined.checks

    always: Script = lambda number, body: Fault.BAD_JSON if "input_ids" not in body else None  # noqa: E731
    async with examining(always, {"max_attempts": 2}) as here:
        examined = await here.examiner.examine(draft(), document())
    assert "unscored" in examined.checks["flags"]
    assert examined.checks["context_gain"] > 0, "what was found before the failure stays"
    assert (1, 1, 2) == (here.counters.scored, here.counters.unscored, here.counters.scoring_retries)


async def test_a_pair_that_the_recipe_wrote_is_scored() -> None:
    """If the document has its own question and answer, they replace the seed's."""
    async with examining() as here:
        own = document(instruction="Where does the ferry call?", answer="At other ports.")
        examined = await here.examiner.examine(draft(), own)

    assert "other ports" in examined.checks["model_answer"]
    assert 4 == examined.checks["scored_tokens"]


async def test_repeats_are_found(tmp_path: Path) -> None:
    """The second of two similar contexts is flagged or rejected, the first one never."""
    for mode in ("flag", "reject"):
        section = ChecksSection.model_validate({"near_duplicate": mode})
        duplicates = await asyncio.to_thread(Duplicates, tmp_path / f"{mode}.sqlite", 0.8)
        examiner = Examiner(section, duplicates=duplicates)
        first = await examiner.examine(draft("a"), document(HELPS * 3))
        assert ["truncated"] == first.checks["flags"]
        if mode == "flag":
            second = await examiner.examine(draft("b"), document(HELPS * 3))
            assert {"id": "a", "similarity": 1.0} == second.checks["near_duplicate"]
            assert ["truncated", "near_duplicate"] == second.checks["flags"]
        else:
            with pytest.raises(RejectedDraft, match="repeats the context a") as rejected:
                await examiner.examine(draft("b"), document(HELPS * 3))
            assert RejectReason.NEAR_DUPLICATE == rejected.value.reason
        await asyncio.to_thread(duplicates.close)


async def test_what_is_rejected_by_its_score_can_be_repeated(tmp_path: Path) -> None:
    """A rejected context is not in the log, so a later one is not its duplicate."""
    wanted = ChecksSection.model_validate({**SCORES, "near_duplicate": "reject", "reject_gain_below": 0.5})
    duplicates = await asyncio.to_thread(Duplicates, tmp_path / "index.sqlite", 0.8)
    async with fleet_at() as (fleet, _):
        scores = Scores(wanted, ScoringSection(), PROMPT, fleet, fleet.models[0], Counters())
        examiner = Examiner(wanted, None, duplicates, scores)
        for name in ("a", "b"):
            with pytest.raises(RejectedDraft) as rejected:
                await examiner.examine(draft(name), document(UNRELATED * 3))
            assert RejectReason.LOW_CONTEXT_GAIN == rejected.value.reason
    await asyncio.to_thread(duplicates.close)


async def test_a_draft_that_is_rejected_later_does_not_take_its_twin_with_it(tmp_path: Path) -> None:
    """The first is being scored, and fails, while the second is examined: the second is not its repeat."""
    wanted = ChecksSection.model_validate({**SCORES, "near_duplicate": "reject", "reject_gain_below": 0.5})
    duplicates = await asyncio.to_thread(Duplicates, tmp_path / "index.sqlite", 0.8)
    is_scoring, may_end = asyncio.Event(), asyncio.Event()

    class Failing(Scores):
        """Fails the draft in the end."""

        async def measure(self, findings: Findings, question: Question, context: str) -> None:
            is_scoring.set()
            await may_end.wait()
            raise RejectedDraft(RejectReason.LOW_CONTEXT_GAIN, "too low")

    async with asyncio.timeout(20), fleet_at() as (fleet, _):
        failing = Failing(wanted, ScoringSection(), PROMPT, fleet, fleet.models[0], Counters())
        first = asyncio.create_task(
            Examiner(wanted, None, duplicates, failing).examine(draft("a"), document(HELPS * 3))
        )
        await is_scoring.wait()
        second = await Examiner(wanted, duplicates=duplicates).examine(draft("b"), document(HELPS * 3))
        may_end.set()
        with pytest.raises(RejectedDraft, match="too low"):
            await first
        with pytest.raises(RejectedDraft, match="repeats the context b"):
            await Examiner(wanted, duplicates=duplicates).examine(draft("c"), document(HELPS * 3))
    await asyncio.to_thread(duplicates.close)

    assert "near_duplicate" not in second.checks


async def test_contamination_is_checked_first(tmp_path: Path) -> None:
    """A context that shares an n-gram with an evaluation set is rejected before any request."""
    path = tmp_path / "eval.jsonl"
    await asyncio.to_thread(
        path.write_text, json.dumps({"input": "Q?", "context": HELPS, "answers": ["A"]}) + "\n"
    )
    eval_sets = await asyncio.to_thread(EvalSets, [str(path)], 13)
    rejects = Examiner(ChecksSection(), eval_sets)
    flags = Examiner(ChecksSection(on_contaminated="flag"), eval_sets)

    with pytest.raises(RejectedDraft, match=r"eval\.jsonl") as rejected:
        await rejects.examine(draft(), document())
    flagged = await flags.examine(draft(), document())
    clean = await rejects.examine(draft(), document(UNRELATED))

    assert RejectReason.CONTAMINATED == rejected.value.reason
    assert ["truncated", "contaminated"] == flagged.checks["flags"]
    assert {"ngrams", "file", "words"} == flagged.checks["contaminated"].keys()
    assert ["truncated"] == clean.checks["flags"]


async def test_written_questions_are_checked_for_contamination(tmp_path: Path) -> None:
    """A question and an answer that an LLM wrote may come from an evaluation set too."""
    path = tmp_path / "eval.txt"
    await asyncio.to_thread(path.write_text, HELPS)
    eval_sets = await asyncio.to_thread(EvalSets, [str(path)], 13)
    examiner = Examiner(ChecksSection(), eval_sets)

    with pytest.raises(RejectedDraft) as rejected:
        await examiner.examine(draft(), document(UNRELATED, instruction="Who is she?", answer=HELPS))
    clean = await examiner.examine(draft(), document(UNRELATED, instruction="Who?", answer="She."))

    assert RejectReason.CONTAMINATED == rejected.value.reason
    assert ["truncated"] == clean.checks["flags"]


async def test_drafts_of_one_document_do_not_repeat_each_other(tmp_path: Path) -> None:
    """They share their text on purpose; a different seed with that text is a near-duplicate."""
    duplicates = await asyncio.to_thread(Duplicates, tmp_path / "index.sqlite", 0.8)
    examiner = Examiner(ChecksSection(near_duplicate="flag"), duplicates=duplicates)
    given = [Seed(name, "t", "", "", "f:1", context=HELPS * 3) for name in ("a", "b")]
    drafts = [Draft(given[0]), Draft(given[0], 1), Draft(given[1])]

    examined = [await examiner.examine(one, document(HELPS * 3)) for one in drafts]
    await asyncio.to_thread(duplicates.close)

    assert [False, False, True] == ["near_duplicate" in one.checks["flags"] for one in examined]
