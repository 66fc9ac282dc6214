"""The recorded work of a run once more: the same requests in the same order, with answers of equal length.

A run directory holds what prompts are made of (the configuration, the seeds) and the length of each answer,
but not the texts of single steps. So prompts are rendered by the run's recipe, the length of an answer is
forced by `max_tokens` and `ignore_eos`, and the later steps of a draft contain what the server has written
now. That is also what makes the prefix cache act as it did: it holds what the server itself wrote.

Answers that were discarded are asked for again, and a reject asks as often as it did. What was tried and not
answered, and what servers scored for `checks`, is not repeated.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from streamsyn.assembly.resources import with_templates
from streamsyn.bench.load import RecordedWork
from streamsyn.config.loading import Config
from streamsyn.config.sections import ChecksSection
from streamsyn.errors import ConfigError
from streamsyn.recipes.recipe import Recipe, RejectedDraft, Steps
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, Seed
from streamsyn.seeds.reader import SeedReader
from streamsyn.sink.completed_keys import row_key
from streamsyn.sink.rundir import read_run_json, saved_config
from streamsyn.sink.snapshot import Snapshot, holding_rejects

Row = dict[str, Any]

_PASSED: Final = ChecksSection(
    min_words=0, max_words=2**31, refusal=False, max_repetition=1.0, prompt_echo=False, qa_pasted=False
)
"""Checks that each answer passes: the recorded run has judged already."""
_ENDS: Final = frozenset({"stop", "stop_token_ids", "stop_regex", "max_completion_tokens", "min_tokens"})
"""Sampling parameters that would give an answer another length."""
_READ_AHEAD: Final = 4096
"""Rows among which the next draft to begin is found; the log has them in the order in which they ended."""


@dataclass(frozen=True, slots=True)
class RecordedAnswer:
    """One answer of the recorded run; the prompt's tokens are known only for answers that were kept."""

    completion_tokens: int
    is_kept: bool = False
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    thinking_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RecordedDraft:
    """The answers of a draft in their order, and the reason and detail of its reject, if it ended as one."""

    draft: Draft
    answers: tuple[RecordedAnswer, ...]
    reject: tuple[RejectReason, str] | None = None


@dataclass(slots=True)
class PromptTokens:
    """Tokens of prompts that were sent, and those among them that servers took from their caches."""

    sent: int = 0
    cached: int = 0

    def add(self, sent: int, cached: int) -> None:
        """Count a prompt."""
        self.sent += sent
        self.cached += cached

    @property
    def factor(self) -> float:
        """Tokens sent for each token that was computed; 1 without prefix caching."""
        return self.sent / max(1, self.sent - self.cached)


@dataclass(slots=True)
class Replay:
    """The work of a run directory, and a recipe that asks for it.

    Attributes:
        config: The run's configuration.
        recipe: Asks for the drafts that `drafts` has yielded, once each.
        recorded: Prompt tokens in the run, of the kept answers that came again so far.
        replayed: Prompt tokens of the same requests now.
        left_out: Number of drafts that are not repeated, by why.
        notes: What to know about the replay, one line each.
    """

    config: Config
    recipe: "ReplayedRecipe"
    recorded: PromptTokens
    replayed: PromptTokens
    left_out: Counter[str]
    notes: list[str]
    _root: Path

    def drafts(self) -> Iterator[Draft]:
        """The drafts in the order in which they began; those for documents in that of the sources.

        Reads files: iterate in a thread.

        Raises:
            ConfigError: No answer is in the log, or a source cannot be read.
        """
        is_empty = True
        for recorded in self._recorded_drafts():
            if not recorded.answers:
                self.left_out["no answer came"] += 1
                continue
            is_empty = False
            self.recipe.expect(recorded)
            yield recorded.draft
        if is_empty:
            raise ConfigError(f"{self._root} holds no answer that could be asked for again")

    def producer(self) -> RecordedWork:
        """Return the producer of the drafts. See GivenWork."""
        return RecordedWork(self.drafts())

    def opening(self) -> Request | None:
        """Return the first request; None if there is none. Reads files.

        A run begins with such a request, outside of its log: it shows whether servers accept what is sent,
        and brings the beginning that all prompts share into their caches.
        """
        for recorded in self._recorded_drafts():
            if recorded.answers:
                request = next(self.recipe.recipe.steps(recorded.draft))
                return forced(request, recorded.answers[0].completion_tokens)
        return None

    def _recorded_drafts(self) -> Iterator[RecordedDraft]:
        snapshot = Snapshot(self._root)
        contexts = (row for part in snapshot.parts["contexts"] for row in part.rows())
        rejects = (row for row in holding_rejects(snapshot) if row.get("seed_id") is not None)
        rows = heapq.merge(_by_start(contexts), _by_start(rejects), key=_began)
        if self.recipe.takes_documents:
            return self._documents(rows)
        return (recorded_draft(_draft_of(row), row) for row in rows)

    def _documents(self, rows: Iterable[Row]) -> Iterator[RecordedDraft]:
        """The log has no documents, so they come from the run's sources, with the answers by their key."""
        kept = ("attempts", "steps", "reason", "detail")
        by_key = {row_key(row): {name: row[name] for name in kept if name in row} for row in rows}
        seeds, run = self.config.seeds, self.config.run
        reader = SeedReader(seeds, run.seed, self._root / "spool", takes_documents=True)
        entries = (entry for batch in reader.batches(lambda _: True) for entry in batch)
        for seed in entries:
            if isinstance(seed, Seed):
                for number in range(self.config.recipe.contexts_per_seed):
                    draft = Draft(seed, number)
                    if (row := by_key.pop(draft.key, None)) is not None:
                        yield recorded_draft(draft, row)
        self.left_out["its document is not in the sources"] += len(by_key)


def open_replay(root: Path) -> Replay:
    """Open the run directory `root` to replay what it holds.

    Raises:
        ConfigError: It is not a run directory, or its recipe cannot be loaded.
        SinkError: Its manifest is damaged.
    """
    config, run = saved_config(root), read_run_json(root)
    if config is None or run is None:
        raise ConfigError(f"--replay {root} is not a run directory: it has no run.json")
    with TemporaryDirectory() as folder:
        section = with_templates(config.recipe, "recipe", run["fingerprint"], Path(folder))
        # The recorded lengths hold the thoughts.
        section = section.model_copy(update={"thinking_tokens": 0})
        recipe = load_recipe(section, _PASSED)
    changed = [
        name for name, value in recipe.fingerprint().items() if run["fingerprint"].get(name, value) != value
    ]
    notes = [f"changed since the run, so prompts may differ: {', '.join(changed)}"] if changed else []
    replayed, recorded = PromptTokens(), PromptTokens()
    return Replay(
        config.model_copy(update={"recipe": section, "checks": _PASSED}),
        ReplayedRecipe(recipe, recorded, replayed),
        recorded,
        replayed,
        Counter(),
        notes,
        root,
    )


@dataclass(slots=True)
class ReplayedRecipe:
    """The run's recipe, asking for answers of the recorded lengths.

    Attributes:
        recipe: The run's recipe, whose checks pass.
        recorded: Counts the recorded prompt tokens of kept answers.
        replayed: Counts those of the same requests now.
    """

    recipe: Recipe
    recorded: PromptTokens
    replayed: PromptTokens
    _expected: dict[bytes, RecordedDraft] = field(default_factory=dict)

    @property
    def takes_documents(self) -> bool:
        """As the run's recipe."""
        return self.recipe.takes_documents

    def expect(self, recorded: RecordedDraft) -> None:
        """Prepare to be asked for a draft."""
        self._expected[recorded.draft.key] = recorded

    def steps(self, draft: Draft) -> Steps:
        """Ask for the recorded answers of a draft, in their order.

        An answer that the run discarded, and any beyond those that the recipe asks for, repeats the request
        before it. So the number of requests and their lengths are the recorded ones, whatever a recipe of
        your own makes of the new texts.

        Raises:
            RejectedDraft: The recorded draft ended as a reject.
        """
        expected = self._expected.pop(draft.key)
        asking: Steps | None = (steps := self.recipe.steps(draft))
        request = next(steps)
        kept: list[Completion] = []
        for answer in expected.answers:
            completion = yield forced(request, answer.completion_tokens)
            if answer.is_kept:
                kept.append(completion)
                self.recorded.add(answer.prompt_tokens, answer.cached_tokens)
                self.replayed.add(completion.prompt_tokens, completion.cached_tokens)
            if asking is not None and (answer.is_kept or expected.reject is not None):
                try:
                    request = asking.send(_as_recorded(completion, answer))
                except (StopIteration, RejectedDraft):
                    asking = None
        if expected.reject is not None or not kept:
            raise RejectedDraft(*(expected.reject or (RejectReason.EMPTY, "no answer was kept")))
        return Document(kept[-1].text, {"flags": []}, kept)

    def group(self, seed: Seed) -> str:
        """As the run's recipe."""
        return self.recipe.group(seed)

    def outlook(self) -> str:
        """As the run's recipe."""
        return self.recipe.outlook()

    def fingerprint(self) -> dict[str, str]:
        """As the run's recipe."""
        return self.recipe.fingerprint()


def forced(request: Request, tokens: int) -> Request:
    """Return the request for an answer of exactly `tokens` tokens."""
    fields = {"max_tokens": max(1, tokens), "ignore_eos": True}
    body = None if request.body is None else _without_ends(request.body) | fields
    return replace(request, sampling=_without_ends(request.sampling) | fields, body=body)


def _without_ends(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _ENDS}


def _as_recorded(completion: Completion, answer: RecordedAnswer) -> Completion:
    """The new text with the recorded figures, by which recipes decide what to ask next."""
    return replace(
        completion,
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens or completion.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        thinking_tokens=answer.thinking_tokens,
    )


def recorded_draft(draft: Draft, row: Mapping[str, Any]) -> RecordedDraft:
    """Return the answers of a row of contexts or rejects.

    `attempts` has all answers, `steps` those that were kept; they are matched by their order and lengths.
    """
    kept = list(row.get("steps") or ())
    answers = []
    for attempt in row.get("attempts") or ():
        if attempt.get("error") is not None:
            continue
        tokens = int(attempt.get("completion_tokens") or 0)
        if kept and int(kept[0].get("completion_tokens") or 0) == tokens:
            answers.append(_kept_answer(tokens, kept.pop(0)))
        else:
            answers.append(RecordedAnswer(tokens))
    reject = None
    if "reason" in row:
        reject = RejectReason(row["reason"]), str(row.get("detail", ""))
    return RecordedDraft(draft, tuple(answers), reject)


def _kept_answer(tokens: int, step: Mapping[str, Any]) -> RecordedAnswer:
    return RecordedAnswer(
        tokens,
        is_kept=True,
        finish_reason=str(step.get("finish_reason", "stop")),
        prompt_tokens=int(step.get("prompt_tokens") or 0),
        cached_tokens=int(step.get("cached_tokens") or 0),
        thinking_tokens=int(step.get("thinking_tokens") or 0),
    )


def _draft_of(row: Row) -> Draft:
    seed = Seed(
        id=row["seed_id"],
        task=row["task"],
        instruction=row["instruction"],
        answer=row["answer"],
        origin=row.get("origin", ""),
        metadata=row.get("metadata") or {},
    )
    return Draft(seed, int(row.get("draft") or 0))


def _began(row: Row) -> float:
    attempts: Sequence[Mapping[str, Any]] = row.get("attempts") or ()
    return float(attempts[0]["at"]) if attempts else float(row.get("written_at") or 0.0)


def _by_start(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows by the time of their first request, as far as `_READ_AHEAD` looks ahead."""
    ahead: list[tuple[float, int, Row]] = []
    for number, row in enumerate(rows):
        entry = _began(row), number, row
        if len(ahead) < _READ_AHEAD:
            heapq.heappush(ahead, entry)
        else:
            yield heapq.heappushpop(ahead, entry)[2]
    while ahead:
        yield heapq.heappop(ahead)[2]
