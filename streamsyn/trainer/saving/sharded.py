"""Weights and optimizer state in a checkpoint, by torch.distributed.checkpoint (DCP).

Each rank writes what it holds, in a thread while the training goes on; one process without a process group
does the same. Each rank reads what it will hold, so a checkpoint is portable between one process, DDP and
FSDP2, and between numbers of ranks. Names are the model's own: `model.NAME` for weights and persistent
buffers, `optimizer.KIND.NAME` for what the optimizer keeps beside a weight, tensor or not.
"""

import warnings
from concurrent.futures import Future
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from streamsyn.errors import SinkError, StreamsynError
from streamsyn.plain_text import message
from streamsyn.trainer.model.placed import Placed, saved_weights, trained_parameters
from streamsyn.trainer.model.quantized_blocks import SCALES, empty_scales
from streamsyn.trainer.saving.checkpoint import STATE, Checkpoint, Checkpoints

_WEIGHTS, _OPTIMIZER = "model", "optimizer"


class Saver:
    """Starts saves on one rank. Every rank has one, and all start each save.

    Args:
        checkpoints: The checkpoints in OUT. Rank 0 commits each save to them once all ranks have written.
        group: A gloo group that nothing else uses; None for one process without process groups.
        rank: The number of this rank.
        world: Number of ranks.
    """

    def __init__(self, checkpoints: Checkpoints, group: Any, rank: int, world: int) -> None:
        self._checkpoints = checkpoints
        self._group = group
        self._rank = rank
        self._world = world
        # On GPUs the copy in host memory is pinned, which is slow to allocate: it is kept for the next save.
        self._reuses = torch.cuda.is_available()
        self._stager: DefaultStager | None = None

    def start(self, placed: Placed, info: dict[str, Any], stream: Any) -> Future[Any]:
        """Copy this rank's share to host memory, and write it in a thread.

        Args:
            placed: The model and its optimizer; they may change once this has returned.
            info: What info.json is to hold; its `step` names the checkpoint.
            stream: The position in the stream. Both are only used on rank 0.

        Returns:
            A future without a result. It is done when the checkpoint exists on disk, for all ranks, or fails
            on all ranks; `save_error` explains the failure.
        """
        _allow_one_process()
        if self._stager is None or not self._reuses:
            options = StagingOptions(self._reuses, False, False, self._reuses)
            self._stager = DefaultStager(options)
        future: Any = async_save(
            _share(_held(placed), self._rank, self._world),
            storage_writer=_Writer(self._checkpoints, info, stream),
            async_stager=self._stager,
            process_group=self._group,
            no_dist=self._group is None,
        )
        return future  # type: ignore[no-any-return]


class _Writer(FileSystemWriter):
    """Writes the files of a checkpoint and, on rank 0, commits it when all ranks have written theirs.

    What these methods raise on one rank, all ranks get as a CheckpointException.
    """

    def __init__(self, checkpoints: Checkpoints, info: dict[str, Any], stream: Any) -> None:
        # The tensors are in host memory already: the writer needs no stream of a GPU to copy them ahead.
        super().__init__(checkpoints.unfinished(info["step"]) / STATE, per_thread_copy_ahead=0)
        self._checkpoints = checkpoints
        self._info = info
        self._stream = stream

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self._checkpoints.begin(self._info["step"])
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        step = self._info["step"]
        folder = self._checkpoints.unfinished(step) / STATE
        for one in (one.storage_data for some in results for one in some):
            path = folder / one.relative_path
            if not path.exists() or path.stat().st_size < one.offset + one.length:
                raise SinkError(
                    f"cannot write {self._checkpoints.target(step)}: {path.name} of another rank is missing "
                    "in it; --out must be one folder on storage that all ranks share"
                )
        self._checkpoints.commit(self._info, self._stream)


def save_error(error: BaseException, checkpoints: Checkpoints, step: int) -> SinkError:
    """The error of a save in one line, from what its future raised."""
    cause, where = _cause(error)
    if isinstance(cause, StreamsynError):
        return SinkError(str(cause))
    return SinkError(
        f"cannot write {checkpoints.target(step)}{where}: {_why(cause)}; what was saved before it is whole"
    )


def restore(placed: Placed, checkpoint: Checkpoint, group: Any) -> None:
    """Read weights and optimizer state from a checkpoint of any number of ranks. All ranks must call it.

    Args:
        placed: The model and its optimizer, which are changed in place.
        checkpoint: The checkpoint.
        group: A gloo group of all ranks; None for one process without process groups.

    Raises:
        SinkError: It is damaged, or of a different model.
    """
    _allow_one_process()
    try:
        reader = FileSystemReader(checkpoint.folder / STATE)
        empty = _empty_optimizer(placed, reader.read_metadata())
        wanted = {_WEIGHTS: saved_weights(placed), _OPTIMIZER: _by_name(empty)}
        load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)
    except (Exception, CheckpointException) as error:
        # torch raises all kinds for a damaged file.
        cause, _ = _cause(error)
        raise SinkError(
            f"{checkpoint.folder} cannot be read: {_why(cause)}; remove it to resume from the checkpoint "
            "before it"
        ) from error
    read = wanted[_OPTIMIZER]  # tensors are read in place, other values are put there
    for name, parameter, kinds in empty:
        placed.optimizer.state[parameter] = {kind: read[_key(kind, name)] for kind in kinds}


_State = list[tuple[str, torch.nn.Parameter, dict[str, Any]]]


def _held(placed: Placed) -> dict[str, Any]:
    """All that this rank holds, by name; shards as DTensors."""
    state = [(name, one, placed.optimizer.state[one]) for name, one in trained_parameters(placed)]
    return {_WEIGHTS: saved_weights(placed), _OPTIMIZER: _by_name(state)}


def _by_name(state: _State) -> dict[str, Any]:
    return {_key(kind, name): value for name, _, kinds in state for kind, value in kinds.items()}


def _key(kind: str, name: str) -> str:
    return f"{kind}.{name}"


def _empty_optimizer(placed: Placed, metadata: Metadata) -> _State:
    """Tensors for what the checkpoint has of each weight, placed like the weight; None for other values."""
    kinds: dict[str, list[tuple[str, Any]]] = {}
    for key, saved in metadata.state_dict_metadata.items():
        part, _, rest = key.partition(".")
        kind, _, name = rest.partition(".")
        if part == _OPTIMIZER:
            kinds.setdefault(name, []).append((kind, saved))
    return [
        (name, one, {kind: _empty(one, kind, saved) for kind, saved in kinds.get(name, ())})
        for name, one in trained_parameters(placed)
    ]


def _empty(
    parameter: torch.nn.Parameter, kind: str, saved: TensorStorageMetadata | BytesStorageMetadata
) -> torch.Tensor | None:
    if isinstance(saved, BytesStorageMetadata):
        return None
    dtype = saved.properties.dtype
    if saved.size == parameter.size():
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if kind in SCALES:
        return empty_scales(parameter, saved.size.numel())
    return torch.zeros(saved.size, dtype=dtype, device=parameter.device)


def _share(held: dict[str, dict[str, Any]], rank: int, world: int) -> dict[str, dict[str, Any]]:
    """What a rank saves: its shards, its share of the tensors that every rank has whole, and all other
    values, of which one rank's are written.

    Without the division each rank would copy all whole tensors to host memory, to write a part of them.
    """
    whole = [(part, name) for part, some in held.items() for name, one in some.items() if _is_whole(one)]
    whole.sort(key=lambda key: (-held[key[0]][key[1]].nbytes, key))
    loads, of_others = [0] * world, set()
    for part, name in whole:
        least = loads.index(min(loads))
        loads[least] += held[part][name].nbytes
        if least != rank:
            of_others.add((part, name))
    return {
        part: {name: _detached(one) for name, one in some.items() if (part, name) not in of_others}
        for part, some in held.items()
    }


def _is_whole(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, DTensor)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _cause(error: BaseException) -> tuple[BaseException, str]:
    """What went wrong first, and on which rank if it was not rank 0."""
    if not isinstance(error, CheckpointException):
        return error, ""
    rank, (cause, _) = min(error.failures.items())
    return cause, f" on rank {rank}" if rank else ""


def _why(error: BaseException) -> str:
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return message(why)


def _allow_one_process() -> None:
    """Do without DCP's warning that there is no process group."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
