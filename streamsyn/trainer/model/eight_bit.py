"""AdamW with moments of 8 bits by bitsandbytes, which knows plain tensors only, also for weights that FSDP2
shards. Only imported for `train.moments = "8bit"`: the library is optional.
"""

from typing import Any

import bitsandbytes
import torch
from torch.distributed.tensor import DTensor

from streamsyn.trainer.model.quantized_blocks import SCALES, empty_scales


class AdamW8bit(bitsandbytes.optim.AdamW8bit):  # type: ignore[misc]  # no types
    """bitsandbytes' AdamW, which steps on this rank's shards. Norms and biases have moments in float32."""

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config(gindex, pindex, group)
        if group["params"][pindex].ndim <= 1:
            config["optim_bits"] = 32
        return config

    def init_state(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        super().init_state(group, p, gindex, pindex)
        state = self.state[p]
        for kind in SCALES:
            if kind in state:
                state[kind] = empty_scales(p, state[kind].numel())

    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        if not isinstance(p, DTensor):
            super().update_step(group, p, gindex, pindex)
            return
        assert isinstance(p.grad, DTensor)
        shard, state = p.to_local(), self.state[p]
        shard.grad = p.grad.to_local()
        self.state[shard] = {
            kind: one.to_local() if isinstance(one, DTensor) else one for kind, one in state.items()
        }
        if shard.numel():  # there may be fewer rows than ranks
            super().update_step(group, shard, gindex, pindex)
        del self.state[shard]
        state["step"] += 1
        shard.grad = None
