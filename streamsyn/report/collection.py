"""What is read from a row of the log, which may be of another version or of a recipe of the user's own.

How long contexts and samples were asked to be.

All that a report tells, collected in one reading of a run directory; a run may be writing to it.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamsyn.config.loading import Config
from streamsyn.config.sections import AssemblySection, LengthsSection, RecipeSection
from streamsyn.errors import ConfigError, SinkError
from streamsyn.report.distributions import ByTask, Histogram, Scores
from streamsyn.report.excerpts import Match, RejectExample, opening
from streamsyn.report.log_rows import checks_of, number, text, words_of
from streamsyn.report.reader_samples import BottomK, ReaderSamples, drawn
from streamsyn.report.traffic import Traffic
from streamsyn.sink.rundir import read_run_json, saved_config
from streamsyn.sink.shards import KINDS
from streamsyn.sink.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class LengthTarget:
    """Tokens a sample was to have: one number, or from `low` to `high`."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


def sample_target(assembly: AssemblySection) -> LengthTarget | None:
    """What `assembly.target_tokens` asks for; None when samples have a number of contexts."""
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
    """Words that a context of a task was asked to have; None when it is not asked in words."""
    if recipe.use != "context":
        return None
    override = recipe.tasks.get(task)
    return (override and override.target_words) or recipe.target_words


def tokens_target(recipe: RecipeSection) -> int | None:
    """Tokens that a context was asked to have; None when it is not asked in tokens."""
    return recipe.target_tokens if recipe.use == "sections" else None


DEPTHS = 10
_EXAMPLES = 3
_PAIRS = 5
REACHED = 0.9
"""A sample reaches its target from this share of it on: less is missing than a distractor has, as a rule."""
_ANSWERABLE_FROM, _KNOWN_ABOVE = 0.1, 0.5
"""Where the configuration switches the flags off: its own defaults."""


class RunMetrics:
    """Reads the log once: contexts, rejects, then samples. Memory does not grow with their number.

    Raises:
        ConfigError: It is no run directory.
    """

    def __init__(self, root: Path) -> None:
        config, saved = saved_config(root), read_run_json(root)
        if config is None or saved is None:
            raise ConfigError(f"{root} is no run directory: it has no run.json")
        self.name = root.resolve().name
        self.config: Config = config
        self.version = str((saved.get("versions") or {}).get("streamsyn", "?"))
        self.counts = dict.fromkeys(KINDS, 0)
        self.all, self.tasks, self.traffic, self.readings = Scores(), ByTask(), Traffic(), ReaderSamples()
        self.context_tokens, self.sample_tokens = Histogram(), Histogram()
        self.depth = [0.0] * DEPTHS
        """Samples whose relevant context stands in each tenth of their passages."""
        self.words_reached = 0
        """Contexts that are as long as was asked for, of those with a target in words."""
        self.words_asked: Counter[int] = Counter()
        self.samples_reached = self.samples_too_long = self.samples_lacking = 0
        self.sample_target: LengthTarget | None = sample_target(config.assembly)
        self.flags: Counter[str] = Counter()
        self.truncated = self.unscored = 0
        self.reasons: Counter[str] = Counter()
        self._examples: dict[str, BottomK[RejectExample]] = {}
        self.duplicates: BottomK[Match] = BottomK(_PAIRS)
        self.leaks: BottomK[Match] = BottomK(_PAIRS)
        self.notes: list[str] = []
        self._answerable_from = config.checks.flag_answer_below or _ANSWERABLE_FROM
        known = config.checks.flag_known_above
        self._known_above = _KNOWN_ABOVE if known is None else known
        try:
            snapshot = Snapshot(root)
        except SinkError as error:
            raise ConfigError(str(error)) from error
        self._read(snapshot)
        self.openings = self._openings(snapshot)
        """How the contexts begin that the most alike ones repeat, by id."""
        final = snapshot.manifest.final
        self.is_complete = final is not None and all(final.get(kind) == self.counts[kind] for kind in KINDS)

    @property
    def outcomes(self) -> int:
        """Contexts and rejects."""
        return self.counts["contexts"] + self.counts["rejects"]

    def examples(self, reason: str) -> list[RejectExample]:
        """A few rejects of one reason."""
        return self._examples[reason].items

    def _read(self, snapshot: Snapshot) -> None:
        take = {"contexts": self._context, "rejects": self._reject, "samples": self._sample}
        for kind in KINDS:
            for part in snapshot.parts[kind]:
                before = self.counts[kind]
                for row in part.rows():
                    self.counts[kind] += 1
                    take[kind](row)
                read = self.counts[kind] - before
                if part.sealed is not None and read != part.sealed.rows:
                    self.notes.append(
                        f"{part.path}: {read:,} of {part.sealed.rows:,} rows could be read; "
                        "`streamsyn verify` says why"
                    )

    def _openings(self, snapshot: Snapshot) -> dict[str, str]:
        openings = dict.fromkeys((match.other for match in self.duplicates.items), "")
        missing = set(openings)
        if not missing:
            return openings
        for row in (row for part in snapshot.parts["contexts"] for row in part.rows()):
            if text(row, "id") in missing:
                openings[text(row, "id")] = opening(row)
                missing.discard(text(row, "id"))
                if not missing:
                    break
        return openings

    def _context(self, row: dict[str, Any]) -> None:
        checks, task = checks_of(row), self.tasks.name(text(row, "task"))
        for scores in (self.all, self.tasks.of(task)):
            scores.add(row, self._answerable_from, self._known_above)
        self.traffic.context(row)
        self.context_tokens.add(checks.get("tokens", row.get("completion_tokens")))
        flags = [str(flag)[:60] for flag in checks.get("flags") or ()]
        self.flags.update(flags)
        self.truncated += "truncated" in flags
        self.unscored += "unscored" in flags
        if wanted := words_target(self.config.recipe, text(row, "task")):
            self.words_asked[wanted] += 1
            self.words_reached += words_of(row) >= 0.7 * wanted
        self._matches(row, checks)
        self.readings.context(task, row)

    def _matches(self, row: dict[str, Any], checks: dict[str, Any]) -> None:
        name = text(row, "id")
        if isinstance(found := checks.get("near_duplicate"), dict):
            similarity = number(found, "similarity")
            self.duplicates.offer(
                drawn("duplicate", name, -similarity),
                lambda: Match.of(name, text(found, "id"), f"{similarity:.2f}", opening(row)),
            )
        if isinstance(leak := checks.get("contaminated"), dict):
            ngrams = number(leak, "ngrams")
            self.leaks.offer(
                drawn("leak", name, -ngrams),
                lambda: Match.of(name, text(leak, "file"), f"{ngrams:,.0f}", text(leak, "words")),
            )

    def _reject(self, row: dict[str, Any]) -> None:
        reason = text(row, "reason") or "?"
        self.reasons[reason] += 1
        self.traffic.reject(row)
        if text(row, "task"):
            self.tasks.of(text(row, "task")).rejects += 1
        where = text(row, "id") or text(row, "origin")
        drawing = self._examples.setdefault(reason, BottomK(_EXAMPLES))
        drawing.offer(drawn("reject", where), lambda: RejectExample.of(row, where))

    def _sample(self, row: dict[str, Any]) -> None:
        passages, most = len(row.get("context_seqs") or ()), self.config.assembly.max_tokens
        tokens = number(row, "n_tokens")
        self.sample_tokens.add(tokens)
        if passages > 1:
            self._add_depth(int(number(row, "relevant_index")), passages)
        if self.sample_target is not None:
            wanted = number(row, "target_tokens") or self.sample_target.low
            self.samples_reached += tokens >= REACHED * wanted
        elif passages < self.config.assembly.contexts_per_sample:
            self.samples_lacking += 1
        self.samples_too_long += most is not None and tokens > most
        self.readings.sample(row)

    def _add_depth(self, place: int, passages: int) -> None:
        """Count the stretch that a passage takes up of its prompt, so that an even draw looks even."""
        for tenth in range(DEPTHS):
            low, high = (
                max(tenth / DEPTHS, place / passages),
                min((tenth + 1) / DEPTHS, (place + 1) / passages),
            )
            self.depth[tenth] += max(0.0, high - low) * passages
