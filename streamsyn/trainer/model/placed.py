"""The model that is tuned: placed on its devices, with its optimizer, and written.

The shares that DeepSpeed's ZeRO-3 deals out of each weight: its float32 values and its moments.

What DeepSpeed would write by itself is a file of each rank, to be read by as many ranks; so it is asked for
each weight and moment one after the other, and given them back, share by share.

What ranks share among them: brought together under names that hold at any number of ranks, and given back.

It is the same for one process, DDP, FSDP2 and DeepSpeed: each goes on from a checkpoint of any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from streamsyn.config.train_section import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.model.attention import check_packing_isolation
from streamsyn.trainer.model.batch import make_batch


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
        # DeepSpeed steps on flat shares; on those that lie with the host, by an AdamW of its own.
        fused=accelerator.distributed_type != DistributedType.DEEPSPEED,
    )
    shares: Shares = {}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        lowered = accelerator.mixed_precision == "bf16" and dtype != torch.bfloat16
        if lowered and not all(one.requires_grad for one in model.parameters()):
            raise ConfigError(
                f"DeepSpeed would leave what is not trained of the model, which is in {dtype}, in bf16 (with "
                "train.lora, or a tower for pictures): use FSDP2 or DDP, or train.precision = fp32"
            )
        rank, world = accelerator.process_index, accelerator.num_processes
        shares = {name: share_of(one.detach(), rank, world) for name, one in trained(model)}
    prepared, optimizer = accelerator.prepare(model, optimizer)
    plain: Any = accelerator.unwrap_model(prepared)
    if shares:
        give_weights(plain, shares)
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
    the wrapper around the model calls its forward pass, whatever that is. FSDP2 and DeepSpeed are not
    changed so by accelerate. (`unwrap_model` can take it off too, with transformers' own decorators.)
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


MOMENTS = ("exp_avg", "exp_avg_sq")
Shares = dict[str, torch.Tensor]
"""This rank's part of each of some tensors, flat, by name of the weight."""


def zero_weights(plain: torch.nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """The state of the model on CPU; nothing without `keep`.

    What is trained is in float32, whatever passes are computed in; what is not is as it is computed with.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
        else:
            with zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
        if keep:
            found[name] = whole.detach().cpu().clone()
    if keep:
        weights = {name for name, _ in plain.named_parameters(remove_duplicate=False)}
        found |= {name: value.cpu() for name, value in plain.state_dict().items() if name not in weights}
    return found


def whole_moments(plain: torch.nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Kind, name of the weight, and all of it; once there are moments, which is behind the first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    for name, parameter in trained(plain):
        for kind in MOMENTS:
            yield kind, name, safe_get_full_optimizer_state(parameter, kind)


def trained(plain: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The weights that have moments."""
    return ((name, one) for name, one in plain.named_parameters() if one.requires_grad)


def share_of(whole: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """Its flat part number `rank` of `world` equal ones, the last filled up with zeros."""
    size = -(-whole.numel() // world)
    part = whole.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))


def give_weights(plain: torch.nn.Module, shares: Shares) -> None:
    """Have DeepSpeed go on from these, in float32; it begins with what bf16 leaves of them."""
    from deepspeed.utils import safe_set_local_fp32_param

    for name, parameter in trained(plain):
        safe_set_local_fp32_param(parameter, shares[name])


def give_moment(parameter: torch.nn.Parameter, kind: str, share: torch.Tensor) -> None:
    """Have DeepSpeed go on from this; there has to be one already."""
    from deepspeed.utils import safe_set_local_optimizer_state

    safe_set_local_optimizer_state(parameter, share, kind)


_STEP = "step"


def whole_weights(placed: Placed) -> dict[str, torch.Tensor]:
    """The state of the model, whole, on rank 0. All ranks call it."""
    if _is_zero(placed):
        return zero_weights(placed.plain, keep=placed.accelerator.is_main_process)
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
    return trained(placed.plain)


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
    for name, _ in trained(placed.plain):
        yield _STEP, name, torch.tensor(float(step))
    yield from whole_moments(placed.plain)


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
    for name, parameter in trained(placed.plain):
        step = int(tensors.get_tensor(f"{_STEP}.{name}"))
        for kind in MOMENTS:
            whole = tensors.get_tensor(f"{kind}.{name}")
            give_moment(parameter, kind, share_of(whole, rank, world))
    for of in placed.optimizer.state.values():  # torch's AdamW has a tensor there, DeepSpeed's a number
        of[_STEP] = torch.tensor(float(step)) if isinstance(of[_STEP], torch.Tensor) else step
