"""The model on its devices, with its optimizer: placed, gathered for checkpoints, restored and written.

Under FSDP2 each rank holds a shard of every weight and moment. Checkpoints hold whole tensors under the
model's own names, so that they are portable between one process, DDP and FSDP2, and between numbers of ranks.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.model.activations import offload
from streamsyn.trainer.model.attention import check_packing_isolation
from streamsyn.trainer.model.head import LossHead
from streamsyn.trainer.model.optimizer import make_optimizer
from streamsyn.trainer.model.sequence_parallel import SequenceGroup, check_sequence_parallel


def start_accelerator(section: TrainSection, tracking: Path | None = None) -> Accelerator:
    """Start accelerate as its launcher asks for in the environment; without a launcher, one process.

    Args:
        section: `train`.
        tracking: Directory for the files of trackers; None turns trackers off.

    Raises:
        ConfigError: The launcher asks for DeepSpeed, FSDP1, FSDP on CPUs, or for rows or weights to be split.
    """
    if _launcher_wants("DEEPSPEED"):
        raise ConfigError(
            "`accelerate launch` asks for DeepSpeed, which is not supported: use FSDP2, which keeps weights "
            "and moments in host memory with fsdp_offload_params: true (deploy/accelerate/fsdp2.yaml)"
        )
    for kind in ("CP", "SP", "TP"):
        if int(os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")) > 1:
            raise ConfigError(
                f"`accelerate launch` asks for {kind.lower()}, which splits rows or weights and loses the "
                "boundaries between packed samples: use FSDP2 (deploy/accelerate/README.md) and "
                "train.sequence_parallel"
            )
    bf16 = _uses_bf16(section)
    accelerator = Accelerator(
        log_with=(list(section.trackers) or None) if tracking is not None else None,
        project_dir=tracking,
        mixed_precision="bf16" if bf16 else "no",
        step_scheduler_with_optimizer=False,
    )
    if _launcher_wants("FSDP") and not accelerator.is_fsdp2:
        raise ConfigError("FSDP needs fsdp_version: 2 and GPUs; on CPUs accelerate would silently use DDP")
    if accelerator.is_fsdp2 and bf16:
        # Reduce gradients and sum them over the rows of a step in float32, as DDP does. accelerate's own
        # policy reduces in bf16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    return accelerator


def _launcher_wants(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def _uses_bf16(section: TrainSection) -> bool:
    if section.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return section.precision == "bf16"


@dataclass(frozen=True, slots=True)
class Placed:
    """A model on its devices.

    Attributes:
        accelerator: Its accelerator.
        model: The callable: a wrapper when there are several ranks.
        plain: The model of transformers or peft itself.
        optimizer: AdamW over the trained parameters.
        dtype: The precision of the weights as they were read; the result is written in it.
        sequence: The ranks that share this rank's rows.
    """

    accelerator: Accelerator
    model: Any
    plain: Any
    optimizer: Any
    dtype: torch.dtype
    sequence: SequenceGroup


def place(model: Any, section: TrainSection, accelerator: Accelerator, dtype: torch.dtype) -> Placed:
    """Put a model on its devices, make its optimizer, and check that packed samples stay isolated.

    A collective: all ranks call it.

    Raises:
        ConfigError: The model cannot be trained on packed samples, or not by ranks that share rows.
    """
    model.train()
    _freeze_towers(model)
    head = LossHead(model, offload(section, accelerator.device))
    if accelerator.is_fsdp2:
        _name_layers(model, accelerator)
    optimizer: Any = make_optimizer(model, section)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    plain: Any = accelerator.unwrap_model(prepared)
    _keep_logits_dtype(plain, accelerator)
    half = accelerator.mixed_precision == "bf16"
    check_packing_isolation(prepared, accelerator.device, half=half)
    head.check(prepared, accelerator.device, half=half)
    sequence = SequenceGroup.join(section.sequence_parallel, accelerator.process_index)
    sequence.wrap_attention(plain.config.get_text_config()._attn_implementation)  # noqa: SLF001
    check_sequence_parallel(prepared, plain, sequence, accelerator.device, half=half)
    return Placed(accelerator, prepared, plain, optimizer, dtype, sequence)


def whole_weights(placed: Placed) -> dict[str, torch.Tensor]:
    """Gather the model's whole state on rank 0. A collective: all ranks call it."""
    weights: dict[str, torch.Tensor] = placed.accelerator.get_state_dict(placed.model)
    return weights


def optimizer_tensors(placed: Placed) -> dict[str, torch.Tensor]:
    """Gather the optimizer's whole state on rank 0, on CPU, by names such as `exp_avg.lm_head.weight`.

    A collective: all ranks call it. It is empty before the first step, and on other ranks.
    """
    found = {}
    for name, parameter in _trained(placed):
        for kind, value in placed.optimizer.state[parameter].items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if placed.accelerator.is_main_process:
                found[f"{kind}.{name}"] = whole.detach().cpu().contiguous()
    return found


def load_optimizer(placed: Placed, path: Path) -> None:
    """Restore what `optimizer_tensors` returned from a safetensors file. A collective: all ranks call it.

    Tensors are read one at a time, so that no rank holds all of them in memory.
    """
    with safe_open(path, "pt") as tensors:
        kinds: dict[str, list[str]] = {}
        for key in tensors.keys():  # noqa: SIM118 - it cannot be iterated
            kind, _, name = key.partition(".")
            kinds.setdefault(name, []).append(kind)
        for name, parameter in _trained(placed):
            placed.optimizer.state[parameter] = {
                kind: _placed_as(parameter, tensors.get_tensor(f"{kind}.{name}"))
                for kind in kinds.get(name, ())
            }


def write_model(
    placed: Placed, weights: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write weights as given, configuration and tokenizer to a directory that `from_pretrained` reads."""
    placed.plain.save_pretrained(folder, state_dict=weights)
    _write_tokenizer(tokenizer, folder)


def write_result(
    placed: Placed, weights: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """As `write_model`, in the precision in which the model was read."""
    tied = placed.plain.all_tied_weights_keys  # converted copies would no longer be recognised as shared
    lowered = {
        name: value.to(placed.dtype) if value.is_floating_point() else value
        for name, value in weights.items()
        if name not in tied
    }
    placed.plain.save_pretrained(folder, state_dict=lowered)
    # save_pretrained has recorded the precision of training.
    config = AutoConfig.from_pretrained(folder)
    config.dtype = placed.dtype
    config.save_pretrained(folder)
    _write_tokenizer(tokenizer, folder)


def _freeze_towers(model: Any) -> None:
    """Freeze what only serves images and audio: it gets no gradient, and DDP would wait for one."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if plain.config.get_text_config() is plain.config:
        return
    used = {one for part in (plain.get_decoder(), plain.get_output_embeddings()) for one in part.parameters()}
    for parameter in model.parameters():
        if parameter not in used:
            parameter.requires_grad_(False)


def _name_layers(model: Any, accelerator: Accelerator) -> None:
    """Name the layers to shard: those of `_no_split_modules` that exist; accelerate refuses missing ones."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        existing = {type(one).__name__ for one in model.modules()}
        named = getattr(model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = [name for name in named if name in existing]


def _keep_logits_dtype(plain: Any, accelerator: Accelerator) -> None:
    """Undo accelerate's conversion of all outputs to float32, but keep its autocast.

    The conversion would hold a second copy of the logits at twice the size; losses convert them chunk by
    chunk. DDP's wrapper calls the model's `forward` attribute, whatever it is. accelerate does not change
    FSDP2 models this way. (`unwrap_model` can undo it too, but removes transformers' own decorators.)
    """
    original = plain.__dict__.pop("_original_forward", None)
    if original is None:
        return

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return original(*args, **kwargs)

    plain.forward = forward


def _trained(placed: Placed) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters that the optimizer updates, by name.

    After a forward pass without a backward pass, FSDP2 leaves weights gathered. The optimizer knows only
    the shards, so state stored under the gathered ones would be lost.
    """
    for part in placed.plain.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return ((name, one) for name, one in placed.plain.named_parameters() if one.requires_grad)


def _placed_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole tensor as this rank keeps it beside a parameter: on its device, sharded like it."""
    if value.ndim > 0 and isinstance(parameter, DTensor):  # the step count is a scalar, which is not sharded
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)  # with offload, host memory and not the mesh's devices


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # tokenizers raises a bare Exception whatever the cause; usually the disk is full.
        raise OSError(f"the tokenizer cannot be written: {error}") from error
