"""The loss of each example of a row, for the record: nothing is trained by it."""

import torch


def example_means(losses: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """`[count]`, float64: the mean of the losses `[N]` of each example's targets; `owner` as in a Batch."""
    zeros = losses.new_zeros(max(count, 1), dtype=torch.float64)
    sums = zeros.index_add(0, owner, losses.double())
    targets = zeros.index_add(0, owner, torch.ones_like(losses, dtype=torch.float64))
    return (sums / targets)[:count]
