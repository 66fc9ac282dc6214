"""The learning rate of each step, also of a stream whose end is not known."""

import math
from typing import Any

from streamsyn.config.train_section import TrainSection


class Schedule:
    """The learning-rate schedule.

    With `train.total_steps`: linear warm-up over `train.warmup_steps`, then a cosine down to 0. Without:
    warm-up, then constant until at most `train.decay_steps` are known to remain, then linear decay. The rate
    does not rise again if the stream turns out to be longer than estimated.

    Args:
        section: The section `train`.
        state: `state()` of an earlier schedule.
    """

    def __init__(self, section: TrainSection, state: dict[str, Any] | None = None) -> None:
        self._section = section
        state = state or {"span": None, "share": 1.0}
        self._span: int | None = state["span"]
        """Steps of the decay; None before it begins."""
        self._share: float = state["share"]
        """What the decay leaves of the rate."""

    def state(self) -> dict[str, Any]:
        """What a later run resumes from."""
        return {"span": self._span, "share": self._share}

    def reopen(self) -> None:
        """Forget the decay: the stream has ended, but more may come, for example by a run with new seeds."""
        self._span, self._share = None, 1.0

    def rate(self, step: int, left: int | None) -> float:
        """The learning rate of a step.

        Args:
            step: Number of the step, counted from 0.
            left: About how many steps remain, this one included; None while the end is not known.
        """
        section = self._section
        rising = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
        if section.total_steps is not None:
            falling = section.total_steps - section.warmup_steps
            done = min(1.0, max(0, step - section.warmup_steps) / max(1, falling))
            return section.learning_rate * rising * (1 + math.cos(math.pi * done)) / 2
        return section.learning_rate * min(rising, self._decay(left))

    def _decay(self, left: int | None) -> float:
        if left is not None and left <= self._section.decay_steps:
            self._span = self._span or max(1, left)
            self._share = min(self._share, max(1, left) / self._span)
        return self._share
