"""Adapters and weights as one, computed beside a model that goes on training with its adapters.

Adapters for a model: for those modules alone whose adapters `merging` puts into OUT/model.
"""

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


_KEY = "train.lora.targets"


def with_adapters(model: Any, lora: LoraSection, saved: Path | None) -> Any:
    """The model with new adapters, or with those in the directory `saved`.

    Raises:
        ConfigError: `train.lora.targets` does not fit it.
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


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    """See whether each of `targets` is the name, or the end of the name, of linear modules.

    Raises:
        ConfigError: It is not, or a module shares its weight with another one, as a head often does with the
            embedding: merged, the adapter of one would change both.
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
                raise ConfigError(f"{_KEY}: {name} is no linear module, as all must be, but {kind}")
            if others := [n for n, one in modules.items() if n != name and _weight(one) is module.weight]:
                raise ConfigError(
                    f"{_KEY}: {name} shares its weight with {others[0]}, and can have no adapter of its own"
                )


def _weight(module: torch.nn.Module) -> object:
    return getattr(module, "weight", None)
