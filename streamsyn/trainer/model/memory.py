"""Memory that does not suffice: one line with the keys that need less."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from streamsyn.errors import ConfigError
from streamsyn.sections import TrainSection


@contextmanager
def memory_told(section: TrainSection) -> Iterator[None]:
    """Turn what torch raises when memory is short into a line.

    Raises:
        ConfigError: There was not enough.
    """
    try:
        yield
    except RuntimeError as error:
        # On CPU it is a RuntimeError like any other.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        further = [] if section.gradient_checkpointing else ["train.gradient_checkpointing = true"]
        further += [] if section.lora is not None else ["train.lora"]
        raise ConfigError(
            f"out of memory, with rows of train.seq_len = {section.seq_len} tokens: try fewer"
            f"{''.join(f', {one}' for one in further)}, or more GPUs (deploy/accelerate)"
        ) from error
