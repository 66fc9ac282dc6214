"""The model that is tuned: placed on its devices, with its optimizer, and written."""

import os
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from streamsyn.errors import ConfigError
from streamsyn.sections import TrainSection
from streamsyn.trainer.figures.tracking import check_trackers
from streamsyn.trainer.model import zero
from streamsyn.trainer.model.apart import check_apart


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
    if _wants("FSDP") and not accelerator.is_fsdp2:
        raise ConfigError(
            "FSDP needs fsdp_version 2 and GPUs (on CPU accelerate would make it DDP without a word)"
        )
    if accelerator.is_fsdp2 and half:
        # Gradients are brought together, and summed over the rows of a step, in float32 as under DDP;
        # accelerate would do so in bf16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _tell_deepspeed(accelerator.state.deepspeed_plugin, section)
    return accelerator


def _tell_deepspeed(plugin: Any, section: TrainSection) -> None:
    if plugin.zero_stage != 3:
        raise ConfigError("of DeepSpeed, zero_stage 3 alone is used; for less, there are DDP and FSDP2")
    if plugin.zero3_init_flag:
        raise ConfigError(
            "zero3_init_flag has to be false: weights would be read in bf16, and not in float32"
        )
    unset_hf_deepspeed_config()  # for accelerate sets it in any case
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    plugin.deepspeed_config["gradient_clipping"] = section.max_grad_norm


def _wants(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def _is_half(section: TrainSection) -> bool:
    if section.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return section.precision == "bf16"


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
    shares: zero.Shares = {}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        rank, world = accelerator.process_index, accelerator.num_processes
        shares = {name: zero.share_of(one.detach(), rank, world) for name, one in model.named_parameters()}
    prepared, optimizer = accelerator.prepare(model, optimizer)
    plain: Any = accelerator.unwrap_model(prepared)
    if shares:
        zero.give_weights(plain, shares)
    _leave_logits(plain, accelerator)
    check_apart(prepared, accelerator.device, half=accelerator.mixed_precision == "bf16")
    return Placed(accelerator, prepared, plain, optimizer, dtype)


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
