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
        weights: Its state, whole, as `Accelerator.get_state_dict` brings it together.
    """
    if not hasattr(placed.plain, "merge_and_unload"):
        return placed, weights
    plain = placed.plain.get_base_model()
    whole = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for name, value in weights.items()
        if ".lora_" not in name
    }
    for name, layer in plain.named_modules():
        if _ADAPTER in getattr(layer, "lora_A", ()):
            weight = whole[f"{name}.weight"]
            delta = _delta(weights, f"base_model.model.{name}", layer).to(weight.device)
            whole[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    return replace(placed, plain=plain), whole


def _delta(weights: dict[str, Any], name: str, layer: Any) -> torch.Tensor:
    """What the adapter of one layer adds to its weight."""
    down = weights[f"{name}.lora_A.{_ADAPTER}.weight"].detach().float()
    up = weights[f"{name}.lora_B.{_ADAPTER}.weight"].detach().float()
    delta: torch.Tensor = (up @ down) * float(layer.scaling[_ADAPTER])
    return delta.T if layer.fan_in_fan_out else delta
