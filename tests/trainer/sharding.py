"""FSDP2 and DeepSpeed on CPU, over gloo. Both can do it; accelerate gives them GPUs alone.

To be called in a process of its own, before accelerate is used: it sets what `accelerate launch` would have
set for `deploy/accelerate/fsdp2.yaml` and `zero3.yaml`, and has accelerate believe that there are devices.
"""

import os
from typing import Any, Literal

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

Kind = Literal["fsdp2", "zero3"]

_FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}
_ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",  # as `accelerate config` writes it, whatever we tell
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",  # its own Adam for the host has to be compiled
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "DS_ACCELERATOR": "cpu",
}


def shard(kind: Kind) -> None:
    """Have this rank share weights, gradients and moments with the others."""
    if kind == "fsdp2":
        os.environ |= _FSDP2
        _allow_fsdp2()
    else:
        os.environ |= _ZERO3 | {"LOCAL_SIZE": os.environ["WORLD_SIZE"]}
        os.environ.pop("ACCELERATE_USE_CPU", None)
        backend = ("gloo", DistributedType.MULTI_CPU)
        PartialState._prepare_backend = lambda *_, **__: backend


def _allow_fsdp2() -> None:
    make: Any = AcceleratorState.__init__

    def init(self: Any, *given: Any, **named: Any) -> None:
        fresh = not self.initialized
        make(self, *given, **named)
        if fresh:  # as it does for GPUs
            if self._mixed_precision != "no":
                named["fsdp_plugin"].set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = named["fsdp_plugin"]
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
