"""The learning rate. An open stream does not say how long it is: the rate is held until its end is near.

The loop that every rank runs: take an order, carry it out. Rank 0 decides what is next (`director`).
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from streamsyn.config.train_section import TrainSection
from streamsyn.errors import StreamsynError
from streamsyn.trainer.commands import Command, Evaluate, Publish, Ranks, Save, Step, Stop, Wait
from streamsyn.trainer.evaluation.answering import Answer, answer_all
from streamsyn.trainer.evaluation.heldout import measure
from streamsyn.trainer.model.batch import make_batch
from streamsyn.trainer.model.loss import example_means, token_losses
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.saving.publish import Publisher
from streamsyn.trainer.saving.store import Store


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


@dataclass(slots=True)
class Progress:
    """How far the training is. The same on every rank."""

    step: int = 0
    """Plans trained on, those that were skipped among them."""
    skipped: int = 0
    """Steps without an update, because their gradient was not finite."""
    loss: float = 0.0
    """Of the last step."""
    losses: list[float] = field(default_factory=list)
    """Mean loss per target, in nats, of each example of the last step in the order of its plan. Rank 0 alone
    knows it."""
    grad_norm: float = 0.0
    """Of the last step, before clipping."""
    measured: dict[str, list[list[float]]] = field(default_factory=dict)
    """Of the last evaluation: the losses of each kind of samples, rank by rank. Rank 0 alone knows them."""
    answers: list[Answer] = field(default_factory=list)
    """Of the last one, in the order of its questions; fewer when it was stopped. Rank 0 alone knows them."""


class Loop:
    """One rank's part of the training.

    Args:
        placed: The model on this rank's device.
        ranks: All ranks.
        section: `train`.
        seed: Seeds what is random in a step, with the number of the step.
        store: Where checkpoints go.
        progress: Where an earlier run stood.
        publisher: Where weights go for the servers, if they are to.
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
        """Whether any rank wants to stop; known to all of them alike."""

    def stop(self) -> None:
        """Make all ranks stop after the step they are at; may be called by a signal's handler."""
        self._stop_wanted = True

    def call_off(self) -> None:
        """Have the other ranks stop, who wait for an order; for rank 0, outside of one."""
        self._ranks.any(False)
        self._ranks.deal([Stop()] * self._ranks.world)

    def run(self, orders: Iterator[list[Command]] | None) -> None:
        """Carry out orders until one says stop; `orders` are those that rank 0 gives.

        Raises:
            StreamsynError: Something cannot go on; the other ranks were told to stop.
        """
        while True:
            self.stopping = self._ranks.any(self._stop_wanted)
            try:
                given = next(orders) if orders is not None else None
            except StreamsynError:
                self._ranks.deal([Stop()] * self._ranks.world)
                raise
            match self._ranks.deal(given):
                case Step() as step:
                    self._train(step)
                case Wait():
                    continue
                case Evaluate() as evaluation:
                    self._evaluate(evaluation)
                case Save(result):
                    self._save(result=result)
                case Publish():
                    self._publish()
                case Stop():
                    return

    def _train(self, order: Step) -> None:
        placed, accelerator = self._placed, self._placed.accelerator
        torch.manual_seed(_mixed(self._seed, self.progress.step, self._ranks.rank))
        for group in placed.optimizer.param_groups:
            group["lr"] = order.rate
        # Gradients are averaged over ranks, and by DeepSpeed over passes; both are taken back: what a target
        # weighs is the same wherever it is.
        scale = self._ranks.world * accelerator.gradient_accumulation_steps / order.denominator
        parts, means = [], []
        for number, (row, weights) in enumerate(zip(order.rows, order.weights, strict=True), 1):
            with self._pass(last=number == len(order.rows)):
                batch = make_batch(row, weights, accelerator.device)
                losses = token_losses(placed.model(**batch.forward_arguments()).logits, batch.labels)
                part = (losses * batch.weights).sum()
                accelerator.backward(part * scale)
            parts.append(part.detach().double())
            means.append(example_means(losses.detach(), batch.owner, len(row)))
        self._update()
        summed = float(torch.stack(parts).sum())
        self.progress.loss = self._ranks.totals([summed])[0] / order.denominator
        # Row i of the plan went to rank i modulo their number.
        dealt = zip(*self._ranks.gather([one.tolist() for one in means]), strict=True)
        self.progress.losses = [loss for rows in dealt for row in rows for loss in row]
        self.progress.step += 1

    def _pass(self, *, last: bool) -> AbstractContextManager[Any]:
        """One forward and backward of several; under DDP, ranks bring gradients together in the last alone.

        FSDP2 does so in each: between them, every rank would hold the gradients of the whole model.
        """
        accelerator, model = self._placed.accelerator, self._placed.model
        kind = accelerator.distributed_type
        context: AbstractContextManager[Any] = nullcontext()
        if kind == DistributedType.DEEPSPEED:
            context = accelerator.accumulate(model)
        elif kind in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU) and not last:
            context = accelerator.no_sync(model)
        return context

    def _update(self) -> None:
        placed, section = self._placed, self._section
        found = placed.accelerator.clip_grad_norm_(placed.model.parameters(), section.max_grad_norm)
        if placed.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.progress.grad_norm = float(found or 0)
            self.progress.skipped += not placed.model.was_step_applied()  # by itself, before this
        else:
            norm = found.full_tensor() if isinstance(found, DTensor) else found
            self.progress.grad_norm = float(norm)
            if torch.isfinite(norm):
                placed.optimizer.step()
            else:
                self.progress.skipped += 1
        placed.optimizer.zero_grad(set_to_none=True)

    def _evaluate(self, order: Evaluate) -> None:
        self.progress.measured = {
            kind: self._ranks.gather(measure(self._placed.model, some, self._placed.accelerator.device))
            for kind, some in order.rows.items()
        }
        answers = answer_all(self._placed, order.prompts, self._ranks, lambda: self._stop_wanted)
        # Question i went to rank i modulo their number.
        dealt = zip(*self._ranks.gather(answers), strict=True)
        self.progress.answers = [answer for some in dealt for answer in some]

    def _save(self, *, result: bool) -> None:
        try:
            self._store.save(self._placed, self.progress.step, result=result)
        except StreamsynError:
            if self._ranks.rank == 0:
                self.call_off()
            raise

    def _publish(self) -> None:
        assert self._publisher is not None
        self._publisher.publish(self._placed, self.progress.step)


def _mixed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 8191 + rank) % 2**63
