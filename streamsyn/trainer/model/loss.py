"""The loss of a step: a weighted sum over the targets of all rows of all ranks, and means per example.

Every kind of loss is a weight for each target and one denominator for the whole step. So it does not depend
on the packing, the number of ranks or the number of rows that a rank processes in sequence:

    sequence    1/M sum_i L_i / N_i over M samples, L_i the summed loss of a sample's N_i targets:
                LongAlign, arXiv 2401.18058, eq. 4
    token       sum_i L_i / sum_i N_i
    longwriter  the mean over rows of S/30 sum_i L_i / sum_i N_i, S samples in the row: as LongWriter's
                code, github.com/THUDM/LongWriter, train/; for comparison with models tuned by it
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from streamsyn.trainer.examples import PackedRow


@dataclass(frozen=True, slots=True)
class Batch:
    """One row of T tokens, N of which are targets.

    Attributes:
        input_ids: `[1, T]`, int64.
        position_ids: `[1, T]`, int64; they restart at 0 with each sample.
        bounds: The start of each sample, and T.
        at: `[N]`, the positions before the targets, whose logits predict them.
        labels: `[N]`, the targets.
        weights: `[N]`, float32: the factor of each target's loss in the sum.
        owner: `[N]`, the index in the row of the sample that a target belongs to.
        is_shared: Whether tokens and targets are a part of the row; see `sequence_parallel`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    bounds: tuple[int, ...]
    at: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    owner: torch.Tensor
    is_shared: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(end - begin for begin, end in pairwise(self.bounds))

    def forward_arguments(self) -> dict[str, Any]:
        """The keyword arguments for a model of transformers.

        There is neither a mask nor a cache. With a cache, transformers no longer derives the samples'
        boundaries from the positions, and silently lets samples attend to each other.
        """
        device = self.input_ids.device
        bounds = torch.tensor(self.bounds, dtype=torch.int32).to(device, non_blocking=True)
        arguments = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "use_cache": False,
            "logits_to_keep": self.at,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
            "segments": torch.tensor(self.bounds),  # a tuple would be compiled anew for each row
            "seq_idx": self._sample_of_token(),
        }
        return {**arguments, "is_shared": True} if self.is_shared else arguments

    def _sample_of_token(self) -> torch.Tensor:
        """`[1, T]`, int32: for recurrent layers and convolutions, whose kernels restart with each sample."""
        lengths = torch.tensor([end - begin for begin, end in pairwise(self.bounds)])
        numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)
        return numbers[None].to(self.input_ids.device, non_blocking=True)


def make_batch(row: PackedRow, weights: Sequence[float], device: torch.device) -> Batch:
    """Make the tensors of a row.

    Args:
        row: The samples. An empty row becomes two tokens of weight 0, because every rank has to make the
            same number of passes.
        weights: For each sample, the weight of each of its targets.
        device: Where the tensors go.
    """
    if not row:
        return _empty_row(device)
    lengths = [len(example.tokens) for example in row]
    starts = [sum(lengths[:n]) for n in range(len(row))]
    tokens = torch.cat([torch.from_numpy(example.tokens).long() for example in row])
    at = torch.cat(
        [
            torch.arange(start + example.loss_from - 1, start + length - 1)
            for example, start, length in zip(row, starts, lengths, strict=True)
        ]
    )
    counts = torch.tensor([example.target_tokens for example in row])
    batch = Batch(
        input_ids=tokens[None].to(device),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        bounds=(*starts, sum(lengths)),
        at=at.to(device),
        labels=tokens[at + 1].to(device),
        weights=torch.tensor(weights, dtype=torch.float32).repeat_interleave(counts).to(device),
        owner=torch.arange(len(row)).repeat_interleave(counts).to(device),
    )
    assert batch.labels.numel() == batch.weights.numel()
    return batch


def _empty_row(device: torch.device) -> Batch:
    ids = torch.zeros((1, 2), dtype=torch.long, device=device)
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(2, device=device)[None],
        bounds=(0, 2),
        at=ids[0, :1],
        labels=ids[0, :1],
        weights=torch.zeros(1, device=device),
        owner=ids[0, :1],
    )


LossKind = Literal["sequence", "token", "longwriter"]
_LONGWRITER_SCALE = 30


def target_weights(row: PackedRow, kind: LossKind) -> list[float]:
    """For each sample of a row, the weight of each of its targets."""
    match kind:
        case "sequence":
            return [1 / example.target_tokens for example in row]
        case "token":
            return [1.0] * len(row)
        case "longwriter":
            targets = sum(example.target_tokens for example in row)
            return [len(row) / _LONGWRITER_SCALE / targets for _ in row]


def denominator(rows: Sequence[PackedRow], kind: LossKind) -> float:
    """The divisor of the weighted sum over all rows of a step."""
    match kind:
        case "sequence":
            return float(sum(map(len, rows)))
        case "token":
            return float(sum(example.target_tokens for row in rows for example in row))
        case "longwriter":
            return float(sum(bool(row) for row in rows))


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return `[N]`: minus the log-probability of each label, computed in float32.

    Args:
        logits: `[N, vocabulary]` or `[1, N, vocabulary]`.
        labels: `[N]`.
    """
    return cross_entropy(logits.flatten(0, -2).float(), labels, reduction="none")


def example_sums(losses: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """Return `[2, count]`, float64: for each example, the sum of its targets' losses, and their number.

    Args:
        losses: `[N]`, of the targets.
        owner: `[N]`, the example of each target, as in `Batch`.
        count: Examples in the row.
    """
    zeros = losses.new_zeros((2, max(count, 1)), dtype=torch.float64)  # an empty row has one target
    both = torch.stack((losses.double(), torch.ones_like(losses, dtype=torch.float64)))
    return zeros.index_add(1, owner, both)[:, :count]
