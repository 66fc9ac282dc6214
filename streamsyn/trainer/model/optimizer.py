"""AdamW, and where its moments are while activations need the memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from streamsyn.config.command_sections import TrainSection

_MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
"""What torch and bitsandbytes call them."""
_BYTES = {"fp32": 8, "bf16": 4, "8bit": 2}


def make_optimizer(model: torch.nn.Module, section: TrainSection) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; norms and biases have no weight decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},  # norms and biases
    ]
    given: dict[str, Any] = {
        "params": [group for group in groups if group["params"]],
        "lr": section.learning_rate,
        "betas": section.betas,
    }
    if section.moments == "8bit":
        from streamsyn.trainer.model.eight_bit import AdamW8bit  # its library is optional

        return AdamW8bit(**given)
    return torch.optim.AdamW(**given, fused=True)


def moment_bytes(section: TrainSection, *, updating: bool = False) -> int:
    """Bytes of both moments of a weight during the passes of a step, or while it is updated."""
    return _BYTES["fp32" if updating and section.moments == "bf16" else section.moments]


@contextmanager
def parked_moments(optimizer: Any, section: TrainSection) -> Iterator[None]:
    """A context around the forward and backward passes of a step, in which moments take less memory.

    With `train.optimizer_offload` they are in host memory, with `train.moments = "bf16"` in bf16. Before the
    optimizer needs them, activations have been freed. An error in the context ends the training.
    """
    if not section.optimizer_offload and section.moments != "bf16":
        yield
        return
    parked = [
        (state, name, _Parked(state.pop(name), section))
        for state in optimizer.state.values()
        for name in _MOMENTS
        if name in state
    ]
    yield
    for state, name, moment in parked:
        state[name] = moment.restored()


class _Parked:
    """A copy of this rank's part of a moment: in host memory, in bf16, or both."""

    def __init__(self, moment: torch.Tensor, section: TrainSection) -> None:
        self._sharded = isinstance(moment, DTensor)
        part = moment.to_local() if isinstance(moment, DTensor) else moment
        self._mesh, self._placements = (
            getattr(moment, "device_mesh", None),
            getattr(moment, "placements", None),
        )
        self._shape, self._stride = moment.shape, moment.stride()
        self._device, self._dtype = part.device, part.dtype
        self._copy = torch.empty_like(
            part,
            device="cpu" if section.optimizer_offload else part.device,
            dtype=torch.bfloat16 if section.moments == "bf16" else part.dtype,
            pin_memory=section.optimizer_offload and part.is_cuda,
        )
        self._copy.copy_(
            part, non_blocking=True
        )  # the stream that frees the original is the one that reads it

    def restored(self) -> torch.Tensor:
        """The moment where it was, in its own precision."""
        part = self._copy.to(self._device, self._dtype, non_blocking=True)
        if not self._sharded:
            return part
        return DTensor.from_local(
            part, self._mesh, self._placements, run_check=False, shape=self._shape, stride=self._stride
        )
