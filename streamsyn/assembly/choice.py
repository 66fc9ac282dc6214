"""Which distractors a sample gets: how many, and which never."""

from collections.abc import Callable
from dataclasses import dataclass, field

from streamsyn.assembly.measure import Measure
from streamsyn.assembly.passages import Passage, Piece
from streamsyn.assembly.sources import Draws
from streamsyn.minhash import Signature, similarity
from streamsyn.sections import AssemblySection

_MOST_TOO_LONG = 16
"""After so many candidates that would have made it too long, a sample is as long as it gets."""

Order = Callable[[list[Piece]], list[Piece]]
"""All passages of a sample, as they stand in it, from its distractors."""


@dataclass(slots=True)
class Choice:
    """Distractors chosen for one context."""

    distractors: list[Piece] = field(default_factory=list)
    n_tokens: int | None = None
    """Of the whole sample, where that has been counted."""
    is_enough: bool = False
    """Whether there is no use in waiting for more."""


@dataclass(frozen=True, slots=True)
class Goal:
    """How long a sample is to be: so many distractors, or so many tokens."""

    distractors: int
    target_tokens: int | None = None
    max_tokens: int | None = None

    @property
    def is_by_tokens(self) -> bool:
        """Whether tokens have to be counted while distractors are chosen."""
        return self.target_tokens is not None or self.max_tokens is not None


class Chooser:
    """Chooses distractors in the order in which they are drawn."""

    def __init__(self, section: AssemblySection, measure: Measure) -> None:
        self._min_answer_chars = section.min_answer_chars
        self._max_similarity = section.max_similarity
        self._measure = measure

    def choose(self, relevant: Passage, draws: Draws, goal: Goal, order: Order) -> Choice:
        """Distractors for `relevant`, until there are enough or none is left to try.

        With a target in tokens the sample reaches it, and would not without its last distractor, unless
        there are too few or `max_tokens` forbids it.
        """
        answer = " ".join(relevant.answer.casefold().split())
        if len(answer) < self._min_answer_chars:
            answer = ""
        origins = {relevant.origin}  # drafts of one seed tell the same story
        likeness = _Likeness(self._max_similarity)
        likeness.add(relevant)
        fill = _Fill(self._measure, relevant, goal, order)
        tried = 0
        while not fill.is_enough:
            # Where nearly everything holds the answer, the search ends.
            if tried > 8 * (len(fill.chosen) + 8):
                break
            if (candidate := draws.next(len(fill.chosen))) is None:
                break
            tried += 1
            if candidate.origin is not None and candidate.origin in origins:
                continue
            if answer and candidate.holds(answer):
                continue
            if likeness.is_near(candidate) or not fill.add(candidate):
                continue
            likeness.add(candidate)
            if candidate.origin is not None:
                origins.add(candidate.origin)
        if draws.dry is not None and not fill.is_enough:
            return Choice()
        return fill.choice()


class _Fill:
    """A sample that grows to its length, counted exactly only where that can matter."""

    def __init__(self, measure: Measure, relevant: Passage, goal: Goal, order: Order) -> None:
        self._measure = measure
        self._relevant = relevant
        self._goal = goal
        self._order = order
        self._too_long = 0
        self.chosen: list[Piece] = []
        self._tokens = measure.total(relevant, [relevant]) if goal.is_by_tokens else 0
        self._is_exact = True

    @property
    def is_enough(self) -> bool:
        if self._too_long >= _MOST_TOO_LONG:
            return True
        if (target := self._goal.target_tokens) is None:
            return len(self.chosen) >= self._goal.distractors
        return self._is_exact and self._tokens >= target

    def add(self, piece: Piece) -> bool:
        """Take it in, unless it would make the sample too long."""
        if self._goal.is_by_tokens:
            tokens, is_exact = self._with(piece)
            if self._goal.max_tokens is not None and tokens > self._goal.max_tokens:
                self._too_long += 1
                return False
            self._tokens, self._is_exact = tokens, is_exact
        self.chosen.append(piece)
        return True

    def _with(self, piece: Piece) -> tuple[int, bool]:
        """Tokens with a piece more, and whether they have been counted: where it may matter, they are."""
        tokens = self._tokens + self._measure.about(self._relevant, piece)
        slack = self._measure.slack(len(self.chosen) + 2)
        if slack is None:
            return tokens, True
        highest, target = self._goal.max_tokens, self._goal.target_tokens
        if highest is not None and tokens > highest + slack:
            return tokens, False
        if any(bound is not None and tokens >= bound - slack for bound in (highest, target)):
            return self._counted([*self.chosen, piece]), True
        return tokens, False

    def choice(self) -> Choice:
        """What has been chosen, less what turned out not to be needed."""
        enough = self.is_enough
        if not self._goal.is_by_tokens:
            return Choice(self.chosen, None, enough)
        if not self._is_exact:
            self._tokens = self._counted(self.chosen)
        # Sums of counts may be off: the last ones may be too many.
        while self.chosen and self._measure.slack(1) is not None:
            if self._goal.max_tokens is not None and self._tokens > self._goal.max_tokens:
                self.chosen.pop()
                self._tokens = self._counted(self.chosen)
                continue
            if self._goal.target_tokens is None or self._tokens < self._goal.target_tokens:
                break
            if (shorter := self._counted(self.chosen[:-1])) < self._goal.target_tokens:
                break
            self.chosen.pop()
            self._tokens = shorter
        return Choice(self.chosen, self._tokens, enough)

    def _counted(self, distractors: list[Piece]) -> int:
        return self._measure.total(self._relevant, self._order(distractors))


class _Likeness:
    """The passages of one sample, by the keys under which those like them are found."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._by_band: dict[int, Signature] = {}
        self._more: dict[int, list[Signature]] = {}
        """Those whose band was taken: few, so the others cost little."""

    def is_near(self, piece: Piece) -> bool:
        """Whether the sample has one that is too much like it."""
        if self._most >= 1 or self._by_band.keys().isdisjoint(piece.signature.bands):
            return False
        shared = [band for band in piece.signature.bands if band in self._by_band]
        known = [one for band in shared for one in (self._by_band[band], *self._more.get(band, ()))]
        return any(similarity(piece.signature, one) >= self._most for one in known)

    def add(self, piece: Piece) -> None:
        if self._most >= 1:
            return
        bands = piece.signature.bands
        if not self._by_band.keys().isdisjoint(bands):
            for band in self._by_band.keys() & bands:
                self._more.setdefault(band, []).append(piece.signature)
            bands = tuple(band for band in bands if band not in self._by_band)
        self._by_band.update(dict.fromkeys(bands, piece.signature))
