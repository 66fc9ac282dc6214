"""The accelerator for this rank: what `accelerate launch` asks for, checked and corrected for this loop."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy

from streamsyn.config.train_section import TrainSection
from streamsyn.errors import ConfigError


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
                "boundaries between packed samples: use FSDP2 (deploy/accelerate/README.md)"
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
