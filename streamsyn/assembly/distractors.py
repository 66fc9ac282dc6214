"""The distractors of a sample: which candidates are drawn, which are refused, and when there are enough.

`Sources` yields random candidates for a context: contexts of the same task or of any task, passages of a
corpus, or a weighted mix. `Chooser` takes them until the sample has its number of contexts or its length in
tokens, and refuses those that hold the answer, come from the same seed, or are near-duplicates of a text in
the sample, and in samples of other seeds also the contexts of held-out seeds.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random

from streamsyn.assembly.corpus import Corpus
from streamsyn.assembly.token_counter import TokenCounter
from streamsyn.assembly.window import Passage, Piece, Pool, Window
from streamsyn.config.sections import AssemblySection, Source
from streamsyn.records import is_held_out
from streamsyn.shingles import share_keys, similarity
from streamsyn.words import normalised

_MAX_TOO_LONG = 16
"""Once this many candidates would have exceeded `max_tokens`, the sample counts as complete."""

Order = Callable[[list[Piece]], list[Piece]]
"""Returns all passages of a sample in their order, from its distractors."""


@dataclass(frozen=True, slots=True)
class Goal:
    """The size of a sample: a number of distractors, or a length in tokens if there is a target."""

    distractors: int
    target_tokens: int | None = None
    max_tokens: int | None = None

    @property
    def needs_counting(self) -> bool:
        """Whether tokens have to be counted while distractors are chosen."""
        return self.target_tokens is not None or self.max_tokens is not None


@dataclass(slots=True)
class Choice:
    """The distractors chosen for one context."""

    distractors: list[Piece] = field(default_factory=list)
    n_tokens: int | None = None
    """Tokens of the whole sample; None if they have not been counted."""
    is_complete: bool = False
    """Whether more candidates would not change the choice."""
    exhausted: Source | None = None
    """The source that has no more candidates yet, where that ended an incomplete choice."""


class Chooser:
    """Chooses distractors from candidates, in the order in which these are drawn."""

    def __init__(self, section: AssemblySection, counter: TokenCounter) -> None:
        self._min_answer_chars = section.min_answer_chars
        self._max_similarity = section.max_similarity
        self._holdout = section.holdout
        self._counter = counter

    def choose(self, relevant: Passage, draw: Callable[[], "Candidates"], goal: Goal, order: Order) -> Choice:
        """Take distractors for `relevant` until the goal is met or no candidate is left.

        With a target in tokens, the sample reaches it and would not without its last distractor, unless there
        are too few candidates or `max_tokens` forbids it.

        Args:
            relevant: The relevant context.
            draw: Returns the candidates, each time in the same order.
            goal: The size of the sample.
            order: See `Order`.
        """
        # Similar texts are rare. To look for them once, in all that was chosen, takes a quarter of the time.
        unchecked = _Unchecked(relevant)
        choice = self._choose(relevant, draw(), goal, order, unchecked)
        if self._max_similarity >= 1 or not share_keys([one.signature for one in unchecked.pieces]):
            return choice
        return self._choose(relevant, draw(), goal, order, _NearDuplicates(self._max_similarity, relevant))

    def _choose(
        self,
        relevant: Passage,
        candidates: "Candidates",
        goal: Goal,
        order: Order,
        duplicates: "_Unchecked | _NearDuplicates",
    ) -> Choice:
        answer = normalised(relevant.answer)
        if len(answer) < self._min_answer_chars:
            answer = ""
        seed_ids = {relevant.source_seed_id}
        for_training = not is_held_out(relevant.seed_id, self._holdout)
        selection = _Selection(self._counter, relevant, goal, order)
        tried = 0
        while not selection.is_complete:
            # Give up where nearly every candidate holds the answer.
            if tried > 8 * (len(selection.chosen) + 8):
                break
            if (candidate := candidates.next(len(selection.chosen))) is None:
                break
            tried += 1
            if (seed_id := candidate.source_seed_id) is not None and (
                seed_id in seed_ids or (for_training and is_held_out(seed_id, self._holdout))
            ):
                continue
            if answer and answer in candidate.plain:
                continue
            if duplicates.has_similar(candidate) or not selection.add(candidate):
                continue
            duplicates.add(candidate)
            if seed_id is not None:
                seed_ids.add(seed_id)
        if candidates.exhausted is not None and not selection.is_complete:
            return Choice(exhausted=candidates.exhausted)
        return selection.choice()


class _Selection:
    """A sample that grows to its length. Tokens are estimated, and counted exactly only near a bound."""

    def __init__(self, counter: TokenCounter, relevant: Passage, goal: Goal, order: Order) -> None:
        self._counter = counter
        self._relevant = relevant
        self._goal = goal
        self._order = order
        self._too_long = 0
        self.chosen: list[Piece] = []
        self._tokens = counter.count(relevant, [relevant]) if goal.needs_counting else 0
        self._is_exact = True

    @property
    def is_complete(self) -> bool:
        if self._too_long >= _MAX_TOO_LONG:
            return True
        if (target := self._goal.target_tokens) is None:
            return len(self.chosen) >= self._goal.distractors
        return self._is_exact and self._tokens >= target

    def add(self, piece: Piece) -> bool:
        """Add a distractor and return True, unless it would exceed `max_tokens`."""
        if self._goal.needs_counting:
            tokens, is_exact = self._tokens_with(piece)
            if self._goal.max_tokens is not None and tokens > self._goal.max_tokens:
                self._too_long += 1
                return False
            self._tokens, self._is_exact = tokens, is_exact
        self.chosen.append(piece)
        return True

    def _tokens_with(self, piece: Piece) -> tuple[int, bool]:
        """Return the sample's tokens with one more piece, and whether they are exact."""
        tokens = self._tokens + self._counter.estimate(self._relevant, piece)
        error = self._counter.max_error(len(self.chosen) + 2)
        if error is None:
            return tokens, True
        limit, target = self._goal.max_tokens, self._goal.target_tokens
        if limit is not None and tokens > limit + error:
            return tokens, False
        if any(bound is not None and tokens >= bound - error for bound in (limit, target)):
            return self._counted([*self.chosen, piece]), True
        return tokens, False

    def choice(self) -> Choice:
        """Return the distractors without those that an exact count shows to be superfluous."""
        is_complete = self.is_complete
        if not self._goal.needs_counting:
            return Choice(self.chosen, None, is_complete)
        if not self._is_exact:
            self._tokens = self._counted(self.chosen)
        # The estimates may have been too low, so the last distractors may be too many.
        while self.chosen and self._counter.max_error(1) is not None:
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
        return Choice(self.chosen, self._tokens, is_complete)

    def _counted(self, distractors: list[Piece]) -> int:
        return self._counter.count(self._relevant, self._order(distractors))


class _Unchecked:
    """Keeps the passages that were considered for a sample, as if none were similar to another."""

    def __init__(self, relevant: Piece) -> None:
        self.pieces = [relevant]

    def has_similar(self, piece: Piece) -> bool:
        self.pieces.append(piece)
        return False

    def add(self, piece: Piece) -> None:
        """Do nothing: `has_similar` has kept it."""


class _NearDuplicates:
    """The signatures of one sample's passages."""

    def __init__(self, max_similarity: float, relevant: Piece) -> None:
        self._max_similarity = max_similarity
        self._signatures = [relevant.signature]
        self._bands = set(relevant.signature.bands)
        """The bands of all of them."""

    def has_similar(self, piece: Piece) -> bool:
        """Return whether the sample has a passage too similar to `piece`."""
        bands = self._bands.intersection(piece.signature.bands)
        return any(
            not bands.isdisjoint(one.bands) and similarity(piece.signature, one) >= self._max_similarity
            for one in (self._signatures if bands else ())
        )

    def add(self, piece: Piece) -> None:
        self._signatures.append(piece.signature)
        self._bands.update(piece.signature.bands)


class Sources:
    """The sources of distractors that a configuration names.

    Args:
        section: The section `assembly`.
        rng: Returns the random generator for a purpose and a context.
        window: The contexts to draw from.
        corpus: The corpus to draw from, if the section names it.
    """

    def __init__(
        self,
        section: AssemblySection,
        rng: Callable[[str, Passage], Random],
        window: Window,
        corpus: Corpus | None,
    ) -> None:
        self.weights = section.source_weights
        """The weight of each source; empty if samples have no distractors."""
        self._rng = rng
        self._window = window
        self._corpus = corpus
        self.of_log: frozenset[Source] = frozenset(source for source in self.weights if source != "corpus")
        """The sources that grow with the log."""
        self._first_try = 1
        if len(self.weights) == 1 and section.target_tokens is None:
            self._first_try = section.contexts_per_sample

    @property
    def first_try(self) -> tuple[Source, int]:
        """The source a new context waits for, and the `Pool.added` at which to try it first."""
        return ("same_task" if "same_task" in self.of_log else "any_task"), self._first_try

    def pool(self, source: Source, task: str) -> Pool:
        """Return the window's pool for a source of the log and a task."""
        if source == "any_task":
            return self._window.everything
        return self._window.pools.get(task) or Pool()

    def candidates(self, passage: Passage, *, final: bool) -> "Candidates":
        """Return candidates for the sample of `passage`.

        Args:
            passage: The relevant one.
            final: Whether an exhausted source is replaced by the others, in place of waiting for it to grow.
        """
        single = len(self.weights) == 1
        iterators = {
            source: self._shuffled(
                source, passage, self._rng("distractors" if single else f"from {source}", passage)
            )
            for source in self.weights
        }
        growing = frozenset() if final else self.of_log
        rng = None if single else self._rng("sources", passage)
        return Candidates(iterators, self.weights, rng, growing)

    def _shuffled(self, source: Source, passage: Passage, rng: Random) -> Iterator[Piece]:
        if source == "corpus":
            assert self._corpus is not None, "AssemblyResources has loaded it"
            return self._corpus.shuffled(rng)
        return self.pool(source, passage.task).shuffled(rng)


class Candidates:
    """Random candidates for one sample. Each slot's source is drawn by weight, then a text of that source.

    Args:
        iterators: The texts of each source in random order.
        weights: The weight of each source.
        rng: Draws the sources; None if there is only one.
        growing: Sources that may have more texts later; when one has no more, `exhausted` names it.
    """

    def __init__(
        self,
        iterators: dict[Source, Iterator[Piece]],
        weights: Mapping[Source, float],
        rng: Random | None,
        growing: frozenset[Source],
    ) -> None:
        self._iterators = iterators
        self._weights = weights
        self._rng = rng
        self._growing = growing
        self._slot = -1
        self._source = self._draw_source() if rng is None else None
        self.exhausted: Source | None = None

    def next(self, slot: int) -> Piece | None:
        """Return the next candidate for a slot (0-based); None if there is none, or none yet."""
        if self._rng is not None and slot != self._slot:
            self._slot, self._source = slot, self._draw_source()
        while self._source is not None:
            if (piece := next(self._iterators[self._source], None)) is not None:
                return piece
            if self._source in self._growing:
                self.exhausted = self._source
                return None
            del self._iterators[self._source]
            self._source = self._draw_source()
        return None

    def _draw_source(self) -> Source | None:
        sources = list(self._iterators)
        if len(sources) < 2 or self._rng is None:
            return sources[0] if sources else None
        return self._rng.choices(sources, [self._weights[source] for source in sources])[0]
