"""FSDP2 on CPU, over gloo. torch can do it; accelerate offers it for GPUs alone.

To be called in a process of its own, before accelerate is used: it sets what `accelerate launch` sets for
`deploy/accelerate/fsdp2.yaml`, and has accelerate believe that there are devices.
"""

import os
from typing import Any, Literal

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

Kind = Literal["fsdp2", "offload"]
"""`offload`: with `fsdp_offload_params: true`; there is no pinned memory without a GPU."""

_FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}


def shard(kind: Kind) -> None:
    """Have this rank share weights, gradients and moments with the others."""
    os.environ |= _FSDP2
    make: Any = AcceleratorState.__init__

    def init(self: Any, *given: Any, **named: Any) -> None:
        fresh = not self.initialized
        make(self, *given, **named)
        if fresh:  # as it does for GPUs
            plugin = named["fsdp_plugin"]
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            if kind == "offload":
                plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
            self.fsdp_plugin = plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
