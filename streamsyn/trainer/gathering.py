"""What FSDP2 has in memory during a pass besides its shards, as meta tensors that take its place.

A unit is what FSDP2 gathers at once: a layer, the embedding, or the head with the last norm. Before its
forward pass its weights are received in one buffer and copied out of it; the buffer stays until the next
unit has its own. In the backward pass the buffer of the unit before is there early. Gradients of a unit are
in bf16 until they are complete, and are then added up over the GPUs in a float32 buffer, which stays until
the next unit needs one.

Follows torch 2.13 (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py) and the units of accelerate 1.15
(accelerate/utils/fsdp_utils.py, fsdp2_prepare_model); compared with ranks in
`tests/trainer/test_memory_ranks.py`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


class Gathering:
    """Makes a model of meta tensors take the memory that FSDP2 takes, while it makes one pass.

    Args:
        model: The model in bf16, as FSDP2 has it in a pass.
        gpus: GPUs that share the weights.
    """

    def __init__(self, model: Any, gpus: int) -> None:
        self._gpus = gpus
        self._units = [
            _Unit(modules, parameters, stays=stays) for modules, parameters, stays in _units(model)
        ]
        self._order: list[_Unit] = []
        """Units in the order in which their forward passes ended."""
        self._received: torch.Tensor | None = None
        """The buffer of the last unit in the forward pass."""
        self._reduced: torch.Tensor | None = None
        """The buffer in which gradients of the last unit are added up."""
        self._device = next(model.parameters()).device
        self._being_made = 0
        for unit in self._units:
            for module in unit.modules:
                module.register_forward_pre_hook(
                    lambda _module, given, named, unit=unit: self._before_forward(unit, (given, named)),
                    with_kwargs=True,
                )
            unit.modules[-1].register_forward_hook(
                lambda _module, _given, made, unit=unit: self._after_forward(unit, made)
            )

        model.register_forward_hook(lambda *_: self._forget_received())

    def bytes(self) -> int:
        """The bytes of weights, gradients and buffers that are there now."""
        held: list[torch.Tensor | None] = [self._received, self._reduced]
        for unit in self._units:
            held += [unit.weights, unit.received, *(one.grad for one in unit.trained)]
        return self._being_made + sum(one.nbytes for one in held if one is not None)

    def finish(self) -> None:
        """The end of the backward pass: gradients of units that nothing comes before are added up."""
        for unit in self._units:
            self._after_backward(unit)
        self._reduced = None

    def _buffer(self, numbers: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        self._being_made = numbers * dtype.itemsize
        made = torch.empty(numbers, dtype=dtype, device=self._device)
        self._being_made = 0
        return made

    def _before_forward(self, unit: "_Unit", given: Any) -> None:
        if unit.weights is not None or _in_backward():
            return
        received = self._buffer(unit.numbers)
        self._received = received
        unit.weights = self._buffer(unit.numbers)
        if differentiable := _differentiable(given):
            differentiable[0].register_hook(lambda _gradient: self._after_backward(unit))

    def _after_forward(self, unit: "_Unit", made: Any) -> None:
        if _in_backward():
            return
        if not unit.stays:
            unit.weights = None
        self._order.append(unit)
        for one in _differentiable(made):
            one.register_hook(lambda _gradient: self._before_backward(unit))

    def _forget_received(self) -> None:
        self._received = None

    def _before_backward(self, unit: "_Unit") -> None:
        if unit not in self._order:
            return
        if unit.weights is None:
            unit.received = self._buffer(unit.numbers) if unit.received is None else unit.received
            unit.weights = self._buffer(unit.numbers)
            unit.received = None
        place = self._order.index(unit)
        del self._order[place:]
        if place > 0 and (before := self._order[-1]).weights is None and before.received is None:
            before.received = self._buffer(before.numbers)

    def _after_backward(self, unit: "_Unit") -> None:
        unit.weights = unit.received = None
        gradients = [one.grad for one in unit.trained if one.grad is not None]
        if not gradients:
            return
        numbers = sum(one.numel() for one in gradients)
        self._reduced = None
        self._reduced = self._buffer(numbers, torch.float32)
        for one in unit.trained:
            one.grad = None
        gradients.clear()
        self._buffer(numbers // self._gpus, torch.float32)  # this GPU's part


class _Unit:
    """What FSDP2 gathers at once.

    Args:
        modules: The modules whose forward passes need it, in the order in which they are called.
        parameters: Their parameters that no other unit has.
        stays: Whether it is kept from its forward pass to its backward pass.
    """

    def __init__(
        self, modules: list[torch.nn.Module], parameters: list[torch.Tensor], *, stays: bool
    ) -> None:
        self.modules = modules
        self.stays = stays
        self.trained = [one for one in parameters if one.requires_grad]
        self.weights: torch.Tensor | None = None
        self.received: torch.Tensor | None = None
        self.numbers = sum(one.numel() for one in parameters)


def _units(model: Any) -> Iterator[tuple[list[torch.nn.Module], list[torch.Tensor], bool]]:
    """The modules of each unit, its parameters, and whether it stays; the model with the rest is last."""
    names = getattr(model, "_no_split_modules", None) or ()
    layers = [one for one in model.modules() if type(one).__name__ in names]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norms = [one for one in model.base_model.children() if "Norm" in type(one).__name__]
    tied = head is not None and head.weight is embedding.weight
    tail = [*([embedding] if tied else []), *norms[-1:], *([head] if head is not None else [])]
    grouped = [([one], False) for one in layers]
    grouped += [(tail, True)] if tied else [([embedding], False), (tail, True)]
    seen: set[int] = set()
    for modules, stays in [*grouped, ([model], True)]:
        parameters = list(_new(modules, seen))
        if parameters:
            yield modules, parameters, stays


def _new(modules: Iterable[torch.nn.Module], seen: set[int]) -> Iterator[torch.Tensor]:
    for module in modules:
        for one in module.parameters():
            if id(one) not in seen:
                seen.add(id(one))
                yield one


def _differentiable(values: Any) -> list[torch.Tensor]:
    """The tensors among values that have a gradient."""
    leaves = tree_leaves(values)
    return [one for one in leaves if isinstance(one, torch.Tensor) and one.requires_grad]


def _in_backward() -> bool:
    """Whether a layer is computed again for its backward pass."""
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001 - as FSDP2 asks
