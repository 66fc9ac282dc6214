"""Examines written drafts: no text of evaluation sets, not a near-duplicate, and helpful for the answer.

Cheap checks come first. A finding becomes a field or a flag of `Context.checks`, or rejects the draft.
`open_examination` makes an examiner from the configuration, with its index, evaluation sets and fleet.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from streamsyn.config.loading import Config
from streamsyn.config.sections import ChecksSection, FleetSection, ScoringSection
from streamsyn.errors import ConfigError, ServerError
from streamsyn.fleet.fleet import Fleet
from streamsyn.fleet.server_spec import server_specs
from streamsyn.recipes.recipe import RejectedDraft
from streamsyn.records import Context, Document, Draft, RejectReason
from streamsyn.scoring.measures import AnswerPrompt, Answers, Gain, Question, ScoringClient, other_answers
from streamsyn.telemetry import Counters

if TYPE_CHECKING:
    from streamsyn.scoring.contamination import EvalSets, Overlap
    from streamsyn.scoring.duplicates import Duplicates, Match

log = structlog.get_logger()


class Scores:
    """Runs the checks that ask servers: `checks.context_gain` and `checks.answerable`.

    Args:
        checks: Which of them are on.
        scoring: Token limits.
        prompt: Renders the question.
        fleet: The servers that score.
        model: The model that scores.
        counters: Counts the cost.
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
        self.answers: Answers | None = None
        if checks.answerable:
            self.answers = Answers(
                prompt, scoring.max_answer_tokens, scoring.thinking, scoring.thinking_tokens
            )
        self._fleet = fleet
        self._model = model
        self._counters = counters

    async def measure(self, findings: "Findings", question: Question, context: str) -> None:
        """Ask the servers and add the findings. If they fail, the context is kept and flagged `unscored`.

        Raises:
            RejectedDraft: A score is below its threshold.
            StoppedEarly: The run is draining.
        """
        client = ScoringClient(self._fleet, self._model)
        error: str | None = None
        try:
            # In sequence: the second measure finds the context in the server's cache.
            if self.gain is not None:
                findings.add_gain(await self.gain.measure(client, question, context))
            if self.answers is not None:
                findings.add_answer(await self.answers.measure(client, question, context))
        except ServerError as failure:
            error = str(failure)
            findings.flags.append("unscored")
            log.warning("scoring.failed", error=error)
        finally:
            self._counters.count_scoring(client.cost(), client.retries, failed=error is not None)
            findings.checks["scoring"] = client.cost() | ({"error": error} if error else {})


class Findings:
    """The findings about one context, compared with the thresholds.

    Args:
        section: The thresholds.
        checks: The checks that the recipe made.

    Attributes:
        checks: `Context.checks` without its flags.
        flags: The flags.
    """

    def __init__(self, section: ChecksSection, checks: dict[str, Any]) -> None:
        self._section = section
        self.checks = dict(checks)
        self.flags: list[str] = list(checks.get("flags", ()))

    def add_leak(self, overlap: "Overlap") -> None:
        """Add what the context has in common with evaluation sets, and its flag."""
        found = {"ngrams": overlap.ngrams, "file": overlap.file, "words": overlap.words}
        self.checks["contaminated"] = found
        self.flags.append("contaminated")

    def add_duplicate(self, match: "Match") -> None:
        """Add the earlier context that this one repeats, and its flag."""
        self.checks["near_duplicate"] = {"id": match.id, "similarity": round(match.similarity, 4)}
        self.flags.append("near_duplicate")

    def add_gain(self, found: dict[str, Any]) -> None:
        """Add the fields that `Gain.measure` returned.

        Raises:
            RejectedDraft: The gain is below `checks.reject_gain_below`.
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
        """Add the fields that `Answers.measure` returned.

        Raises:
            RejectedDraft: The score is below `checks.reject_answer_below`.
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
        known_above = section.flag_known_above
        if known_above is not None and found["closed_book_score"] > known_above:
            self.flags.append("known_answer")


class Examiner:
    """Examines drafts one by one. All workers share it.

    Args:
        section: What to do about findings, and the thresholds.
        eval_sets: Evaluation sets whose text must not occur in contexts; None without any.
        duplicates: The index of the contexts so far; None if duplicates are not looked for.
        scores: The checks that ask servers; None if they are off.
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

    @property
    def asks_servers(self) -> bool:
        """Whether it asks servers, so that a kill or a drain may come between a document and its outcome."""
        return self._scores is not None

    async def examine(self, draft: Draft, document: Document) -> Document:
        """Return the document with the findings in its checks.

        Raises:
            RejectedDraft: It must not become a context.
            StoppedEarly: The run is draining.
        """
        findings = Findings(self._section, document.checks)
        if self._eval_sets is not None:
            written = (document.text, document.instruction, document.answer)
            await self._check_contamination(self._eval_sets, findings, "\n\n".join(filter(None, written)))
        is_repeat = False
        if self._scores is not None:
            if self._duplicates is not None:  # scoring a repeat would be a waste
                is_repeat = await self._is_repeat(self._duplicates.find, findings, draft, document)
            await self._scores.measure(findings, _question(draft, document), document.text)
        # Last: a draft that was rejected after it had become an original would take similar ones with it.
        if self._duplicates is not None and not is_repeat:
            await self._is_repeat(self._duplicates.check_and_add, findings, draft, document)
        return replace(document, checks={**findings.checks, "flags": findings.flags})

    def forget(self, draft: Draft) -> None:
        """Record that a draft became a reject: similar texts are no near-duplicates of it."""
        if self._duplicates is not None:
            self._duplicates.forget(draft.id)

    def logged(self, seq: int, context: Context) -> None:
        """Record that a context is on disk: the next one in the order of the log."""
        if self._duplicates is not None:
            self._duplicates.logged(seq, context.id)

    async def _check_contamination(self, eval_sets: "EvalSets", findings: Findings, text: str) -> None:
        overlap = await asyncio.to_thread(eval_sets.overlap, text)
        if overlap is None:
            return
        if self._section.on_contaminated == "reject":
            raise RejectedDraft(
                RejectReason.CONTAMINATED,
                f"{overlap.ngrams} runs of {self._section.eval_ngram_words} words stand in {overlap.file} "
                f"too, such as {overlap.words!r}",
            )
        findings.add_leak(overlap)

    async def _is_repeat(
        self,
        look: Callable[[str, str], "Match | None"],
        findings: Findings,
        draft: Draft,
        document: Document,
    ) -> bool:
        """Whether `look` finds an original like the document; if so, reject the draft or add the finding."""
        match = await asyncio.to_thread(look, draft.id, document.text)
        if match is None or (draft.seed.context and is_draft_of(match.id, draft.seed.id)):
            return False  # the drafts of a seed with a document share that document
        if self._section.near_duplicate == "reject":
            detail = f"repeats the context {match.id} (similarity {match.similarity:.2f})"
            raise RejectedDraft(RejectReason.NEAR_DUPLICATE, detail)
        findings.add_duplicate(match)
        return True


def is_draft_of(draft_id: str, seed_id: str) -> bool:
    """Whether a draft, by its id, is one of a seed."""
    return draft_id == seed_id or draft_id.startswith(f"{seed_id}#")


def _question(draft: Draft, document: Document) -> Question:
    seed = draft.seed
    return Question(
        seed.instruction if document.instruction is None else document.instruction,
        seed.answer if document.answer is None else document.answer,
        seed.task,
        other_answers(seed.metadata) if document.answer is None else (),
    )


Opening = Callable[[FleetSection], AbstractAsyncContextManager[Fleet]]
"""Opens a fleet, as a context manager."""
Rows = Callable[[int], Iterable[dict[str, Any]]]
"""Reads the contexts of the log from a `seq` on."""


@dataclass(frozen=True, slots=True)
class Examination:
    """An open examiner.

    Attributes:
        examiner: The examiner.
        fleet: The fleet that scores: its own, or the one that writes; None if no check asks servers.
        shaping: Values besides the configuration that shape the findings; part of the fingerprint.
    """

    examiner: Examiner
    fleet: Fleet | None
    shaping: dict[str, Any]


@asynccontextmanager
async def open_examination(
    config: Config, index: Path, contexts: Rows, writing: Fleet, opening: Opening, counters: Counters
) -> AsyncIterator[Examination]:
    """Open an examiner, and close its index and its own fleet afterwards.

    Args:
        config: The configuration; `checks` and `scoring` are used.
        index: The SQLite file with the index of the contexts so far, derived from the log.
        contexts: Reads the contexts in the log from a `seq` on.
        writing: The fleet that writes, whose models are known.
        opening: Opens a fleet of servers that only score.
        counters: Counts the cost of scoring.

    Raises:
        ConfigError: A file, a server or a model of these sections cannot be used.
        FleetGone: No scoring server became ready.
    """
    checks, scoring = config.checks, config.scoring
    shaping: dict[str, Any] = {}
    eval_sets = await asyncio.to_thread(_eval_sets, checks)
    if eval_sets is not None:
        shaping["checks.eval_sets"] = eval_sets.digest
    async with (
        _scoring_fleet(config, writing, opening) as fleet,
        _duplicates(checks, index, contexts) as duplicates,
    ):
        scores: Scores | None = None
        if fleet is not None:
            model = scoring_model(fleet, scoring.model)
            prompt = await asyncio.to_thread(AnswerPrompt, scoring.template)
            if checks.context_gain:
                await check_logprobs(fleet, model)
            scores = Scores(checks, scoring, prompt, fleet, model, counters)
            shaping |= {"scoring.model": model, "scoring.prompt": prompt.digest}
        yield Examination(Examiner(checks, eval_sets, duplicates, scores), fleet, shaping)


@asynccontextmanager
async def _scoring_fleet(config: Config, writing: Fleet, opening: Opening) -> AsyncIterator[Fleet | None]:
    """The fleet that scores, after its models are known; None if no check asks servers."""
    checks, scoring = config.checks, config.scoring
    if not (checks.context_gain or checks.answerable):
        yield None
    elif not scoring.servers:
        yield writing
    else:
        async with own_fleet(config, opening) as fleet:
            yield fleet


@asynccontextmanager
async def own_fleet(config: Config, opening: Opening) -> AsyncIterator[Fleet]:
    """The fleet of `scoring.servers`, after its models are known.

    Raises:
        ConfigError: A server or a model of `scoring` cannot be used.
        FleetGone: No server became ready.
    """
    scoring = config.scoring
    own: dict[str, Any] = {"servers": scoring.servers, "model": scoring.model, "models": {}}
    section = config.fleet.model_copy(update={**own, "servers_file": None, "servers_dns": None})
    with _errors_name_scoring():
        server_specs(section)
    async with opening(section) as fleet:
        with _errors_name_scoring():
            await fleet.ask_models()
        yield fleet


@contextmanager
def _errors_name_scoring() -> Iterator[None]:
    """Make errors name the keys of `scoring`: fleets name those of `fleet`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(r"\bfleet\.(?=(servers|model)\b)", "scoring.", str(error))) from error


def _eval_sets(checks: ChecksSection) -> "EvalSets | None":
    if not checks.eval_sets:
        return None
    from streamsyn.scoring.contamination import EvalSets

    return EvalSets(checks.eval_sets, checks.eval_ngram_words)


@asynccontextmanager
async def _duplicates(
    checks: ChecksSection, path: Path, contexts: Rows
) -> AsyncIterator["Duplicates | None"]:
    """The index of the contexts so far; None if `checks.near_duplicate` is off."""
    if checks.near_duplicate == "off":
        yield None
        return
    from streamsyn.scoring.duplicates import Duplicates

    duplicates = await asyncio.to_thread(Duplicates, path, checks.similarity)
    try:
        await asyncio.to_thread(_catch_up, duplicates, contexts)
        yield duplicates
    finally:
        await asyncio.to_thread(duplicates.close)


def _catch_up(duplicates: "Duplicates", contexts: Rows) -> None:
    if not duplicates.catch_up(contexts(duplicates.next_seq)):
        duplicates.catch_up(contexts(0))


def scoring_model(fleet: Fleet, wanted: str | None) -> str:
    """The model that scores: `scoring.model`, else the first by name.

    Raises:
        ConfigError: No server has `scoring.model`.
    """
    if wanted is not None and wanted not in fleet.models:
        configured = ", ".join(sorted(fleet.models))
        raise ConfigError(f"scoring.model: {wanted!r} is not among the models of the servers: {configured}")
    return wanted or min(fleet.models)


async def check_logprobs(fleet: Fleet, model: str) -> None:
    """Check that the servers of a model can measure context gain.

    Raises:
        ConfigError: They cannot.
    """
    try:
        await fleet.check_scores(model)
    except ConfigError as error:
        raise ConfigError(f"checks.context_gain: {error}") from error
