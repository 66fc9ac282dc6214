"""Where distractors come from: contexts of the same task or of any, passages of a corpus, or a mix."""

from collections.abc import Iterator, Mapping
from random import Random

from streamsyn.assembly.corpus import Corpus
from streamsyn.assembly.lots import Lots
from streamsyn.assembly.passages import Passage, Piece, Pool, Window
from streamsyn.sections import AssemblySection, Source


def weights_of(section: AssemblySection) -> dict[Source, float]:
    """How often each source is drawn from, beside the others; none where no distractors are wanted."""
    if section.distractors == "none" or (section.contexts_per_sample == 1 and section.target_tokens is None):
        return {}
    if isinstance(section.distractors, dict):
        return dict(section.distractors)
    return {section.distractors: 1.0}


class Sources:
    """The sources that a configuration names, over the passages that are in the window now."""

    def __init__(self, section: AssemblySection, lots: Lots, window: Window, corpus: Corpus | None) -> None:
        self.weights = weights_of(section)
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

    def _shuffled(self, source: Source, passage: Passage, draw: Random) -> Iterator[Piece]:
        if source == "corpus":
            assert self._corpus is not None, "Materials has loaded it"
            return self._corpus.shuffled(draw)
        return self.pool(source, passage.task).shuffled(draw)


class Draws:
    """Candidates one by one: the source of each place in a sample is drawn by weight, then a text of it.

    Args:
        iterators: The candidates of each source, in random order.
        weights: Of the sources.
        draw: Chooses between sources.
        waits: Sources that may have more later: when one of them has run dry, `dry` names it.
    """

    def __init__(
        self,
        iterators: dict[Source, Iterator[Piece]],
        weights: Mapping[Source, float],
        draw: Random,
        waits: frozenset[Source],
    ) -> None:
        self._iterators = iterators
        self._weights = weights
        self._draw = draw
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
        return self._draw.choices(left, [self._weights[source] for source in left])[0]
