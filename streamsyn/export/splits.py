"""The split of each sample, and the names of files, splits and configurations."""

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

from streamsyn.errors import ConfigError
from streamsyn.records import digest

MAX_TASKS = 256
"""Splitting by task keeps one file open per task."""
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_RESERVED = ("all", "default")
"""Names with a meaning in `datasets`."""


@dataclass(frozen=True, slots=True)
class Split:
    """The split of a sample, and its task if each task is a configuration of its own."""

    task: str | None
    name: str


class Splits:
    """Assigns samples to splits by a digest of the seed's id, so all samples of a seed are in one split.

    Args:
        given: `task` and `NAME=SHARE,...`, each at most once, in any order.
        seed: Seed of the random split.

    Raises:
        ConfigError: `given` is invalid.
    """

    def __init__(self, given: Sequence[str], seed: int) -> None:
        self._seed = str(seed)
        shares = [one for one in given if one != "task"]
        self.by_task = len(shares) < len(given)
        if len(shares) > 1 or len(given) - len(shares) > 1:
            raise ConfigError("--split: give `task` once, shares once, or both")
        self.shares = _shares(shares[0]) if shares else {"train": 1.0}
        self._names = list(self.shares)
        self._bounds = list(accumulate(self.shares.values()))[:-1]

    def of(self, task: str, seed_id: str) -> Split:
        """Return the split of a sample."""
        position = int.from_bytes(digest("split", self._seed, seed_id)[:8]) / 2**64
        return Split(task if self.by_task else None, self._names[bisect_right(self._bounds, position)])


def _shares(text: str) -> dict[str, float]:
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise ConfigError(
                f"--split {text}: {name!r} is not a valid split name; use letters, digits, _ and ."
            )
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not value > 0 or name in shares:
            raise ConfigError(
                f"--split {text}: give `task`, or each name once with a share, as in train=0.95"
            )
        shares[name] = value
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise ConfigError(f"--split {text}: the shares add up to {sum(shares.values()):g}, not to 1")
    return shares


class Layout:
    """The names of files, splits and configurations of an export.

    Args:
        form: The format.
        splits: The splits, and whether each task is a configuration of its own.
    """

    def __init__(self, form: str, splits: Splits) -> None:
        self._is_saved = form == "datasets"
        self._by_task = splits.by_task
        self.is_single = not splits.by_task and len(splits.shares) == 1
        """Whether there is one split only."""
        self._has_shares = len(splits.shares) > 1
        self._names = TaskNames()

    def stem(self, split: Split) -> str:
        """Return the beginning of the names of a split's files."""
        if self._is_saved:
            return f"{self.saved_name(split)}/data" if not self.is_single else "data"
        folder = f"data/{self._names(split.task)}" if split.task is not None else "data"
        return f"{folder}/{split.name}"

    def saved_name(self, split: Split) -> str:
        """Return the key of a split in a saved `datasets` directory."""
        if split.task is None:
            return split.name
        return self._names(split.task) + (f".{split.name}" if self._has_shares else "")

    def configs(self, written: Collection[Split]) -> list[tuple[str, list[tuple[str, str]]]]:
        """Return (name, [(split, file pattern)]) of each configuration that has rows."""
        if self._is_saved or not written:
            return []
        pattern = "data/*/{}-*" if self._by_task else "data/{}-*"
        names = dict.fromkeys(split.name for split in written)
        configs = [("default", [(name, pattern.format(name)) for name in names])]
        tasks: dict[str, list[tuple[str, str]]] = {}
        for split in written:
            if split.task is not None:
                tasks.setdefault(self._names(split.task), []).append((split.name, f"{self.stem(split)}-*"))
        return configs + sorted(tasks.items())


class TaskNames:
    """Turns tasks into distinct names for folders and configurations: letters, digits and underscores.

    Raises (when called):
        ConfigError: There are more than MAX_TASKS.
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._taken = set(_RESERVED)

    def __call__(self, task: str) -> str:
        """Return the name for a task, which stays the same."""
        if task not in self._names:
            if len(self._names) == MAX_TASKS:
                raise ConfigError(f"--split task: there are more than {MAX_TASKS} tasks; split by shares")
            name = re.sub(r"[^A-Za-z0-9]+", "_", task).strip("_")[:64]
            if not name or name.casefold() in self._taken:  # file systems may ignore case
                name = f"{name or 'task'}_{digest(task).hex()[:12]}"
            self._names[task] = name
            self._taken.add(name.casefold())
        return self._names[task]
