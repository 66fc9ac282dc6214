"""Where distractors come from: contexts of the same task or of any, passages of a corpus, or a mix.

Which distractors a sample gets: how many, and which never.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from streamsyn.assembly.corpus import Corpus
from streamsyn.assembly.token_counter import TokenCounter
from streamsyn.assembly.window import Passage, Piece, Pool, Window
from streamsyn.config.sections import AssemblySection, LengthsSection, Source
from streamsyn.records import digest
from streamsyn.shingles import Signature, similarity


class Sampling:
    """Lengths and places, drawn for one context at a time."""

    def __init__(self, section: AssemblySection, run_seed: int) -> None:
        self._target = section.target_tokens
        self._position: Literal["uniform"] | float | Sequence[float] = section.position
        self._run_seed = str(run_seed)
        # The first epoch's draws are those of versions that knew no epochs.
        self._epoch = (str(section.epoch),) if section.epoch else ()

    def draw(self, what: str, passage: Passage) -> Random:
        """A source of chance of its own for each `what` of each context."""
        return Random(digest(what, self._run_seed, passage.id, *self._epoch))

    def target_tokens(self, passage: Passage) -> int | None:
        """How long the sample of this context is to be, in tokens; None: a number of contexts decides."""
        if not isinstance(self._target, LengthsSection):
            return self._target
        lengths = self._target
        if lengths.schedule is not None:
            starts = [start for start, _ in lengths.schedule]
            return lengths.schedule[bisect_right(starts, passage.seq) - 1][1]
        rng = self.draw("length", passage)
        if lengths.uniform is not None:
            return rng.randint(*lengths.uniform)
        if lengths.log_uniform is not None:
            lowest, highest = lengths.log_uniform
            drawn = round(lowest * math.exp(rng.random() * math.log(highest / lowest)))
            return min(max(drawn, lowest), highest)
        assert lengths.choices is not None, "a distribution has one of its keys"
        return rng.choices(lengths.choices, lengths.weights)[0]

    def place(self, passage: Passage, distractors: int) -> int:
        """How many of its distractors stand before the context."""
        if not distractors:
            return 0
        if self._position == "uniform":
            return self.draw("position", passage).randint(0, distractors)
        depth = self._position
        if isinstance(depth, Sequence):
            depth = depth[passage.seq % len(depth)]
        return math.floor(float(depth) * distractors + 0.5)


class Sources:
    """The sources that a configuration names, over the passages that are in the window now."""

    def __init__(
        self, section: AssemblySection, lots: Sampling, window: Window, corpus: Corpus | None
    ) -> None:
        self.weights = section.source_weights
        """How often each is drawn from; none where no distractors are wanted."""
        self._lots = lots
        self._window = window
        self._corpus = corpus
        self.of_log: frozenset[Source] = frozenset(source for source in self.weights if source != "corpus")
        """Those of them that contexts are drawn from: they grow."""
        self._first_try = 1
        if len(self.weights) == 1 and section.target_tokens is None:
            self._first_try = section.contexts_per_sample

    @property
    def first_try(self) -> tuple[Source, int]:
        """Which source has to have had how many contexts before it is worth a try."""
        return ("same_task" if "same_task" in self.of_log else "any_task"), self._first_try

    def pool(self, source: Source, task: str) -> Pool:
        """What there is of a source that grows; an empty one where there is nothing."""
        if source == "any_task":
            return self._window.everything
        return self._window.pools.get(task) or Pool()

    def drawn(self, passage: Passage, *, final: bool) -> "Draws":
        """Candidates for the sample of `passage`. `final`: there is no use in waiting for more."""
        single = len(self.weights) == 1
        iterators = {
            source: self._shuffled(
                source, passage, self._lots.draw("distractors" if single else f"from {source}", passage)
            )
            for source in self.weights
        }
        waits = frozenset() if final else self.of_log
        return Draws(iterators, self.weights, self._lots.draw("sources", passage), waits)

    def _shuffled(self, source: Source, passage: Passage, rng: Random) -> Iterator[Piece]:
        if source == "corpus":
            assert self._corpus is not None, "Materials has loaded it"
            return self._corpus.shuffled(rng)
        return self.pool(source, passage.task).shuffled(rng)


class Draws:
    """Candidates one by one: the source of each place in a sample is drawn by weight, then a text of it.

    Args:
        iterators: The candidates of each source, in random order.
        weights: Of the sources.
        rng: Chooses between sources.
        waits: Sources that may have more later: when one of them has run dry, `dry` names it.
    """

    def __init__(
        self,
        iterators: dict[Source, Iterator[Piece]],
        weights: Mapping[Source, float],
        rng: Random,
        waits: frozenset[Source],
    ) -> None:
        self._iterators = iterators
        self._weights = weights
        self._rng = rng
        self._waits = waits
        self._place = -1
        self._source: Source | None = None
        self.dry: Source | None = None

    def next(self, place: int) -> Piece | None:
        """The next candidate for a place, which counts from 0; None when there is none (yet)."""
        if place != self._place:
            self._place, self._source = place, self._drawn_source()
        while self._source is not None:
            if (piece := next(self._iterators[self._source], None)) is not None:
                return piece
            if self._source in self._waits:
                self.dry = self._source
                return None
            del self._iterators[self._source]
            self._source = self._drawn_source()
        return None

    def _drawn_source(self) -> Source | None:
        left = list(self._iterators)
        if len(left) < 2:
            return left[0] if left else None
        return self._rng.choices(left, [self._weights[source] for source in left])[0]


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

    def __init__(self, section: AssemblySection, measure: TokenCounter) -> None:
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

    def __init__(self, measure: TokenCounter, relevant: Passage, goal: Goal, order: Order) -> None:
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
