"""LoRA adapters: added to a model by peft, and merged into whole weights for OUT/model and the servers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from streamsyn.config.train_section import LoraSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.model.placed import Placed

_ADAPTER = "default"
_KEY = "train.lora.targets"


def with_adapters(model: Any, lora: LoraSection, saved: Path | None) -> Any:
    """Add adapters to a model.

    Args:
        model: A model of transformers.
        lora: `train.lora`: rank, scale and target modules.
        saved: Directory of adapters to continue from; None for new ones.

    Raises:
        ConfigError: `train.lora.targets` does not fit the model.
    """
    import peft

    _check_targets(model, lora.targets)
    if saved is not None:
        return peft.PeftModel.from_pretrained(model, saved, is_trainable=True)
    targets = list(lora.targets) or "all-linear"
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"{_KEY}: {error}") from error


def merged(placed: Placed, weights: dict[str, Any]) -> tuple[Placed, dict[str, Any]]:
    """Return the model without its adapters, and weights with the adapters merged: W + scale * B A.

    The model itself does not change and can go on training. peft's `merge_and_unload` would remove the
    adapters from it, and needs all weights on one rank. A model without adapters is returned unchanged.

    Args:
        placed: The model in training.
        weights: Its whole weights, from `placed.whole_weights`.
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
            key = f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"
            weight = whole[key]
            delta = _delta(weights, f"base_model.model.{name}", layer).to(weight.device)
            whole[key] = (weight.float() + delta).to(weight.dtype)
    return replace(placed, plain=plain), whole


def _delta(weights: dict[str, Any], name: str, layer: Any) -> torch.Tensor:
    """What the adapter of one layer adds to its weight."""
    down = weights[f"{name}.lora_A.{_ADAPTER}.weight"].detach().float()
    up = weights[f"{name}.lora_B.{_ADAPTER}.weight"].detach().float()
    experts = getattr(layer, "num_experts", 1)  # peft wraps the stacked weight of all experts as one layer
    if experts > 1:
        parts = down.reshape(experts, -1, down.shape[-1]), up.reshape(up.shape[0], -1, experts)
        swapped = layer._did_swap_in_out_features  # noqa: SLF001 - peft has no public name for it
        order = "eoi" if swapped else "eio"
        stacked: torch.Tensor = torch.einsum(f"eri,ore->{order}", *parts)
        return stacked * float(layer.scaling[_ADAPTER])
    delta: torch.Tensor = (up @ down) * float(layer.scaling[_ADAPTER])
    return delta.T if layer.fan_in_fan_out else delta


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    """Check that each target names linear modules, by their whole name or its end.

    Raises:
        ConfigError: No module has the name; a module is not linear; or it shares its weight with another
            module, as a head often does with the embedding: the merged adapter would change both.
    """
    modules = dict(model.named_modules())
    for target in targets:
        named = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not named:
            raise ConfigError(f"{_KEY}: the model has no module {target!r}")
        for name in named:
            module = modules[name]
            if not isinstance(module, torch.nn.Linear | Conv1D):
                kind = type(module).__name__
                raise ConfigError(f"{_KEY}: {name} is not a linear module but {kind}")
            if others := [n for n, one in modules.items() if n != name and _weight(one) is module.weight]:
                raise ConfigError(
                    f"{_KEY}: {name} shares its weight with {others[0]}, and cannot have its own adapter"
                )


def _weight(module: torch.nn.Module) -> object:
    return getattr(module, "weight", None)
