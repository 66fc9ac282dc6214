"""The model that is tuned: read, fitted with adapters, placed on its devices, and written."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from streamsyn.errors import ConfigError
from streamsyn.sections import LoraSection, TrainSection
from streamsyn.trainer.figures.tracking import check_trackers
from streamsyn.trainer.model.apart import check_apart
from streamsyn.trainer.model.attention import implementation


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


def start_accelerator(section: TrainSection, micro_steps: int, tracking: Path | None = None) -> Accelerator:
    """Whatever `accelerate launch` was told, or one process.

    Args:
        section: `train`.
        micro_steps: Passes of this rank in a step.
        tracking: Where trackers keep files; without it there are none.

    Raises:
        ConfigError: What it was told cannot work here, or the package of a tracker is missing.
    """
    if section.lora is not None and (_wants("FSDP") or _wants("DEEPSPEED")):
        raise ConfigError("train.lora has not been tried with FSDP or DeepSpeed: use DDP")
    if _wants("DEEPSPEED") and find_spec("deepspeed") is None:
        raise ConfigError("`accelerate launch` was told to use DeepSpeed: pip install deepspeed")
    for kind in ("CP", "SP", "TP"):
        if int(os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")) > 1:
            raise ConfigError(
                f"`accelerate launch` was told to split rows or weights by {kind.lower()}, which loses the "
                "bounds between packed samples: use FSDP2 or DeepSpeed (deploy/accelerate/README.md)"
            )
    half = _is_half(section)
    if tracking is not None:
        check_trackers(section)
    accelerator = Accelerator(
        log_with=(list(section.trackers) or None) if tracking is not None else None,
        project_dir=tracking,
        mixed_precision="bf16" if half else "no",
        step_scheduler_with_optimizer=False,
        # Only DeepSpeed needs to know: elsewhere the loss is divided once, by what the whole step weighs.
        gradient_accumulation_steps=micro_steps if _wants("DEEPSPEED") else 1,
    )
    if _wants("FSDP") and not (accelerator.is_fsdp2 and accelerator.device.type != "cpu"):
        raise ConfigError(
            "FSDP needs fsdp_version 2 and GPUs (on CPU accelerate would make it DDP without a word)"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = section.max_grad_norm
    return accelerator


def _wants(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def _is_half(section: TrainSection) -> bool:
    if section.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return section.precision == "bf16"


def read_tokenizer(path: str, template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`; with a chat template, if one is given, in place of its own.

    Raises:
        ConfigError: There is none.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {path}: no tokenizer can be read there: {_first_line(error)}") from error
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def read_model(path: str, section: TrainSection, accelerator: Accelerator, adapter: Path | None) -> Any:
    """The model at `path`, in float32, with what `section` adds to it.

    Args:
        path: A directory as `save_pretrained` writes it, or a name on the hub.
        section: Which attention, whether adapters.
        accelerator: Says on which device it will run.
        adapter: A directory of adapters to go on with.

    Raises:
        ConfigError: There is none, or it cannot be used.
    """
    half = accelerator.mixed_precision == "bf16"
    attention = implementation(section.attention, accelerator.device, half=half)
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"--model {path}: cannot be read: {_first_line(error)}") from error
    model, found = read
    if missing := sorted(found["missing_keys"]):  # which would be random
        raise ConfigError(f"--model {path}: {len(missing)} of its weights are missing: {missing[0]}, ...")
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if section.lora is not None:
        model = _with_adapters(model, section.lora, adapter)
        if section.gradient_checkpointing:
            model.enable_input_require_grads()
    return model


def model_dtype(path: str) -> torch.dtype:
    """In what the weights at `path` are kept.

    Raises:
        ConfigError: It is no model.
    """
    try:
        dtype = getattr(AutoConfig.from_pretrained(path), "dtype", None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {path} is no model: {_first_line(error)}") from error
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def place(model: Any, section: TrainSection, accelerator: Accelerator, dtype: torch.dtype) -> Placed:
    """Put the model on its devices, with its optimizer.

    Raises:
        ConfigError: The model cannot be trained on packed samples.
    """
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in trained if one.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [one for one in trained if one.ndim <= 1], "weight_decay": 0.0},  # norms and biases
    ]
    optimizer: Any = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        betas=section.betas,
        fused=accelerator.distributed_type != DistributedType.DEEPSPEED,  # which has an AdamW of its own
    )
    prepared, optimizer = accelerator.prepare(model, optimizer)
    check_apart(prepared, accelerator.device, half=accelerator.mixed_precision == "bf16")
    return Placed(accelerator, prepared, accelerator.unwrap_model(prepared), optimizer, dtype)


def _with_adapters(model: Any, lora: LoraSection, saved: Path | None) -> Any:
    import peft

    if saved is not None:
        return peft.PeftModel.from_pretrained(model, saved, is_trainable=True)
    targets = list(lora.targets) or "all-linear"
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def optimizer_tensors(placed: Placed, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """The state of the optimizer, whole, on CPU, by names that hold at any number of ranks.

    All ranks call it; one that does not `keep` what is brought together gets nothing.
    """
    found = {}
    for name, parameter in _trained(placed):
        for kind, value in placed.optimizer.state[parameter].items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if keep:
                found[f"{kind}.{name}"] = whole.detach().cpu().contiguous()
    return found


def load_optimizer(placed: Placed, tensors: dict[str, torch.Tensor]) -> None:
    """Take up what `optimizer_tensors` gave."""
    kinds: dict[str, list[str]] = {}
    for key in tensors:
        kind, _, name = key.partition(".")
        kinds.setdefault(name, []).append(kind)
    for name, parameter in _trained(placed):
        placed.optimizer.state[parameter] = {
            kind: _placed_as(parameter, tensors[f"{kind}.{name}"]) for kind in kinds.get(name, ())
        }


def _trained(placed: Placed) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in placed.plain.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _placed_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if value.ndim == 0:
        return value.to(parameter.device)  # the number of steps, which fused AdamW keeps beside the weights
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
