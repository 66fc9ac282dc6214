"""What several drafts of one seed need is worked out once.

Examines what a recipe has written: is it clean and new, and does it help to find the answer?
"""

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from streamsyn.config.sections import ChecksSection, ScoringSection
from streamsyn.errors import ServerError
from streamsyn.fleet.fleet import Fleet
from streamsyn.recipes.recipe import RejectedDraft
from streamsyn.records import Document, Draft, RejectReason
from streamsyn.scoring.measures import Answers, Gain
from streamsyn.scoring.requests import AnswerPrompt, Asking, Question
from streamsyn.telemetry import Counters

if TYPE_CHECKING:
    from streamsyn.scoring.contamination import EvalSets
    from streamsyn.scoring.duplicates import Duplicates

log = structlog.get_logger()


class Scores:
    """What servers are asked about a context, as far as the configuration wants it.

    Args:
        checks: Says what is wanted.
        scoring: Says how much of it.
        prompt: How the question is put.
        fleet: Whom to ask.
        model: Who is to answer.
        counters: Told what it costs.
    """

    def __init__(
        self,
        checks: ChecksSection,
        scoring: ScoringSection,
        prompt: AnswerPrompt,
        fleet: Fleet,
        model: str,
        counters: Counters,
    ) -> None:
        self.gain = Gain(prompt, scoring.answer_tokens) if checks.context_gain else None
        self.answers = Answers(prompt, scoring.max_answer_tokens) if checks.answerable else None
        self._fleet = fleet
        self._model = model
        self._counters = counters

    async def measure(self, findings: "Findings", question: Question, context: str) -> None:
        """Ask, and put down what is found. What a server fails to say is no fault of the context's.

        Raises:
            RejectedDraft: The context is not worth keeping.
            StoppedEarly: The run is draining.
        """
        asking = Asking(self._fleet, self._model)
        error: str | None = None
        try:
            # One after the other: the second finds the context in the server's cache.
            if self.gain is not None:
                findings.add_gain(await self.gain.measure(asking, question, context))
            if self.answers is not None:
                findings.add_answer(await self.answers.measure(asking, question, context))
        except ServerError as failure:
            error = str(failure)
            findings.flags.append("unscored")
            log.warning("scoring.failed", error=error)
        finally:
            self._counters.count_scoring(asking.figures(), asking.retries, failed=error is not None)
            findings.checks["scoring"] = asking.figures() | ({"error": error} if error else {})


class Findings:
    """What was found of one context, and what follows from it.

    Args:
        section: The thresholds.
        checks: What the recipe measured.

    Attributes:
        checks: As `Context.checks`, but for the flags.
        flags: As `checks.flags`.
    """

    def __init__(self, section: ChecksSection, checks: dict[str, Any]) -> None:
        self._section = section
        self.checks = dict(checks)
        self.flags: list[str] = list(checks.get("flags", ()))

    def add_gain(self, found: dict[str, Any]) -> None:
        """Put down what `Gain` measured.

        Raises:
            RejectedDraft: It is too little.
        """
        self.checks |= found
        gain, section = found["context_gain"], self._section
        if section.reject_gain_below is not None and gain < section.reject_gain_below:
            raise RejectedDraft(
                RejectReason.LOW_CONTEXT_GAIN,
                f"context_gain {gain:g} is below {section.reject_gain_below:g} "
                f"(nll {found['nll_with']:g} with it, {found['nll_without']:g} without)",
            )
        if section.flag_gain_below is not None and gain < section.flag_gain_below:
            self.flags.append("low_context_gain")

    def add_answer(self, found: dict[str, Any]) -> None:
        """Put down what `Answers` measured.

        Raises:
            RejectedDraft: The answer is too far from the gold one.
        """
        self.checks |= found
        score, section = found["answer_score"], self._section
        if section.reject_answer_below is not None and score < section.reject_answer_below:
            raise RejectedDraft(
                RejectReason.NOT_ANSWERABLE,
                f"{found['answer_metric']} {score:g} is below {section.reject_answer_below:g}: the model "
                f"answered {found['model_answer'][:200]!r}",
            )
        if section.flag_answer_below is not None and score < section.flag_answer_below:
            self.flags.append("not_answerable")
        knows = section.flag_known_above
        if knows is not None and found["closed_book_score"] > knows:
            self.flags.append("known_answer")


class Examiner:
    """Examines drafts one by one; workers share it.

    Args:
        section: What is wanted, and the thresholds.
        eval_sets: Texts that no context may hold parts of.
        duplicates: The contexts so far.
        scores: What servers are asked.
    """

    def __init__(
        self,
        section: ChecksSection,
        eval_sets: "EvalSets | None" = None,
        duplicates: "Duplicates | None" = None,
        scores: Scores | None = None,
    ) -> None:
        self._section = section
        self._eval_sets = eval_sets
        self._duplicates = duplicates
        self._scores = scores

    async def examine(self, draft: Draft, document: Document) -> Document:
        """The document with what was found in its checks; the cheap looks come first.

        Raises:
            RejectedDraft: It is not fit to be a context.
            StoppedEarly: The run is draining.
        """
        findings = Findings(self._section, document.checks)
        if self._eval_sets is not None:
            written = (document.text, document.instruction, document.answer)
            await self._look_for_leaks(self._eval_sets, findings, "\n\n".join(filter(None, written)))
        is_shared = bool(draft.seed.context) and draft.number > 0  # the drafts of a document are about it
        if self._duplicates is not None and not is_shared:
            await self._look_for_repeats(self._duplicates, findings, draft.id, document.text)
        if self._scores is not None:
            try:
                await self._scores.measure(findings, _question(draft, document), document.text)
            except RejectedDraft:
                if self._duplicates is not None:  # what is in no log can be repeated
                    await asyncio.to_thread(self._duplicates.forget, draft.id)
                raise
        return replace(document, checks={**findings.checks, "flags": findings.flags})

    async def _look_for_leaks(self, eval_sets: "EvalSets", findings: Findings, text: str) -> None:
        overlap = await asyncio.to_thread(eval_sets.overlap, text)
        if overlap is None:
            return
        if self._section.on_contaminated == "reject":
            raise RejectedDraft(
                RejectReason.CONTAMINATED,
                f"{overlap.ngrams} runs of {self._section.eval_ngram_words} words stand in {overlap.file} "
                f"too, such as {overlap.words!r}",
            )
        found = {"ngrams": overlap.ngrams, "file": overlap.file, "words": overlap.words}
        findings.checks["contaminated"] = found
        findings.flags.append("contaminated")

    async def _look_for_repeats(
        self, duplicates: "Duplicates", findings: Findings, draft_id: str, text: str
    ) -> None:
        match = await asyncio.to_thread(duplicates.check_and_add, draft_id, text)
        if match is None:
            return
        if self._section.near_duplicate == "reject":
            detail = f"repeats the context {match.id} (similarity {match.similarity:.2f})"
            raise RejectedDraft(RejectReason.NEAR_DUPLICATE, detail)
        findings.checks["near_duplicate"] = {"id": match.id, "similarity": round(match.similarity, 4)}
        findings.flags.append("near_duplicate")


def _question(draft: Draft, document: Document) -> Question:
    seed = draft.seed
    return Question(
        seed.instruction if document.instruction is None else document.instruction,
        seed.answer if document.answer is None else document.answer,
        seed.task,
    )
