"""The learning rate. An open stream does not say how long it is: the rate is held until its end is near."""

import math
from typing import Any

from streamsyn.sections import TrainSection


class Schedule:
    """The learning rate of each step.

    With `train.total_steps`: up over `train.warmup_steps`, then down to nothing along a cosine. Without: up,
    then held; once at most `train.decay_steps` are known to be left, down in equal parts. It does not rise
    again if the stream turns out longer than was thought; but one that had ended and goes on is open again.
    """

    def __init__(self, section: TrainSection, state: dict[str, Any] | None = None) -> None:
        self._section = section
        self._span: int | None = (state or {}).get("span")
        self._share: float = (state or {}).get("share", 1.0)

    def state(self) -> dict[str, Any]:
        """What a later run goes on from."""
        return {"span": self._span, "share": self._share}

    def forget_the_end(self) -> None:
        """The stream has ended. More may come: from a pipe whose writer died, of a run with new seeds."""
        self._span, self._share = None, 1.0

    def rate(self, step: int, left: int | None) -> float:
        """The learning rate of step number `step`, the first being 0.

        Args:
            step: Optimizer steps before it.
            left: With it, about how many there are until the end; None while that is not known.
        """
        section = self._section
        rising = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
        if section.total_steps is not None:
            falling = section.total_steps - section.warmup_steps
            done = min(1.0, max(0, step - section.warmup_steps) / max(1, falling))
            return section.learning_rate * rising * (1 + math.cos(math.pi * done)) / 2
        return section.learning_rate * min(rising, self._decayed(left))

    def _decayed(self, left: int | None) -> float:
        if left is not None and left <= self._section.decay_steps:
            self._span = self._span or max(1, left)
            self._share = min(self._share, max(1, left) / self._span)
        return self._share
