"""What becomes of the activations between the forward and the backward pass.

By default rows of 8,192 tokens and more keep the inputs of each layer only: everything in a layer is
computed again in the backward pass. `selective` also keeps the results of attention, whose cost grows with
the square of a sample's length. With `train.activation_offload`, what is kept waits in host memory.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError

_ATTENTION = (
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._flash_attention_forward",
    "torch_attn._varlen_attn",
    "flash_attn._flash_attn_varlen_forward",
    "flash_attn_3._flash_attn_forward",
)
"""Operators whose results `selective` keeps, as they are registered by torch and by flash-attention."""
_FROM_TOKENS = 8192


def is_recomputed(section: TrainSection) -> bool:
    """Whether activations are computed again in the backward pass."""
    wanted = section.gradient_checkpointing
    if wanted == "auto":
        return section.activation_offload or section.seq_len >= _FROM_TOKENS
    return bool(wanted)


def recompute(model: Any, section: TrainSection) -> None:
    """Make the layers of a model of transformers compute activations again, as configured.

    Raises:
        ConfigError: The model does not support it, and it is asked for.
    """
    if not is_recomputed(section):
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        if section.gradient_checkpointing == "auto" and not section.activation_offload:
            return
        raise ConfigError(
            f"train.gradient_checkpointing: {type(model).__name__} does not support it; set it to false"
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if section.gradient_checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps_attention)
    model.gradient_checkpointing_enable(options)


def offload(section: TrainSection, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes a context whose activations wait in host memory, if `train.activation_offload`."""
    if not section.activation_offload:
        return nullcontext
    return partial(save_on_cpu, pin_memory=device.type == "cuda")


def _keeps_attention(_context: Any, operator: Any, *_given: Any, **_named: Any) -> CheckpointPolicy:
    name = str(operator)  # "aten._flash_attention_forward.default"
    kept = name.rpartition(".")[0] in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
