"""What ranks share among them: brought together under names that hold at any number of ranks, and given back.

It is the same for one process, DDP, FSDP2 and DeepSpeed: each goes on from a checkpoint of any other.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from streamsyn.trainer.model import zero
from streamsyn.trainer.model.batch import make_batch
from streamsyn.trainer.model.model import Placed

_STEP = "step"


def whole_weights(placed: Placed) -> dict[str, torch.Tensor]:
    """The state of the model, whole, on rank 0. All ranks call it."""
    if _is_zero(placed):
        return zero.whole_weights(placed.plain, keep=placed.accelerator.is_main_process)
    weights: dict[str, torch.Tensor] = placed.accelerator.get_state_dict(placed.model)
    return weights


def optimizer_tensors(placed: Placed) -> dict[str, torch.Tensor]:
    """The state of the optimizer, whole, on CPU, by kind and name of the weight, on rank 0.

    All ranks call it. There is nothing before the first step.
    """
    found = {}
    for kind, name, whole in _zero_state(placed) if _is_zero(placed) else _state(placed):
        if placed.accelerator.is_main_process:
            found[f"{kind}.{name}"] = whole.detach().cpu().contiguous()
    return found


def load_optimizer(placed: Placed, path: Path) -> None:
    """Take up what `optimizer_tensors` gave, from a file of safetensors. All ranks call it.

    Tensors are read one after the other: no rank has all of them in its memory.
    """
    with safe_open(path, "pt") as tensors:
        kinds: dict[str, list[str]] = {}
        for key in tensors.keys():  # noqa: SIM118 - it is no dict
            kind, _, name = key.partition(".")
            kinds.setdefault(name, []).append(kind)
        if _is_zero(placed) and kinds:
            _load_zero(placed, tensors)
            return
        for name, parameter in _trained(placed):
            placed.optimizer.state[parameter] = {
                kind: _placed_as(parameter, tensors.get_tensor(f"{kind}.{name}"))
                for kind in kinds.get(name, ())
            }


def _is_zero(placed: Placed) -> bool:
    return bool(placed.accelerator.distributed_type == DistributedType.DEEPSPEED)


def _state(placed: Placed) -> Iterator[tuple[str, str, torch.Tensor]]:
    for name, parameter in _trained(placed):
        for kind, value in placed.optimizer.state[parameter].items():
            yield kind, name, value.full_tensor() if isinstance(value, DTensor) else value


def _trained(placed: Placed) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """What the optimizer works on, by name.

    Behind a forward pass that no backward pass follows, FSDP2 leaves weights whole. The optimizer knows
    their shares alone: what is noted beside the whole ones it never sees.
    """
    for part in placed.plain.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return zero.trained(placed.plain)


def _placed_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if value.ndim == 0:
        return value.to(parameter.device)  # the number of steps, which fused AdamW keeps beside the weights
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def _zero_state(placed: Placed) -> Iterator[tuple[str, str, torch.Tensor]]:
    if not placed.optimizer.state:
        return
    step = next(iter(placed.optimizer.state.values()))[_STEP]  # all shares of this rank have the same
    for name, _ in zero.trained(placed.plain):
        yield _STEP, name, torch.tensor(float(step))
    yield from zero.whole_moments(placed.plain)


def _load_zero(placed: Placed, tensors: Any) -> None:
    """Give moments to DeepSpeed, which has none before a step: one is made that changes nothing."""
    accelerator = placed.accelerator
    for group in placed.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(placed.model):
            batch = make_batch((), (), accelerator.device)
            accelerator.backward(placed.model(**batch.forward_arguments()).logits.sum() * 0)
    rank, world, step = accelerator.process_index, accelerator.num_processes, 0
    for name, parameter in zero.trained(placed.plain):
        step = int(tensors.get_tensor(f"{_STEP}.{name}"))
        for kind in zero.MOMENTS:
            whole = tensors.get_tensor(f"{kind}.{name}")
            zero.give_moment(parameter, kind, zero.share_of(whole, rank, world))
    for of in placed.optimizer.state.values():  # torch's AdamW has a tensor there, DeepSpeed's a number
        of[_STEP] = torch.tensor(float(step)) if isinstance(of[_STEP], torch.Tensor) else step
