"""A row of whole samples as the tensors of one forward pass, without padding and without a mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from streamsyn.trainer.examples import Example


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
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    bounds: tuple[int, ...]
    at: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    owner: torch.Tensor

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
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "use_cache": False,
            "logits_to_keep": self.at,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
            "segments": self.bounds,
        }


def make_batch(row: Sequence[Example], weights: Sequence[float], device: torch.device) -> Batch:
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
