"""How rank 0 tells the others what to do next, and hears whether one of them is to stop.

It goes over a gloo group of its own. While there is nothing to train on, rank 0 says so every few seconds,
so that no rank ever waits in a collective for data.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist

from streamsyn.trainer.examples import Example, Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What a rank needs to have a question answered.

    Attributes:
        tokens: int32 [n]: in the model's chat form, up to where it answers.
        max_new_tokens: The longest answer, its stop token with it.
        stop: Tokens that end an answer.
    """

    tokens: Tokens
    max_new_tokens: int
    stop: frozenset[int]


T = TypeVar("T")

WAIT_S = 5.0
"""Rank 0 gives an order at least so often while it waits for the stream."""
_TIMEOUT = timedelta(hours=1)
"""For the longest that rank 0 is busy by itself: it writes the checkpoint of a large model."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    Attributes:
        rows: Those of this rank, one a forward pass; as many on every rank.
        weights: For each row, what a target of each of its samples weighs.
        denominator: What the sum over all ranks is divided by.
        rate: The learning rate.
    """

    rows: tuple[tuple[Example, ...], ...]
    weights: tuple[list[float], ...]
    denominator: float
    rate: float


@dataclass(frozen=True, slots=True)
class Wait:
    """There is nothing to train on yet."""


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Measure the loss of these rows, and answer these prompts; as many of both on every rank.

    Attributes:
        rows: Those of this rank, for each kind of loss: see `evaluation.losses`.
        prompts: What this rank is to answer. None is there for the number alone.
    """

    rows: dict[str, tuple[tuple[Example, ...], ...]]
    prompts: tuple[Prompt | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Save:
    """Write a checkpoint; with `result`, the tuned model too."""

    result: bool = False


@dataclass(frozen=True, slots=True)
class Publish:
    """Write the weights for the servers that write the contexts."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the loop."""


Command: TypeAlias = Step | Wait | Evaluate | Save | Publish | Stop


class Ranks:
    """All processes of this training. With one of them nothing is sent."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world
        self._group: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT) if world > 1 else None

    def deal(self, orders: list[Command] | None) -> Command:
        """Give each rank its order; rank 0 has the list, the others hear their own."""
        if self._group is None:
            assert orders is not None
            return orders[0]
        heard: list[Any] = [None]
        dist.scatter_object_list(heard, orders, src=0, group=self._group)
        order: Command = heard[0]
        return order

    def totals(self, values: list[float]) -> list[float]:
        """Each of the values, summed over all ranks."""
        if self._group is None:
            return values
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self._group)
        return summed.tolist()

    def gather(self, mine: list[T]) -> list[list[T]]:
        """What each rank has, rank by rank, on rank 0; the others get nothing."""
        if self._group is None:
            return [mine]
        found: list[list[T]] = [[] for _ in range(self.world)] if self.rank == 0 else []
        dist.gather_object(mine, found if self.rank == 0 else None, dst=0, group=self._group)
        return found

    def any(self, wish: bool) -> bool:
        """Whether some rank wishes it."""
        return self.totals([float(wish)])[0] > 0

    def agree(self, value: int) -> bool:
        """Whether all ranks have the same value."""
        return not self.any(self.totals([value])[0] != self.world * value)
