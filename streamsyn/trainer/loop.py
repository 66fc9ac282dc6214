"""The loop that every rank runs: take an order, carry it out. Rank 0 decides what is next (`director`)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from streamsyn.errors import StreamsynError
from streamsyn.sections import TrainSection
from streamsyn.trainer.batch import make_batch
from streamsyn.trainer.control import Evaluate, Order, Ranks, Save, Step, Stop, Wait
from streamsyn.trainer.evals import measure, summary
from streamsyn.trainer.loss import weighted_sum
from streamsyn.trainer.model import Placed
from streamsyn.trainer.store import Store


@dataclass(slots=True)
class Progress:
    """How far the training is. The same on every rank."""

    step: int = 0
    """Plans trained on, those that were skipped among them."""
    skipped: int = 0
    """Steps without an update, because their gradient was not finite."""
    loss: float = 0.0
    """Of the last step."""
    grad_norm: float = 0.0
    """Of the last step, before clipping."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """The last one."""


class Loop:
    """One rank's part of the training.

    Args:
        placed: The model on this rank's device.
        ranks: All ranks.
        section: `train`.
        seed: Seeds what is random in a step, with the number of the step.
        store: Where checkpoints go.
        progress: Where an earlier run stood.
    """

    def __init__(
        self,
        placed: Placed,
        ranks: Ranks,
        section: TrainSection,
        seed: int,
        store: Store,
        progress: Progress,
    ) -> None:
        self._placed = placed
        self._ranks = ranks
        self._section = section
        self._seed = seed
        self._store = store
        self.progress = progress
        self._stop_wanted = False
        self.stopping = False
        """Whether any rank wants to stop; known to all of them alike."""

    def stop(self) -> None:
        """Make all ranks stop after the step they are at; may be called by a signal's handler."""
        self._stop_wanted = True

    def run(self, orders: Iterator[list[Order]] | None) -> None:
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
                case Evaluate(rows):
                    self._evaluate(rows)
                case Save(result):
                    self._save(result=result)
                case Stop():
                    return

    def _train(self, order: Step) -> None:
        placed, accelerator = self._placed, self._placed.accelerator
        torch.manual_seed(_mixed(self._seed, self.progress.step, self._ranks.rank))
        for group in placed.optimizer.param_groups:
            group["lr"] = order.rate
        # The mean over ranks that gradients are reduced by, and over passes that accelerate divides by, are
        # taken back: what a target weighs is the same wherever it is.
        scale = self._ranks.world * len(order.rows) / order.denominator
        parts = []
        for row, weights in zip(order.rows, order.weights, strict=True):
            with accelerator.accumulate(placed.model):
                batch = make_batch(row, weights, accelerator.device)
                part = weighted_sum(placed.model(**batch.forward_arguments()).logits, batch)
                accelerator.backward(part * scale)
            parts.append(part.detach().double())
        self._update()
        summed = float(torch.stack(parts).sum())
        self.progress.loss = self._ranks.totals([summed])[0] / order.denominator
        self.progress.step += 1

    def _update(self) -> None:
        placed, section = self._placed, self._section
        found = placed.accelerator.clip_grad_norm_(placed.model.parameters(), section.max_grad_norm)
        if placed.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.progress.grad_norm = float(found or 0)  # it has stepped by itself
        else:
            norm = found.full_tensor() if isinstance(found, DTensor) else found
            self.progress.grad_norm = float(norm)
            if torch.isfinite(norm):
                placed.optimizer.step()
            else:
                self.progress.skipped += 1
        placed.optimizer.zero_grad(set_to_none=True)

    def _evaluate(self, rows: dict[str, Any]) -> None:
        totals = {
            kind: self._ranks.totals(measure(self._placed.model, some, self._placed.accelerator.device))
            for kind, some in rows.items()
        }
        self.progress.evaluation = summary(totals)

    def _save(self, *, result: bool) -> None:
        try:
            self._store.save(self._placed, self.progress.step, result=result)
        except StreamsynError:
            if self._ranks.rank == 0:
                self._ranks.any(False)
                self._ranks.deal([Stop()] * self._ranks.world)
            raise


def _mixed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 8191 + rank) % 2**63
