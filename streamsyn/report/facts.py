"""The six facts that decide whether a run is fit for training."""

from streamsyn.report import thresholds as at
from streamsyn.report.figures import Figures
from streamsyn.report.marks import Fact, Mark, counted, grade_high, grade_low, percent
from streamsyn.report.targets import tokens_target

_UNMEASURED = "not measured"


def amount(figures: Figures) -> Fact:
    """How much there is, and whether that is all."""
    contexts, samples = figures.counts["contexts"], figures.counts["samples"]
    fact = Fact("Amount", counted(contexts, "context"))
    if not contexts:
        fact.say(Mark.BAD, "There are no contexts.")
        return fact
    if contexts < at.FEW_CONTEXTS:
        fact.say(Mark.LOOK, f"Few: {at.FEW_CONTEXTS} for a single task are usual.")
    tasks = counted(len(figures.tasks.sorted()), "task")
    if not figures.config.assembly.write:
        fact.say(Mark.GOOD, f"{tasks}; no samples, as assembly.write is false.")
    elif samples:
        fact.say(Mark.GOOD, f"{tasks}; {counted(samples, 'sample')} assembled.")
    else:
        fact.say(Mark.LOOK, f"{tasks}; no samples are assembled yet.")
    state = "complete." if figures.is_complete else "not finished: more may come."
    fact.say(Mark.GOOD, f"The run is {state}")
    return fact


def rejects(figures: Figures) -> Fact:
    """Share of the seeds that got no context."""
    number, outcomes = figures.counts["rejects"], figures.outcomes
    fact = Fact("Rejects", percent(number, outcomes))
    if not outcomes:
        fact.say(Mark.UNKNOWN, "No seed has an outcome yet.", "none yet")
    elif not number:
        fact.say(Mark.GOOD, "Every seed got its context.")
    else:
        reason, most = figures.reasons.most_common(1)[0]
        mark = grade_low(number / outcomes, at.REJECTS_LOOK, at.REJECTS_BAD)
        fact.say(mark, f"{number:,} of {outcomes:,} outcomes are rejects; {most:,} of them are {reason}.")
    return fact


def gain(figures: Figures) -> Fact:
    """Whether contexts make their answers likelier."""
    scores = figures.all
    fact = Fact("Context gain", _UNMEASURED)
    if not (number := scores.gain.count):
        fact.say(Mark.UNKNOWN, unmeasured(figures.config.checks.context_gain, "checks.context_gain = true"))
        return fact
    share, median = percent(scores.positive, number), scores.gain.median
    mark = grade_high(scores.positive / number, at.POSITIVE_GOOD, at.POSITIVE_LOOK)
    fact.say(mark, f"{share} of the contexts make their answer likelier.", f"{share} above 0")
    mark = Mark.GOOD if median >= at.MEDIAN_GAIN_LOOK else Mark.LOOK
    fact.say(mark, f"The median gain is {median:+.2f} nats a token.", f"median {median:+.2f}")
    _unscored(figures, fact)
    return fact


def answers(figures: Figures) -> Fact:
    """Whether answers are found in contexts, and only there."""
    scores = figures.all
    fact = Fact("Answers", _UNMEASURED)
    if not (number := scores.answered.count):
        fact.say(Mark.UNKNOWN, unmeasured(figures.config.checks.answerable, "checks.answerable = true"))
        return fact
    share = percent(scores.answerable, number)
    mark = grade_high(scores.answerable / number, at.ANSWERABLE_GOOD, at.ANSWERABLE_LOOK)
    fact.say(mark, f"{share} can be answered from their context.", f"{share} answerable")
    if closed := scores.closed_book.count:
        share = percent(scores.known, closed)
        mark = grade_low(scores.known / closed, at.KNOWN_LOOK, at.KNOWN_BAD)
        fact.say(mark, f"{share} are answered without it, too.", f"{share} known anyway")
        with_it, without = scores.answered_sum / number, scores.closed_book_sum / closed
        mark = Mark.GOOD if with_it > without else Mark.BAD
        fact.say(mark, f"The mean score is {with_it:.2f} with the context, {without:.2f} without.")
    _unscored(figures, fact)
    return fact


def _unscored(figures: Figures, fact: Fact) -> None:
    if number := figures.unscored:
        mark = grade_low(number / figures.counts["contexts"], at.REJECTS_LOOK, at.REJECTS_BAD)
        fact.say(mark, f"{counted(number, 'context')} could not be scored.", f"{number:,} unscored")


def repeats(figures: Figures) -> Fact:
    """Whether contexts repeat each other, or what a model is to be evaluated on."""
    checks, contexts = figures.config.checks, max(1, figures.counts["contexts"])
    number, leaks = figures.flags["near_duplicate"], figures.flags["contaminated"]
    fact = Fact("Repeats", _UNMEASURED)
    if checks.near_duplicate == "off" and not number:
        fact.say(Mark.UNKNOWN, 'Near-duplicates are not looked for: checks.near_duplicate = "flag" does.')
    else:
        share, rejected = percent(number, contexts), _rejected(figures, "near_duplicate")
        mark = grade_low(number / contexts, at.DUPLICATES_LOOK, at.DUPLICATES_BAD)
        said = f"{share} of the contexts repeat an earlier one" if number else "No near-duplicates were kept"
        fact.say(mark, f"{said}{rejected}.", f"{share} repeats")
    if not checks.eval_sets and not leaks:
        fact.say(Mark.UNKNOWN, "Leaks are not looked for: checks.eval_sets names evaluation data.")
    else:
        mark = Mark.BAD if leaks / contexts > at.LEAKS_BAD else Mark.LOOK if leaks else Mark.GOOD
        said = (
            f"{counted(leaks, 'context')} with words of the evaluation data"
            if leaks
            else "No leaks were kept"
        )
        fact.say(mark, f"{said}{_rejected(figures, 'contaminated')}.", counted(leaks, "leak"))
    return fact


def _rejected(figures: Figures, reason: str) -> str:
    number = figures.reasons[reason]
    return f"; {number:,} {'was' if number == 1 else 'were'} rejected" if number else ""


def lengths(figures: Figures) -> Fact:
    """Whether contexts and samples are as long as was asked for."""
    contexts, words = max(1, figures.counts["contexts"]), figures.all.words.median
    fact = Fact("Lengths", f"{words:,.0f} words")
    _sample_lengths(figures, fact)
    if asked := sum(figures.words_asked.values()):
        wanted = sum(words * times for words, times in figures.words_asked.items()) / asked
        mark = grade_high(words / wanted, at.WORDS_GOOD, at.WORDS_LOOK)
        said = f"Contexts have {words:,.0f} words (median) where {wanted:,.0f} were asked for."
        fact.say(mark, said, f"{words:,.0f} of {wanted:,.0f} words")
    elif target := tokens_target(figures.config.recipe):
        reached = figures.counts["contexts"] - figures.flags["below_target"]
        share = percent(reached, contexts)
        mark = grade_high(reached / contexts, at.REACHED_GOOD, at.REACHED_LOOK)
        fact.say(mark, f"{share} of the contexts reach the {target:,} tokens asked for.", f"{share} in full")
    share = percent(figures.truncated, contexts)
    mark = Mark.LOOK if figures.truncated / contexts > at.TRUNCATED_LOOK else Mark.GOOD
    said = f"{share if figures.truncated else 'None'} of the contexts were cut off."
    fact.say(mark, said, f"{share} cut off")
    return fact


def _sample_lengths(figures: Figures, fact: Fact) -> None:
    samples, most = figures.counts["samples"], figures.config.assembly.max_tokens
    if not samples:
        return
    if target := figures.sample_target:
        share = percent(figures.samples_reached, samples)
        mark = grade_high(figures.samples_reached / samples, at.REACHED_GOOD, at.REACHED_LOOK)
        said = f"{share} of the samples reach their target of {target} tokens."
        fact.say(mark, said, f"{share} reach {target}")
    elif lacking := figures.samples_lacking:
        share, wanted = percent(lacking, samples), figures.config.assembly.contexts_per_sample
        mark = grade_low(lacking / samples, 1 - at.REACHED_GOOD, 1 - at.REACHED_LOOK)
        fact.say(mark, f"{share} of the samples have fewer than {wanted} contexts.", f"{share} too few")
    if number := figures.samples_too_long:
        said = f"{counted(number, 'sample')} longer than the {most:,} tokens allowed."
        fact.say(Mark.BAD, said, f"{number:,} too long")


def unmeasured(is_on: bool, setting: str) -> str:
    """Why there is no figure, or how to get one."""
    return "No context has a score yet." if is_on else f"{setting} has servers measure it."
