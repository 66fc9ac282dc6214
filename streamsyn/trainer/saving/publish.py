"""OUT/weights/: the model as it is tuned so far, for the servers that write the contexts.

    step_100/   a Hugging Face directory: adapters merged, in the precision the model had at first
    LATEST      the name of the newest, written last

A server loads them under the folder's name, which each of its answers tells from then on, and contexts carry
as `weight_version`.
"""

import re
from pathlib import Path

import structlog
from transformers import PreTrainedTokenizerBase

from streamsyn.errors import SinkError
from streamsyn.sections import FleetSection, PublishSection
from streamsyn.sink.rundir import write_whole
from streamsyn.trainer.model.merging import merged
from streamsyn.trainer.model.model import Placed, write_result
from streamsyn.trainer.model.sharing import whole_weights
from streamsyn.trainer.saving.checkpoint import LATEST, remove, write_folder
from streamsyn.trainer.saving.servers import Servers

FOLDER = "weights"
_NAME = re.compile(r"step_(\d+)")

log = structlog.get_logger()


class Publisher:
    """Writes weights and has servers load them. Every rank has one, and all of them gather; rank 0 does the
    rest.

    Args:
        out: OUT.
        section: Says how many stay, and which servers there are.
        fleet: Says which keys they want.
        tokenizer: Goes with the weights.
        rank: This one.

    Attributes:
        servers: Those that are told; to be entered, on rank 0, before anything is published.

    Raises:
        ConfigError: What stands for a server is no URL, or its key is not to be had.
    """

    def __init__(
        self,
        out: Path,
        section: PublishSection,
        fleet: FleetSection,
        tokenizer: PreTrainedTokenizerBase,
        rank: int,
    ) -> None:
        self._root = out.resolve() / FOLDER  # servers have another working directory
        self._keep = section.keep
        self._tokenizer = tokenizer
        self._rank = rank
        self.servers = Servers(section, fleet)

    def publish(self, placed: Placed, step: int) -> None:
        """Write the weights after `step`, and have servers told. All ranks call it.

        Weights that cannot be written are said, and passed over: the training needs none of them.
        """
        weights = whole_weights(placed)
        if self._rank != 0:
            return
        target = self._root / f"step_{step}"
        try:
            whole = merged(placed, weights)
            write_folder(target, lambda folder: write_result(*whole, self._tokenizer, folder))
            write_whole(self._root / LATEST, f"{target.name}\n".encode())
        except (SinkError, OSError) as error:
            log.warning("train.not_published", step=step, error=str(error))
            return
        log.info("train.weights", step=step, path=str(target))
        self._prune(step)
        self.servers.offer(target)

    def _prune(self, newest: int) -> None:
        found = [*self._root.glob("step_*")]
        # The others are what a kill left, and of steps that come again: the training began before them.
        whole = {int(named[1]): one for one in found if (named := _NAME.fullmatch(one.name))}
        kept = sorted(step for step in whole if step <= newest)[-self._keep :]
        gone = {*found} - {whole[step] for step in kept} - self.servers.in_use
        for folder in sorted(gone, key=lambda folder: not folder.suffix):  # what a kill left is in the way
            try:
                remove(folder)
            except OSError as error:
                log.warning("train.weights_not_removed", path=str(folder), why=error.strerror)
