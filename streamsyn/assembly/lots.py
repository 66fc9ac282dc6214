"""What is left to chance in a sample: each draw follows from the run's seed and the context's id alone."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from random import Random
from typing import Literal

from streamsyn.assembly.passages import Passage
from streamsyn.records import digest
from streamsyn.sections import AssemblySection, LengthsSection


class Lots:
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
        draw = self.draw("length", passage)
        if lengths.uniform is not None:
            return draw.randint(*lengths.uniform)
        if lengths.log_uniform is not None:
            lowest, highest = lengths.log_uniform
            drawn = round(lowest * math.exp(draw.random() * math.log(highest / lowest)))
            return min(max(drawn, lowest), highest)
        assert lengths.choices is not None, "a distribution has one of its keys"
        return draw.choices(lengths.choices, lengths.weights)[0]

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
