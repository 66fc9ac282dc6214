"""The layout of moments of 8 bits (arXiv 2110.02861): they are quantized in blocks of 256 consecutive
elements of a weight, each with a scale of its own.

Under FSDP2 the blocks of a rank's shard have to be blocks of the whole weight. Then a checkpoint is the same
for any number of ranks.
"""

from collections.abc import Iterable
from math import prod

import torch
from torch.distributed.tensor import DTensor

from streamsyn.errors import ConfigError

SCALES = ("absmax1", "absmax2")
"""What bitsandbytes calls the scales of the first and second moment."""
_BLOCK = 256
_SMALLEST = 4096
"""Elements of the smallest weight that bitsandbytes quantizes the moments of."""


def check_blocks(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Check that the shards of each weight consist of whole blocks.

    Raises:
        ConfigError: Those of one do not.
    """
    for name, one in named:
        if not isinstance(one, DTensor) or one.ndim <= 1 or one.numel() < _SMALLEST:
            continue
        shards = prod(
            one.device_mesh.size(number) for number, placed in enumerate(one.placements) if placed.is_shard()
        )
        if one.shape[0] % shards or one.numel() % (shards * _BLOCK):
            raise ConfigError(
                f'train.moments = "8bit": {name} of {" x ".join(map(str, one.shape))} elements cannot be '
                f'divided into blocks of {_BLOCK} by {shards} ranks; use "bf16", or a different number of '
                "ranks"
            )


def empty_scales(parameter: torch.Tensor, blocks: int) -> torch.Tensor:
    """A zero for each block of a weight, sharded like the weight."""
    if not isinstance(parameter, DTensor):
        return torch.zeros(blocks, device=parameter.device)
    shard = parameter.to_local()
    return DTensor.from_local(
        torch.zeros(shard.numel() // _BLOCK, device=shard.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size([blocks]),
        stride=(1,),
    )
