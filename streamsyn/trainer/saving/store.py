"""Saves a training: checkpoints while it goes on, and at the end the tuned model in OUT/model."""

import time
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers import PreTrainedTokenizerBase

import streamsyn
from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import SinkError
from streamsyn.trainer.commands import Ranks
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.saving.checkpoint import Checkpoint, Checkpoints
from streamsyn.trainer.saving.result import write_result
from streamsyn.trainer.saving.sharded import Saver, restore, save_error

log = structlog.get_logger()

_RESULT = "model"


@dataclass(slots=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    future: Future[Any]
    began: float
    ended: float | None = None
    """When the last file was on disk, which may be a long step before it is asked for."""

    def note_end(self, _: object) -> None:
        """Note that it is done. Called in the thread that writes it."""
        self.ended = time.monotonic()


class Store:
    """Writes checkpoints and the result. Every rank has one, and all call `save` and `write_result`.

    A checkpoint is written while the training goes on. There is at most one at a time: the next save waits.

    Args:
        out: OUT.
        section: The section `train`.
        tokenizer: Saved with the result.
        ranks: All ranks.

    Attributes:
        stream: The position in the stream, set before a save.
        noted: What else info.json is to hold, set before a save.
    """

    def __init__(
        self, out: Path, section: TrainSection, tokenizer: PreTrainedTokenizerBase, ranks: Ranks
    ) -> None:
        self._out = out
        self._tokenizer = tokenizer
        self._rank = ranks.rank
        self._checkpoints = Checkpoints(out, section.keep_checkpoints)
        self._group = ranks.new_group()
        self._saver = Saver(self._checkpoints, self._group, ranks.rank, ranks.world)
        self._pending: _Pending | None = None
        self.stream: dict[str, Any] | None = None
        self.noted: dict[str, Any] = {}

    def restore(self, placed: Placed, checkpoint: Checkpoint) -> None:
        """Read weights and optimizer state from a checkpoint. All ranks must call it.

        Raises:
            SinkError: It is damaged, or of a different model.
        """
        restore(placed, checkpoint, self._group)
        self.stream = checkpoint.stream

    def save(self, placed: Placed, step: int) -> None:
        """Begin to write a checkpoint, once the one before is written.

        Raises:
            SinkError: The one before could not be written. On rank 0 only.
        """
        self.settle()
        info = {"step": step, "streamsyn": streamsyn.__version__, "torch": torch.__version__, **self.noted}
        began = time.monotonic()
        future = self._saver.start(placed, info, self.stream)
        self._pending = _Pending(step, future, began)
        future.add_done_callback(self._pending.note_end)

    def settle(self, *, wait: bool = True) -> None:
        """Wait for the checkpoint that is being written, if there is one. Without `wait`, only see whether
        it is done.

        Raises:
            SinkError: It could not be written. Earlier ones are whole. On rank 0 only: the save has failed
                on the other ranks as well, and rank 0 tells them to stop.
        """
        pending = self._pending
        if pending is None or not (wait or pending.future.done()):
            return
        wait_for([pending.future])
        self._pending = None
        if self._rank != 0:
            return
        error = pending.future.exception()
        if error is not None:
            self._checkpoints.discard(pending.step)
            raise save_error(error, self._checkpoints, pending.step) from error
        ended = time.monotonic() if pending.ended is None else pending.ended
        log.info("train.saved", step=pending.step, took_s=round(ended - pending.began, 2))

    def write_result(self, placed: Placed) -> None:
        """Write OUT/model.

        Raises:
            SinkError: It cannot be written. On rank 0 only.
        """
        write_result(placed, self._tokenizer, self._out / _RESULT)

    def close(self) -> None:
        """Wait for the checkpoint that is being written. That it could not be written is logged by rank 0:
        whoever closes a store that has not settled has an error to report already.
        """
        try:
            self.settle()
        except SinkError as error:
            log.warning("train.not_saved", error=str(error))
