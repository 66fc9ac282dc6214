"""Models that think, from the request to the outcome: what is sent, kept, counted and flagged."""

import asyncio
from dataclasses import asdict
from typing import Any

import pytest

from streamsyn.assembly.window import Passage
from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.fleet.thinking import Thinking, cleaned
from streamsyn.pipeline.reject_limits import RejectLimits
from streamsyn.pipeline.workers import Results, Worker
from streamsyn.queues import Backlog, BoundedQueue
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import (
    Attempt,
    Completion,
    Context,
    Draft,
    Outcome,
    Reject,
    RejectReason,
    Request,
    Seed,
    Work,
)
from streamsyn.sink.writer import count_outcome
from streamsyn.telemetry import Counters

PROSE = " ".join(f"The {number}th year saw the river rise by {number * 7} feet." for number in range(1, 21))
SEED = Seed("s-1", "qa", "When did the mill of Aldersby burn down?", "In 1847.", "seeds.jsonl:1")


class ThinkingFleet:
    """A server whose model writes these raw answers, 40 tokens each, and then the last one for ever."""

    def __init__(self, *answers: str, finish_reason: str = "stop") -> None:
        self._answers = list(answers)
        self._finish_reason = finish_reason
        self.asked: list[Request] = []

    def model_of(self, _key: bytes) -> str:
        return "Qwen3-8B"

    async def complete(self, request: Request, attempts: list[Attempt], model: str) -> Completion:
        self.asked.append(request)
        text = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        attempts.append(Attempt("http://s", 0.0, 1.0, None, 40))
        return cleaned(Completion(text, self._finish_reason, 10, 0, 40, model, "http://s"))


async def outcome_of(fleet: Any, **recipe: Any) -> Outcome:
    """What a draft becomes."""
    section = RecipeSection(**recipe)
    work, results = BoundedQueue[Work](1), Backlog[Outcome](1)
    await work.put(Draft(SEED))
    work.close()
    made = await asyncio.to_thread(load_recipe, section, ChecksSection())
    limited = Results(results, RejectLimits())
    await Worker(made, fleet, thinking=Thinking(section)).run(work, limited, lambda: True)
    return results.get_nowait(1)[0]


async def test_a_context_is_written_without_its_thought() -> None:
    """The thought's tokens are counted apart: in the row, in its steps, and in the run."""
    thought = "x" * len(PROSE)
    context = await outcome_of(ThinkingFleet(f"<think>{thought[15:]}</think>{PROSE}"), thinking="off")

    assert isinstance(context, Context)
    assert (PROSE, 40, 20, 0) == (
        context.context,
        context.completion_tokens,
        context.thinking_tokens,
        context.wasted_tokens,
    )
    assert [20] == [step["thinking_tokens"] for step in context.steps]
    row = asdict(context) | {"seq": 0}
    assert 20 == Passage.of_context(0, context).tokens == Passage.of_row(row).tokens
    counters = Counters()
    count_outcome(counters, context)
    assert (40, 20) == (counters.useful_tokens, counters.thinking_tokens)


@pytest.mark.parametrize(
    ("thinking", "sent"),
    [
        ("auto", {}),
        ("off", {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}),
        (
            "on",
            {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}, "max_tokens": 4096 + 4096},
        ),
    ],
)
async def test_each_request_of_a_recipe_switches_thinking(thinking: str, sent: dict[str, Any]) -> None:
    """For the model that writes the draft."""
    fleet = ThinkingFleet(PROSE)
    await outcome_of(fleet, thinking=thinking)

    assert [{"temperature": 0.8, "max_tokens": 4096} | sent] == [request.sampling for request in fleet.asked]


async def test_a_model_that_is_still_thinking_is_asked_once() -> None:
    """The reject names the key, and counts what was spent."""
    fleet = ThinkingFleet("<think>They want a mill.", finish_reason="length")
    reject = await outcome_of(fleet, max_tokens=40)

    assert isinstance(reject, Reject)
    assert (RejectReason.STILL_THINKING, 40, 1) == (reject.reason, reject.wasted_tokens, len(fleet.asked))
    assert "recipe.max_tokens = 40" in reject.detail


async def test_thoughts_do_not_fill_a_document_of_sections() -> None:
    """Its length is that of the text, and no thought is sent back. A step is asked again."""
    plan = "<think>" + "plan " * 300 + "</think>"
    sections = [
        plan + " ".join(f"In {number}{year} the river rose by {year} feet." for year in range(10, 40))
        for number in range(40)
    ]
    fleet = ThinkingFleet("1. The river\n2. The mill", "<think>hm", *sections)
    context = await outcome_of(fleet, use="sections", target_tokens=150, section_tokens=100, thinking="on")

    assert isinstance(context, Context)
    assert context.checks["sections"] > 6
    assert (
        125
        < context.checks["tokens"]
        == sum(step["completion_tokens"] - step["thinking_tokens"] for step in context.steps[1:])
    )
    assert not [1 for request in fleet.asked if "plan" in str(request.messages)]
    assert {100 + 4096} == {request.sampling["max_tokens"] for request in fleet.asked[1:2]}


async def test_control_tokens_that_a_text_mentions_are_flagged() -> None:
    """A turn that ends is cut instead."""
    flagged = await outcome_of(ThinkingFleet(f"{PROSE} A turn ends with <|im_end|> here. {PROSE[:40]}"))
    cut = await outcome_of(ThinkingFleet(f"{PROSE}<|im_end|>\n<|im_start|>assistant\nAnother text."))

    assert ["control_tokens"] == asdict(flagged)["checks"]["flags"]
    assert ([], PROSE) == (asdict(cut)["checks"]["flags"], asdict(cut)["context"])
