"""Adapters and weights as one, computed beside a model that goes on training with its adapters."""

from dataclasses import replace
from typing import Any

import torch

from streamsyn.trainer.model.model import Placed

_ADAPTER = "default"


def merged(placed: Placed, weights: dict[str, Any]) -> tuple[Placed, dict[str, Any]]:
    """The model without its adapters, and its weights with them: W + scale * B A for each that has one.

    Nothing of the model changes: peft's `merge_and_unload` takes the adapters out of it, and needs all
    weights of it here. A model without adapters is given back as it is.

    Args:
        placed: What is trained.
        weights: Its state, whole, as `sharing.whole_weights` brings it together.
    """
    if not hasattr(placed.plain, "merge_and_unload"):
        return placed, weights
    plain = placed.plain.get_base_model()
    whole = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in weights.items()
        if ".lora_" not in name
    }
    for name, layer in plain.named_modules():
        if _ADAPTER in getattr(layer, "lora_A", ()):
            at = f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"
            weight = whole[at]
            delta = _delta(weights, f"base_model.model.{name}", layer).to(weight.device)
            whole[at] = (weight.float() + delta).to(weight.dtype)
    return replace(placed, plain=plain), whole


def _delta(weights: dict[str, Any], name: str, layer: Any) -> torch.Tensor:
    """What the adapter of one layer adds to its weight."""
    down = weights[f"{name}.lora_A.{_ADAPTER}.weight"].detach().float()
    up = weights[f"{name}.lora_B.{_ADAPTER}.weight"].detach().float()
    experts = getattr(layer, "num_experts", 1)  # peft's wrapper of a weight that experts have together
    if experts > 1:
        parts = down.reshape(experts, -1, down.shape[-1]), up.reshape(up.shape[0], -1, experts)
        swapped = layer._did_swap_in_out_features  # noqa: SLF001 - peft says it nowhere else
        order = "eoi" if swapped else "eio"
        together: torch.Tensor = torch.einsum(f"eri,ore->{order}", *parts)
        return together * float(layer.scaling[_ADAPTER])
    delta: torch.Tensor = (up @ down) * float(layer.scaling[_ADAPTER])
    return delta.T if layer.fan_in_fan_out else delta
