"""The model that is tuned: read, fitted with adapters, placed on its devices, and written."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from streamsyn.errors import ConfigError
from streamsyn.sections import LoraSection, TrainSection
from streamsyn.trainer.attention import implementation


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


def start_accelerator(section: TrainSection, micro_steps: int) -> Accelerator:
    """Whatever `accelerate launch` was told, or one process.

    Raises:
        ConfigError: What it was told cannot work here.
    """
    half = _is_half(section)
    accelerator = Accelerator(
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
    return accelerator


def _wants(kind: str) -> bool:
    import os

    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def _is_half(section: TrainSection) -> bool:
    if section.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return section.precision == "bf16"


def read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`.

    Raises:
        ConfigError: There is none.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _check_place(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {path}: no tokenizer can be read there: {_first_line(error)}") from error
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
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {path}: cannot be read: {_first_line(error)}") from error
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
    _check_place(path)
    try:
        dtype = getattr(AutoConfig.from_pretrained(path), "dtype", None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {path} is no model: {_first_line(error)}") from error
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def place(model: Any, section: TrainSection, accelerator: Accelerator, dtype: torch.dtype) -> Placed:
    """Put the model on its devices, with its optimizer."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in trained if one.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [one for one in trained if one.ndim <= 1], "weight_decay": 0.0},  # norms and biases
    ]
    optimizer: Any = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=section.learning_rate, betas=section.betas
    )
    prepared, optimizer = accelerator.prepare(model, optimizer)
    return Placed(accelerator, prepared, accelerator.unwrap_model(prepared), optimizer, dtype)


def _with_adapters(model: Any, lora: LoraSection, saved: Path | None) -> Any:
    if find_spec("peft") is None:
        raise ConfigError("train.lora needs peft: pip install peft")
    import peft

    if saved is not None:
        return peft.PeftModel.from_pretrained(model, saved, is_trainable=True)
    targets = list(lora.targets) or "all-linear"
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def optimizer_tensors(placed: Placed) -> dict[str, torch.Tensor]:
    """The state of the optimizer, whole, on CPU, by names that hold at any number of ranks."""
    return {
        f"{kind}.{name}": _whole(value)
        for name, parameter in _trained(placed)
        for kind, value in placed.optimizer.state[parameter].items()
    }


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


def _whole(value: torch.Tensor) -> torch.Tensor:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().cpu().contiguous()


def _placed_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if value.ndim == 0:
        return value.clone()  # the number of steps, which AdamW keeps on CPU
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def write_model(
    placed: Placed, weights: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write a directory that `from_pretrained` reads: weights as given, configuration, tokenizer."""
    placed.plain.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def write_result(
    placed: Placed, weights: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """As `write_model`, with adapters merged, in the precision that the model had at first."""
    model = placed.plain
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
        weights = model.state_dict()
    lowered = {
        name: value.to(placed.dtype) if value.is_floating_point() else value
        for name, value in weights.items()
    }
    model.save_pretrained(folder, state_dict=lowered)
    # It has noted the precision that the model was trained in.
    config = AutoConfig.from_pretrained(folder)
    config.dtype = placed.dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_place(path: str) -> None:
    """A mistyped path must not be looked for on the hub."""
    given = Path(path)
    if not given.exists() and (given.is_absolute() or path.startswith(".") or path.count("/") != 1):
        raise ConfigError(f"--model {path}: there is no such directory")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
