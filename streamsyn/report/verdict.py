"""From where on each fact of a run is good, worth a look, or bad. Shares, where nothing else is said.

Marks of the facts that a verdict rests on, and how figures are put into words.

The six facts that decide whether a run is fit for training.

Whether a run is fit for training: the worst of six facts.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from streamsyn.report.collection import RunMetrics, tokens_target

FEW_CONTEXTS: Final = 200
"""Fewer deserve a closer look: arXiv 2502.15592 trains on 200 seeds of each of its tasks."""
REJECTS_LOOK: Final = 0.05
REJECTS_BAD: Final = 0.20
"""Rejects are no even draw of the seeds: beyond a fifth the mix that is trained on is another one."""
POSITIVE_GOOD: Final = 0.90
POSITIVE_LOOK: Final = 0.70
"""Share of contexts with a positive gain. Chance gives a half; a fifth of useless contexts is told by 0.9."""
MEDIAN_GAIN_LOOK: Final = 0.05
"""Nats a token; below it the answer is hardly likelier (5 %) with the context than without."""
ANSWERABLE_GOOD: Final = 0.80
ANSWERABLE_LOOK: Final = 0.50
"""Share of contexts from which the answer is found. Strong models miss some that are there."""
KNOWN_LOOK: Final = 0.30
KNOWN_BAD: Final = 0.60
"""Share of answers that are known without the context; where most are, reading it is not what is learnt."""
DUPLICATES_LOOK: Final = 0.01
DUPLICATES_BAD: Final = 0.05
"""Share of near-duplicates that were kept."""
LEAKS_BAD: Final = 0.01
"""Share of contaminated contexts that were kept; a single one deserves a look."""
WORDS_GOOD: Final = 0.7
WORDS_LOOK: Final = 0.4
"""Median words, of those asked for. Models write shorter than they are asked to, commonly by a quarter."""
REACHED_GOOD: Final = 0.95
REACHED_LOOK: Final = 0.80
"""Share of documents and samples that reach the length asked for."""
TRUNCATED_LOOK: Final = 0.05
"""Share of contexts that end in the middle of a sentence: a blemish, no reason not to train."""


class Severity(IntEnum):
    """How good a fact is; the greatest counts."""

    UNKNOWN = 0
    GOOD = 1
    LOOK = 2
    BAD = 3

    @property
    def css(self) -> str:
        """Its class."""
        return self.name.lower()


@dataclass(slots=True)
class Fact:
    """One thing that decides: a name, a figure for a glance, sentences, and the worst of their marks."""

    name: str
    figure: str = ""
    mark: Severity = Severity.UNKNOWN
    said: list[tuple[Severity, str]] = field(default_factory=list)
    worst: str = ""
    """The sentence that the mark is from."""

    def say(self, mark: Severity, sentence: str, figure: str = "") -> None:
        """Add a part; the figure of the worst one stands for all."""
        if mark > self.mark or not self.said:
            self.worst = sentence
            self.figure = figure or self.figure
        self.mark = max(self.mark, mark)
        self.said.append((mark, sentence))


def grade_low(share: float, look: float, bad: float) -> Severity:
    """The mark of a share that should be low."""
    return Severity.BAD if share > bad else Severity.LOOK if share > look else Severity.GOOD


def grade_high(share: float, good: float, look: float) -> Severity:
    """The mark of a share that should be high."""
    return Severity.GOOD if share >= good else Severity.LOOK if share >= look else Severity.BAD


def percent(part: float, whole: float) -> str:
    """A share; 0% and 100% only where they are exact."""
    if not whole or not part:
        return "0%"
    share = 100 * part / whole
    if share < 0.1:
        return "<0.1%"
    if part != whole and share > 99.9:
        return ">99.9%"
    return f"{share:.1f}%" if share < 10 or 99 < share < 100 else f"{share:.0f}%"


def counted(number: int, noun: str) -> str:
    """`1 context`, `2,000 contexts`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


_UNMEASURED = "not measured"


def amount_fact(figures: RunMetrics) -> Fact:
    """How much there is, and whether that is all."""
    contexts, samples = figures.counts["contexts"], figures.counts["samples"]
    fact = Fact("Amount", counted(contexts, "context"))
    if not contexts:
        fact.say(Severity.BAD, "There are no contexts.")
        return fact
    if contexts < FEW_CONTEXTS:
        fact.say(Severity.LOOK, f"Few: {FEW_CONTEXTS} for a single task are usual.")
    tasks = counted(len(figures.tasks.sorted()), "task")
    if not figures.config.assembly.write:
        fact.say(Severity.GOOD, f"{tasks}; no samples, as assembly.write is false.")
    elif samples:
        fact.say(Severity.GOOD, f"{tasks}; {counted(samples, 'sample')} assembled.")
    else:
        fact.say(Severity.LOOK, f"{tasks}; no samples are assembled yet.")
    state = "complete." if figures.is_complete else "not finished: more may come."
    fact.say(Severity.GOOD, f"The run is {state}")
    return fact


def rejects_fact(figures: RunMetrics) -> Fact:
    """Share of the seeds that got no context."""
    number, outcomes = figures.counts["rejects"], figures.outcomes
    fact = Fact("Rejects", percent(number, outcomes))
    if not outcomes:
        fact.say(Severity.UNKNOWN, "No seed has an outcome yet.", "none yet")
    elif not number:
        fact.say(Severity.GOOD, "Every seed got its context.")
    else:
        reason, most = figures.reasons.most_common(1)[0]
        mark = grade_low(number / outcomes, REJECTS_LOOK, REJECTS_BAD)
        fact.say(mark, f"{number:,} of {outcomes:,} outcomes are rejects; {most:,} of them are {reason}.")
    return fact


def gain_fact(figures: RunMetrics) -> Fact:
    """Whether contexts make their answers likelier."""
    scores = figures.all
    fact = Fact("Context gain", _UNMEASURED)
    if not (number := scores.gain.count):
        fact.say(
            Severity.UNKNOWN, unmeasured(figures.config.checks.context_gain, "checks.context_gain = true")
        )
        return fact
    share, median = percent(scores.positive, number), scores.gain.median
    mark = grade_high(scores.positive / number, POSITIVE_GOOD, POSITIVE_LOOK)
    fact.say(mark, f"{share} of the contexts make their answer likelier.", f"{share} above 0")
    mark = Severity.GOOD if median >= MEDIAN_GAIN_LOOK else Severity.LOOK
    fact.say(mark, f"The median gain is {median:+.2f} nats a token.", f"median {median:+.2f}")
    _unscored(figures, fact)
    return fact


def answers_fact(figures: RunMetrics) -> Fact:
    """Whether answers are found in contexts, and only there."""
    scores = figures.all
    fact = Fact("Answers", _UNMEASURED)
    if not (number := scores.answered.count):
        fact.say(Severity.UNKNOWN, unmeasured(figures.config.checks.answerable, "checks.answerable = true"))
        return fact
    share = percent(scores.answerable, number)
    mark = grade_high(scores.answerable / number, ANSWERABLE_GOOD, ANSWERABLE_LOOK)
    fact.say(mark, f"{share} can be answered from their context.", f"{share} answerable")
    if closed := scores.closed_book.count:
        share = percent(scores.known, closed)
        mark = grade_low(scores.known / closed, KNOWN_LOOK, KNOWN_BAD)
        fact.say(mark, f"{share} are answered without it, too.", f"{share} known anyway")
        with_it, without = scores.answered_sum / number, scores.closed_book_sum / closed
        mark = Severity.GOOD if with_it > without else Severity.BAD
        fact.say(mark, f"The mean score is {with_it:.2f} with the context, {without:.2f} without.")
    _unscored(figures, fact)
    return fact


def _unscored(figures: RunMetrics, fact: Fact) -> None:
    if number := figures.unscored:
        mark = grade_low(number / figures.counts["contexts"], REJECTS_LOOK, REJECTS_BAD)
        fact.say(mark, f"{counted(number, 'context')} could not be scored.", f"{number:,} unscored")


def repeats_fact(figures: RunMetrics) -> Fact:
    """Whether contexts repeat each other, or what a model is to be evaluated on."""
    checks, contexts = figures.config.checks, max(1, figures.counts["contexts"])
    number, leaks = figures.flags["near_duplicate"], figures.flags["contaminated"]
    fact = Fact("Repeats", _UNMEASURED)
    if checks.near_duplicate == "off" and not number:
        fact.say(Severity.UNKNOWN, 'Near-duplicates are not looked for: checks.near_duplicate = "flag" does.')
    else:
        share, rejected = percent(number, contexts), _rejected(figures, "near_duplicate")
        mark = grade_low(number / contexts, DUPLICATES_LOOK, DUPLICATES_BAD)
        said = f"{share} of the contexts repeat an earlier one" if number else "No near-duplicates were kept"
        fact.say(mark, f"{said}{rejected}.", f"{share} repeats")
    if not checks.eval_sets and not leaks:
        fact.say(Severity.UNKNOWN, "Leaks are not looked for: checks.eval_sets names evaluation data.")
    else:
        mark = Severity.BAD if leaks / contexts > LEAKS_BAD else Severity.LOOK if leaks else Severity.GOOD
        said = (
            f"{counted(leaks, 'context')} with words of the evaluation data"
            if leaks
            else "No leaks were kept"
        )
        fact.say(mark, f"{said}{_rejected(figures, 'contaminated')}.", counted(leaks, "leak"))
    return fact


def _rejected(figures: RunMetrics, reason: str) -> str:
    number = figures.reasons[reason]
    return f"; {number:,} {'was' if number == 1 else 'were'} rejected" if number else ""


def lengths_fact(figures: RunMetrics) -> Fact:
    """Whether contexts and samples are as long as was asked for."""
    contexts, words = max(1, figures.counts["contexts"]), figures.all.words.median
    fact = Fact("Lengths", f"{words:,.0f} words")
    _sample_lengths(figures, fact)
    if asked := sum(figures.words_asked.values()):
        wanted = sum(words * times for words, times in figures.words_asked.items()) / asked
        mark = grade_high(words / wanted, WORDS_GOOD, WORDS_LOOK)
        said = f"Contexts have {words:,.0f} words (median) where {wanted:,.0f} were asked for."
        fact.say(mark, said, f"{words:,.0f} of {wanted:,.0f} words")
    elif target := tokens_target(figures.config.recipe):
        reached = figures.counts["contexts"] - figures.flags["below_target"]
        share = percent(reached, contexts)
        mark = grade_high(reached / contexts, REACHED_GOOD, REACHED_LOOK)
        fact.say(mark, f"{share} of the contexts reach the {target:,} tokens asked for.", f"{share} in full")
    share = percent(figures.truncated, contexts)
    mark = Severity.LOOK if figures.truncated / contexts > TRUNCATED_LOOK else Severity.GOOD
    said = f"{share if figures.truncated else 'None'} of the contexts were cut off."
    fact.say(mark, said, f"{share} cut off")
    return fact


def _sample_lengths(figures: RunMetrics, fact: Fact) -> None:
    samples, most = figures.counts["samples"], figures.config.assembly.max_tokens
    if not samples:
        return
    if target := figures.sample_target:
        share = percent(figures.samples_reached, samples)
        mark = grade_high(figures.samples_reached / samples, REACHED_GOOD, REACHED_LOOK)
        said = f"{share} of the samples reach their target of {target} tokens."
        fact.say(mark, said, f"{share} reach {target}")
    elif lacking := figures.samples_lacking:
        share, wanted = percent(lacking, samples), figures.config.assembly.contexts_per_sample
        mark = grade_low(lacking / samples, 1 - REACHED_GOOD, 1 - REACHED_LOOK)
        fact.say(mark, f"{share} of the samples have fewer than {wanted} contexts.", f"{share} too few")
    if number := figures.samples_too_long:
        said = f"{counted(number, 'sample')} longer than the {most:,} tokens allowed."
        fact.say(Severity.BAD, said, f"{number:,} too long")


def unmeasured(is_on: bool, setting: str) -> str:
    """Why there is no figure, or how to get one."""
    return "No context has a score yet." if is_on else f"{setting} has servers measure it."


_TOLD = 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to think of a run."""

    mark: Severity
    headline: str
    reason: str
    facts: list[Fact]


def verdict(figures: RunMetrics) -> Verdict:
    """The verdict on a run."""
    amount, gain, answers = amount_fact(figures), gain_fact(figures), answers_fact(figures)
    all_facts = [
        amount,
        rejects_fact(figures),
        gain,
        answers,
        repeats_fact(figures),
        lengths_fact(figures),
    ]
    if amount.mark is Severity.BAD:
        return Verdict(Severity.BAD, "Not fit for training", amount.worst, all_facts[:2])
    bad = [fact for fact in all_facts if fact.mark is Severity.BAD]
    look = [fact for fact in all_facts if fact.mark is Severity.LOOK]
    if bad:
        return Verdict(Severity.BAD, "Not fit for training", _because(bad), all_facts)
    if gain.mark is answers.mark is Severity.UNKNOWN:
        unknown = "It was not measured whether the contexts lead to the answers."
        return Verdict(Severity.LOOK, "Look closer", f"{unknown} {_because(look)}".strip(), all_facts)
    if look:
        return Verdict(Severity.LOOK, "Look closer", _because(look), all_facts)
    so_far = "" if figures.is_complete else " so far"
    reason = "The run is not finished. " if so_far else ""
    unknown_names = [fact.name.lower() for fact in all_facts if fact.mark is Severity.UNKNOWN]
    reason += (
        f"Not measured: {', '.join(unknown_names)}." if unknown_names else "All that was measured is good."
    )
    return Verdict(Severity.GOOD, f"Fit for training{so_far}", reason, all_facts)


def _because(facts: list[Fact]) -> str:
    """What of one or two facts weighs most; of more of them the names, for the rest stands below."""
    if len(facts) <= _TOLD:
        return " ".join(fact.worst for fact in facts)
    *names, last = [fact.name.lower() for fact in facts]
    return f"{len(facts)} of the facts below speak against it: {', '.join(names)} and {last}."
