"""All metrics of a report, collected in one pass over a run directory; a run may be writing to it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from streamsyn.config.loading import Config
from streamsyn.config.sections import AssemblySection, LengthsSection, RecipeSection
from streamsyn.errors import ConfigError, SinkError
from streamsyn.report.charts import Histogram
from streamsyn.report.log_rows import ANSWER_METRICS, checks_of, is_number, number, text, words_of
from streamsyn.report.report_examples import (
    BottomK,
    RejectExample,
    RepeatExample,
    SampleExamples,
    draw_key,
    opening,
)
from streamsyn.report.traffic import Traffic
from streamsyn.scoring.sidecar import measured, with_scores
from streamsyn.sink.partitions import begun_directories, run_directories
from streamsyn.sink.rundir import read_run_json, saved_config
from streamsyn.sink.shards import KINDS
from streamsyn.sink.snapshot import Part, SeqSet, Snapshot, superseded

DEPTHS = 10
"""Bins of the position of the relevant context."""
_MAX_EXAMPLES = 3
"""Rejects shown per reason."""
_MAX_REPEATS = 5
"""Near-duplicates and leaks shown."""
_REACHED = 0.9
"""A sample reaches its target from this share of it on; the rest is usually less than one distractor."""
_ANSWERABLE_FROM, _KNOWN_ABOVE = 0.1, 0.5
"""Thresholds where the configuration has switched the flags off: the defaults of `checks`."""
MAX_TASKS = 24
"""Tasks with scores of their own."""
OTHER = "(other tasks)"
_GAIN_STEP, _SCORE_STEP = 0.005, 0.005
"""Cell widths of the histograms of context gain (nats per token) and of scores."""


class RunMetrics:
    """Reads contexts, rejects and samples of a run and of all its partitions. Memory does not grow with them.

    Raises:
        ConfigError: The directory is not a run directory, or its manifest is damaged.
    """

    def __init__(self, root: Path) -> None:
        roots, [begun, *_] = run_directories(root), begun_directories(root)
        config, saved = saved_config(begun), read_run_json(begun)
        if config is None or saved is None:
            raise ConfigError(f"{begun} is not a run directory: it has no run.json")
        self.name = root.resolve().name
        self.config: Config = config
        self.version = str((saved.get("versions") or {}).get("streamsyn", "?"))
        self.counts = dict.fromkeys(KINDS, 0)
        self.all, self.tasks, self.traffic = Scores(), ScoresByTask(), Traffic()
        self.samples_to_read = SampleExamples()
        self.context_tokens, self.sample_tokens = Histogram(), Histogram()
        self.depth = [0.0] * DEPTHS
        """Samples by the position of their relevant context, in tenths of the prompt's passages."""
        self.word_targets: Counter[int] = Counter()
        """Contexts by their target in words."""
        self.samples_reached = self.samples_too_long = self.samples_incomplete = 0
        self.samples_removed = 0
        """Samples that retention has removed; what is shown of samples is of those that are left."""
        self.sample_target: LengthTarget | None = sample_target(config.assembly)
        self.flags: Counter[str] = Counter()
        self.truncated = self.unscored = 0
        self.superseded = 0
        """Rejects that a retry has superseded; they count for time and tokens only."""
        self.reasons: Counter[str] = Counter()
        self._examples: dict[str, BottomK[RejectExample]] = {}
        self.duplicates: BottomK[RepeatExample] = BottomK(_MAX_REPEATS)
        self.leaks: BottomK[RepeatExample] = BottomK(_MAX_REPEATS)
        self.notes: list[str] = []
        self._answerable_from = config.checks.flag_answer_below or _ANSWERABLE_FROM
        known = config.checks.flag_known_above
        self._known_above = _KNOWN_ABOVE if known is None else known
        try:
            snapshots = [Snapshot(one) for one in roots]
        except SinkError as error:
            raise ConfigError(str(error)) from error
        self.scored = sum(map(measured, roots), Counter())
        """Contexts that `streamsyn score` has measured, by measure."""
        self._read(snapshots)
        if self.samples_removed:
            self.notes.append(
                f"{self.samples_removed:,} samples were removed by retention; what is shown of samples is of "
                "the rest"
            )
        self.openings = self._openings(snapshots)
        """The beginnings of the contexts that the shown near-duplicates repeat, by id."""
        finals = [snapshot.manifest.final for snapshot in snapshots]
        rows = self.counts | {
            "rejects": self.counts["rejects"] + self.superseded,
            "samples": self.counts["samples"] + self.samples_removed,
        }
        ended = [final for final in finals if final is not None]
        self.is_complete = len(ended) == len(finals) and all(
            sum(final.get(kind, 0) for final in ended) == rows[kind] for kind in KINDS
        )

    @property
    def outcomes(self) -> int:
        """Number of contexts and rejects."""
        return self.counts["contexts"] + self.counts["rejects"]

    def examples(self, reason: str) -> list[RejectExample]:
        """Return a few rejects of one reason."""
        return self._examples[reason].items

    def _read(self, snapshots: Sequence[Snapshot]) -> None:
        gone = [superseded(snapshot) for snapshot in snapshots]
        for kind in KINDS:  # samples are last: see `SampleExamples`
            for snapshot, no_longer_hold in zip(snapshots, gone, strict=True):
                self._read_kind(kind, snapshot.parts[kind], no_longer_hold)

    def _read_kind(self, kind: str, parts: Sequence[Part], gone: SeqSet) -> None:
        add: dict[str, Callable[[dict[str, Any]], None]] = {
            "contexts": self._add_context,
            "rejects": partial(self._add_reject, gone),
            "samples": self._add_sample,
        }
        for part in parts:
            if part.is_removed and part.sealed is not None:
                self.samples_removed += part.sealed.rows
                continue
            read = 0
            rows = part.rows() if kind != "contexts" else with_scores(part.root, part.rows())
            for row in rows:
                read += 1
                add[kind](row)
            if part.sealed is not None and read != part.sealed.rows:
                self.notes.append(
                    f"{part.path}: only {read:,} of {part.sealed.rows:,} rows could be read; "
                    "`streamsyn verify` says why"
                )

    def _openings(self, snapshots: Sequence[Snapshot]) -> dict[str, str]:
        openings = dict.fromkeys((match.other for match in self.duplicates.items), "")
        missing = set(openings)
        if not missing:
            return openings
        parts = (part for snapshot in snapshots for part in snapshot.parts["contexts"])
        for row in (row for part in parts for row in part.rows()):
            if text(row, "id") in missing:
                openings[text(row, "id")] = opening(row)
                missing.discard(text(row, "id"))
                if not missing:
                    break
        return openings

    def _add_context(self, row: dict[str, Any]) -> None:
        self.counts["contexts"] += 1
        checks, task = checks_of(row), self.tasks.name(text(row, "task"))
        for scores in (self.all, self.tasks.of(task)):
            scores.add(row, self._answerable_from, self._known_above)
        self.traffic.add_context(row)
        self.context_tokens.add(
            checks.get("tokens", number(row, "completion_tokens") - number(row, "thinking_tokens"))
        )
        flags = [str(flag)[:60] for flag in checks.get("flags") or ()]
        self.flags.update(flags)
        self.truncated += "truncated" in flags
        self.unscored += "unscored" in flags
        if target := words_target(self.config.recipe, text(row, "task")):
            self.word_targets[target] += 1
        self._add_repeats(row, checks)
        self.samples_to_read.add_context(task, row)

    def _add_repeats(self, row: dict[str, Any], checks: dict[str, Any]) -> None:
        context_id = text(row, "id")
        if isinstance(found := checks.get("near_duplicate"), dict):
            similarity = number(found, "similarity")
            self.duplicates.offer(
                draw_key("duplicate", context_id, -similarity),
                lambda: RepeatExample.of(context_id, text(found, "id"), f"{similarity:.2f}", opening(row)),
            )
        if isinstance(leak := checks.get("contaminated"), dict):
            ngrams = number(leak, "ngrams")
            self.leaks.offer(
                draw_key("leak", context_id, -ngrams),
                lambda: RepeatExample.of(
                    context_id, text(leak, "file"), f"{ngrams:,.0f}", text(leak, "words")
                ),
            )

    def _add_reject(self, gone: SeqSet, row: dict[str, Any]) -> None:
        self.traffic.add_reject(row)
        if row.get("seq") in gone:
            self.superseded += 1
            return
        self.counts["rejects"] += 1
        reason = text(row, "reason") or "?"
        self.reasons[reason] += 1
        if text(row, "task"):
            self.tasks.of(text(row, "task")).rejects += 1
        where = text(row, "id") or text(row, "origin")
        examples = self._examples.setdefault(reason, BottomK(_MAX_EXAMPLES))
        examples.offer(draw_key("reject", where), lambda: RejectExample.of(row, where))

    def _add_sample(self, row: dict[str, Any]) -> None:
        self.counts["samples"] += 1
        passages, limit = len(row.get("context_seqs") or ()), self.config.assembly.max_tokens
        tokens = number(row, "n_tokens")
        self.sample_tokens.add(tokens)
        if passages > 1:
            self._add_depth(int(number(row, "relevant_index")), passages)
        if self.sample_target is not None:
            target = number(row, "target_tokens") or self.sample_target.low
            self.samples_reached += tokens >= _REACHED * target
        elif passages < self.config.assembly.contexts_per_sample:
            self.samples_incomplete += 1
        self.samples_too_long += limit is not None and tokens > limit
        self.samples_to_read.add_prompt(row)

    def _add_depth(self, index: int, passages: int) -> None:
        """Count the interval that a passage covers, so that uniform positions give a flat histogram."""
        for tenth in range(DEPTHS):
            low, high = (
                max(tenth / DEPTHS, index / passages),
                min((tenth + 1) / DEPTHS, (index + 1) / passages),
            )
            self.depth[tenth] += max(0.0, high - low) * passages


@dataclass(slots=True)
class Scores:
    """Lengths and scores of some contexts."""

    contexts: int = 0
    rejects: int = 0
    words: Histogram = field(default_factory=Histogram)
    gain: Histogram = field(default_factory=lambda: Histogram(_GAIN_STEP))
    positive: int = 0
    """Contexts with a gain above 0."""
    answered: Histogram = field(default_factory=lambda: Histogram(_SCORE_STEP))
    closed_book: Histogram = field(default_factory=lambda: Histogram(_SCORE_STEP))
    answered_sum: float = 0.0
    closed_book_sum: float = 0.0
    answerable: int = 0
    known: int = 0
    metrics: Counter[str] = field(default_factory=Counter)

    def add(self, row: dict[str, Any], answerable_from: float, known_above: float) -> None:
        """Count a context.

        Args:
            row: Its row in the log.
            answerable_from: Minimum answer score of an answerable instruction.
            known_above: Closed-book score above which the model knows the answer without the context.
        """
        checks = checks_of(row)
        self.contexts += 1
        self.words.add(words_of(row))
        self.gain.add(checks.get("context_gain"))
        self.positive += is_number(checks.get("context_gain")) and checks["context_gain"] > 0
        if is_number(checks.get("answer_score")):
            score = number(checks, "answer_score")
            self.answered.add(score)
            self.answered_sum += score
            self.answerable += score >= answerable_from
            metric = text(checks, "answer_metric")
            self.metrics[metric if metric in ANSWER_METRICS else "score"] += 1
        if is_number(checks.get("closed_book_score")):
            score = number(checks, "closed_book_score")
            self.closed_book.add(score)
            self.closed_book_sum += score
            self.known += score > known_above

    @property
    def metric(self) -> str:
        """The names of the answer scores, for display."""
        return " / ".join(ANSWER_METRICS.get(name, "score") for name in sorted(self.metrics))


class ScoresByTask:
    """Scores by task. Tasks beyond MAX_TASKS are counted together as OTHER."""

    def __init__(self) -> None:
        self._tasks: dict[str, Scores] = {}

    def name(self, task: str) -> str:
        """Return the name under which a task is counted."""
        return task if task in self._tasks or len(self._tasks) < MAX_TASKS else OTHER

    def of(self, task: str) -> Scores:
        """Return the scores of a task."""
        return self._tasks.setdefault(self.name(task), Scores())

    def sorted(self) -> list[tuple[str, Scores]]:
        """Return the scores sorted by task, with OTHER last."""
        return sorted(self._tasks.items(), key=lambda named: (named[0] == OTHER, named[0]))


@dataclass(frozen=True, slots=True)
class LengthTarget:
    """The target length of samples in tokens: one number, or from `low` to `high`."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


def sample_target(assembly: AssemblySection) -> LengthTarget | None:
    """Return the range of `assembly.target_tokens`; None if samples have a number of contexts instead."""
    match assembly.target_tokens:
        case None:
            return None
        case LengthsSection() as lengths:
            if bounds := lengths.uniform or lengths.log_uniform:
                return LengthTarget(*bounds)
            values = lengths.choices or [tokens for _, tokens in lengths.schedule or ()]
            return LengthTarget(min(values), max(values))
        case tokens:
            return LengthTarget(tokens, tokens)


def words_target(recipe: RecipeSection, task: str) -> int | None:
    """Return the target of a task's contexts in words; None if the recipe has none."""
    if recipe.use != "context":
        return None
    override = recipe.tasks.get(task)
    return (override and override.target_words) or recipe.target_words


def tokens_target(recipe: RecipeSection) -> int | None:
    """Return the target of contexts in tokens; None if the recipe has none."""
    return recipe.target_tokens if recipe.use == "sections" else None
