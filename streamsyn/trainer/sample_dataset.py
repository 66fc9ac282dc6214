"""`SampleDataset`: the samples of a run as a torch dataset, for trainers that are not ours."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from streamsyn.errors import ConfigError
from streamsyn.following.follow import follow

try:
    from torch.utils.data import IterableDataset, get_worker_info
except ModuleNotFoundError as error:
    raise ConfigError("SampleDataset needs torch: pip install 'streamsyn[train]'") from error

if TYPE_CHECKING:
    import datasets

    from streamsyn.trainer.sample_position import SamplePosition

Row: TypeAlias = dict[str, Any]


def _prompt_completion(row: Row) -> Row:
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:], "seq": row["seq"]}


def _messages(row: Row) -> Row:
    return {"messages": row["messages"], "seq": row["seq"]}


def _text(row: Row) -> Row:
    *prompt, answer = row["messages"]
    texts = [message["content"] for message in prompt]
    return {"prompt": "\n\n".join(texts), "completion": answer["content"], "seq": row["seq"]}


_COLUMNS: Final[Mapping[str, Callable[[Row], Row]]] = {
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "text": _text,
    "all": dict,
}


class SampleDataset(IterableDataset[Row]):
    """The samples of a run in order, each once, while they are written; it ends when the run has ended.

    `state_dict` is the position behind the last row returned, and an iteration that begins after
    `load_state_dict` returns the rows behind it: torchdata's StatefulDataLoader keeps it in its own state.
    For Hugging Face's Trainer and TRL use `as_hf` with `callback`. Every other iteration begins at `after`.

    Each worker of a DataLoader returns the rows whose `seq` modulo the number of workers is its own, and each
    rank those of its share, given as `rank` and `world_size`. Leave these out with accelerate, which
    Trainer uses: it shares the rows between ranks itself.

    Args:
        source: A run directory, or the URL of a run at a daemon, `http://HOST:PORT/v1/runs/ID`.
        after: The `seq` of the last row already seen; None begins with the first row.
        columns: What a row has beside `seq`:
            `prompt_completion`: `prompt` and `completion`, lists of messages. TRL's SFTTrainer then trains on
            the answer alone by default.
            `messages`: the whole conversation. SFTTrainer's defaults train on all of it, mostly on the
            synthetic context, and cut off its end, the answer.
            `text`: `prompt` and `completion` as plain texts, for models without a chat template.
            `all`: every field of the sample.
        wait: Wait for a run that does not exist yet.
        rank: Number of this process among those that train together.
        world_size: Number of these processes.
        token: The daemon's token; None takes it from the environment variable `STREAMSYN_TOKEN`.

    Raises (here or while iterating):
        ConfigError: An argument is wrong, there is no such run, or the position was saved with a different
            number of ranks and workers.
        RunReplaced: A different run is in the place of the one that was read.
        StreamsynError: The rows cannot be read, as for `follow`.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        after: int | None = None,
        *,
        columns: Literal["prompt_completion", "messages", "text", "all"] = "prompt_completion",
        wait: bool = False,
        rank: int = 0,
        world_size: int = 1,
        token: str | None = None,
    ) -> None:
        super().__init__()
        if columns not in _COLUMNS:
            raise ConfigError(f"columns={columns!r}: expected {', '.join(_COLUMNS)}")
        if world_size < 1:
            raise ConfigError(f"world_size={world_size}: expected at least 1")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank}: expected 0 to {world_size - 1}, below world_size")
        self._source = os.fspath(source)
        self._after = after
        self._columns = columns
        self._wait = wait
        self._rank = rank
        self._world_size = world_size
        self._token = token
        self._seq = after
        """The last row returned."""
        self._run: float | None = None
        """The run that it belongs to."""
        self._is_loaded = False
        """Whether the next iteration begins behind `_seq`."""

    def __iter__(self) -> Iterator[Row]:
        shard, shards = self._shard()
        if not self._is_loaded:
            self._seq, self._run = self._after, None
        self._is_loaded = False
        columns = _COLUMNS[self._columns]
        with follow(
            self._source,
            self._seq,
            run=self._run,
            wait=self._wait,
            on_replaced="raise",
            token=self._token,
        ) as follower:
            for row in follower:
                if row["seq"] % shards == shard:
                    self._seq, self._run = row["seq"], follower.run
                    yield columns(row)

    def state_dict(self) -> dict[str, Any]:
        """The position; can be written as JSON."""
        return self.position(self._seq)

    def position(self, seq: int | None) -> dict[str, Any]:
        """The position behind a row of the run that is read; can be written as JSON."""
        shard, shards = self._shard()
        return {"seq": seq, "run": self._run, "shard": shard, "shards": shards}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration begin behind a position.

        Raises:
            ConfigError: It is not a position, or that of a different share of the rows. A position of all
                rows suits any share.
        """
        if missing := [key for key in ("seq", "run", "shard", "shards") if key not in state]:
            raise ConfigError(f"the position lacks {', '.join(missing)}: pass what state_dict() returned")
        shard, shards = self._shard()
        if state["shards"] > 1 and (state["shard"], state["shards"]) != (shard, shards):
            raise ConfigError(
                f"the position is that of share {state['shard'] + 1} of {state['shards']} of the samples, "
                f"but this is share {shard + 1} of {shards}: resume with as many ranks and workers"
            )
        self._seq, self._run = state["seq"], state["run"]
        self._is_loaded = True

    def as_hf(self) -> "datasets.IterableDataset":
        """Return a view of it as a `datasets.IterableDataset`, which TRL asks for.

        It shares its position with this object: `callback` keeps that in the checkpoints of a Trainer.
        """
        from datasets import IterableDataset as HfIterableDataset

        return HfIterableDataset.from_generator(self.__iter__)

    def callback(self) -> "SamplePosition":
        """A callback that keeps the position in the checkpoints of Hugging Face's Trainer, or of TRL's."""
        from streamsyn.trainer.sample_position import SamplePosition

        return SamplePosition(self)

    def _shard(self) -> tuple[int, int]:
        """Which share of the rows is this process's, and of how many."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        return self._rank * workers + number, self._world_size * workers
