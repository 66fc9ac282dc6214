"""Keeps the position in a stream of samples in the checkpoints of Hugging Face's Trainer.

Trainer itself counts batches, and after a restart reads as many again to skip them. accelerate's stateful
data loader is not saved by Trainer. So this callback notes the last `seq` of each batch as it is collated,
and takes those that belong to a step when the step is done: the loader is a batch or more ahead.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from accelerate.data_loader import DataLoaderDispatcher
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from typing_extensions import override

from streamsyn.errors import ConfigError

_NAME: Final = "SamplePosition"
"""Under which `trainer_state.json` holds the position."""


class Positioned(Protocol):
    """What is needed of a `SampleDataset`."""

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        ...

    def position(self, seq: int | None) -> dict[str, Any]:
        """The position behind a row."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration begin behind a position."""
        ...


class SamplePosition(TrainerCallback, ExportableState):
    """Trainer callback: saves the position of a `SampleDataset` with each checkpoint, and restores it.

    It sets `ignore_data_skip`, without which Trainer would skip the rows a second time, and ends the training
    when the run has ended, where Trainer would begin again. Made by `SampleDataset.callback`.

    Raises (from `Trainer.train`):
        ConfigError: The checkpoint has no position, or an option keeps it from being known.
    """

    def __init__(self, dataset: Positioned) -> None:
        self._dataset = dataset
        self._ends: deque[int] = deque()
        """The last `seq` of each batch that was collated and belongs to no step yet."""
        self._position = dataset.state_dict()
        self._trained = 0
        """Of these, batches that were trained on."""
        self._is_shared = False
        """Whether each process reads all rows and takes its own of each block."""
        self._batches_at_once = 1
        """Batches of a round that this process collates: those of all, if it deals them out."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint's `trainer_state.json` holds."""
        return {"args": {}, "attributes": {"position": self._position}}

    @override
    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The trainer was made."""
        args.ignore_data_skip = True

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The checkpoint, if there is one, was loaded, and no row was read."""
        loader = kwargs["train_dataloader"]
        is_dealt_out = isinstance(loader, DataLoaderDispatcher)
        if args.dataloader_num_workers:
            raise ConfigError("dataloader_num_workers: must be 0, to know which rows a step was trained on")
        self._is_shared = args.world_size > 1 and not is_dealt_out
        if not args.ignore_data_skip:
            raise ConfigError("ignore_data_skip: must be True; pass the callback when the trainer is made")
        if state.global_step:
            callbacks: Any = state.stateful_callbacks  # as JSON has it: by the name of the class
            saved = callbacks.get(_NAME)
            if not saved or "position" not in saved.get("attributes", {}):
                raise ConfigError(
                    "the checkpoint has no position in the samples: it was saved without this callback"
                )
            self._position = saved["attributes"]["position"]
            self._dataset.load_state_dict(self._position)
        self._ends.clear()
        self._trained = 0
        self._batches_at_once = args.world_size if is_dealt_out else 1
        inner = getattr(loader, "base_dataloader", loader)
        inner.collate_fn = _Collator(inner.collate_fn, self._ends)

    @override
    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """A batch was trained on that does not complete a step."""
        self._trained += self._batches_at_once
        return self._stop_at_end(control, kwargs["train_dataloader"])

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """The weights have been changed by a step."""
        self._trained += self._batches_at_once
        ended = [self._ends.popleft() for _ in range(min(self._trained, len(self._ends)))]
        self._trained = 0
        if ended:
            last = _greatest(max(ended), args.device) if self._is_shared else max(ended)
            self._position = self._dataset.position(last)
        return self._stop_at_end(control, kwargs["train_dataloader"])

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """All rows have been read."""
        control.should_training_stop = True
        return control

    def _stop_at_end(self, control: TrainerControl, loader: Any) -> TrainerControl:
        """Stop when the last batch was trained on: Trainer would try all steps up to `max_steps` in vain."""
        if loader.end_of_dataloader and len(self._ends) <= self._trained:
            control.should_training_stop = True
        return control


def _greatest(seq: int, device: torch.device) -> int:
    """The greatest number of all processes; of any, as the last block is filled up with its first rows."""
    found = torch.tensor(seq, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


class _Collator:
    """Collates as before, and notes the last `seq` of each batch."""

    def __init__(self, collate: Callable[[Sequence[Mapping[str, Any]]], Any], ends: deque[int]) -> None:
        self._collate = collate
        self._ends = ends

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        if not all("seq" in row for row in rows):
            raise ConfigError(
                "rows have lost their column `seq`, which tells the position: set packing=False"
            )
        self._ends.append(max(row["seq"] for row in rows))
        return self._collate([{key: value for key, value in row.items() if key != "seq"} for row in rows])
