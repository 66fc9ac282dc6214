"""Writes the model and the optimizer: into checkpoints, and at the end the tuned model into OUT/model."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

import streamsyn
from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import SinkError
from streamsyn.trainer.model.placed import (
    Placed,
    load_optimizer,
    optimizer_tensors,
    whole_weights,
    write_model,
    write_result,
)
from streamsyn.trainer.model.pretrained import merged
from streamsyn.trainer.saving.checkpoint import Checkpoint, Checkpoints, write_folder

_RESULT = "model"
_OPTIMIZER = "optimizer.safetensors"


class Store:
    """Writes checkpoints and the result, on rank 0. The other ranks only take part in gathering the weights.

    Attributes:
        stream: The position in the stream, set before a save.
        noted: What else info.json is to hold, set before a save.
    """

    def __init__(
        self, out: Path, section: TrainSection, tokenizer: PreTrainedTokenizerBase, rank: int
    ) -> None:
        self._out = out
        self._tokenizer = tokenizer
        self._rank = rank
        self._checkpoints = Checkpoints(out, section.keep_checkpoints)
        self.stream: dict[str, Any] | None = None
        self.noted: dict[str, Any] = {}

    def save(self, placed: Placed, step: int, *, result: bool) -> None:
        """Write a checkpoint; with `result`, OUT/model too. All ranks must call it.

        Raises:
            SinkError: It cannot be written.
        """
        weights, tensors = whole_weights(placed), optimizer_tensors(placed)
        if self._rank != 0:
            return

        def fill(folder: Path) -> None:
            save_file(tensors, folder / _OPTIMIZER)
            write_model(placed, weights, self._tokenizer, folder / "model")

        info = {"step": step, "streamsyn": streamsyn.__version__, "torch": torch.__version__, **self.noted}
        self._checkpoints.write(info, self.stream, fill)
        if result:
            whole = merged(placed, weights)
            write_folder(self._out / _RESULT, lambda folder: write_result(*whole, self._tokenizer, folder))


def restore_optimizer(placed: Placed, checkpoint: Checkpoint) -> None:
    """Load the optimizer's state from a checkpoint, with any number of ranks.

    Raises:
        SinkError: The file is damaged.
    """
    path = checkpoint.folder / _OPTIMIZER
    try:
        load_optimizer(placed, path)
    except (SafetensorError, OSError) as error:
        raise SinkError(
            f"{path} is damaged ({error}); remove {checkpoint.folder} to resume from the checkpoint before it"
        ) from error
