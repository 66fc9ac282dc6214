"""The verdict on a run: the worst of six facts decides whether it is fit for training.

The constants are the thresholds from which a fact is good, needs a look, or is bad. They are shares unless
a unit is given.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from streamsyn.report.run_metrics import RunMetrics, tokens_target

FEW_CONTEXTS: Final = 200
"""Fewer need a look: arXiv 2502.15592 trains on 200 seeds of each of its tasks."""
REJECTS_LOOK: Final = 0.05
REJECTS_BAD: Final = 0.20
"""Rejects are not a uniform sample of the seeds: beyond a fifth they change the training mix."""
POSITIVE_GOOD: Final = 0.90
POSITIVE_LOOK: Final = 0.70
"""Share of contexts with a positive gain. Half of all useless contexts have one: 0.9 means 20 % useless."""
MEDIAN_GAIN_LOOK: Final = 0.05
"""Nats per token; below it the answer is hardly more likely (5 %) with the context than without."""
ANSWERABLE_GOOD: Final = 0.80
ANSWERABLE_LOOK: Final = 0.50
"""Share of contexts from which a model finds the answer. Strong models miss some answers that are there."""
KNOWN_LOOK: Final = 0.30
KNOWN_BAD: Final = 0.60
"""Share of answers that are known without the context; if most are, training does not teach reading."""
DUPLICATES_LOOK: Final = 0.01
DUPLICATES_BAD: Final = 0.05
"""Share of near-duplicates among the kept contexts."""
LEAKS_BAD: Final = 0.01
"""Share of contaminated contexts among the kept ones; a single one needs a look."""
WORDS_GOOD: Final = 0.7
WORDS_LOOK: Final = 0.4
"""Median words relative to the target. Models commonly write a quarter less than they are asked for."""
REACHED_GOOD: Final = 0.95
REACHED_LOOK: Final = 0.80
"""Share of contexts and samples that reach their target length."""
TRUNCATED_LOOK: Final = 0.05
"""Share of contexts that end in the middle of a sentence; not a reason against training."""
_UNMEASURED: Final = "not measured"
_MAX_REASONS: Final = 2
"""Facts that the reason of a verdict explains; of more facts it lists the names."""


class Severity(IntEnum):
    """How bad a fact is. The greatest severity of a fact's parts is that of the fact."""

    UNKNOWN = 0
    GOOD = 1
    LOOK = 2
    BAD = 3

    @property
    def css(self) -> str:
        """The CSS class."""
        return self.name.lower()


@dataclass(slots=True)
class Fact:
    """One of the facts that decide: a name, a short value, and sentences with a severity each."""

    name: str
    value: str = ""
    """The value of the worst part."""
    severity: Severity = Severity.UNKNOWN
    """The worst severity of the parts."""
    sentences: list[tuple[Severity, str]] = field(default_factory=list)
    worst: str = ""
    """The sentence with the worst severity."""

    def add(self, severity: Severity, sentence: str, value: str = "") -> None:
        """Add a part."""
        if severity > self.severity or not self.sentences:
            self.worst = sentence
            self.value = value or self.value
        self.severity = max(self.severity, severity)
        self.sentences.append((severity, sentence))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a run."""

    severity: Severity
    headline: str
    reason: str
    facts: list[Fact]


def verdict(metrics: RunMetrics) -> Verdict:
    """Return the verdict on a run."""
    amount, gain, answers = amount_fact(metrics), gain_fact(metrics), answers_fact(metrics)
    all_facts = [
        amount,
        rejects_fact(metrics),
        gain,
        answers,
        repeats_fact(metrics),
        lengths_fact(metrics),
    ]
    if amount.severity is Severity.BAD:
        return Verdict(Severity.BAD, "Not fit for training", amount.worst, all_facts[:2])
    bad = [fact for fact in all_facts if fact.severity is Severity.BAD]
    look = [fact for fact in all_facts if fact.severity is Severity.LOOK]
    if bad:
        return Verdict(Severity.BAD, "Not fit for training", _reason(bad), all_facts)
    if gain.severity is answers.severity is Severity.UNKNOWN:
        unknown = "Whether the contexts lead to the answers was not measured."
        return Verdict(Severity.LOOK, "Look closer", f"{unknown} {_reason(look)}".strip(), all_facts)
    if look:
        return Verdict(Severity.LOOK, "Look closer", _reason(look), all_facts)
    so_far = "" if metrics.is_complete else " so far"
    reason = "The run is not finished. " if so_far else ""
    unknown_names = [fact.name.lower() for fact in all_facts if fact.severity is Severity.UNKNOWN]
    reason += (
        f"Not measured: {', '.join(unknown_names)}."
        if unknown_names
        else "Everything that was measured is good."
    )
    return Verdict(Severity.GOOD, f"Fit for training{so_far}", reason, all_facts)


def _reason(facts: list[Fact]) -> str:
    """Return the worst sentences of one or two facts, or the names of more of them."""
    if len(facts) <= _MAX_REASONS:
        return " ".join(fact.worst for fact in facts)
    *names, last = [fact.name.lower() for fact in facts]
    return f"{len(facts)} of the facts below are not good: {', '.join(names)} and {last}."


def amount_fact(metrics: RunMetrics) -> Fact:
    """The number of contexts and samples, and whether the run is finished."""
    contexts, samples = metrics.counts["contexts"], metrics.counts["samples"]
    fact = Fact("Amount", counted(contexts, "context"))
    if not contexts:
        fact.add(Severity.BAD, "There are no contexts.")
        return fact
    if contexts < FEW_CONTEXTS:
        fact.add(Severity.LOOK, f"There are few: {FEW_CONTEXTS} for a single task are usual.")
    tasks = counted(len(metrics.tasks.sorted()), "task")
    if not metrics.config.assembly.write:
        fact.add(Severity.GOOD, f"{tasks}; no samples, as assembly.write is false.")
    elif samples:
        fact.add(Severity.GOOD, f"{tasks}; {counted(samples, 'sample')} assembled.")
    else:
        fact.add(Severity.LOOK, f"{tasks}; no samples are assembled yet.")
    state = "complete." if metrics.is_complete else "not finished: there may be more."
    fact.add(Severity.GOOD, f"The run is {state}")
    return fact


def rejects_fact(metrics: RunMetrics) -> Fact:
    """The share of seeds without a context."""
    number, outcomes = metrics.counts["rejects"], metrics.outcomes
    fact = Fact("Rejects", percent(number, outcomes))
    if not outcomes:
        fact.add(Severity.UNKNOWN, "No seed has an outcome yet.", "none yet")
    elif not number:
        fact.add(Severity.GOOD, "Every seed got its context.")
    else:
        reason, most = metrics.reasons.most_common(1)[0]
        severity = grade_low(number / outcomes, REJECTS_LOOK, REJECTS_BAD)
        fact.add(severity, f"{number:,} of {outcomes:,} outcomes are rejects; {most:,} of them are {reason}.")
    if metrics.superseded:
        fact.add(Severity.GOOD, f"{metrics.superseded:,} earlier rejects were retried and no longer hold.")
    return fact


def gain_fact(metrics: RunMetrics) -> Fact:
    """Whether contexts make their answers more likely."""
    scores = metrics.all
    fact = Fact("Context gain", _UNMEASURED)
    if not (number := scores.gain.count):
        fact.add(
            Severity.UNKNOWN, _unmeasured(metrics.config.checks.context_gain, "checks.context_gain = true")
        )
        return fact
    share, median = percent(scores.positive, number), scores.gain.median
    severity = grade_high(scores.positive / number, POSITIVE_GOOD, POSITIVE_LOOK)
    fact.add(severity, f"{share} of the contexts make their answer more likely.", f"{share} above 0")
    severity = Severity.GOOD if median >= MEDIAN_GAIN_LOOK else Severity.LOOK
    fact.add(severity, f"The median gain is {median:+.2f} nats per token.", f"median {median:+.2f}")
    _unscored(metrics, fact)
    return fact


def answers_fact(metrics: RunMetrics) -> Fact:
    """Whether answers can be found in contexts, and only there."""
    scores = metrics.all
    fact = Fact("Answers", _UNMEASURED)
    if not (number := scores.answered.count):
        fact.add(Severity.UNKNOWN, _unmeasured(metrics.config.checks.answerable, "checks.answerable = true"))
        return fact
    share = percent(scores.answerable, number)
    severity = grade_high(scores.answerable / number, ANSWERABLE_GOOD, ANSWERABLE_LOOK)
    fact.add(severity, f"{share} can be answered from their context.", f"{share} answerable")
    if closed := scores.closed_book.count:
        share = percent(scores.known, closed)
        severity = grade_low(scores.known / closed, KNOWN_LOOK, KNOWN_BAD)
        fact.add(severity, f"{share} can also be answered without it.", f"{share} known anyway")
        with_it, without = scores.answered_sum / number, scores.closed_book_sum / closed
        severity = Severity.GOOD if with_it > without else Severity.BAD
        fact.add(severity, f"The mean score is {with_it:.2f} with the context, {without:.2f} without.")
    _unscored(metrics, fact)
    return fact


def _unscored(metrics: RunMetrics, fact: Fact) -> None:
    if number := metrics.unscored:
        severity = grade_low(number / metrics.counts["contexts"], REJECTS_LOOK, REJECTS_BAD)
        fact.add(severity, f"{counted(number, 'context')} could not be scored.", f"{number:,} unscored")


def repeats_fact(metrics: RunMetrics) -> Fact:
    """Whether contexts repeat each other or evaluation data."""
    checks, contexts = metrics.config.checks, max(1, metrics.counts["contexts"])
    number, leaks = metrics.flags["near_duplicate"], metrics.flags["contaminated"]
    fact = Fact("Repeats", _UNMEASURED)
    if checks.near_duplicate == "off" and not number and not metrics.scored["duplicates"]:
        fact.add(
            Severity.UNKNOWN,
            "Near-duplicates were not searched for; run streamsyn score, "
            'or set checks.near_duplicate = "flag".',
        )
    else:
        share, rejected = percent(number, contexts), _rejected(metrics, "near_duplicate")
        severity = grade_low(number / contexts, DUPLICATES_LOOK, DUPLICATES_BAD)
        sentence = (
            f"{share} of the contexts repeat an earlier one" if number else "No near-duplicates were kept"
        )
        fact.add(severity, f"{sentence}{rejected}.", f"{share} repeats")
    if not checks.eval_sets and not leaks and not metrics.scored["leaks"]:
        fact.add(
            Severity.UNKNOWN,
            "Leaks were not searched for; run streamsyn score with checks.eval_sets set to files of "
            "evaluation data.",
        )
    else:
        severity = Severity.BAD if leaks / contexts > LEAKS_BAD else Severity.LOOK if leaks else Severity.GOOD
        sentence = (
            f"{counted(leaks, 'context')} with text of the evaluation data" if leaks else "No leaks were kept"
        )
        fact.add(severity, f"{sentence}{_rejected(metrics, 'contaminated')}.", counted(leaks, "leak"))
    return fact


def _rejected(metrics: RunMetrics, reason: str) -> str:
    number = metrics.reasons[reason]
    return f"; {number:,} {'was' if number == 1 else 'were'} rejected" if number else ""


def lengths_fact(metrics: RunMetrics) -> Fact:
    """Whether contexts and samples reach their target lengths."""
    contexts, words = max(1, metrics.counts["contexts"]), metrics.all.words.median
    fact = Fact("Lengths", f"{words:,.0f} words")
    _sample_lengths(metrics, fact)
    if n_targets := sum(metrics.word_targets.values()):
        target = sum(words * n for words, n in metrics.word_targets.items()) / n_targets
        severity = grade_high(words / target, WORDS_GOOD, WORDS_LOOK)
        sentence = f"Contexts have {words:,.0f} words (median); the target is {target:,.0f}."
        fact.add(severity, sentence, f"{words:,.0f} of {target:,.0f} words")
    elif token_target := tokens_target(metrics.config.recipe):
        reached = metrics.counts["contexts"] - metrics.flags["below_target"]
        share = percent(reached, contexts)
        severity = grade_high(reached / contexts, REACHED_GOOD, REACHED_LOOK)
        fact.add(
            severity,
            f"{share} of the contexts reach the target of {token_target:,} tokens.",
            f"{share} in full",
        )
    share = percent(metrics.truncated, contexts)
    severity = Severity.LOOK if metrics.truncated / contexts > TRUNCATED_LOOK else Severity.GOOD
    sentence = (
        f"{share} of the contexts were cut off at recipe.max_tokens (see recipe.on_truncated)."
        if metrics.truncated
        else "None of the contexts were cut off."
    )
    fact.add(severity, sentence, f"{share} cut off")
    return fact


def _sample_lengths(metrics: RunMetrics, fact: Fact) -> None:
    samples, limit = metrics.counts["samples"], metrics.config.assembly.max_tokens
    if not samples:
        return
    if target := metrics.sample_target:
        share = percent(metrics.samples_reached, samples)
        severity = grade_high(metrics.samples_reached / samples, REACHED_GOOD, REACHED_LOOK)
        sentence = f"{share} of the samples reach their target of {target} tokens."
        fact.add(severity, sentence, f"{share} reach {target}")
    elif incomplete := metrics.samples_incomplete:
        share, n = percent(incomplete, samples), metrics.config.assembly.contexts_per_sample
        severity = grade_low(incomplete / samples, 1 - REACHED_GOOD, 1 - REACHED_LOOK)
        fact.add(severity, f"{share} of the samples have fewer than {n} contexts.", f"{share} too few")
    if number := metrics.samples_too_long:
        sentence = f"{counted(number, 'sample')} longer than the {limit:,} tokens allowed."
        fact.add(Severity.BAD, sentence, f"{number:,} too long")


def _unmeasured(is_on: bool, setting: str) -> str:
    """Return why there is no value, or how to measure it."""
    return "No context has a score yet." if is_on else f"Not measured; run streamsyn score, or set {setting}."


def grade_low(share: float, look: float, bad: float) -> Severity:
    """Return the severity of a share that should be low."""
    return Severity.BAD if share > bad else Severity.LOOK if share > look else Severity.GOOD


def grade_high(share: float, good: float, look: float) -> Severity:
    """Return the severity of a share that should be high."""
    return Severity.GOOD if share >= good else Severity.LOOK if share >= look else Severity.BAD


def percent(part: float, whole: float) -> str:
    """Return a share as text; 0% and 100% only if they are exact."""
    if not whole or not part:
        return "0%"
    share = 100 * part / whole
    if share < 0.1:
        return "<0.1%"
    if part != whole and share > 99.9:
        return ">99.9%"
    return f"{share:.1f}%" if share < 10 or 99 < share < 100 else f"{share:.0f}%"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 context`, `2,000 contexts`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
