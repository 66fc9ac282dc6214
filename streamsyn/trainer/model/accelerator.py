"""What `accelerate launch` was told, seen to be possible here and made right for this loop."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from streamsyn.config.train_section import TrainSection
from streamsyn.errors import ConfigError


def start_accelerator(section: TrainSection, micro_steps: int, tracking: Path | None = None) -> Accelerator:
    """Whatever `accelerate launch` was told, or one process.

    Args:
        section: `train`.
        micro_steps: Passes of this rank in a step.
        tracking: Where trackers keep files; without it there are none.

    Raises:
        ConfigError: What it was told cannot work here.
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
    accelerator = Accelerator(
        log_with=(list(section.trackers) or None) if tracking is not None else None,
        project_dir=tracking,
        mixed_precision="bf16" if half else "no",
        step_scheduler_with_optimizer=False,
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
        _tell_deepspeed(accelerator, section, micro_steps, half=half)
    return accelerator


def _tell_deepspeed(accelerator: Accelerator, section: TrainSection, micro_steps: int, *, half: bool) -> None:
    """Set what follows from `train`, whatever the environment or a configuration file of DeepSpeed's say.

    Raises:
        ConfigError: They want something else that shapes the weights.
    """
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    if plugin.zero_stage != 3:
        raise ConfigError("of DeepSpeed, zero_stage 3 alone is used; for less, there are DDP and FSDP2")
    if plugin.zero3_init_flag:
        raise ConfigError(
            "zero3_init_flag has to be false: weights would be read in bf16, and not in float32"
        )
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ConfigError(f"DeepSpeed's configuration has {key!r}: train.* says all of that, take it out")
    for key, wanted in (("bf16", half), ("fp16", False)):
        if config.get(key, {}).get("enabled", "auto") not in ("auto", wanted):
            raise ConfigError(f"DeepSpeed's configuration has {key!r} otherwise than train.precision")
    unset_hf_deepspeed_config()  # accelerate sets it whatever zero3_init_flag is
    accelerator.gradient_accumulation_steps = micro_steps  # it counts passes, and steps by itself
    config["gradient_accumulation_steps"] = micro_steps
    config["train_micro_batch_size_per_gpu"] = 1
    config["train_batch_size"] = "auto"
    config["gradient_clipping"] = section.max_grad_norm
    if half:  # as for FSDP2
        config["communication_data_type"] = "fp32"
        config["data_types"] = {"grad_accum_dtype": "fp32"}


def _wants(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def _is_half(section: TrainSection) -> bool:
    if section.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return section.precision == "bf16"
