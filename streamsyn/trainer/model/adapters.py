"""Adapters for a model: for those modules alone whose adapters `merging` puts into OUT/model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from streamsyn.errors import ConfigError
from streamsyn.sections import LoraSection

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
