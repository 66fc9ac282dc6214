"""Partitions: OUT/partition-000, ..., each a run directory, and OUT/partitions.json, which joins them.

A seed belongs to one partition, by a hash of its prefix group, or else of its id. Whoever reads OUT as one
sees the rows of all partitions in turn: the first of each, the second of each, and so on, without those that
have ended. A row's number in this order never changes. So partitions.json records which partitions have
ended, with their rows; and when all have, and are taken up again, a round ends: what comes later comes behind
all rows of the rounds before. One process writes the file: the one that starts the coordinators, and of
several the newest (`streamsyn.sink.epoch`).
"""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, TypeVar

import orjson

from streamsyn.errors import ConfigError, SinkError
from streamsyn.io.durable import disk_errors, make_folder, write_whole
from streamsyn.sink.epoch import Epoch, claim
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.rundir import DirectoryLock, is_foreign
from streamsyn.sink.shards import KINDS

T = TypeVar("T")

FILE: Final = "partitions.json"
_FORMAT: Final = 1
_HASH: Final = "blake2b-64"


def partition_of(key: str, number: int) -> int:
    """Return which of `number` partitions a key belongs to: the same in every process and version."""
    return int.from_bytes(blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()) % number


@dataclass(frozen=True, slots=True, kw_only=True)
class Partitions:
    """What partitions.json says.

    Attributes:
        root: OUT.
        number: Number of partitions.
        created_at: When the first run began, in Unix seconds, which identifies it.
        rounds: For each round that has ended: the rows of each partition by then, by kind.
        ended: The rows of each partition that has ended in the present round, by kind.
        epoch: That of OUT, of the process that may change the file.
    """

    root: Path
    number: int
    created_at: float
    rounds: list[dict[str, list[int]]] = field(default_factory=list)
    ended: dict[int, dict[str, int]] = field(default_factory=dict)
    epoch: Epoch | None = field(default=None, compare=False, repr=False)

    @property
    def directories(self) -> list[Path]:
        """The run directories, in order; some may not exist yet."""
        return [self.root / f"partition-{at:03d}" for at in range(self.number)]

    @property
    def has_ended(self) -> bool:
        """Whether all partitions have ended."""
        return len(self.ended) == self.number

    def ends(self, kind: str) -> list[list[int]]:
        """The rows of each partition at the end of each round."""
        return [ended[kind] for ended in self.rounds]

    def totals(self, kind: str) -> list[int | None]:
        """The rows of each partition that has ended; None for the others."""
        return [self.ended[at][kind] if at in self.ended else None for at in range(self.number)]

    def with_ended(self, at: int) -> "Partitions":
        """Record that a partition has ended: every seed that it read has its outcome.

        Raises:
            SinkError: Its manifest is damaged or has no final line, or the file cannot be written.
        """
        path = self.directories[at] / "manifest.jsonl"
        final = Manifest(path).final
        if final is None:
            raise SinkError(f"{path} has no final line, though its run has ended; run `streamsyn verify`")
        rows = {kind: int(final[kind]) for kind in KINDS}
        return self._saved(replace(self, ended={**self.ended, at: rows}))

    def with_next_round(self, ended: Collection[int] = ()) -> "Partitions":
        """Record that all partitions are taken up again, after all have ended.

        Args:
            ended: Those that have ended in the new round already, without new rows.
        """
        rows = {kind: [self.ended[at][kind] for at in range(self.number)] for kind in KINDS}
        kept = {at: self.ended[at] for at in ended}
        return self._saved(replace(self, rounds=[*self.rounds, rows], ended=kept))

    def check(self) -> None:
        """Make sure that no newer process starts the coordinators.

        Raises:
            TakenOver: One does.
        """
        if self.epoch is not None:
            self.epoch.check()

    @staticmethod
    def _saved(new: "Partitions") -> "Partitions":
        new.save()
        return new

    def save(self) -> None:
        """Replace partitions.json.

        Raises:
            TakenOver: A newer process starts the coordinators.
            SinkError: The disk failed.
        """
        self.check()
        data = {
            "format": _FORMAT,
            "created_at": self.created_at,
            "partitions": self.number,
            "hash": _HASH,
            "rounds": self.rounds,
            "ended": {str(at): rows for at, rows in self.ended.items()},
        }
        write_whole(self.root / FILE, orjson.dumps(data, option=orjson.OPT_INDENT_2))


def read_partitions(root: Path) -> Partitions | None:
    """Read OUT/partitions.json; None where OUT has no partitions.

    Raises:
        ConfigError: It cannot be read, or is of a different format.
    """
    path = root / FILE
    try:
        data: dict[str, Any] = orjson.loads(path.read_bytes())
        if (data["format"], data["hash"]) != (_FORMAT, _HASH):
            raise ConfigError(
                f"{path} has format {data['format']!r} with hash {data['hash']!r}; this streamsyn reads "
                f"format {_FORMAT} with {_HASH}"
            )
        number, ended = int(data["partitions"]), {int(at): rows for at, rows in data["ended"].items()}
        rounds = [{kind: [int(rows) for rows in one[kind]] for kind in KINDS} for one in data["rounds"]]
        sizes = {len(rows) for one in rounds for rows in one.values()}
        if number < 1 or not sizes <= {number} or not ended.keys() <= set(range(number)):
            raise ValueError(f"it does not fit to {number} partitions")
        return Partitions(
            root=root,
            number=number,
            created_at=float(data["created_at"]),
            rounds=rounds,
            ended={at: {kind: int(rows[kind]) for kind in KINDS} for at, rows in ended.items()},
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def begin_partitions(root: Path, number: int) -> Partitions:
    """Read OUT/partitions.json, or make it for a new OUT.

    Raises:
        ConfigError: OUT has a different number of partitions, or holds something else.
    """
    found = read_partitions(root)
    if found is not None:
        if found.number != number:
            raise ConfigError(
                f"{root} has {found.number} partitions, which its first run has fixed; pass --partitions "
                f"{found.number}, or choose a different --out"
            )
        return found
    if (root / "run.json").exists():
        raise ConfigError(f"{root} holds a run without partitions; choose a different --out for --partitions")
    new = Partitions(root=root, number=number, created_at=time.time())
    ours = {directory.name for directory in new.directories}  # links to other disks
    names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    if foreign := sorted(name for name in names - ours if is_foreign(name)):
        raise ConfigError(f"--out {root} is not a run directory, and is not empty ({foreign[0]}, ...)")
    try:
        make_folder(root)
    except OSError as error:
        raise ConfigError(f"cannot make the run directory {root}: {error.strerror}") from error
    new.save()
    return new


@contextmanager
def claimed_partitions(root: Path, number: int, *, takes_over: bool) -> Iterator[Partitions]:
    """The partitions of OUT, as `begin_partitions`; during the block no older process changes them.

    Args:
        root: OUT.
        number: The number of partitions.
        takes_over: Whether not to care for the lock of OUT.

    Raises:
        DirectoryInUse: A different process holds the lock.
        ConfigError: As `begin_partitions`.
        TakenOver: A newer process has claimed OUT meanwhile.
    """
    begin_partitions(root, number)
    with nullcontext() if takes_over else closing(DirectoryLock(root)):
        with disk_errors(f"claim {root}"):
            epoch = claim(root, (), is_locked=not takes_over)
        with closing(epoch):  # what an older process has written until now counts
            yield replace(begin_partitions(root, number), epoch=epoch)


def run_directories(root: Path) -> list[Path]:
    """Return the run directories that OUT stands for: those of its partitions, or OUT itself.

    Raises:
        ConfigError: As `read_partitions`.
    """
    found = read_partitions(root)
    return [root] if found is None else found.directories


def begun_directories(root: Path) -> list[Path]:
    """Return the run directories that OUT stands for and that have a run.json; all, if none has one.

    Raises:
        ConfigError: As `read_partitions`.
    """
    directories = run_directories(root)
    return [one for one in directories if (one / "run.json").exists()] or directories


def in_turn(streams: Sequence[Iterable[T]], ends: Sequence[Sequence[int]] = ()) -> Iterator[tuple[int, T]]:
    """Yield the items of all streams in the order of a joined run, each with the number of its stream.

    Args:
        streams: The rows of one kind of each partition.
        ends: The rows of each partition at the end of each round.
    """
    iterators = [iter(stream) for stream in streams]
    taken = [0] * len(iterators)
    live = set(range(len(iterators)))
    for limits in (*ends, None):
        going = [at for at in sorted(live) if limits is None or taken[at] < limits[at]]
        while going:
            for at in list(going):
                try:
                    item = next(iterators[at])
                except StopIteration:
                    live.discard(at)
                    going.remove(at)
                    continue
                taken[at] += 1
                if limits is not None and taken[at] == limits[at]:
                    going.remove(at)
                yield at, item


def place_of(row: int, ends: Sequence[Sequence[int]], totals: Sequence[int | None]) -> tuple[int, int] | None:
    """Return partition and row number there of a row of a joined run; None behind the last one.

    Args:
        row: Its number in the order of `in_turn`.
        ends: The rows of each partition at the end of each round.
        totals: The rows of each partition that has ended; None for one that may get more.
    """
    starts: Sequence[int] = [0] * len(totals)
    for limits in (*ends, totals):
        lengths = [None if end is None else end - start for start, end in zip(starts, limits, strict=True)]
        level = 0
        while live := [at for at, length in enumerate(lengths) if length is None or length > level]:
            bounds = [length for at in live if (length := lengths[at]) is not None]
            until = min(bounds) if bounds else None
            if until is None or row < (until - level) * len(live):
                at = live[row % len(live)]
                return at, starts[at] + level + row // len(live)
            row -= (until - level) * len(live)
            level = until
        starts = [start if end is None else end for start, end in zip(starts, limits, strict=True)]
    return None
