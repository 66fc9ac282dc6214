"""The model that is tuned: placed on its devices, with its optimizer, and written.

What ranks share among them: brought together under names that hold at any number of ranks, and given back.

It is the same for one process, DDP and FSDP2: each goes on from a checkpoint of any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from streamsyn.config.train_section import TrainSection
from streamsyn.trainer.model.attention import check_packing_isolation


@dataclass(frozen=True, slots=True)
class Placed:
    """A model on its devices.

    Attributes:
        accelerator: Who placed it.
        model: What is called; under several ranks a wrapper.
        plain: The model itself.
        optimizer: AdamW over what is trained.
        dtype: That of the weights as they were found, in which the result is written.
    """

    accelerator: Accelerator
    model: Any
    plain: Any
    optimizer: Any
    dtype: torch.dtype


def place(model: Any, section: TrainSection, accelerator: Accelerator, dtype: torch.dtype) -> Placed:
    """Put the model on its devices, with its optimizer.

    Raises:
        ConfigError: The model cannot be trained on packed samples, or not so.
    """
    model.train()
    _freeze_towers(model)
    if accelerator.is_fsdp2:
        _name_layers(model, accelerator)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},  # norms and biases
    ]
    optimizer: Any = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        betas=section.betas,
        fused=True,
    )
    prepared, optimizer = accelerator.prepare(model, optimizer)
    plain: Any = accelerator.unwrap_model(prepared)
    _leave_logits(plain, accelerator)
    check_packing_isolation(prepared, accelerator.device, half=accelerator.mixed_precision == "bf16")
    return Placed(accelerator, prepared, plain, optimizer, dtype)


def _freeze_towers(model: Any) -> None:
    """Ask for no gradient of what is for pictures and sounds alone: there is none, and DDP waits for it."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if plain.config.get_text_config() is plain.config:
        return
    used = {one for part in (plain.get_decoder(), plain.get_output_embeddings()) for one in part.parameters()}
    for parameter in model.parameters():
        if parameter not in used:
            parameter.requires_grad_(False)


def _name_layers(model: Any, accelerator: Accelerator) -> None:
    """Leave out layers that a model names and does not have, which accelerate refuses."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        there = {type(one).__name__ for one in model.modules()}
        named = getattr(model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = [name for name in named if name in there]


def _leave_logits(plain: Any, accelerator: Accelerator) -> None:
    """Take off what makes all that comes out of the model float32, and keep autocast.

    Logits would be there whole a second time, twice as large; losses go to float32 part by part. Under DDP
    the wrapper around the model calls its forward pass, whatever that is. FSDP2 is not changed
    so by accelerate. (`unwrap_model` can take it off too, with transformers' own decorators.)
    """
    original = plain.__dict__.pop("_original_forward", None)
    if original is None:
        return

    @wraps(original)
    def forward(*given: Any, **named: Any) -> Any:
        with accelerator.autocast():
            return original(*given, **named)

    plain.forward = forward


def write_model(
    placed: Placed, weights: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write a directory that `from_pretrained` reads: weights as given, configuration, tokenizer."""
    placed.plain.save_pretrained(folder, state_dict=weights)
    _write_tokenizer(tokenizer, folder)


def write_result(
    placed: Placed, weights: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """As `write_model`, in the precision that the model had at first."""
    tied = placed.plain.all_tied_weights_keys  # copies would no longer be known for the same
    lowered = {
        name: value.to(placed.dtype) if value.is_floating_point() else value
        for name, value in weights.items()
        if name not in tied
    }
    placed.plain.save_pretrained(folder, state_dict=lowered)
    # It has noted the precision that the model was trained in.
    config = AutoConfig.from_pretrained(folder)
    config.dtype = placed.dtype
    config.save_pretrained(folder)
    _write_tokenizer(tokenizer, folder)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # tokenizers raises no other kind, whatever has happened; mostly the disk is full.
        raise OSError(f"the tokenizer cannot be written: {error}") from error


def trained(plain: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The weights that have moments."""
    return ((name, one) for name, one in plain.named_parameters() if one.requires_grad)


def whole_weights(placed: Placed) -> dict[str, torch.Tensor]:
    """The state of the model, whole, on rank 0. All ranks call it."""
    weights: dict[str, torch.Tensor] = placed.accelerator.get_state_dict(placed.model)
    return weights


def optimizer_tensors(placed: Placed) -> dict[str, torch.Tensor]:
    """The state of the optimizer, whole, on CPU, by kind and name of the weight, on rank 0.

    All ranks call it. There is nothing before the first step.
    """
    found = {}
    for kind, name, whole in _state(placed):
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
        for name, parameter in _trained(placed):
            placed.optimizer.state[parameter] = {
                kind: _placed_as(parameter, tensors.get_tensor(f"{kind}.{name}"))
                for kind in kinds.get(name, ())
            }


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
    return trained(placed.plain)


def _placed_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if value.ndim == 0:
        return value.to(parameter.device)  # the number of steps, which fused AdamW keeps beside the weights
    if isinstance(parameter, DTensor):
        parts = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        return parts.to(parameter.device)  # with offload, host memory and not the mesh's devices
    return value.to(parameter.device)
