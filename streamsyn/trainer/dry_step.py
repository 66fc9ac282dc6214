"""A forward and backward pass over the largest row before the training starts.

With all memory that a step needs: a training that runs out of memory does so in its first minute, and not at
step 900 and at each restart.

It changes no weights, moments, buffers or random numbers, and reads nothing from the stream.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy
import structlog
import torch
from torch.distributed.tensor import DTensor

from streamsyn.config.command_sections import TrainSection
from streamsyn.trainer.examples import Example, Key
from streamsyn.trainer.model.head import target_losses
from streamsyn.trainer.model.loss import make_batch
from streamsyn.trainer.model.optimizer import moment_bytes, parked_moments
from streamsyn.trainer.model.placed import Placed

log = structlog.get_logger()

_GRADIENT_BYTES = 4


def dry_step(
    placed: Placed, section: TrainSection, passes: int, one_pass: AbstractContextManager[Any]
) -> None:
    """Make the passes of a step with one row of `train.seq_len` tokens, all of them targets but the first.

    A collective: all ranks call it.

    Args:
        placed: The model and its optimizer, as a step finds them.
        section: The section `train`.
        passes: Rows of this rank in a step.
        one_pass: The context of a pass after which no gradients are exchanged by DDP, which would note the
            order in which they came.

    Raises:
        RuntimeError: There is not enough memory.
    """
    device = placed.accelerator.device
    devices = [device] if device.type == "cuda" else []
    batch = placed.sequence.share(make_batch((largest_row(section.seq_len),), [1.0], device))
    with (
        torch.random.fork_rng(devices),
        _buffers_kept(placed.plain),
        parked_moments(placed.optimizer, section),
        one_pass,
    ):
        reserved = _reserve(placed, section, passes)
        placed.accelerator.backward((target_losses(placed.model, batch) * batch.weights).sum())
        del reserved
    placed.optimizer.zero_grad(set_to_none=True)
    if placed.accelerator.is_main_process:
        peak = {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)} if devices else {}
        log.info("train.dry_step", tokens=section.seq_len, **peak)


def largest_row(tokens: int) -> Example:
    """A sample that needs more memory than any other row of as many tokens."""
    return Example(Key("dry", 0, 0), "", "", numpy.arange(tokens, dtype=numpy.int32) % 61, 1)


def _reserve(placed: Placed, section: TrainSection, passes: int) -> list[torch.Tensor]:
    """What else is in memory during a pass: moments, which the first step makes, and gradients of a pass
    before it.
    """
    size = 0 if placed.optimizer.state or section.optimizer_offload else moment_bytes(section)
    size += _GRADIENT_BYTES if passes > 1 else 0
    trained = (one for one in placed.plain.parameters() if one.requires_grad)
    parts = (one.to_local() if isinstance(one, DTensor) else one for one in trained)
    return [torch.empty(one.numel() * size, dtype=torch.uint8, device=one.device) for one in parts]


@contextmanager
def _buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """A context after which the model's buffers are what they were: some count tokens, or note lengths."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in before and buffer.shape == before[name].shape:
                buffer.copy_(before[name])
