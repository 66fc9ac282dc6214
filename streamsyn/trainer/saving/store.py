"""What of a training goes to disk and comes back: checkpoints, and the tuned model in OUT/model."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

import streamsyn
from streamsyn.config.train_section import TrainSection
from streamsyn.errors import SinkError
from streamsyn.trainer.model.adapters import merged
from streamsyn.trainer.model.placed import (
    Placed,
    load_optimizer,
    optimizer_tensors,
    whole_weights,
    write_model,
    write_result,
)
from streamsyn.trainer.saving.checkpoint import Checkpoint, Checkpoints, write_folder

RESULT = "model"
"""OUT/model: what the training is for."""


_OPTIMIZER = "optimizer.safetensors"


class Store:
    """Writes and reads OUT, on rank 0; the others only take part in bringing the weights together.

    Attributes:
        stream: Where the stream stands, set before a save.
        noted: What else to keep, set before a save.
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
        """Write a checkpoint; with `result`, OUT/model too. All ranks call it.

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
            write_folder(self._out / RESULT, lambda folder: write_result(*whole, self._tokenizer, folder))


def restore_optimizer(placed: Placed, checkpoint: Checkpoint) -> None:
    """Give the optimizer the state in a checkpoint, at any number of ranks.

    Raises:
        SinkError: It is damaged.
    """
    path = checkpoint.folder / _OPTIMIZER
    try:
        load_optimizer(placed, path)
    except (SafetensorError, OSError) as error:
        raise SinkError(
            f"{path} is damaged ({error}); remove {checkpoint.folder} to go on from the checkpoint before it"
        ) from error
