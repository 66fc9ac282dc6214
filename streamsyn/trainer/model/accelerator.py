"""What `accelerate launch` was told, seen to be possible here and made right for this loop."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy

from streamsyn.config.train_section import TrainSection
from streamsyn.errors import ConfigError


def start_accelerator(section: TrainSection, tracking: Path | None = None) -> Accelerator:
    """Whatever `accelerate launch` was told, or one process.

    Args:
        section: `train`.
        tracking: Where trackers keep files; without it there are none.

    Raises:
        ConfigError: What it was told cannot work here.
    """
    if _wants("DEEPSPEED"):
        raise ConfigError(
            "`accelerate launch` asks for DeepSpeed, which is not supported: use FSDP2, which keeps weights "
            "and moments in host memory with fsdp_offload_params: true (deploy/accelerate/fsdp2.yaml)"
        )
    for kind in ("CP", "SP", "TP"):
        if int(os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")) > 1:
            raise ConfigError(
                f"`accelerate launch` was told to split rows or weights by {kind.lower()}, which loses the "
                "bounds between packed samples: use FSDP2 (deploy/accelerate/README.md)"
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
    return accelerator


def _wants(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def _is_half(section: TrainSection) -> bool:
    if section.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return section.precision == "bf16"
