"""The loss on samples that are kept out of training, with their contexts and without; and on short chat data.

Without its contexts, a sample is its instruction alone. The difference is what the model gains by reading;
a model that answers from memory gains nothing. The short chat data shows what it forgets meanwhile.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from streamsyn.trainer.batch import make_batch
from streamsyn.trainer.examples import Example
from streamsyn.trainer.loss import token_losses

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
    """Summed over the samples of `rows`: the mean loss of a target, and 1."""
    means, samples = 0.0, 0.0
    model.eval()
    try:
        for row in rows:
            batch = make_batch(row, [1 / example.target_tokens for example in row], device)
            losses = token_losses(model(**batch.forward_arguments()).logits, batch.labels)
            means += float((losses * batch.weights).sum())
            samples += len(row)
    finally:
        model.train()
    return [means, samples]


def summary(totals: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean loss of a target in nats, a sample weighing the same as any other, of each kind; and the gain."""
    means = {kind: summed / count for kind, (summed, count) in totals.items() if count}
    found = {f"nll_{kind}": mean for kind, mean in means.items()}
    if WITH in means and WITHOUT in means:
        found["context_gain"] = means[WITHOUT] - means[WITH]
    if WITH in totals:
        found["held_out"] = totals[WITH][1]
    return found
