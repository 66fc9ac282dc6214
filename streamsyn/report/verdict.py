"""Whether a run is fit for training: the worst of six facts."""

from dataclasses import dataclass

from streamsyn.report import facts
from streamsyn.report.figures import Figures
from streamsyn.report.marks import Fact, Mark

_TOLD = 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to think of a run."""

    mark: Mark
    headline: str
    reason: str
    facts: list[Fact]


def verdict(figures: Figures) -> Verdict:
    """The verdict on a run."""
    amount, gain, answers = facts.amount(figures), facts.gain(figures), facts.answers(figures)
    all_facts = [
        amount,
        facts.rejects(figures),
        gain,
        answers,
        facts.repeats(figures),
        facts.lengths(figures),
    ]
    if amount.mark is Mark.BAD:
        return Verdict(Mark.BAD, "Not fit for training", amount.worst, all_facts[:2])
    bad = [fact for fact in all_facts if fact.mark is Mark.BAD]
    look = [fact for fact in all_facts if fact.mark is Mark.LOOK]
    if bad:
        return Verdict(Mark.BAD, "Not fit for training", _because(bad), all_facts)
    if gain.mark is answers.mark is Mark.UNKNOWN:
        unknown = "It was not measured whether the contexts lead to the answers."
        return Verdict(Mark.LOOK, "Look closer", f"{unknown} {_because(look)}".strip(), all_facts)
    if look:
        return Verdict(Mark.LOOK, "Look closer", _because(look), all_facts)
    so_far = "" if figures.is_complete else " so far"
    reason = "The run is not finished. " if so_far else ""
    unknown_names = [fact.name.lower() for fact in all_facts if fact.mark is Mark.UNKNOWN]
    reason += (
        f"Not measured: {', '.join(unknown_names)}." if unknown_names else "All that was measured is good."
    )
    return Verdict(Mark.GOOD, f"Fit for training{so_far}", reason, all_facts)


def _because(facts: list[Fact]) -> str:
    """What of one or two facts weighs most; of more of them the names, for the rest stands below."""
    if len(facts) <= _TOLD:
        return " ".join(fact.worst for fact in facts)
    *names, last = [fact.name.lower() for fact in facts]
    return f"{len(facts)} of the facts below speak against it: {', '.join(names)} and {last}."
