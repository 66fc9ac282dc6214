"""The commands that rank 0 sends to all ranks, and the channel they go over.

The channel is a gloo group of its own. While there is nothing to train on, rank 0 sends `Wait` every few
seconds, so that no rank ever waits for data in a collective.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist

from streamsyn.trainer.examples import PackedRow, Tokens

T = TypeVar("T")

_TIMEOUT = timedelta(hours=1)
"""Longer than rank 0 is ever busy by itself, for example writing the checkpoint of a large model."""


@dataclass(frozen=True, slots=True)
class Step:
    """Make one optimizer step.

    Attributes:
        rows: The rows of this rank, one for each forward pass; the same number on every rank.
        weights: For each row, the loss weight of a target token of each of its samples.
        denominator: What the sum of the loss over all ranks is divided by.
        rate: The learning rate.
    """

    rows: tuple[PackedRow, ...]
    weights: tuple[list[float], ...]
    denominator: float
    rate: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing: there is nothing to train on yet."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A question for the model.

    Attributes:
        tokens: int32 [n]: the prompt in the model's chat format, up to where the answer begins.
        max_new_tokens: Maximum length of the answer, including its stop token.
        stop: Tokens that end the answer.
    """

    tokens: Tokens
    max_new_tokens: int
    stop: frozenset[int]


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Measure the loss of these rows and answer these prompts. The same number of both on every rank.

    Attributes:
        rows: The rows of this rank, for each kind of loss: see `evaluation.heldout`.
        prompts: The prompts of this rank; None fills up the number.
    """

    rows: dict[str, tuple[PackedRow, ...]]
    prompts: tuple[Prompt | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Save:
    """Begin to write a checkpoint."""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """Write the tuned model."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Write the weights for the servers that generate contexts."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the loop."""


Command: TypeAlias = Step | Wait | Evaluate | Save | WriteResult | Publish | Stop


class Ranks:
    """Communication between all ranks of the training. With a single rank nothing is sent.

    Args:
        rank: Number of this rank.
        world: Number of ranks.
        degree: `train.sequence_parallel`: this many consecutive ranks are a group that shares each row.
    """

    def __init__(self, rank: int, world: int, degree: int = 1) -> None:
        self.rank = rank
        self.world = world
        self._degree = degree
        self._group: Any = self.new_group() if world > 1 else None

    def new_group(self) -> Any:
        """A further gloo group of all ranks, for collectives of a thread. All ranks must call it.

        None for one process without process groups.
        """
        return dist.new_group(backend="gloo", timeout=_TIMEOUT) if dist.is_initialized() else None

    @property
    def groups(self) -> int:
        """Number of groups: row i of a plan is for group i % groups."""
        return self.world // self._degree

    def for_ranks(self, commands: list[Command]) -> list[Command]:
        """A command for each rank, from one for each group."""
        return [command for command in commands for _ in range(self._degree)]

    def of_groups(self, of_ranks: list[T]) -> list[T]:
        """What the first rank of each group has, from what each rank has."""
        return of_ranks[:: self._degree]

    def scatter(self, commands: list[Command] | None) -> Command:
        """Send each rank its command; rank 0 gives the list, the others None. Returns this rank's command."""
        if self._group is None:
            assert commands is not None
            return commands[0]
        received: list[Any] = [None]
        dist.scatter_object_list(received, commands, src=0, group=self._group)
        command: Command = received[0]
        return command

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks."""
        if self._group is None:
            return values
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self._group)
        return summed.tolist()

    def gather(self, mine: list[T]) -> list[list[T]]:
        """The lists of all ranks, in order, on rank 0; an empty list on the others."""
        if self._group is None:
            return [mine]
        found: list[list[T]] = [[] for _ in range(self.world)] if self.rank == 0 else []
        dist.gather_object(mine, found if self.rank == 0 else None, dst=0, group=self._group)
        return found

    def any(self, value: bool) -> bool:
        """Whether the value is true on some rank."""
        return self.sum([float(value)])[0] > 0

    def agree(self, value: int) -> bool:
        """Whether the value is the same on all ranks."""
        return not self.any(self.sum([value])[0] != self.world * value)
