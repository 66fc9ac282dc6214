"""The model on its devices, with its optimizer, and its tensors by name for what is saved of it.

Under FSDP2 each rank holds a shard of every weight and moment; names are always the model's own.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.model.activations import offload
from streamsyn.trainer.model.head import LossHead
from streamsyn.trainer.model.isolation import choose_packing
from streamsyn.trainer.model.optimizer import make_optimizer
from streamsyn.trainer.model.quantized_blocks import check_blocks
from streamsyn.trainer.model.sequence_parallel import SequenceGroup, check_sequence_parallel
from streamsyn.trainer.model.slices import SlicedWeights


def start_accelerator(section: TrainSection, tracking: Path | None = None) -> Accelerator:
    """Start accelerate as its launcher asks for in the environment; without a launcher, one process.

    Args:
        section: `train`.
        tracking: Directory for the files of trackers; None turns trackers off.

    Raises:
        ConfigError: The launcher asks for DeepSpeed, FSDP1, FSDP on CPUs, or for rows or weights to be split;
            or accelerate does not see the ranks.
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
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        # Without this accelerate takes each rank on CPUs for a training of its own, without a word.
        cpu=world > 1 and not torch.accelerator.is_available(),
        log_with=(list(section.trackers) or None) if tracking is not None else None,
        project_dir=tracking,
        mixed_precision="bf16" if bf16 else "no",
        step_scheduler_with_optimizer=False,
    )
    if accelerator.num_processes != world:
        raise ConfigError(
            f"WORLD_SIZE is {world}, but accelerate found {accelerator.num_processes} ranks: start them with "
            "`accelerate launch`"
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
        packs: Whether rows hold several samples; otherwise each sample has a row of its own.
    """

    accelerator: Accelerator
    model: Any
    plain: Any
    optimizer: Any
    dtype: torch.dtype
    sequence: SequenceGroup
    packs: bool


def place(
    model: Any,
    section: TrainSection,
    accelerator: Accelerator,
    dtype: torch.dtype,
    sliced: SlicedWeights | None = None,
) -> Placed:
    """Put a model on its devices, make its optimizer, and find out whether it keeps packed samples apart.

    A collective: all ranks call it.

    Args:
        model: What `read_model` returned.
        section: `train`.
        accelerator: Its accelerator.
        dtype: The precision of the weights as they were read.
        sliced: The weights to read once the model is sharded; None if `read_model` has read them.

    Raises:
        ConfigError: The model cannot be trained, or not by ranks that share rows.
    """
    model.train()
    _freeze_towers(model)
    head = LossHead(model, offload(section, accelerator.device))
    layers = layers_of(model)
    if accelerator.is_fsdp2:
        _name_layers(model, accelerator)
    optimizer: Any = make_optimizer(model, section)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    plain: Any = accelerator.unwrap_model(prepared)
    if section.moments == "8bit":
        check_blocks((name, one) for name, one in plain.named_parameters() if one.requires_grad)
    _keep_logits_dtype(plain, accelerator)
    if sliced is not None:
        sliced.read_into(plain)
    half = accelerator.mixed_precision == "bf16"
    packs = choose_packing(prepared, plain, accelerator.device, section, half=half)
    head.check(prepared, accelerator.device, half=half)
    sequence = SequenceGroup.join(section.sequence_parallel, accelerator.process_index)
    if packs:  # else the model's own attention sees a part of the row, which the check refuses
        sequence.wrap_attention(plain.config.get_text_config()._attn_implementation)  # noqa: SLF001
    check_sequence_parallel(prepared, plain, sequence, accelerator.device, half=half)
    if section.compile:  # not before the checks: their rows would use up the graphs that torch allows
        compile_layers(layers)
    return Placed(accelerator, prepared, plain, optimizer, dtype, sequence, packs)


def saved_weights(placed: Placed) -> dict[str, torch.Tensor]:
    """The weights and persistent buffers that a checkpoint has to hold, by name; shards as DTensors.

    With adapters these are the adapters alone, since the other weights are those of the model that was read.
    A weight that is shared has one name.
    """
    _reshard(placed)
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, one in placed.plain.state_dict(keep_vars=True).items():
        if id(one) not in seen and (one.requires_grad or not hasattr(placed.plain, "merge_and_unload")):
            seen.add(id(one))
            found[name] = one.detach()
    return found


def trained_parameters(placed: Placed) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that the optimizer updates, by name."""
    _reshard(placed)
    return [(name, one) for name, one in placed.plain.named_parameters() if one.requires_grad]


def whole_layers(placed: Placed) -> Iterator[dict[str, torch.Tensor]]:
    """Gather the model's state on rank 0, one layer at a time, on CPU; on other ranks the parts are empty.

    A layer comes with its adapters; what is in no layer comes module by module. Each part is gathered when
    it is asked for, which is a collective: all ranks must take all parts.
    """
    _reshard(placed)
    parts: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, one in placed.plain.state_dict().items():
        parts.setdefault(_part_of(name), []).append((name, one))
    is_main = placed.accelerator.is_main_process
    for part in parts.values():
        whole = {}
        for name, one in part:
            value = one.full_tensor() if isinstance(one, DTensor) else one
            if is_main:
                whole[name] = value.detach().cpu()
        yield whole


def _part_of(name: str) -> str:
    layer = re.match(r".*?\.\d+(?=\.)", name)
    return layer[0] if layer else re.split(r"\.(?:base_layer|lora_\w+)\.|\.\w+$", name)[0]


def layers_of(model: Any) -> list[torch.nn.Module]:
    """The layers of a model of transformers or peft, before FSDP2 shards it and renames their classes."""
    names = getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(layers: Iterable[torch.nn.Module], backend: Any = "inductor") -> None:
    """Compile each layer in place, as accelerate's regional compilation does: equal layers share graphs.

    Wrappers, hooks and names of weights stay as they are. Attention by `segments` is left out of the graph.
    """
    for layer in layers:
        layer.compile(backend=backend)


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


def _reshard(placed: Placed) -> None:
    """Undo that FSDP2 leaves weights gathered after a forward pass without a backward pass.

    The optimizer knows only the shards, so state stored under the gathered ones would be lost.
    """
    for part in placed.plain.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
