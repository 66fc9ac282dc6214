"""What a step minimises: one weighted sum over the targets of all rows of all ranks.

Every kind of loss is a weight for each target and one denominator for the whole step, so that neither
packing, nor the number of ranks, nor the number of rows that a rank takes one after the other changes it:

    sequence    1/M sum_i L_i / N_i over M samples, L_i the summed loss of a sample's N_i targets:
                LongAlign, arXiv 2401.18058, eq. 4
    token       sum_i L_i / sum_i N_i
    longwriter  the mean over rows of S/30 sum_i L_i / sum_i N_i, S samples in the row: what LongWriter's
                code does, github.com/THUDM/LongWriter, train/; for comparison with models tuned by it

The loss of each example of a row, for the record: nothing is trained by it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from streamsyn.trainer.examples import Example

LossKind = Literal["sequence", "token", "longwriter"]
Row = Sequence[Example]
_LONGWRITER_SCALE = 30
_CHUNK = 1024
"""Targets whose probabilities are held at a time: with a vocabulary of 150,000, 0.6 GB."""


def target_weights(row: Row, kind: LossKind) -> list[float]:
    """What each target of each sample of a row weighs."""
    match kind:
        case "sequence":
            return [1 / example.target_tokens for example in row]
        case "token":
            return [1.0] * len(row)
        case "longwriter":
            targets = sum(example.target_tokens for example in row)
            return [len(row) / _LONGWRITER_SCALE / targets for _ in row]


def denominator(rows: Sequence[Row], kind: LossKind) -> float:
    """What the weighted sum over all rows of a step is divided by."""
    match kind:
        case "sequence":
            return float(sum(map(len, rows)))
        case "token":
            return float(sum(example.target_tokens for row in rows for example in row))
        case "longwriter":
            return float(sum(bool(row) for row in rows))


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`[N]`: minus the log-probability of each label, in float32 whatever the logits are in.

    With many targets, probabilities are computed chunk by chunk, and again in the backward pass.
    The logits themselves and their gradient are whole: in bf16 with a vocabulary of 131,072, 0.5 MiB a target
    (measured: 1.0 GiB for 2,048 more). Rows of long samples have some hundred to a few thousand targets, rows
    of chat data perhaps ten thousand. A head in chunks would need its weights outside of the model's forward
    pass, where FSDP does not have them; rows of fewer targets would be half empty. So neither is done.
    """
    flat = logits.flatten(0, -2)
    if len(labels) <= _CHUNK:
        return _losses(flat, labels)
    parts = zip(flat.split(_CHUNK), labels.split(_CHUNK), strict=True)
    return torch.cat([checkpoint(_losses, *part, use_reentrant=False) for part in parts])


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), labels, reduction="none")


def example_means(losses: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """`[count]`, float64: the mean of the losses `[N]` of each example's targets; `owner` as in a Batch."""
    zeros = losses.new_zeros(max(count, 1), dtype=torch.float64)
    sums = zeros.index_add(0, owner, losses.double())
    targets = zeros.index_add(0, owner, torch.ones_like(losses, dtype=torch.float64))
    return (sums / targets)[:count]
