"""The loop that every rank runs: receive a command from rank 0 and carry it out. See `controller` for who
decides.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import StreamsynError
from streamsyn.trainer.commands import Command, Evaluate, Publish, Ranks, Save, Step, Stop, Wait, WriteResult
from streamsyn.trainer.dry_step import dry_step
from streamsyn.trainer.evaluation.exam import Answer, answer_all
from streamsyn.trainer.evaluation.heldout import measure
from streamsyn.trainer.model.head import target_losses
from streamsyn.trainer.model.loss import example_sums, make_batch
from streamsyn.trainer.model.optimizer import parked_moments
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.saving.publish import Publisher
from streamsyn.trainer.saving.store import Store


class Schedule:
    """The learning-rate schedule.

    With `train.total_steps`: linear warm-up over `train.warmup_steps`, then a cosine down to 0. Without:
    warm-up, then constant until at most `train.decay_steps` are known to remain, before the end of the stream
    or `train.max_steps`, then linear decay. The rate does not rise again if the stream turns out to be longer
    than estimated.

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
        """Forget the decay: more may come, by a run with new seeds or a higher `train.max_steps`."""
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


@dataclass(slots=True)
class Progress:
    """How far the training is, and the results of the last commands. Only rank 0 has all results."""

    step: int = 0
    """Steps made, skipped steps included."""
    skipped: int = 0
    """Steps without an update, because their gradient was not finite."""
    loss: float = 0.0
    """Loss of the last step."""
    losses: list[float] = field(default_factory=list)
    """Mean loss per target token, in nats, of each example of the last step, in the order of its plan. Rank 0
    only."""
    grad_norm: float = 0.0
    """Gradient norm of the last step, before clipping."""
    measured: dict[str, list[list[float]]] = field(default_factory=dict)
    """Losses of the last evaluation: for each kind of samples, rank by rank. Rank 0 only."""
    answers: list[Answer] = field(default_factory=list)
    """Answers of the last evaluation, in the order of its questions; fewer when it was stopped. Rank 0
    only."""


class Loop:
    """Carries out commands on one rank.

    Args:
        placed: The model on this rank's device.
        ranks: All ranks.
        section: The section `train`.
        seed: Seeds what is random in a step, together with its number and the rank.
        store: Writes checkpoints and the result.
        progress: Where an earlier run stopped.
        publisher: Writes weights for the servers; None without `train.publish`.

    Attributes:
        stopping: Whether any rank wants to stop; the same on all ranks.
    """

    def __init__(
        self,
        placed: Placed,
        ranks: Ranks,
        section: TrainSection,
        seed: int,
        store: Store,
        progress: Progress,
        publisher: Publisher | None = None,
    ) -> None:
        self._placed = placed
        self._ranks = ranks
        self._section = section
        self._seed = seed
        self._store = store
        self.progress = progress
        self._publisher = publisher
        self._stop_wanted = False
        self.stopping = False

    def run(self, commands: Iterator[list[Command]] | None) -> None:
        """Carry out commands until `Stop`.

        Args:
            commands: On rank 0, a list with one command for each rank, again and again; None on the others.

        Raises:
            StreamsynError: The training cannot continue; the other ranks were told to stop.
        """
        try:
            self._carry_out(commands)
        finally:
            self._store.close()

    def _carry_out(self, commands: Iterator[list[Command]] | None) -> None:
        while True:
            self.stopping = self._ranks.any(self._stop_wanted)
            try:
                given = next(commands) if commands is not None else None
            except StreamsynError:
                self._ranks.scatter([Stop()] * self._ranks.world)
                raise
            match self._ranks.scatter(given):
                case Step() as step:
                    self.train(step)
                case Wait():
                    continue
                case Evaluate() as evaluation:
                    self._evaluate(evaluation)
                case Save():
                    self._store.save(self._placed, self.progress.step)
                case WriteResult():
                    self._write_result()
                case Publish():
                    self._publish()
                case Stop():
                    return

    def stop(self) -> None:
        """Make all ranks stop after the current step. Safe in a signal handler."""
        self._stop_wanted = True

    def stop_other_ranks(self) -> None:
        """Make the ranks that wait in `run` for a command stop; for rank 0, outside of `run`."""
        self._ranks.any(False)
        self._ranks.scatter([Stop()] * self._ranks.world)

    def rehearse(self) -> None:
        """Make a dry step, which needs as much memory as any step will.

        A collective: all ranks call it, before `run`.

        Raises:
            RuntimeError: There is not enough memory.
        """
        rows = self._section.rows_per_step // self._ranks.groups
        dry_step(self._placed, self._section, rows, self._pass(last=False))

    def train(self, command: Step) -> None:
        """Make one optimizer step. Called by `run`."""
        placed, accelerator = self._placed, self._placed.accelerator
        torch.manual_seed(_step_seed(self._seed, self.progress.step, self._ranks.rank))
        for group in placed.optimizer.param_groups:
            group["lr"] = command.rate
        # Gradients are averaged over ranks and divided by accelerate's accumulation steps. The scale undoes
        # both, so that a target token weighs the same on any rank and in any row.
        scale = self._ranks.world * accelerator.gradient_accumulation_steps / command.denominator
        parts, sums = [], []
        with parked_moments(placed.optimizer, self._section):
            for number, (row, weights) in enumerate(zip(command.rows, command.weights, strict=True), 1):
                with self._pass(last=number == len(command.rows)):
                    batch = placed.sequence.share(make_batch(row, weights, accelerator.device))
                    losses = target_losses(placed.model, batch)
                    part = (losses * batch.weights).sum()
                    accelerator.backward(part * scale)
                parts.append(part.detach().double())
                sums.append(example_sums(losses.detach(), batch.owner, len(row)))
        self._update()
        summed = float(torch.stack(parts).sum())
        self.progress.loss = self._ranks.sum([summed])[0] / command.denominator
        losses, targets = placed.sequence.sum(torch.cat(sums, dim=1))
        means = [row.tolist() for row in (losses / targets).split([one.shape[1] for one in sums])]
        # Row i of the plan went to group i % groups.
        dealt = zip(*self._ranks.of_groups(self._ranks.gather(means)), strict=True)
        self.progress.losses = [loss for rows in dealt for row in rows for loss in row]
        self.progress.step += 1

    def _pass(self, *, last: bool) -> AbstractContextManager[Any]:
        """The context of one of several forward and backward passes.

        DDP reduces gradients over ranks in the last pass only. FSDP2 does so in each pass: otherwise every
        rank would hold the gradients of the whole model in between.
        """
        accelerator, model = self._placed.accelerator, self._placed.model
        kind = accelerator.distributed_type
        context: AbstractContextManager[Any] = nullcontext()
        if kind in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU) and not last:
            context = accelerator.no_sync(model)
        return context

    def _update(self) -> None:
        placed, section = self._placed, self._section
        found = placed.accelerator.clip_grad_norm_(placed.model.parameters(), section.max_grad_norm)
        norm = found.full_tensor() if isinstance(found, DTensor) else found
        self.progress.grad_norm = float(norm)
        if torch.isfinite(norm):
            placed.optimizer.step()
        else:
            self.progress.skipped += 1
        placed.optimizer.zero_grad(set_to_none=True)

    def _evaluate(self, command: Evaluate) -> None:
        placed = self._placed
        self.progress.measured = {
            kind: self._ranks.gather(measure(placed.model, some, placed.accelerator.device, placed.sequence))
            for kind, some in command.rows.items()
        }
        answers = answer_all(placed, command.prompts, self._ranks, lambda: self._stop_wanted)
        # Question i went to rank i % world.
        dealt = zip(*self._ranks.gather(answers), strict=True)
        self.progress.answers = [answer for some in dealt for answer in some]

    def _write_result(self) -> None:
        try:
            self._store.write_result(self._placed)
        except StreamsynError:
            if self._ranks.rank == 0:
                self.stop_other_ranks()
            raise

    def _publish(self) -> None:
        assert self._publisher is not None
        self._publisher.publish(self._placed, self.progress.step)


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 8191 + rank) % 2**63
