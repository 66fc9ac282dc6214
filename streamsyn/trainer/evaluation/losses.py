"""The loss on samples that are kept out of training, with their contexts and without; and on short chat data.

Without its contexts, a sample is its instruction alone. The difference is what the model gains by reading;
a model that answers from memory gains nothing. The short chat data shows what it forgets meanwhile.
"""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import torch

from streamsyn.trainer.figures.example_losses import example_means
from streamsyn.trainer.model.batch import make_batch
from streamsyn.trainer.model.loss import token_losses
from streamsyn.trainer.stream.examples import Example, Key

WITH, WITHOUT, CONTROL = "with_context", "without_context", "control"
Rows = tuple[tuple[Example, ...], ...]


def deal_rows(examples: Iterable[Example], seq_len: int, world: int) -> list[Rows]:
    """Rows of whole examples for each rank, as many for each; the last ones may be empty."""
    rows: list[list[Example]] = []
    room = 0
    for example in examples:
        if not rows or example.length > room:
            rows.append([])
            room = seq_len
        rows[-1].append(example)
        room -= example.length
    rows += [[] for _ in range(-len(rows) % world)]
    return [tuple(tuple(row) for row in rows[rank::world]) for rank in range(world)]


@torch.no_grad()
def measure(model: torch.nn.Module, rows: Rows, device: torch.device) -> list[float]:
    """The mean loss of a target, in nats, of each sample of `rows`, one row after the other."""
    means: list[float] = []
    model.eval()
    try:
        for row in rows:
            batch = make_batch(row, [1.0] * len(row), device)
            losses = token_losses(model(**batch.forward_arguments()).logits, batch.labels)
            means += example_means(losses, batch.owner, len(row)).tolist()
    finally:
        model.train()
    return means


Losses = Mapping[Key, float]
"""The mean loss of a target of each sample."""


def summary(losses: Mapping[str, Losses]) -> dict[str, float]:
    """Mean loss of a target in nats, a sample weighing the same as any other, of each kind; and the gain."""
    means = {kind: fmean(of_kind.values()) for kind, of_kind in losses.items() if of_kind}
    found = {f"nll_{kind}": mean for kind, mean in means.items()}
    with_context, without = losses.get(WITH, {}), losses.get(WITHOUT, {})
    if both := with_context.keys() & without.keys():
        found["context_gain"] = fmean(without[key] - with_context[key] for key in both)
    if WITH in losses:
        found["held_out"] = len(losses[WITH])
    return found


class Changes:
    """How losses have changed since the first evaluation, while samples join those that are measured.

    What joins may be harder, so that the mean of all would jump. An evaluation is compared with the one
    before over the samples of both, and these changes are added up: a chained index. As long as none join it
    is the difference of the means.

    Args:
        state: What `state` gave before.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self._before: dict[str, dict[Key, float]] = {
            kind: {Key(*key): loss for key, loss in losses}
            for kind, losses in state.get("before", {}).items()
        }
        self._changes: dict[str, float] = dict(state.get("changes", {}))

    def state(self) -> dict[str, Any]:
        """What a later run goes on from; can be written as JSON."""
        before = {kind: [[list(key), loss] for key, loss in of.items()] for kind, of in self._before.items()}
        return {"before": before, "changes": dict(self._changes)}

    def take(self, losses: Mapping[str, Losses]) -> dict[str, float]:
        """The change of each kind up to this evaluation: negative is better."""
        for kind, now in losses.items():
            before = self._before.get(kind, {})
            both = now.keys() & before.keys()
            change = fmean(now[key] - before[key] for key in both) if both else 0.0
            self._changes[kind] = self._changes.get(kind, 0.0) + change
            self._before[kind] = dict(now)
        return {f"nll_{kind}_change": self._changes[kind] for kind in losses}
