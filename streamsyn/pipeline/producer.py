"""The producer: reads seeds, skips what already has an outcome, and puts the rest on the work queue.

The order on the queue is that of reading, except that prefix groups are kept together, so that their shared
prefix stays in a server's cache (`GroupOrder`). With `seeds.task_losses`, hard tasks come first: a trainer
keeps the mean loss of each task in OUT/task_losses.json (`TaskLosses`), and drafts are drawn by task in
proportion to these losses (`TaskOrder`).

Both only change the order: every seed that is read still gets its outcome, and `seeds.limit` counts seeds
that are read. A run that is stopped, or a stream without end, has done more of the hard tasks, as far as
`seeds.task_window` looks ahead.
"""

import asyncio
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, Generic, TypeAlias, TypeVar

import orjson
import structlog

from streamsyn.config.loading import Config
from streamsyn.pipeline.reopened import Reopened, Sought
from streamsyn.queues import BoundedQueue
from streamsyn.records import BadSeed, Draft, Entry, Seed, Work, draft_key
from streamsyn.seeds.reader import SeedReader, is_spooled
from streamsyn.sink.completed_keys import Claim, Claims
from streamsyn.sink.partitions import partition_of
from streamsyn.telemetry import Counters

log = structlog.get_logger()

T = TypeVar("T")
_Batch: TypeAlias = list[tuple[str, Work]]
_Reading: TypeAlias = asyncio.Future[_Batch | None]

FLOOR = 0.1
"""The least weight of a task, as a share of the heaviest task's."""
PATIENCE = 4
"""No item waits while more than this number of windows of other items are handed out."""
_REFRESH_S = 1.0
"""Shortest time between two looks at the trainer's losses."""


class Producer:
    """Feeds the work queue. Reading, parsing and looking up keys happen in one thread of its own.

    Args:
        reader: Reads the sources of seeds.
        claims: Knows which drafts are finished, and which seeds this run has read before.
        config: Sets the drafts per seed, the limit of seeds, and the order.
        counters: Counts what is read.
        group_of: The recipe's `group`: returns the prefix group of a seed.
        reopened: The rejects that a retry asks again, if one is open.
        look: Called with each seed that is put on the queue.
    """

    def __init__(
        self,
        reader: SeedReader,
        claims: Claims,
        config: Config,
        counters: Counters,
        group_of: Callable[[Seed], str] = lambda _: "",
        reopened: Reopened | None = None,
        look: Callable[[Seed], None] = lambda _: None,
    ) -> None:
        self._reader = reader
        self._claims = claims
        self._drafts = range(config.recipe.contexts_per_seed)
        self._limit = config.seeds.limit
        self._counters = counters
        self._group_of = group_of
        self._reopened = reopened
        self._look = look
        self._has_groups = config.seeds.group_window > 0
        at, _, number = (config.seeds.partition or "0/1").partition("/")
        self._partition, self._partitions = int(at), int(number)
        self._order: GroupOrder[Work] | TaskOrder[Work] = GroupOrder(config.seeds.group_window)
        self._losses: TaskLosses | None = None
        self._refreshed = -math.inf
        if config.seeds.task_losses is not None:
            self._losses = TaskLosses(config.seeds.task_losses)
            window, exponent = config.seeds.task_window, config.seeds.task_exponent
            self._order = TaskOrder(_task, self._losses, window, exponent, config.run.seed)
        self._taken = 0

    async def run(self, work: BoundedQueue[Work]) -> None:
        """Put everything that has no outcome yet on `work`.

        Raises:
            ConfigError: A source cannot be read to its end; what was read is on the queue.
            SinkError: Seeds from a pipe cannot be spooled.
        """
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="seeds")
        batches = self._batches()
        reading: _Reading | None = None
        at_end = False
        try:
            while not at_end or self._order:
                if reading is None and not at_end and self._order.has_room:
                    reading = loop.run_in_executor(thread, next, batches, None)
                # Items that were read never wait for reading, and go on the queue before an error is raised.
                if reading is not None and (not self._order or _has_batch(reading)):
                    batch, reading = await reading, None
                    self._order.add(batch or ())
                    at_end = batch is None
                if self._order:
                    await self._refresh_losses()
                    await work.put(self._order.take())
            self._counters.reading_done = True
        finally:
            if reading is not None:
                reading.cancel()
            self._reader.stop()  # ends a read that waits for stdin or the inbox
            thread.submit(batches.close)
            thread.shutdown(wait=False)

    async def _refresh_losses(self) -> None:
        """Read the trainer's losses again, at most every _REFRESH_S."""
        now = asyncio.get_running_loop().time()
        if self._losses is not None and now - self._refreshed >= _REFRESH_S:
            self._refreshed = now
            await asyncio.to_thread(self._losses.refresh)

    def _batches(self) -> Generator[_Batch]:
        if self._reopened is None:
            yield from self._unread(None)
            return
        for drafts in self._reopened.drafts():
            self._counters.drafts_read += len(drafts)
            yield [(self._group(draft), draft) for draft in drafts]
        with self._reopened.in_sources() as sought:
            yield from self._unread(sought)

    def _unread(self, sought: Sought | None) -> Iterator[_Batch]:
        """What the sources hold and has no outcome yet, and what is `sought` there to be asked again."""
        for entries in self._reader.batches(self._is_known, self._is_taken):
            items = [(entry, self._work_of(entry)) for entry in entries]
            finished = self._claims.finished([key for _, parts in items for key, _ in parts])
            if sought is not None:
                items = [(entry, _sought(sought, entry, parts, finished)) for entry, parts in items]
            with self._claims.batch():
                new = [work for entry, parts in items for work in self._unfinished(entry, parts, finished)]
            for item in new:
                if isinstance(item, Draft):
                    self._look(item.seed)
            grouped = [(self._group(item), item) for item in new]
            yield grouped  # outside the transaction: the next batch may be asked for much later
            if self._is_enough:
                return

    def _group(self, item: Work) -> str:
        return "" if isinstance(item, BadSeed) or not self._has_groups else self._group_of(item.seed)

    @property
    def _is_enough(self) -> bool:
        return self._limit is not None and self._taken >= self._limit

    def _work_of(self, entry: Entry) -> list[tuple[bytes, Work]]:
        """The drafts of a seed, or the one bad line, each with its key."""
        if isinstance(entry, BadSeed):
            return [(entry.key, entry)]
        drafts = [Draft(entry, number) for number in self._drafts]
        return [(draft.key, draft) for draft in drafts]

    def _unfinished(
        self, entry: Entry, parts: Sequence[tuple[bytes, Work]], finished: set[bytes]
    ) -> list[Work]:
        """The parts of an entry without an outcome; none if this run has read the entry before."""
        if self._is_enough:
            return []
        if not self._is_own(entry):
            self._pass_over(entry, parts[0][0])
            return []
        self._counters.seeds_read += 1
        left = [work for key, work in parts if key not in finished]
        # Finished entries need not be claimed, which makes a resume twice as fast; but a limit must count
        # each seed once.
        must_claim = bool(left) or self._limit is not None
        if must_claim and self._claims.claim(parts[0][0], spooled=is_spooled(entry)) is Claim.REPEATED:
            self._counters.repeated += 1
            return []
        self._taken += isinstance(entry, Seed)
        self._counters.drafts_read += len(parts)
        self._counters.finished_before += len(parts) - len(left)
        return left

    def _is_own(self, entry: Entry) -> bool:
        """Whether an entry belongs to this partition. A prefix group is not split."""
        if self._partitions == 1:
            return True
        key = entry.key.hex() if isinstance(entry, BadSeed) else self._group_of(entry) or entry.id
        return partition_of(key, self._partitions) == self._partition

    def _pass_over(self, entry: Entry, key: bytes) -> None:
        """Count an entry of a different partition.

        It is claimed: a seed with its id that comes later is a repeated one in all partitions, even if its
        group is of this one. And the limit counts it: all partitions read the same seeds.
        """
        if self._claims.claim(key) is not Claim.REPEATED:
            self._taken += isinstance(entry, Seed)
            self._counters.other_partitions += 1

    def _is_taken(self, seed_id: str) -> bool:
        """Whether this run has read a seed with this id."""
        return self._claims.is_claimed(draft_key(seed_id, 0))

    def _is_known(self, entry: Entry) -> bool:
        """Whether the spool need not hold an entry: it holds it already, or all its drafts are finished."""
        return self._claims.is_known([key for key, _ in self._work_of(entry)])


def _sought(
    sought: Sought, entry: Entry, parts: list[tuple[bytes, Work]], finished: set[bytes]
) -> list[tuple[bytes, Work]]:
    """The parts of an entry, with those that are asked again no longer among the finished ones."""
    again = sought.found(entry, parts, finished)
    finished.difference_update(again)
    return [(key, again.get(key, work)) for key, work in parts]


def _task(item: Work) -> str:
    return "" if isinstance(item, BadSeed) else item.seed.task


def _has_batch(reading: _Reading) -> bool:
    """Whether reading is done, without an error."""
    return reading.done() and reading.exception() is None


class GroupOrder(Generic[T]):
    """Hands out items so that those of one group follow each other; without groups it is a plain queue.

    The oldest item is next, unless one of the same group as the last is within the window. So every item is
    handed out fewer than `window` places before or after its place in the order of reading.

    Args:
        window: How far an item may be moved, in items; below 2 it is a plain queue.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._items: dict[int, tuple[str, T]] = {}  # by number, in the order of reading
        self._by_group: dict[str, deque[int]] = {}
        self._last_group = ""
        self._added = 0
        self._has_groups = False

    def __len__(self) -> int:
        return len(self._items)

    @property
    def has_room(self) -> bool:
        """Whether to read ahead before the next item is handed out: only where there are groups."""
        return not self._items or (self._has_groups and len(self._items) < self._window)

    def add(self, items: Iterable[tuple[str, T]]) -> None:
        """Add the items that were read next, each with its group; "" is no group."""
        for group, item in items:
            self._items[self._added] = (group, item)
            if group:
                self._has_groups = True
                self._by_group.setdefault(group, deque()).append(self._added)
            self._added += 1

    def take(self) -> T:
        """Remove and return the next item.

        Raises:
            LookupError: There is none.
        """
        oldest = next(iter(self._items), None)
        if oldest is None:
            raise LookupError("no item to hand out")
        number = oldest
        # Only near the oldest, so that fewer than `window` items are ever handed out before that one.
        if (same := self._by_group.get(self._last_group)) and same[0] - oldest < self._window:
            number = same[0]
        group, item = self._items.pop(number)
        if group:
            numbers = self._by_group[group]
            numbers.popleft()  # it is always the first: a group keeps its order
            if not numbers:
                del self._by_group[group]
        self._last_group = group
        return item


class TaskOrder(Generic[T]):
    """Hands out items of hard tasks first; has the same methods as `GroupOrder`.

    A task is drawn by its weight, and its oldest item is next; the rest of that item's group follows, so that
    groups stay together. While no loss is known, the oldest item is next. The same items and losses give the
    same order.

    Args:
        task_of: Returns the task of an item.
        losses: The losses, read again for each draw.
        window: Number of items to hold, out of which the next is drawn.
        exponent: 0 gives all tasks the same weight, 1 weighs them in proportion to their losses.
        seed: Seed of the draws.
    """

    def __init__(
        self, task_of: Callable[[T], str], losses: "TaskLosses", window: int, exponent: float, seed: int
    ) -> None:
        self._task_of = task_of
        self._losses = losses
        self._window = window
        self._exponent = exponent
        self._rng = Random(f"tasks {seed}")
        self._items: dict[int, tuple[str, T, int]] = {}  # by number, in the order of reading
        self._by_task: dict[str, deque[int]] = {}
        self._by_group: dict[str, deque[int]] = {}
        self._last_group = ""
        self._added = self._taken = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def has_room(self) -> bool:
        """Whether to read ahead before the next item is handed out."""
        return len(self._items) < self._window

    def add(self, items: Iterable[tuple[str, T]]) -> None:
        """Add the items that were read next, each with its group; "" is no group."""
        for group, item in items:
            self._items[self._added] = (group, item, self._taken)
            self._by_task.setdefault(self._task_of(item), deque()).append(self._added)
            if group:
                self._by_group.setdefault(group, deque()).append(self._added)
            self._added += 1

    def take(self) -> T:
        """Remove and return the next item.

        Raises:
            LookupError: There is none.
        """
        oldest = next(iter(self._items), None)
        if oldest is None:
            raise LookupError("no item to hand out")
        number = self._next(oldest)
        self._last_group, item, _ = self._items.pop(number)
        self._taken += 1
        return item

    def _next(self, oldest: int) -> int:
        if self._taken - self._items[oldest][2] >= PATIENCE * self._window:
            return oldest
        same = self._first(self._by_group, self._last_group)
        if same is not None:
            return same
        losses = self._losses.losses
        if not losses:
            return oldest
        firsts = {task: self._first(self._by_task, task) for task in list(self._by_task)}
        tasks = [task for task, first in firsts.items() if first is not None]
        weights = task_weights(tasks, losses, self._exponent)
        (task,) = self._rng.choices(list(weights), list(weights.values()))
        first = firsts[task]
        assert first is not None
        return first

    def _first(self, lines: dict[str, deque[int]], name: str) -> int | None:
        """The oldest number in the line `name` that was not handed out yet; an empty line is dropped."""
        line = lines.get(name)
        while line and line[0] not in self._items:
            line.popleft()
        if not line:
            lines.pop(name, None)
            return None
        return line[0]


class TaskLosses:
    """The loss of each task, from a file that a trainer replaces now and then and that need not exist yet.

    Args:
        path: The file: `{"tasks": {task: {"loss": nats, ...}, ...}, ...}`.

    Attributes:
        losses: Mean loss in nats, by task, as read last.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: tuple[int, int, int] | None = None
        self._is_unreadable = False
        self.losses: Mapping[str, float] = {}

    def refresh(self) -> None:
        """Read the file again if it has changed; a damaged file is logged and changes nothing. Blocks."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                version = (found.st_mtime_ns, found.st_ino, found.st_size)
                if version == self._version:
                    return
                self._version = version
                data = file.read()
            self.losses = _losses(orjson.loads(data))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            if not (
                self._is_unreadable and isinstance(error, OSError)
            ):  # a damaged file is logged once per version
                log.warning("seeds.task_losses_unreadable", path=str(self._path), why=why)
            self._is_unreadable = isinstance(error, OSError)
        else:
            self._is_unreadable = False
            shown = {task: round(loss, 3) for task, loss in self.losses.items()}
            log.info("seeds.task_losses", path=str(self._path), losses=shown)


def task_weights(tasks: Iterable[str], losses: Mapping[str, float], exponent: float) -> dict[str, float]:
    """The weight of each task: its loss (the mean loss if unknown) to the power of `exponent`.

    Scaled so that the heaviest task has 1; no task has less than FLOOR.
    """
    mean = sum(losses.values()) / len(losses)
    raw = {task: losses.get(task, mean) for task in tasks}
    heaviest = max(raw.values())
    return {
        task: max(FLOOR, (loss / heaviest) ** exponent) if heaviest else 1.0 for task, loss in raw.items()
    }


def _losses(found: Any) -> dict[str, float]:
    losses = {
        task: float(entry["loss"]) for task, entry in found["tasks"].items() if entry["loss"] is not None
    }
    if any(not math.isfinite(loss) or loss < 0 for loss in losses.values()):
        raise ValueError("a loss is negative or not finite")
    return losses
